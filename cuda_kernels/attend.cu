// Decode attention on packed bytes, first pass: one part of the packed tokens for up to 16 query rows of a KV head, on
// the tensor cores.
//
// A warp takes every fourth block of the part and keeps a softmax of its own; the warps meet once, at the end. Both
// products read words as they lie: scores = levels of keys [tokens, channels] times queries, output = levels of values
// [channels, tokens] times weights (see fragments.cuh). A lane copies 16 bytes, the words of four tokens or channels
// beside each other, into shared memory some blocks ahead, for whichever lane of its warp needs them. Levels, queries
// and weights are float16, sums and the softmax float32.

// Shapes of a thread block. ring: [WARPS][SLOTS][SLOT_LOADS][32] loads; a block of keys, with the scales of keys and
// values behind them, and a block of values are one slot each.
template <int KEY_BITS, int VALUE_BITS, int KEY_DIM, int VALUE_DIM, int TILES>
struct AttendShape {
  using Keys = Chunks<KEY_BITS, KEY_DIM>;
  using Values = Chunks<VALUE_BITS, BLOCK>;
  enum {
    WARPS = 4,
    ROWS = 8 * TILES,
    VALUE_TILES = (VALUE_DIM + 31) / 32,
    KEY_LOADS = 2 * Keys::LOADS * Keys::WORDS,
    VALUE_LOADS = VALUE_TILES * Values::LOADS * Values::WORDS,
    SLOT_LOADS = KEY_LOADS + 1 > VALUE_LOADS ? KEY_LOADS + 1 : VALUE_LOADS,
    SLOT_BYTES = SLOT_LOADS * 32 * 16,
    // Enough of them that a multiprocessor has some 40 KiB under way.
    SLOTS = SLOT_BYTES <= 4096 ? 4 : SLOT_BYTES <= 12288 ? 3 : 2,
    PLAIN_STEPS = (KEY_DIM + 31) / 32,
    // Places in shared memory, in units of 16 bytes.
    RING = 0,
    QUERIES = WARPS * SLOTS * SLOT_LOADS * 32,
    PLAIN_QUERIES = QUERIES + TILES * Keys::STEPS * 32,
    FACTORS = PLAIN_QUERIES + TILES * PLAIN_STEPS * 32,  // [3][ROWS] float
    WEIGHTS = FACTORS + 3 * ROWS * 4 / 16,               // [WARPS][ROWS][BLOCK] half
    CENTRES = WEIGHTS + WARPS * ROWS * BLOCK * 2 / 16,   // [WARPS][16][ROWS] float
    TABLE = CENTRES + WARPS * 16 * ROWS * 4 / 16,        // [256] half, for codes of 8 bits
    ALL = TABLE + (KEY_BITS == 8 || VALUE_BITS == 8 ? 32 : 0),
    // At the end, in place of all this: [WARPS][2][ROWS] tops and totals, [WARPS][ROWS][VALUE_DIM] sums
    END = WARPS * ROWS * (2 + VALUE_DIM) * 4 / 16,
    SHARED_BYTES = 16 * (ALL > END ? ALL : END)
  };
};

template <int KEY_BITS, int VALUE_BITS, int KEY_DIM, int VALUE_DIM, int TILES>
struct AttendPacked {
  using Shape = AttendShape<KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, TILES>;
  using Keys = typename Shape::Keys;
  using Values = typename Shape::Values;
  enum {
    WARPS = Shape::WARPS,
    ROWS = Shape::ROWS,
    SLOTS = Shape::SLOTS,
    VALUE_TILES = Shape::VALUE_TILES,
    THREADS = 32 * WARPS
  };

  // Where the 8 weights of a chunk of a query row stand among the row's, in units of a chunk, so that lanes that write
  // or read at once meet few banks twice.
  static DEVICE_FN int place_of_weights(int row, int chunk) {
    return chunk ^ (row / 2 % 4 * 2) ^ (row % 2 * (Values::SHARE == 2 ? 1 : 4));
  }

