// Drives every <op>_cpu over exactly sized, misaligned heap arrays under the address and
// undefined-behaviour sanitizers, in pieces as threads would, and compares with a plain loop over
// the same formula headers.
// `--plant overrun` and `--plant value` make one mistake each, which the run must report.
#include "adamw_step/adamw_step.h"
#include "adaptive_cross_entropy/adaptive_cross_entropy.h"
#include "adaptive_mse/adaptive_mse.h"
#include "arrays.h"
#include "compact.h"
#include "cpu/runs.h"
#include "fisher_accumulate/fisher_accumulate.h"
#include "interpolate/interpolate.h"
#include "linear_rows/linear_rows.h"
#include "masked_grad_norm/masked_grad_norm.h"
#include "saliency_mask/saliency_mask.h"
#include "sample_square_accumulate/sample_square_accumulate.h"
#include "sgd_step/sgd_step.h"
#include "soft_target_kl/soft_target_kl.h"

using namespace sfron;

namespace {

void interpolate(const char* plant) {
  std::vector<Buffer> slow = buffers(), fast = buffers_like(slow), slow2 = slow, fast2 = fast;
  const Lerp s = make_lerp(pick(5) * 0.25), wrong = make_lerp(0.1);
  std::vector<InterpolateTensor> tensors;
  for (size_t i = 0; i < slow.size(); ++i) {
    tensors.push_back({slow[i].data, fast[i].data, slow[i].numel, slow[i].dtype});
  }
  if (std::strcmp(plant, "overrun") == 0) tensors.back().numel += 1;
  const Runs runs(tensors);
  const Lerp& used = std::strcmp(plant, "value") == 0 ? wrong : s;
  in_pieces(runs.units(),
            [&](int64_t b, int64_t e) { interpolate_cpu(tensors, runs, b, e, used); });
  for (size_t t = 0; t < slow.size(); ++t) {
    for (int64_t i = 0; i < slow[t].numel; ++i) {
      const float x = interpolate_one(slow2[t].get(i), fast2[t].get(i), s);
      slow2[t].set(i, x);
      fast2[t].set(i, x);
    }
    expect(slow[t].same(slow2[t]) && fast[t].same(fast2[t]), "interpolate", "slow or fast", t);
  }
}

void sgd_step() {
  std::vector<Buffer> param = buffers(), grad = buffers_like(param), momentum = states_like(param);
  std::vector<Buffer> out = buffers_like(param), in = buffers_like(param);
  const std::vector<Buffer> param2 = param, momentum2 = momentum;
  const std::vector<Mask> masks = masks_like(param);
  const bool has_momentum = pick(2), has_out = pick(2), has_in = pick(2);
  SgdScalars s{};
  s.factor = random_float(), s.lr = 0.1f, s.momentum = 0.9f, s.undampened = 0.7f,
  s.weight_decay = 0.01f;
  s.decay = pick(2), s.nesterov = pick(2), s.first = pick(2), s.freeze = pick(2),
  s.skip = pick(4) == 0;
  s.measured = pick(2);
  s.slow = make_lerp(pick(5) * 0.25);
  std::vector<SgdTensor> tensors(param.size());
  for (size_t i = 0; i < param.size(); ++i) {
    tensors[i].param = param[i].data, tensors[i].grad = grad[i].data,
    tensors[i].mask = masks[i].data();
    tensors[i].momentum = has_momentum ? momentum[i].data : nullptr;
    tensors[i].slow_save = has_out ? out[i].data : nullptr,
    tensors[i].slow_from = has_in ? in[i].data : nullptr;
    tensors[i].numel = param[i].numel, tensors[i].dtype = param[i].dtype,
    tensors[i].momentum_dtype = momentum[i].dtype;
  }
  const Runs runs(tensors);
  in_pieces(runs.units(), [&](int64_t b, int64_t e) { sgd_step_cpu(tensors, runs, b, e, s); });
  for (size_t t = 0; t < param.size(); ++t) {
    Buffer p = param2[t], m = momentum2[t];
    if (has_out) expect(out[t].same(p), "sgd_step", "slow_save", t);
    for (int64_t i = 0; i < p.numel; ++i) {
      const bool selected = masks[t].selected(i);
      SgdElement e{p.get(i), m.get(i)};
      if (s.skip) {
        e.momentum = s.first && has_momentum ? 0.0f : e.momentum;
      } else if (has_momentum) {
        e = sgd_momentum_one(e, grad[t].get(i), selected, s);
      } else {
        e.param = sgd_one(e.param, grad[t].get(i), selected, s);
      }
      p.set(i, has_in ? lerp_one(in[t].get(i), e.param, s.slow) : e.param);
      m.set(i, e.momentum);
    }
    expect(param[t].same(p) && momentum[t].same(m), "sgd_step", "param or momentum", t);
  }
}

void adamw_step() {
  std::vector<Buffer> param = buffers(), grad = buffers_like(param), avg = states_like(param);
  std::vector<Buffer> sq = buffers_like(avg, true), top = buffers_like(avg, true);
  std::vector<Buffer> out = buffers_like(param), in = buffers_like(param);
  const std::vector<Buffer> param2 = param, avg2 = avg, sq2 = sq, top2 = top;
  const std::vector<Mask> masks = masks_like(param);
  const bool amsgrad = pick(2), has_out = pick(2), has_in = pick(2);
  AdamwScalars s{};
  s.factor = random_float(), s.keep = 0.99f, s.beta2 = 0.999f, s.rest2 = 0.001f,
  s.weight_decay = 0.01f;
  s.l2 = pick(2), s.freeze = pick(2), s.skip = pick(4) == 0, s.avg = make_lerp(0.1),
  s.slow = make_lerp(pick(5) * 0.25);
  s.measured = pick(2);
  const float scale = 0.01f, eps = 1e-6f;
  std::vector<float> steps(param.size());
  for (float& step : steps) step = static_cast<float>(pick(3000));
  std::vector<AdamwTensor> tensors(param.size());
  for (size_t i = 0; i < param.size(); ++i) {
    AdamwTensor& t = tensors[i] = AdamwTensor{};
    t.param = param[i].data, t.grad = grad[i].data, t.exp_avg = avg[i].data,
    t.exp_avg_sq = sq[i].data;
    t.max_exp_avg_sq = amsgrad ? top[i].data : nullptr, t.mask = masks[i].data(),
    t.numel = param[i].numel;
    t.slow_save = has_out ? out[i].data : nullptr, t.slow_from = has_in ? in[i].data : nullptr;
    t.dtype = param[i].dtype, t.state_dtype = avg[i].dtype;
    t.scale = scale, t.eps = eps, t.step = &steps[i];
  }
  const Runs runs(tensors);
  in_pieces(runs.units(), [&](int64_t b, int64_t e) { adamw_step_cpu(tensors, runs, b, e, s); });
  for (size_t t = 0; t < param.size(); ++t) {
    Buffer p = param2[t], m = avg2[t], v = sq2[t], w = top2[t];
    if (has_out) expect(out[t].same(p), "adamw_step", "slow_save", t);
    for (int64_t i = 0; i < p.numel; ++i) {
      AdamwElement e{p.get(i), m.get(i), v.get(i), w.get(i)};
      const float g = grad[t].get(i);
      const bool selected = masks[t].selected(i);
      if (!s.skip && amsgrad) e = adamw_one<true>(e, g, selected, scale, eps, s);
      if (!s.skip && !amsgrad) e = adamw_one<false>(e, g, selected, scale, eps, s);
      p.set(i, has_in ? lerp_one(in[t].get(i), e.param, s.slow) : e.param);
      const bool narrow = is_narrow(sq[t].dtype, param[t].dtype);
      m.set(i, narrow ? dithered(e.exp_avg, i, steps[t]) : e.exp_avg);
      v.set(i, narrow ? dithered(e.exp_avg_sq, i, steps[t]) : e.exp_avg_sq);
      if (amsgrad) w.set(i, e.max_exp_avg_sq);
    }
    const bool states = avg[t].same(m) && sq[t].same(v) && top[t].same(w);
    expect(param[t].same(p) && states, "adamw_step", "param or state", t);
  }
}

void lists() {  // norm, Fisher, saliency mask
  const std::vector<Buffer> grad = buffers(), retain = buffers(true, true), retain2 = retain;
  std::vector<Buffer> fisher = buffers(true, true);
  const std::vector<Buffer> fisher2 = fisher;
  const std::vector<Mask> masks = masks_like(grad);
  std::vector<MaskedGradNormTensor> norms;
  std::vector<FisherTensor> fishers;
  std::vector<SaliencyTensor> saliency;
  std::vector<std::vector<uint8_t>> packed;
  for (size_t t = 0; t < grad.size(); ++t)
    packed.emplace_back((grad[t].numel + 7) / 8, uint8_t{0xff});
  for (size_t t = 0; t < grad.size(); ++t) {
    float* sums = reinterpret_cast<float*>(fisher[t].data);
    norms.push_back({grad[t].data, masks[t].data(), grad[t].numel, grad[t].dtype});
    fishers.push_back({sums, grad[t].data, grad[t].numel, grad[t].dtype});
    saliency.push_back(
        {sums, reinterpret_cast<float*>(retain[t].data), packed[t].data(), grad[t].numel});
  }
  const Runs chunks(norms, kNormChunk), runs(fishers);
  std::vector<double> partials(chunks.units());
  in_pieces(chunks.units(), [&](int64_t b, int64_t e) {
    masked_grad_norm_cpu(norms, chunks, b, e, 0.3f, partials.data());
  });
  in_pieces(runs.units(),
            [&](int64_t b, int64_t e) { fisher_accumulate_cpu(fishers, runs, b, e, 0.3f); });
  const SaliencyScalars s{0.9f, 1e-15f};
  std::vector<std::atomic<int64_t>> counts(grad.size());
  in_pieces(runs.units(), [&](int64_t b, int64_t e) {
    saliency_mask_cpu(saliency, runs, b, e, s, counts.data());
  });

  double sum = 0.0, expected = 0.0;
  for (const double partial : partials) sum += partial;
  for (size_t t = 0; t < grad.size(); ++t) {
    int64_t count = 0;
    for (int64_t i = 0; i < grad[t].numel; ++i) {
      expected += masked_square_one(grad[t].get(i), masks[t].selected(i), 0.3f);
      expect(fisher[t].get(i) == fisher_accumulate_one(fisher2[t].get(i), grad[t].get(i), 0.3f),
             "fisher", "sum", i);
      expect(retain[t].get(i) == retain2[t].get(i), "saliency_mask", "retain", i);
      const bool selected = saliency_one(fisher[t].get(i), retain[t].get(i), s);
      expect(selected == (packed[t][i / 8] >> (i % 8) & 1), "saliency_mask", "bit", i);
      count += selected;
    }
    expect(counts[t] == count, "saliency_mask", "count", t);
    if (grad[t].numel % 8)
      expect(packed[t].back() >> (grad[t].numel % 8) == 0, "saliency_mask", "high bits", t);
  }
  expect(std::fabs(sum - expected) <= 1e-11 * expected, "masked_grad_norm", "sum", 0);
}

std::vector<int64_t> strided(int64_t count, int64_t stride) {
  std::vector<int64_t> offsets(count);
  for (int64_t i = 0; i < count; ++i) offsets[i] = i * stride;
  return offsets;
}

void sample_squares() {
  const int64_t samples = 1 + pick(10), positions = 1 + pick(20), rows = 1 + pick(70);
  const int64_t columns = 1 + pick(pick(2) == 0 ? 1100 : 70);
  const DType dtype = random_dtype();
  const Buffer delta(samples * positions * rows, dtype),
      input(samples * positions * columns, dtype);
  Buffer sums(rows * columns, DType::kFloat32);
  const Buffer before = sums;
  const bool turned = pick(2);  // positions lie together, not lanes
  const auto factor = [&](const Buffer& b, int64_t lanes, const std::vector<int64_t>& at_position,
                          const std::vector<int64_t>& at_lane) {
    return SampleFactor{b.data, positions * lanes, at_position.data(), at_lane.data()};
  };
  const auto position_of = [&](int64_t lanes) { return strided(positions, turned ? 1 : lanes); };
  const auto lane_of = [&](int64_t lanes) { return strided(lanes, turned ? positions : 1); };
  const std::vector<int64_t> dp = position_of(rows), dl = lane_of(rows), ip = position_of(columns),
                             il = lane_of(columns);
  SampleSquares t{};
  t.accumulator = reinterpret_cast<float*>(sums.data);
  t.deltas = factor(delta, rows, dp, dl), t.inputs = factor(input, columns, ip, il);
  t.samples = samples, t.positions = positions, t.rows = rows, t.columns = columns;
  t.block_rows = kSquareRows >> pick(3), t.dtype = dtype, t.weight = 0.3f;
  t.power = 1 + static_cast<int32_t>(pick(2));
  in_pieces(square_units(t), [&](int64_t b, int64_t e) { sample_square_accumulate_cpu(t, b, e); });
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += 1 + pick(9)) {
      double expected = before.get(r * columns + c), size = std::fabs(expected);
      for (int64_t s = 0; s < samples; ++s) {
        double sum = 0.0, parts = 0.0;
        for (int64_t p = 0; p < positions; ++p) {
          const double x = 1.0 * delta.get(s * positions * rows + dp[p] + dl[r]) *
                           input.get(s * positions * columns + ip[p] + il[c]);
          sum += x, parts += std::fabs(x);
        }
        expected += 0.3f * (t.power == 1 ? std::fabs(sum) : sum * sum);
        size += t.power == 1 ? parts : parts * parts;
      }
      const double error = std::fabs(sums.get(r * columns + c) - expected);
      expect(error <= 1e-5 * size, "sample_square_accumulate", "sum", r * columns + c);
    }
  }
}

