#include "sample_square_accumulate/sample_square_accumulate.h"

#include "host/check.h"

namespace sfron {
namespace {

// A tensor that is read where it lies.
struct StridedView {
  explicit StridedView(Name name, const Tensor& tensor)
      : view(float_view(name, tensor.get(), &strides)) {}

  int64_t* strides = nullptr;  // [dim], borrowed from the tensor
  View view;
};

// Of each element of the dimensions [first, last), the slowest first.
std::vector<int64_t> offsets_of(const StridedView& t, int64_t first, int64_t last) {
  std::vector<int64_t> offsets{0};
  for (int64_t d = first; d < last; ++d) {
    std::vector<int64_t> finer;
    finer.reserve(offsets.size() * t.view.sizes[d]);
    for (const int64_t offset : offsets) {
      for (int64_t i = 0; i < t.view.sizes[d]; ++i) finer.push_back(offset + i * t.strides[d]);
    }
    offsets = std::move(finer);
  }
  return offsets;
}

void check_shapes(const View& accumulator, const View& deltas, const View& inputs) {
  const std::string found = shape_name(deltas.sizes, deltas.dim);
  if (deltas.dim < 2) fail({"deltas"}, "[samples, *positions, outputs]", found);
  const int64_t shared = deltas.dim - 1;  // samples and positions
  bool same = inputs.dim > shared;
  for (int64_t d = 0; same && d < shared; ++d) same = inputs.sizes[d] == deltas.sizes[d];
  if (!same) {
    fail({"inputs"}, "[samples, *positions, *features] beside deltas " + found,
         shape_name(inputs.sizes, inputs.dim));
  }
  std::vector<int64_t> sizes{deltas.sizes[shared]};
  sizes.insert(sizes.end(), inputs.sizes + shared, inputs.sizes + inputs.dim);
  check_shape({"accumulator"}, accumulator, sizes.data(), static_cast<int64_t>(sizes.size()));
}

// Blocks of fewer rows where there would not be some for every thread; no bits depend on it.
int64_t block_rows(SampleSquares t) {
  const int64_t wanted = 3 * static_cast<int64_t>(torch::stable::get_num_threads());
  t.block_rows = kSquareRows;
  while (t.block_rows > 16 && square_units(t) < wanted) t.block_rows /= 2;
  return t.block_rows;
}

// Units that are work for one thread.
int64_t unit_grain(const SampleSquares& t) {
  const int64_t lines = t.samples * t.positions * std::min(t.rows, t.block_rows);
  return std::max<int64_t>(kGrain / std::max<int64_t>(lines * kSquareColumns, 1), 1);
}

void sample_square_accumulate(const Tensor& accumulator, const Tensor& deltas, const Tensor& inputs,
                              double weight, int64_t power) {
  const StridedView d({"deltas"}, deltas), x({"inputs"}, inputs);
  const View a = any_view({"accumulator"}, accumulator.get());
  check_dtype({"inputs"}, x.view, d.view.code);
  check_shapes(a, d.view, x.view);
  check_dtype({"accumulator"}, a, codes().float32);
  const double most = std::numeric_limits<float>::max();
  check_number("weight", weight, -most, most);
  if (power != 1 && power != 2) fail({"power"}, "1 or 2", std::to_string(power));
  if (a.numel == 0 || d.view.numel == 0) return;

  const int64_t shared = d.view.dim - 1;
  const std::vector<int64_t> delta_positions = offsets_of(d, 1, shared),
                             delta_rows = offsets_of(d, shared, d.view.dim);
  const std::vector<int64_t> input_positions = offsets_of(x, 1, shared),
                             input_columns = offsets_of(x, shared, x.view.dim);
  SampleSquares t{};
  t.accumulator = static_cast<float*>(a.data);
  t.deltas = {d.view.data, d.strides[0], delta_positions.data(), delta_rows.data()};
  t.inputs = {x.view.data, x.strides[0], input_positions.data(), input_columns.data()};
  t.samples = d.view.sizes[0];
  t.positions = static_cast<int64_t>(delta_positions.size());
  t.rows = static_cast<int64_t>(delta_rows.size());
  t.columns = static_cast<int64_t>(input_columns.size());
  t.block_rows = block_rows(t);
  t.dtype = d.view.dtype;
  t.weight = static_cast<float>(weight);
  t.power = static_cast<int32_t>(power);
  parallel(square_units(t), unit_grain(t),
           [&](int64_t begin, int64_t end) { sample_square_accumulate_cpu(t, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfron_fast, CPU, m) {
  m.impl("sample_square_accumulate_", TORCH_BOX(&sample_square_accumulate));
}

}  // namespace sfron
