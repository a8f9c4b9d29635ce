#include <tuple>

#include "host/check.h"
#include "soft_target_kl/soft_target_kl.h"

namespace sfron {
namespace {

KlRows checked(const Tensor& logits, const Tensor& teacher_logits, const MaybeTensor& weights,
               const MaybeTensor& class_bias, const MaybeTensor& class_weights,
               double temperature) {
  if (class_bias.has_value()) fail({"class_bias"}, "None", "a tensor");  // the formula's
  if (class_weights.has_value()) fail({"class_weights"}, "None", "a tensor");
  const View x = float_view({"logits"}, logits.get()),
             y = any_view({"teacher_logits"}, teacher_logits.get());
  if (x.dim != 2 || x.sizes[1] == 0)
    fail({"logits"}, "[samples, classes]", shape_name(x.sizes, x.dim));
  check_shape({"teacher_logits"}, y, x.sizes, 2);
  check_dtype({"teacher_logits"}, y, x.code);
  const float* w = nullptr;
  if (weights.has_value()) {
    const View view = any_view({"weights"}, weights->get());
    check_shape({"weights"}, view, x.sizes, 1);
    check_dtype({"weights"}, view, codes().float32);
    w = static_cast<const float*>(view.data);
  }
  check_number("temperature", temperature, 0.0, std::numeric_limits<double>::infinity(), true);
  return {x.data, y.data, w, x.sizes[0], x.sizes[1], temperature, x.dtype};
}

float weight_of(const KlRows& t, int64_t row) {
  return t.weights != nullptr ? t.weights[row] : static_cast<float>(1.0 / t.samples);
}

// A class of two tensors costs about as much as eight parameters of an optimizer step.
int64_t row_grain(int64_t classes) {
  return std::max<int64_t>(kGrain / 8 / classes, 1);
}

std::tuple<Tensor, Tensor, Tensor> soft_target_kl(
    const Tensor& logits, const Tensor& teacher_logits, const MaybeTensor& weights,
    const MaybeTensor& class_bias, const MaybeTensor& class_weights, double temperature) {
  const KlRows rows =
      checked(logits, teacher_logits, weights, class_bias, class_weights, temperature);
  const int32_t code = codes().float32;
  Tensor loss = new_tensor({}, code), losses = new_tensor({rows.samples}, code);
  Tensor log_sums = new_tensor({4, rows.samples}, code);
  parallel(rows.samples, row_grain(rows.classes), [&](int64_t begin, int64_t end) {
    soft_target_kl_cpu(rows, begin, end, data_of<float>(losses), data_of<float>(log_sums));
  });
  double sum = 0.0;  // in order, so threads cannot change the bits
  for (int64_t i = 0; i < rows.samples; ++i) {
    sum += static_cast<double>(weight_of(rows, i)) * static_cast<double>(data_of<float>(losses)[i]);
  }
  *data_of<float>(loss) = static_cast<float>(sum);
  return {loss, losses, log_sums};
}

Tensor soft_target_kl_backward(const Tensor& grad, const Tensor& logits,
                               const Tensor& teacher_logits, const MaybeTensor& weights,
                               const MaybeTensor& class_bias, const MaybeTensor& class_weights,
                               const Tensor& log_sums, double temperature) {
  const KlRows rows =
      checked(logits, teacher_logits, weights, class_bias, class_weights, temperature);
  const float upstream = *scalar_view({"grad"}, grad.get());
  const View sums = any_view({"log_sums"}, log_sums.get());
  const int64_t shape[] = {4, rows.samples};
  check_shape({"log_sums"}, sums, shape, 2);
  check_dtype({"log_sums"}, sums, codes().float32);

  std::vector<float> row_weights(rows.samples);
  for (int64_t i = 0; i < rows.samples; ++i) {
    row_weights[i] = weight_of(rows, i) * static_cast<float>(temperature) * upstream;
  }
  Tensor gradient =
      new_tensor({rows.samples, rows.classes}, any_view({"logits"}, logits.get()).code);
  parallel(rows.samples, row_grain(rows.classes), [&](int64_t begin, int64_t end) {
    soft_target_kl_backward_cpu(rows, begin, end, static_cast<const float*>(sums.data),
                                row_weights.data(), gradient.data_ptr());
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfron_fast, CPU, m) {
  m.impl("soft_target_kl", TORCH_BOX(&soft_target_kl));
  m.impl("soft_target_kl_backward", TORCH_BOX(&soft_target_kl_backward));
}

}  // namespace sfron