void cross_entropy() {
  const int64_t classes = kSizes[1 + pick(12)], rows = pick(4);
  const Buffer logits(rows * classes, random_dtype());
  std::vector<int64_t> labels(rows);
  for (int64_t& label : labels) label = pick(4) == 0 ? -100 : pick(classes);
  const CrossEntropyRows t{logits.data, labels.data(), classes, -100, logits.dtype};
  std::vector<float> sums(2 * rows);
  std::vector<double> losses(rows);
  in_pieces(rows, [&](int64_t b, int64_t e) {
    adaptive_cross_entropy_cpu(t, b, e, rows, sums.data(), losses.data());
  });
  Buffer gradient(rows * classes, logits.dtype), expected(rows * classes, logits.dtype);
  const std::vector<float> weights(rows, 0.3f);
  in_pieces(rows, [&](int64_t b, int64_t e) {
    adaptive_cross_entropy_backward_cpu(t, b, e, rows, sums.data(), weights.data(), gradient.data);
  });
  Buffer over = logits, summed = logits, product = logits;
  const CrossEntropyRows same_memory{over.data, labels.data(), classes, -100, logits.dtype};
  in_pieces(rows, [&](int64_t b, int64_t e) {
    adaptive_cross_entropy_backward_cpu(same_memory, b, e, rows, sums.data(), weights.data(),
                                        over.data);
  });
  expect(over.same(gradient), "cross_entropy", "gradient over the logits", classes);
  // raw weights 1 and scale 0.3: the same gradient, and the losses in fp32
  const CrossEntropyRows own{summed.data, labels.data(), classes, -100, logits.dtype};
  std::vector<float> sum_losses(rows);
  std::vector<double> raw(rows);
  const RawWeight rule{0.0, 1e-6, 0.3f};
  in_pieces(rows, [&](int64_t b, int64_t e) {
    adaptive_cross_entropy_sum_cpu(own, b, e, rule, summed.data, sum_losses.data(), raw.data());
  });
  expect(summed.same(gradient), "cross_entropy", "gradient of the sum", classes);
  in_pieces(product.numel,
            [&](int64_t b, int64_t e) { scale_cpu(product.data, product.dtype, b, e, 0.3f); });
  for (int64_t i = 0; i < product.numel; ++i) expected.set(i, logits.get(i) * 0.3f);
  expect(product.same(expected), "cross_entropy", "product", classes);
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0.0;
    const bool counted = labels[r] >= 0;
    expect(sum_losses[r] == static_cast<float>(losses[r]) && raw[r] == counted, "cross_entropy",
           "sum", r);
    for (int64_t c = 0; c < classes; ++c)
      sum += std::exp(static_cast<double>(logits.get(r * classes + c)));
    const double loss = counted ? std::log(sum) - logits.get(r * classes + labels[r]) : 0.0;
    const LogSum found{sums[r], sums[rows + r]};
    const double lse = found.shift + found.log_sum,
                 near = 2e-6 * std::fmax(1.0, std::fabs(std::log(sum)));
    expect(std::fabs(lse - std::log(sum)) < near, "cross_entropy", "log-sum", r);
    expect(std::fabs(losses[r] - loss) < 2e-6, "cross_entropy", "loss", r);
    const Softmax softmax = weighted_softmax(found, 0.3f);
    for (int64_t c = 0; c < classes; ++c) {
      const float x = logits.get(r * classes + c),
                  own = cross_entropy_backward_label(found, x, 0.3f);
      const float g = c == labels[r] ? own : cross_entropy_backward_one(x, softmax);
      expected.set(r * classes + c, counted ? g : 0.0f);
    }
  }
  expect(gradient.same(expected), "cross_entropy", "gradient", classes);
}

