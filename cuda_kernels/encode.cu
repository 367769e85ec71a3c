// Encode raw keys or values to packed words, scales and centres (docs/FORMAT.md, section 5).
//
// One thread block per block of one KV head; a warp has the same tokens throughout. Rows have two layouts. In the near
// layout, each of NEAR_LANES lanes has NEIGHBOURS neighbouring channels of a row, in memory order. It subtracts the
// centre and does those stages of the rotation whose groups are within a lane. Rows then turn, through shared memory,
// to the far layout: each of LANES lanes has channels of the whole row, and does the other stages, the norm and the
// codes. The codes, one byte each, are gathered in shared memory, where every thread packs whole words. For trellis
// codes, numbers are gathered there first, one slice of the sequences at a time, and two lanes find the path of one
// sequence.
//
// Codec holds bits, D, the rotation and the tables of keys or of values; see codecs.cuh.
#pragma once

// The inputs and outputs of one block. All arrays are those of the block alone.
struct BlockCall {
  const void* x;               // dtype [64, D], rows x_stride apart
  int64_t x_stride;
  int32_t dtype;
  bool takes_means;            // `centres` is written, not read
  uint32_t* words;
  __half* scales;              // [64]
  __half* centres;             // [D]
  const float* channel_scale;  // [D], or null
  const float* coefficients;
  uint start;                  // as in rotormlx_encode_arguments
  const uint* state;           // [D], or null
};

// How the threads of a thread block share the block's rows, and the shared memory that they need, in words.
template <typename Codec, int THREADS>
struct EncodePlan {
  static constexpr int D = Codec::D, LANES = Codec::LANES, HELD = Codec::HELD, WARPS = THREADS / 32;
  // Far rows: a thread has ROWS of them; its warp has WARP_ROWS side by side.
  static constexpr int WORKERS = THREADS / LANES, WARP_ROWS = 32 / LANES, ROWS = BLOCK / WORKERS;
  using Channels = LaneRow<D, LANES, HELD>;
  // The same for near rows. Some lanes may have no channels.
  static constexpr int NEIGHBOURS = Codec::NEIGHBOURS, FILLED = (D + NEIGHBOURS - 1) / NEIGHBOURS;
  static constexpr int NEAR_LANES = FILLED > 16 ? 32 : FILLED > 8 ? 16 : FILLED > 4 ? 8 : 4;
  static constexpr int NEAR_WORKERS = THREADS / NEAR_LANES, WARP_NEAR_ROWS = 32 / NEAR_LANES;
  static constexpr int NEAR_ROWS = BLOCK / NEAR_WORKERS;
  using NearChannels = LaneRow<D, NEAR_LANES, NEIGHBOURS>;
  // A warp turns AT_ONCE rows at once: NEAR_TURN near rows of a lane become FAR_TURN far rows.
  static constexpr int AT_ONCE = WARP_ROWS > WARP_NEAR_ROWS ? WARP_ROWS : WARP_NEAR_ROWS;
  static constexpr int NEAR_TURN = AT_ONCE / WARP_NEAR_ROWS, FAR_TURN = AT_ONCE / WARP_ROWS;
  static constexpr int TURNS = ROWS / FAR_TURN;
  // If there are many rows, they turn in parts of their channels.
  static constexpr int PART = LANES < 16 ? 64 : NEAR_LANES * NEIGHBOURS, PARTS = (D + PART - 1) / PART;
  // After every NEIGHBOURS numbers there are four words of padding. A row is padded to an odd multiple of half the
  // banks. Lanes then use no bank twice, whether they are side by side in a row or in neighbouring rows.
  static constexpr int SPREAD = NEIGHBOURS + 4, ROW_CHANNELS = PART < D ? PART : FILLED * NEIGHBOURS;
  static constexpr int ROW_SPREAD = ROW_CHANNELS / NEIGHBOURS * SPREAD;
  static constexpr int ROW_WORDS = (ROW_SPREAD + 15) / 32 * 32 + 16, WARP_WORDS = AT_ONCE * ROW_WORDS;
  // Tables: centres (two per word), the levels of all codes, and at 8 bits the cells of |z|.
  static constexpr int LEVELS = D / 2, CELLS = LEVELS + Stored<Codec::BITS>::LEVELS;
  static constexpr int TABLE_WORDS = CELLS + 2 * Codec::CELL_COUNT;
  using Encoder = BlockEncoder<Codec::BITS, Codec::IS_KEY != 0, D, LANES, HELD, BLOCK, THREADS,
                               48 * 1024 - 4 * TABLE_WORDS>;
  static constexpr int ROWS_WORDS = WARPS * WARP_WORDS, NUMBERS = Encoder::NUMBERS;
  static constexpr int CODES = BLOCK * Encoder::CODE_STRIDE;
  // The tables follow the rows, or the numbers of sequences, whichever is longer.
  static constexpr int TABLES = ((ROWS_WORDS > NUMBERS ? ROWS_WORDS : NUMBERS) + 3) / 4 * 4;
  static constexpr int WORDS = TABLES + TABLE_WORDS;

