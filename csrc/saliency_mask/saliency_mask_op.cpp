#include <tuple>

#include "cpu/runs.h"
#include "host/list_op.h"
#include "saliency_mask/saliency_mask.h"

namespace sfron {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

SaliencyScalars scalars(double threshold, double eps, double weight, double total) {
  check_number("threshold", threshold, 0.0, kInf, true);
  check_number("eps", eps, 0.0, kInf);
  check_number("weight", weight, 0.0, kInf);
  check_number("total", total, 0.0, kInf, true);
  return {static_cast<float>(threshold), static_cast<float>(eps), static_cast<float>(weight),
          static_cast<float>(total)};
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
  const SaliencyScalars s = scalars(threshold, eps, 0.0, 1.0);

  const int64_t length = static_cast<int64_t>(forgets.size());
  std::vector<Tensor> masks;
  masks.reserve(length);
  std::vector<SaliencyTensor> tensors(length);
  for (int64_t i = 0; i < length; ++i) {
    masks.push_back(new_tensor({(forgets[i].numel + 7) / 8}, codes().uint8));
    tensors[i] = {static_cast<const float*>(forgets[i].data),
                  static_cast<float*>(retains[i].data),
                  nullptr,
                  data_of<uint8_t>(masks[i]),
                  forgets[i].numel,
                  DType::kFloat32};
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

void fisher_saliency_mask(const TensorList& retain, const TensorList& grads,
                          const TensorList& forget, const TensorList& masks, const Tensor& counts,
                          double weight, double total, double threshold, double eps) {
  const DeviceScope scope(grads);
  const Views views = float_views("grads", grads);
  const Arrays retains = arrays_like("retain", retain, views, Allowed::kFloat32);
  const Arrays forgets = arrays_like("forget", forget, views, Allowed::kFloat32);
  const int64_t length = static_cast<int64_t>(views.size());
  if (static_cast<int64_t>(masks.size()) != length) {
    fail({"masks"}, std::to_string(length) + " tensors", std::to_string(masks.size()));
  }
  std::vector<SaliencyTensor> tensors(length);
  for (int64_t i = 0; i < length; ++i) {
    const View mask = any_view({"masks", i}, masks[i]);
    const int64_t bytes = (views[i].numel + 7) / 8;
    check_dtype({"masks", i}, mask, codes().uint8);
    check_shape({"masks", i}, mask, &bytes, 1);
    tensors[i] = {static_cast<const float*>(forgets[i].data),
                  static_cast<float*>(retains[i].data),
                  views[i].data,
                  static_cast<uint8_t*>(mask.data),
                  views[i].numel,
                  views[i].dtype};
  }
  const View selected = any_view({"counts"}, counts.get());
  check_dtype({"counts"}, selected, codes().int64);
  check_shape({"counts"}, selected, &length, 1);
  const SaliencyScalars s = scalars(threshold, eps, weight, total);
#if defined(USE_CUDA)
  if (scope.on_cuda()) {
    return launch_fisher_saliency_mask(tensors, s, static_cast<int64_t*>(selected.data),
                                       scope.queue());
  }
#endif
  run_on_cpu(tensors, s, static_cast<int64_t*>(selected.data));
}

}  // namespace

SFRON_LIST_OP("saliency_mask", saliency_mask)
SFRON_LIST_OP("fisher_saliency_mask_", fisher_saliency_mask)

}  // namespace sfron
