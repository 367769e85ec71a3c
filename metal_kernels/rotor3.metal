// The published method in one kernel: rotate each row by one stage of rotors, round it to levels, and rotate it back.
// The output equals the decoded codes of the row; the codes themselves are not kept.
//
// LANES lanes per row, as in encode.metal, each with whole groups of three channels. A group stays in the registers of
// one lane; the lanes of a row exchange only three sums per row. The channels that remain, a pair (rotated by a plane)
// or a single one, form one more group.
//
// Template arguments: T the dtype, BITS of a code, D head_dim, THREADS, LANES, HELD.
//
// x             T      [n, D], any strides
// coefficients  float  the rotors (a, b, c, d) of D / 3 groups, then the plane of the pair
// count         int    n
// out           T      [n, D]

// kernel body
  using Channels = LaneRow<D, LANES, HELD>;
  constexpr uint CHANNELS = Channels::CHANNELS;
  const uint lane = thread_position_in_threadgroup.x % LANES;
  const long at = long(threadgroup_position_in_grid.x) * (THREADS / LANES) +
      thread_position_in_threadgroup.x / LANES;
  // All lanes of a simdgroup must meet, so lanes past the last row repeat it and write nothing.
  device const T* x_row = x + min(at, long(count) - 1) * x_strides[0];

  float row[CHANNELS];  // channels that do not exist are 0
  UNROLL
  for (uint p = 0; p < CHANNELS; ++p) {
    const uint c = Channels::channel(lane, p);
    row[p] = Channels::exists(c) ? float(x_row[c * x_strides[1]]) : 0.0f;
  }
  rotate_rows<LANES, 1>(row, coefficients, lane);

  uint code[CHANNELS];
  const float scale = float(encode_row<BITS, D, LANES, HELD>(row, code, BOUNDARIES, NearestLevels<BITS>(), 1.0f));
  UNROLL
  for (uint p = 0; p < CHANNELS; ++p) row[p] = scale * level_of_code<BITS>(code[p]);

  unrotate_rows<LANES, 1>(row, coefficients, lane);
  UNROLL
  for (uint p = 0; p < CHANNELS; ++p) {
    const uint c = Channels::channel(lane, p);
    if (Channels::exists(c) && at < count) out[at * D + c] = T(row[p]);
  }
