// Encode raw keys or values to packed words, scales and centres (docs/FORMAT.md, section 5).
//
// One threadgroup per block of one KV head; LANES lanes per row. A lane holds its channels of ROWS tokens in registers
// from the first load to the codes: the centre, the rotation and the norm exchange numbers by shuffles. The codes, one
// byte each, are then gathered in threadgroup memory, and every thread packs whole words. For trellis codes, the
// numbers are gathered there first, one slice of the sequences at a time, and two lanes find the path of one sequence.
//
// Template arguments: T the dtype, BITS of a code, D head_dim, BLOCK tokens, THREADS, LANES and HELD (see LaneRow),
// MATRICES (see coefficients), and KEY: if true, a word packs channels of a token, else tokens of a channel. BOUNDARIES
// is the table of the codebook. Macros say which buffers exist: CENTRE_MEANS the output `centres`, CENTRES the input of
// that name, CHANNEL_SCALE the input `channel_scale`, STATE the inputs `start` and `state`. B batch, K KV heads,
// N blocks, R rows of words.
//
// x              T       [B, K, N * BLOCK, D], any strides
// coefficients   float   of the rotation; [MATRICES, D, D] if each KV head has its own matrix, else MATRICES is 1
// centres        half    [B, K, N, D]; as an input with any strides
// channel_scale  float   [K, D], any strides
// start          int     number of tokens that already have codes; only for trellis codes of values
// state          uint    [B, K, N, D]: the state of each trellis behind those tokens, any strides
// words          uint    [B, K, N, R, BLOCK] for keys, [B, K, N, R, D] for values
// scales         half    [B, K, N, BLOCK]

// kernel body
  using Channels = LaneRow<D, LANES, HELD>;
  constexpr uint CHANNELS = Channels::CHANNELS;
  constexpr uint WORKERS = THREADS / LANES;
  constexpr uint ROWS = BLOCK / WORKERS;  // tokens of a lane: every WORKERS-th
  using Encoder = BlockEncoder<BITS, KEY, D, LANES, HELD, BLOCK, THREADS, 32 * 1024>;
  constexpr uint CODE_STRIDE = Encoder::CODE_STRIDE;
  threadgroup uchar codes[BLOCK * CODE_STRIDE];  // [BLOCK, CODE_STRIDE]
#ifdef CENTRE_MEANS
  constexpr uint SIMDGROUPS = THREADS / 32;
  constexpr uint SUMS = SIMDGROUPS * D;
#else
  constexpr uint SUMS = 1;
#endif
  // First the simdgroups' sums of channels, later the numbers of sequences; both as bits.
  threadgroup uint shared[SUMS > Encoder::NUMBERS ? SUMS : uint(Encoder::NUMBERS)];

  const uint3 place = threadgroup_position_in_grid;  // (N, K, B)
  const uint worker = thread_position_in_threadgroup.x / LANES;
  const uint lane = thread_position_in_threadgroup.x % LANES;
  const long block = (long(place.z) * x_shape[1] + place.y) * (x_shape[2] / BLOCK) + place.x;
  device const T* block_rows = x + place.z * x_strides[0] + place.y * x_strides[1] +
      long(place.x) * BLOCK * x_strides[2];

  float rows[ROWS * CHANNELS];  // [ROWS, CHANNELS]; channels that do not exist are 0
  UNROLL
  for (uint r = 0; r < ROWS; ++r) {
    device const T* row = block_rows + (worker + r * WORKERS) * x_strides[2];
    UNROLL
    for (uint p = 0; p < CHANNELS; ++p) {
      const uint c = Channels::channel(lane, p);
      rows[r * CHANNELS + p] = Channels::exists(c) ? float(row[c * x_strides[3]]) : 0.0f;
    }
  }

