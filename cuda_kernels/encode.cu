// Raw keys or values to packed words, scales and centres (docs/FORMAT.md, section 5).
//
// One thread block a block of one KV head; LANES lanes a row. A lane has its channels of ROWS tokens in registers from
// the first load to the codes: the centre, the rotation and the norm exchange numbers by shuffles. The codes, a byte
// each, then meet in shared memory, where every thread packs whole words. For trellis codes numbers meet there before,
// slice by slice, and a thread finds the path of one sequence.
//
// Codec names bits, D, the rotation and the table of boundaries of keys or of values; see launch.cu. The grid is
// N x K x B.
template <typename Codec, int THREADS>
DEVICE_FN void encode_block(const rotormlx_encode_arguments& call) {
  constexpr int D = Codec::D, LANES = Codec::LANES, HELD = Codec::HELD;
  using Channels = LaneRow<D, LANES, HELD>;
  constexpr int CHANNELS = Channels::CHANNELS;
  constexpr int WORKERS = THREADS / LANES;
  constexpr int ROWS = BLOCK / WORKERS;  // tokens of a lane: every WORKERS-th
  constexpr int WARPS = THREADS / 32;
  using Encoder = BlockEncoder<Codec::BITS, Codec::IS_KEY != 0, D, LANES, HELD, BLOCK, THREADS, 48 * 1024>;
  constexpr int CODE_STRIDE = Encoder::CODE_STRIDE, NUMBERS = Encoder::NUMBERS, SUMS = Codec::IS_KEY ? WARPS * D : 1;
  __shared__ uchar codes[BLOCK * CODE_STRIDE];  // [BLOCK, CODE_STRIDE]
  // Sums [WARPS, D], and later numbers of sequences, as bits.
  __shared__ uint shared_numbers[SUMS > NUMBERS ? SUMS : NUMBERS];

  const int block = int(blockIdx.x), head = int(blockIdx.y), batch = int(blockIdx.z);
  const int thread = int(threadIdx.x);
  const int worker = thread / LANES;
  const uint lane = uint(thread % LANES);
  const rotormlx_packed& packed = call.packed;
  const int64_t first_row = batch * call.x_strides[0] + head * call.x_strides[1] +
                            int64_t(block) * BLOCK * call.x_strides[2];
  __half* centres = static_cast<__half*>(packed.centres) + batch * packed.centres_strides[0] +
                    head * packed.centres_strides[1] + block * packed.centres_strides[2];
  const bool takes_means = Codec::IS_KEY && !call.given_centres;

  float rows[ROWS * CHANNELS];  // [ROWS, CHANNELS]; channels that do not exist are 0
  with_dtype(call.x, call.dtype, [&](const auto* x) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t row = first_row + (worker + r * WORKERS) * call.x_strides[2];
#pragma unroll
      for (int p = 0; p < CHANNELS; ++p) {
        const int c = Channels::channel(lane, p);
        rows[r * CHANNELS + p] = Channels::exists(c) ? to_float(x[row + c]) : 0.0f;
      }
    }
  });

  if (takes_means) {
    // Each lane sums its rows, each warp its lanes of a channel, and everybody the warps' sums.
    float sum[CHANNELS];
#pragma unroll
    for (int p = 0; p < CHANNELS; ++p) sum[p] = 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      bool broken = false;
#pragma unroll
      for (int p = 0; p < CHANNELS; ++p) broken = broken || !is_finite(rows[r * CHANNELS + p]);
      // Divided first: a power of two, and the sum cannot overflow.
      const float weight = 1.0f / BLOCK;
      if (!lane_any<LANES>(broken)) {
#pragma unroll
        for (int p = 0; p < CHANNELS; ++p) sum[p] = fmaf(weight, rows[r * CHANNELS + p], sum[p]);
      }
    }
#pragma unroll
    for (int p = 0; p < CHANNELS; ++p) {
      for (int mask = LANES; mask < 32; mask *= 2) sum[p] += shuffle_xor(sum[p], ushort(mask));
      const int c = Channels::channel(lane, p);
      if (worker % (32 / LANES) == 0 && Channels::exists(c)) {
        shared_numbers[thread / 32 * D + c] = bits_of_float(sum[p]);
      }
    }
    __syncthreads();  // sums written
  }

#pragma unroll
  for (int p = 0; p < CHANNELS; ++p) {
    const int c = Channels::channel(lane, p);
    if (Channels::exists(c)) {
      float centre = 0.0f;
      float channel_factor = 1.0f;
      if (takes_means) {
        float mean = 0.0f;
        for (int w = 0; w < WARPS; ++w) mean += float_of_bits(shared_numbers[w * D + c]);
        const __half rounded = __float2half_rn(fminf(fmaxf(mean, -65504.0f), 65504.0f));
        if (worker == 0) centres[c] = rounded;
        centre = __half2float(rounded);
      } else if (Codec::IS_KEY) {
        centre = __half2float(centres[c]);
      }
      if (call.channel_scale != nullptr) channel_factor = call.channel_scale[head * D + c];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        rows[r * CHANNELS + p] = (rows[r * CHANNELS + p] - centre) / channel_factor;
      }
    }
  }

  Codec::template rotate<ROWS>(rows, call.coefficients + head * call.coefficients_stride, lane);

  __half* scales = static_cast<__half*>(packed.scales) + batch * packed.scales_strides[0] +
                   head * packed.scales_strides[1] + block * packed.scales_strides[2];
  __half row_scales[ROWS];
  if (Stored<Codec::BITS>::HAS_TRELLIS) {
    // A token of keys has a path of its own.
    const uint start = Codec::IS_KEY ? 0 : call.start;
    const uint* state = nullptr;
    if (start > 0 && call.state != nullptr) {
      state = call.state + ((int64_t(batch) * call.kv_heads + head) * call.blocks + block) * D;
    }
    Encoder::find_paths(rows, row_scales, codes, shared_numbers, uint(thread), start, state, 1);
  } else {
    Encoder::round(rows, row_scales, codes, uint(thread), Codec::boundaries());
    __syncthreads();  // codes written
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (lane == 0) scales[worker + r * WORKERS] = row_scales[r];
  }

  constexpr int PACKED = Codec::IS_KEY ? D : BLOCK;      // codes along the packed axis
  constexpr int WORD_LANES = Codec::IS_KEY ? BLOCK : D;  // words beside each other
  constexpr int WORD_ROWS = WordRows<Codec::BITS, PACKED>::ALL;
  uint* words = packed.words + batch * packed.words_strides[0] + head * packed.words_strides[1] +
                block * packed.words_strides[2];
  for (int i = thread; i < WORD_ROWS * WORD_LANES; i += THREADS) {
    const int word_lane = i % WORD_LANES;
    const uchar* first = codes + word_lane * (Codec::IS_KEY ? CODE_STRIDE : 1);
    words[i] = packed_word<Codec::BITS, PACKED>(
        first, Codec::IS_KEY ? 1 : CODE_STRIDE, uint(i / WORD_LANES));
  }
}