void linear_rows() {
  const int64_t columns = kSizes[1 + pick(12)], rows = pick(4), start = pick(2) * 1000;
  Buffer logits(rows * columns, DType::kFloat32), before = logits;
  std::vector<int64_t> labels(rows);  // before, in or behind the tile
  for (int64_t& label : labels) label = start + (pick(3) - 1) * columns + pick(columns);
  const LogitTile t{reinterpret_cast<const float*>(logits.data), labels.data(), start, columns};
  std::vector<float> maximum(rows, -INFINITY), others(rows), picked(rows, 7.0f);
  in_pieces(rows, [&](int64_t b, int64_t e) {
    linear_log_sums_cpu(t, b, e, maximum.data(), others.data(), picked.data());
  });
  const std::vector<float> factor(rows, 0.3f), own(rows, -0.7f);
  const float softcap = pick(2) == 0 ? 0.0f : 3.0f;
  Buffer gradient(rows * columns, random_dtype()), expected = gradient;
  const TileGradient g{maximum.data(), factor.data(), own.data(),
                       softcap,        gradient.data, gradient.dtype};
  in_pieces(rows, [&](int64_t b, int64_t e) { linear_gradient_cpu(t, g, b, e); });
  expect(logits.same(before), "linear_rows", "logits", columns);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t label = labels[r] - start;
    const bool here = label >= 0 && label < columns;
    double sum = 0.0;
    for (int64_t c = 0; c < columns; ++c) {
      const float x = before.get(r * columns + c), slope = softcap == 0 ? 1 : cap_slope(x, softcap);
      if (c != label) sum += std::exp(static_cast<double>(x) - maximum[r]);
      const float g_one = c == label ? own[r] : linear_gradient_one(x, maximum[r], factor[r]);
      expected.set(r * columns + c, g_one * slope);
    }
    expect(std::fabs(others[r] - sum) <= 2e-6 * std::fmax(1.0, sum), "linear_rows", "sum", r);
    const float wanted = here ? before.get(r * columns + label) : 7.0f;
    expect(picked[r] == wanted, "linear_rows", "label", r);
  }
  expect(gradient.same(expected), "linear_rows", "gradient", columns);
  if (gradient.dtype != DType::kFloat32) return;
  TileGradient in_place = g;
  in_place.out = logits.data;
  in_pieces(rows, [&](int64_t b, int64_t e) { linear_gradient_cpu(t, in_place, b, e); });
  expect(logits.same(gradient), "linear_rows", "gradient over the logits", columns);
}