  // The token of row i among the AT_ONCE rows of a turn.
  static DEVICE_FN uint token_of(uint warp, uint turn, uint i) {
    return warp * WARP_ROWS + i % WARP_ROWS + (i / WARP_ROWS * TURNS + turn) * WORKERS;
  }
  // The token of near row q of this thread.
  static DEVICE_FN uint near_token(uint q) {
    const uint i = threadIdx.x % 32 / NEAR_LANES + q % NEAR_TURN * WARP_NEAR_ROWS;
    return token_of(threadIdx.x / 32, q / NEAR_TURN, i);
  }
};

// Load a thread's near rows [NEAR_ROWS, NEIGHBOURS] from x [64, D], 16 bytes at a time; channels that do not exist
// become 0.
template <typename Codec, int THREADS, typename T>
DEVICE_FN void load_rows(const T* x, int64_t x_stride, float* near) {
  using Plan = EncodePlan<Codec, THREADS>;
  constexpr int NEIGHBOURS = Plan::NEIGHBOURS, A_PIECE = 16 / sizeof(T);
  const uint first = threadIdx.x % Plan::NEAR_LANES * NEIGHBOURS;
#pragma unroll
  for (int q = 0; q < Plan::NEAR_ROWS; ++q) {
    const T* row = x + Plan::near_token(q) * x_stride + first;
#pragma unroll
    for (int p = 0; p < NEIGHBOURS; p += A_PIECE) {
      uint4 piece = {0, 0, 0, 0};
      if (Plan::NearChannels::exists(first + p)) piece = *reinterpret_cast<const uint4*>(row + p);
      T numbers[A_PIECE];
      memcpy(numbers, &piece, sizeof(piece));
#pragma unroll
      for (int i = 0; i < A_PIECE; ++i) near[q * NEIGHBOURS + p + i] = to_float(numbers[i]);
    }
  }
}

// Sum each channel of this lane over the tokens of the warp, divided by 64, into `of_warp` [D]. Rows that are not
// finite are left out. The order of the sum is that of far rows: first the rows of a worker.
template <typename Codec, int THREADS>
DEVICE_FN void sum_rows(const float* near, uint* of_warp) {
  using Plan = EncodePlan<Codec, THREADS>;
  constexpr int NEIGHBOURS = Plan::NEIGHBOURS, NEAR_ROWS = Plan::NEAR_ROWS, NEAR_TURN = Plan::NEAR_TURN;
  // SIDE lanes have the first rows of workers, the next SIDE lanes the next rows, and so on.
  constexpr int NEAR_LANES = Plan::NEAR_LANES, FAR_TURN = Plan::FAR_TURN, SIDE = 32 / FAR_TURN, WIDTH = 8;
  const uint lane = threadIdx.x % 32;
  uint broken = 0;
#pragma unroll
  for (int q = 0; q < NEAR_ROWS; ++q) {
#pragma unroll
    for (int p = 0; p < NEIGHBOURS; ++p) broken |= is_finite(near[q * NEIGHBOURS + p]) ? 0u : 1u << q;
  }
  broken = lane_any<NEAR_LANES>(broken);
  // WIDTH channels at a time, because registers are scarce.
#pragma unroll
  for (int first = 0; first < NEIGHBOURS; first += WIDTH) {
    float sums[NEAR_TURN * WIDTH];
#pragma unroll
    for (int i = 0; i < NEAR_TURN * WIDTH; ++i) sums[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < FAR_TURN; ++j) {
      // Each lane continues the sums of the lanes before it, so the last lanes end with the right sums.
#pragma unroll
      for (int i = 0; i < (j > 0 ? WIDTH : 0); ++i) sums[i] = __shfl_sync(~0u, sums[i], (lane - SIDE) & 31);
#pragma unroll
      for (int q = 0; q < NEAR_ROWS; ++q) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          const float x = broken >> q & 1u ? 0.0f : near[q * NEIGHBOURS + first + i];
          // The division by BLOCK, a power of two, comes first, so that the sum cannot overflow.
          const float weight = 1.0f / BLOCK;
          float& sum = sums[q % NEAR_TURN * WIDTH + i];
          sum = fmaf(weight, x, sum);
        }
      }
    }
