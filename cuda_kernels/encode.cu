// Raw keys or values to packed words, scales and centres (docs/FORMAT.md, section 5).
//
// One thread block a block of one KV head; LANES lanes a row. A lane has its channels of ROWS tokens in registers from
// the first load to the codes: the centre, the rotation and the norm exchange numbers by shuffles. The codes, a byte
// each, then meet in shared memory, where every thread packs whole words. For trellis codes numbers meet there before,
// slice by slice, and two lanes find the path of one sequence.
//
// Codec names bits, D, the rotation and the table of boundaries of keys or of values; see codecs.cuh.
#pragma once

// Where a block comes from and goes to. Arrays of the block alone.
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

// How the threads of a block share its rows, and the shared memory that they need.
template <typename Codec, int THREADS>
struct EncodePlan {
  static constexpr int D = Codec::D, LANES = Codec::LANES, HELD = Codec::HELD;
  static constexpr int WORKERS = THREADS / LANES, WARP_ROWS = 32 / LANES, WARPS = THREADS / 32;
  static constexpr int ROWS = BLOCK / WORKERS;  // tokens of a lane: every WORKERS-th
  using Encoder = BlockEncoder<Codec::BITS, Codec::IS_KEY != 0, D, LANES, HELD, BLOCK, THREADS, 48 * 1024>;
  // A row of tokens as loaded, of any dtype. 16 numbers more, so that rows side by side begin at other banks.
  static constexpr int ROW_WORDS = D + 16, WARP_WORDS = WARP_ROWS * ROW_WORDS;
  static constexpr int ROWS_WORDS = WARPS * WARP_WORDS, NUMBERS = Encoder::NUMBERS;
  static constexpr int CODES = BLOCK * Encoder::CODE_STRIDE;
  static constexpr int WORDS = ROWS_WORDS > NUMBERS ? ROWS_WORDS : NUMBERS;
};

// rows [ROWS, CHANNELS] of a lane from x [64, D], in pieces of 16 bytes that go through the warp's part of shared
// memory; channels that do not exist become 0.
template <typename Codec, int THREADS, typename T>
DEVICE_FN void load_rows(const T* x, int64_t x_stride, uint* shared, float* rows) {
  using Plan = EncodePlan<Codec, THREADS>;
  using Channels = LaneRow<Plan::D, Plan::LANES, Plan::HELD>;
  constexpr int CHANNELS = Channels::CHANNELS, A_PIECE = 16 / sizeof(T), PIECES = Plan::D / A_PIECE;
  constexpr int ALL = Plan::WARP_ROWS * PIECES, LOADS = (ALL + 31) / 32;
  constexpr int AT_ONCE = divisor(Plan::ROWS, LOADS < 8 ? 8 / LOADS : 1);  // rows that are under way
  const int warp = int(threadIdx.x) / 32, warp_lane = int(threadIdx.x) % 32;
  uint* of_warp = shared + warp * Plan::WARP_WORDS;
#pragma unroll
  for (int first = 0; first < Plan::ROWS; first += AT_ONCE) {
    uint4 pieces[AT_ONCE][LOADS];
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r) {
#pragma unroll
      for (int n = 0; n < LOADS; ++n) {
        const int i = warp_lane + 32 * n;
        if (i < ALL) {
          const int token = warp * Plan::WARP_ROWS + i / PIECES + (first + r) * Plan::WORKERS;
          pieces[r][n] = *reinterpret_cast<const uint4*>(x + token * x_stride + i % PIECES * A_PIECE);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r) {
#pragma unroll
      for (int n = 0; n < LOADS; ++n) {
        const int i = warp_lane + 32 * n;
        T* row = reinterpret_cast<T*>(of_warp) + i / PIECES * Plan::ROW_WORDS;
        if (i < ALL) *reinterpret_cast<uint4*>(row + i % PIECES * A_PIECE) = pieces[r][n];
      }
      __syncwarp();  // the pieces are there
      const T* row = reinterpret_cast<const T*>(of_warp) + warp_lane / Plan::LANES * Plan::ROW_WORDS;
#pragma unroll
      for (int p = 0; p < CHANNELS; ++p) {
        const int c = Channels::channel(warp_lane % Plan::LANES, p);
        rows[(first + r) * CHANNELS + p] = Channels::exists(c) ? to_float(row[c]) : 0.0f;
      }
      __syncwarp();  // no pieces are in use
    }
  }
}

// Encodes a block with all threads of the thread block. codes [CODES], shared [WORDS]: shared memory of the plan.
// `scaled_by(rows)` may give the channel scale of rows from which the centre has been subtracted.
template <typename Codec, int THREADS, typename ScaledBy>
DEVICE_FN void encode_one(const BlockCall& call, uchar* codes, uint* shared, const ScaledBy& scaled_by) {
  using Plan = EncodePlan<Codec, THREADS>;
  using Encoder = typename Plan::Encoder;
  constexpr int D = Plan::D, LANES = Plan::LANES, WORKERS = Plan::WORKERS, ROWS = Plan::ROWS;
  constexpr int CODE_STRIDE = Encoder::CODE_STRIDE;
  using Channels = LaneRow<D, LANES, Plan::HELD>;
  constexpr int CHANNELS = Channels::CHANNELS;
  const int thread = int(threadIdx.x);
  const int worker = thread / LANES;
  const uint lane = uint(thread % LANES);

  float rows[ROWS * CHANNELS];  // [ROWS, CHANNELS]
  with_dtype(call.x, call.dtype, [&](const auto* x) {
    load_rows<Codec, THREADS>(x, call.x_stride, shared, rows);
  });

  if (call.takes_means) {
    // Each lane sums its rows, each warp its lanes of a channel, and everybody the warps' sums.
    float sum[CHANNELS];
#pragma unroll
    for (int p = 0; p < CHANNELS; ++p) sum[p] = 0.0f;
    uint broken = 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int p = 0; p < CHANNELS; ++p) broken |= is_finite(rows[r * CHANNELS + p]) ? 0u : 1u << r;
    }
    broken = lane_any<LANES>(broken);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      // Divided first: a power of two, and the sum cannot overflow.
      const float weight = 1.0f / BLOCK;
      if (!(broken >> r & 1u)) {
#pragma unroll
        for (int p = 0; p < CHANNELS; ++p) sum[p] = fmaf(weight, rows[r * CHANNELS + p], sum[p]);
      }
    }
