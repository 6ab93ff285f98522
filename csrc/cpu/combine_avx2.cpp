#include "combine_kernel.h"
#include "lanes_avx2.h"

namespace zk::cpu {

void combine_span_avx2(const Combine& op, const Span& span, void* scratch) { combine_span<Avx2>(op, span, scratch); }

}  // namespace zk::cpu
