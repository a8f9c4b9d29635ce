#include <tuple>

#include "common/list_op.h"
#include "common/runs.h"
#include "saliency_mask/saliency_mask.h"

namespace sfron {
namespace {

std::tuple<std::vector<Tensor>, Tensor> saliency_mask(
    const TensorList& forget, const TensorList& retain, double threshold, double eps) {
  const DeviceScope scope(forget);
  const Views forgets = float_views("forget", forget);
  for (size_t i = 0; i < forgets.size(); ++i) {
    check_dtype({"forget", static_cast<int64_t>(i)}, forgets[i], codes().float32);
  }
  const Arrays retains = arrays_like("retain", retain, forgets, Allowed::kSame);
  const double inf = std::numeric_limits<double>::infinity();
  check_number("threshold", threshold, 0.0, inf, true);
  check_number("eps", eps, 0.0, inf);

  const int64_t length = static_cast<int64_t>(forgets.size());
  std::vector<Tensor> masks;
  masks.reserve(length);
  std::vector<SaliencyTensor> tensors(length);
  for (int64_t i = 0; i < length; ++i) {
    masks.push_back(new_tensor({(forgets[i].numel + 7) / 8}, codes().uint8));
    tensors[i] = {static_cast<const float*>(forgets[i].data), static_cast<const float*>(retains[i].data),
                  data_of<uint8_t>(masks[i]), forgets[i].numel};
  }
  const SaliencyScalars s{static_cast<float>(threshold), static_cast<float>(eps)};
  Tensor selected = new_tensor({length}, codes().int64);
#if defined(USE_CUDA)
  if (scope.on_cuda()) {
    launch_saliency_mask(tensors, s, data_of<int64_t>(selected), scope.queue());
    return {std::move(masks), selected};
  }
#endif
  const Runs runs(tensors);
  std::vector<std::atomic<int64_t>> counts(length);
  parallel(runs, [&](int64_t begin, int64_t end) { saliency_mask_cpu(tensors, runs, begin, end, s, counts.data()); });
  for (int64_t i = 0; i < length; ++i) data_of<int64_t>(selected)[i] = counts[i];
  return {std::move(masks), selected};
}

}  // namespace

SFRON_LIST_OP("saliency_mask", saliency_mask)

}  // namespace sfron