#pragma unroll
    for (int mask = NEAR_LANES; mask < SIDE; mask *= 2) {
#pragma unroll
      for (int i = 0; i < NEAR_TURN * WIDTH; ++i) sums[i] += shuffle_xor(sums[i], ushort(mask));
    }
#pragma unroll
    for (int step = 1; step < NEAR_TURN; step *= 2) {
#pragma unroll
      for (int n = 0; n < NEAR_TURN; n += 2 * step) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sums[n * WIDTH + i] += sums[(n + step) * WIDTH + i];
      }
    }
    const uint c = lane % NEAR_LANES * NEIGHBOURS + first;
    if (lane / NEAR_LANES == (FAR_TURN - 1) * SIDE / NEAR_LANES && Plan::NearChannels::exists(c)) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) of_warp[c + i] = bits_of_float(sums[i]);
    }
  }
}

// Subtract the centre from near rows: either the mean of the block, which is stored as its centre, or the given centre.
template <typename Codec, int THREADS>
DEVICE_FN void subtract_centre(const BlockCall& call, float* near, uint* shared) {
  using Plan = EncodePlan<Codec, THREADS>;
  constexpr int D = Plan::D, NEIGHBOURS = Plan::NEIGHBOURS;
  const int thread = int(threadIdx.x);
  uint* centres = shared + Plan::TABLES;  // [D / 2], two a word
  if (call.takes_means) {
    sum_rows<Codec, THREADS>(near, shared + threadIdx.x / 32 * D);
    __syncthreads();  // sums written
  }
  if (thread < D / 2) {
    __half centre[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int c = 2 * thread + i;
      if (call.takes_means) {
        float mean = 0.0f;
#pragma unroll
        for (int w = 0; w < Plan::WARPS; ++w) mean += float_of_bits(shared[w * D + c]);
        centre[i] = __float2half_rn(fminf(fmaxf(mean, -65504.0f), 65504.0f));
        call.centres[c] = centre[i];
      } else {
        centre[i] = call.centres[c];
      }
    }
    centres[thread] = half_pair(__half2float(centre[0]), __half2float(centre[1]));
  }
  __syncthreads();  // centres written
  const uint first = uint(thread) % Plan::NEAR_LANES * NEIGHBOURS;
#pragma unroll
  for (int p = 0; p < NEIGHBOURS; p += 2) {
    if (Plan::NearChannels::exists(first + p)) {
      const uint pair = centres[(first + p) / 2];
      const float low = __half2float(half_of_bits(ushort(pair))), high = __half2float(half_of_bits(ushort(pair >> 16)));
#pragma unroll
      for (int q = 0; q < Plan::NEAR_ROWS; ++q) {
        near[q * NEIGHBOURS + p] -= low;
        near[q * NEIGHBOURS + p + 1] -= high;
      }
    }
  }
}

// Turn a thread's near rows [NEAR_ROWS, NEIGHBOURS] into far rows [ROWS, CHANNELS], through the warp's part of shared
// memory; channels that do not exist become 0.
template <typename Codec, int THREADS>
DEVICE_FN void turn_rows(const float* near, uint* shared, float* rows) {
  using Plan = EncodePlan<Codec, THREADS>;
  using Channels = typename Plan::Channels;
  constexpr int CHANNELS = Channels::CHANNELS, NEIGHBOURS = Plan::NEIGHBOURS, PART = Plan::PART;
  const uint warp_lane = threadIdx.x % 32, near_lane = warp_lane % Plan::NEAR_LANES;
  uint* of_warp = shared + threadIdx.x / 32 * Plan::WARP_WORDS;
#pragma unroll
  for (int turn = 0; turn < Plan::TURNS; ++turn) {
#pragma unroll
    for (int part = 0; part < Plan::PARTS; ++part) {
      __syncwarp();  // no rows are in use
#pragma unroll
      for (int n = 0; n < Plan::NEAR_TURN; ++n) {
        const float* row = near + (turn * Plan::NEAR_TURN + n) * NEIGHBOURS;
        const uint i = warp_lane / Plan::NEAR_LANES + n * Plan::WARP_NEAR_ROWS;
        uint* to = of_warp + i * Plan::ROW_WORDS + near_lane % (PART / NEIGHBOURS) * Plan::SPREAD;
#pragma unroll
        for (int p = 0; p < NEIGHBOURS; p += 4) {
          const bool is_of_part = Plan::PARTS == 1 || near_lane / (PART / NEIGHBOURS) == part;
          if (is_of_part && Plan::NearChannels::exists(near_lane * NEIGHBOURS + p)) {
            *reinterpret_cast<uint4*>(to + p) = uint4{bits_of_float(row[p]), bits_of_float(row[p + 1]),
                                                      bits_of_float(row[p + 2]), bits_of_float(row[p + 3])};
          }
        }
      }
      __syncwarp();  // the rows are there
#pragma unroll
      for (int n = 0; n < Plan::FAR_TURN; ++n) {
        const uint* row = of_warp + (warp_lane / Plan::LANES + n * Plan::WARP_ROWS) * Plan::ROW_WORDS;
#pragma unroll
        for (int p = 0; p < CHANNELS; ++p) {
          if (Channels::channel(0, p) / PART == part) {
            const uint c = Channels::channel(warp_lane % Plan::LANES, p), place = c - part * PART;
            rows[(n * Plan::TURNS + turn) * CHANNELS + p] =
                Channels::exists(c) ? float_of_bits(row[place / NEIGHBOURS * Plan::SPREAD + place % NEIGHBOURS]) : 0.0f;
          }
        }
      }
    }
  }
}