#pragma unroll
    for (int p = 0; p < CHANNELS; ++p) {
      for (int mask = LANES; mask < 32; mask *= 2) sum[p] += shuffle_xor(sum[p], ushort(mask));
      const int c = Channels::channel(lane, p);
      if (worker % Plan::WARP_ROWS == 0 && Channels::exists(c)) {
        shared[thread / 32 * Plan::WARP_WORDS + c] = bits_of_float(sum[p]);
      }
    }
    __syncthreads();  // sums written
  }

  if (Codec::IS_KEY) {
#pragma unroll
    for (int p = 0; p < CHANNELS; ++p) {
      const int c = Channels::channel(lane, p);
      if (Channels::exists(c)) {
        __half centre;
        if (call.takes_means) {
          float mean = 0.0f;
          for (int w = 0; w < Plan::WARPS; ++w) mean += float_of_bits(shared[w * Plan::WARP_WORDS + c]);
          centre = __float2half_rn(fminf(fmaxf(mean, -65504.0f), 65504.0f));
          if (worker == 0) call.centres[c] = centre;
        } else {
          centre = call.centres[c];
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) rows[r * CHANNELS + p] -= __half2float(centre);
      }
    }
  }

  if (const float* channel_scale = scaled_by(rows)) {
#pragma unroll
    for (int p = 0; p < CHANNELS; ++p) {
      const int c = Channels::channel(lane, p);
      if (Channels::exists(c)) {
        const float factor = channel_scale[c];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) rows[r * CHANNELS + p] /= factor;
      }
    }
  }

  Codec::template rotate<ROWS>(rows, call.coefficients, lane);

  __half row_scales[ROWS];
  if (Stored<Codec::BITS>::HAS_TRELLIS) {
    Encoder::find_paths(rows, row_scales, codes, shared, uint(thread), call.start, call.state, 1);
  } else {
    Encoder::round(rows, row_scales, codes, uint(thread), Codec::boundaries());
    __syncthreads();  // codes written
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (lane == 0) call.scales[worker + r * WORKERS] = row_scales[r];
  }

  constexpr int PACKED = Codec::IS_KEY ? D : BLOCK;      // codes along the packed axis
  constexpr int WORD_LANES = Codec::IS_KEY ? BLOCK : D;  // words beside each other
  constexpr int WORD_ROWS = WordRows<Codec::BITS, PACKED>::ALL;
  for (int i = thread; i < WORD_ROWS * WORD_LANES; i += THREADS) {
    const int word_lane = i % WORD_LANES;
    const uchar* first = codes + word_lane * (Codec::IS_KEY ? CODE_STRIDE : 1);
    call.words[i] = packed_word<Codec::BITS, PACKED>(
        first, Codec::IS_KEY ? 1 : CODE_STRIDE, uint(i / WORD_LANES));
  }
}

// The place of block `block` of a KV head among packed ones, which the caller's `call` begins with.
DEVICE_FN void place_block(BlockCall& call, const rotormlx_packed& packed, int batch, int head, int block) {
  call.words = packed.words + batch * packed.words_strides[0] + head * packed.words_strides[1] +
               block * packed.words_strides[2];
  call.scales = static_cast<__half*>(packed.scales) + batch * packed.scales_strides[0] +
                head * packed.scales_strides[1] + block * packed.scales_strides[2];
  call.centres = static_cast<__half*>(packed.centres) + batch * packed.centres_strides[0] +
                 head * packed.centres_strides[1] + block * packed.centres_strides[2];
}

// The kernel encode. The grid is N x K x B.
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
  // A token of keys has a path of its own.
  one.start = Codec::IS_KEY ? 0 : call.start;
  if (one.start > 0 && call.state != nullptr) {
    one.state = call.state + ((int64_t(batch) * call.kv_heads + head) * call.blocks + block) * Codec::D;
  }
  encode_one<Codec, THREADS>(one, codes, shared_words, [&](const float*) { return one.channel_scale; });
}
