// Decode attention by one kernel: the work of a thread block before its part, and the work of the last thread block
// after its part. Queries are rotated, and outputs rotated back, in stages, by the code of encode and decode.

// ROWS rows in registers of THREADS threads, spread over lanes as the rotation of a codec requires.
template <typename Codec, int ROWS, int THREADS>
struct SpreadRows {
  using Channels = LaneRow<Codec::D, Codec::LANES, Codec::HELD>;
  enum {
    WORKERS = THREADS / Codec::LANES,
    OF_LANE = (ROWS + WORKERS - 1) / WORKERS,  // rows of a lane: every WORKERS-th
    HELD = OF_LANE * Channels::CHANNELS
  };
  static DEVICE_FN uint lane() { return threadIdx.x % Codec::LANES; }
  static DEVICE_FN int row_at(int r) { return int(threadIdx.x) / Codec::LANES + r * WORKERS; }

  // numbers = number_at(row, channel), or zero if the channel does not exist; number_at is also called past the last
  // row.
  template <typename NumberAt>
  static DEVICE_FN void load(float* numbers, const NumberAt& number_at) {
#pragma unroll
    for (int r = 0; r < OF_LANE; ++r) {
      const int row = row_at(r);
#pragma unroll
      for (int p = 0; p < Channels::CHANNELS; ++p) {
        const int c = Channels::channel(lane(), p);
        numbers[r * Channels::CHANNELS + p] = Channels::exists(c) ? number_at(row, c) : 0.0f;
      }
    }
  }

  // Call use(row, channel, number) for all numbers that exist.
  template <typename Use>
  static DEVICE_FN void each(const float* numbers, const Use& use) {
#pragma unroll
    for (int r = 0; r < OF_LANE; ++r) {
      const int row = row_at(r);
#pragma unroll
      for (int p = 0; p < Channels::CHANNELS; ++p) {
        const int c = Channels::channel(lane(), p);
        if (row < ROWS && Channels::exists(c)) use(row, c, numbers[r * Channels::CHANNELS + p]);
      }
    }
  }
};

// Rotate ROWS query rows of a part, from its first row on, into `rotated` (shared, [ROWS][KEY_DIM]). The stages are
// those that rotate keys; they serve queries too, because they are orthogonal. Rows past the last repeat the last. A
// barrier must follow.
template <typename Codec, int ROWS, int THREADS>
DEVICE_FN void rotate_queries_of(const AttendParts& all, const Part& p, float* rotated) {
  using Rows = SpreadRows<Codec, ROWS, THREADS>;
  const rotormlx_attend_arguments& call = all.call;
  const float* scale = call.key_channel_scale;
  if (scale != nullptr) scale += p.batch * call.key_channel_scale_stride + p.kv_head * Codec::D;
  float numbers[Rows::HELD];
  with_dtype(call.q, call.dtype, [&](const auto* q) {
    Rows::load(numbers, [&](int row, int channel) {
      const int existing = min(p.first_row + row, p.group_rows - 1);
      const float x = to_float(q[query_at(call, p.batch, p.kv_head, existing) + channel]);
      return scale == nullptr ? x : x * scale[channel];
    });
  });
  Codec::template rotate<Rows::OF_LANE>(numbers, call.key_coefficients, Rows::lane());
  Rows::each(numbers, [&](int row, int channel, float x) { rotated[row * Codec::D + channel] = x; });
}

// Shared memory, in floats, of a thread block that merges up to ROWS query rows after a part: sums of packed and of
// exact parts, [ROWS][VALUE_DIM] each; shares, [MAX_PARTS] per warp; a flag: whether the thread block is the last of
// its tile.
template <int VALUE_DIM, int ROWS, int THREADS>
struct LastMergeShape {
  enum {
    SUMS = ROWS * VALUE_DIM,
    SHARES = 2 * SUMS,
    IS_LAST = SHARES + THREADS / 32 * MAX_PARTS,
    ALL = IS_LAST + 1
  };
};

// Whether all parts of this thread block's query rows are written, including its own, which it has just written; if so,
// it may read them. This is true for exactly one thread block per tile of rows, which resets the counter to 0.
DEVICE_FN bool has_last_part(const AttendParts& all, int* is_last) {  // shared
  __syncthreads();  // the part is written, and shared memory is free
  if (gridDim.z == 1) return true;
  if (threadIdx.x == 0) {
    __threadfence();
    int32_t* counter = all.call.counters + blockIdx.y * gridDim.x + blockIdx.x;
    const bool found = atomicAdd(counter, 1) == int(gridDim.z) - 1;
    __threadfence();
    if (found) *counter = 0;
    *is_last = found;
  }
  __syncthreads();  // it is known whether this is the last
  return *is_last != 0;
}

// Called at the end of each part; the grid is tiles of ROWS rows x [B, K] x parts. The last thread block of a tile
// merges the tile's rows, and rotates them back in stages.
template <typename Codec, int ROWS, int THREADS>
DEVICE_FN void merge_if_last(const AttendParts& all, float* packed_sums) {  // shared, see LastMergeShape
  constexpr int D = Codec::D, WARPS = THREADS / 32;
  using Shape = LastMergeShape<D, ROWS, THREADS>;
  using Rows = SpreadRows<Codec, ROWS, THREADS>;
  static_assert(WARPS <= ROWS, "the sums of all warps of a row must fit where those of all rows do");
  if (!has_last_part(all, reinterpret_cast<int*>(packed_sums + Shape::IS_LAST))) return;
  const int warp = int(threadIdx.x) / 32, first_row = int(blockIdx.x) * ROWS;
  const int rows = min(ROWS, all.call.heads / all.call.kv_heads * all.call.length - first_row);
  float* exact_sums = packed_sums + Shape::SUMS;
  float* shares = packed_sums + Shape::SHARES + warp * MAX_PARTS;

  const int sharers = rows < WARPS ? WARPS / rows : 1;  // warps that take the parts of a row in turn
  for (int i = warp; i < sharers * rows; i += WARPS) {
    add_parts<D, 8>(all, first_row + i % rows, i / rows, sharers, shares, packed_sums + i * D, exact_sums + i * D);
  }
  __syncthreads();  // the sums of all rows are there
  const auto of_sharers = [&](const float* sums, int row, int channel) {
    float sum = 0.0f;
    for (int s = 0; s < sharers; ++s) sum += sums[(s * rows + row) * D + channel];
    return sum;
  };
  float numbers[Rows::HELD];
  Rows::load(numbers, [&](int row, int channel) { return of_sharers(packed_sums, min(row, rows - 1), channel); });
  Codec::template unrotate<Rows::OF_LANE>(numbers, all.call.value_coefficients, Rows::lane());
  Rows::each(numbers, [&](int row, int channel, float x) {
    if (row >= rows) return;
    store_output<D>(all, int(blockIdx.y), first_row + row, channel, x, of_sharers(exact_sums, row, channel));
  });
}
