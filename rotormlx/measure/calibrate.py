"""Measures a model's keys, values and queries on a short text, and derives transforms.

An error in a key matters only in the directions of the queries, and a quantizer after a rotation
spreads its error evenly over all channels. So the channels that matter to queries are enlarged
before quantization, and channels that vary but matter little are reduced. Let K and Q be the second
moments of the (centred) keys and of the queries of a KV head. The map T of keys with the smallest
loss satisfies ``T^T T = Q # K^-1``, the geometric mean of these matrices. Any rotation may follow.
Three transforms approximate it:

- ``scale``: the best diagonal T, the channel scale ``s_i = (K_ii / Q_ii)^(1/4)``: D numbers;
- ``klt``: the whole map, ``T = L^(-1/4) U^T Q^(1/2)`` with ``Q^(1/2) K Q^(1/2) = U L U^T``: D²
  numbers;
- ``rotors``: the best diagonal after a cascade of learned rotors, which replaces U.

For values, Q is 1, because their errors reach the output unchanged.

Source: docs/FORMAT.md, section 11; docs/CALIBRATION.md has measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from rotormlx.codec.format import BLOCK, KEY, ROLES
from rotormlx.codec.rotation import rotation
from rotormlx.config import RotorConfig
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.measure.layer_losses import losses
from rotormlx.measure.scoring import CHUNK
from rotormlx.measure.text import default_text
from rotormlx.mlx import hook, hosts
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.fingerprint import fingerprint
from rotormlx.mlx.host_caches import leaves
from rotormlx.mlx.integration import examine
from rotormlx.mlx.learned import fitted
from rotormlx.mlx.probe import compress
from rotormlx.storage.calibration import LOSS, TRANSFORMS, Calibration

Floats = NDArray[np.float64]
# Number of tokens that a calibration reads; more tokens change little (docs/CALIBRATION.md).
TOKENS = 512
_SINK = RotorConfig().sink
# A second moment of few tokens is shrunk towards its diagonal by this share, and no channel counts
# less than this share of the mean. Otherwise rare directions would be enlarged.
_SHRINKAGE = 0.1
_FLOOR = 1 / 64**2


def calibrate(
    model: Module,
    tokenizer: Any,
    *,
    transform: str = "scale",
    text: str | None = None,
    tokens: int = TOKENS,
    layers: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Read a text with the exact cache, and derive a transform from the keys, values and queries.

    Args:
        model: The first value that ``mlx_lm.load`` returned.
        tokenizer: The second value that it returned.
        transform: One of ``TRANSFORMS``.
        text: The text, of which the last tokens are read; prose of CPython's documentation if None.
        tokens: Number of tokens to read.
        layers: Whether to measure the loss of each layer too, so that bits can be distributed. The
            text is read again twice per layer, in float32.
        progress: Called with the number of tokens read or, later, of layers done, if given.

    Returns:
        The calibration, with losses if ``layers``.

    Raises:
        ValueError: If the transform is unknown, the text or ``tokens`` is too short, the model
            has a layer that cannot be calibrated, or its predictions are not finite.
    """
    if transform not in TRANSFORMS:
        raise ValueError(
            f"[calibration] A transform must be one of {', '.join(TRANSFORMS)}, but {transform!r} "
            "was given."
        )
    least = _SINK + 2 * BLOCK
    if tokens < least:
        raise ValueError(
            f"[calibration] At least {least} tokens must be read, but {tokens} were given; raise "
            "tokens, or leave it out."
        )
    text = default_text() if text is None else text
    # An English token has 4 or 5 characters; encoding all of a long text would take long.
    ids: list[int] = tokenizer.encode(text[-8 * tokens :])[-tokens:]
    if len(ids) < tokens:
        raise ValueError(
            f"[calibration] A text of at least {tokens} tokens is required, but this one has "
            f"{len(ids)}; give a longer one, or lower tokens."
        )
    tell = progress or (lambda n: None)
    numbers: dict[str, NDArray[np.float32]] = {}
    for layer, (queries, keys, values) in _moments(model, ids, tell).items():
        for role, seen_by, moment in ((KEY, queries, keys), (ROLES[1], None, values)):
            for name, array in _transformed(transform, moment, seen_by, layer, role).items():
                numbers[f"{layer}.{name}"] = array.astype(np.float32)
        tell(1)
    made = Calibration(transform, fingerprint(model), numbers, len(ids))
    if layers:
        for layer, pair in zip(made.layers, losses(model, ids, made.layers, tell), strict=True):
            for role, loss in zip(ROLES, pair, strict=True):
                numbers[f"{layer}.{role}{LOSS}"] = np.array([loss], np.float32)
    return made


# ---- moments of the text ------------------------------------------------------------------------


@dataclass
class _Sum:
    """A running sum for a second moment, ``[K, D, D]``."""

    total: Floats | float = 0.0
    rows: int = 0

    def add(self, x: Floats) -> None:
        """Add rows ``[K, n, D]``."""
        self.total = self.total + np.swapaxes(x, 1, 2) @ x
        self.rows += x.shape[1]

    @property
    def mean(self) -> Floats:
        out: Floats = np.asarray(self.total) / self.rows
        return out