  // Where products of lane `i` of the words and query row 8 tile + 2 quad_lane + r stand among a thread's sums: four
  // neighbouring lanes of the words make two operands of 16 rows, which have lanes 0 and 1, and 2 and 3.
  static DEVICE_FN constexpr int place(int i, int tile, int r) {
    return ((i / 2) * TILES + tile) * 4 + 2 * (i % 2) + r;
  }

  // ---- copies under way
  //
  // Copies go over the lanes as words lie in memory: 8 neighbouring lanes, which memory serves together, bring 128
  // bytes of a row. 8 neighbouring lanes that read them back have two such groups of four rows.

  // Where in a load of 32 the words of a group and row (0 to 3) stand, so that neither 8 lanes meet a bank twice.
  static DEVICE_FN int place_of_words(int group, int row) { return 8 * row + (group ^ (2 * row)); }

  static DEVICE_FN void start_keys(
      const rotormlx_attend_arguments& call, const Part& p, int block, int lane, uint4* slot,
      Copies& copies) {  // slot: [SLOT_LOADS][32]
    const int group = lane % 8, quad_lane = lane / 8;
    uint4* to = slot + place_of_words(group, quad_lane);
    const uint* words = call.keys.words + p.batch * call.keys.words_strides[0] +
                        p.kv_head * call.keys.words_strides[1] + block * call.keys.words_strides[2];
#pragma unroll
    for (int load = 0; load < Keys::LOADS; ++load) {
#pragma unroll
      for (int i = 0; i < Keys::WORDS; ++i) {
        const uint* row = words + Keys::row(load, i, quad_lane) * BLOCK + 4 * group;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          copies.template start<16>(to + ((load * Keys::WORDS + i) * 2 + half) * 32, row + 32 * half);
        }
      }
    }
    // Scales of keys (lanes 0 to 15) and of values, as tokens of a group read them: four and, 32 further, four.
    const rotormlx_packed& packed = lane < 16 ? call.keys : call.values;
    const int half = lane / 8 % 2;
    const __half* scales = static_cast<const __half*>(packed.scales) + p.batch * packed.scales_strides[0] +
                           p.kv_head * packed.scales_strides[1] + block * packed.scales_strides[2];
    uint4* place = slot + Shape::KEY_LOADS * 32 + lane / 16 * 8 + group;
    copies.template start<8>(reinterpret_cast<uint2*>(place) + half, scales + 32 * half + 4 * group);
  }

  static DEVICE_FN void start_values(
      const rotormlx_attend_arguments& call, const Part& p, int block, int lane, uint4* slot,
      Copies& copies) {
    const int group = lane % 8, quad_lane = lane / 8;
    uint4* to = slot + place_of_words(group, quad_lane);
    const uint* words = call.values.words + p.batch * call.values.words_strides[0] +
                        p.kv_head * call.values.words_strides[1] + block * call.values.words_strides[2];
#pragma unroll
    for (int tile = 0; tile < VALUE_TILES; ++tile) {
      // Channels behind the last are read as some that exist.
      const int channel = min(32 * tile + 4 * group, VALUE_DIM - 4);
#pragma unroll
      for (int i = 0; i < Values::LOADS * Values::WORDS; ++i) {
        const int row = Values::row(i / Values::WORDS, i % Values::WORDS, quad_lane);
        copies.template start<16>(
            to + (tile * Values::LOADS * Values::WORDS + i) * 32, words + row * VALUE_DIM + channel);
      }
    }
  }

  // How far before a load of a thread the words lie that come before it on the packed axis: those of the quad's lane
  // before, or of its last lane in the load before, `loads_apart`.
  static DEVICE_FN int way_back(int lane, int loads_apart) {
    const int group = lane / 4, quad_lane = lane % 4;
    const int there = quad_lane == 0 ? place_of_words(group, 3) - loads_apart : place_of_words(group, quad_lane - 1);
    return place_of_words(group, quad_lane) - there;
  }

  // sums[half][pair] += levels times factors, for the four lanes of the words that a load of this thread has: `load`
  // its first word rows, `factors` [TILES] operands of a step. Rows of the product: lane 0 of the four, then lane 1;
  // then 2 and 3.
  template <int BITS, int WORDS>
  static DEVICE_FN void add_products(
      const uint4* load, int words_apart, int back, int part, int word_lane, const ushort* table,
      const uint4* factors, int factors_apart, float* sums) {  // sums: [2][TILES][4]
    uint words[WORDS][4];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const uint4 four = load[i * words_apart];
      words[i][0] = four.x, words[i][1] = four.y, words[i][2] = four.z, words[i][3] = four.w;
    }
    uint before[4] = {0, 0, 0, 0};
    if (Stored<BITS>::HAS_TRELLIS) {
      const uint4 four = *(word_lane == 0 ? load : load - back);
      if (word_lane > 0) before[0] = four.x, before[1] = four.y, before[2] = four.z, before[3] = four.w;
    }
    uint levels[4][4];  // [lane of the words][pair]
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      uint of_lane[WORDS];
#pragma unroll
      for (int i = 0; i < WORDS; ++i) of_lane[i] = words[i][lane];
      ChunkLevels<BITS>::make(of_lane, before[lane], part, word_lane, table, levels[lane]);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const uint4 four = factors[tile * factors_apart];
      const uint operand[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint left[4] = {
              levels[2 * half][2 * pair], levels[2 * half + 1][2 * pair], levels[2 * half][2 * pair + 1],
              levels[2 * half + 1][2 * pair + 1]};
          multiply_add(sums + (half * TILES + tile) * 4, left, operand + 2 * pair);
        }
      }
    }
  }

  // ---- queries

  // The power of two by which a row is divided, so that float16 holds it: that of its largest number.
  static DEVICE_FN float power_below(float largest) {
    const uint exponent = bits_of_float(largest) & 0x7f800000u;
    // Between 2^-100 and 2^100, to have an inverse; also for zero, infinity and NaN.
    return float_of_bits(min(max(exponent, 27u << 23), 227u << 23));
  }

  // The factors of ROWS rows, of which row_at(row) is where the first number lies.
  template <typename RowAt>
  static DEVICE_FN void load_factors(const RowAt& row_at, float* factors, int warp, int lane) {
    float largest[ROWS / WARPS];
#pragma unroll
    for (int i = 0; i < ROWS / WARPS; ++i) {
      const auto* row = row_at(warp + WARPS * i);
      largest[i] = 0.0f;
#pragma unroll
      for (int c = 0; c < KEY_DIM; c += 32) {
        // Behind the last channel it is read again.
        largest[i] = fmaxf(largest[i], fabsf(to_float(row[min(c + lane, KEY_DIM - 1)])));
      }
    }
#pragma unroll
    for (int i = 0; i < ROWS / WARPS; ++i) {
      for (int mask = 16; mask > 0; mask /= 2) largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], mask));
      if (lane == 0) factors[warp + WARPS * i] = power_below(largest[i]);
    }
  }

  // The same rows, divided by their factors, as operands [TILES][STEPS][32]; chunk_of(step) is the chunk of this lane.
  template <int STEPS, typename Places, typename RowAt, typename ChunkOf>
  static DEVICE_FN void load_operands(
      const RowAt& row_at, const ChunkOf& chunk_of, const float* factors, uint4* operands, int warp, int lane) {
    for (int i = warp; i < TILES * STEPS; i += WARPS) {
      const int row = i / STEPS * 8 + lane / 4;
      const int first = 8 * chunk_of(i % STEPS);
      const auto* numbers = row_at(row);
      const float inverse = float_of_bits((254u << 23) - bits_of_float(factors[row]));  // of a power of two
      float placed[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        placed[Places::place(c)] = first + c < KEY_DIM ? to_float(numbers[first + c]) * inverse : 0.0f;
      }
      uint4 operand;
      operand.x = half_pair(placed[0], placed[1]);
      operand.y = half_pair(placed[2], placed[3]);
      operand.z = half_pair(placed[4], placed[5]);
      operand.w = half_pair(placed[6], placed[7]);
      operands[i * 32 + lane] = operand;
    }
  }

  // Half the variance that codes bring into the scores of each row, for a scale of 1; rows as for load_factors.
  template <typename RowAt>
  static DEVICE_FN void measure_noise(const RowAt& row_at, float scale, float* noise, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < ROWS / WARPS; ++i) {
      const float* row = row_at(warp + WARPS * i);
      float square_sum = 0.0f;
      for (int c = lane; c < KEY_DIM; c += 32) square_sum = fmaf(scale * row[c], scale * row[c], square_sum);
      for (int mask = 16; mask > 0; mask /= 2) square_sum += shuffle_xor(square_sum, mask);
      if (lane == 0) noise[warp + WARPS * i] = score_noise(KEY_BITS) * LOG2_E * square_sum;
    }
  }

  // Puts both forms of the query into operands, and their factors and the noise into [3][ROWS].
  static DEVICE_FN void load_queries(
      const AttendParts& all, const Part& p, uint4* queries, uint4* plain_queries, float* factors,
      int warp, int lane) {
    const rotormlx_attend_arguments& call = all.call;
    const auto last = [&](int row) { return min(p.first_row + row, p.group_rows - 1); };
    const auto rotated = [&](int row) {
      return all.rotated + (int64_t(p.head_index) * p.group_rows + last(row)) * KEY_DIM;
    };
    with_dtype(call.q, call.dtype, [&](const auto* q) {
      const auto plain = [&](int row) { return q + query_at(call, p.batch, p.kv_head, last(row)); };
      load_factors(rotated, factors, warp, lane);
      load_factors(plain, factors + ROWS, warp, lane);
      measure_noise(rotated, call.scale, factors + 2 * ROWS, warp, lane);
      __syncthreads();  // the factors are there
      load_operands<Keys::STEPS, Order<KEY_BITS>>(
          rotated, [&](int step) { return Keys::chunk(step, lane % 4); }, factors, queries, warp, lane);
      load_operands<Shape::PLAIN_STEPS, Order<8>>(
          plain, [&](int step) { return 4 * step + lane % 4; }, factors + ROWS, plain_queries, warp, lane);
    });
  }

  // <q, centre> of this warp's next 16 blocks, [16][ROWS]: one product with the centres as rows. A barrier must follow.
  static DEVICE_FN void multiply_centres(
      const rotormlx_attend_arguments& call, const Part& p, int first_block, int last_block,
      const uint4* plain_queries, const float* factors, float* products, int lane) {
    const __half* centres = static_cast<const __half*>(call.keys.centres) +
                            p.batch * call.keys.centres_strides[0] + p.kv_head * call.keys.centres_strides[1];
    const int group = lane / 4, quad_lane = lane % 4;
    float sums[TILES * 4];
#pragma unroll
    for (int i = 0; i < TILES * 4; ++i) sums[i] = 0.0f;
    const __half* rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int block = min(first_block + (group + 8 * half) * WARPS, last_block);
      rows[half] = centres + block * call.keys.centres_strides[2];
    }
