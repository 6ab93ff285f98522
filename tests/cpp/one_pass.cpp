// One pass of combine in place with one direction, for an emulator that counts instructions:
//
//   one_pass ISA DTYPE DIST NUMEL      DTYPE: 0 fp32, 1 bf16, 2 fp16; DIST: 1 normal, 2 Rademacher
//
// Two runs that differ in NUMEL alone differ in their instructions by those of the additional elements.
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/combine.h"
#include "cpu/isa.h"

using namespace zk;
using namespace zk::cpu;

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const std::string isa = arguments[1];
  const int64_t numel = std::atoll(arguments[4]);
  const PhiloxKey key = philox_key(7);
  const float coeff = 1e-3f;
  void* theta = std::aligned_alloc(64, static_cast<size_t>(4 * numel));
  void* scratch = std::aligned_alloc(64, kScratchPerDirection);
  if (theta == nullptr || scratch == nullptr) return 1;
  __builtin_memset(theta, 0, static_cast<size_t>(numel < 64 ? 4 * numel : 256));  // the same for every NUMEL
  Combine op{};
  op.keys = &key;
  op.count = 1;
  op.dist = static_cast<Domain>(std::atoi(arguments[3]));
  op.dtype = static_cast<DType>(std::atoi(arguments[2]));
  op.mask_keep = 65536;
  Span span{};
  span.in = span.out = theta;
  span.coeffs = &coeff;
  span.numel = span.end = numel;
  ZK_KERNEL_OF(combine, isa)(op, span, scratch);
  std::free(scratch);
  std::free(theta);
  return 0;
}
