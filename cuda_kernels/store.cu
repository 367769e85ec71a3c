// Store the new tokens of a decode step in a cache whose lengths are on the device: see rotormlx_store in launch.h.
//
// One thread block per KV head for the keys, and one for the values; the grid is K x 2 x B. If a block is due, the
// thread block packs the oldest tokens of the tail, as the kernel encode does, and moves the rest down. It then appends
// the new tokens. The last thread block of a batch row advances the row's lengths, which all of them have read by then.

// The keys or the values of a call.
struct StoreRole {
  const void* fresh;
  void* exact;
  const int64_t *fresh_strides, *exact_strides;
  const rotormlx_packed* packed;
  float* channel_scale;
  const float* coefficients;
  int64_t channel_scale_stride, coefficients_stride;
};

// The tokens of a batch row before the call, and what the call does with them.
struct StoreRow {
  int packed, exact;
  bool due;   // whether the oldest tokens of the tail are to be packed
  int added;  // number of new tokens that are stored
  DEVICE_FN int left() const { return due ? exact - BLOCK : exact; }
};

// Copy up to 64 tokens of TOKEN_BYTES each; all loads precede the first store. Strides are in bytes.
template <int TOKEN_BYTES, int THREADS>
DEVICE_FN void copy_tokens(char* to, int64_t to_stride, const char* from, int64_t from_stride, int tokens) {
  constexpr int PIECES = TOKEN_BYTES / 16, LOADS = (BLOCK * PIECES + THREADS - 1) / THREADS;
  uint4 pieces[LOADS];
#pragma unroll
  for (int n = 0; n < LOADS; ++n) {
    const int i = int(threadIdx.x) + n * THREADS, token = i / PIECES;
    if (token < tokens) pieces[n] = *reinterpret_cast<const uint4*>(from + token * from_stride + i % PIECES * 16);
  }
#pragma unroll
  for (int n = 0; n < LOADS; ++n) {
    const int i = int(threadIdx.x) + n * THREADS, token = i / PIECES;
    if (token < tokens) *reinterpret_cast<uint4*>(to + token * to_stride + i % PIECES * 16) = pieces[n];
  }
}

// Close the gap that packing leaves, and append the new tokens; each number has BYTES bytes.
template <int D, int BYTES, int THREADS>
DEVICE_FN void move_and_append(const StoreRole& role, const StoreRow& row, int sink) {
  const int head = int(blockIdx.x), batch = int(blockIdx.z);
  const int64_t stride = role.exact_strides[2] * BYTES, fresh_stride = role.fresh_strides[2] * BYTES;
  char* exact = static_cast<char*>(role.exact) +
                (batch * role.exact_strides[0] + head * role.exact_strides[1]) * BYTES;
  const char* fresh = static_cast<const char*>(role.fresh) +
                      (batch * role.fresh_strides[0] + head * role.fresh_strides[1]) * BYTES;
  if (row.due) {
    // A thread writes only where it has read itself, or where encoding has read and a barrier followed.
    for (int to = sink; to < row.left(); to += BLOCK) {
      const int tokens = min(row.left() - to, BLOCK);
      copy_tokens<D * BYTES, THREADS>(exact + to * stride, stride, exact + (to + BLOCK) * stride, stride, tokens);
    }
    __syncthreads();  // the places behind the tail have been read
  }
  copy_tokens<D * BYTES, THREADS>(exact + row.left() * stride, stride, fresh, fresh_stride, row.added);
}

// Write the channel scale `prefill` of a block (docs/FORMAT.md, section 5) to `scale` [D], from near rows without their
// centre. The sums add in the order of torch_ops.sum_in_order. shared: as in encode_one.
template <typename Codec, int THREADS>
DEVICE_FN void scale_of_block(const float* near, uint* shared, float* scale) {
  using Plan = EncodePlan<Codec, THREADS>;
  constexpr int D = Plan::D, NEAR_LANES = Plan::NEAR_LANES, NEIGHBOURS = Plan::NEIGHBOURS;
  static_assert(BLOCK * NEAR_LANES + D <= Plan::TABLES, "sums and squares lie in shared memory");
  const int thread = int(threadIdx.x);
  const uint lane = threadIdx.x % NEAR_LANES;
  const bool is_first = thread < NEAR_LANES;
  uint *sums = shared, *squares = shared + BLOCK * NEAR_LANES;
  const auto add = [](uint& to, uint x) { to = bits_of_float(float_of_bits(to) + float_of_bits(x)); };

  for (int p = 0; p < NEIGHBOURS; ++p) {
    __syncthreads();  // no sums are in use
#pragma unroll
    for (int q = 0; q < Plan::NEAR_ROWS; ++q) {
      float x = 0.0f;
#pragma unroll
      for (int i = 0; i < NEIGHBOURS; ++i) x = i == p ? near[q * NEIGHBOURS + i] : x;
      // Rounded as a product, so that it is not contracted with the additions.
      sums[Plan::near_token(q) * NEAR_LANES + lane] = bits_of_float(__fmul_rn(x, x));
    }
    for (int half = BLOCK / 2; half > 0; half /= 2) {
      __syncthreads();  // the sums of so many tokens are there
      for (int i = thread; i < half * NEAR_LANES; i += THREADS) add(sums[i], sums[i + half * NEAR_LANES]);
    }
    // Each of these threads added the last sum of its channel itself, so no barrier is needed.
    const uint c = lane * NEIGHBOURS + p;
    if (is_first && Plan::NearChannels::exists(c)) squares[c] = bits_of_float(float_of_bits(sums[lane]) / BLOCK);
  }
  float square[NEIGHBOURS];
#pragma unroll
  for (int p = 0; p < NEIGHBOURS; ++p) {
    const uint c = lane * NEIGHBOURS + p;
    square[p] = is_first && Plan::NearChannels::exists(c) ? float_of_bits(squares[c]) : 0.0f;
  }
  for (int count = D; count > 1; count = count / 2 + count % 2) {
    __syncthreads();  // so many squares are there
    if (thread < count / 2) add(squares[thread], squares[count / 2 + thread]);
    // The square left over moves up, to a place that only this thread has read.
    if (thread == 0 && count % 2 == 1) squares[count / 2] = squares[count - 1];
  }
  __syncthreads();  // the sum of all is there
  const float whole = float_of_bits(squares[0]) / D;
#pragma unroll
  for (int p = 0; p < NEIGHBOURS; ++p) {
    const uint c = lane * NEIGHBOURS + p;
    if (is_first && Plan::NearChannels::exists(c)) {
      scale[c] = is_finite(whole) && whole > 0.0f ? sqrtf(sqrtf(fmaxf(square[p] / whole, 1.0f / 4096))) : 1.0f;
    }
  }
  __syncthreads();  // the scale is there
}

