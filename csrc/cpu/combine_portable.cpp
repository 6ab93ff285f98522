#include "combine_kernel.h"
#include "lanes_portable.h"

namespace zk::cpu {

void combine_span_portable(const Combine& op, const Span& span, void* scratch) { combine_span<Portable>(op, span, scratch); }

}  // namespace zk::cpu
