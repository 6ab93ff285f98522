#include "combine_kernel.h"
#include "lanes_avx512.h"

namespace zk::cpu {

void combine_span_avx512(const Combine& op, const Span& span, void* scratch) { combine_span<Avx512>(op, span, scratch); }

}  // namespace zk::cpu
