// Decode attention on packed bytes, first pass, on the tensor cores: one part of the packed tokens for up to 16 query
// rows of a KV head.
//
// A warp takes every fourth block of the part and keeps its own softmax; the warps merge once, at the end. Both
// products use words in their stored layout: scores = levels of keys [tokens, channels] times queries, output = levels
// of values [channels, tokens] times weights (see fragments.cuh). A lane copies 16 bytes, the words of four
// neighbouring tokens or channels, into shared memory some blocks ahead, for whichever lane of its warp needs them.
// Levels, queries and weights are float16; sums and the softmax are float32.

// A constant as the type of an argument of a function object.
template <bool VALUE>
struct Flag {
  __device__ constexpr operator bool() const { return VALUE; }
};

// A span is 32 neighbouring lanes of the words. A load of a span gives each thread of a warp 4 of these lanes. A block
// of keys is 2 spans, a block of values VALUE_DIM / 32. An item is as many spans as make 8 loads; its loads go through
// the ring together.
template <int BITS, int AXIS, int LANES>
struct Spans {
  using Words = Chunks<BITS, AXIS>;
  enum {
    COUNT = (LANES + 31) / 32,
    LOADS = Words::LOADS * Words::WORDS,  // of a span
    MOST = LOADS >= 8 ? 1 : 8 / LOADS,
    AT_ONCE = MOST < COUNT ? MOST : COUNT,
    ITEMS = (COUNT + AT_ONCE - 1) / AT_ONCE
  };
};

// Shared memory of a thread block. The ring is [WARPS][SLOTS][SLOT_LOADS][LOAD], with one slot per item. The scales of
// the keys and values of a block follow the last item of its keys.
template <int KEY_BITS, int VALUE_BITS, int KEY_DIM, int VALUE_DIM, int TILES>
struct AttendShape {
  using Keys = Chunks<KEY_BITS, KEY_DIM>;
  using Values = Chunks<VALUE_BITS, BLOCK>;
  using KeySpans = Spans<KEY_BITS, KEY_DIM, BLOCK>;
  using ValueSpans = Spans<VALUE_BITS, BLOCK, VALUE_DIM>;
  enum {
    WARPS = 4,
    ROWS = 8 * TILES,
    KEY_LOADS = KeySpans::AT_ONCE * KeySpans::LOADS,
    VALUE_LOADS = ValueSpans::AT_ONCE * ValueSpans::LOADS,
    // 16 bytes of each lane. With a trellis also 16 zero bytes, which stand for the words before the first ones.
    LOAD = Stored<KEY_BITS>::HAS_TRELLIS || Stored<VALUE_BITS>::HAS_TRELLIS ? 33 : 32,
    SLOT_LOADS = KEY_LOADS + 1 > VALUE_LOADS ? KEY_LOADS + 1 : VALUE_LOADS,
    // Enough slots for a multiprocessor to have about 40 KiB of copies in flight.
    SLOTS = SLOT_LOADS <= 8 ? 4 : 3,
    PLAIN_STEPS = (KEY_DIM + 31) / 32,
    // Offsets in shared memory, in units of 16 bytes.
    RING = 0,
    QUERIES = WARPS * SLOTS * SLOT_LOADS * LOAD,
    PLAIN_QUERIES = QUERIES + TILES * Keys::STEPS * 32,
    FACTORS = PLAIN_QUERIES + TILES * PLAIN_STEPS * 32,  // [4][ROWS] float, see load_queries
    WEIGHTS = FACTORS + 4 * ROWS * 4 / 16,               // [WARPS][ROWS][BLOCK] half
    CENTRES = WEIGHTS + WARPS * ROWS * BLOCK * 2 / 16,   // [WARPS][16][ROWS] float
    PRODUCTS_END = CENTRES + WARPS * 16 * ROWS * 4 / 16,
    // Before any weights exist: [ROWS][KEY_DIM] float, if the thread block rotates the queries itself.
    ROTATED = WEIGHTS,
    ROTATED_END = ROTATED + ROWS * KEY_DIM * 4 / 16,
    BYTES = PRODUCTS_END > ROTATED_END ? PRODUCTS_END : ROTATED_END,  // [2][4] LevelBytes, for keys and for values
    PART = BYTES + 8,                                    // one Part
    TABLE = PART + 4,                                    // [256] half, for codes of 8 bits
    ALL = TABLE + (KEY_BITS == 8 || VALUE_BITS == 8 ? 32 : 0),
    // At the end, in place of all the above: [WARPS][2][ROWS] tops and totals, [WARPS][ROWS][VALUE_DIM] sums
    END = WARPS * ROWS * (2 + VALUE_DIM) * 4 / 16,
    SHARED_BYTES = 16 * (ALL > END ? ALL : END)
  };
};

