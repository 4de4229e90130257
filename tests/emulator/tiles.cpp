// Which columns each block of a tiling computes, as csrc/cuda/tiles.cuh has it, and what tables take, for the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cuda/tiles.cuh"

namespace {

struct Blocks {
  kaf::Tiling tiling;
  uint32_t* active;
};

__global__ void tell_active(const Blocks blocks) {
  const kaf::Tile<float, false> tile(blocks.tiling, blockIdx.x);
  if (threadIdx.x == 0) blocks.active[blockIdx.x] = tile.active;
}

// The mask of each block's columns, for one row of memory with so many columns of one element.
std::vector<uint32_t> active_columns(int64_t columns, int columns_at_once) {
  kaf::Tiling t{};
  t.rows = t.inner = 1;
  t.rows_per_block = t.run = 1;
  t.pitch = t.columns = columns;
  t.columns_at_once = columns_at_once;
  t.threads = kaf::kThreads;
  t.columns_shift = std::countr_zero(static_cast<unsigned>(columns_at_once));
  t.group_shift = std::countr_zero(static_cast<unsigned>(t.threads)) - t.columns_shift;
  std::vector<uint32_t> active(kaf::blocks_of(t));
  kaf::launch(tell_active, dim3(static_cast<unsigned>(active.size())), t.threads, 0, nullptr, Blocks{t, active.data()});
  return active;
}

// Bytes of shared memory of a block with one curve of so many points, on cells or as all answers.
size_t table_bytes(int size, bool answers) {
  kaf::Call call{};
  call.tables.count = 1;
  call.tables.capacity = kaf::cells_for(size);
  call.powers = answers ? kaf::powers_for(call.tables.capacity) : 0;
  return kaf::table_bytes(call);
}

}  // namespace

PYBIND11_MODULE(tiles, module) {
  module.def("active_columns", &active_columns);
  module.def("table_bytes", &table_bytes);
}
