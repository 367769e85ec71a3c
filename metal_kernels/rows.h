// Rotation of a few query rows in threadgroup memory, and its inverse. Included after rotation.h. `Rotation` is the
// type that metal_rotation of rotormlx/kernels/source.py writes.

// Rotate ROWS rows in place: by stages in registers, as encode and decode do, or as a product with a matrix. A barrier
// must precede and follow.
template <typename Rotation, bool BACK, int ROWS, int THREADS>
METAL_FUNC void rotate_in_place(
    threadgroup float* rows,           // [D][ROWS]
    const device float* coefficients,  // of the stages, or the matrix [D, D] that rows are multiplied by
    int thread_index) {
  constexpr int D = Rotation::D;
  if (Rotation::HAS_STAGES) {
    constexpr int LANES = Rotation::LANES;
    using Channels = LaneRow<D, LANES, Rotation::HELD>;
    constexpr int CHANNELS = Channels::CHANNELS;
    constexpr int WORKERS = THREADS / LANES;
    constexpr int OF_LANE = (ROWS + WORKERS - 1) / WORKERS;  // rows of a lane: every WORKERS-th
    const int lane = thread_index % LANES, worker = thread_index / LANES;
    float numbers[OF_LANE * CHANNELS];
    UNROLL
    for (int r = 0; r < OF_LANE; ++r) {
      const int row = worker + r * WORKERS;
      UNROLL
      for (int p = 0; p < CHANNELS; ++p) {
        const int c = Channels::channel(lane, p);
        numbers[r * CHANNELS + p] = row < ROWS && Channels::exists(c) ? rows[c * ROWS + row] : 0.0f;
      }
    }
    if (BACK) Rotation::template unrotate<OF_LANE>(numbers, coefficients, lane);
    else Rotation::template rotate<OF_LANE>(numbers, coefficients, lane);
    UNROLL
    for (int r = 0; r < OF_LANE; ++r) {
      const int row = worker + r * WORKERS;
      UNROLL
      for (int p = 0; p < CHANNELS; ++p) {
        const int c = Channels::channel(lane, p);
        if (row < ROWS && Channels::exists(c)) rows[c * ROWS + row] = numbers[r * CHANNELS + p];
      }
    }
  } else {
    constexpr int CHANNELS = (D + THREADS - 1) / THREADS;  // channels of a thread: every THREADS-th
    float sums[CHANNELS * ROWS];
    UNROLL
    for (int c = 0; c < CHANNELS; ++c) {
      const int channel = min(thread_index + c * THREADS, D - 1);
      UNROLL
      for (int row = 0; row < ROWS; ++row) sums[c * ROWS + row] = 0.0f;
      for (int i = 0; i < D; ++i) {
        const float entry = coefficients[i * D + channel];
        UNROLL
        for (int row = 0; row < ROWS; ++row) {
          sums[c * ROWS + row] = fma(rows[i * ROWS + row], entry, sums[c * ROWS + row]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // all rows are read
    UNROLL
    for (int c = 0; c < CHANNELS; ++c) {
      const int channel = thread_index + c * THREADS;
      UNROLL
      for (int row = 0; row < ROWS; ++row) {
        if (channel < D) rows[channel * ROWS + row] = sums[c * ROWS + row];
      }
    }
  }
}
