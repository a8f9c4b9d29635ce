#pragma once
// A tensor's elements as the loop of a kernel sees them: floats, whatever the dtype. Where they are
// fp32 or bf16 they stay in memory and are converted in registers; fp16 goes through a scratch
// tile. SGD and the norm use tiles for bf16, too (tiles.h): measured, they would gain nothing, and
// SGD lose a tenth with AVX2.
#include "cpu/tiles.h"

namespace sfron {

struct BFloat16Cell {  // in memory; read and written as a float
  uint16_t bits;

  SFRON_HD operator float() const { return from_bfloat16(bits); }
  SFRON_HD float operator=(float x) {
    bits = to_bfloat16(x);
    return x;
  }
  SFRON_HD void set_dithered(float x, uint32_t threshold) {
    bits = to_bfloat16_dithered(x, threshold);
  }
};

template <class E>  // float or BFloat16Cell
class Direct {
 public:
  using Element = E;

  // Elements from `at` on; null where the tensor is absent.
  SFRON_HD Direct(const void* data, DType, int64_t at, int64_t, float*)
      : data_(data == nullptr ? nullptr : static_cast<E*>(const_cast<void*>(data)) + at) {}

  SFRON_HD E& operator[](int64_t i) const { return data_[i]; }
  SFRON_HD const E* address() const { return data_; }
  SFRON_HD void store() const {}

 private:
  E* data_;
};

class Tiled {  // fp16, and fp32 beside it
 public:
  using Element = float;

  SFRON_HD Tiled(const void* data, DType dtype, int64_t at, int64_t n, float* scratch)
      : values_(scratch), n_(n) {
    if (data == nullptr) return;
    if (dtype == DType::kFloat32) {
      values_ = static_cast<float*>(const_cast<void*>(data)) + at;
    } else {
      half_ = static_cast<uint16_t*>(const_cast<void*>(data)) + at;
      load_float16(half_, values_, n);
    }
  }

  SFRON_HD float& operator[](int64_t i) const { return values_[i]; }
  SFRON_HD const float* address() const { return values_; }
  SFRON_HD void store() const {
    if (half_ != nullptr) store_float16(values_, half_, n_);
  }

 private:
  float* values_;             // [n]
  uint16_t* half_ = nullptr;  // [n] where these are fp16
  int64_t n_;
};

template <class Elements>
struct As {};  // tells a kernel how it sees a tensor

// run(As<...>) for fp32 or bf16.
template <class Run>
void with_direct(DType dtype, const Run& run) {
  dtype == DType::kFloat32 ? run(As<Direct<float>>{}) : run(As<Direct<BFloat16Cell>>{});
}

// run(As<...>) for the elements of one dtype.
template <class Run>
void with_elements(DType dtype, const Run& run) {
  dtype == DType::kFloat16 ? run(As<Tiled>{}) : with_direct(dtype, run);
}

// run(As<...>, As<...>) for parameters and their state.
template <class Run>
void with_elements(DType param, DType state, const Run& run) {
  if (param == DType::kFloat16 || state == DType::kFloat16) return run(As<Tiled>{}, As<Tiled>{});
  with_direct(param, [&](auto p) { with_direct(state, [&](auto s) { run(p, s); }); });
}

}  // namespace sfron
