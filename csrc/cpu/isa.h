// Instruction sets: which this machine has, and the choice among the kernels compiled for them.
#pragma once

#if defined(ZK_BUILD_AVX512)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Products of bytes: instructions of a kernel of AVX-512 that asks for them.
inline bool has_vnni() {
#if defined(ZK_BUILD_AVX512)
  return has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Linux lets a process use the tiles of AMX when it has asked for them; kernels before 5.16 know no such call.
inline bool has_amx() {
#if defined(ZK_BUILD_AVX512) && defined(__linux__)
  static const bool has = [] {
    unsigned a, b, c, d = 0;
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
    if (!has_vnni() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (d & tile) != 0 && (d & int8) != 0 && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return has;
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
  if ((isa == "avx512" && has_avx512()) || (isa == "vnni" && has_vnni()) || (isa == "amx" && has_amx()))
    return avx512;
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
// The kernel that ZK_KERNEL declared, for the instruction set `isa`: auto, portable, avx2, avx512, vnni, amx or
// neon. vnni and amx are avx512 with more instructions for products of bytes, which a kernel asks for itself.
#define ZK_KERNEL_OF(name, isa)                                                           \
  ::zk::cpu::kernel_of(isa, portable::name, ZK_AVX2_KERNEL(name), ZK_AVX512_KERNEL(name), \
                       ZK_NEON_KERNEL(name))

}  // namespace zk::cpu