#pragma unroll
    for (int step = 0; step < Shape::PLAIN_STEPS; ++step) {
      // Behind the last channel the query is zero.
      const int channel = min(8 * (4 * step + quad_lane), KEY_DIM - 8);
      const uint4 first = *reinterpret_cast<const uint4*>(rows[0] + channel);
      const uint4 second = *reinterpret_cast<const uint4*>(rows[1] + channel);
      const uint left[2][4] = {{first.x, second.x, first.y, second.y}, {first.z, second.z, first.w, second.w}};
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const uint4 four = plain_queries[(tile * Shape::PLAIN_STEPS + step) * 32 + lane];
        const uint operand[4] = {four.x, four.y, four.z, four.w};
        multiply_add(sums + 4 * tile, left[0], operand);
        multiply_add(sums + 4 * tile, left[1], operand + 2);
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * tile + 2 * quad_lane + i % 2;
        products[(group + i / 2 * 8) * ROWS + row] = sums[4 * tile + i] * (factors[ROWS + row] * call.scale * LOG2_E);
      }
    }
  }

  // ---- the kernel

  static DEVICE_FN void run(const AttendParts& all, uint4* shared) {
    const rotormlx_attend_arguments& call = all.call;
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const int group = lane / 4, quad_lane = lane % 4;
    const Part p = part_of_block(all, ROWS);

    uint4* ring = shared + warp * (SLOTS * Shape::SLOT_LOADS * 32);  // [SLOTS][SLOT_LOADS][32]
    const int my_place = place_of_words(group, quad_lane);
    const int key_way_back = way_back(lane, 2 * 32 * Keys::WORDS), value_way_back = way_back(lane, 32 * Values::WORDS);
    uint4* queries = shared + Shape::QUERIES;
    uint4* plain_queries = shared + Shape::PLAIN_QUERIES;
    float* factors = reinterpret_cast<float*>(shared + Shape::FACTORS);
    __half* weights =
        reinterpret_cast<__half*>(shared + Shape::WEIGHTS) + warp * (ROWS * BLOCK);
    float* centre_products = reinterpret_cast<float*>(shared + Shape::CENTRES) + warp * (16 * ROWS);
    ushort* table = reinterpret_cast<ushort*>(shared + Shape::TABLE);

    const int first_block = p.start / BLOCK + warp;
    const int end_block = (p.stop + BLOCK - 1) / BLOCK;
    const int blocks = max(0, (end_block - first_block + WARPS - 1) / WARPS);  // of this warp

    Copies copies;
    int next_item = 0, next_slot = 0;  // items are the keys of a block, its values, the keys of the next
    const auto start_next = [&]() {
      if (next_item < 2 * blocks) {
        const int block = first_block + next_item / 2 * WARPS;
        uint4* slot = ring + next_slot * (Shape::SLOT_LOADS * 32);
        if (next_item % 2 == 0) start_keys(call, p, block, lane, slot, copies);
        else start_values(call, p, block, lane, slot, copies);
      }
      copies.commit();
      ++next_item;
      next_slot = next_slot + 1 == SLOTS ? 0 : next_slot + 1;
    };
    for (int i = 0; i < SLOTS - 1; ++i) start_next();

    if (KEY_BITS == 8 || VALUE_BITS == 8) fill_half_levels(table, int(threadIdx.x), THREADS);
    load_queries(all, p, queries, plain_queries, factors, warp, lane);
    __syncthreads();  // the queries and the table are there

    // Query rows 8 tile + 2 quad_lane + r are this thread's, of scores and of the output.
    float tops[TILES][2], totals[TILES][2], row_factors[TILES][2], noise[TILES][2];
    float sums[VALUE_TILES * 4 * TILES * 2];  // see place()
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        tops[tile][r] = HIDDEN;
        totals[tile][r] = 0.0f;
        row_factors[tile][r] = factors[8 * tile + 2 * quad_lane + r] * call.scale * LOG2_E;
        noise[tile][r] = factors[2 * ROWS + 8 * tile + 2 * quad_lane + r];
      }
    }
