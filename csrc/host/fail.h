#pragma once
// The text of a refusal, without torch: which argument, what was expected, what was found.
#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sfron {

// "params[3]", built only when something is wrong.
struct Name {
  const char* list;
  int64_t index = -1;
};

[[noreturn]] inline void fail(Name name, const std::string& expected, const std::string& found) {
  const std::string index = name.index < 0 ? "" : "[" + std::to_string(name.index) + "]";
  throw std::invalid_argument(name.list + index + ": expected " + expected + ", found " +
                              found);  // ValueError
}

inline std::string shape_name(const int64_t* sizes, int64_t dim) {
  std::string text = "(";
  for (int64_t d = 0; d < dim; ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + (dim == 1 ? ",)" : ")");
}

inline std::string number_name(double value) {
  std::ostringstream text;
  text << value;
  if (std::isfinite(value) && value == std::floor(value) && std::abs(value) < 1e6)
    text << ".0";  // as Python does
  return text.str();
}

// A finite number in [low, high], or in (low, high] with `open_low`; a NaN is in neither.
inline void check_number(const char* name, double value, double low, double high,
                         bool open_low = false) {
  if ((open_low ? value > low : value >= low) && value <= high && !std::isinf(value)) return;
  fail({name},
       std::string("a number in ") + (open_low ? "(" : "[") + number_name(low) + ", " +
           number_name(high) + (std::isinf(high) ? ")" : "]"),
       number_name(value));
}

}  // namespace sfron
