// The kernels of csrc/**/*.cu on the host (shim/cuda_runtime.h), against plain loops over the same
// formulas, bitwise. `host_tests` runs all, `host_tests interpolate` what one op shows of the
// launches; `host_tests overrun` and `host_tests mask` plant a fault that the sanitizer must
// report.
#include <array>
#include <string>

#include "cuda/launch.cuh"

#include "adamw_step/adamw_step.h"
#include "fisher_accumulate/fisher_accumulate.h"
#include "interpolate/interpolate.h"
#include "lists.h"
#include "masked_grad_norm/masked_grad_norm.h"
#include "saliency_mask/saliency_mask.h"
#include "sgd_step/sgd_step.h"

using namespace sfron;

const Queue kQueue{0, nullptr};
using Buffers = std::vector<Buffer>;

void test_interpolate() {
  Buffers slow, fast, expected;
  std::vector<InterpolateTensor> tensors;
  const double in_memory = chance(50) ? 0.3 : 0.75;
  const Number slow_lr = chance(50) ? Number{0.1, &in_memory} : Number{in_memory, nullptr};
  const Lerp s = make_lerp(in_memory);
  for (int64_t n = pick(1, 30); n > 0; --n) {
    const int64_t numel = odd_size();
    const DType dtype = any_dtype();
    slow.push_back(random_buffer(numel, dtype));
    fast.push_back(random_buffer(numel, dtype));
    expected.push_back(slow.back());
    for (int64_t i = 0; i < numel; ++i) {
      expected.back().set(i, interpolate_one(slow.back().get(i), fast.back().get(i), s));
    }
    tensors.push_back({slow.back().data(), fast.back().data(), numel, dtype});
  }
  launch_interpolate(tensors, slow_lr, kQueue);
  for (size_t i = 0; i < slow.size(); ++i)
    CHECK(slow[i].same(expected[i]) && fast[i].same(expected[i]));
}

void test_fisher() {
  const double in_memory = 0.37;
  const Number weight = chance(50) ? Number{9.0, &in_memory} : Number{in_memory, nullptr};
  Buffers fisher, grads, expected;
  std::vector<FisherTensor> tensors;
  for (int64_t n = pick(1, 30); n > 0; --n) {
    const int64_t numel = odd_size();
    grads.push_back(random_buffer(numel, any_dtype()));
    fisher.push_back(random_buffer(numel, DType::kFloat32, true));
    expected.push_back(fisher.back());
    for (int64_t i = 0; i < numel; ++i) {
      expected.back().set(i,
                          fisher_accumulate_one(fisher.back().get(i), grads.back().get(i), 0.37f));
    }
    float* sums = reinterpret_cast<float*>(fisher.back().data());
    tensors.push_back({sums, grads.back().data(), numel, grads.back().dtype()});
  }
  launch_fisher_accumulate(tensors, weight, kQueue);
  for (size_t i = 0; i < fisher.size(); ++i) CHECK(fisher[i].same(expected[i]));
}

// What an optimizer step may be given besides the tensors, at random.
struct StepCase {
  float norm = chance(20) ? INFINITY : 3.0f, scale = 4.0f, overflow = chance(20) ? 1.0f : 0.0f;
  std::array<double, 3> numbers{0.02, 0.1, 0.6};
  bool masks = chance(60), slow_save = chance(40), slow_from = chance(40), freeze = chance(50);
  StepInputs inputs{chance(50) ? &norm : nullptr,
                    chance(50) ? &scale : nullptr,
                    chance(50) ? &overflow : nullptr,
                    chance(50) ? numbers.data() : nullptr,
                    chance(50) ? &skipped : nullptr,
                    {0.01, chance(50) ? 0.0 : 0.05, 0.3},
                    1.5f,
                    chance(50)};
  mutable int64_t skipped = 5;

  int64_t counted(bool skip) const { return skip && inputs.skipped != nullptr ? 6 : 5; }
};

