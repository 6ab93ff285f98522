// The combine kernel, which serves several operations.
#pragma once

#include "kernels.h"

namespace zk::cpu {

// What the kernel does with acc = decay * theta + sum c_k w_k:
//   one       theta = round(acc)
//   fan_out   theta = round(acc); then plus = round(theta + c z) and minus = round(theta - c z), to nearest,
//             where z and c are those of one more direction, which stands behind the K
//   spread    no sum is formed: out holds K tensors, the k-th is round(theta + c_k z_k), to nearest
enum class Form { one, fan_out, spread };

struct Combine : Terms {
  Form form;
  float low, high;  // the bounds that an integer is clamped to; of dtype i8 alone
  // Whether Span::in is a wire buffer whose elements have the dtype `wire`. In the buffers of i8 and e4m3 the
  // scales follow the elements. Only the forms one and fan_out read wires, and fan_out then stores no theta.
  bool from_wire;
  DType wire;
};

ZK_KERNEL(combine, const Combine&, const Span&, void* scratch)

}  // namespace zk::cpu
