// Raw keys or values to packed words, scales and centres (docs/FORMAT.md, section 5).
//
// One threadgroup a block of one KV head; LANES lanes a row, so THREADS / LANES rows are under way at once. Rows are
// rotated in threadgroup memory, stage by stage; only their codes are kept, a byte each, until all rows of
// the block are there and every thread packs whole words.
//
// Template arguments: T the dtype, BITS of a code, D head_dim, BLOCK tokens, THREADS, LANES, and KEY: a word packs
// channels of a token, else tokens of a channel. BOUNDARIES is the table of the codebook. Macros say which buffers
// there are: CENTRE_MEANS the output `centres`, CENTRES the input of that name, CHANNEL_SCALE the input
// `channel_scale`. B batch, K KV heads, N blocks, R rows of words.
//
// x              T       [B, K, N * BLOCK, D], any strides
// coefficients   float   of the rotation
// centres        half    [B, K, N, D], as an input with any strides
// channel_scale  float   [K, D], any strides
// words          uint    [B, K, N, R, BLOCK] for keys, [B, K, N, R, D] for values
// scales         half    [B, K, N, BLOCK]

// kernel body
  constexpr uint WORKERS = THREADS / LANES;
  constexpr uint CHANNELS = (D + LANES - 1) / LANES;
  // Four bytes more than a row, so that lanes that read the same channel of neighbouring tokens meet no
  // bank of memory twice.
  constexpr uint CODE_STRIDE = D + 4;
  threadgroup float rows[WORKERS * D];             // [WORKERS, D]
  threadgroup uchar codes[BLOCK * CODE_STRIDE];    // [BLOCK, CODE_STRIDE]

  const uint3 place = threadgroup_position_in_grid;  // (N, K, B)
  const uint worker =
      simdgroup_index_in_threadgroup * (32 / LANES) + thread_index_in_simdgroup / LANES;
  const uint lane = thread_index_in_simdgroup % LANES;
  const long block = (long(place.z) * x_shape[1] + place.y) * (x_shape[2] / BLOCK) + place.x;
  device const T* block_rows = x + place.z * x_strides[0] + place.y * x_strides[1] +
      long(place.x) * BLOCK * x_strides[2];
  threadgroup float* row = rows + worker * D;

  // [CHANNELS], those of this lane.
  float centre[CHANNELS];
  float channel_factor[CHANNELS];
  for (uint p = 0; p < CHANNELS; ++p) {
    centre[p] = 0.0f;
    channel_factor[p] = 1.0f;
  }

#ifdef CENTRE_MEANS
  // Each worker sums its rows, then everybody adds up the workers' sums of its own channels.
  for (uint token = worker; token < BLOCK; token += WORKERS) {
    float numbers[CHANNELS];
    bool broken = false;
    for (uint p = 0; p < CHANNELS; ++p) {
      const uint c = lane + p * LANES;
      numbers[p] = c < D ? float(block_rows[token * x_strides[2] + c * x_strides[3]]) : 0.0f;
      broken = broken || !is_finite(numbers[p]);
    }
    // Divided first: a power of two, and the sum cannot overflow.
    const float weight = 1.0f / BLOCK;
    if (!lane_any<LANES>(broken)) {
      for (uint p = 0; p < CHANNELS; ++p) centre[p] = fma(weight, numbers[p], centre[p]);
    }
  }
  for (uint p = 0; p < CHANNELS; ++p) {
    const uint c = lane + p * LANES;
    if (c < D) row[c] = centre[p];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // sums written
  for (uint p = 0; p < CHANNELS; ++p) {
    const uint c = lane + p * LANES;
    if (c < D) {
      float mean = 0.0f;
      for (uint w = 0; w < WORKERS; ++w) mean += rows[w * D + c];
      const half rounded = half(clamp(mean, -65504.0f, 65504.0f));
      if (worker == 0) centres[block * D + c] = rounded;
      centre[p] = float(rounded);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // sums read
#endif

  for (uint p = 0; p < CHANNELS; ++p) {
    const uint c = lane + p * LANES;
    if (c < D) {
#ifdef CENTRES
      centre[p] = float(centres[place.z * centres_strides[0] + place.y * centres_strides[1] +
                                place.x * centres_strides[2] + c * centres_strides[3]]);
#endif
#ifdef CHANNEL_SCALE
      channel_factor[p] =
          channel_scale[place.y * channel_scale_strides[0] + c * channel_scale_strides[1]];
#endif
    }
  }

  for (uint token = worker; token < BLOCK; token += WORKERS) {
    for (uint p = 0; p < CHANNELS; ++p) {
      const uint c = lane + p * LANES;
      if (c < D) {
        const float number = float(block_rows[token * x_strides[2] + c * x_strides[3]]);
        row[c] = (number - centre[p]) / channel_factor[p];
      }
    }
    lane_barrier();  // row written
    rotate_row<LANES>(row, coefficients, lane);

    float square_sum = 0.0f;
    for (uint c = lane; c < D; c += LANES) square_sum = fma(row[c], row[c], square_sum);
    square_sum = lane_sum<LANES>(square_sum);

    const float to_unit_variance = sqrt(float(D)) / sqrt(square_sum);
    float level_row = 0.0f;
    float level_level = 0.0f;
    uint code[CHANNELS];
    for (uint p = 0; p < CHANNELS; ++p) {
      const uint c = lane + p * LANES;
      if (c < D) {
        code[p] = nearest_code<BITS>(row[c] * to_unit_variance, BOUNDARIES);
        const float level = level_of_code<BITS>(code[p]);
        level_row = fma(level, row[c], level_row);
        level_level = fma(level, level, level_level);
      }
    }
    const half scale =
        stored_scale(square_sum, lane_sum<LANES>(level_row), lane_sum<LANES>(level_level));
    const bool counts = has_codes(scale);
    for (uint p = 0; p < CHANNELS; ++p) {
      const uint c = lane + p * LANES;
      if (c < D) codes[token * CODE_STRIDE + c] = uchar(counts ? code[p] : 0u);
    }
    if (lane == 0) scales[block * BLOCK + token] = scale;
    // No barrier: a lane has read no channel but those that it writes for the next row.
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // codes written

  constexpr uint PACKED = KEY ? D : BLOCK;      // codes along the packed axis
  constexpr uint WORD_LANES = KEY ? BLOCK : D;  // words beside each other
  constexpr uint ROWS = WordRows<BITS, PACKED>::ALL;
  for (uint i = thread_position_in_threadgroup.x; i < ROWS * WORD_LANES; i += THREADS) {
    const uint word_lane = i % WORD_LANES;
    threadgroup const uchar* first = codes + word_lane * (KEY ? CODE_STRIDE : 1);
    words[block * (ROWS * WORD_LANES) + i] =
        packed_word<BITS, PACKED>(first, KEY ? 1 : CODE_STRIDE, i / WORD_LANES);
  }
