// Launches of encode and decode.
#include "launch.cuh"
#include "wire_kernel.cuh"

namespace zk::cuda {
namespace {

template <class F>
auto with_wire(DType wire, const F& f) {
  switch (wire) {
    case DType::bf16: return f.template operator()<DType::bf16>();
    case DType::f16: return f.template operator()<DType::f16>();
    case DType::e4m3: return f.template operator()<DType::e4m3>();
    default: return f.template operator()<DType::i8>();
  }
}

template <DType D, DType W, Domain Dist, bool FanOut>
int launch_form(const DecodeLaunch& p, uint32_t chunks, void* stream) {
  const bool update = p.count > 0 || p.decay != nullptr || p.rounding_seed != nullptr;
  return launch(update ? decode_kernel<D, W, Dist, FanOut, true> : decode_kernel<D, W, Dist, FanOut, false>, chunks,
                stream, p);
}

template <DType D, DType W, Domain Dist>
int launch_dist(const DecodeLaunch& p, uint32_t chunks, void* stream) {
  return p.probe_seed != nullptr ? launch_form<D, W, Dist, true>(p, chunks, stream)
                                 : launch_form<D, W, Dist, false>(p, chunks, stream);
}

}  // namespace

int launch_encode(const EncodeLaunch& p, uint32_t chunks, DType dtype, DType wire, void* stream) {
  return with_dtype(dtype, [&]<DType D>() {
    return with_wire(wire, [&]<DType W>() { return launch(encode_kernel<D, W>, chunks, stream, p); });
  });
}

int launch_decode(const DecodeLaunch& p, uint32_t chunks, DType dtype, DType wire, Domain dist, void* stream) {
  return with_dtype(dtype, [&]<DType D>() {
    return with_wire(wire, [&]<DType W>() {
      return dist == kNormal ? launch_dist<D, W, kNormal>(p, chunks, stream)
                             : launch_dist<D, W, kRademacher>(p, chunks, stream);
    });
  });
}

}  // namespace zk::cuda
