// The combine kernel, which serves several operations.
#pragma once

#include "kernels.h"

namespace zk::cpu {

// What becomes of acc. one: theta = round(acc). fan_out: then, from the rounded theta and the direction behind the K,
// plus = round(theta + c z) and minus = round(theta - c z), to nearest. spread: nothing is summed; out has K tensors,
// round(theta + c_k z_k), to nearest.
enum class Form { one, fan_out, spread };

struct Combine : Terms {
  Form form;
  float low, high;  // of dtype i8
  // Span::in is a wire buffer of dtype `wire`: of i8 and e4m3 with scales behind. Form one, or fan_out, whose theta is then
  // not stored.
  bool from_wire;
  DType wire;
};

ZK_KERNEL(combine, const Combine&, const Span&, void* scratch)

}  // namespace zk::cpu
