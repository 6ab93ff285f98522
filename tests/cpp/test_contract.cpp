// Known answers of the generator: Random123's, and those of tests/golden.json, from the scalar headers.
#include <cmath>

#include "check.h"
#include "golden.h"
#include "noise/normal.h"
#include "noise/rademacher.h"

using namespace zk;

namespace {

Words<uint32_t> block(uint64_t seed, uint64_t index, uint64_t id, Domain domain) {
  const Stream stream(id);
  return philox<Scalar>(static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), stream.low,
                        stream.with(domain), philox_key(seed));
}

uint32_t field(const Words<uint32_t>& words, uint64_t i) {
  return words.w[(i & 7) >> 1] >> (16 * (i & 1)) & 0xffffu;
}

void fields(const std::vector<golden::Words>& cases, Domain domain, const char* what) {
  for (const auto& c : cases)
    for (uint64_t n = 0; n < c.values.size(); ++n)
      check::equal(field(block(c.seed, (c.offset + n) >> 3, c.stream, domain), c.offset + n), c.values[n],
                   what);
}

}  // namespace

int main() {
  for (const auto& c : golden::philox) {
    const uint64_t seed = c.key[0] | static_cast<uint64_t>(c.key[1]) << 32;
    const auto x = philox<Scalar>(c.counter[0], c.counter[1], c.counter[2], c.counter[3], philox_key(seed));
    for (int w = 0; w < 4; ++w) check::equal(x.w[w], c.out[w], "philox");
  }
  for (const auto& c : golden::normal)
    for (uint64_t n = 0; n < c.values.size(); ++n) {
      float z[8];
      normal8(block(c.seed, (c.offset + n) >> 3, c.stream, kNormal), z);
      check::equal(bits(z[(c.offset + n) & 7]), c.values[n], "normal");
    }
  for (const auto& c : golden::rademacher)
    for (uint64_t n = 0; n < c.values.size(); ++n) {
      const uint64_t i = c.offset + n, e = i % kRademacherTile, vec = e >> 3;
      const auto words = block(c.seed, kRademacherBlocks * (i / kRademacherTile) + (vec & 31), c.stream,
                               kRademacher);
      const uint32_t byte = words.w[vec >> 5 >> 2] >> 8 * (vec >> 5 & 3);
      const float z = signed_coefficient(byte, static_cast<int>(e & 7), 1.0f);
      check::that(z == (c.values[n] == '+' ? 1.0f : -1.0f), "rademacher");
    }
  fields(golden::mask_fields, kMask, "mask field");
  fields(golden::rounding_fields, kRounding, "rounding field");
  for (const auto& c : golden::derived_seeds)
    check::equal(derive_seed(c.run_seed, c.step, c.k), c.seed, "derive_seed");

  // The square root from a reciprocal one (CUDA's), for every 4001st radius and all roundings of the
  // reciprocal nearby.
  for (uint64_t v = 1; v < uint64_t{1} << 32; v += 2 * 4001) {
    const float s = radius_squared<float>(static_cast<uint32_t>(v), kMantissa);
    check::that(s > 4.5e-7f && s < 42.99f, "radius");
    const uint32_t y = bits(static_cast<float>(1.0 / std::sqrt(static_cast<double>(s))));
    for (int ulps = -1; ulps <= 1; ++ulps)
      check::equal(bits(sqrt_from_rsqrt(s, from_bits(y + ulps))), bits(std::sqrt(s)), "square root");
  }
  return check::result();
}
