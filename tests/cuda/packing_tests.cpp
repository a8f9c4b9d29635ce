// How lists are cut into units, and when their tables are copied to the device.
#include "common/plan.cuh"

#include <string>

#include "interpolate/interpolate.h"
#include "lists.h"
#include "masked_grad_norm/masked_grad_norm.h"
#include "sgd_step/sgd_step.h"

using namespace sfron;

namespace {

struct Sized {
  int64_t numel;
};

// Every element of every tensor is in exactly one unit, and every unit is taken by exactly one warp.
void check_packing(Plans& plans, const std::vector<Sized>& tensors, int64_t blocks) {
  const Table<Sized> table = make_table(plans, tensors, {0, nullptr});
  std::vector<int64_t> reached(tensors.size());
  for (int64_t unit = 0; unit < table.units; ++unit) {
    const Stretch s = stretch_of(table, unit);
    CHECK(s.begin == reached[s.tensor] && s.begin < s.end && s.end - s.begin <= kDeviceUnit);
    reached[s.tensor] = s.end;
  }
  for (size_t i = 0; i < tensors.size(); ++i) CHECK(reached[i] == tensors[i].numel);
  std::vector<int> taken(table.units);
  for (int64_t block = 0; block < blocks; ++block) {
    gridDim = dim3(static_cast<unsigned>(blocks));
    blockIdx = dim3(static_cast<unsigned>(block));
    for (unsigned warp = 0; warp < kWarps; ++warp) {
      threadIdx = dim3(warp * kWarp);
      each_unit(table, [&](int64_t i, int64_t begin, int64_t) { ++taken[table.first[i] + begin / kDeviceUnit]; });
    }
  }
  for (const int times : taken) CHECK(times == 1);
}

int64_t copies_of(const std::vector<InterpolateTensor>& tensors) {
  const int64_t before = shim::copies;
  launch_interpolate(tensors, {1.0, nullptr}, {0, nullptr});
  return shim::copies - before;
}

}  // namespace

void test_packing() {
  Plans plans("packing");
  for (int i = 0; i < 200000; ++i) {
    std::vector<Sized> tensors(pick(1, 10));
    for (Sized& t : tensors) {
      t.numel = chance(25) ? 0 : chance(30) ? kDeviceUnit * pick(1, 3) + pick(-1, 1) : pick(1, 9000);
    }
    check_packing(plans, tensors, pick(1, 4));
  }
  std::vector<Sized> many(10000);
  for (Sized& t : many) t.numel = pick(0, 100);
  check_packing(plans, many, 264);

  const int64_t big = (int64_t{1} << 31) + 5, huge = (int64_t{1} << 40) + 1;  // counts only: nothing is allocated
  const Table<Sized> table = make_table<Sized>(plans, {{3}, {big}, {0}, {huge}}, {0, nullptr});
  CHECK(table.units == 1 + (big + kDeviceUnit - 1) / kDeviceUnit + (huge + kDeviceUnit - 1) / kDeviceUnit);
  const Stretch last = stretch_of(table, table.units - 1), before = stretch_of(table, table.first[2] - 1);
  CHECK(last.tensor == 3 && last.end == huge && last.begin == huge / kDeviceUnit * kDeviceUnit);
  CHECK(before.tensor == 1 && before.end == big && before.begin > (int64_t{1} << 31) - 1);
}

void test_plans() {
  std::vector<Buffer> buffers;
  for (int i = 0; i < 24; ++i) buffers.push_back(random_buffer(100, DType::kFloat32, false, false));
  std::vector<std::vector<InterpolateTensor>> lists;
  for (int i = 0; i < 12; ++i) {
    lists.push_back({{buffers[2 * i].data(), buffers[2 * i + 1].data(), 100, DType::kFloat32},
                     {buffers[2 * i + 1].data(), buffers[2 * i].data(), 99, DType::kFloat32},
                     {buffers[0].data(), buffers[1].data(), 0, DType::kFloat32}});
  }
  copies_of(lists[0]);
  const int64_t allocations = shim::allocations;
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) CHECK(copies_of(lists[i]) == (round == 0 && i > 0 ? 1 : 0));  // a cycle of four lists
  }
  for (int i = 0; i < 100; ++i) CHECK(copies_of(lists[i % 12]) <= 1);  // new storage each time: a copy, no allocation
  CHECK(shim::allocations == allocations);

  // a captured table stays as it was, whatever happens to the cache
  Plans plans("capture");
  char *captured = nullptr, *scratch = nullptr, *other = nullptr;
  const std::vector<char> first(1000, 'a');
  shim::capturing = true;
  plans.place(first, {0, nullptr}, &captured, &scratch);
  shim::capturing = false;
  for (int i = 0; i < 20; ++i) {
    plans.place(std::vector<char>(1000, static_cast<char>(i)), {0, nullptr}, &other, &scratch);
    CHECK(other != captured && other[999] == static_cast<char>(i));
  }
  CHECK(std::vector<char>(captured, captured + 1000) == first);

  // more lengths than are kept: the oldest makes room
  for (size_t size = 1; size < 50; ++size) plans.place(std::vector<char>(size, 'x'), {0, nullptr}, &other, &scratch);

  // 10,000 tensors: two launches for the norm, one for the step
  std::vector<Buffer> params(10000), grads(10000);
  std::vector<MaskedGradNormTensor> norms;
  std::vector<SgdTensor> steps;
  for (int i = 0; i < 10000; ++i) {
    params[i] = random_buffer(64, DType::kFloat32, false, false);
    grads[i] = random_buffer(64, DType::kFloat32, false, false);
    norms.push_back({grads[i].data(), nullptr, 64, DType::kFloat32});
    steps.push_back({params[i].data(), grads[i].data(), nullptr, nullptr, nullptr, nullptr, 64, DType::kFloat32,
                     DType::kFloat32});
  }
  float norm = 0.0f;
  const int64_t launches = shim::launches;
  launch_masked_grad_norm(norms, nullptr, &norm, {0, nullptr});
  launch_sgd_step(steps, {}, {&norm, nullptr, nullptr, nullptr, nullptr, {0.1, 0.0, 1.0}, 1.0f, false}, {0, nullptr});
  CHECK(shim::launches - launches == 3);
}
