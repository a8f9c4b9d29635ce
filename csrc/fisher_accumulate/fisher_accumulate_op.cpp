#include "cpu/runs.h"
#include "fisher_accumulate/fisher_accumulate.h"
#include "host/list_op.h"

namespace sfron {
namespace {

void fisher_accumulate(const TensorList& fisher, const TensorList& grads, double weight,
                       const MaybeTensor& numbers) {
  const DeviceScope scope(grads);
  const Views views = float_views("grads", grads);
  const Arrays sums = arrays_like("fisher", fisher, views, Allowed::kFloat32);
  const Number number =
      number_view("weight", weight, numbers, 0.0, std::numeric_limits<double>::infinity());

  std::vector<FisherTensor> tensors(views.size());
  for (size_t i = 0; i < views.size(); ++i) {
    tensors[i] = {static_cast<float*>(sums[i].data), views[i].data, views[i].numel, views[i].dtype};
  }
#if defined(USE_CUDA)
  if (scope.on_cuda()) return launch_fisher_accumulate(tensors, number, scope.queue());
#endif
  const Runs runs(tensors);
  const float scalar = static_cast<float>(value_of(number));
  parallel(runs, [&](int64_t begin, int64_t end) {
    fisher_accumulate_cpu(tensors, runs, begin, end, scalar);
  });
}

}  // namespace

SFRON_LIST_OP("fisher_accumulate_", fisher_accumulate)

}  // namespace sfron
