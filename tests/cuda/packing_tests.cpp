// How lists are cut into units, and what carries them to the device: parameters, slots, or a
// captured graph's own copy.
#include "cuda/launch.cuh"

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

List<Sized> list_of(const std::vector<Sized>& tensors, int32_t unit, std::vector<char>& bytes) {
  List<Sized> list;
  list.table.unit = unit;
  bytes = table_bytes(tensors, &list.table);
  list.table.data = bytes.data();
  return list;
}

// Every element of every tensor is in exactly one unit, and every unit is taken by exactly one
// warp.
void check_packing(const std::vector<Sized>& tensors, int64_t blocks) {
  std::vector<char> bytes;
  const List<Sized> list =
      list_of(tensors, static_cast<int32_t>(pick(kLeastUnit, kMostUnit)), bytes);
  const Table<Sized> table = list.opened();
  std::vector<int64_t> reached(tensors.size());
  for (int64_t unit = 0; unit < table.units; ++unit) {
    const Stretch s = stretch_of(table, unit);
    CHECK(s.begin == reached[s.tensor] && s.begin < s.end && s.end - s.begin <= 1 << table.unit);
    reached[s.tensor] = s.end;
  }
  for (size_t i = 0; i < tensors.size(); ++i) CHECK(reached[i] == tensors[i].numel);
  std::vector<int> taken(table.units);
  for (int64_t block = 0; block < blocks; ++block) {
    gridDim = dim3(static_cast<unsigned>(blocks));
    blockIdx = dim3(static_cast<unsigned>(block));
    for (unsigned warp = 0; warp < kWarps; ++warp) {
      threadIdx = dim3(warp * kWarp);
      each_unit(list, [&](const Sized&, int64_t i, int64_t begin, int64_t) {
        ++taken[table.first()[i] + (begin >> table.unit)];
      });
    }
  }
  for (const int times : taken) CHECK(times == 1);
}

// Lists of `count` tensors to interpolate, each in its own memory.
class Lists {
 public:
  Lists(int64_t lists, int64_t count) : slow_(lists), fast_(lists), want_(lists), lists_(lists) {
    for (int64_t l = 0; l < lists; ++l) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t numel = i % 5;
        slow_[l].push_back(random_buffer(numel, DType::kFloat32, false, false));
        fast_[l].push_back(random_buffer(numel, DType::kFloat32, false, false));
        want_[l].push_back(fast_[l].back());
        lists_[l].push_back(
            {slow_[l].back().data(), fast_[l].back().data(), numel, DType::kFloat32});
      }
    }
  }

  void launch(int64_t l) { launch_interpolate(lists_[l], {1.0, nullptr}, {0, nullptr}); }

  int64_t copies(int64_t l) {
    const int64_t before = shim::copies;
    launch(l);
    return shim::copies - before;
  }

  void check() {
    for (size_t l = 0; l < slow_.size(); ++l) {
      for (size_t i = 0; i < slow_[l].size(); ++i) CHECK(slow_[l][i].same(want_[l][i]));
    }
  }

 private:
  std::vector<std::vector<Buffer>> slow_, fast_, want_;
  std::vector<std::vector<InterpolateTensor>> lists_;
};

}  // namespace

void test_packing() {
  for (int i = 0; i < 20000; ++i) {
    std::vector<Sized> tensors(pick(1, 10));
    for (Sized& t : tensors) {
      t.numel = chance(25)   ? 0
                : chance(30) ? (pick(1, 3) << pick(kLeastUnit, kMostUnit)) + pick(-1, 1)
                             : pick(1, 9000);
    }
    check_packing(tensors, pick(1, 4));
  }
  std::vector<Sized> many(10000);
  for (Sized& t : many) t.numel = pick(0, 100);
  many[5000].numel = 10'000'000;  // a coarse index of few entries, beside crowds of small tensors
  check_packing(many, 264);

  // counts only: nothing is allocated
  const int64_t big = (int64_t{1} << 31) + 5;
  const int64_t huge = (int64_t{1} << 40) + 1;
  const int64_t unit = int64_t{1} << kMostUnit;
  std::vector<char> bytes;
  const Table<Sized> table = list_of({{3}, {big}, {0}, {huge}}, kMostUnit, bytes).opened();
  CHECK(table.units == 1 + (big + unit - 1) / unit + (huge + unit - 1) / unit);
  const Stretch last = stretch_of(table, table.units - 1),
                before = stretch_of(table, table.first()[2] - 1);
  CHECK(last.tensor == 3 && last.end == huge && last.begin == huge / unit * unit);
  CHECK(before.tensor == 1 && before.end == big && before.begin > (int64_t{1} << 31) - 1);

  // units as small as it takes to give every warp one
  for (const auto& [numel, expected] :
       {std::pair<int64_t, int32_t>{2048 * 32, 11}, {2048 * 31, 10}, {600 * 32, 9}}) {
    CHECK(unit_for<Sized>({{numel}}, 32) == expected);
  }
}

