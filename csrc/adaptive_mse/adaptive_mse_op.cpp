#include "adaptive_mse/adaptive_mse.h"

#include <tuple>

#include "formulas/weights.h"
#include "host/check.h"

namespace sfron {
namespace {

MseSamples checked(const Tensor& prediction, const Tensor& target) {
  const View x = float_view({"prediction"}, prediction.get()),
             y = any_view({"target"}, target.get());
  if (x.dim != 2) fail({"prediction"}, "[samples, elements]", shape_name(x.sizes, x.dim));
  check_shape({"target"}, y, x.sizes, 2);
  check_dtype({"target"}, y, x.code);
  return {x.data, y.data, x.sizes[0], x.sizes[1], x.dtype};
}

// Chunks of one thread.
int64_t chunk_grain(const MseSamples& t) {
  return std::max<int64_t>(kGrain / std::max<int64_t>(std::min(t.elements, kMseChunk), 1), 1);
}

// What the samples' losses are relative to [samples], each checked; null = to nothing.
const float* checked_reference(const MseSamples& batch, const MaybeTensor& reference, double floor,
                               double cap) {
  const double inf = std::numeric_limits<double>::infinity();
  if (cap != inf) check_number("cap", cap, floor, inf, true);
  if (!reference.has_value()) {
    if (cap != inf)
      fail({"reference"}, "losses [" + std::to_string(batch.samples) + "], with a cap", "None");
    return nullptr;
  }
  const View view = any_view({"reference"}, reference->get());
  check_shape({"reference"}, view, &batch.samples, 1);
  check_dtype({"reference"}, view, codes().float32);
  const float* usual = static_cast<const float*>(view.data);
  for (int64_t i = 0; i < batch.samples; ++i) {
    if (!(usual[i] > 0.0f && usual[i] < std::numeric_limits<float>::infinity()))
      fail({"reference"}, "finite losses > 0", number_name(usual[i]));
  }
  return usual;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> adaptive_mse(const Tensor& prediction,
                                                        const Tensor& target,
                                                        const MaybeTensor& reference,
                                                        double temperature, double floor, bool mean,
                                                        double cap) {
  const MseSamples batch = checked(prediction, target);
  const double inf = std::numeric_limits<double>::infinity();
  check_number("temperature", temperature, 0.0, inf);
  check_number("floor", floor, 0.0, inf, true);
  const float* usual = checked_reference(batch, reference, floor, cap);

  const int32_t code = codes().float32;
  Tensor loss = new_tensor({}, code), losses = new_tensor({batch.samples}, code);
  Tensor weights = new_tensor({batch.samples}, code),
         log_normaliser = new_tensor({}, codes().float64);

  const int64_t chunks = mse_chunks(batch);
  std::vector<double> partials(batch.samples * chunks), bases(batch.samples), raw(batch.samples);
  parallel(batch.samples * chunks, chunk_grain(batch), [&](int64_t begin, int64_t end) {
    adaptive_mse_cpu(batch, begin, end, partials.data());
  });
  const double divisor = mean ? std::max<int64_t>(batch.elements, 1) : 1;
  for (int64_t i = 0; i < batch.samples; ++i) {
    double sum = 0.0;
    for (int64_t c = 0; c < chunks; ++c) sum += partials[i * chunks + c];
    data_of<float>(losses)[i] = static_cast<float>(sum / divisor);
    bases[i] = weight_base(data_of<float>(losses)[i], floor, usual == nullptr ? 1.0f : usual[i]);
  }
  const double unit = least_base(batch.samples, bases.data());
  for (int64_t i = 0; i < batch.samples; ++i) raw[i] = raw_weight(bases[i], unit, temperature);
  const WeightedLoss result =
      usual == nullptr ? weighted_loss(batch.samples, data_of<float>(losses), raw.data(),
                                       data_of<float>(weights))
                       : relative_weighted_loss(batch.samples, data_of<float>(losses), raw.data(),
                                                bases.data(), usual, cap, data_of<float>(weights));
  *data_of<float>(loss) = result.loss;
  *data_of<double>(log_normaliser) = std::log(result.normaliser) - temperature * std::log(unit);
  return {loss, losses, weights, log_normaliser};
}

Tensor adaptive_mse_backward(const Tensor& grad, const Tensor& prediction, const Tensor& target,
                             const Tensor& weights, bool mean) {
  const MseSamples batch = checked(prediction, target);
  const float upstream = *scalar_view({"grad"}, grad.get());
  const View w = any_view({"weights"}, weights.get());
  check_shape({"weights"}, w, &batch.samples, 1);
  check_dtype({"weights"}, w, codes().float32);

  const float scale = static_cast<float>(mean ? 2.0 / std::max<int64_t>(batch.elements, 1) : 2.0);
  std::vector<float> sample_weights(batch.samples);
  for (int64_t i = 0; i < batch.samples; ++i) {
    sample_weights[i] = static_cast<const float*>(w.data)[i] * scale * upstream;
  }
  Tensor gradient =
      new_tensor({batch.samples, batch.elements}, any_view({"prediction"}, prediction.get()).code);
  parallel(batch.samples * mse_chunks(batch), chunk_grain(batch), [&](int64_t begin, int64_t end) {
    adaptive_mse_backward_cpu(batch, begin, end, sample_weights.data(), gradient.data_ptr());
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfron_fast, CPU, m) {
  m.impl("adaptive_mse", TORCH_BOX(&adaptive_mse));
  m.impl("adaptive_mse_backward", TORCH_BOX(&adaptive_mse_backward));
}

}  // namespace sfron
