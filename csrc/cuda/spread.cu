// spread: out[k] = round(x + c_k z_k), in one read of x.
#include "device.cuh"
#include "op.cuh"

namespace zk::cuda {

struct SpreadLaunch {
  const int64_t* seeds;
  const float* coeffs;
  const void* in;
  void* out;  // [K, numel]
  int64_t numel;
  uint64_t offset;  // logical index of element 0
  Stream stream;
  int32_t count;                    // K
  uint32_t mantissa = 0x007fffffu;  // a constant that the compiler must not know (noise/normal.h)
};

// --- the kernel ------------------------------------------------------------------------------------------

// spread on the device: x stays in registers while one direction after the other is drawn.

template <DType D, Domain Dist>
ZK_GLOBAL spread_kernel(ZK_GRID_CONSTANT SpreadLaunch p) {
  using S = Storage<D>;
  using T = typename S::T;
  const Tile<Dist> tile(p.offset, blockIdx.x, p.stream, p.mantissa);

  const auto pass = [&]<int N, bool Whole>(int first, const auto& access) {
    typename S::Raw raw[N];
    ZK_UNROLL
    for (int v = 0; v < N; ++v) raw[v] = access(first + v).template load<D>(p.in);
    ZK_NO_UNROLL
    for (int k = 0; k < p.count; ++k) {
      const Noise<Tile<Dist>> noise(seed_at(p.seeds, k), tile);
      const float c = p.coeffs[k];
      T* out = static_cast<T*>(p.out) + k * p.numel;
      ZK_UNROLL
      for (int v = 0; v < N; ++v) {
        float x[kVector], z[kVector];
        S::unpack(raw[v], x);
        noise.template vec<Whole>(tile, first + v, z);
        ZK_UNROLL
        for (int e = 0; e < kVector; ++e) x[e] = fma(c, z[e], x[e]);
        access(first + v).template store<D>(out, S::template pack<false>(x, {}));
      }
    }
  };

  const bool aligned = is_aligned<D>(address(p.in) | address(p.out) | p.numel * sizeof(T), p.offset);
  for_groups<4>(tile, p.numel, aligned, pass);
}

// --- the entry -------------------------------------------------------------------------------------------

namespace {

int launch_spread(const SpreadLaunch& p, uint32_t chunks, DType dtype, Domain dist, void* stream) {
  return with_dtype(dtype, [&]<DType D>() {
    return launch(dist == kNormal ? spread_kernel<D, kNormal> : spread_kernel<D, kRademacher>, chunks, stream,
                  p);
  });
}

void spread_cuda(Tensor out, Tensor x, ZK_TERMS_PARAMS) {
  const TermArgs terms = ZK_TERMS;
  check_one_piece("spread", terms);
  check_terms("spread", {x}, terms);
  check_spread(out, x, terms);
  const int64_t chunks = chunks_of(static_cast<uint64_t>(offsets[0]), x.numel(), terms.domain());
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(chunks <= kMaxChunks, "spread: x: expected fewer elements, got ", x.numel());
  const OnDevice on(x);
  SpreadLaunch p{};
  p.seeds = pointer<int64_t>(seeds);
  p.coeffs = pointer<float>(coeffs);
  p.in = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.numel = x.numel();
  p.offset = static_cast<uint64_t>(offsets[0]);
  p.stream = Stream(static_cast<uint64_t>(streams[0]));
  p.count = static_cast<int32_t>(seeds.numel());
  check_launch("spread", launch_spread(p, static_cast<uint32_t>(chunks), dtype_of("spread", x),
                                       terms.domain(), on.stream));
}

}  // namespace

ZK_REGISTER(spread, "spread(Tensor(a!) out, Tensor x, " ZK_TERMS_SCHEMA ") -> ()")

}  // namespace zk::cuda
