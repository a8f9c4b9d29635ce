#pragma once
// What host and device share: the function mark, the dtype codes and the formulas that several ops
// need. Every formula is scalar, float in and float out, and written as single operations: the
// build forbids contraction (-ffp-contract=off, -fmad=false), so all processors and the reference
// compute the same bits.
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SFRON_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SFRON_HD \
  inline __attribute__((always_inline))  // must dissolve into the loop, or that does not vectorise
#else
#define SFRON_HD inline
#endif

namespace sfron {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

SFRON_HD int64_t dtype_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// Where a kernel is launched: torch's current stream, as a bare pointer.
struct Queue {
  int32_t device;
  void* stream;
};

// A number that may change from call to call: what a captured graph must follow lies in device
// memory.
struct Number {
  double given;
  const double* at;  // [1] or null: instead of `given`
};

SFRON_HD double value_of(const Number& n) {
  return n.at == nullptr ? n.given : *n.at;
}

SFRON_HD uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

SFRON_HD float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// A condition as bits, all or none, and the choice by it. `? :` would do, were it not for GCC: it
// makes branches of a condition that a loop does not change, computes in them what only one side
// needs, and keeps a loop with many scalar.
SFRON_HD uint32_t bits_if(bool condition) {
  return condition ? ~0u : 0u;
}

SFRON_HD float choose(uint32_t condition, float yes, float no) {
#if defined(__CUDA_ARCH__)
  return condition != 0 ? yes : no;
#else
  return float_of((bits_of(yes) & condition) | (bits_of(no) & ~condition));
#endif
}

// start + weight (end - start), taken from the nearer end as torch.lerp does. Both cases are one
// expression, because x - d * r and x + d * (-r) are the same bits.
struct Lerp {
  float coefficient;
  bool from_end;
};

SFRON_HD Lerp make_lerp(double weight) {
  if (weight < 0.5) return {static_cast<float>(weight), false};
  return {-static_cast<float>(1.0 - weight), true};
}

SFRON_HD float lerp_one(float start, float end, const Lerp& s) {
  return choose(bits_if(s.from_end), end, start) + (end - start) * s.coefficient;
}

// A sum of weighted squares, one more of them.
SFRON_HD float fisher_accumulate_one(float fisher, float grad, float weight) {
  return fisher + (grad * grad) * weight;
}

}  // namespace sfron