template <int KEY_BITS, int VALUE_BITS, int KEY_DIM, int VALUE_DIM, int TILES>
struct AttendPacked {
  using Shape = AttendShape<KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, TILES>;
  using Keys = typename Shape::Keys;
  using Values = typename Shape::Values;
  using KeySpans = typename Shape::KeySpans;
  using ValueSpans = typename Shape::ValueSpans;
  enum {
    WARPS = Shape::WARPS,
    ROWS = Shape::ROWS,
    SLOTS = Shape::SLOTS,
    LOAD = Shape::LOAD,
    SLOT = Shape::SLOT_LOADS * LOAD,
    ITEMS = KeySpans::ITEMS + ValueSpans::ITEMS,  // of a block: its keys, then its values
    VALUE_LANES = 4 * ValueSpans::COUNT,          // lanes of the values' words whose sums a thread holds
    THREADS = 32 * WARPS
  };

  // A product may be at most 2^LARGEST, so that float16 holds it. If the largest product of a row would exceed that,
  // the base is raised until that product is 2^(LARGEST - ROOM). The room makes it rare that sums must be scaled down.
  static constexpr float LARGEST = 15.0f, ROOM = 4.0f;

  // Position of a chunk (8 weights) of a query row among the row's chunks. The permutation spreads the lanes that write
  // or read at the same time over the banks.
  static DEVICE_FN int place_of_weights(int row, int chunk) {
    return chunk ^ (row / 2 % 4 * 2) ^ (row % 2 * (Values::SHARE == 2 ? 1 : 4));
  }

  // Index among a thread's sums of the product of lane `i` of the words and query row 8 tile + 2 quad_lane + r. Four
  // neighbouring lanes of the words make two operands of 16 rows: one has lanes 0 and 1, the other lanes 2 and 3.
  static DEVICE_FN constexpr int place(int i, int tile, int r) {
    return ((i / 2) * TILES + tile) * 4 + 2 * (i % 2) + r;
  }

  // ---- copies in flight
  //
  // Lanes copy words in memory order: 8 neighbouring lanes, which the memory serves together, copy 128 bytes of one
  // row. The 8 neighbouring lanes that read words back have two such groups, of four rows each.

  // Position of the words of a group and row (0 to 3) in a load of 32. Neither 8 lanes that write together nor 8 lanes
  // that read together use a bank twice.
  static DEVICE_FN int place_of_words(int group, int row) { return 8 * row + (group ^ (2 * row)); }

  // The addresses that this lane copies the warp's next block from. keys, values: the first words, and the first words
  // of the second plane if there is one. scales: of keys (lanes 0 to 15) or of values, in the order in which a group
  // reads its tokens: four, and four more 32 tokens further on. words_to, scales_to: where they go in the first slot of
  // the ring; other slots are at a constant distance.
  struct Source {
    const uint *keys[2], *values[2];
    const __half* scales;
    uint4* words_to;
    uint2* scales_to;
  };

  static DEVICE_FN const rotormlx_packed& scaled_by(const rotormlx_attend_arguments& call, int lane) {
    return lane < 16 ? call.keys : call.values;
  }

