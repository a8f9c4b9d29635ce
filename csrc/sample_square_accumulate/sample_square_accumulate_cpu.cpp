#include "sample_square_accumulate/sample_square_accumulate.h"

#include <algorithm>
#include <vector>

#include "cpu/factor_lines.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"

namespace sfron {
namespace {

// A block of the accumulator and of the sums over positions stay in the L2 cache over all samples,
// a panel of some lines of the inputs in the L1 cache over all rows of the block. A line is a
// position of a sample. Where a line serves one or two rows, memory is what counts: it likes long
// reads.
constexpr int64_t kPanel = 4096;  // elements
constexpr int64_t kStep = 4;      // lines of one pass over the columns
constexpr int64_t kLines = 8;     // of a panel, at most

SFRON_HD int64_t panel_lines(int64_t rows) {
  return rows > 2 ? kLines : kStep;
}

SFRON_HD int64_t panel_columns(int64_t rows) {
  return kPanel / panel_lines(rows);
}

// x86-64 has fused multiply-adds from AVX2 on, other processors always or never.
#if defined(__ARM_FEATURE_FMA) || defined(__FMA__)
constexpr bool kBaselineFuses = true;
#else
constexpr bool kBaselineFuses = false;
#endif

template <bool kFused>
SFRON_HD float multiply_add(float a, float b, float c) {
#if defined(__GNUC__)
  if constexpr (kFused) return __builtin_fmaf(a, b, c);
#endif
  return a * b + c;
}

constexpr int64_t kBlock = kSquareRows * kPanel / kLines;

struct Room {                                      // of a thread
  alignas(64) float accumulator[kBlock];           // [rows, width]
  alignas(64) float sums[kBlock];                  // [rows, width]
  alignas(64) float inputs[kPanel];                // [lines, width]
  alignas(64) float deltas[kLines * kSquareRows];  // [lines, rows]
  alignas(64) uint16_t halves[kPanel / kStep];
};

// `count` lines from (sample, position) on: of that sample, or of as many samples of one position.
struct Piece {
  int64_t sample, position, count;
  bool over_samples;
};

// inputs [count, width] and deltas [count, kSquareRows], zero beyond count up to a whole step.
SFRON_HD void pack(const Piece& piece, const Lines& deltas, const Lines& inputs, int64_t width,
                   Room& room) {
  const auto read = [&](const Lines& lines, float* target, int64_t width) {
    if (!piece.over_samples && piece.count == kLines && lines.across(piece.position, kLines))
      return lines.read_across<kLines>(piece.sample, piece.position, target, width);
    for (int64_t i = 0; i < piece.count; ++i) {
      lines.read(piece.sample + (piece.over_samples ? i : 0),
                 piece.position + (piece.over_samples ? 0 : i), target + i * width, room.halves);
    }
  };
  read(inputs, room.inputs, width);
  read(deltas, room.deltas, kSquareRows);
  for (int64_t i = piece.count; i % kStep != 0; ++i) {
    std::memset(room.inputs + i * width, 0, width * 4);
    std::memset(room.deltas + i * kSquareRows, 0, kSquareRows * 4);
  }
}

// kStep lines, wherever they lie.
struct Inputs {
  const float* line[kStep];
};

// kStep positions of two rows, or of one: sums [2, width] += deltas [kStep, 2] inputs [kStep,
// width]. The last step of a sample goes to the accumulator [2, width] instead.
template <bool kFused, int32_t kPower, bool kPair, bool kFirst, bool kLast>
SFRON_HD void step(const float* deltas, const Inputs& inputs, int64_t width, float* sums,
                   float* accumulator, float weight) {
  const float *d0 = deltas, *d1 = d0 + kSquareRows, *d2 = d1 + kSquareRows, *d3 = d2 + kSquareRows;
  const float a0 = d0[0], a1 = d1[0], a2 = d2[0], a3 = d3[0];
  const float b0 = d0[kPair], b1 = d1[kPair], b2 = d2[kPair], b3 = d3[kPair];
  const float *x0 = inputs.line[0], *x1 = inputs.line[1], *x2 = inputs.line[2],
              *x3 = inputs.line[3];
  float *sum_a = sums, *sum_b = sums + width;
  float *total_a = accumulator, *total_b = accumulator + width;
  SFRON_INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    float a = kFirst ? a0 * x0[c] : multiply_add<kFused>(a0, x0[c], sum_a[c]);
    a = multiply_add<kFused>(a1, x1[c], a);
    a = multiply_add<kFused>(a2, x2[c], a);
    a = multiply_add<kFused>(a3, x3[c], a);
    if constexpr (kLast) {
      total_a[c] = sample_accumulate_one<kPower>(total_a[c], a, weight);
    } else {
      sum_a[c] = a;
    }
    if constexpr (kPair) {
      float b = kFirst ? b0 * x0[c] : multiply_add<kFused>(b0, x0[c], sum_b[c]);
      b = multiply_add<kFused>(b1, x1[c], b);
      b = multiply_add<kFused>(b2, x2[c], b);
      b = multiply_add<kFused>(b3, x3[c], b);
      if constexpr (kLast) {
        total_b[c] = sample_accumulate_one<kPower>(total_b[c], b, weight);
      } else {
        sum_b[c] = b;
      }
    }
  }
}

template <bool kFused, int32_t kPower, bool kPair>
SFRON_HD void any_step(const float* deltas, const Inputs& x, bool begins, bool ends, int64_t width,
                       float* sums, float* accumulator, float weight) {
  if (begins && ends) {
    step<kFused, kPower, kPair, true, true>(deltas, x, width, sums, accumulator, weight);
  } else if (begins) {
    step<kFused, kPower, kPair, true, false>(deltas, x, width, sums, accumulator, weight);
  } else if (ends) {
    step<kFused, kPower, kPair, false, true>(deltas, x, width, sums, accumulator, weight);
  } else {
    step<kFused, kPower, kPair, false, false>(deltas, x, width, sums, accumulator, weight);
  }
}

// All steps of a panel, of two rows or of one.
template <bool kFused, int32_t kPower, bool kPair>
SFRON_HD void steps(const float* deltas, const float* inputs, int64_t count, bool first, bool last,
                    int64_t width, float* sums, float* accumulator, float weight) {
  for (int64_t i = 0; i < count; i += kStep) {
    const float* x = inputs + i * width;
    any_step<kFused, kPower, kPair>(deltas + i * kSquareRows,
                                    {{x, x + width, x + 2 * width, x + 3 * width}}, first && i == 0,
                                    last && i + kStep >= count, width, sums, accumulator, weight);
  }
}

// Samples of one position: each product is a sum. accumulator [width].
template <int32_t kPower>
SFRON_HD void add_samples(const float* deltas, const float* inputs, int64_t count, int64_t width,
                          float* accumulator, float weight) {
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const float *d = deltas + i * kSquareRows, d0 = d[0], d1 = d[kSquareRows],
                d2 = d[2 * kSquareRows], d3 = d[3 * kSquareRows];
    const float *x0 = inputs + i * width, *x1 = x0 + width, *x2 = x1 + width, *x3 = x2 + width;
    SFRON_INDEPENDENT
    for (int64_t c = 0; c < width; ++c) {
      float total = sample_accumulate_one<kPower>(accumulator[c], d0 * x0[c], weight);
      total = sample_accumulate_one<kPower>(total, d1 * x1[c], weight);
      total = sample_accumulate_one<kPower>(total, d2 * x2[c], weight);
      accumulator[c] = sample_accumulate_one<kPower>(total, d3 * x3[c], weight);
    }
  }
  for (; i < count; ++i) {
    const float d = deltas[i * kSquareRows];
    const float* x = inputs + i * width;
    SFRON_INDEPENDENT
    for (int64_t c = 0; c < width; ++c)
      accumulator[c] = sample_accumulate_one<kPower>(accumulator[c], d * x[c], weight);
  }
}

