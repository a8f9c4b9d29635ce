#include "linear_rows/linear_rows.h"

#include "host/check.h"

namespace sfron {
namespace {

struct CheckedTile {
  LogitTile tile;
  View values;
  int64_t rows;
};

CheckedTile checked(const Tensor& values, const Tensor& labels, int64_t start) {
  const View x = any_view({"values"}, values.get()), y = any_view({"labels"}, labels.get());
  if (x.dim != 2 || x.sizes[1] == 0)
    fail({"values"}, "[rows, columns]", shape_name(x.sizes, x.dim));
  check_dtype({"values"}, x, codes().float32);
  check_shape({"labels"}, y, x.sizes, 1);
  check_dtype({"labels"}, y, codes().int64);
  if (start < 0) fail({"start"}, "a class, 0 or more", std::to_string(start));
  const LogitTile tile{static_cast<const float*>(x.data), static_cast<const int64_t*>(y.data),
                       start, x.sizes[1]};
  return {tile, x, x.sizes[0]};
}

float* row_view(const char* name, const Tensor& tensor, const CheckedTile& t) {
  const View view = any_view({name}, tensor.get());
  check_shape({name}, view, t.values.sizes, 1);
  check_dtype({name}, view, codes().float32);
  return static_cast<float*>(view.data);
}

// A logit costs about as much as four parameters of an optimizer step.
int64_t row_grain(const CheckedTile& t) {
  return std::max<int64_t>(kGrain / 4 / t.tile.columns, 1);
}

void linear_log_sums(const Tensor& values, const Tensor& labels, int64_t start,
                     const Tensor& maximum, const Tensor& others, const Tensor& picked) {
  const CheckedTile t = checked(values, labels, start);
  float* const largest = row_view("maximum", maximum, t);
  float* const sums = row_view("others", others, t);
  float* const found = row_view("picked", picked, t);
  parallel(t.rows, row_grain(t), [&](int64_t begin, int64_t end) {
    linear_log_sums_cpu(t.tile, begin, end, largest, sums, found);
  });
}

void linear_gradient(const Tensor& values, const Tensor& labels, int64_t start, const Tensor& shift,
                     const Tensor& factor, const Tensor& label, std::optional<double> softcap,
                     const Tensor& out) {
  const CheckedTile t = checked(values, labels, start);
  const float* const shifts = row_view("shift", shift, t);
  const float* const factors = row_view("factor", factor, t);
  const float* const at_label = row_view("label", label, t);
  if (softcap.has_value())
    check_number("softcap", *softcap, 0.0, std::numeric_limits<double>::infinity(), true);
  const View result = float_view({"out"}, out.get());
  check_shape({"out"}, result, t.values.sizes, 2);
  const TileGradient g{shifts,      factors,
                       at_label,    static_cast<float>(softcap.value_or(0.0)),
                       result.data, result.dtype};
  parallel(t.rows, row_grain(t),
           [&](int64_t begin, int64_t end) { linear_gradient_cpu(t.tile, g, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfron_fast, CPU, m) {
  m.impl("linear_log_sums_", TORCH_BOX(&linear_log_sums));
  m.impl("linear_gradient_", TORCH_BOX(&linear_gradient));
}

}  // namespace sfron
