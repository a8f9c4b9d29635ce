#pragma once
// How a thread holds what is kept in few bits: 8 neighbours as floats, whatever their dtypes, which
// are known at run time only. 32 threads hold one group of codes.
#include "cuda/group.cuh"
#include "cuda/table.cuh"
#include "formulas/moment_codes.h"
#include "formulas/split_weights.h"

namespace sfron {

constexpr int kHeld = 8;
static_assert(kHeld * kWarp == kGroup, "a warp holds a group");

// The elements of one thread.
struct Lane {
  int64_t at;
  int count;    // of kHeld, from `at` on
  bool vector;  // all of them, at addresses that allow wide accesses
};

// kBytes of each of the 8 elements, as 32-bit words.
template <int kBytes>
struct Words {
  static constexpr int kCount = kHeld * kBytes / 4;
  uint32_t words[kCount];

  __device__ __forceinline__ void load(const void* data, const Lane& lane) {
    const char* from = static_cast<const char*>(in_global(data)) + lane.at * kBytes;
    if (lane.vector) {
#pragma unroll
      for (int w = 0; w < kCount; w += kCount < 4 ? 2 : 4) {
        if constexpr (kCount < 4) {
          const uint2 pack = reinterpret_cast<const uint2*>(from)[0];
          words[w] = pack.x;
          words[w + 1] = pack.y;
        } else {
          const uint4 pack = reinterpret_cast<const uint4*>(from)[w / 4];
          words[w] = pack.x;
          words[w + 1] = pack.y;
          words[w + 2] = pack.z;
          words[w + 3] = pack.w;
        }
      }
      return;
    }
#pragma unroll
    for (int w = 0; w < kCount; ++w) words[w] = 0;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (k >= lane.count) continue;
      if constexpr (kBytes == 1) set(k, reinterpret_cast<const uint8_t*>(from)[k]);
      if constexpr (kBytes == 2) set(k, reinterpret_cast<const uint16_t*>(from)[k]);
      if constexpr (kBytes == 4) set(k, reinterpret_cast<const uint32_t*>(from)[k]);
    }
  }

  __device__ __forceinline__ void store(void* data, const Lane& lane) const {
    char* to = static_cast<char*>(in_global(data)) + lane.at * kBytes;
    if (lane.vector) {
#pragma unroll
      for (int w = 0; w < kCount; w += kCount < 4 ? 2 : 4) {
        if constexpr (kCount < 4) {
          reinterpret_cast<uint2*>(to)[0] = make_uint2(words[w], words[w + 1]);
        } else {
          store_16(reinterpret_cast<uint4*>(to) + w / 4,
                   make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]));
        }
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (k >= lane.count) continue;
      if constexpr (kBytes == 1) reinterpret_cast<uint8_t*>(to)[k] = static_cast<uint8_t>(get(k));
      if constexpr (kBytes == 2) reinterpret_cast<uint16_t*>(to)[k] = static_cast<uint16_t>(get(k));
      if constexpr (kBytes == 4) reinterpret_cast<uint32_t*>(to)[k] = get(k);
    }
  }

  __device__ __forceinline__ uint32_t get(int k) const {
    constexpr int kIn = 4 / kBytes;
    if constexpr (kBytes == 4) return words[k];
    return words[k / kIn] >> (k % kIn * 8 * kBytes) & ((1u << (8 * kBytes % 32)) - 1u);
  }
  __device__ __forceinline__ void set(int k, uint32_t bits) {
    constexpr int kIn = 4 / kBytes;
    if constexpr (kBytes == 4) {
      words[k] = bits;
    } else {
      constexpr uint32_t kMask = (1u << (8 * kBytes % 32)) - 1u;
      const int shift = k % kIn * 8 * kBytes;
      words[k / kIn] = (words[k / kIn] & ~(kMask << shift)) | (bits & kMask) << shift;
    }
  }
};

// A copy of the bits, before a step changes them.
__device__ __forceinline__ void copy_lane(void* to, const void* from, int64_t bytes,
                                          const Lane& lane) {
  const auto run = [&](auto words) {
    words.load(from, lane);
    words.store(to, lane);
  };
  bytes == 1 ? run(Words<1>{}) : bytes == 2 ? run(Words<2>{}) : run(Words<4>{});
}

__device__ __forceinline__ void load_floats(const void* data, DType dtype, const Lane& lane,
                                            float (&x)[kHeld]) {
  if (dtype == DType::kFloat32) {
    Words<4> wide;
    wide.load(data, lane);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) x[k] = float_of(wide.get(k));
    return;
  }
  Words<2> half;
  half.load(data, lane);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const uint16_t bits = static_cast<uint16_t>(half.get(k));
    x[k] = dtype == DType::kBFloat16 ? widen(BFloat16{bits}) : widen(Float16{bits});
  }
}

