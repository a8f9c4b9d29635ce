#include "adaptive_cross_entropy/adaptive_cross_entropy.h"

#include <tuple>

#include "formulas/weights.h"
#include "host/check.h"

namespace sfron {
namespace {

struct Batch {
  CrossEntropyRows rows;
  View logits;
  int64_t samples, tokens, count;  // count = samples * tokens
};

Batch checked(const Tensor& logits, const Tensor& labels, int64_t ignore_index) {
  const View x = float_view({"logits"}, logits.get()), y = any_view({"labels"}, labels.get());
  if (x.dim != 3 || x.sizes[2] == 0)
    fail({"logits"}, "[samples, tokens, classes]", shape_name(x.sizes, x.dim));
  check_shape({"labels"}, y, x.sizes, 2);
  check_dtype({"labels"}, y, codes().int64);
  const int64_t* label = static_cast<const int64_t*>(y.data);
  const int64_t classes = x.sizes[2];
  for (int64_t i = 0; i < y.numel; ++i) {
    if (label[i] == ignore_index || (label[i] >= 0 && label[i] < classes)) continue;
    fail({"labels"},
         "classes 0 to " + std::to_string(classes - 1) + " or " + std::to_string(ignore_index),
         std::to_string(label[i]));
  }
  return {{x.data, label, classes, ignore_index, x.dtype}, x, x.sizes[0], x.sizes[1], y.numel};
}

// A class costs about as much as four parameters of an optimizer step.
int64_t row_grain(int64_t classes) {
  return std::max<int64_t>(kGrain / 4 / classes, 1);
}

int64_t labelled(const Batch& batch, int64_t sample) {
  const int64_t* label = batch.rows.labels + sample * batch.tokens;
  return std::count_if(label, label + batch.tokens,
                       [&](int64_t l) { return l != batch.rows.ignore_index; });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaptive_cross_entropy(const Tensor& logits,
                                                                          const Tensor& labels,
                                                                          double temperature,
                                                                          double floor,
                                                                          int64_t ignore_index) {
  const Batch batch = checked(logits, labels, ignore_index);
  const double inf = std::numeric_limits<double>::infinity();
  check_number("temperature", temperature, 0.0, inf);
  check_number("floor", floor, 0.0, inf, true);

  const int32_t code = codes().float32;
  Tensor loss = new_tensor({}, code), losses = new_tensor({batch.samples}, code);
  Tensor weights = new_tensor({batch.samples}, code),
         log_normaliser = new_tensor({}, codes().float64);
  Tensor log_sums = new_tensor({2, batch.samples, batch.tokens}, code);

  std::vector<double> row_losses(batch.count), bases(batch.samples), raw(batch.samples);
  parallel(batch.count, row_grain(batch.rows.classes), [&](int64_t begin, int64_t end) {
    adaptive_cross_entropy_cpu(batch.rows, begin, end, batch.count, data_of<float>(log_sums),
                               row_losses.data());
  });
  parallel(batch.samples, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t counted = labelled(batch, i);
      double sum = 0.0;
      for (int64_t t = 0; t < batch.tokens; ++t) sum += row_losses[i * batch.tokens + t];
      const float mean = static_cast<float>(sum / std::max<int64_t>(counted, 1));
      data_of<float>(losses)[i] = mean;
      bases[i] = counted > 0 ? weight_base(mean, floor) : 0.0;
    }
  });
  const double unit = least_base(batch.samples, bases.data());
  parallel(batch.samples, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) raw[i] = raw_weight(bases[i], unit, temperature);
  });
  const WeightedLoss result =
      weighted_loss(batch.samples, data_of<float>(losses), raw.data(), data_of<float>(weights));
  *data_of<float>(loss) = result.loss;
  *data_of<double>(log_normaliser) = std::log(result.normaliser) - temperature * std::log(unit);
  return {loss, losses, weights, log_normaliser, log_sums};
}