#pragma unroll
    for (int i = 0; i < VALUE_TILES * 4 * TILES * 2; ++i) sums[i] = 0.0f;

    int slot_number = 0;
    const auto take_slot = [&]() {
      // The slot that was read last is free: since then all lanes have met.
      start_next();
      copies.template wait<SLOTS - 1>();
      __syncwarp();  // the copies of all lanes are there, and the products with the centres
      const uint4* slot = ring + slot_number * (Shape::SLOT_LOADS * 32);
      slot_number = slot_number + 1 == SLOTS ? 0 : slot_number + 1;
      return slot;
    };

    for (int n = 0; n < blocks; ++n) {
      const int block = first_block + n * WARPS;
      if (n % 16 == 0) {
        multiply_centres(
            call, p, block, end_block - 1, plain_queries, factors, centre_products, lane);
      }

      float scores[2 * 4 * TILES * 2];  // see place(); i = 4 h + j is token 32 h + 4 group + j
#pragma unroll
      for (int i = 0; i < 2 * 4 * TILES * 2; ++i) scores[i] = 0.0f;
      const uint4* slot = take_slot();
#pragma unroll
      for (int step = 0; step < Keys::STEPS; ++step) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int load = step / Keys::SHARE;
          add_products<KEY_BITS, Keys::WORDS>(
              slot + (load * Keys::WORDS * 2 + h) * 32 + my_place, 2 * 32, key_way_back, step % Keys::SHARE,
              load * 4 + quad_lane, table, queries + step * 32 + lane, Keys::STEPS * 32, scores + place(4 * h, 0, 0));
        }
      }
      __half scales[2][8];  // of keys and values, [half][token]
      *reinterpret_cast<uint4*>(scales[0]) = slot[Shape::KEY_LOADS * 32 + group];
      *reinterpret_cast<uint4*>(scales[1]) = slot[Shape::KEY_LOADS * 32 + 8 + group];

      // The largest score decides the power of two that is taken out; so does the scale of the value, so that
      // weight times scale, at most 2^15, suits float16.
      const bool all_seen = (block + 1) * BLOCK <= p.stop &&
                            (call.mask_kind == ROTORMLX_MASK_NONE ||
                             (call.mask_kind == ROTORMLX_MASK_CAUSAL &&
                              p.sink + (block + 1) * BLOCK <= p.tokens - call.length + 1));
      float new_tops[TILES][2];
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float about_centre = centre_products[n % 16 * ROWS + 8 * tile + 2 * quad_lane + r];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& score = scores[place(i, tile, r)];
            const float scale = __half2float(scales[0][i]);
            score = fmaf(fmaf(score, row_factors[tile][r], -noise[tile][r] * scale), scale, about_centre);
          }
        }
      }
      if (!all_seen) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int query_row = min(p.first_row + 8 * tile + 2 * quad_lane + r, p.group_rows - 1);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const int index = block * BLOCK + i / 4 * 32 + 4 * group + i % 4;
              float& score = scores[place(i, tile, r)];
              score = index < p.stop ? masked(call, p, query_row, position_of(p, index), score) : HIDDEN;
            }
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          new_tops[tile][r] = tops[tile][r];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int exponent =
                int(bits_of_float(__half2float(scales[1][i])) >> 23 & 0xffu) - 126;  // |scale| < 2^exponent
            const float reach = scores[place(i, tile, r)] + float(min(max(exponent, -24), 17));
            new_tops[tile][r] = fmaxf(new_tops[tile][r], reach);
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          for (int mask = 4; mask < 32; mask *= 2) {
            new_tops[tile][r] = fmaxf(new_tops[tile][r], shuffle_xor(new_tops[tile][r], mask));
          }
          const float shrink = power_of_two(tops[tile][r] - new_tops[tile][r]);
          tops[tile][r] = new_tops[tile][r];
          totals[tile][r] *= shrink;
