#pragma once
// How a thread holds elements: a Group of 4 or 8 neighbours, moved by 16-byte accesses whatever the
// dtype, or a single element of any dtype for tails and for pointers that are not at a multiple of
// 16 bytes.
#include <cuda_runtime.h>

#include "formulas/dtype.h"

namespace sfron {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

struct AnyElement {};  // the dtype is known at run time only

__device__ __forceinline__ float widen(BFloat16 x) {
  return from_bfloat16(x.bits);
}

// The processor's conversions where it has them; they differ from the formulas in the payload of a
// NaN only.
__device__ __forceinline__ float widen(Float16 x) {
#if defined(__CUDACC__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return from_float16(x.bits);
#endif
}

__device__ __forceinline__ void narrow(float x, Float16& to) {
#if defined(__CUDACC__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = to_float16(x);
#endif
}

__device__ __forceinline__ void narrow(float x, BFloat16& to) {
#if defined(__CUDACC__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = to_bfloat16(x);
#endif
}

// Pointers that come out of a table: the compiler cannot know that they are global, and generic
// accesses cost more.
template <class T>
__device__ __forceinline__ T* in_global(T* data) {
  __builtin_assume(__isGlobal(data));
  return data;
}

// One 16-byte store; the compiler would split the assignment in four.
__device__ __forceinline__ void store_16(uint4* to, uint4 x) {
#if defined(__CUDACC__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
#else
  *to = x;
#endif
}

// The group of a kernel whose parameters are E and their state S: 16 bytes of the narrower, and a
// whole mask nibble or byte.
template <class E, class S = E>
constexpr int kGroupOf = 16 / (sizeof(E) < sizeof(S) ? sizeof(E) : sizeof(S));

// Kept as 32-bit words, which the compiler leaves in registers; arrays of 16-bit elements it would
// not.
template <class E, int kCount>
struct Group {
  static constexpr int kWords = kCount * sizeof(E) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const void* data, DType, int64_t at) {
    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const E*>(in_global(data)) + at);
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      const uint4 pack = from[w / 4];
      words[w] = pack.x;
      words[w + 1] = pack.y;
      words[w + 2] = pack.z;
      words[w + 3] = pack.w;
    }
  }
  __device__ __forceinline__ void store(void* data, int64_t at) const {
    uint4* to = reinterpret_cast<uint4*>(static_cast<E*>(in_global(data)) + at);
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      store_16(to + w / 4, make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]));
    }
  }
  __device__ __forceinline__ float get(int k) const {
    if constexpr (sizeof(E) == 4) {
      return float_of(words[k]);
    } else {
      return widen(E{static_cast<uint16_t>(words[k / 2] >> (k % 2 * 16))});
    }
  }
  __device__ __forceinline__ void set(int k, float x) {
    if constexpr (sizeof(E) == 4) {
      words[k] = bits_of(x);
    } else {
      E narrowed;
      narrow(x, narrowed);
      set_bits(k, narrowed.bits);
    }
  }
  __device__ __forceinline__ void set_bits(int k, uint16_t bits) {  // of a 16-bit element
    const uint32_t other = words[k / 2] & (k % 2 ? 0x0000ffffu : 0xffff0000u);
    words[k / 2] = other | static_cast<uint32_t>(bits) << (k % 2 * 16);
  }
};

template <>
struct Group<AnyElement, 1> {
  uint32_t raw;  // as in memory: a copy keeps its bits
  DType dtype;

  __device__ __forceinline__ void load(const void* data, DType type, int64_t at) {
    dtype = type;
    if (type == DType::kFloat32) {
      raw = static_cast<const uint32_t*>(in_global(data))[at];
    } else {
      raw = static_cast<const uint16_t*>(in_global(data))[at];
    }
  }
  __device__ __forceinline__ void store(void* data, int64_t at) const {
    if (dtype == DType::kFloat32) {
      static_cast<uint32_t*>(in_global(data))[at] = raw;
    } else {
      static_cast<uint16_t*>(in_global(data))[at] = static_cast<uint16_t>(raw);
    }
  }
  __device__ __forceinline__ float get(int) const {
    if (dtype == DType::kFloat32) return float_of(raw);
    const uint16_t half = static_cast<uint16_t>(raw);
    return dtype == DType::kBFloat16 ? widen(BFloat16{half}) : widen(Float16{half});
  }
  __device__ __forceinline__ void set(int, float x) {
    BFloat16 b;
    Float16 h;
    narrow(x, b);
    narrow(x, h);
    raw = dtype == DType::kFloat32 ? bits_of(x) : dtype == DType::kBFloat16 ? b.bits : h.bits;
  }
  __device__ __forceinline__ void set_bits(int, uint16_t bits) { raw = bits; }
};

// The mask bits of a group of up to 8 elements at a multiple of its size: they never leave one
// byte, so a warp reads 16 or 32 neighbouring bytes, the sector that words would read, in as many
// instructions, and needs no alignment.
__device__ __forceinline__ uint32_t mask_bits(const uint8_t* mask, int64_t at) {
  return mask == nullptr ? ~0u : static_cast<uint32_t>(in_global(mask)[at >> 3]) >> (at & 7);
}

__device__ __forceinline__ bool aligned(const void* data) {
  return (reinterpret_cast<uintptr_t>(data) & 15) == 0;
}

template <class... Pointers>
__device__ __forceinline__ bool all_aligned(Pointers... data) {
  return (aligned(data) && ...);  // null is aligned: an absent stream does not matter
}

// run(E{}, S{}) with the element types of the parameters and of their state: fp32, the same, or
// bf16 beside fp32.
template <class Run>
__device__ __forceinline__ void dispatch(DType param, DType state, const Run& run) {
  if (is_narrow(state, param)) {
    run(float{}, BFloat16{});
  } else if (param == DType::kFloat32) {
    run(float{}, float{});
  } else if (param == DType::kBFloat16 && state == param) {
    run(BFloat16{}, BFloat16{});
  } else if (param == DType::kBFloat16) {
    run(BFloat16{}, float{});
  } else if (state == param) {
    run(Float16{}, Float16{});
  } else {
    run(Float16{}, float{});
  }
}

}  // namespace sfron
