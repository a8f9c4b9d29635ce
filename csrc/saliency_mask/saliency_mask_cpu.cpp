#include "saliency_mask/saliency_mask.h"

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "cpu/runs.h"

namespace sfron {
namespace {

// Bits set, without the processor's own instruction: the baseline has none.
SFRON_HD int64_t count_bits(uint32_t word) {
  word -= (word >> 1) & 0x55555555u;
  word = (word & 0x33333333u) + ((word >> 2) & 0x33333333u);
  return static_cast<int64_t>((((word + (word >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
}

struct SaliencyKernel {
  void operator()(const SaliencyTensor& t, int64_t begin, int64_t end, SaliencyScalars s,
                  std::atomic<int64_t>* count) const {
    count->fetch_add(select(t, begin, end, s), std::memory_order_relaxed);
  }

  // Returns how many bits it has set; begins at a whole byte.
  static SFRON_HD int64_t select(const SaliencyTensor& t, int64_t i, int64_t end,
                                 SaliencyScalars s) {
    const float *forget = t.forget, *retain = t.retain;
    int64_t selected = 0;
    for (; i + kLanes <= end; i += kLanes) {
      prefetch(i, forget, retain);
      uint32_t word = 0;
      SFRON_INDEPENDENT
      for (int64_t j = 0; j < kLanes; ++j)
        word |= saliency_one(forget[i + j], retain[i + j], s) ? kBit[j] : 0u;
      for (int64_t b = 0; b < 4; ++b) t.mask[i / 8 + b] = static_cast<uint8_t>(word >> (8 * b));
      selected += count_bits(word);
    }
    for (; i < end; i += 8) {
      uint32_t word = 0;
      for (int64_t j = 0; j < 8 && i + j < end; ++j) {
        word |= saliency_one(forget[i + j], retain[i + j], s) ? kBit[j] : 0u;
      }
      t.mask[i / 8] = static_cast<uint8_t>(word);
      selected += count_bits(word);
    }
    return selected;
  }
};

}  // namespace

void saliency_mask_cpu(const std::vector<SaliencyTensor>& tensors, const Runs& runs, int64_t begin,
                       int64_t end, const SaliencyScalars& s, std::atomic<int64_t>* counts) {
  runs.walk(begin, end, [&](int64_t i, int64_t first, int64_t last) {
    run_isa(SaliencyKernel{}, tensors[i], first, last, s, counts + i);
  });
}

}  // namespace sfron
