// Packed blocks to the vectors they stand for (docs/FORMAT.md, section 6).
//
// One threadgroup a block of one KV head; LANES lanes a row, THREADS / LANES rows at once. Rows are un-rotated in
// threadgroup memory and share nothing, so no barrier reaches beyond a simdgroup.
//
// Template arguments, and the macros CENTRES and CHANNEL_SCALE for the inputs, as in encode.metal.
//
// words          uint    [B, K, N, R, BLOCK] for keys, [B, K, N, R, D] for values, any strides
// scales         half    [B, K, N, BLOCK], any strides
// coefficients   float   of the rotation back
// centres        half    [B, K, N, D], any strides
// channel_scale  float   [K, D], any strides
// out            T       [B, K, N * BLOCK, D]

// kernel body
  constexpr uint WORKERS = THREADS / LANES;
  constexpr uint PACKED = KEY ? D : BLOCK;  // codes along the packed axis
  threadgroup float rows[WORKERS * D];      // [WORKERS, D]

  const uint3 place = threadgroup_position_in_grid;  // (N, K, B)
  const uint worker =
      simdgroup_index_in_threadgroup * (32 / LANES) + thread_index_in_simdgroup / LANES;
  const uint lane = thread_index_in_simdgroup % LANES;
  const long block = (long(place.z) * words_shape[1] + place.y) * words_shape[2] + place.x;
  device const uint* block_words = words + place.z * words_strides[0] +
      place.y * words_strides[1] + place.x * words_strides[2];
  device const half* block_scales = scales + place.z * scales_strides[0] +
      place.y * scales_strides[1] + place.x * scales_strides[2];
  threadgroup float* row = rows + worker * D;

  for (uint token = worker; token < BLOCK; token += WORKERS) {
    const float scale = float(block_scales[token * scales_strides[3]]);
    for (uint c = lane; c < D; c += LANES) {
      device const uint* first = block_words + (KEY ? token : c) * words_strides[4];
      const uint code = code_at<BITS, PACKED>(first, words_strides[3], KEY ? c : token);
      row[c] = scale * level_of_code<BITS>(code);
    }
    lane_barrier();  // row written
    unrotate_row<LANES>(row, coefficients, lane);
    for (uint c = lane; c < D; c += LANES) {
      float number = row[c];
#ifdef CHANNEL_SCALE
      number *= channel_scale[place.y * channel_scale_strides[0] + c * channel_scale_strides[1]];
#endif
#ifdef CENTRES
      number += float(centres[place.z * centres_strides[0] + place.y * centres_strides[1] +
                              place.x * centres_strides[2] + c * centres_strides[3]]);
#endif
      out[(block * BLOCK + token) * D + c] = T(number);
    }
  }
