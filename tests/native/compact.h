#pragma once
// The steps on what is kept in few bits, for the sanitizer harness: weights in two pieces, moments
// in codes, each with and without the other, beside a plain loop over the same formulas.
#include "adamw_step/adamw_step.h"
#include "arrays.h"
#include "cpu/runs.h"
#include "formulas/moment_codes.h"
#include "formulas/split_weights.h"
#include "sgd_step/sgd_step.h"

namespace {

// Whole numbers of one or two bytes, or none of zero bytes; else as Buffer.
struct Integers {
  int64_t numel, bytes;
  std::unique_ptr<char[]> memory;
  char* data;

  Integers(int64_t n, int64_t width) : numel(n), bytes(width) {
    const int64_t offset = pick(16) * width;
    memory.reset(new char[offset + n * width]);
    data = width == 0 ? nullptr : memory.get() + offset;
    for (int64_t i = 0; i < n * width; ++i) data[i] = static_cast<char>(random_word());
  }
  Integers(const Integers& other) : Integers(other.numel, other.bytes) {
    if (bytes != 0) std::memcpy(data, other.data, numel * bytes);
  }
  Integers(Integers&&) = default;

  template <class T>
  T get(int64_t i) const {
    T x;
    std::memcpy(&x, data + i * sizeof(T), sizeof(T));
    return x;
  }
  template <class T>
  void set(int64_t i, T x) {
    std::memcpy(data + i * sizeof(T), &x, sizeof(T));
  }
  bool same(const Integers& other) const {
    return bytes == 0 || std::memcmp(data, other.data, numel * bytes) == 0;
  }
};

// Weights of one piece or of two.
struct Weights {
  Buffer param;
  Integers correction;

  Weights(int64_t n, DType dtype, int64_t bytes) : param(n, dtype), correction(n, bytes) {}

  float get(int64_t i) const {
    if (correction.bytes == 0) return param.get(i);
    uint16_t bits;
    std::memcpy(&bits, param.data + 2 * i, 2);
    return correction.bytes == 1 ? join_one<8>(bits, correction.get<int8_t>(i))
                                 : join_one<0>(bits, correction.get<int16_t>(i));
  }
  void set(int64_t i, float x, int64_t step) {
    if (correction.bytes == 0) return param.set(i, x);
    const uint32_t threshold = dither_threshold(i, step);
    const SplitWeight w =
        correction.bytes == 1 ? split_one<8>(x, threshold) : split_one<0>(x, threshold);
    std::memcpy(param.data + 2 * i, &w.param, 2);
    if (correction.bytes == 1) {
      correction.set<int8_t>(i, static_cast<int8_t>(w.correction));
    } else {
      correction.set<int16_t>(i, static_cast<int16_t>(w.correction));
    }
  }
  bool same(const Weights& other) const {
    return param.same(other.param) && correction.same(other.correction);
  }
};

// One kind of moments: codes with a scale for each group, or `plain` ones.
struct Average {
  Buffer plain;
  Integers codes;
  std::vector<float> scales;  // [groups]

  Average(int64_t n, DType dtype, bool positive, int64_t groups)
      : plain(groups == 0 ? n : 0, dtype, positive), codes(n, groups != 0), scales(groups) {
    for (float& scale : scales) scale = std::fabs(random_float());
  }

  template <bool kSigned>
  float get(int64_t i, int64_t group) const {
    if (codes.bytes == 0) return plain.get(i);
    return kSigned ? decode_one<true>(codes.get<int8_t>(i), scales[group])
                   : decode_one<false>(codes.get<uint8_t>(i), scales[group]);
  }
  // Elements [at, at + values.size()), one group if there are codes.
  template <bool kSigned>
  void set(int64_t at, int64_t group, const std::vector<float>& values, bool dithers,
           int64_t step) {
    int32_t most = 0;
    for (const float x : values) most = std::max(most, size_bits(x));
    if (codes.bytes != 0) scales[group] = scale_of(most);
    for (size_t k = 0; k < values.size(); ++k) {
      const int64_t i = at + static_cast<int64_t>(k);
      if (codes.bytes != 0) {
        const int32_t code =
            encode_one<kSigned>(values[k], 1.0f / scales[group], dither_threshold(i, step));
        codes.set<uint8_t>(i, static_cast<uint8_t>(code));
      } else {
        plain.set(i, dithers ? dithered(values[k], i, static_cast<float>(step)) : values[k]);
      }
    }
  }
  bool same(const Average& other) const {
    return plain.same(other.plain) && codes.same(other.codes) && scales == other.scales;
  }
};

struct Shape {
  int64_t rows, row, groups;  // groups: of all rows, 0 without codes

