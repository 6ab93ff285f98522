// quantized_linear: y = x W^T + b with W[o, i] = scale[o, i / group_size] * weight[o, i] of int8 or packed int4.
//
// Four launches, in which no thread waits for another: the largest magnitudes of pieces of x; its integers, byte
// by byte; sums of bytes times bytes, which threads add up in any order, because integers are exact; and y. So
// there is no copy of the weights, and of x there are up to three bytes an element.
#include "device.cuh"
#include "op.cuh"

namespace zk::cuda {

// Elements of x whose largest magnitude a thread finds; words of four bytes of a group, and rows of x, that a
// thread multiplies; rows whose integers are held at once.
constexpr int kPiece = 256, kWords = 32, kRowsTogether = 4, kHeldRows = 64;
// Bytes of sums: so many outputs are computed at a time.
constexpr int64_t kSumBytes = int64_t{16} << 20;

struct QuantizedLaunch {
  const void* x;          // [rows, columns]
  const uint8_t* weight;  // int8 [outputs, columns], or two a byte
  const void* scale;      // [outputs, groups]
  const void* bias;       // [outputs], or null
  void* y;                // [rows, outputs]
  uint32_t* most;         // [rows, pieces]: the bits of the largest magnitudes
  uint32_t* words;        // [limbs, rows, groups, words]: four bytes of q in each
  float* steps;           // [rows]
  uint32_t* sums;         // [limbs, rows, groups, count]
  int64_t columns, outputs, groups, size, pieces, bytes;  // bytes: of a row of the weights
  int64_t group_words;                                    // of a group
  int64_t first, count;                                   // the outputs of this launch
  int32_t rows;
  bool packed;
  bool aligned;  // all words of the weights lie at multiples of four, and end where a group ends
  DType scale_dtype, bias_dtype;

  // The element at which the words of a group begin: of packed ones at a whole byte.
  ZK_DEVICE int64_t begin(int64_t group) const { return packed ? group * size & ~int64_t{1} : group * size; }
};

// --- the kernels -----------------------------------------------------------------------------------------

template <DType D>
ZK_DEVICE float element(const void* p, int64_t i) {
  using S = Storage<D>;
  float x[kVector];
  S::unpack(EdgeAccess{i, i + 1}.template load<D>(p), x);
  return x[0];
}

ZK_DEVICE float number(DType dtype, const void* p, int64_t i) {
  if (dtype == DType::f32) return element<DType::f32>(p, i);
  return dtype == DType::bf16 ? element<DType::bf16>(p, i) : element<DType::f16>(p, i);
}

ZK_DEVICE int64_t thread_index() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }

// A thread for each piece, and row.
template <DType D>
ZK_GLOBAL quantized_most_kernel(ZK_GRID_CONSTANT QuantizedLaunch p) {
  using S = Storage<D>;
  const int64_t index = thread_index(), row = index / p.pieces;
  if (row >= p.rows) return;
  uint32_t most = 0;
  ZK_NO_UNROLL
  for (int at = 0; at < kPiece; at += kVector) {
    const int64_t column = index % p.pieces * kPiece + at;
    if (column >= p.columns) break;
    float x[kVector];
    const auto* of_row = static_cast<const typename S::T*>(p.x) + row * p.columns;
    S::unpack(EdgeAccess{column, p.columns}.template load<D>(of_row), x);
    ZK_UNROLL
    for (int e = 0; e < kVector; ++e) {
      const uint32_t magnitude = bits(x[e]) & 0x7fffffffu;
      most = magnitude > most ? magnitude : most;
    }
  }
  p.most[index] = most;
}

