// Decode packed blocks to the vectors they stand for (docs/FORMAT.md, section 6).
//
// One thread block per block of one KV head; the grid is N x K x B. As in encode.cu, a lane holds its channels of ROWS
// tokens in registers, and the lanes of a row exchange numbers by shuffles. Rows share nothing, so the kernel needs
// neither shared memory nor barriers.
template <typename Codec, int THREADS>
DEVICE_FN void decode_block(const rotormlx_decode_arguments& call) {
  constexpr int D = Codec::D, LANES = Codec::LANES;
  using Channels = LaneRow<D, LANES, Codec::HELD>;
  constexpr int CHANNELS = Channels::CHANNELS;
  constexpr int WORKERS = THREADS / LANES;
  constexpr int ROWS = BLOCK / WORKERS;                  // tokens of a lane: every WORKERS-th
  constexpr int PACKED = Codec::IS_KEY ? D : BLOCK;      // codes along the packed axis
  constexpr int WORD_LANES = Codec::IS_KEY ? BLOCK : D;  // words in a row of words

  const int block = int(blockIdx.x), head = int(blockIdx.y), batch = int(blockIdx.z);
  const int worker = int(threadIdx.x) / LANES;
  const uint lane = threadIdx.x % LANES;
  const rotormlx_packed& packed = call.packed;
  const uint* words = packed.words + batch * packed.words_strides[0] +
                      head * packed.words_strides[1] + block * packed.words_strides[2];
  const __half* scales = static_cast<const __half*>(packed.scales) + batch * packed.scales_strides[0] +
                         head * packed.scales_strides[1] + block * packed.scales_strides[2];
  const __half* centres = static_cast<const __half*>(packed.centres) +
                          batch * packed.centres_strides[0] + head * packed.centres_strides[1] +
                          block * packed.centres_strides[2];

  float rows[ROWS * CHANNELS];  // [ROWS, CHANNELS]; channels that do not exist are 0
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int token = worker + r * WORKERS;
    const float scale = __half2float(scales[token]);
#pragma unroll
    for (int p = 0; p < CHANNELS; ++p) {
      const int c = Channels::channel(lane, p);
      float number = 0.0f;
      if (Channels::exists(c)) {
        number = scale * level_at<Codec::BITS, PACKED>(
                             words + (Codec::IS_KEY ? token : c), WORD_LANES, uint(Codec::IS_KEY ? c : token));
      }
      rows[r * CHANNELS + p] = number;
    }
  }

  Codec::template unrotate<ROWS>(rows, call.coefficients + head * call.coefficients_stride, lane);

  const int64_t first_row = ((int64_t(batch) * call.kv_heads + head) * call.blocks + block) * BLOCK;
#pragma unroll
  for (int p = 0; p < CHANNELS; ++p) {
    const int c = Channels::channel(lane, p);
    if (Channels::exists(c)) {
      const float channel_factor =
          call.channel_scale == nullptr
              ? 1.0f
              : call.channel_scale[batch * call.channel_scale_stride + head * D + c];
      const float centre = Codec::IS_KEY ? __half2float(centres[c]) : 0.0f;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float number = fmaf(rows[r * CHANNELS + p], channel_factor, centre);
        store(call.out, (first_row + worker + r * WORKERS) * D + c, call.dtype, number);
      }
    }
  }
}