  static DEVICE_FN Source source_of(
      const rotormlx_attend_arguments& call, const Part& p, int first_block, int lane, uint4* ring) {
    const auto start_of = [&](const int64_t* strides) {
      return p.batch * strides[0] + p.kv_head * strides[1] + first_block * strides[2];
    };
    const int quad_lane = lane / 8, lanes_before = 4 * (lane % 8);
    const rotormlx_packed& scaled = scaled_by(call, lane);
    const uint* keys = call.keys.words + start_of(call.keys.words_strides) + lanes_before;
    const uint* values = call.values.words + start_of(call.values.words_strides) + lanes_before;
    const __half* scales = static_cast<const __half*>(scaled.scales) + start_of(scaled.scales_strides);
    return {{keys + Keys::row(0, 0, quad_lane) * BLOCK, keys + Keys::row(0, 1, quad_lane) * BLOCK},
            {values + Values::row(0, 0, quad_lane) * VALUE_DIM, values + Values::row(0, 1, quad_lane) * VALUE_DIM},
            scales + lane / 8 % 2 * 32 + lanes_before,
            ring + place_of_words(lane % 8, quad_lane),
            reinterpret_cast<uint2*>(ring + Shape::KEY_LOADS * LOAD + lane / 16 * 8 + lane % 8) + lane / 8 % 2};
  }

  // Start the copies of an item's words, of LANES lanes of words in all, to `to` and the loads after it; words: see
  // Source.
  template <typename Words, typename Of, int LANES>
  static DEVICE_FN void start_words(const uint* const* words, int item, int lane, uint4* to, Copies& copies) {
    const int group = lane % 8, quad_lane = lane / 8;
#pragma unroll
    for (int s = 0; s < Of::AT_ONCE; ++s) {
      const int span = item * Of::AT_ONCE + s;
      if (span >= Of::COUNT) break;
      // Loads past the last lane read lanes that exist.
      const int further = LANES % 32 == 0 ? 32 * span : min(32 * span + 4 * group, LANES - 4) - 4 * group;
#pragma unroll
      for (int i = 0; i < Of::LOADS; ++i) {
        const int word = i % Words::WORDS;
        const int rows = Words::row(i / Words::WORDS, word, quad_lane) - Words::row(0, word, quad_lane);
        copies.template start<16>(to + (s * Of::LOADS + i) * LOAD, words[word] + rows * LANES + further);
      }
    }
  }

  // Advance to the warp's next block. The distance fits into 32 bits, which take one register and one instruction.
  static DEVICE_FN void advance(const uint** words, int64_t stride) {
    words[0] += WARPS * int(stride);
    words[1] += WARPS * int(stride);
  }

  // Start the copies of an item of the source's block. The last item of the keys, or of the values, advances the
  // source.
  static DEVICE_FN void start_item(
      const rotormlx_attend_arguments& call, Source& source, int item, int lane, int slot, Copies& copies) {
    uint4* to = source.words_to + slot;
    if (item >= KeySpans::ITEMS) {
      start_words<Values, ValueSpans, VALUE_DIM>(source.values, item - KeySpans::ITEMS, lane, to, copies);
      if (item == ITEMS - 1) advance(source.values, call.values.words_strides[2]);
      return;
    }
    start_words<Keys, KeySpans, BLOCK>(source.keys, item, lane, to, copies);
    if (item == KeySpans::ITEMS - 1) {
      copies.template start<8>(source.scales_to + 2 * slot, source.scales);
      advance(source.keys, call.keys.words_strides[2]);
      source.scales += WARPS * int(scaled_by(call, lane).scales_strides[2]);
    }
  }

  // ---- products

  // What a thread needs to turn words into levels.
  struct Decoder {
    // In the first slot of the ring: the thread's words of a load, and the words before them on the packed axis. The
    // latter belong to the preceding lane of the quad. For the first lane they are zeros in a first load, and in later
    // loads those of the last lane in the load before.
    const uint4 *words, *before, *before_first;
    int quad_lane;
    LevelBytes bytes;
    const ushort* table;  // [256], the levels of 8 bits
  };

  template <typename Words>
  static DEVICE_FN Decoder decoder_of(
      const uint4* ring, int lane, const LevelBytes& bytes, const ushort* table) {
    const int group = lane / 4, quad_lane = lane % 4;
    const uint4* behind = ring + place_of_words(group, (quad_lane + 3) % 4);
    return {ring + place_of_words(group, quad_lane),
            quad_lane == 0 ? behind - LOAD * Words::WORDS : behind,
            quad_lane == 0 ? ring + 32 : behind,
            quad_lane,
            bytes,
            table};
  }