#ifdef CENTRE_MEANS
  // Each lane sums its rows, each simdgroup sums its lanes of a channel, and every lane sums the simdgroups' sums.
  float sum[CHANNELS];
  UNROLL
  for (uint p = 0; p < CHANNELS; ++p) sum[p] = 0.0f;
  UNROLL
  for (uint r = 0; r < ROWS; ++r) {
    bool broken = false;
    UNROLL
    for (uint p = 0; p < CHANNELS; ++p) broken = broken || !is_finite(rows[r * CHANNELS + p]);
    // The division by BLOCK, a power of two, comes first, so that the sum cannot overflow.
    const float weight = 1.0f / BLOCK;
    if (!lane_any<LANES>(broken)) {
      UNROLL
      for (uint p = 0; p < CHANNELS; ++p) sum[p] = fma(weight, rows[r * CHANNELS + p], sum[p]);
    }
  }
  UNROLL
  for (uint p = 0; p < CHANNELS; ++p) {
    for (ushort mask = LANES; mask < 32; mask *= 2) sum[p] += shuffle_xor(sum[p], mask);
    const uint c = Channels::channel(lane, p);
    if (worker % (32 / LANES) == 0 && Channels::exists(c)) {
      shared[simdgroup_index_in_threadgroup * D + c] = bits_of_float(sum[p]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // sums written
#endif

  UNROLL
  for (uint p = 0; p < CHANNELS; ++p) {
    const uint c = Channels::channel(lane, p);
    if (Channels::exists(c)) {
      float centre = 0.0f;
      float channel_factor = 1.0f;
#ifdef CENTRE_MEANS
      float mean = 0.0f;
      for (uint s = 0; s < SIMDGROUPS; ++s) mean += float_of_bits(shared[s * D + c]);
      const half rounded = half(clamp(mean, -65504.0f, 65504.0f));
      if (worker == 0) centres[block * D + c] = rounded;
      centre = float(rounded);
#endif
#ifdef CENTRES
      centre = float(centres[place.z * centres_strides[0] + place.y * centres_strides[1] +
                             place.x * centres_strides[2] + c * centres_strides[3]]);
#endif
#ifdef CHANNEL_SCALE
      channel_factor =
          channel_scale[place.y * channel_scale_strides[0] + c * channel_scale_strides[1]];
#endif
      UNROLL
      for (uint r = 0; r < ROWS; ++r) {
        rows[r * CHANNELS + p] = (rows[r * CHANNELS + p] - centre) / channel_factor;
      }
    }
  }

  rotate_rows<LANES, ROWS>(rows, coefficients + place.y % MATRICES * (D * D), lane);

  const uint thread_index = thread_position_in_threadgroup.x;
  half row_scales[ROWS];
  if (Stored<BITS>::HAS_TRELLIS) {
#ifdef STATE
    const uint first_token = uint(start);
    device const uint* block_state = state + place.z * state_strides[0] + place.y * state_strides[1] +
        place.x * state_strides[2];
    const long state_stride = state_strides[3];
#else
    const uint first_token = 0;
    device const uint* block_state = nullptr;
    const long state_stride = 0;
#endif
    Encoder::find_paths(
        rows, row_scales, codes, shared, thread_index, first_token, block_state, state_stride,
        StoredLevels<BITS>());
  } else {
    Encoder::round(rows, row_scales, codes, thread_index, BOUNDARIES, NearestLevels<BITS>());
    threadgroup_barrier(mem_flags::mem_threadgroup);  // codes written
  }
  UNROLL
  for (uint r = 0; r < ROWS; ++r) {
    if (lane == 0) scales[block * BLOCK + worker + r * WORKERS] = row_scales[r];
  }

  constexpr uint PACKED = KEY ? D : BLOCK;      // codes along the packed axis
  constexpr uint WORD_LANES = KEY ? BLOCK : D;  // words in a row of words
  constexpr uint WORD_ROWS = WordRows<BITS, PACKED>::ALL;
  for (uint i = thread_index; i < WORD_ROWS * WORD_LANES; i += THREADS) {
    const uint word_lane = i % WORD_LANES;
    threadgroup const uchar* first = codes + word_lane * (KEY ? CODE_STRIDE : 1);
    words[block * (WORD_ROWS * WORD_LANES) + i] =
        packed_word<BITS, PACKED>(first, KEY ? 1 : CODE_STRIDE, i / WORD_LANES);
  }
