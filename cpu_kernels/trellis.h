// Trellis codes of 2 and 3 bits (docs/FORMAT.md, section 5): words spread for look-ups, and the cheapest path of LANES
// sequences at once, one a lane.
#pragma once

#include "vectors.h"

namespace {

// Sixteen codes of a word as sign-and-magnitude codes of one bit more, in fields of four bits: codes 0, 2, ... and
// codes 1, 3, ... `before` is the word before it in the lane, `high` the word of high bits, shifted for this row. W is
// uint32_t or Words.
template <typename W>
struct Spread {
  W even, odd;
};
template <int BITS, typename W>
INLINE Spread<W> spread(W word, W before, W high) {
  const W path = word & 0x55555555u, last = before & 0x55555555u, sign = word >> 1 & 0x55555555u;
  const W subset_0 = (path << 4 | last >> 28) ^ sign;
  const W subset_1 = path ^ (path << 2 | last >> 30) ^ (path << 6 | last >> 26) ^ sign;
  const W low = subset_0 | subset_1 << 1;
  const W even = low & 0x33333333u, odd = low >> 2 & 0x33333333u;
  if (BITS == 2) return {even | (word & 0x22222222u) << 1, odd | (word & 0x88888888u) >> 1};
  return {
      even | (word & 0x22222222u) << 2 | (high & 0x11111111u) << 2,
      odd | (word & 0x88888888u) | (high & 0x22222222u) << 1};
}

enum { STATES = 8 };
// The sum of a state that no path has come to.
constexpr float FAR = 1e30f;

// Member `rest`, of 2^(BITS - 1), of a subset, as a level code; in the order in which members are tried, the sign
// counts first.
template <int BITS>
INLINE Words member(Words subset, int rest) {
  const int sign = rest >> (BITS - 2), high = BITS == 3 ? rest & 1 : 0;
  return (subset ^ (3u * sign)) + (4u * high + (sign << BITS));
}

// The path with the least squared error to z[i * pitch], i = start to length - 1, from `state`. Gives codes as they
// are stored and what they stand for, both as z lies, and before `start` zeros. `taken` has room for `length` vectors.
template <int BITS>
void cheapest_path(
    const float* z, int64_t pitch, int64_t start, int64_t length, Words state, uint32_t* codes, float* levels,
    uint32_t* taken) {
  enum { MEMBERS = 1 << (BITS - 1) };
  const Levels<BITS> table;
  Floats member_level[4][MEMBERS];
  UNROLL
  for (int c = 0; c < 4; ++c) {
    UNROLL
    for (int m = 0; m < MEMBERS; ++m) member_level[c][m] = table.level(member<BITS>(all_words(c), m), 0);
  }
  Floats sums[STATES];
  UNROLL
  for (int s = 0; s < STATES; ++s) sums[s] = choose(state == (uint32_t)s, Floats{}, all(FAR));

  for (int64_t i = start; i < length; ++i) {
    const Floats number = load(z + i * pitch);
    Floats costs[4];
    UNROLL
    for (int c = 0; c < 4; ++c) {
      UNROLL
      for (int m = 0; m < MEMBERS; ++m) {
        const Floats distance = number - member_level[c][m], square = distance * distance;
        costs[c] = m == 0 ? square : choose(square < costs[c], square, costs[c]);
      }
    }
    Floats next[STATES];
    Words second = {};
    UNROLL
    for (int s = 0; s < STATES; ++s) {
      const int c = s >> 2 | ((s ^ s >> 1) & 1) << 1;
      const Floats a = sums[s >> 1] + costs[c], b = sums[s >> 1 | 4] + costs[c ^ 2];
      const Mask smaller = b < a;
      next[s] = choose(smaller, b, a);
      second |= (Words)smaller & (1u << s);
    }
    UNROLL
    for (int s = 0; s < STATES; ++s) sums[s] = next[s];
    store(taken + i * LANES, second);
  }

  Words at = {};
  Floats least = sums[0];
  UNROLL
  for (int s = 1; s < STATES; ++s) {
    at = sums[s] < least ? all_words(s) : at;
    least = choose(sums[s] < least, sums[s], least);
  }
  for (int64_t i = length; i-- > start;) {
    const Words second = load(taken + i * LANES) >> at & 1u;
    const Words subset = at >> 2 | ((at ^ at >> 1 ^ second) & 1u) << 1;
    const Floats number = load(z + i * pitch);
    Words rest = {};
    Floats level = {}, square = all(__builtin_inff());
    UNROLL
    for (int m = 0; m < MEMBERS; ++m) {
      const Floats found = table.level(member<BITS>(subset, m), 0), distance = number - found;
      const Mask nearer = distance * distance < square;
      rest = nearer ? all_words(m) : rest;
      level = choose(nearer, found, level);
      square = choose(nearer, distance * distance, square);
    }
    const Words sign = rest >> (BITS - 2), high = BITS == 3 ? rest & 1u : Words{};
    store(codes + i * pitch, (at & 1u) | sign << 1 | high << 2);
    store(levels + i * pitch, level);
    at = at >> 1 | second << 2;
  }
  for (int64_t i = 0; i < start; ++i) {
    store(codes + i * pitch, Words{});
    store(levels + i * pitch, Floats{});
  }
}

}  // namespace
