// The cheapest path of LANES sequences at once, one sequence per lane (shared_kernels/trellis.h).
#pragma once

#include "vectors.h"

namespace {

// Of z[i * pitch], i = start to length - 1, from `state`: codes as they are stored, and z times what they stand for,
// both as z lies, and before `start` zeros. `choices` has room for `length` vectors.
template <int BITS>
void cheapest_path(
    const float* z, int64_t pitch, int64_t start, int64_t length, Words state, uint32_t* codes, float* products,
    uint32_t* choices) {
  const Levels<BITS> table;
  Floats sums[TRELLIS_STATES];
  begin_path(state, sums);
  for (int64_t i = start; i < length; ++i) {
    store(choices + i * LANES, extend_path<BITS, Words>(load(z + i * pitch), sums));
  }
  Words at = end_of_path<Words>(sums);
  for (int64_t i = length; i-- > start;) {
    const Words found = step_back<BITS>(load(choices + i * LANES), at);
    store(codes + i * pitch, found & 15u);
    store(products + i * pitch, load(z + i * pitch) * table.level(found >> 4, 0));
  }
  for (int64_t i = 0; i < start; ++i) {
    store(codes + i * pitch, Words{});
    store(products + i * pitch, Floats{});
  }
}

}  // namespace
