// The rules of update, each of which makes a new theta and new states from sums over the directions. Their
// formulas and hyper values are documented at update_ in zokernels/ops/update.py.
//
// A rule is a functor over lanes F. Its arguments h are the hyper values, and c a coefficient for each
// direction. On the host a value of either that is NaN has no payload (canonical_nan). A rule has:
//   states            the number of its state tensors
//   sums              the number of values that it sums for each element; each sum begins at 0
//   values            the number of its hyper values
//   value_per_seed    whether one more hyper value for each direction follows
//   accumulate        adds direction k, whose noise is z, to the sums
//   apply             returns the new theta and replaces the states
// A further rule is a functor here, a line of ZK_RULES, and a row of RULES in zokernels/ops/update.py.
#pragma once

#include "rounding.h"

namespace zk {

namespace rules {

template <class F>
ZK_HD F of(float x) {
  return Splat<F>::of(x);
}

// G = sum c_k z_k
struct Gradient {
  static constexpr int sums = 1;
  static constexpr bool value_per_seed = false;
  template <class F>
  static ZK_HD void accumulate(const float*, const float* c, int64_t k, F z, F sum[]) {
    sum[0] = fma(of<F>(c[k]), z, sum[0]);
  }
};

struct momentum : Gradient {
  static constexpr int states = 1, values = 4;
  template <class F>
  static ZK_HD F apply(const float* h, const float*, const F sum[], F theta, F decayed, F state[]) {
    const F g = fma(of<F>(h[0]), theta, sum[0]);
    state[0] = fma(of<F>(h[1]), state[0], mul(of<F>(h[2]), g));
    return fma(of<F>(-h[3]), state[0], decayed);
  }
};

struct adam : Gradient {
  static constexpr int states = 2, values = 8;
  template <class F>
  static ZK_HD F apply(const float* h, const float*, const F sum[], F theta, F decayed, F state[]) {
    const F g = fma(of<F>(h[0]), theta, sum[0]);
    state[0] = fma(of<F>(h[1]), state[0], mul(of<F>(h[2]), g));
    state[1] = fma(of<F>(h[3]), state[1], mul(mul(of<F>(h[4]), g), g));
    return fma(of<F>(-h[5]), div(state[0], fma(sqrt_full(state[1]), of<F>(h[6]), of<F>(h[7]))), decayed);
  }
};

struct adam_window {
  static constexpr int states = 0, sums = 2, values = 2;
  static constexpr bool value_per_seed = true;
  template <class F>
  static ZK_HD void accumulate(const float* h, const float* c, int64_t k, F z, F sum[]) {
    sum[0] = fma(of<F>(c[k]), z, sum[0]);
    sum[1] = fma(of<F>(h[2 + k]), mul(z, z), sum[1]);
  }
  template <class F>
  static ZK_HD F apply(const float* h, const float*, const F sum[], F, F decayed, F[]) {
    return fma(of<F>(-h[0]), div(sum[0], add(sqrt_full(sum[1]), of<F>(h[1]))), decayed);
  }
};

struct sign : Gradient {
  static constexpr int states = 0, values = 2;
  template <class F>
  static ZK_HD F apply(const float* h, const float*, const F sum[], F theta, F decayed, F[]) {
    using U = decltype(bits(theta));
    const U g = bits(fma(of<F>(h[0]), theta, sum[0])), zero = Splat<U>::of(0u);
    const U one = and_or(g, Splat<U>::of(0x80000000u), Splat<U>::of(0x3f800000u));
    const U nonzero = select_ge(magnitude(g), 1u, one, zero);
    return fma(of<F>(-h[1]), from_bits(select_ge(magnitude(g), kInfinity + 1, zero, nonzero)),
               decayed);  // NaN has none
  }
};

// One direction: the sum is z.
struct hizoo {
  static constexpr int states = 1, sums = 1, values = 2;
  static constexpr bool value_per_seed = false;
  template <class F>
  static ZK_HD void accumulate(const float*, const float*, int64_t, F z, F sum[]) {
    sum[0] = z;
  }
  template <class F>
  static ZK_HD F apply(const float* h, const float* c, const F sum[], F, F decayed, F state[]) {
    const F z = sum[0];
    state[0] = fma(of<F>(h[1]), mul(state[0], mul(z, z)), mul(of<F>(h[0]), state[0]));
    return fma(of<F>(c[0]), div(z, sqrt_full(state[0])), decayed);
  }
};

}  // namespace rules

#define ZK_RULES(X) X(momentum) X(adam) X(adam_window) X(sign) X(hizoo)

#define ZK_RULE_ENUM(rule) rule,
enum class Rule { ZK_RULES(ZK_RULE_ENUM) };
#undef ZK_RULE_ENUM

}  // namespace zk
