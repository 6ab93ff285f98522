// Counts and prints what is wrong; main returns it.
#pragma once

#include <cstdio>

namespace check {

inline int checks = 0, failures = 0;

inline void that(bool ok, const char* what, unsigned long long got = 0, unsigned long long want = 0) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s: got %llx, want %llx\n", what, got, want);
}

template <class A, class B>
void equal(A got, B want, const char* what) {
  that(got == static_cast<A>(want), what, static_cast<unsigned long long>(got),
       static_cast<unsigned long long>(want));
}

// Of a test that checked nothing: a failure.
inline int result() {
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures || !checks;
}

}  // namespace check