// d (grad * loss) / d logits into `gradient`, which may be the logits' own memory.
void write_gradient(const Batch& batch, const Tensor& grad, const Tensor& weights,
                    const Tensor& log_sums, void* gradient) {
  const float upstream = *scalar_view({"grad"}, grad.get());
  const View w = any_view({"weights"}, weights.get()),
             sums = any_view({"log_sums"}, log_sums.get());
  check_shape({"weights"}, w, batch.logits.sizes, 1);
  check_dtype({"weights"}, w, codes().float32);
  const int64_t shape[] = {2, batch.samples, batch.tokens};
  check_shape({"log_sums"}, sums, shape, 3);
  check_dtype({"log_sums"}, sums, codes().float32);

  std::vector<float> row_weights(batch.count);
  for (int64_t i = 0; i < batch.samples; ++i) {
    const float counted = static_cast<float>(std::max<int64_t>(labelled(batch, i), 1));
    const float weight = (static_cast<const float*>(w.data)[i] / counted) * upstream;
    std::fill_n(row_weights.begin() + i * batch.tokens, batch.tokens, weight);
  }
  parallel(batch.count, row_grain(batch.rows.classes), [&](int64_t begin, int64_t end) {
    adaptive_cross_entropy_backward_cpu(batch.rows, begin, end, batch.count,
                                        static_cast<const float*>(sums.data), row_weights.data(),
                                        gradient);
  });
}

Tensor adaptive_cross_entropy_backward(const Tensor& grad, const Tensor& logits,
                                       const Tensor& labels, const Tensor& weights,
                                       const Tensor& log_sums, int64_t ignore_index) {
  const Batch batch = checked(logits, labels, ignore_index);
  Tensor gradient =
      new_tensor({batch.samples, batch.tokens, batch.rows.classes}, batch.logits.code);
  write_gradient(batch, grad, weights, log_sums, gradient.data_ptr());
  return gradient;
}

void adaptive_cross_entropy_backward_inplace(const Tensor& grad, const Tensor& logits,
                                             const Tensor& labels, const Tensor& weights,
                                             const Tensor& log_sums, int64_t ignore_index) {
  const Batch batch = checked(logits, labels, ignore_index);
  write_gradient(batch, grad, weights, log_sums, batch.logits.data);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> adaptive_cross_entropy_sum(
    const Tensor& logits, const Tensor& labels, double temperature, double floor,
    int64_t ignore_index, double scale) {
  const Batch batch = checked(logits, labels, ignore_index);
  if (batch.tokens != 1) {
    fail({"logits"}, "one token per sample, [samples, 1, classes]",
         shape_name(batch.logits.sizes, 3));
  }
  const double inf = std::numeric_limits<double>::infinity(),
               largest = std::numeric_limits<float>::max();
  check_number("temperature", temperature, 0.0, inf);
  check_number("floor", floor, 0.0, inf, true);
  check_number("scale", scale, -largest, largest);

  const int32_t code = codes().float32;
  Tensor total = new_tensor({}, code), losses = new_tensor({batch.samples}, code);
  Tensor weights = new_tensor({batch.samples}, code), normaliser = new_tensor({}, code);
  std::vector<double> raw(batch.samples);
  const RawWeight rule{temperature, floor, scale};
  float* loss = data_of<float>(losses);
  parallel(batch.samples, row_grain(batch.rows.classes), [&](int64_t begin, int64_t end) {
    adaptive_cross_entropy_sum_cpu(batch.rows, begin, end, rule, batch.logits.data, loss,
                                   raw.data());
  });
  *data_of<float>(normaliser) = static_cast<float>(
      weighted_loss(batch.samples, loss, raw.data(), data_of<float>(weights)).normaliser);
  double sum = 0.0;
  for (int64_t i = 0; i < batch.samples; ++i) sum += raw[i] * static_cast<double>(loss[i]);
  *data_of<float>(total) = static_cast<float>(sum * scale);
  return {total, losses, weights, normaliser};
}

// gradient *= factor; nothing is touched if that is 1, as it is where a backward pass starts.
void adaptive_cross_entropy_scale(const Tensor& gradient, const Tensor& factor) {
  const View view = float_view({"gradient"}, gradient.get());
  const float by = *scalar_view({"factor"}, factor.get());
  if (by == 1.0f) return;
  parallel(view.numel, kGrain,
           [&](int64_t begin, int64_t end) { scale_cpu(view.data, view.dtype, begin, end, by); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfron_fast, CPU, m) {
  m.impl("adaptive_cross_entropy", TORCH_BOX(&adaptive_cross_entropy));
  m.impl("adaptive_cross_entropy_backward", TORCH_BOX(&adaptive_cross_entropy_backward));
  m.impl("adaptive_cross_entropy_backward_", TORCH_BOX(&adaptive_cross_entropy_backward_inplace));
  m.impl("adaptive_cross_entropy_sum_", TORCH_BOX(&adaptive_cross_entropy_sum));
  m.impl("adaptive_cross_entropy_scale_", TORCH_BOX(&adaptive_cross_entropy_scale));
}

}  // namespace sfron