// A list that fits the parameters needs no memory; one that does not is copied when it is new.
void test_tables() {
  Lists single(200, 3), cycle(4, 100);
  single.launch(0);
  cycle.launch(0);
  const int64_t allocations = shim::allocations, copies = shim::copies;
  for (int64_t l = 0; l < 200; ++l) single.launch(l);  // step_in_backward
  CHECK(shim::copies == copies);
  for (int round = 0; round < 3; ++round) {
    for (int l = 0; l < 4; ++l) CHECK(cycle.copies(l) == (round == 0 && l > 0 ? 1 : 0));
  }
  Lists others(40, 100);
  for (int l = 0; l < 40; ++l)
    CHECK(others.copies(l) == 1);  // new storage each time: a copy, no allocation
  CHECK(shim::allocations == allocations);
  for (Lists* lists : {&single, &cycle, &others}) lists->check();

  // lengths up to a power of two share a ring: pinned memory and device memory for each power
  std::vector<Lists> lengths;
  const int64_t before = shim::allocations;
  for (int64_t count = 90; count < 1200; count += 40) lengths.emplace_back(1, count).launch(0);
  CHECK(shim::allocations - before <= 2 * 5);
  for (Lists& lists : lengths) lists.check();
}

// The device does nothing until it is waited for: what lies in pinned memory must stay until then.
void test_a_host_that_runs_ahead() {
  Lists few(60, 100), many(100, 100);
  shim::deferred = true;
  const int64_t waits = shim::waits;
  for (int l = 0; l < 60; ++l) few.launch(l);
  CHECK(shim::waits == waits);  // the ring has grown
  shim::finish();
  few.check();
  const int64_t allocations = shim::allocations;
  for (int l = 0; l < 100; ++l) many.launch(l);
  // it is as long as it gets: the host waits
  CHECK(shim::waits > waits && shim::allocations == allocations);
  shim::finish();
  many.check();
  shim::deferred = false;
}

// What a graph holds is not touched by what comes between its replays, and its kernels are loaded
// beside the capture.
void test_capture() {
  for (const int64_t count : {3, 200}) {
    Lists captured(1, count), between(30, count);
    const Buffer grad = random_buffer(1000, DType::kFloat32, false, false);
    float norm = -1.0f;
    shim::loaded.clear();
    shim::graph.clear();
    shim::capturing = true;
    captured.launch(0);
    launch_masked_grad_norm({{grad.data(), nullptr, 1000, DType::kFloat32}}, nullptr, &norm,
                            {0, nullptr});
    shim::capturing = false;
    CHECK(norm == -1.0f);
    for (int l = 0; l < 30; ++l) between.launch(l);
    shim::replay();
    captured.check();
    between.check();
    const float first = norm;
    shim::replay();
    CHECK(norm == first && norm > 0.0f);
  }
}

// All kernels of an op are loaded when the first is needed; the message where there is no code for
// the device.
__global__ void first_kernel(const __grid_constant__ List<Sized>) {}
__global__ void second_kernel(const __grid_constant__ List<Sized>) {}

void test_loading() {
  TableCache tables("op_", first_kernel, second_kernel);
  tables.launch(first_kernel, std::vector<Sized>{{1}}, {0, nullptr});
  CHECK(shim::loaded.count(reinterpret_cast<const void*>(second_kernel)) == 1);

  shim::load_error = cudaErrorNoKernelImageForDevice;
  std::string message;
  try {
    TableCache("op_", first_kernel).launch(first_kernel, std::vector<Sized>{{1}}, {0, nullptr});
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  shim::load_error = cudaSuccess;
  CHECK(message.find("found compute capability 2.2; build with TORCH_CUDA_ARCH_LIST=2.2") !=
        std::string::npos);
}

// 10,000 tensors: one launch for the norm, one for the step.
void test_launches() {
  std::vector<Buffer> params(10000), grads(10000);
  std::vector<MaskedGradNormTensor> norms;
  std::vector<SgdTensor> steps;
  for (int i = 0; i < 10000; ++i) {
    params[i] = random_buffer(64, DType::kFloat32, false, false);
    grads[i] = random_buffer(64, DType::kFloat32, false, false);
    norms.push_back({grads[i].data(), nullptr, 64, DType::kFloat32});
    steps.push_back({params[i].data(), grads[i].data(), nullptr, nullptr, nullptr, nullptr, 64,
                     DType::kFloat32, DType::kFloat32});
  }
  float norm = 0.0f;
  const int64_t launches = shim::launches;
  launch_masked_grad_norm(norms, nullptr, &norm, {0, nullptr});
  launch_sgd_step(steps, {},
                  {&norm, nullptr, nullptr, nullptr, nullptr, {0.1, 0.0, 1.0}, 1.0f, false},
                  {0, nullptr});
  CHECK(shim::launches - launches == 2);
}