// The cells of |z|, which replace the table of boundaries at 8 bits.
template <typename Codec>
struct Cells {
  const uint2* table;  // [CELL_COUNT], in shared memory
};

// The same as with the table of boundaries. The cell of a size contains at most one boundary.
template <int BITS, typename Codec>
DEVICE_FN uint index_of_size(float size, Cells<Codec> cells) {
  // The sum of 2^23 and the number of the cell has that number in its low bits.
  const float scaled = fminf(size, float(Codec::CELL_COUNT - 1) / Codec::CELLS_OF_UNIT);
  const uint cell = bits_of_float(fmaf(scaled, Codec::CELLS_OF_UNIT, 8388608.0f)) - 0x4B000000u;
  const uint2 found = cells.table[cell];
  return found.y + (size >= float_of_bits(found.x) ? 1u : 0u);
}

// The table that gives the index of the magnitude nearest to |z|: cells or boundaries. tables: those of the plan.
template <typename Codec, int THREADS>
DEVICE_FN auto boundaries_of(const uint* tables) {
  if constexpr (Codec::CELL_COUNT > 0) {
    return Cells<Codec>{reinterpret_cast<const uint2*>(tables + EncodePlan<Codec, THREADS>::CELLS)};
  } else {
    return Codec::boundaries();
  }
}

