#include "cpu/runs.h"
#include "host/list_op.h"
#include "interpolate/interpolate.h"

namespace sfron {
namespace {

void interpolate(const TensorList& slow, const TensorList& fast, double slow_lr,
                 const MaybeTensor& numbers) {
  const DeviceScope scope(slow);
  const Views slows = float_views("slow", slow);
  const Arrays fasts = arrays_like("fast", fast, slows, Allowed::kSame);
  const Number number = number_view("slow_lr", slow_lr, numbers, 0.0, 1.0);

  std::vector<InterpolateTensor> tensors(slows.size());
  for (size_t i = 0; i < slows.size(); ++i) {
    tensors[i] = {slows[i].data, fasts[i].data, slows[i].numel, slows[i].dtype};
  }
#if defined(USE_CUDA)
  if (scope.on_cuda()) return launch_interpolate(tensors, number, scope.queue());
#endif
  const Runs runs(tensors);
  const Lerp s = make_lerp(value_of(number));
  parallel(runs,
           [&](int64_t begin, int64_t end) { interpolate_cpu(tensors, runs, begin, end, s); });
}

}  // namespace

SFRON_LIST_OP("interpolate_", interpolate)

}  // namespace sfron