void test_sgd() {
  const StepCase c;
  const bool momentum = chance(70);
  const SgdOptions options{0.9, chance(50) ? 0.0 : 0.1, chance(50), chance(30), c.freeze};
  const SgdScalars s = sgd_scalars(options, step_numbers(c.inputs), step_state(c.inputs));
  Buffers param, grad, mom, out, in, want_param, want_mom, want_out;
  std::vector<std::vector<uint8_t>> masks;
  std::vector<SgdTensor> tensors;
  for (int64_t n = pick(1, 25); n > 0; --n) {
    const int64_t numel = odd_size();
    const DType dtype = any_dtype();
    param.push_back(random_buffer(numel, dtype));
    grad.push_back(random_buffer(numel, dtype));
    mom.push_back(random_buffer(numel, chance(50) ? dtype : other_state(dtype)));
    out.push_back(random_buffer(numel, dtype));
    in.push_back(random_buffer(numel, dtype));
    masks.push_back(random_mask(numel));
    const uint8_t* mask = c.masks && chance(80) && numel > 0 ? masks.back().data() : nullptr;
    want_out.push_back(c.slow_save ? param.back() : out.back());
    want_param.push_back(param.back());
    want_mom.push_back(mom.back());
    for (int64_t i = 0; i < numel; ++i) {
      float p = param.back().get(i), m = mom.back().get(i);
      const float g = grad.back().get(i);
      if (momentum && !s.skip) {
        const SgdElement e = sgd_momentum_one({p, m}, g, bit(mask, i), s);
        p = e.param;
        m = e.momentum;
      } else if (!s.skip) {
        p = sgd_one(p, g, bit(mask, i), s);
      } else if (s.first) {
        m = 0.0f;
      }
      if (c.slow_from) p = lerp_one(in.back().get(i), p, s.slow);
      want_param.back().set(i, p);
      if (momentum) want_mom.back().set(i, m);
    }
    tensors.push_back(
        {param.back().data(), grad.back().data(), momentum ? mom.back().data() : nullptr,
         c.slow_save ? out.back().data() : nullptr, c.slow_from ? in.back().data() : nullptr, mask,
         numel, dtype, mom.back().dtype()});
  }
  const Buffers grads_before = grad;
  launch_sgd_step(tensors, options, c.inputs, kQueue);
  CHECK(c.skipped == c.counted(s.skip));
  for (size_t i = 0; i < param.size(); ++i) {
    CHECK(param[i].same(want_param[i]) && mom[i].same(want_mom[i]) && out[i].same(want_out[i]));
    CHECK(grad[i].same(grads_before[i]));
  }
}

void test_adamw() {
  const StepCase c;
  const bool amsgrad = chance(40);
  const AdamwOptions options{0.9, 0.999, 1e-8, chance(50), c.freeze};
  const StepNumbers numbers = step_numbers(c.inputs);
  const AdamwScalars s = adamw_scalars(options, numbers, step_state(c.inputs));
  Buffers param, grad, avg, square, largest, out, in, want_param, want_avg, want_square,
      want_largest, want_out;
  std::vector<std::vector<uint8_t>> masks;
  std::vector<AdamwTensor> tensors;
  std::vector<float> steps(40), want_steps(40);
  for (int64_t n = pick(1, 25); n > 0; --n) {
    const int64_t numel = odd_size();
    const DType dtype = any_dtype(), state = chance(50) ? dtype : other_state(dtype);
    const size_t k = param.size();
    steps[k] = want_steps[k] = static_cast<float>(chance(70) ? 4 : pick(0, 3000));
    param.push_back(random_buffer(numel, dtype));
    grad.push_back(random_buffer(numel, dtype));
    avg.push_back(random_buffer(numel, state));
    square.push_back(random_buffer(numel, state, true));
    largest.push_back(random_buffer(numel, state, true));
    out.push_back(random_buffer(numel, dtype));
    in.push_back(random_buffer(numel, dtype));
    masks.push_back(random_mask(numel));
    const uint8_t* mask = c.masks && chance(80) && numel > 0 ? masks.back().data() : nullptr;
    want_out.push_back(c.slow_save ? param.back() : out.back());
    want_param.push_back(param.back());
    want_avg.push_back(avg.back());
    want_square.push_back(square.back());
    want_largest.push_back(largest.back());
    if (!s.skip) want_steps[k] += 1.0f;
    const int64_t step = static_cast<int64_t>(steps[k] + 1.0f);
    const Corrections r =
        adam_corrections(numbers.lr, options.beta1, options.beta2, options.eps, step);
    for (int64_t i = 0; i < numel; ++i) {
      AdamwElement e{param.back().get(i), avg.back().get(i), square.back().get(i),
                     amsgrad ? largest.back().get(i) : 0};
      const float g = grad.back().get(i);
      if (!s.skip && amsgrad) e = adamw_one<true>(e, g, bit(mask, i), r.scale, r.eps, s);
      if (!s.skip && !amsgrad) e = adamw_one<false>(e, g, bit(mask, i), r.scale, r.eps, s);
      if (c.slow_from) e.param = lerp_one(in.back().get(i), e.param, s.slow);
      want_param.back().set(i, e.param);
      const bool narrow = is_narrow(state, dtype);
      want_avg.back().set(i, narrow ? dithered(e.exp_avg, i, step) : e.exp_avg);
      want_square.back().set(i, narrow ? dithered(e.exp_avg_sq, i, step) : e.exp_avg_sq);
      if (amsgrad) want_largest.back().set(i, e.max_exp_avg_sq);
    }
    tensors.push_back(
        {param.back().data(), grad.back().data(), avg.back().data(), square.back().data(),
         amsgrad ? largest.back().data() : nullptr, c.slow_save ? out.back().data() : nullptr,
         c.slow_from ? in.back().data() : nullptr, mask, numel, dtype, state, 0, 0, &steps[k]});
  }
  const Buffers grads_before = grad;
  launch_adamw_step(tensors, options, c.inputs, kQueue);
  CHECK(c.skipped == c.counted(s.skip));
  CHECK(steps == want_steps);
  for (size_t i = 0; i < param.size(); ++i) {
    CHECK(param[i].same(want_param[i]) && avg[i].same(want_avg[i]) &&
          square[i].same(want_square[i]));
    CHECK(largest[i].same(want_largest[i]) && out[i].same(want_out[i]) &&
          grad[i].same(grads_before[i]));
  }
}