  // sums[span][half][tile] += levels times factors, for the lanes of the words in an item; a load of this thread has
  // four lanes of each span. factor_of(step, tile) returns the operand of a step. Rows of the products: first lanes 0
  // and 1 of the four, then lanes 2 and 3.
  template <int BITS, typename Words, typename Of, typename FactorOf>
  static DEVICE_FN void add_item(
      int slot, int item, const Decoder& decoder, const FactorOf& factor_of, float* sums) {
#pragma unroll
    for (int load = 0; load < Words::LOADS; ++load) {
      uint4 factors[Words::SHARE][TILES];
#pragma unroll
      for (int share = 0; share < Words::SHARE; ++share) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) factors[share][tile] = factor_of(load * Words::SHARE + share, tile);
      }
#pragma unroll
      for (int s = 0; s < Of::AT_ONCE; ++s) {
        const int span = item * Of::AT_ONCE + s;
        if (span >= Of::COUNT) break;
        add_load<BITS, Words>(
            slot + (s * Of::LOADS + load * Words::WORDS) * LOAD, load == 0, decoder, factors,
            sums + span * (8 * TILES));
      }
    }
  }

  // The same for one load, at offset `load` in the ring.
  template <int BITS, typename Words>
  static DEVICE_FN void add_load(
      int load, bool is_first, const Decoder& decoder, const uint4 (&factors)[Words::SHARE][TILES],
      float* sums) {  // sums: [2][TILES][4]
    uint words[Words::WORDS][4], before[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < Words::WORDS; ++i) {
      const uint4 four = decoder.words[load + i * LOAD];
      words[i][0] = four.x, words[i][1] = four.y, words[i][2] = four.z, words[i][3] = four.w;
    }
    if (Stored<BITS>::HAS_TRELLIS) {
      const uint4 four = (is_first ? decoder.before_first : decoder.before)[load];
      before[0] = four.x, before[1] = four.y, before[2] = four.z, before[3] = four.w;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint levels[2][4 * Words::SHARE];  // [lane of the words][pair]
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint of_lane[Words::WORDS];
#pragma unroll
        for (int w = 0; w < Words::WORDS; ++w) of_lane[w] = words[w][2 * half + i];
        Levels<BITS>::make(
            of_lane, before[2 * half + i], decoder.quad_lane, decoder.bytes, decoder.table, levels[i]);
      }
#pragma unroll
      for (int share = 0; share < Words::SHARE; ++share) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const uint4 four = factors[share][tile];
          const uint operand[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int pair = 0; pair < 4; pair += 2) {
            const uint* first = levels[0] + 4 * share + pair;
            const uint* second = levels[1] + 4 * share + pair;
            const uint left[4] = {first[0], second[0], first[1], second[1]};
            multiply_add(sums + (half * TILES + tile) * 4, left, operand + pair);
          }
        }
      }
    }
  }

  // ---- queries

  // The power of two that divides a row so that float16 holds it: that of the row's largest magnitude.
  static DEVICE_FN float power_below(float largest) {
    const uint exponent = bits_of_float(largest) & 0x7f800000u;
    // Clamped to 2^-100 .. 2^100, so that an inverse exists; this also covers zero, infinity and NaN.
    return float_of_bits(min(max(exponent, 27u << 23), 227u << 23));
  }

  // The factors of ROWS rows; row_at(row) is the address of the first number of a row. One lane calls
  // use(row, square_sum) with the sum of the squares of `scale` times the row.
  template <typename RowAt, typename Use>
  static DEVICE_FN void load_factors(
      const RowAt& row_at, float scale, float* factors, int warp, int lane, const Use& use) {
    float largest[ROWS / WARPS], square_sum[ROWS / WARPS];
#pragma unroll
    for (int i = 0; i < ROWS / WARPS; ++i) {
      const auto* row = row_at(warp + WARPS * i);
      largest[i] = square_sum[i] = 0.0f;
#pragma unroll
      for (int c = 0; c < KEY_DIM; c += 32) {
        // Channels past the last count as zero.
        const float x = c + lane < KEY_DIM ? to_float(row[c + lane]) : 0.0f;
        largest[i] = fmaxf(largest[i], fabsf(x));
        square_sum[i] = fmaf(scale * x, scale * x, square_sum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < ROWS / WARPS; ++i) {
      for (int mask = 16; mask > 0; mask /= 2) {
        largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], mask));
        square_sum[i] += shuffle_xor(square_sum[i], mask);
      }
      if (lane == 0) {
        factors[warp + WARPS * i] = power_below(largest[i]);
        use(warp + WARPS * i, square_sum[i]);
      }
    }
  }

  // The same rows, divided by their factors, as operands [TILES][STEPS][32]; chunk_of(step) is this lane's chunk.
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

  // Turn both forms of the query, rotated and plain, into operands. rotated_rows: the rotated queries, from the first
  // row of this thread block on. factors, [4][ROWS]: the powers of two of the rotated rows, and of the plain rows; half
  // the variance that coding the keys adds to the scores of a row, for a scale of 1; the factor on the products with a
  // row.
  static DEVICE_FN void load_queries(
      const rotormlx_attend_arguments& call, const Part& p, const float* rotated_rows, uint4* queries,
      uint4* plain_queries, float* factors, int warp, int lane) {
    const auto existing = [&](int row) { return min(row, p.group_rows - 1 - p.first_row); };
    const auto rotated = [&](int row) { return rotated_rows + existing(row) * KEY_DIM; };
    with_dtype(call.q, call.dtype, [&](const auto* q) {
      const auto plain = [&](int row) { return q + query_at(call, p.batch, p.kv_head, p.first_row + existing(row)); };
      load_factors(rotated, call.scale, factors, warp, lane, [&](int row, float square_sum) {
        factors[2 * ROWS + row] = score_noise(KEY_BITS) * LOG2_E * square_sum;
        factors[3 * ROWS + row] = factors[row] * call.scale * LOG2_E;
      });
      load_factors(plain, call.scale, factors + ROWS, warp, lane, [](int, float) {});
      __syncthreads();  // the factors are there
      load_operands<Keys::STEPS, Order<KEY_BITS>>(
          rotated, [&](int step) { return Keys::chunk(step, lane % 4); }, factors, queries, warp, lane);
      load_operands<Shape::PLAIN_STEPS, Order<8>>(
          plain, [&](int step) { return 4 * step + lane % 4; }, factors + ROWS, plain_queries, warp, lane);
    });
  }

  static DEVICE_FN const __half* centres_of(const rotormlx_attend_arguments& call, const Part& p) {
    return static_cast<const __half*>(call.keys.centres) + p.batch * call.keys.centres_strides[0] +
           p.kv_head * call.keys.centres_strides[1];
  }

  // Prefetch the centres of 16 blocks of this warp, from `first_block` on, into the L2 cache.
  static DEVICE_FN void prefetch_centres(
      const rotormlx_attend_arguments& call, const Part& p, int first_block, int last_block, int lane) {
    constexpr int LINE = 64, LINES = (KEY_DIM + LINE - 1) / LINE;  // numbers of a 128-byte line, lines of a centre
    for (int i = lane; i < 16 * LINES; i += 32) {
      const int block = min(first_block + i / LINES * WARPS, last_block);
      prefetch(centres_of(call, p) + block * call.keys.centres_strides[2] + i % LINES * LINE);
    }
  }

  // <q, centre> for this warp's next 16 blocks, as `products` [16][ROWS]: one matrix product with the centres as rows.
  // A barrier must follow.
  static DEVICE_FN void multiply_centres(
      const rotormlx_attend_arguments& call, const Part& p, int first_block, int last_block,
      const uint4* plain_queries, const float* factors, float* products, int lane) {
    const __half* centres = centres_of(call, p);
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
      // Past the last channel the query is zero.
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

  // ---- the softmax state of a thread, for query rows 8 tile + 2 quad_lane + r in both scores and output

  struct Rows {
    float bases[TILES][2];   // weights are 2^(score - base)
    float totals[TILES][2];  // of this thread's weights
    float sums[VALUE_LANES * TILES * 2];  // see place()
  };

  static DEVICE_FN Rows no_rows() {
    Rows rows;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rows.bases[tile][r] = HIDDEN;
        rows.totals[tile][r] = 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < VALUE_LANES * TILES * 2; ++i) rows.sums[i] = 0.0f;
    return rows;
  }

  // Turn products into scores. factors: see load_queries; scales: of the keys, [8]; about_centre: <q, centre>, [ROWS].
  static DEVICE_FN void finish_scores(
      const float* factors, const __half* scales, const float* about_centre, int quad_lane, float* scores) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 8 * tile + 2 * quad_lane + r;
        const float centre = about_centre[row], noise = factors[2 * ROWS + row], factor = factors[3 * ROWS + row];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& score = scores[place(i, tile, r)];
          const float scale = __half2float(scales[i]);
          score = fmaf(fmaf(score, factor, -noise * scale), scale, centre);
        }
      }
    }
  }

  // Apply the mask, and hide tokens past the last.
  static DEVICE_FN void hide(
      const rotormlx_attend_arguments& call, const Part& p, int block, int lane, float* scores) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query_row = min(p.first_row + 8 * tile + 2 * (lane % 4) + r, p.group_rows - 1);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int index = block * BLOCK + i / 4 * 32 + 4 * (lane / 4) + i % 4;
          float& score = scores[place(i, tile, r)];
          score = index < p.stop ? masked(call, p, query_row, position_of(p, index), score) : HIDDEN;
        }
      }
    }
  }

  // Raise the bases of rows in which a product, weight times value scale, would otherwise be too large.
  static DEVICE_FN void raise_bases(Rows& rows, const __half* value_scales, const float* scores) {
    float logs[8], reach[TILES][2];
    bool beyond = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) logs[i] = fmaxf(log_of_size(__half2float(value_scales[i])), -24.0f);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        reach[tile][r] = HIDDEN;
