// Instruction sets: which this machine has, and the choice among the kernels compiled for them.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

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

// Every 64-bit ARM machine has NEON, so what is built can run.
inline bool has_neon() {
#if defined(ZK_BUILD_NEON)
  return true;
#else
  return false;
#endif
}

inline std::string best_isa() {
  return has_neon() ? "neon" : has_avx512() ? "avx512" : has_avx2() ? "avx2" : "portable";
}

// One of a kernel's compilations; null where this build lacks an instruction set.
template <class Kernel>
Kernel* kernel_of(const std::string& name, Kernel* portable, std::type_identity_t<Kernel>* avx2,
                  std::type_identity_t<Kernel>* avx512, std::type_identity_t<Kernel>* neon) {
  const std::string isa = name == "auto" ? best_isa() : name;
  if (isa == "avx512" && has_avx512()) return avx512;
  if (isa == "avx2" && has_avx2()) return avx2;
  if (isa == "neon" && has_neon()) return neon;
  if (isa == "portable") return portable;
  throw std::runtime_error(
      "ZOKERNELS_CPU_ISA: expected auto or an instruction set that this build and machine have (best: " +
      best_isa() + "), got " + name);
}

#if defined(ZK_BUILD_AVX2)
#define ZK_AVX2_KERNEL(name) avx2::name
#else
#define ZK_AVX2_KERNEL(name) nullptr
#endif
#if defined(ZK_BUILD_AVX512)
#define ZK_AVX512_KERNEL(name) avx512::name
#else
#define ZK_AVX512_KERNEL(name) nullptr
#endif
#if defined(ZK_BUILD_NEON)
#define ZK_NEON_KERNEL(name) neon::name
#else
#define ZK_NEON_KERNEL(name) nullptr
#endif
// The kernel that ZK_KERNEL declared, for the instruction set `isa`: auto, portable, avx2, avx512 or neon.
#define ZK_KERNEL_OF(name, isa)                                                           \
  ::zk::cpu::kernel_of(isa, portable::name, ZK_AVX2_KERNEL(name), ZK_AVX512_KERNEL(name), \
                       ZK_NEON_KERNEL(name))

}  // namespace zk::cpu