template <bool kFused, int32_t kPower>
struct SquareKernel {
  // `columns` of them in memory, `width` in the room, a multiple of the lanes.
  void operator()(const SampleSquares& t, const Lines& deltas, const Lines& inputs,
                  float* accumulator, Room* work) const {
    Room& room = *work;
    const int64_t rows = deltas.size(), columns = inputs.size();
    const int64_t width = (columns + kLanes - 1) / kLanes * kLanes;
    std::memset(room.inputs, 0, sizeof room.inputs);
    for (int64_t row = 0; row < rows; ++row) {
      float* target = room.accumulator + row * width;
      std::memset(target + columns, 0, (width - columns) * 4);
      std::memcpy(target, accumulator + row * t.columns, columns * 4);
    }
    if (t.positions == 1) {
      samples_of_one(t, deltas, inputs, width, room);
    } else if (rows == 1 && t.positions % kStep == 0 && inputs.in_place(0, 0) != nullptr) {
      for (int64_t sample = 0; sample < t.samples; ++sample)
        one_row(t, sample, deltas, inputs, room);
    } else {
      for (int64_t sample = 0; sample < t.samples; ++sample)
        one_sample(t, sample, deltas, inputs, width, room);
    }
    for (int64_t row = 0; row < rows; ++row)
      std::memcpy(accumulator + row * t.columns, room.accumulator + row * width, columns * 4);
  }

