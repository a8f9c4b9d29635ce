#include "host/list_op.h"
#include "host/step_arguments.h"
#include "sgd_step/sgd_step.h"

namespace sfron {
namespace {

void sgd_step(const TensorList& params, const TensorList& grads, const TensorList& momentum_buffers,
              const TensorList& scales, const TensorList& steps, const TensorList& corrections,
              const TensorList& slow_save, const TensorList& slow_save_corrections,
              const TensorList& slow_from, const TensorList& slow_from_corrections,
              const TensorList& masks, const MaybeTensor& norm, const MaybeTensor& grad_scale,
              const MaybeTensor& found_inf, double lr, double momentum, double dampening,
              double weight_decay, bool nesterov, bool maximize, bool first, bool freeze_masked,
              double max_norm, double slow_lr, const MaybeTensor& numbers,
              const MaybeTensor& skipped) {
  const DeviceScope scope(params);
  const StepArguments a = step_arguments(
      params, grads,
      {corrections, slow_save, slow_save_corrections, slow_from, slow_from_corrections}, masks,
      norm, grad_scale, found_inf, {lr, weight_decay, slow_lr}, numbers, skipped, max_norm,
      maximize);
  const std::vector<float*> factors = scale_views(scales, a.params, 1);
  Arrays buffers;
  if (!momentum_buffers.empty()) {
    buffers =
        moments_like("momentum_buffers", momentum_buffers, a.params, factors, Allowed::kSigned);
  } else if (!scales.empty()) {
    fail({"scales"}, "none without momentum", "some");
  }
  std::vector<float*> counts(a.params.size());
  if (!steps.empty() || !scales.empty() || !corrections.empty())
    counts = scalar_views("steps", steps, a.params);
  check_number("momentum", momentum, 0.0, std::numeric_limits<double>::infinity());
  check_number("dampening", dampening, 0.0, std::numeric_limits<double>::infinity());
  const SgdOptions options{momentum, dampening, nesterov, first, freeze_masked};

  std::vector<SgdTensor> tensors(a.params.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    SgdTensor& t = tensors[i];
    t.param = a.params[i].data;
    t.grad = a.grads[i].data;
    t.momentum = data_or_null(buffers, i);
    t.slow_save = data_or_null(a.slow_save, i);
    t.slow_from = data_or_null(a.slow_from, i);
    t.mask = a.masks.empty() ? nullptr : a.masks[i];
    t.numel = a.params[i].numel;
    t.dtype = a.params[i].dtype;
    t.momentum_dtype = buffers.empty() ? t.dtype : buffers[i].dtype;
    t.step = counts[i];
    t.corrections = a.corrections[i];
    t.scales = factors[i];
    t.row = row_of(a.params[i]);
  }
#if defined(USE_CUDA)
  if (scope.on_cuda()) return launch_sgd_step(tensors, options, a.inputs, scope.queue());
#endif
  const Runs runs(tensors);
  const SgdScalars s = sgd_scalars(options, step_numbers(a.inputs), step_state(a.inputs));
  count_skip(a.inputs, s.skip);
  for (const SgdTensor& t : tensors) {
    if (t.step != nullptr && !s.skip) *t.step += 1.0f;  // a skipped step does not count
    if (t.scales != nullptr && s.skip && s.first)
      std::fill_n(t.scales, t.numel / t.row * ((t.row + kGroup - 1) / kGroup), 0.0f);
  }
  parallel(runs, [&](int64_t begin, int64_t end) { sgd_step_cpu(tensors, runs, begin, end, s); });
}

}  // namespace

SFRON_LIST_OP("sgd_step_", sgd_step)

}  // namespace sfron