void test_norm() {
  Buffers grads;
  std::vector<std::vector<uint8_t>> masks;
  std::vector<MaskedGradNormTensor> tensors;
  const float scale = 8.0f;
  const bool scaled = chance(50);
  long double sum = 0.0L;
  for (int64_t n = pick(1, 30); n > 0; --n) {
    const int64_t numel = odd_size();
    grads.push_back(random_buffer(numel, any_dtype()));
    masks.push_back(random_mask(numel));
    const uint8_t* mask = chance(60) && numel > 0 ? masks.back().data() : nullptr;
    for (int64_t i = 0; i < numel; ++i) {
      if (!bit(mask, i)) grads.back().set(i, NAN);  // a deselected gradient must not matter
      sum += masked_square_one(grads.back().get(i), bit(mask, i), scaled ? 1.0f / scale : 1.0f);
    }
    tensors.push_back({grads.back().data(), mask, numel, grads.back().dtype()});
  }
  float first = -1.0f, second = -1.0f;
  launch_masked_grad_norm(tensors, scaled ? &scale : nullptr, &first, kQueue);
  // threads in another order
  launch_masked_grad_norm(tensors, scaled ? &scale : nullptr, &second, kQueue);
  CHECK(std::memcmp(&first, &second, 4) == 0);
  CHECK(std::fabs(first - static_cast<float>(std::sqrt(sum))) <= 6e-8f * first);
}

void test_saliency() {
  Buffers forget, retain;
  std::vector<std::vector<uint8_t>> masks;
  std::vector<SaliencyTensor> tensors;
  const SaliencyScalars s{0.8f, 1e-15f};
  for (int64_t n = pick(1, 30); n > 0; --n) {
    const int64_t numel = odd_size();
    forget.push_back(random_buffer(numel, DType::kFloat32, true));
    retain.push_back(random_buffer(numel, DType::kFloat32, true));
    masks.emplace_back((numel + 7) / 8, 0xa5);
  }
  for (size_t i = 0; i < masks.size(); ++i) {
    tensors.push_back({reinterpret_cast<float*>(forget[i].data()),
                       reinterpret_cast<float*>(retain[i].data()), masks[i].data(),
                       forget[i].numel()});
  }
  std::vector<int64_t> counts(masks.size(), -1);
  const Buffers forget_before = forget, retain_before = retain;
  launch_saliency_mask(tensors, s, counts.data(), kQueue);
  for (size_t i = 0; i < masks.size(); ++i) {
    std::vector<uint8_t> bits(masks[i].size());
    int64_t count = 0;
    for (int64_t k = 0; k < forget[i].numel(); ++k) {
      if (!saliency_one(forget[i].get(k), retain[i].get(k), s)) continue;
      bits[k / 8] |= static_cast<uint8_t>(1 << k % 8);
      ++count;
    }
    CHECK(masks[i] == bits && counts[i] == count);
    CHECK(forget[i].same(forget_before[i]) && retain[i].same(retain_before[i]));
  }
}

void test_packing();  // packing_tests.cpp
void test_tables();
void test_a_host_that_runs_ahead();
void test_capture();
void test_loading();
void test_launches();

void plant(const std::string& fault) {
  Buffer slow = random_buffer(2048, DType::kFloat32, false, false), fast = slow;
  const std::vector<uint8_t> mask(fault == "mask" ? 255 : 256);
  float norm = 0.0f;
  if (fault == "overrun") {
    launch_interpolate({{slow.data(), fast.data(), 2049, DType::kFloat32}}, {0.5, nullptr}, kQueue);
  }
  if (fault == "mask") {
    launch_masked_grad_norm({{slow.data(), mask.data(), 2048, DType::kFloat32}}, nullptr, &norm,
                            kQueue);
  }
}

int main(int count, char** words) {
  const std::string word = count > 1 ? words[1] : "";
  if (word == "overrun" || word == "mask") return plant(word), 0;
  for (int round = 0; round < 25; ++round) {
    test_interpolate();
    if (word == "interpolate") continue;
    test_fisher();
    test_sgd();
    test_adamw();
    test_norm();
    test_saliency();
  }
  test_tables();
  test_a_host_that_runs_ahead();
  test_capture();
  if (word == "interpolate") return 0;
  test_packing();
  test_loading();
  test_launches();
  std::puts("all host tests passed");
  return 0;
}
