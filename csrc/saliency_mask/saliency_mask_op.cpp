#include <tuple>

#include "cpu/runs.h"
#include "host/list_op.h"
#include "saliency_mask/saliency_mask.h"

namespace sfron {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

SaliencyScalars scalars(double threshold, double eps) {
  check_number("threshold", threshold, 0.0, kInf, true);
  check_number("eps", eps, 0.0, kInf);
  return {static_cast<float>(threshold), static_cast<float>(eps)};
}

// selected: [tensors]
void run_on_cpu(const std::vector<SaliencyTensor>& tensors, const SaliencyScalars& s,
                int64_t* selected) {
  const Runs runs(tensors);
  std::vector<std::atomic<int64_t>> counts(tensors.size());
  parallel(runs, [&](int64_t begin, int64_t end) {
    saliency_mask_cpu(tensors, runs, begin, end, s, counts.data());
  });
  for (size_t i = 0; i < tensors.size(); ++i) selected[i] = counts[i];
}

std::tuple<std::vector<Tensor>, Tensor> saliency_mask(const TensorList& forget,
                                                      const TensorList& retain, double threshold,
                                                      double eps) {
  const DeviceScope scope(forget);
  const Views forgets = float_views("forget", forget);
  for (size_t i = 0; i < forgets.size(); ++i) {
    check_dtype({"forget", static_cast<int64_t>(i)}, forgets[i], codes().float32);
  }
  const Arrays retains = arrays_like("retain", retain, forgets, Allowed::kSame);
  const SaliencyScalars s = scalars(threshold, eps);

  const int64_t length = static_cast<int64_t>(forgets.size());
  std::vector<Tensor> masks;
  masks.reserve(length);
  std::vector<SaliencyTensor> tensors(length);
  for (int64_t i = 0; i < length; ++i) {
    masks.push_back(new_tensor({(forgets[i].numel + 7) / 8}, codes().uint8));
    tensors[i] = {static_cast<const float*>(forgets[i].data),
                  static_cast<const float*>(retains[i].data), data_of<uint8_t>(masks[i]),
                  forgets[i].numel};
  }
  Tensor counts = new_tensor({length}, codes().int64);
#if defined(USE_CUDA)
  if (scope.on_cuda()) {
    launch_saliency_mask(tensors, s, data_of<int64_t>(counts), scope.queue());
    return {std::move(masks), counts};
  }
#endif
  run_on_cpu(tensors, s, data_of<int64_t>(counts));
  return {std::move(masks), counts};
}

}  // namespace

SFRON_LIST_OP("saliency_mask", saliency_mask)

}  // namespace sfron