// `narrow`: of bf16 and dithered.
__device__ __forceinline__ void store_floats(void* data, DType dtype, bool narrow_state,
                                             int64_t step, const Lane& lane,
                                             const float (&x)[kHeld]) {
  if (dtype == DType::kFloat32) {
    Words<4> wide;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) wide.set(k, bits_of(x[k]));
    wide.store(data, lane);
    return;
  }
  Words<2> half{};
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    BFloat16 b;
    Float16 h;
    narrow(x[k], b);
    narrow(x[k], h);
    const uint16_t dithered = to_bfloat16_dithered(x[k], dither_threshold(lane.at + k, step));
    half.set(k, narrow_state ? dithered : dtype == DType::kBFloat16 ? b.bits : h.bits);
  }
  half.store(data, lane);
}

__device__ __forceinline__ void load_weights(const void* data, DType dtype, const void* corrections,
                                             int64_t bytes, const Lane& lane, float (&x)[kHeld]) {
  if (corrections == nullptr) return load_floats(data, dtype, lane, x);
  Words<2> param;
  param.load(data, lane);
  const auto join = [&](auto words, auto dropped, auto piece) {
    words.load(corrections, lane);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const auto correction = static_cast<decltype(piece)>(words.get(k));
      x[k] = join_one<dropped>(static_cast<uint16_t>(param.get(k)), correction);
    }
  };
  using std::integral_constant;
  bytes == 1 ? join(Words<1>{}, integral_constant<int, 8>{}, int8_t{})
             : join(Words<2>{}, integral_constant<int, 0>{}, int16_t{});
}

__device__ __forceinline__ void store_weights(void* data, DType dtype, void* corrections,
                                              int64_t bytes, int64_t step, const Lane& lane,
                                              const float (&x)[kHeld]) {
  if (corrections == nullptr) return store_floats(data, dtype, false, step, lane, x);
  Words<2> param{};
  const auto split = [&](auto words, auto dropped) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const SplitWeight w = split_one<dropped>(x[k], dither_threshold(lane.at + k, step));
      param.set(k, w.param);
      words.set(k, static_cast<uint16_t>(w.correction));
    }
    words.store(corrections, lane);
  };
  using std::integral_constant;
  bytes == 1 ? split(Words<1>{}, integral_constant<int, 8>{})
             : split(Words<2>{}, integral_constant<int, 0>{});
  param.store(data, lane);
}

// One group of codes, of which every thread of the warp holds a part; or moments of any dtype.
template <bool kSigned>
__device__ __forceinline__ void load_moments(const void* data, DType dtype, const float* scale,
                                             const Lane& lane, float (&x)[kHeld]) {
  if (scale == nullptr) return load_floats(data, dtype, lane, x);
  Words<1> codes;
  codes.load(data, lane);
  const float factor = *in_global(scale);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const uint32_t bits = codes.get(k);
    const int32_t code = kSigned ? static_cast<int8_t>(bits) : static_cast<int32_t>(bits);
    x[k] = decode_one<kSigned>(code, factor);
  }
}

template <bool kSigned>
__device__ __forceinline__ void store_moments(void* data, DType dtype, bool narrow_state,
                                              float* scale, int64_t step, const Lane& lane,
                                              const float (&x)[kHeld]) {
  if (scale == nullptr) return store_floats(data, dtype, narrow_state, step, lane, x);
  uint32_t most = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const uint32_t size = static_cast<uint32_t>(size_bits(x[k]));
    if (k < lane.count && size > most) most = size;
  }
  most = __reduce_max_sync(0xffffffffu, most);
  const float factor = scale_of(static_cast<int32_t>(most)), inverse = 1.0f / factor;
  if (threadIdx.x % kWarp == 0) *in_global(scale) = factor;
  Words<1> codes{};
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const uint32_t threshold = dither_threshold(lane.at + k, step);
    codes.set(k, static_cast<uint32_t>(encode_one<kSigned>(x[k], inverse, threshold)));
  }
  codes.store(data, lane);
}

// body(lane, group) for the elements of a tensor that this warp has from [begin, end): where there
// are codes, of the groups that begin there, one after another; `group` counts them from the first
// of the tensor.
template <class Body>
__device__ __forceinline__ void each_compact(int64_t begin, int64_t end, int64_t row, bool coded,
                                             bool are_aligned, const Body& body) {
  if (coded) {
    begin = group_from(begin, row);
    end = group_from(end, row);
  }
  int64_t group = coded ? group_index(begin, row) : 0, in_row = coded ? begin % row : 0;
#pragma unroll 1
  for (int64_t at = begin; at < end; ++group) {
    const int64_t rest = coded ? row - in_row : end - at, size = rest < kGroup ? rest : kGroup;
    Lane lane{at + threadIdx.x % kWarp * kHeld, 0, false};
    const int64_t left = at + size - lane.at;
    lane.count = static_cast<int>(left < 0 ? 0 : left < kHeld ? left : kHeld);
    lane.vector = are_aligned && lane.count == kHeld;
    body(lane, group);
    at += size;
    in_row = size == rest ? 0 : in_row + size;
  }
}

}  // namespace sfron
