// Instruction sets: which this machine has, and its kernels.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace zk::cpu {

inline bool has_avx2() {
#if defined(ZK_BUILD_AVX2)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

inline bool has_avx512() {
#if defined(ZK_BUILD_AVX512)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && has_avx2();
#else
  return false;
#endif
}

inline std::string best_isa() { return has_avx512() ? "avx512" : has_avx2() ? "avx2" : "portable"; }

inline const Kernels& kernels_of(const std::string& name) {
  const std::string isa = name == "auto" ? best_isa() : name;
#if defined(ZK_BUILD_AVX512)
  if (isa == "avx512" && has_avx512()) return avx512::kernels;
#endif
#if defined(ZK_BUILD_AVX2)
  if (isa == "avx2" && has_avx2()) return avx2::kernels;
#endif
  if (isa == "portable") return portable::kernels;
  throw std::runtime_error(
      "ZOKERNELS_CPU_ISA: expected auto or an instruction set that this build and machine have (best: " + best_isa() +
      "), got " + name);
}

}  // namespace zk::cpu