// A thread for each word, and row.
template <DType D, int Limbs>
ZK_GLOBAL quantized_words_kernel(ZK_GRID_CONSTANT QuantizedLaunch p) {
  const int64_t index = thread_index(), of_row = p.groups * p.group_words, row = index / of_row;
  if (row >= p.rows) return;
  const int64_t group = index % of_row / p.group_words, word = index % p.group_words;
  uint32_t most = 0;
  ZK_NO_UNROLL
  for (int64_t i = 0; i < p.pieces; ++i) {
    const uint32_t other = p.most[row * p.pieces + i];
    most = other > most ? other : most;
  }
  const bool finite = most < kInfinity;
  float step, inverse = 1.0f;
  if constexpr (Limbs == 3) {
    const uint32_t exponent = most >> 23 > 22 ? (most >> 23) - 21 : 1;
    step = from_bits(exponent << 23);
    inverse = from_bits((finite ? 254 - exponent : 1) << 23);
  } else {
    step = div(from_bits(most), 127.0f);
    if (step == 0.0f) step = 1.0f;
  }
  if (index % of_row == 0) p.steps[row] = finite ? step : from_bits(0x7fc00000u);
  // Words of packed integers come in pairs: the elements of the low halves of four bytes, and of the high ones.
  const int64_t first = p.begin(group) + (p.packed ? word / 2 * 8 + word % 2 : word * 4);
  uint32_t words[Limbs] = {};
  ZK_UNROLL
  for (int e = 0; e < 4; ++e) {
    const int64_t i = p.packed ? first + 2 * e : first + e;
    if (!finite || i < group * p.size || i >= (group + 1) * p.size) continue;
    const float x = element<D>(p.x, row * p.columns + i);
    int32_t q;
    if constexpr (Limbs == 3) {
      q = static_cast<int32_t>(nearest_int(mul(x, inverse)));
    } else {
      q = static_cast<int32_t>(nearest_int(div(x, step)));
      q = q > 127 ? 127 : q < -127 ? -127 : q;
    }
    ZK_UNROLL
    for (int limb = 0; limb < Limbs; ++limb) {
      const int32_t low = ((q + 128) & 255) - 128;
      words[limb] |= (static_cast<uint32_t>(low) & 255u) << 8 * e;
      q = (q - low) >> 8;
    }
  }
  ZK_UNROLL
  for (int limb = 0; limb < Limbs; ++limb) p.words[limb * p.rows * of_row + index] = words[limb];
}

// sum + the products of four signed bytes.
ZK_DEVICE int32_t dot(uint32_t a, uint32_t b, int32_t sum) {
#if defined(__CUDA_ARCH__)
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
#else
  for (int e = 0; e < 32; e += 8) sum += static_cast<int8_t>(a >> e) * static_cast<int8_t>(b >> e);
  return sum;
#endif
}

// Halves of bytes as signed bytes: where bit 3 is set, so are those above it.
ZK_DEVICE uint32_t signed_halves(uint32_t w) {
  w &= 0x0f0f0f0fu;
  return w | (w & 0x08080808u) * 30;
}

ZK_DEVICE void add_sum(uint32_t* p, int32_t sum) {
#if defined(__CUDA_ARCH__)
  atomicAdd(p, static_cast<uint32_t>(sum));
#else
  *p += static_cast<uint32_t>(sum);
#endif
}

