#include "adamw_step/adamw_step.h"
#include "host/list_op.h"
#include "host/step_arguments.h"

namespace sfron {
namespace {

void check_beta(const char* name, double beta) {
  if (!(beta >= 0.0 && beta < 1.0)) fail({name}, "a number in [0, 1)", number_name(beta));
}

// The moments of a parameter are of one dtype.
void check_alike(const char* name, const Arrays& states, const Arrays& avgs) {
  for (size_t i = 0; i < states.size(); ++i) {
    if (states[i].dtype == avgs[i].dtype) continue;
    fail({name, static_cast<int64_t>(i)}, dtype_name(avgs[i].dtype) + ", as its exp_avg",
         dtype_name(states[i].dtype));
  }
}

void adamw_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                const TensorList& scales, const TensorList& steps, const TensorList& corrections,
                const TensorList& slow_save, const TensorList& slow_save_corrections,
                const TensorList& slow_from, const TensorList& slow_from_corrections,
                const TensorList& masks, const MaybeTensor& norm, const MaybeTensor& grad_scale,
                const MaybeTensor& found_inf, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool decoupled, bool maximize, bool freeze_masked,
                double max_norm, double slow_lr, const MaybeTensor& numbers,
                const MaybeTensor& skipped) {
  const DeviceScope scope(params);
  const StepArguments a = step_arguments(
      params, grads,
      {corrections, slow_save, slow_save_corrections, slow_from, slow_from_corrections}, masks,
      norm, grad_scale, found_inf, {lr, weight_decay, slow_lr}, numbers, skipped, max_norm,
      maximize);
  const std::vector<float*> factors = scale_views(scales, a.params, 2);
  const Arrays avgs = moments_like("exp_avgs", exp_avgs, a.params, factors, Allowed::kSigned);
  const Arrays squares =
      moments_like("exp_avg_sqs", exp_avg_sqs, a.params, factors, Allowed::kUnsigned);
  const Arrays largest =
      optional_arrays_like("max_exp_avg_sqs", max_exp_avg_sqs, a.params, Allowed::kState);
  if (!scales.empty() && !largest.empty())
    fail({"max_exp_avg_sqs"}, "none beside scales", "some of them");
  check_alike("exp_avg_sqs", squares, avgs);
  check_alike("max_exp_avg_sqs", largest, avgs);
  const std::vector<float*> counts = scalar_views("steps", steps, a.params);
  check_beta("beta1", beta1);
  check_beta("beta2", beta2);
  check_number("eps", eps, 0.0, std::numeric_limits<double>::infinity());

  const AdamwOptions options{beta1, beta2, eps, decoupled, freeze_masked};
  std::vector<AdamwTensor> tensors(a.params.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    AdamwTensor& t = tensors[i];
    t.param = a.params[i].data;
    t.grad = a.grads[i].data;
    t.step = counts[i];
    t.exp_avg = avgs[i].data;
    t.exp_avg_sq = squares[i].data;
    t.max_exp_avg_sq = data_or_null(largest, i);
    t.slow_save = data_or_null(a.slow_save, i);
    t.slow_from = data_or_null(a.slow_from, i);
    t.mask = a.masks.empty() ? nullptr : a.masks[i];
    t.numel = a.params[i].numel;
    t.dtype = a.params[i].dtype;
    t.state_dtype = avgs[i].dtype;
    t.corrections = a.corrections[i];
    t.scales = factors[i];
    t.row = row_of(a.params[i]);
  }
#if defined(USE_CUDA)
  if (scope.on_cuda()) return launch_adamw_step(tensors, options, a.inputs, scope.queue());
#endif
  const StepNumbers known = step_numbers(a.inputs);
  const AdamwScalars s = adamw_scalars(options, known, step_state(a.inputs));
  count_skip(a.inputs, s.skip);
  float counted = NAN;  // the step count of the bias; usually it is the same for all tensors
  Corrections bias{};
  for (AdamwTensor& t : tensors) {
    if (s.skip) break;  // a skipped step does not count
    const float step = *t.step += 1.0f;
    if (step != counted)
      bias = adam_corrections(known.lr, beta1, beta2, eps, static_cast<int64_t>(step));
    counted = step;
    t.scale = bias.scale;
    t.eps = bias.eps;
  }
  const Runs runs(tensors);
  parallel(runs, [&](int64_t begin, int64_t end) { adamw_step_cpu(tensors, runs, begin, end, s); });
}

}  // namespace

SFRON_LIST_OP("adamw_step_", adamw_step)

}  // namespace sfron
