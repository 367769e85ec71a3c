// Decode packed blocks to the vectors they stand for (docs/FORMAT.md, section 6).
//
// One threadgroup per block of one KV head. As in encode.metal, a lane holds its channels of ROWS tokens in registers,
// and the lanes of a row exchange numbers by shuffles. Rows share nothing, so the kernel needs neither threadgroup
// memory nor barriers.
//
// Template arguments, and the macros CENTRES and CHANNEL_SCALE for the inputs: as in encode.metal.
//
// words          uint    [B, K, N, R, BLOCK] for keys, [B, K, N, R, D] for values, any strides
// scales         half    [B, K, N, BLOCK], any strides
// coefficients   float   of the inverse rotation
// centres        half    [B, K, N, D], any strides
// channel_scale  float   [K, D], any strides
// out            T       [B, K, N * BLOCK, D]

// kernel body
  using Channels = LaneRow<D, LANES, HELD>;
  constexpr uint CHANNELS = Channels::CHANNELS;
  constexpr uint WORKERS = THREADS / LANES;
  constexpr uint ROWS = BLOCK / WORKERS;    // tokens of a lane: every WORKERS-th
  constexpr uint PACKED = KEY ? D : BLOCK;  // codes along the packed axis

  const uint3 place = threadgroup_position_in_grid;  // (N, K, B)
  const uint worker = thread_position_in_threadgroup.x / LANES;
  const uint lane = thread_position_in_threadgroup.x % LANES;
  const long block = (long(place.z) * words_shape[1] + place.y) * words_shape[2] + place.x;
  device const uint* block_words = words + place.z * words_strides[0] +
      place.y * words_strides[1] + place.x * words_strides[2];
  device const half* block_scales = scales + place.z * scales_strides[0] +
      place.y * scales_strides[1] + place.x * scales_strides[2];

  float rows[ROWS * CHANNELS];  // [ROWS, CHANNELS]; channels that do not exist are 0
  UNROLL
  for (uint r = 0; r < ROWS; ++r) {
    const uint token = worker + r * WORKERS;
    const float scale = float(block_scales[token * scales_strides[3]]);
    UNROLL
    for (uint p = 0; p < CHANNELS; ++p) {
      const uint c = Channels::channel(lane, p);
      float number = 0.0f;
      if (Channels::exists(c)) {
        device const uint* first = block_words + (KEY ? token : c) * words_strides[4];
        number = scale * level_at<BITS, PACKED>(first, words_strides[3], KEY ? c : token);
      }
      rows[r * CHANNELS + p] = number;
    }
  }

  unrotate_rows<LANES, ROWS>(rows, coefficients + place.y % MATRICES * (D * D), lane);

  UNROLL
  for (uint p = 0; p < CHANNELS; ++p) {
    const uint c = Channels::channel(lane, p);
    if (Channels::exists(c)) {
      float channel_factor = 1.0f;
      float centre = 0.0f;
#ifdef CHANNEL_SCALE
      channel_factor =
          channel_scale[place.y * channel_scale_strides[0] + c * channel_scale_strides[1]];
#endif
#ifdef CENTRES
      centre = float(centres[place.z * centres_strides[0] + place.y * centres_strides[1] +
                             place.x * centres_strides[2] + c * centres_strides[3]]);
#endif
      UNROLL
      for (uint r = 0; r < ROWS; ++r) {
        const float number = fma(rows[r * CHANNELS + p], channel_factor, centre);
        out[(block * BLOCK + worker + r * WORKERS) * D + c] = T(number);
      }
    }
  }
