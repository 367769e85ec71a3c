// Decode attention on packed bytes, first pass: one part of the packed tokens for up to 16 query rows of a KV head, on
// the tensor cores.
//
// A warp takes every fourth block of the part and keeps a softmax of its own; the warps meet once, at the end. Both
// products read words as they lie: scores = levels of keys [tokens, channels] times queries, output = levels of values
// [channels, tokens] times weights (see fragments.cuh). A lane copies 16 bytes, the words of four tokens or channels
// beside each other, into shared memory some blocks ahead, for whichever lane of its warp needs them. Levels, queries
// and weights are float16, sums and the softmax float32.

// A constant that a function object can be given.
template <bool VALUE>
struct Flag {
  __device__ constexpr operator bool() const { return VALUE; }
};

// A span is 32 lanes of the words, and each thread of a warp has a load of 4 of them: 2 spans are a block of keys, and
// VALUE_DIM / 32 a block of values. As many as make 8 loads are an item, and go through the ring together.
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

// Shapes of a thread block. ring: [WARPS][SLOTS][SLOT_LOADS][LOAD], a slot for an item; the scales of keys and values
// are behind the last item of the keys.
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
    // 16 bytes of each lane, and zeros behind them: what comes before the first words of a trellis.
    LOAD = Stored<KEY_BITS>::HAS_TRELLIS || Stored<VALUE_BITS>::HAS_TRELLIS ? 33 : 32,
    SLOT_LOADS = KEY_LOADS + 1 > VALUE_LOADS ? KEY_LOADS + 1 : VALUE_LOADS,
    // Enough of them that a multiprocessor has some 40 KiB under way.
    SLOTS = SLOT_LOADS <= 8 ? 4 : 3,
    PLAIN_STEPS = (KEY_DIM + 31) / 32,
    // Places in shared memory, in units of 16 bytes.
    RING = 0,
    QUERIES = WARPS * SLOTS * SLOT_LOADS * LOAD,
    PLAIN_QUERIES = QUERIES + TILES * Keys::STEPS * 32,
    FACTORS = PLAIN_QUERIES + TILES * PLAIN_STEPS * 32,  // [4][ROWS] float, see load_queries
    WEIGHTS = FACTORS + 4 * ROWS * 4 / 16,               // [WARPS][ROWS][BLOCK] half
    CENTRES = WEIGHTS + WARPS * ROWS * BLOCK * 2 / 16,   // [WARPS][16][ROWS] float
    PRODUCTS_END = CENTRES + WARPS * 16 * ROWS * 4 / 16,
    // Before there are weights, [ROWS][KEY_DIM] float where the thread block rotates the queries itself.
    ROTATED = WEIGHTS,
    ROTATED_END = ROTATED + ROWS * KEY_DIM * 4 / 16,
    BYTES = PRODUCTS_END > ROTATED_END ? PRODUCTS_END : ROTATED_END,  // [2][4] LevelBytes, of keys and of values
    PART = BYTES + 8,                                    // one Part
    TABLE = PART + 4,                                    // [256] half, for codes of 8 bits
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
  using KeySpans = typename Shape::KeySpans;
  using ValueSpans = typename Shape::ValueSpans;
  enum {
    WARPS = Shape::WARPS,
    ROWS = Shape::ROWS,
    SLOTS = Shape::SLOTS,
    LOAD = Shape::LOAD,
    SLOT = Shape::SLOT_LOADS * LOAD,
    ITEMS = KeySpans::ITEMS + ValueSpans::ITEMS,  // of a block: its keys, then its values
    VALUE_LANES = 4 * ValueSpans::COUNT,          // lanes of the values' words that a thread has sums of
    THREADS = 32 * WARPS
  };

  // A product is at most 2^LARGEST, so that float16 holds it, and when a row's largest score grows beyond that, it
  // comes down to 2^(LARGEST - ROOM): so sums are seldom made smaller.
  static constexpr float LARGEST = 15.0f, ROOM = 4.0f;

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

  // Where the next block of a warp comes from, as far as this lane copies it. keys, values: the first words, and the
  // first of the second plane, if there is one; scales: of keys (lanes 0 to 15) or of values, as tokens of a group read
  // them: four and, 32 further, four. Words and scales go to places in the first slot of the ring, or in a later one.
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

  // The words of an item, of LANES lanes in all, to where this lane's first ones go; words: see Source.
  template <typename Words, typename Of, int LANES>
  static DEVICE_FN void start_words(const uint* const* words, int item, int lane, uint4* to, Copies& copies) {
    const int group = lane % 8, quad_lane = lane / 8;
#pragma unroll
    for (int s = 0; s < Of::AT_ONCE; ++s) {
      const int span = item * Of::AT_ONCE + s;
      if (span >= Of::COUNT) break;
      // Lanes behind the last are read as some that exist.
      const int further = LANES % 32 == 0 ? 32 * span : min(32 * span + 4 * group, LANES - 4) - 4 * group;
#pragma unroll
      for (int i = 0; i < Of::LOADS; ++i) {
        const int word = i % Words::WORDS;
        const int rows = Words::row(i / Words::WORDS, word, quad_lane) - Words::row(0, word, quad_lane);
        copies.template start<16>(to + (s * Of::LOADS + i) * LOAD, words[word] + rows * LANES + further);
      }
    }
  }

  // To the warp's next block; its distance fits 32 bits, in which it takes one register and one instruction.
  static DEVICE_FN void advance(const uint** words, int64_t stride) {
    words[0] += WARPS * int(stride);
    words[1] += WARPS * int(stride);
  }

  // An item of the source's block, which is the last of the keys' items, or of all, where the source goes on.
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

  // What a thread needs to make levels of words.
  struct Decoder {
    // In the first slot of the ring its words of a load, and those before them on the packed axis: of the quad's lane
    // before, in a first load zeros for the first lane, in later ones the last lane of the load before.
    const uint4 *words, *before, *before_first;
    int quad_lane;
    LevelBytes bytes;
    const ushort* table;  // of 8 bits
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

  // sums[span][half][tile] += levels times factors, for the lanes of the words in an item: of each span four that a
  // load of this thread has. factor_of(step, tile): operand of a step. Rows of the product: lane 0 of the four, then
  // lane 1; then 2 and 3.
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

  // The same for one load, which lies `load` behind the first of the ring.
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

  // The power of two by which a row is divided, so that float16 holds it: that of its largest number.
  static DEVICE_FN float power_below(float largest) {
    const uint exponent = bits_of_float(largest) & 0x7f800000u;
    // Between 2^-100 and 2^100, to have an inverse; also for zero, infinity and NaN.
    return float_of_bits(min(max(exponent, 27u << 23), 227u << 23));
  }

  // The factors of ROWS rows, of which row_at(row) is where the first number lies. use(row, square_sum) gets the sum of
  // the squares of `scale` times a row in one lane.
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
        // Behind the last channel there is nothing.
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

  // Puts both forms of the query into operands; rotated_rows: the rotated ones, from the first of this thread block on.
  // factors, [4][ROWS]: those of the rotated rows and of the plain ones; half the variance that codes bring into the
  // scores of a row, for a scale of 1; and what products with a row are multiplied by.
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

  // Calls the centres of 16 blocks of this warp, from `first_block` on, into the L2 cache.
  static DEVICE_FN void prefetch_centres(
      const rotormlx_attend_arguments& call, const Part& p, int first_block, int last_block, int lane) {
    constexpr int LINE = 64, LINES = (KEY_DIM + LINE - 1) / LINE;  // 128 bytes, and those of a centre
    for (int i = lane; i < 16 * LINES; i += 32) {
      const int block = min(first_block + i / LINES * WARPS, last_block);
      prefetch(centres_of(call, p) + block * call.keys.centres_strides[2] + i % LINES * LINE);
    }
  }

  // <q, centre> of this warp's next 16 blocks, [16][ROWS]: one product with the centres as rows. A barrier must follow.
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

  // ---- the softmax of a thread: of query rows 8 tile + 2 quad_lane + r, in scores and output alike

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

  // Products become scores. factors: see load_queries; scales: of the keys, [8]; about_centre: <q, centre>, [ROWS].
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

  // Applies the mask, and hides what is behind the last token.
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

  // Raises the bases where a product, a weight times the scale of a value, would be too large otherwise.
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

  // Scores become weights, which other lanes will read. ALL_SEEN: no token is hidden.
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
          // The scale of a hidden token may be anything, NaN among them.
          scaled[i] = !ALL_SEEN && weight == 0.0f ? 0.0f : weight * __half2float(value_scales[i]);
        }
        // Four tokens of a chunk in the order of its levels.
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

  // The tokens that all query rows of this thread block see lie before this one.
  static DEVICE_FN int seen_by_all(const rotormlx_attend_arguments& call, const Part& p) {
    if (call.mask_kind == ROTORMLX_MASK_NONE) return p.stop;
    if (call.mask_kind == ROTORMLX_MASK_CAUSAL) return min(p.stop, p.tokens - call.length + 1 - p.sink);
    return 0;
  }

  // The rotated queries of a part as the kernel attend_query leaves them.
  static DEVICE_FN const float* rotated_before(const AttendParts& all, const Part& p) {
    return all.rotated + (int64_t(p.head_index) * p.group_rows + p.first_row) * KEY_DIM;
  }

  static DEVICE_FN void run(const AttendParts& all, uint4* shared) {
    run(all, shared, [&](const Part& p, float*) { return rotated_before(all, p); });
  }

  // rotated_of(p, room): where the rotated queries of a part lie, from its first row on. All threads call it; there is
  // room for [ROWS][KEY_DIM], and a barrier between them if it is used.
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

    // What few blocks need of the part is read when they need it: registers are short.
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

    int free_slot = (SLOTS - 1) * SLOT;  // the one that was read last: since then all lanes have met
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

      float scores[2 * 4 * TILES * 2];  // see place(); i = 4 h + j is token 32 h + 4 group + j
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
              const int row = 8 * tile + group;  // of which a lane has the weights
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

  // The warps' sums become one, and go out.
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
