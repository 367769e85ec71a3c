// The published method in one kernel: each row is turned by one stage of rotors, rounded to levels, and turned back.
// What comes out is what decoding the encoded row gives; the codes themselves are not kept.
//
// One simdgroup a row. A lane has every 32nd group of three channels and does all of it in registers: nothing is
// exchanged but three sums a row. What is left over, a pair (a plane turns it) or one channel, is one more group.
//
// Template arguments: T the dtype, BITS of a code, D head_dim, THREADS.
//
// x             T      [n, D], any strides
// coefficients  float  the rotors (a, b, c, d) of D / 3 groups, then the pair's plane
// rows          int    n
// out           T      [n, D]

// kernel body
  constexpr uint ROTORS = D / 3;
  constexpr uint GROUPS = (D + 2) / 3;
  constexpr uint HELD = (GROUPS + 31) / 32;  // groups of a lane
  const uint lane = thread_index_in_simdgroup;
  const long row = long(threadgroup_position_in_grid.x) * (THREADS / 32) + simdgroup_index_in_threadgroup;
  if (row >= rows) return;  // all lanes of a simdgroup alike; there is no wider barrier
  device const T* x_row = x + row * x_strides[0];

  float v[HELD * 3];  // [HELD, 3]; channels that do not exist are 0
  float square_sum = 0.0f;
  for (uint p = 0; p < HELD; ++p) {
    const uint g = lane + 32 * p;
    for (uint i = 0; i < 3; ++i) {
      v[3 * p + i] = 3 * g + i < D ? float(x_row[(3 * g + i) * x_strides[1]]) : 0.0f;
    }
    if (g < ROTORS) {
      Sandwich::turn<false>(v + 3 * p, coefficients + 4 * g);
    } else if (g == ROTORS && D % 3 == 2) {
      Plane::turn<false>(v + 3 * p, coefficients + 4 * ROTORS);
    }
    for (uint i = 0; i < 3; ++i) square_sum = fma(v[3 * p + i], v[3 * p + i], square_sum);
  }
  square_sum = lane_sum<32>(square_sum);

  const float to_unit_variance = sqrt(float(D)) / sqrt(square_sum);
  float level_row = 0.0f;
  float level_level = 0.0f;
  for (uint p = 0; p < HELD; ++p) {
    for (uint i = 0; i < 3; ++i) {
      if (3 * (lane + 32 * p) + i < D) {
        const float number = v[3 * p + i];
        const uint code = nearest_code<BITS>(number * to_unit_variance, BOUNDARIES);
        const float level = level_of_code<BITS>(code);
        level_row = fma(level, number, level_row);
        level_level = fma(level, level, level_level);
        v[3 * p + i] = level;
      }
    }
  }
  const float scale =
      float(stored_scale(square_sum, lane_sum<32>(level_row), lane_sum<32>(level_level)));

  for (uint p = 0; p < HELD; ++p) {
    const uint g = lane + 32 * p;
    for (uint i = 0; i < 3; ++i) v[3 * p + i] *= scale;
    if (g < ROTORS) {
      Sandwich::turn<true>(v + 3 * p, coefficients + 4 * g);
    } else if (g == ROTORS && D % 3 == 2) {
      Plane::turn<true>(v + 3 * p, coefficients + 4 * ROTORS);
    }
    for (uint i = 0; i < 3; ++i) {
      if (3 * g + i < D) out[row * D + 3 * g + i] = T(v[3 * p + i]);
    }
  }