// A thread for each output, run of words of a group, and kRowsTogether rows. Neighbours have neighbouring outputs:
// what they read of x is the same, and what they read of the weights are whole lines in the end.
template <int Limbs>
ZK_GLOBAL quantized_sums_kernel(ZK_GRID_CONSTANT QuantizedLaunch p) {
  const int64_t runs = (p.group_words + kWords - 1) / kWords;
  int64_t rest = thread_index();
  const int64_t output = rest % p.count, run = (rest /= p.count) % runs, group = (rest /= runs) % p.groups;
  const int64_t row = (rest / p.groups) * kRowsTogether;
  if (row >= p.rows) return;
  const int rows = static_cast<int>(p.rows - row < kRowsTogether ? p.rows - row : kRowsTogether);
  const int64_t of_row = p.groups * p.group_words, from = run * kWords;
  const int64_t stop = from + kWords < p.group_words ? from + kWords : p.group_words;
  // The byte of the first word; of packed ones the first two are in one.
  const int64_t byte = (p.first + output) * p.bytes + (p.packed ? p.begin(group) / 2 : p.begin(group));
  int32_t sum[kRowsTogether][Limbs] = {};
  const auto word_at = [&](int64_t at) {
    if (p.aligned) return *reinterpret_cast<const uint32_t*>(p.weight + at);
    uint32_t w = 0;
    for (int e = 0; e < 4; ++e) {
      if (at + e < p.outputs * p.bytes) w |= uint32_t{p.weight[at + e]} << 8 * e;
    }
    return w;
  };
  const auto take = [&](int64_t word, uint32_t w) {
    ZK_UNROLL
    for (int i = 0; i < kRowsTogether; ++i) {
      if (i >= rows) continue;
      ZK_UNROLL
      for (int limb = 0; limb < Limbs; ++limb) {
        const int64_t place = (limb * p.rows + row + i) * of_row + group * p.group_words + word;
        sum[i][limb] = dot(w, p.words[place], sum[i][limb]);
      }
    }
  };
  ZK_NO_UNROLL
  for (int64_t word = from; word < stop; word += 2) {
    if (p.packed) {
      const uint32_t w = word_at(byte + 2 * word);
      take(word, signed_halves(w));
      take(word + 1, signed_halves(w >> 4));
    } else {
      take(word, word_at(byte + 4 * word));
      if (word + 1 < stop) take(word + 1, word_at(byte + 4 * word + 4));
    }
  }
  ZK_UNROLL
  for (int i = 0; i < kRowsTogether; ++i) {
    if (i >= rows) continue;
    ZK_UNROLL
    for (int limb = 0; limb < Limbs; ++limb) {
      add_sum(p.sums + ((limb * p.rows + row + i) * p.groups + group) * p.count + output, sum[i][limb]);
    }
  }
}

// A thread for each output, and row.
template <DType D, int Limbs>
ZK_GLOBAL quantized_out_kernel(ZK_GRID_CONSTANT QuantizedLaunch p) {
  using S = Storage<D>;
  const int64_t index = thread_index(), output = index % p.count, row = index / p.count;
  if (row >= p.rows) return;
  float y[kVector] = {};
  ZK_NO_UNROLL
  for (int64_t g = 0; g < p.groups; ++g) {
    const uint32_t* of_group = p.sums + (row * p.groups + g) * p.count + output;
    const int64_t limbs = p.rows * p.groups * p.count;
    float sum = signed_to_float(of_group[0]);
    if constexpr (Limbs == 3) {
      sum = add(mul(signed_to_float(of_group[limbs]), 256.0f), sum);
      sum = add(mul(signed_to_float(of_group[2 * limbs]), 65536.0f), sum);
    }
    const float scale = number(p.scale_dtype, p.scale, (p.first + output) * p.groups + g);
    y[0] = add(y[0], mul(sum, scale));
  }
  y[0] = mul(y[0], p.steps[row]);
  if (p.bias != nullptr) y[0] = add(y[0], number(p.bias_dtype, p.bias, p.first + output));
  const int64_t at = row * p.outputs + p.first + output;
  EdgeAccess{at, at + 1}.template store<D>(p.y, S::template pack<false>(y, {}));
}

// --- the entry -------------------------------------------------------------------------------------------

