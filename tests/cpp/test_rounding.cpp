// Rounding against its definition: to nearest even in exact arithmetic, and stochastic for all 65536 fields.
#include <cmath>
#include <initializer_list>
#include <limits>

#include "check.h"
#include "cpu/lanes_portable.h"

using namespace zk;

namespace {

float of_bf16(uint32_t h) { return from_bits(h << 16); }
float of_half(uint32_t h) { return cpu::Portable::from_half(h); }

struct Random {  // a run's numbers: words of Philox, so that every failure repeats
  uint32_t n = 0;
  uint32_t operator()() { return philox<Scalar>(n++, 0, 0, kSeed, philox_key(2024)).w[0]; }
};

// The neighbours of x among the 16-bit patterns: toward and away from zero.
template <class Of>
uint32_t toward_zero(double x, uint32_t infinity, Of of) {
  uint32_t low = 0, high = infinity;  // the largest pattern with value <= |x|
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (static_cast<double>(of(middle)) <= std::fabs(x) ? low : high) = middle;
  }
  return low;
}

template <class Of>
uint32_t nearest_even(float x, uint32_t infinity, Of of) {
  const uint32_t sign = std::signbit(x) ? 0x8000u : 0u, low = toward_zero(x, infinity, of);
  const double below = of(low);
  // Above the largest finite number, the next would be one step further.
  const double step = below - static_cast<double>(of(low - (low > 0))),
               above = low + 1 == infinity ? below + step : of(low + 1);
  const double d0 = std::fabs(x) - below, d1 = above - std::fabs(x);
  return sign | (d0 < d1 || (d0 == d1 && low % 2 == 0) ? low : low + 1);
}

}  // namespace

int main() {
  Random random;
  for (uint32_t h = 0; h < 0x10000u; ++h) {  // representable values never move
    const float half = of_half(h), brain = of_bf16(h);
    if (half == half) check::equal(cpu::Portable::to_half(half), h, "fp16 keeps its values");
    if (brain == brain) check::equal(bf16_nearest(bits(brain)) >> 16, h, "bf16 keeps its values");
    if (half == half && std::isfinite(half))
      for (uint32_t u : {0u, 0x7fffu, 0xffffu})
        check::equal(bits(half_stochastic(half, u)), bits(half), "fp16, stochastic");
    for (uint32_t u : {0u, 0x7fffu, 0xffffu})
      check::equal(bf16_stochastic(bits(brain), u) >> 16, h, "bf16, stochastic");
  }
  for (int i = 0; i < 200000; ++i) {
    const float any = from_bits(random()),
                small = std::ldexp(1.0f + (random() >> 8) * 0x1p-24f, static_cast<int>(random() % 44) - 26);
    for (float x : {any, small, -small}) {
      if (!std::isfinite(x)) continue;
      if (std::fabs(x) < 3.38e38f)
        check::equal(bf16_nearest(bits(x)) >> 16, nearest_even(x, 0x7f80, of_bf16), "bf16, nearest");
      const uint32_t want = std::fabs(x) >= 65520.0f ? (std::signbit(x) ? 0xfc00u : 0x7c00u)
                                                     : nearest_even(x, 0x7c00, of_half);
      check::equal(cpu::Portable::to_half(x), want, "fp16, nearest");
    }
  }
  const float nan = std::numeric_limits<float>::quiet_NaN(),
              infinity = std::numeric_limits<float>::infinity();
  check::that(std::isnan(of_half(cpu::Portable::to_half(nan))), "fp16, NaN");
  check::that(std::isnan(of_bf16(bf16_nearest(bits(canonical_nan(nan))) >> 16)), "bf16, NaN");
  check::that(of_half(cpu::Portable::to_half(-infinity)) == -infinity, "fp16, infinity");

  // Away from zero in exactly the dropped fraction of all fields: to 2^-16 of bf16, to 2^-13 of fp16,
  // subnormals included.
  for (int i = 0; i < 40; ++i) {
    const float x = std::ldexp(1.0f + (random() >> 8) * 0x1p-24f, static_cast<int>(random() % 30) - 27);
    const uint32_t b = toward_zero(x, 0x7f80, of_bf16), h = toward_zero(x, 0x7c00, of_half);
    uint32_t up_brain = 0, up_half = 0;
    for (uint32_t u = 0; u < 0x10000u; ++u) {
      const uint32_t brain = bf16_stochastic(bits(x), u) >> 16;
      const float half = half_stochastic(x, u);
      check::that(brain == b || brain == b + 1, "bf16, a neighbour", brain, b);
      check::that(half == of_half(h) || half == of_half(h + 1), "fp16, a neighbour", bits(half), h);
      up_brain += brain != b;
      up_half += half != of_half(h);
    }
    const double brain = (static_cast<double>(x) - of_bf16(b)) /
                         (static_cast<double>(of_bf16(b + 1)) - of_bf16(b));
    const double half = (static_cast<double>(x) - of_half(h)) /
                        (static_cast<double>(of_half(h + 1)) - of_half(h));
    check::that(up_brain == brain * 65536, "bf16, probability", up_brain);
    check::that(std::fabs(up_half / 65536.0 - half) <= 0x1p-13, "fp16, probability", up_half);
  }
  return check::result();
}
