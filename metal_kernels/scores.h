// Hidden scores and masks, shared by the attention kernels.

// The score of a hidden token. It is finite, because fast math may not support infinities.
constant float HIDDEN = -3.402823466e38f;

// Tests the bits, because fast math may not support NaN either.
METAL_FUNC bool is_nan(float x) { return (as_type<uint>(x) & 0x7FFFFFFFu) > 0x7F800000u; }

// exp(x - top), or 0 for a hidden score.
METAL_FUNC float share_of(float x, float top) { return x <= HIDDEN ? 0.0f : exp(x - top); }

// The score of an existing token under the mask. MASK is 0 (none), 1 (causal), 2 (boolean; true means visible) or 3
// (additive). Row `row` of the `rows` query rows of a KV head is query `row % length` of its query head `row / length`.
template <int MASK, typename Mask>
METAL_FUNC float masked(
    float score, Mask mask, const constant int64_t* strides,  // [B, H, L, S]
    int batch, int kv_head, int rows, int row, int length, int position, int tokens) {
  const int place = row % length;
  if (MASK == 1) return position <= tokens - length + place ? score : HIDDEN;
  if (MASK >= 2) {
    const int head = kv_head * (rows / length) + row / length;
    const int64_t at =
        batch * strides[0] + head * strides[1] + place * strides[2] + position * strides[3];
    if (MASK == 2) return bool(mask[at]) ? score : HIDDEN;
    return score + float(mask[at]);
  }
  return score;
}