  static Shape random(bool coded) {
    const int64_t rows = pick(5), row = coded ? kCodedUnit * (1 + pick(26)) : 1 + pick(700);
    return {rows, row, coded ? rows * ((row + kGroup - 1) / kGroup) : 0};
  }
  int64_t numel() const { return rows * row; }
  // body(at, n, group) for each group, or for each row.
  template <class Body>
  void each(const Body& body) const {
    for (int64_t at = 0, group = 0; at < numel(); ++group) {
      const int64_t n = groups == 0 ? row : group_size(at, row);
      body(at, n, group);
      at += n;
    }
  }
};

struct CompactTensor {
  Shape shape;
  Weights param, out, in;
  Buffer grad;
  Average m, v;
  Mask mask;
  float step;
  std::vector<float> scales;  // [groups, kinds], as the ops take them

  static CompactTensor random(int64_t kinds) {
    const bool coded = pick(3) != 0;
    const int64_t bytes = pick(3);
    const DType dtype = bytes != 0 ? DType::kBFloat16 : random_dtype();
    const DType state = bytes != 0 && pick(2) ? DType::kFloat32 : dtype;
    const Shape shape = Shape::random(coded);
    const int64_t n = shape.numel();
    CompactTensor t{shape,
                    {n, dtype, bytes},
                    {n, dtype, bytes},
                    {n, dtype, bytes},
                    {n, dtype},
                    {n, state, false, shape.groups},
                    {n, state, true, shape.groups},
                    Mask(n),
                    static_cast<float>(pick(3000)),
                    {}};
    for (int64_t g = 0; g < shape.groups; ++g) {
      t.scales.push_back(t.m.scales[g]);
      if (kinds == 2) t.scales.push_back(t.v.scales[g]);
    }
    return t;
  }
  WeightCorrections corrections(bool has_out, bool has_in) const {
    if (param.correction.bytes == 0) return {};
    return {param.correction.data, has_out ? out.correction.data : nullptr,
            has_in ? in.correction.data : nullptr, param.correction.bytes};
  }
  // What the step should have made, scales included, and what the weights were before.
  void compare(const CompactTensor& wanted, const Weights& before, int64_t kinds, bool has_out,
               const char* op, size_t i) {
    for (int64_t g = 0; g < shape.groups; ++g) {
      m.scales[g] = scales[g * kinds];
      if (kinds == 2) v.scales[g] = scales[g * kinds + 1];
    }
    expect(param.same(wanted.param), op, "compact param", i);
    expect(m.same(wanted.m) && v.same(wanted.v), op, "compact moments", i);
    if (has_out) expect(out.same(before), op, "compact slow_save", i);
  }
};

template <class Tensor>
void describe(Tensor& t, CompactTensor& c, bool has_out, bool has_in) {
  t.param = c.param.param.data, t.grad = c.grad.data, t.mask = c.mask.data();
  t.slow_save = has_out ? c.out.param.data : nullptr;
  t.slow_from = has_in ? c.in.param.data : nullptr;
  t.numel = c.shape.numel(), t.dtype = c.param.param.dtype, t.step = &c.step;
  t.corrections = c.corrections(has_out, has_in);
  t.scales = c.shape.groups == 0 ? nullptr : c.scales.data(), t.row = c.shape.row;
}

inline char* data_of(const Average& a) {
  return a.codes.bytes != 0 ? a.codes.data : a.plain.data;
}

inline std::vector<CompactTensor> compact_tensors(int64_t kinds) {
  std::vector<CompactTensor> list;
  for (int i = 0; i < 8; ++i) list.push_back(CompactTensor::random(kinds));
  return list;
}

void compact_adamw_step() {
  std::vector<CompactTensor> found = compact_tensors(2);
  const bool has_out = pick(2), has_in = pick(2);
  AdamwScalars s{};
  s.factor = random_float(), s.keep = 0.99f, s.beta2 = 0.999f, s.rest2 = 0.001f,
  s.weight_decay = 0.01f, s.l2 = pick(3) == 0, s.freeze = pick(3) == 0, s.skip = pick(4) == 0,
  s.avg = make_lerp(pick(4) == 0 ? 0.9 : 0.1), s.slow = make_lerp(pick(5) * 0.25),
  s.measured = pick(2);
  const float scale = 0.01f, eps = 1e-6f;
  const std::vector<CompactTensor> old = found;
  std::vector<AdamwTensor> tensors(found.size());
  for (size_t i = 0; i < found.size(); ++i) {
    AdamwTensor& t = tensors[i] = AdamwTensor{};
    describe(t, found[i], has_out, has_in);
    t.exp_avg = data_of(found[i].m), t.exp_avg_sq = data_of(found[i].v);
    t.state_dtype = found[i].m.plain.dtype, t.scale = scale, t.eps = eps;
  }
  const Runs runs(tensors);
  in_pieces(runs.units(), [&](int64_t b, int64_t e) { adamw_step_cpu(tensors, runs, b, e, s); });
  for (size_t i = 0; i < found.size(); ++i) {
    CompactTensor wanted = old[i];
    const CompactTensor& was = old[i];
    const int64_t step = static_cast<int64_t>(was.step) + s.skip;
    const bool narrow =
        is_narrow(was.m.plain.dtype, was.grad.dtype, was.param.correction.bytes != 0);
    was.shape.each([&](int64_t at, int64_t n, int64_t group) {
      std::vector<float> m, v;
      for (int64_t k = at; k < at + n; ++k) {
        AdamwElement e{was.param.get(k), was.m.get<true>(k, group), was.v.get<false>(k, group), 0};
        if (!s.skip) {
          e = adamw_one<false>(e, was.grad.get(k), was.mask.selected(k), scale, eps, s);
          m.push_back(e.exp_avg), v.push_back(e.exp_avg_sq);
        }
        if (has_in) e.param = lerp_one(was.in.get(k), e.param, s.slow);
        if (has_in || !s.skip) wanted.param.set(k, e.param, step);
      }
      if (s.skip) return;
      wanted.m.set<true>(at, group, m, narrow, step);
      wanted.v.set<false>(at, group, v, narrow, step);
    });
    found[i].compare(wanted, was.param, 2, has_out, "adamw_step", i);
  }
}

void compact_sgd_step() {
  std::vector<CompactTensor> found = compact_tensors(1);
  const bool has_out = pick(2), has_in = pick(2);
  SgdScalars s{};
  s.factor = random_float(), s.lr = 0.1f, s.momentum = 0.9f, s.undampened = 0.7f,
  s.weight_decay = 0.01f, s.decay = pick(2), s.nesterov = pick(2), s.first = pick(4) == 0,
  s.freeze = pick(2), s.slow = make_lerp(pick(5) * 0.25), s.measured = pick(2);
  const std::vector<CompactTensor> old = found;
  std::vector<SgdTensor> tensors(found.size());
  for (size_t i = 0; i < found.size(); ++i) {
    SgdTensor& t = tensors[i] = SgdTensor{};
    describe(t, found[i], has_out, has_in);
    t.momentum = data_of(found[i].m), t.momentum_dtype = found[i].m.plain.dtype;
  }
  const Runs runs(tensors);
  in_pieces(runs.units(), [&](int64_t b, int64_t e) { sgd_step_cpu(tensors, runs, b, e, s); });
  for (size_t i = 0; i < found.size(); ++i) {
    CompactTensor wanted = old[i];
    const CompactTensor& was = old[i];
    const int64_t step = static_cast<int64_t>(was.step);
    was.shape.each([&](int64_t at, int64_t n, int64_t group) {
      std::vector<float> m;
      for (int64_t k = at; k < at + n; ++k) {
        SgdElement e{was.param.get(k), was.m.get<true>(k, group)};
        e = sgd_momentum_one(e, was.grad.get(k), was.mask.selected(k), s);
        m.push_back(e.momentum);
        if (has_in) e.param = lerp_one(was.in.get(k), e.param, s.slow);
        wanted.param.set(k, e.param, step);
      }
      wanted.m.set<true>(at, group, m, false, step);
    });
    found[i].compare(wanted, was.param, 1, has_out, "sgd_step", i);
  }
}

}  // namespace
