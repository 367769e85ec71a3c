"""What attention takes off the scores of packed keys, for a whole sequence."""

import numpy as np

from rotormlx.codec import reference
from rotormlx.codec.format import Packed


def of_sequence(q, packed, chosen, *, scale, channel_scale, sink, packed_tokens, tokens, row=None):
    """The ``noise`` of :func:`reference.attend`, float64 ``[B, H, L, tokens]``.

    Args:
        q: Queries, float64 ``[B, H, L, D]``.
        packed: Keys in whole blocks, of which the first ``packed_tokens`` tokens count; None if
            nothing is packed.
        chosen: The codec of the keys.
        scale: Factor of the scores.
        channel_scale: Of the keys, ``[K, D]``, or None.
        sink: Exact tokens before the packed ones.
        packed_tokens: Packed tokens.
        tokens: All tokens.
        row: The batch row of the keys that the queries are of; None if they are of all.
    """
    noise = np.zeros((*q.shape[:3], tokens))
    if packed_tokens:
        rows = slice(None) if row is None else slice(row, row + 1)
        packed = Packed(*(None if a is None else np.array(a[rows]) for a in packed))
        with np.errstate(invalid="ignore", over="ignore"):  # what does not count may be spoiled
            found = reference.score_noise(
                q, packed, chosen, scale=scale, channel_scale=channel_scale
            )
        noise[..., sink : sink + packed_tokens] = found[..., :packed_tokens]
    return noise


def of_view(q, view, scale):
    """The same for keys in MLX, all rows of a batch alike."""
    return _of_rows(q, view, None, view.channel_scale, (view.packed_tokens, view.tokens), scale)


def of_row(q, view, row, scale):
    """The same for one batch row; its own channel scale, if any, and its own counts are taken."""
    channel_scale = view.channel_scale
    if channel_scale is not None and channel_scale.ndim == 3:
        channel_scale = channel_scale[row]
    return _of_rows(q, view, row, channel_scale, view.lengths[row], scale)


def _of_rows(q, view, row, channel_scale, counts, scale):
    packed_tokens, tokens = counts
    return of_sequence(
        q,
        view.packed,
        view.codec,
        scale=scale,
        channel_scale=None if channel_scale is None else np.array(channel_scale),
        sink=view.sink if packed_tokens else 0,
        packed_tokens=packed_tokens,
        tokens=tokens,
        row=row,
    )
