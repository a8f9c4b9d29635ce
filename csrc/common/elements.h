#pragma once
// A tensor's elements as the loop of a kernel sees them: floats to get and to set. Where they are fp32 or bf16 they stay
// in memory and are converted in registers; fp16 goes through a scratch tile.
#include <type_traits>

#include "common/dtype.h"

namespace sfron {

template <DType kType>  // fp32 or bf16
class Direct {
 public:
  using Element = std::conditional_t<kType == DType::kFloat32, float, uint16_t>;

  // Elements from `at` on; null where the tensor is absent.
  SFRON_HD Direct(const void* data, DType, int64_t at, int64_t, float*)
      : data_(data == nullptr ? nullptr : static_cast<Element*>(const_cast<void*>(data)) + at) {}

  SFRON_HD float get(int64_t i) const {
    if constexpr (kType == DType::kFloat32) {
      return data_[i];
    } else {
      return from_bfloat16(data_[i]);
    }
  }
  SFRON_HD void set(int64_t i, float x) const {
    if constexpr (kType == DType::kFloat32) {
      data_[i] = x;
    } else {
      data_[i] = to_bfloat16(x);
    }
  }
  SFRON_HD void set_dithered(int64_t i, float x, uint32_t threshold) const {
    if constexpr (kType == DType::kBFloat16) data_[i] = to_bfloat16_dithered(x, threshold);
  }
  SFRON_HD void store() const {}
  SFRON_HD const Element* address() const { return data_; }

 private:
  Element* data_;
};

class Tiled {
 public:
  using Element = float;

  SFRON_HD Tiled(const void* data, DType dtype, int64_t at, int64_t n, float* scratch)
      : data_(const_cast<void*>(data)), dtype_(dtype), at_(at), n_(n),
        values_(data == nullptr ? nullptr : load_tile(data, dtype, at, n, scratch)) {}

  SFRON_HD float get(int64_t i) const { return values_[i]; }
  SFRON_HD void set(int64_t i, float x) const { values_[i] = x; }
  SFRON_HD void set_dithered(int64_t, float, uint32_t) const {}
  SFRON_HD void store() const { store_tile(data_, dtype_, at_, n_, values_); }
  SFRON_HD const float* address() const { return values_; }

 private:
  void* data_;
  DType dtype_;
  int64_t at_, n_;
  float* values_;  // [n]
};

// run(P*, S*), null pointers that say how the parameters and their state are seen.
template <class Run>
void with_elements(DType param, DType state, const Run& run) {
  using Float = Direct<DType::kFloat32>;
  using Half = Direct<DType::kBFloat16>;
  const bool wide = state == DType::kFloat32, half = state == DType::kBFloat16;
  if (param == DType::kFloat32 && wide) return run(static_cast<Float*>(nullptr), static_cast<Float*>(nullptr));
  if (param == DType::kFloat32 && half) return run(static_cast<Float*>(nullptr), static_cast<Half*>(nullptr));
  if (param == DType::kBFloat16 && wide) return run(static_cast<Half*>(nullptr), static_cast<Float*>(nullptr));
  if (param == DType::kBFloat16 && half) return run(static_cast<Half*>(nullptr), static_cast<Half*>(nullptr));
  run(static_cast<Tiled*>(nullptr), static_cast<Tiled*>(nullptr));
}

}  // namespace sfron
