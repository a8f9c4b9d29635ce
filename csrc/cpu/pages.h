#pragma once
// A large new tensor is mostly page faults: the kernel clears 4 KB at a time. Where it leaves the
// choice to programs, as Linux does by default ("madvise"), huge pages for whole ones of the tensor
// make that several times cheaper.
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sfron {

constexpr int64_t kHugePage = 1 << 21;
constexpr int64_t kHuge = 4 * kHugePage;  // bytes; below it memory is mostly reused

inline void want_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHuge) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data), last = first + bytes;
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage,
                  end = last / kHugePage * kHugePage;
  // a hint: a refusal changes nothing
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace sfron