// Encode a block with all threads of the thread block. codes [CODES] and shared [WORDS] are shared memory, see
// EncodePlan. `scaled_by(near)` returns the channel scale, or null; it may compute it from near rows without their
// centre.
template <typename Codec, int THREADS, typename ScaledBy>
DEVICE_FN void encode_one(const BlockCall& call, uchar* codes, uint* shared, const ScaledBy& scaled_by) {
  using Plan = EncodePlan<Codec, THREADS>;
  using Encoder = typename Plan::Encoder;
  constexpr int D = Plan::D, LANES = Plan::LANES, WORKERS = Plan::WORKERS, ROWS = Plan::ROWS;
  constexpr int NEIGHBOURS = Plan::NEIGHBOURS, CODE_STRIDE = Encoder::CODE_STRIDE;
  const int thread = int(threadIdx.x);
  const uint worker = threadIdx.x / LANES, lane = threadIdx.x % LANES, near_lane = threadIdx.x % Plan::NEAR_LANES;

  float near[Plan::NEAR_ROWS * NEIGHBOURS];  // [NEAR_ROWS, NEIGHBOURS]
  with_dtype(call.x, call.dtype, [&](const auto* x) { load_rows<Codec, THREADS>(x, call.x_stride, near); });

  uint* tables = shared + Plan::TABLES;
  float* levels = reinterpret_cast<float*>(tables + Plan::LEVELS);
  fill_levels<Codec::BITS>(levels, uint(thread), THREADS);
#pragma unroll
  for (int n = 0; n < int(Codec::CELL_COUNT); n += THREADS) {
    if (thread + n < int(Codec::CELL_COUNT)) {
      reinterpret_cast<uint2*>(tables + Plan::CELLS)[thread + n] = Codec::cells()[thread + n];
    }
  }

  if (Codec::IS_KEY) subtract_centre<Codec, THREADS>(call, near, shared);

  if (const float* channel_scale = scaled_by(near)) {
#pragma unroll
    for (int p = 0; p < NEIGHBOURS; ++p) {
      const uint c = near_lane * NEIGHBOURS + p;
      if (Plan::NearChannels::exists(c)) {
        const float factor = channel_scale[c];
#pragma unroll
        for (int q = 0; q < Plan::NEAR_ROWS; ++q) near[q * NEIGHBOURS + p] /= factor;
      }
    }
  }

  float rows[ROWS * Plan::Channels::CHANNELS];  // [ROWS, CHANNELS]
  Codec::template rotate_near<Plan::NEAR_LANES, Plan::NEAR_ROWS>(near, call.coefficients, near_lane);
  turn_rows<Codec, THREADS>(near, shared, rows);
  Codec::template rotate_far<ROWS>(rows, call.coefficients, lane);

  __half row_scales[ROWS];
  if (Stored<Codec::BITS>::HAS_TRELLIS) {
    Encoder::find_paths(rows, row_scales, codes, shared, uint(thread), call.start, call.state, 1, levels);
  } else {
    // For keys, the barriers of subtract_centre already cover the tables.
    if (!Codec::IS_KEY) __syncthreads();  // the tables are there
    Encoder::round(rows, row_scales, codes, uint(thread), boundaries_of<Codec, THREADS>(tables), levels);
    __syncthreads();  // codes written
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (lane == 0) call.scales[worker + r * WORKERS] = row_scales[r];
  }

  constexpr int PACKED = Codec::IS_KEY ? D : BLOCK;      // codes along the packed axis
  constexpr int WORD_LANES = Codec::IS_KEY ? BLOCK : D;  // words in a row of words
  constexpr int WORDS = WordRows<Codec::BITS, PACKED>::ALL * WORD_LANES;
#pragma unroll
  for (int n = 0; n < WORDS; n += THREADS) {
    // The modulo bounds the index for the compiler, which then knows that no word begins past the last code.
    const int i = int(threadIdx.x % THREADS) + n, word_lane = i % WORD_LANES;
    if (WORDS % THREADS != 0 && i >= WORDS) break;
    const uchar* first = codes + word_lane * (Codec::IS_KEY ? CODE_STRIDE : 1);
    call.words[i] = packed_word<Codec::BITS, PACKED>(
        first, Codec::IS_KEY ? 1 : CODE_STRIDE, uint(i / WORD_LANES));
  }
}

// Fill in where block `block` of a KV head is stored among the packed blocks.
DEVICE_FN void place_block(BlockCall& call, const rotormlx_packed& packed, int batch, int head, int block) {
  call.words = packed.words + batch * packed.words_strides[0] + head * packed.words_strides[1] +
               block * packed.words_strides[2];
  call.scales = static_cast<__half*>(packed.scales) + batch * packed.scales_strides[0] +
                head * packed.scales_strides[1] + block * packed.scales_strides[2];
  call.centres = static_cast<__half*>(packed.centres) + batch * packed.centres_strides[0] +
                 head * packed.centres_strides[1] + block * packed.centres_strides[2];
}

// The body of the kernel encode. The grid is N x K x B.
template <typename Codec, int THREADS>
DEVICE_FN void encode_block(const rotormlx_encode_arguments& call) {
  using Plan = EncodePlan<Codec, THREADS>;
  __shared__ uchar codes[Plan::CODES];
  __shared__ alignas(16) uint shared_words[Plan::WORDS];

  const int block = int(blockIdx.x), head = int(blockIdx.y), batch = int(blockIdx.z);
  BlockCall one = {};
  one.x_stride = call.x_strides[2];
  const int64_t first = batch * call.x_strides[0] + head * call.x_strides[1] + int64_t(block) * BLOCK * one.x_stride;
  one.x = static_cast<const char*>(call.x) + first * (call.dtype == ROTORMLX_FLOAT32 ? 4 : 2);
  one.dtype = call.dtype;
  one.takes_means = Codec::IS_KEY && !call.given_centres;
  place_block(one, call.packed, batch, head, block);
  one.channel_scale = call.channel_scale;
  if (one.channel_scale != nullptr) one.channel_scale += batch * call.channel_scale_stride + head * Codec::D;
  one.coefficients = call.coefficients + head * call.coefficients_stride;
  // Each token of keys has its own path, so keys always start at 0.
  one.start = Codec::IS_KEY ? 0 : call.start;
  if (one.start > 0 && call.state != nullptr) {
    one.state = call.state + ((int64_t(batch) * call.kv_heads + head) * call.blocks + block) * Codec::D;
  }
  encode_one<Codec, THREADS>(one, codes, shared_words, [&](const float*) { return one.channel_scale; });
}