  static SFRON_HD void samples_of_one(const SampleSquares& t, const Lines& deltas,
                                      const Lines& inputs, int64_t width, Room& room) {
    const int64_t lines = panel_lines(deltas.size());
    for (int64_t at = 0; at < t.samples; at += lines) {
      const int64_t count = std::min(lines, t.samples - at);
      pack({at, 0, count, true}, deltas, inputs, width, room);
      for (int64_t row = 0; row < deltas.size(); ++row) {
        add_samples<kPower>(room.deltas + row, room.inputs, count, width,
                            room.accumulator + row * width, t.weight);
      }
    }
  }

  // Each line serves this row alone, so it is not copied first.
  static SFRON_HD void one_row(const SampleSquares& t, int64_t sample, const Lines& deltas,
                               const Lines& inputs, Room& room) {
    for (int64_t at = 0; at < t.positions; at += kStep) {
      Inputs x;
      for (int64_t i = 0; i < kStep; ++i) {
        deltas.read(sample, at + i, room.deltas + i * kSquareRows, room.halves);
        x.line[i] = inputs.in_place(sample, at + i);
      }
      any_step<kFused, kPower, false>(room.deltas, x, at == 0, at + kStep == t.positions,
                                      inputs.size(), room.sums, room.accumulator, t.weight);
    }
  }

  static SFRON_HD void one_sample(const SampleSquares& t, int64_t sample, const Lines& deltas,
                                  const Lines& inputs, int64_t width, Room& room) {
    const int64_t rows = deltas.size(), lines = panel_lines(rows);
    for (int64_t at = 0; at < t.positions; at += lines) {
      const int64_t count = std::min(lines, t.positions - at);
      const bool first = at == 0, last = at + count == t.positions;
      const int64_t stride = first && last ? 0 : width;  // sums of one panel stay in the L1 cache
      pack({sample, at, count, false}, deltas, inputs, width, room);
      for (int64_t row = 0; row + 2 <= rows; row += 2) {
        steps<kFused, kPower, true>(room.deltas + row, room.inputs, count, first, last, width,
                                    room.sums + row * stride, room.accumulator + row * width,
                                    t.weight);
      }
      if (rows % 2 != 0) {
        const int64_t row = rows - 1;
        steps<kFused, kPower, false>(room.deltas + row, room.inputs, count, first, last, width,
                                     room.sums + row * stride, room.accumulator + row * width,
                                     t.weight);
      }
    }
  }
};

template <int32_t kPower>
void run_block(const SampleSquares& t, const Lines& deltas, const Lines& inputs, float* accumulator,
               Room* room) {
#if defined(__x86_64__) && defined(__GNUC__)
  using Fused = SquareKernel<true, kPower>;
  if (isa() == Isa::kAvx512) return run_avx512(Fused{}, t, deltas, inputs, accumulator, room);
  if (isa() == Isa::kAvx2) return run_avx2(Fused{}, t, deltas, inputs, accumulator, room);
#endif
  SquareKernel<kBaselineFuses, kPower>{}(t, deltas, inputs, accumulator, room);
}

}  // namespace

void sample_square_accumulate_cpu(const SampleSquares& t, int64_t begin, int64_t end) {
  static thread_local std::vector<Room> rooms(1);
  const int64_t units = column_units(t);
  while (begin < end) {
    const int64_t row = begin / units * t.block_rows, unit = begin % units;
    const int64_t run = std::min(end - begin, units - unit);  // of these rows
    const int64_t most = panel_columns(std::min(t.block_rows, t.rows)) / kSquareColumns;
    const int64_t pieces = (run + most - 1) / most;
    const int64_t count = (run + pieces - 1) / pieces;
    const int64_t column = unit * kSquareColumns;
    const Lines deltas(t.deltas, t.dtype, row, std::min(t.block_rows, t.rows - row));
    const Lines inputs(t.inputs, t.dtype, column,
                       std::min(count * kSquareColumns, t.columns - column));
    float* accumulator = t.accumulator + row * t.columns + column;
    t.power == 1 ? run_block<1>(t, deltas, inputs, accumulator, rooms.data())
                 : run_block<2>(t, deltas, inputs, accumulator, rooms.data());
    begin += count;
  }
}

}  // namespace sfron