#pragma unroll
          for (int i = 0; i < VALUE_TILES * 4; ++i) sums[place(i, tile, r)] *= shrink;
          const float top = tops[tile][r] - 15.0f;
          const int row = 8 * tile + 2 * quad_lane + r;
          float scaled[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float weight = share_of(scores[place(i, tile, r)], top);
            totals[tile][r] += weight;
            // The scale of a hidden token may be anything, NaN among them.
            scaled[i] = weight == 0.0f ? 0.0f : weight * __half2float(scales[1][i]);
          }
          // Tokens of a chunk in the order of its levels, two pairs at a time.
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int chunk = 4 * h + group / 2, half = group % 2 * 4;
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
              constexpr int NEXT = Order<VALUE_BITS>::NEXT;
              const int i = NEXT == 2 ? pair : 2 * pair;
              const int place = Order<VALUE_BITS>::place(half + i);
              *reinterpret_cast<uint*>(weights + row * BLOCK + 8 * place_of_weights(row, chunk) + place) =
                  half_pair(scaled[4 * h + i], scaled[4 * h + i + NEXT]);
            }
          }
        }
      }
      __syncwarp();  // the weights are there, the keys have been read

      slot = take_slot();
#pragma unroll
      for (int step = 0; step < Values::STEPS; ++step) {
        uint4 operands[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const int row = 8 * tile + group;  // of which a lane has the weights
          operands[tile] = *reinterpret_cast<const uint4*>(
              weights + row * BLOCK + 8 * place_of_weights(row, Values::chunk(step, quad_lane)));
        }
#pragma unroll
        for (int tile = 0; tile < VALUE_TILES; ++tile) {
          const int load = step / Values::SHARE;
          add_products<VALUE_BITS, Values::WORDS>(
              slot + (tile * Values::LOADS + load) * Values::WORDS * 32 + my_place, 32, value_way_back,
              step % Values::SHARE, load * 4 + quad_lane, table, operands, 1, sums + place(4 * tile, 0, 0));
        }
      }
      __syncwarp();  // no weights are in use, the values have been read
    }

    copies.template wait<0>();
    __syncthreads();  // the ring and the queries are no longer in use
    merge_warps(all, p, shared, tops, totals, sums, warp, lane);
  }

  // The warps' sums become one, and go out.
  static DEVICE_FN void merge_warps(
      const AttendParts& all, const Part& p, uint4* shared, const float (*tops)[2], float (*totals)[2],
      const float* sums,
      int warp, int lane) {
    float* all_tops = reinterpret_cast<float*>(shared);  // [WARPS][2][ROWS]
    float* all_sums = all_tops + WARPS * 2 * ROWS;       // [WARPS][ROWS][VALUE_DIM]
    const int group = lane / 4, quad_lane = lane % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        for (int mask = 4; mask < 32; mask *= 2) {
          totals[tile][r] += shuffle_xor(totals[tile][r], mask);
        }
        const int row = 8 * tile + 2 * quad_lane + r;
        if (group == 0) {
          all_tops[warp * 2 * ROWS + row] = tops[tile][r] - 15.0f;
          all_tops[(warp * 2 + 1) * ROWS + row] = totals[tile][r];
        }
#pragma unroll
        for (int i = 0; i < VALUE_TILES * 4; ++i) {
          const int channel = 32 * (i / 4) + 4 * group + i % 4;
          if (channel < VALUE_DIM) {
            all_sums[(warp * ROWS + row) * VALUE_DIM + channel] =
                sums[place(i, tile, r)];
          }
        }
      }
    }
    __syncthreads();  // the warps' tops, totals and sums are there
    for (int row = warp; row < ROWS && p.first_row + row < p.group_rows; row += WARPS) {
      const int64_t at =
          (int64_t(p.head_index) * p.group_rows + p.first_row + row) * p.parts + p.part;
      float top = HIDDEN, total = 0.0f, shares[WARPS];
      for (int w = 0; w < WARPS; ++w) top = fmaxf(top, all_tops[w * 2 * ROWS + row]);
      for (int w = 0; w < WARPS; ++w) {
        shares[w] = share_of(all_tops[w * 2 * ROWS + row], top);
        total = fmaf(shares[w], all_tops[(w * 2 + 1) * ROWS + row], total);
      }
      for (int channel = lane; channel < VALUE_DIM; channel += 32) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; ++w) {
          sum = fmaf(shares[w], all_sums[(w * ROWS + row) * VALUE_DIM + channel], sum);
        }
        all.outputs[at * VALUE_DIM + channel] = sum;
      }
      if (lane == 0) {
        all.tops[at] = top;
        all.totals[at] = total;
      }
    }
  }
};
