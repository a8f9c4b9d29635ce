#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace sfron {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
// g++ before 11 cannot ask __builtin_cpu_supports for it: CPUID leaf 1, bit 29 of ECX.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
}
#endif

Isa best() {
#if defined(__x86_64__) && defined(__GNUC__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

// Empty = nobody has asked for a level.
std::string wish() {
  const char* name = std::getenv("SFRON_FAST_ISA");
  return name == nullptr ? "" : name;
}

Isa choose() {
  const std::string name = wish();
  if (name.empty()) return best();
  const char* const names[] = {"baseline", "avx2", "avx512"};
  for (int level = 0; level < 3; ++level) {
    if (name != names[level]) continue;
    if (level <= static_cast<int>(best())) return static_cast<Isa>(level);
    throw std::runtime_error("SFRON_FAST_ISA: expected a level of this processor, found " + name);
  }
  throw std::runtime_error("SFRON_FAST_ISA: expected baseline, avx2 or avx512, found " + name);
}

bool fetch_ahead([[maybe_unused]] bool many) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();  // this may run before the library's own constructors
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid(1, &a, &b, &c, &d);
  const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
  return !__builtin_cpu_is("amd") || (many && family >= 0x1a);  // from Zen 5 on
#else
  return true;
#endif
}

}  // namespace

const bool kFetchAhead = fetch_ahead(false);
const bool kFetchManyAhead = fetch_ahead(true);

Isa streaming_isa() {
  static const Isa level = wish().empty() && !kFetchAhead ? std::min(isa(), Isa::kAvx2) : isa();
  return level;
}

Isa isa() {
  static const Isa level = choose();
  return level;
}

}  // namespace sfron