// The work of one thread block; codes and shared as in encode_one.
template <typename Codec, int THREADS>
DEVICE_FN void store_role(const rotormlx_store_arguments& call, const StoreRole& role, const StoreRow& row,
                          uchar* codes, uint* shared) {
  constexpr int D = Codec::D;
  const int head = int(blockIdx.x), batch = int(blockIdx.z);
  if (row.due) {
    BlockCall one = {};
    const int64_t first =
        batch * role.exact_strides[0] + head * role.exact_strides[1] + call.sink * role.exact_strides[2];
    one.x = static_cast<const char*>(role.exact) + first * (call.dtype == ROTORMLX_FLOAT32 ? 4 : 2);
    one.x_stride = role.exact_strides[2];
    one.dtype = call.dtype;
    one.takes_means = Codec::IS_KEY;
    place_block(one, *role.packed, batch, head, row.packed / BLOCK);
    one.coefficients = role.coefficients + head * role.coefficients_stride;
    float* channel_scale = role.channel_scale;
    if (channel_scale != nullptr) channel_scale += batch * role.channel_scale_stride + head * D;
    encode_one<Codec, THREADS>(one, codes, shared, [&](const float* near) {
      const bool is_first = call.own_scale && row.packed == 0 && channel_scale != nullptr;
      if (is_first) scale_of_block<Codec, THREADS>(near, shared, channel_scale);
      return channel_scale;
    });
  }
  if (call.dtype == ROTORMLX_FLOAT32) move_and_append<D, 4, THREADS>(role, row, call.sink);
  else move_and_append<D, 2, THREADS>(role, row, call.sink);
}

template <typename Keys, typename Values, int THREADS>
DEVICE_FN void store_tokens(const rotormlx_store_arguments& call) {
  using OfKeys = EncodePlan<Keys, THREADS>;
  using OfValues = EncodePlan<Values, THREADS>;
  __shared__ uchar codes[OfKeys::CODES > OfValues::CODES ? OfKeys::CODES : OfValues::CODES];
  __shared__ alignas(16) uint shared_words[OfKeys::WORDS > OfValues::WORDS ? OfKeys::WORDS : OfValues::WORDS];

  int32_t* lengths = call.lengths + 2 * blockIdx.z;
  // The lengths are on the device, so the host cannot check them; lengths beyond the buffers are clamped to the
  // buffers.
  StoreRow row;
  row.packed = min(max(lengths[0], 0), call.blocks * BLOCK);
  row.exact = min(max(lengths[1] - row.packed, 0), call.capacity);
  row.due = row.packed / BLOCK < call.blocks && row.exact - call.sink >= call.window + BLOCK;
  row.added = min(call.length, call.capacity - row.left());
  if (blockIdx.y == ROTORMLX_KEY) {
    const StoreRole role = {call.new_keys, call.exact_keys, call.new_keys_strides, call.exact_keys_strides,
                            &call.keys, call.key_channel_scale, call.key_coefficients,
                            call.key_channel_scale_stride, call.key_coefficients_stride};
    store_role<Keys, THREADS>(call, role, row, codes, shared_words);
  } else {
    const StoreRole role = {call.new_values, call.exact_values, call.new_values_strides, call.exact_values_strides,
                            &call.values, call.value_channel_scale, call.value_coefficients,
                            call.value_channel_scale_stride, call.value_coefficients_stride};
    store_role<Values, THREADS>(call, role, row, codes, shared_words);
  }

  __syncthreads();  // all has been read and stored
  if (threadIdx.x == 0) {
    __threadfence();
    int32_t* counter = call.counter + blockIdx.z;
    if (atomicAdd(counter, 1) == int(gridDim.x * gridDim.y) - 1) {
      __threadfence();
      lengths[0] = row.due ? row.packed + BLOCK : row.packed;
      lengths[1] = lengths[0] + row.left() + row.added;
      *counter = 0;
    }
  }
}
