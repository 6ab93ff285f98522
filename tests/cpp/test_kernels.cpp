// combine of every instruction set that this machine has: the golden values, and the same bits as the
// portable lanes for every dtype, kind of noise, rounding, offset and length.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/combine.h"
#include "cpu/isa.h"
#include "golden.h"

using namespace zk;
using namespace zk::cpu;

namespace {

struct Case {
  DType dtype;
  Domain dist;
  bool stochastic, decay;
  int directions;
  uint64_t offset;
};

size_t width(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

using Kernel = void (*)(const zk::cpu::Combine&, const Span&, void*);

void combine(Kernel kernel, const Case& c, const std::vector<uint64_t>& seeds, uint64_t stream, void* theta,
             int64_t numel) {
  std::vector<PhiloxKey> keys;
  std::vector<float> coeffs;
  for (size_t k = 0; k < seeds.size(); ++k) {
    keys.push_back(philox_key(seeds[k]));
    coeffs.push_back(k == 0 ? 1.0f : 0.25f * static_cast<float>(k));
  }
  Combine op{};
  op.keys = keys.data();
  op.count = static_cast<int64_t>(seeds.size());
  op.dist = c.dist;
  op.has_decay = c.decay;
  op.decay = 0.75f;
  op.stochastic = c.stochastic;
  op.rounding = philox_key(99);
  op.mask_keep = 65536;
  op.dtype = c.dtype;
  Span span{};
  span.in = span.out = theta;
  span.coeffs = coeffs.data();
  span.numel = span.end = numel;
  span.offset = c.offset;
  span.stream = Stream(stream);
  void* scratch = std::aligned_alloc(64, kScratchPerDirection * (seeds.size() + 1));
  kernel(op, span, scratch);
  std::free(scratch);
}

void golden_values(Kernel kernel) {
  for (const auto& c : golden::normal) {
    std::vector<float> z(c.values.size(), -0.0f);
    combine(kernel, {DType::f32, kNormal, false, false, 1, c.offset}, {c.seed}, c.stream, z.data(),
            static_cast<int64_t>(z.size()));
    for (size_t i = 0; i < z.size(); ++i) check::equal(bits(z[i]), c.values[i], "normal");
  }
  for (const auto& c : golden::rademacher) {
    std::vector<float> z(c.values.size(), -0.0f);
    combine(kernel, {DType::f32, kRademacher, false, false, 1, c.offset}, {c.seed}, c.stream, z.data(),
            static_cast<int64_t>(z.size()));
    for (size_t i = 0; i < z.size(); ++i)
      check::that(z[i] == (c.values[i] == '+' ? 1.0f : -1.0f), "rademacher");
  }
}

std::vector<uint16_t> values(const Case& c, int64_t numel) {
  std::vector<uint16_t> data(numel * width(c.dtype) / 2 + 8, 0xABCD);  // eight more: a sentinel
  for (int64_t i = 0; i < numel; ++i) {
    float z[8];
    z[0] = static_cast<float>(static_cast<int32_t>(
               philox<Scalar>(static_cast<uint32_t>(i), 0, 0, kSeed, philox_key(7)).w[0])) *
           0x1p-31f;
    if (c.dtype == DType::f32) std::memcpy(&data[2 * i], z, 4);
    if (c.dtype == DType::bf16) data[i] = static_cast<uint16_t>(bits(z[0]) >> 16);
    if (c.dtype == DType::f16) data[i] = static_cast<uint16_t>(0x3800u | (bits(z[0]) >> 20 & 0x3ffu));
  }
  return data;
}

}  // namespace

int main() {
  std::vector<const char*> sets = {"portable"};
  if (has_avx2()) sets.push_back("avx2");
  if (has_avx512()) sets.push_back("avx512");
  if (has_neon()) sets.push_back("neon");
  const Kernel portable = ZK_KERNEL_OF(combine, "portable");
  for (const char* isa : sets) {
    const Kernel kernel = ZK_KERNEL_OF(combine, isa);
    golden_values(kernel);
    for (DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (Domain dist : {kNormal, kRademacher})
        for (bool stochastic : {false, true})
          for (bool decay : {false, true})
            for (int directions : {0, 1, 2, 5})
              for (uint64_t offset : {uint64_t{0}, uint64_t{3}, uint64_t{4093}, (uint64_t{1} << 35) - 5})
                for (int64_t numel : {1, 8, 129, 4100}) {
                  const Case c{dtype, dist, stochastic, decay, directions, offset};
                  std::vector<uint64_t> seeds;
                  for (int k = 0; k < directions; ++k) seeds.push_back(1234567 + k);
                  auto want = values(c, numel), got = want;
                  combine(portable, c, seeds, 11, want.data(), numel);
                  combine(kernel, c, seeds, 11, got.data(), numel);
                  check::that(got == want, isa, numel, offset);
                  for (size_t i = numel * width(dtype) / 2; i < got.size(); ++i)
                    check::equal(got[i], 0xABCD, "sentinel");
                }
    std::printf("%s\n", isa);
  }
  return check::result();
}
