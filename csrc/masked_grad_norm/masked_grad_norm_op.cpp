#include "cpu/runs.h"
#include "host/list_op.h"
#include "masked_grad_norm/masked_grad_norm.h"

namespace sfron {
namespace {

Tensor masked_grad_norm(const TensorList& grads, const TensorList& masks,
                        const MaybeTensor& grad_scale) {
  const DeviceScope scope(grads);
  const Views views = float_views("grads", grads);
  const auto mask = mask_views(masks, views);
  const float* scale = optional_scalar_view("grad_scale", grad_scale);

  std::vector<MaskedGradNormTensor> tensors(views.size());
  for (size_t i = 0; i < views.size(); ++i) {
    tensors[i] = {views[i].data, mask.empty() ? nullptr : mask[i], views[i].numel, views[i].dtype};
  }
  Tensor norm = new_tensor({}, codes().float32);
#if defined(USE_CUDA)
  if (scope.on_cuda()) {
    launch_masked_grad_norm(tensors, scale, data_of<float>(norm), scope.queue());
    return norm;
  }
#endif
  const Runs runs(tensors, kNormChunk);
  std::vector<double> partials(runs.units());
  const float inverse_scale = scale == nullptr ? 1.0f : 1.0f / *scale;
  parallel(runs, [&](int64_t begin, int64_t end) {
    masked_grad_norm_cpu(tensors, runs, begin, end, inverse_scale, partials.data());
  });
  double sum = 0.0;  // in order: the result must not depend on the threads
  for (const double partial : partials) sum += partial;
  *data_of<float>(norm) = static_cast<float>(std::sqrt(sum));
  return norm;
}

}  // namespace

SFRON_LIST_OP("masked_grad_norm", masked_grad_norm)

}  // namespace sfron
