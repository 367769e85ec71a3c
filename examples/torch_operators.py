"""Use the torch operators alone: encode, decode, and attention over packed bytes.

    python examples/torch_operators.py

This needs pip install "rotormlx[torch]", but no model and no MLX. On a GPU, add device="cuda" to
each tensor.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

import rotormlx
from rotormlx.codec.format import codec
from rotormlx.torch import KVView, attend, decode, encode, prefill_scale

torch.manual_seed(0)
B, H, K, S, D = 1, 8, 2, 4096, 128  # batch, query heads, KV heads, tokens, head_dim
PACKED = S - 128  # the first 4 tokens and the latest 124 stay exact
keys = torch.randn(B, K, S, D) + 3 * torch.randn(D)  # channels with an offset, as real keys have
values = torch.randn(B, K, S, D)
query = torch.randn(B, H, 1, D)
lengths = torch.tensor([[PACKED, S]], dtype=torch.int32)  # packed and all tokens of each row
exact = scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def cosine(x, y):
    """Return the mean cosine of the vectors of two tensors; 1 if they have the same direction."""
    return torch.cosine_similarity(x, y, dim=-1).mean().item()


print(f"{PACKED} of {S} tokens are packed. Cosines compare with the exact vectors.\n")
print(f"{'bits':>4}{'of float16':>14}{'keys':>10}{'values':>10}{'attention':>12}")
for bits in (8, 4, 3, 2):
    config = rotormlx.RotorConfig(key_bits=bits, value_bits=bits)
    views, cosines, size = [], [], 0
    for role, x in (("key", keys), ("value", values)):
        rows = x[:, :, 4 : 4 + PACKED]
        options = {"layer": 0, "role": role}
        scale = prefill_scale(rows[:, :, :64], config, **options)
        packed = encode(rows, config, channel_scale=scale, **options)
        decoded = decode(packed, config, head_dim=D, channel_scale=scale, **options)
        cosines.append(cosine(decoded, rows))
        size += sum(part.nbytes for part in packed if part is not None)
        outside = torch.cat([x[:, :, :4], x[:, :, 4 + PACKED :]], dim=2)
        views.append(KVView(codec(config, D, **options), outside, packed, scale))
    output = attend(query, lengths, *views, config, layer=0, scale=D**-0.5)
    share = size / (2 * 2 * B * K * PACKED * D)  # float16 has 2 bytes per value
    cosines.append(cosine(output, exact))
    print(f"{bits:>4}{share:>14.1%}{cosines[0]:>10.4f}{cosines[1]:>10.4f}{cosines[2]:>12.4f}")