namespace {

template <class Kernel>
void launch_each(const Kernel& kernel, int64_t threads, const OnDevice& on, const QuantizedLaunch& p) {
  if (threads == 0) return;
  const auto blocks = static_cast<uint32_t>((threads + kThreads - 1) / kThreads);
  check_launch("quantized_linear", launch(kernel, blocks, on.stream, p));
}

template <DType D, int Limbs>
void multiply(QuantizedLaunch p, int64_t outputs_at_once, Tensor& sums, const OnDevice& on) {
  launch_each(quantized_most_kernel<D>, p.rows * p.pieces, on, p);
  launch_each(quantized_words_kernel<D, Limbs>, p.rows * p.groups * p.group_words, on, p);
  const int64_t runs = (p.group_words + kWords - 1) / kWords;
  for (p.first = 0; p.first < p.outputs; p.first += p.count) {
    p.count = p.outputs - p.first < outputs_at_once ? p.outputs - p.first : outputs_at_once;
    torch::stable::zero_(sums);
    const int64_t blocks = (p.rows + kRowsTogether - 1) / kRowsTogether;
    launch_each(quantized_sums_kernel<Limbs>, p.count * runs * p.groups * blocks, on, p);
    launch_each(quantized_out_kernel<D, Limbs>, p.count * p.rows, on, p);
  }
}

Tensor quantized_linear_cuda(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias,
                             int64_t x_bits) {
  check_quantized_linear(x, weight, scale, bias, x_bits);
  const int64_t total = x.size(0), limbs = x_bits / 8;
  Tensor y = torch::stable::new_empty(x, {total, scale.size(0)});
  if (y.numel() == 0) return y;
  const OnDevice on(x);
  const DType dtype = dtype_of("quantized_linear", x);
  QuantizedLaunch p{};
  p.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  p.scale = scale.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.columns = x.size(1);
  p.outputs = scale.size(0);
  p.groups = p.columns == 0 ? 0 : scale.size(1);
  p.size = p.groups == 0 ? 0 : p.columns / p.groups;
  p.pieces = (p.columns + kPiece - 1) / kPiece;
  p.bytes = weight.size(1);
  p.packed = weight.scalar_type() == torch::headeronly::ScalarType::Byte;
  // A packed group of odd size may begin in half a byte, which its words have, too.
  p.group_words = p.packed ? (p.size + p.size % 2 + 7) / 8 * 2 : (p.size + 3) / 4;
  p.aligned = reinterpret_cast<uintptr_t>(p.weight) % 4 == 0 && p.size % (p.packed ? 8 : 4) == 0;
  p.scale_dtype = dtype_of("quantized_linear", scale);
  p.bias_dtype = bias ? dtype_of("quantized_linear", *bias) : p.scale_dtype;

  const int64_t held = total < kHeldRows ? total : kHeldRows, row_bytes = x.element_size() * p.columns;
  const int64_t of_output = limbs * held * p.groups;
  int64_t at_once = of_output == 0 ? p.outputs : kSumBytes / 4 / of_output;
  at_once = at_once < 1 ? 1 : at_once < p.outputs ? at_once : p.outputs;
  const auto scratch = [&](int64_t count) {
    return torch::stable::new_empty(x, {count}, torch::headeronly::ScalarType::Int);
  };
  const Tensor most = scratch(held * p.pieces), words = scratch(limbs * held * p.groups * p.group_words);
  const Tensor steps = torch::stable::new_zeros(x, {held}, torch::headeronly::ScalarType::Float);
  Tensor sums = scratch(of_output * at_once);
  p.most = static_cast<uint32_t*>(most.mutable_data_ptr());
  p.words = static_cast<uint32_t*>(words.mutable_data_ptr());
  p.steps = static_cast<float*>(steps.mutable_data_ptr());
  p.sums = static_cast<uint32_t*>(sums.mutable_data_ptr());
  for (int64_t row = 0; row < total; row += held) {
    p.rows = static_cast<int32_t>(total - row < held ? total - row : held);
    p.x = static_cast<const char*>(x.const_data_ptr()) + row * row_bytes;
    p.y = static_cast<char*>(y.mutable_data_ptr()) + row * p.outputs * x.element_size();
    with_dtype(dtype, [&]<DType D>() {
      limbs == 3 ? multiply<D, 3>(p, at_once, sums, on) : multiply<D, 1>(p, at_once, sums, on);
    });
  }
  return y;
}

}  // namespace

ZK_REGISTER(quantized_linear,
            "quantized_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int x_bits) -> Tensor")

}  // namespace zk::cuda