#pragma unroll
        for (int i = 0; i < 8; ++i) reach[tile][r] = fmaxf(reach[tile][r], scores[place(i, tile, r)] + logs[i]);
        beyond = beyond || reach[tile][r] > rows.bases[tile][r] + LARGEST;
      }
    }
    if (!any_lane(beyond)) return;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = reach[tile][r];
        for (int mask = 4; mask < 32; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
        float& base = rows.bases[tile][r];
        const float raised = largest > base + LARGEST ? largest + ROOM - LARGEST : base;
        const float shrink = power_of_two(base - raised);
        base = raised;
        rows.totals[tile][r] *= shrink;
#pragma unroll
        for (int i = 0; i < VALUE_LANES; ++i) rows.sums[place(i, tile, r)] *= shrink;
      }
    }
  }

  // Turn scores into weights, and write them for other lanes to read. ALL_SEEN: no token is hidden.
  template <bool ALL_SEEN>
  static DEVICE_FN void weigh(
      Rows& rows, const __half* value_scales, const float* scores, int lane, __half* weights) {
    const int group = lane / 4;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 8 * tile + 2 * (lane % 4) + r;
        const float base = rows.bases[tile][r];
        float scaled[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float score = scores[place(i, tile, r)];
          const float weight = ALL_SEEN ? power_of_two(score - base) : share_of(score, base);
          rows.totals[tile][r] += weight;
          // The scale of a hidden token may hold any bits, even a NaN.
          scaled[i] = !ALL_SEEN && weight == 0.0f ? 0.0f : weight * __half2float(value_scales[i]);
        }
        // Store the four tokens of half a chunk in the order of its levels.
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          constexpr int NEXT = Order<VALUE_BITS>::NEXT;
          const int chunk = 4 * h + group / 2;
          uint2 four;
          four.x = half_pair(scaled[4 * h], scaled[4 * h + NEXT]);
          four.y = half_pair(scaled[4 * h + 2 / NEXT], scaled[4 * h + 2 / NEXT + NEXT]);
          *reinterpret_cast<uint2*>(
              weights + row * BLOCK + 8 * place_of_weights(row, chunk) + group % 2 * 4) = four;
        }
      }
    }
  }

  // ---- the kernel

  // The end of the tokens that every query row of this thread block sees.
  static DEVICE_FN int seen_by_all(const rotormlx_attend_arguments& call, const Part& p) {
    if (call.mask_kind == ROTORMLX_MASK_NONE) return p.stop;
    if (call.mask_kind == ROTORMLX_MASK_CAUSAL) return min(p.stop, p.tokens - call.length + 1 - p.sink);
    return 0;
  }

  // The rotated queries of a part, as the kernel attend_query left them.
  static DEVICE_FN const float* rotated_before(const AttendParts& all, const Part& p) {
    return all.rotated + (int64_t(p.head_index) * p.group_rows + p.first_row) * KEY_DIM;
  }

  static DEVICE_FN void run(const AttendParts& all, uint4* shared) {
    run(all, shared, [&](const Part& p, float*) { return rotated_before(all, p); });
  }

  // rotated_of(p, room) returns the address of the rotated queries of a part, from its first row on. All threads call
  // it. `room` is shared memory for [ROWS][KEY_DIM]; if it is used, a barrier follows before anything reads it.
  template <typename RotatedOf>
  static DEVICE_FN void run(const AttendParts& all, uint4* shared, const RotatedOf& rotated_of) {
    const rotormlx_attend_arguments& call = all.call;
    const int warp = of_first_lane(int(threadIdx.x) / 32), lane = int(threadIdx.x) % 32;
    const int group = lane / 4, quad_lane = lane % 4;
    const Part first = part_of_block(all, ROWS);

    uint4* ring = shared + warp * (SLOTS * SLOT);
    uint4* queries = shared + Shape::QUERIES;
    uint4* plain_queries = shared + Shape::PLAIN_QUERIES;
    float* factors = reinterpret_cast<float*>(shared + Shape::FACTORS);
    __half* weights = reinterpret_cast<__half*>(shared + Shape::WEIGHTS) + warp * (ROWS * BLOCK);
    float* centre_products = reinterpret_cast<float*>(shared + Shape::CENTRES) + warp * (16 * ROWS);
    uint4* level_bytes = shared + Shape::BYTES;
    ushort* table = reinterpret_cast<ushort*>(shared + Shape::TABLE);

    // Fields of the part that are rarely needed stay in shared memory, because registers are scarce.
    Part& p = *reinterpret_cast<Part*>(shared + Shape::PART);
    static_assert(sizeof(Part) <= 4 * 16, "a part must fit where it is kept");
    if (threadIdx.x == 0) p = first;

    const int first_block = first.start / BLOCK + warp;
    const int end_block = (first.stop + BLOCK - 1) / BLOCK;
    const int blocks = max(0, (end_block - first_block + WARPS - 1) / WARPS);  // of this warp

    Copies copies;
    Source source = source_of(call, first, first_block, lane, ring);
    const auto start = [&](int n, int item, int slot) {
      if (n + item / ITEMS < blocks) start_item(call, source, item % ITEMS, lane, slot, copies);
      copies.commit();
    };
#pragma unroll
    for (int i = 0; i < SLOTS - 1; ++i) start(0, i, i * SLOT);

    if (blocks > 0) prefetch_centres(call, first, first_block, end_block - 1, lane);
    fill_half_levels<KEY_BITS>(level_bytes, table, int(threadIdx.x), THREADS);
    if (VALUE_BITS != KEY_BITS) {
      fill_half_levels<VALUE_BITS>(level_bytes + 4, table, int(threadIdx.x), THREADS);
    }
    if (LOAD > 32) {
      for (int i = lane; i < SLOTS * Shape::SLOT_LOADS; i += 32) ring[i * LOAD + 32] = {0, 0, 0, 0};
    }
    const float* rotated = rotated_of(first, reinterpret_cast<float*>(shared + Shape::ROTATED));
    load_queries(call, first, rotated, queries, plain_queries, factors, warp, lane);
    __syncthreads();  // the queries, the levels and the part are there

    const LevelBytes key_bytes = kept_levels<KEY_BITS>(level_bytes, quad_lane);
    const LevelBytes value_bytes =
        KEY_BITS == VALUE_BITS ? key_bytes : kept_levels<VALUE_BITS>(level_bytes + 4, quad_lane);
    const Decoder of_keys = decoder_of<Keys>(ring, lane, key_bytes, table);
    const Decoder of_values = decoder_of<Values>(ring, lane, value_bytes, table);
    Rows rows = no_rows();

    int free_slot = (SLOTS - 1) * SLOT;  // the slot that was read last; all lanes have met since
    const auto take_slot = [&](int n, int item) {  // of block n of this warp
      start(n, item + SLOTS - 1, free_slot);
      free_slot = free_slot == (SLOTS - 1) * SLOT ? 0 : free_slot + SLOT;
      copies.template wait<SLOTS - 1>();
      __syncwarp();  // the copies of all lanes are there, and the products with the centres
      return free_slot;
    };

    const int seen = seen_by_all(call, first);
    for (int n = 0; n < blocks; ++n) {
      const int block = first_block + n * WARPS;
      if (n % 16 == 0) {
        multiply_centres(
            call, p, block, end_block - 1, plain_queries, factors, centre_products, lane);
      }

      float scores[2 * 4 * TILES * 2];  // indexed by place(); i = 4 h + j is token 32 h + 4 group + j
#pragma unroll
      for (int i = 0; i < 2 * 4 * TILES * 2; ++i) scores[i] = 0.0f;
      int slot = 0;
#pragma unroll
      for (int item = 0; item < KeySpans::ITEMS; ++item) {
        if (item > 0) __syncwarp();  // the keys before have been read
        slot = take_slot(n, item);
        add_item<KEY_BITS, Keys, KeySpans>(
            slot, item, of_keys,
            [&](int step, int tile) { return queries[(tile * Keys::STEPS + step) * 32 + lane]; }, scores);
      }
      __half scales[2][8];  // of keys and values, [half][token]
      *reinterpret_cast<uint4*>(scales[0]) = ring[slot + Shape::KEY_LOADS * LOAD + group];
      *reinterpret_cast<uint4*>(scales[1]) = ring[slot + Shape::KEY_LOADS * LOAD + 8 + group];

      const auto weigh_block = [&](auto all_seen) {
        finish_scores(factors, scales[0], centre_products + n % 16 * ROWS, quad_lane, scores);
        if (!all_seen) hide(call, p, block, lane, scores);
        raise_bases(rows, scales[1], scores);
        weigh<all_seen>(rows, scales[1], scores, lane, weights);
      };
      if ((block + 1) * BLOCK <= seen) weigh_block(Flag<true>());
      else weigh_block(Flag<false>());

#pragma unroll
      for (int item = 0; item < ValueSpans::ITEMS; ++item) {
        __syncwarp();  // the weights are there, the item before has been read
        slot = take_slot(n, KeySpans::ITEMS + item);
        add_item<VALUE_BITS, Values, ValueSpans>(
            slot, item, of_values,
            [&](int step, int tile) {
              const int row = 8 * tile + group;  // the query row whose weights this lane loads
              return *reinterpret_cast<const uint4*>(
                  weights + row * BLOCK + 8 * place_of_weights(row, Values::chunk(step, quad_lane)));
            },
            rows.sums);
      }
      __syncwarp();  // no weights are in use, the values have been read
    }

    const Part last = p;
    copies.template wait<0>();
    __syncthreads();  // the ring, the queries and the part are no longer in use
    merge_warps(all, last, shared, rows, warp, lane);
  }

  // Merge the sums of the warps, and write them out.
  static DEVICE_FN void merge_warps(
      const AttendParts& all, const Part& p, uint4* shared, Rows& rows, int warp, int lane) {
    float* all_tops = reinterpret_cast<float*>(shared);  // [WARPS][2][ROWS]
    float* all_sums = all_tops + WARPS * 2 * ROWS;       // [WARPS][ROWS][VALUE_DIM]
    const int group = lane / 4, quad_lane = lane % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& total = rows.totals[tile][r];
        for (int mask = 4; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
        const int row = 8 * tile + 2 * quad_lane + r;
        if (group == 0) {
          all_tops[warp * 2 * ROWS + row] = rows.bases[tile][r];
          all_tops[(warp * 2 + 1) * ROWS + row] = total;
        }
#pragma unroll
        for (int i = 0; i < VALUE_LANES; ++i) {
          const int channel = 32 * (i / 4) + 4 * group + i % 4;
          if (channel < VALUE_DIM) {
            all_sums[(warp * ROWS + row) * VALUE_DIM + channel] = rows.sums[place(i, tile, r)];
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
