// The published method in one kernel: each row is rotated by one stage of rotors, rounded to levels, and rotated back.
// What comes out is what decoding the encoded row gives; the codes themselves are not kept.
//
// LANES lanes a row, each with whole groups of three channels: all of a group happens in the registers of one lane, and
// nothing is exchanged but three sums a row. With another rotation than rotor3 it does the same for that.
template <typename Codec, int THREADS>
DEVICE_FN void quantize_dequantize(const rotormlx_rotor3_arguments& call) {
  constexpr int D = Codec::D, LANES = Codec::LANES, HELD = Codec::HELD;
  using Channels = LaneRow<D, LANES, HELD>;
  constexpr int CHANNELS = Channels::CHANNELS;
  const uint lane = threadIdx.x % LANES;
  const int64_t at = int64_t(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  // Lanes behind the last row do it again, since all lanes of a warp must meet, and keep nothing.
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