def _moments(
    model: Any, ids: list[int], tell: Callable[[int], None]
) -> dict[int, tuple[Floats, Floats, Floats]]:
    """Return the second moments of queries, centred keys and values by layer, ``[K, D, D]``."""
    exact = RotorConfig(window=len(ids))  # nothing is packed
    report = examine(model, exact)
    other = next((layer for layer in report.layers if layer.way), None)
    if other is not None:
        raise ValueError(
            "[calibration] A calibration needs the queries of the fused attention, but layer "
            f"{other.index} is {other.way}, since {other.reason}; use the model without a "
            "calibration."
        )
    caches = compress(make_prompt_cache(model), lambda layer: RotorKVCache(exact, layer), report)
    held = {i: cache for i, _, cache in leaves(caches) if isinstance(cache, RotorKVCache)}
    if len(held) < sum(isinstance(cache, RotorKVCache) for _, _, cache in leaves(caches)):
        raise ValueError(
            "[calibration] Every layer must have one growing cache, but a layer of this model has "
            "several; use the model without a calibration."
        )
    queries: dict[int, _Sum] = {}
    with hosts.MLX_LM.in_place(), numpy_linear(), hook.record_attention() as attended:
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            model(mx.array(part)[None], cache=caches)
            for q, keys, _ in attended:
                per_head = q[0].astype(mx.float32).reshape(keys.shape[1], -1, q.shape[-1])
                rows = np.array(per_head, np.float64)
                queries.setdefault(id(keys.codec), _Sum()).add(rows)
            attended.clear()
            mx.eval([cache.state for cache in held.values()])
            tell(len(part))
    moments = {}
    for layer, cache in held.items():
        keys, values = cache.keys_and_values()
        moments[layer] = queries[id(keys.codec)].mean, _moment(keys), _moment(values)
    return moments


def _moment(view: Any) -> Floats:
    """Return the moment of the whole blocks after the sink; keys are centred first."""
    blocks = (view.tokens - _SINK) // BLOCK
    rows = view.exact[0, :, _SINK : _SINK + blocks * BLOCK].astype(mx.float32)
    x = np.array(rows, np.float64).reshape(rows.shape[0], blocks, BLOCK, -1)
    if view.codec.role == KEY:
        x = x - x.mean(2, keepdims=True)
    seen = _Sum()
    seen.add(x.reshape(*rows.shape))
    return seen.mean


# ---- transforms ---------------------------------------------------------------------------------


def _transformed(
    transform: str, moment: Floats, seen_by: Floats | None, layer: int, role: str
) -> dict[str, Floats]:
    """Return the stored arrays of one layer and role, by name."""
    moment = _steady(moment)
    metric = np.broadcast_to(np.eye(moment.shape[-1]), moment.shape)
    if seen_by is not None:
        metric = _steady(seen_by)
    if transform == "scale":
        return {role: channel_scale(moment, metric)}
    if transform == "klt":
        mix = rotation("cascade", moment.shape[-1], layer=layer, role=role).matrix
        return {role: mix @ klt(moment, metric)}
    coefficients, rotated = fitted(moment, metric)
    back = np.swapaxes(rotated, -1, -2)
    scale = channel_scale(rotated @ moment @ back, rotated @ metric @ back)
    return {role: scale, f"{role}.rotors": coefficients}


def channel_scale(moment: Floats, metric: Floats) -> Floats:
    """Return the best channel scales ``[K, D]`` for moments ``[K, D, D]``; geometric mean 1."""
    of_keys, of_queries = (np.diagonal(m, axis1=-2, axis2=-1) for m in (moment, metric))
    scale = (of_keys / of_queries) ** 0.25
    out: Floats = scale / np.exp(np.log(scale).mean(-1, keepdims=True))
    return out


def klt(moment: Floats, metric: Floats) -> Floats:
    """Return the best matrices ``[K, D, D]`` for moments ``[K, D, D]``; determinant ±1."""
    root = _power(metric, 0.5)
    size, basis = np.linalg.eigh(root @ moment @ root)
    small = size[..., -1:] * 1e-12
    size = np.maximum(size, small)
    matrix = size[..., None] ** -0.25 * (np.swapaxes(basis, -1, -2) @ root)
    _, logarithm = np.linalg.slogdet(matrix)
    out: Floats = matrix / np.exp(logarithm / matrix.shape[-1])[..., None, None]
    return out


def _power(symmetric: Floats, exponent: float) -> Floats:
    size, basis = np.linalg.eigh(symmetric)
    out: Floats = (basis * size[..., None, :] ** exponent) @ np.swapaxes(basis, -1, -2)
    return out


def _steady(moment: Floats) -> Floats:
    """Return a regularized moment ``[K, D, D]``; the identity for a head of zeros or with NaN."""
    identity = np.eye(moment.shape[-1])
    mean = np.trace(moment, axis1=-2, axis2=-1)[:, None, None] / len(identity)
    is_right = np.isfinite(moment).all((-2, -1), keepdims=True) & (mean > 0)
    moment = np.where(is_right, moment, identity)
    diagonal = moment * identity
    floored = np.maximum(diagonal, np.where(is_right, mean, 1.0) * _FLOOR * identity)
    out: Floats = (1 - _SHRINKAGE) * (moment - diagonal) + floored
    return out
