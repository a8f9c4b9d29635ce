#include <algorithm>
#include <tuple>

#include "host/check.h"
#include "soft_target_kl/soft_target_kl.h"

namespace sfron {
namespace {

// Numbers [size] beside the logits; null = none.
const float* constants(const char* name, const MaybeTensor& given, const int64_t* size) {
  if (!given.has_value()) return nullptr;
  const View view = any_view({name}, given->get());
  check_shape({name}, view, size, 1);
  check_dtype({name}, view, codes().float32);
  return static_cast<const float*>(view.data);
}

constexpr float kInf = std::numeric_limits<float>::infinity();

// Of x [n]; counted, as a loop that may fail would look at one number at a time.
template <class Allowed>
void check_each(const char* name, const float* x, int64_t n, const char* expected,
                const Allowed& allowed) {
  int32_t refused = 0;
  for (int64_t i = 0; i < n; ++i) refused += !allowed(x[i]);
  if (refused == 0) return;
  const float* first = std::find_if_not(x, x + n, allowed);
  fail({name}, expected, number_name(*first));
}

// Beside the teacher's logits, which are yet to be divided by T: T class_bias [classes].
std::vector<float> checked_tilt(const float* bias, int64_t classes, double temperature) {
  if (bias == nullptr) return {};
  check_each("class_bias", bias, classes, "numbers below inf",
             [](float each) { return each < kInf; });
  std::vector<float> tilt(classes);
  int32_t possible = 0;
  for (int64_t i = 0; i < classes; ++i) {
    possible += bias[i] > -kInf;
    tilt[i] = bias[i] * static_cast<float>(temperature);
  }
  if (possible == 0) fail({"class_bias"}, "a class that is not forbidden", "only -inf");
  return tilt;
}

struct Checked {
  KlRows rows;  // borrows the tilt
  std::vector<float> tilt;
};

Checked checked(const Tensor& logits, const Tensor& teacher_logits, const MaybeTensor& weights,
                const MaybeTensor& class_bias, const MaybeTensor& class_weights,
                double temperature) {
  const View x = float_view({"logits"}, logits.get()),
             y = any_view({"teacher_logits"}, teacher_logits.get());
  if (x.dim != 2 || x.sizes[1] == 0)
    fail({"logits"}, "[samples, classes]", shape_name(x.sizes, x.dim));
  check_shape({"teacher_logits"}, y, x.sizes, 2);
  check_dtype({"teacher_logits"}, y, x.code);
  const int64_t samples = x.sizes[0], classes = x.sizes[1];
  const float* w = constants("weights", weights, &samples);
  const float* bias = constants("class_bias", class_bias, &classes);
  const float* k = constants("class_weights", class_weights, &classes);
  check_number("temperature", temperature, 0.0, kInf, true);
  std::vector<float> tilt = checked_tilt(bias, classes, temperature);
  if (k != nullptr) {
    check_each("class_weights", k, classes, "finite numbers >= 0",
               [](float each) { return each >= 0.0f && each < kInf; });
  }
  KlRows rows{x.data, y.data, w, samples, classes, temperature, x.dtype};
  if (bias != nullptr) rows.tilt = tilt.data();
  rows.class_weights = k;
  return {rows, std::move(tilt)};  // what moves keeps its memory
}

// How many numbers of a row the gradient needs again.
int64_t log_sums_of(const KlRows& t) {
  return t.class_weights == nullptr ? 4 : 5;
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
  const Checked given =
      checked(logits, teacher_logits, weights, class_bias, class_weights, temperature);
  const KlRows& rows = given.rows;
  const int32_t code = codes().float32;
  Tensor loss = new_tensor({}, code), losses = new_tensor({rows.samples}, code);
  Tensor log_sums = new_tensor({log_sums_of(rows), rows.samples}, code);
  parallel(rows.samples, row_grain(rows.classes), [&](int64_t begin, int64_t end) {
    soft_target_kl_cpu(rows, begin, end, data_of<float>(losses), data_of<float>(log_sums));
  });
  double sum = 0.0;  // in order, so threads cannot change the bits
  const float* each = data_of<float>(losses);
  for (int64_t i = 0; i < rows.samples; ++i)
    sum += static_cast<double>(weight_of(rows, i)) * static_cast<double>(each[i]);
  *data_of<float>(loss) = static_cast<float>(sum);
  return {loss, losses, log_sums};
}

Tensor soft_target_kl_backward(const Tensor& grad, const Tensor& logits,
                               const Tensor& teacher_logits, const MaybeTensor& weights,
                               const MaybeTensor& class_bias, const MaybeTensor& class_weights,
                               const Tensor& log_sums, double temperature) {
  const Checked given =
      checked(logits, teacher_logits, weights, class_bias, class_weights, temperature);
  const KlRows& rows = given.rows;
  const float upstream = *scalar_view({"grad"}, grad.get());
  const View sums = any_view({"log_sums"}, log_sums.get());
  const int64_t shape[] = {log_sums_of(rows), rows.samples};
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