void mse() {
  const int64_t elements = kSizes[pick(14)], samples = pick(4);
  const Buffer x(samples * elements, random_dtype()), y(samples * elements, x.dtype);
  Buffer gradient = x, expected = x;
  const MseSamples t{x.data, y.data, samples, elements, x.dtype};
  std::vector<double> partials(samples * mse_chunks(t));
  const std::vector<float> weights(samples, 0.3f);
  const int64_t chunks = samples * mse_chunks(t);
  in_pieces(chunks, [&](int64_t b, int64_t e) { adaptive_mse_cpu(t, b, e, partials.data()); });
  in_pieces(chunks, [&](int64_t b, int64_t e) {
    adaptive_mse_backward_cpu(t, b, e, weights.data(), gradient.data);
  });
  double sum = 0.0, plain = 0.0;
  for (const double partial : partials) sum += partial;
  for (int64_t i = 0; i < x.numel; ++i) {
    plain += squared_error_one(x.get(i), y.get(i));
    expected.set(i, mse_backward_one(x.get(i), y.get(i), 0.3f));
  }
  expect(std::fabs(sum - plain) <= 1e-11 * plain && gradient.same(expected), "mse",
         "sum or gradient", elements);
}

void soft_targets() {
  const int64_t classes = kSizes[1 + pick(12)], rows = pick(4);
  const Buffer x(rows * classes, random_dtype()), y(rows * classes, x.dtype);
  Buffer gradient = x, expected = x;
  const bool weighted = pick(2), is_tilted = pick(2), of_classes = pick(2);
  std::vector<float> weights(rows), losses(rows), sums((of_classes ? 5 : 4) * rows);
  std::vector<float> tilt(classes), k(classes, 1.0f);
  for (float& weight : weights) weight = pick(4) == 0 ? 0.0f : random_float();
  for (int64_t c = 1; is_tilted && c < classes; ++c)
    tilt[c] = pick(4) == 0 ? -INFINITY : random_float();
  for (float& each : k) each = !of_classes ? 1.0f : pick(4) == 0 ? 0.0f : 1.0f + random_float();
  const double temperature = 1.0 + pick(4);
  KlRows t{x.data,      y.data, weighted ? weights.data() : nullptr, rows, classes,
           temperature, x.dtype};
  if (is_tilted) t.tilt = tilt.data();
  if (of_classes) t.class_weights = k.data();
  in_pieces(rows,
            [&](int64_t b, int64_t e) { soft_target_kl_cpu(t, b, e, losses.data(), sums.data()); });
  in_pieces(rows, [&](int64_t b, int64_t e) {
    soft_target_kl_backward_cpu(t, b, e, sums.data(), weights.data(), gradient.data);
  });
  const float inverse = static_cast<float>(1.0 / temperature);
  for (int64_t r = 0; r < rows; ++r) {
    const bool counted = !weighted || weights[r] != 0.0f;
    double sum = 0.0, teacher = 0.0, cross = 0.0, mass = 0.0;
    const LogSum q{sums[r], sums[rows + r]}, p{sums[2 * rows + r], sums[3 * rows + r]};
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t i = r * classes + c;
      const float tilted = y.get(i) + tilt[c], share = of_classes ? sums[4 * rows + r] : 1.0f;
      const double a = tilted / temperature, b = x.get(i) / temperature, power = std::exp(a);
      sum += std::exp(b), teacher += power, mass += k[c] * power;
      if (power != 0.0) cross += k[c] * power * (a - b);
      const Softmax weighted_q = weighted_softmax(q, weights[r] * share);
      Softmax weighted_p = weighted_softmax(p, weights[r]);
      weighted_p.factor *= k[c];
      const float g = kl_backward_one(x.get(i), tilted, inverse, weighted_q, weighted_p);
      expected.set(i, counted ? g : 0.0f);
    }
    mass /= teacher;
    const double loss =
        (cross / teacher + mass * (std::log(sum) - std::log(teacher))) * temperature * temperature;
    const double error = 4e-6 * temperature * temperature;
    expect(std::fabs(losses[r] - (counted ? loss : 0.0)) < error, "soft_target_kl", "loss", r);
    const double lse = q.shift / temperature + q.log_sum,
                 teacher_lse = p.shift / temperature + p.log_sum;
    expect(std::fabs(lse - (counted ? std::log(sum) : 0.0)) < 4e-6, "soft_target_kl", "log-sum", r);
    expect(std::fabs(teacher_lse - (counted ? std::log(teacher) : 0.0)) < 4e-6, "soft_target_kl",
           "teacher", r);
    expect(!of_classes || std::fabs(sums[4 * rows + r] - (counted ? mass : 0.0)) < 4e-6,
           "soft_target_kl", "mass", r);
  }
  expect(gradient.same(expected), "soft_target_kl", "gradient", classes);
}

}  // namespace

int main(int argc, char** argv) {
  const char* plant = argc == 3 && std::strcmp(argv[1], "--plant") == 0 ? argv[2] : "";
  for (int round = 0; round < 60; ++round) {
    interpolate(plant);
    sgd_step();
    adamw_step();
    compact_sgd_step();
    compact_adamw_step();
    lists();
    sample_squares();
    cross_entropy();
    linear_rows();
    mse();
    soft_targets();
  }
  std::puts("clean");
}
