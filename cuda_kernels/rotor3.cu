// The published method in one kernel: rotate each row by one stage of rotors, round it to levels, and rotate it back.
// The output equals the decoded codes of the row; the codes themselves are not kept.
//
// LANES lanes per row, each with whole groups of three channels. A group stays in the registers of one lane; the lanes
// of a row exchange only three sums per row. With a rotation other than rotor3 the kernel does the same for that
// rotation.
template <typename Codec, int THREADS>
DEVICE_FN void quantize_dequantize(const rotormlx_rotor3_arguments& call) {
  constexpr int D = Codec::D, LANES = Codec::LANES, HELD = Codec::HELD;
  using Channels = LaneRow<D, LANES, HELD>;
  constexpr int CHANNELS = Channels::CHANNELS;
  const uint lane = threadIdx.x % LANES;
  const int64_t at = int64_t(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  // All lanes of a warp must meet, so lanes past the last row repeat it and write nothing.
  const int64_t x_row = (at < call.rows ? at : call.rows - 1) * call.x_stride;

  float row[CHANNELS];  // channels that do not exist are 0
  with_dtype(call.x, call.dtype, [&](const auto* x) {
#pragma unroll
    for (int p = 0; p < CHANNELS; ++p) {
      const int c = Channels::channel(lane, p);
      row[p] = Channels::exists(c) ? to_float(x[x_row + c]) : 0.0f;
    }
  });
  Codec::template rotate<1>(row, call.coefficients, lane);

  uint code[CHANNELS];
  const float scale =
      __half2float(encode_row<Codec::BITS, D, LANES, HELD>(
          row, code, Codec::boundaries(), NearestLevels<Codec::BITS>(), 1.0f));
#pragma unroll
  for (int p = 0; p < CHANNELS; ++p) row[p] = scale * level_of_code<Codec::BITS>(code[p]);

  Codec::template unrotate<1>(row, call.coefficients, lane);
#pragma unroll
  for (int p = 0; p < CHANNELS; ++p) {
    const int c = Channels::channel(lane, p);
    if (Channels::exists(c) && at < call.rows) store(call.out, at * D + c, call.dtype, row[p]);
  }
}
