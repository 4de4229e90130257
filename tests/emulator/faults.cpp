// Kernels that are right, and kernels with one known fault each, for the tests of the emulator. All have the same
// parameters: x and n are read, y is written.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>

#include "cuda_emulator.h"

namespace {

constexpr unsigned kAll = 0xffffffff;
constexpr int kBlock = 256, kTile = 16;

__device__ __forceinline__ int thread() { return threadIdx.x; }

// ---- right ----

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAll, v, step);
  return v;
}

// y[block] = Σ x[block n … (block + 1) n)
template <class T>
__global__ void __launch_bounds__(kBlock) block_sum(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ T parts[kBlock / warpSize];
  T sum = 0;
  for (int i = thread(); i < n; i += kBlock) sum += x[blockIdx.x * n + i];
  sum = warp_sum(sum);
  if (thread() % warpSize == 0) parts[thread() / warpSize] = sum;
  __syncthreads();
  if (thread() >= warpSize) return;
  sum = warp_sum(thread() < kBlock / warpSize ? parts[thread()] : T(0));
  if (thread() == 0) y[blockIdx.x] = float(sum);
}

// The same through dynamic shared memory, two values at a time.
__global__ void block_sum_dynamic(const float* x, float* y, int n) {
  KAF_DYNAMIC_SHARED(memory);
  float2* parts = reinterpret_cast<float2*>(memory);
  float2 sum = make_float2(0, 0);
  for (int i = 2 * thread(); i < n; i += 2 * blockDim.x) {
    sum.x += __ldg(x + blockIdx.x * n + i);
    sum.y += i + 1 < n ? __ldg(x + blockIdx.x * n + i + 1) : 0.0f;
  }
  parts[thread()] = sum;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread() >= half) continue;
    parts[thread()].x += parts[thread() + half].x;
    parts[thread()].y += parts[thread() + half].y;
  }
  if (thread() == 0) y[blockIdx.x] = parts[0].x + parts[0].y;
}

// y = x^T, x of n × n
__global__ void transpose(const float* x, float* y, int n) {
  __shared__ float tile[kTile][kTile + 1];
  const int column = blockIdx.x * kTile + threadIdx.x, row = blockIdx.y * kTile + threadIdx.y;
  if (row < n && column < n) tile[threadIdx.y][threadIdx.x] = x[row * n + column];
  __syncthreads();
  const int column_of_y = blockIdx.y * kTile + threadIdx.x, row_of_y = blockIdx.x * kTile + threadIdx.y;
  if (row_of_y < n && column_of_y < n) y[row_of_y * n + column_of_y] = tile[threadIdx.x][threadIdx.y];
}

// Where a thread is, as one number.
__global__ void indices(const float*, float* y, int) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned number = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  y[block * blockDim.x * blockDim.y * blockDim.z + number] = 1e6f * block + number;
}

// Every way to exchange values, each with the lane in the value's low bits and a type's high bits set.
template <class T>
__global__ void shuffles(const float*, float* y, int) {
  const T high = T(1) << (sizeof(T) == 8 ? 40 : 20);
  const T v = high + T(thread());
  const T got[] = {__shfl_sync(kAll, v, 5),      __shfl_sync(kAll, v, thread() + 1, 8), __shfl_up_sync(kAll, v, 3),
                   __shfl_up_sync(kAll, v, 3, 8), __shfl_down_sync(kAll, v, 3),          __shfl_down_sync(kAll, v, 3, 8),
                   __shfl_xor_sync(kAll, v, 6),   __shfl_xor_sync(kAll, v, 9, 8)};
  for (int i = 0; i < 8; ++i) y[8 * thread() + i] = float(got[i] - high);
}
template <>
__global__ void shuffles<double>(const float*, float* y, int) {
  y[thread()] = float(__shfl_xor_sync(kAll, 1 + 0x1p-40 * thread(), 1) * 0x1p40 - 0x1p40);
}

// Half a warp may meet alone, and the block in votes.
__global__ void votes(const float* x, float* y, int) {
  const bool positive = x[thread()] > 0, upper = thread() % warpSize >= 16;
  const unsigned mine = upper ? 0xffff0000 : 0x0000ffff;
  float* got = y + 7 * thread();
  got[0] = float(__ballot_sync(mine, positive) >> (upper ? 16 : 0));
  got[1] = float(__any_sync(mine, positive));
  got[2] = float(__all_sync(mine, positive));
  __syncwarp();
  got[3] = float(__syncthreads_count(positive));
  got[4] = float(__syncthreads_or(positive));
  got[5] = float(__syncthreads_and(positive));
  got[6] = float(__syncthreads_and(1));
}

// ---- what one thread reads before or after another writes it ----

enum Neighbour { kNext, kPrevious, kMirrored };

// y[t] = x[t'], t' the next thread, the one before, or the one as far from the other end.
template <Neighbour which, bool wait>
__global__ void read_neighbour(const float* x, float* y, int) {
  __shared__ float shared[kBlock];
  shared[thread()] = x[thread()];
  if (wait) __syncthreads();
  const int last = kBlock - 1;
  y[thread()] = shared[which == kMirrored ? last - thread() : which == kNext ? min(thread() + 1, last) : max(thread() - 1, 0)];
}

// y[t] = x[t'] + 10 x[t'], t' mirrored, through the same memory one after the other.
template <bool wait>
__global__ void write_again(const float* x, float* y, int) {
  __shared__ float shared[kBlock];
  shared[thread()] = x[thread()];
  __syncthreads();
  const float first = shared[kBlock - 1 - thread()];
  if (wait) __syncthreads();
  shared[thread()] = 10 * x[thread()];
  __syncthreads();
  y[thread()] = first + shared[kBlock - 1 - thread()];
}

// A warp's lanes do not run in step.
template <bool wait>
__global__ void warp_in_step(const float* x, float* y, int) {
  __shared__ float shared[kBlock];
  shared[thread()] = x[thread()];
  if (wait) __syncwarp();
  y[thread()] = shared[thread() ^ 1];
}

template <class T>
__global__ void unwritten_static(const float*, float* y, int) {
  __shared__ T shared[kBlock];
  y[thread()] = float(shared[thread()]);
}

__global__ void unwritten_dynamic(const float*, float* y, int) {
  KAF_DYNAMIC_SHARED(memory);
  y[thread()] = reinterpret_cast<float*>(memory)[thread()];
}

// What one block left in shared memory is not there for the others.
__global__ void written_by_one_block(const float* x, float* y, int n) {
  __shared__ float shared[kBlock];
  KAF_DYNAMIC_SHARED(memory);
  float* dynamic = reinterpret_cast<float*>(memory);
  if (int(blockIdx.x) == n) shared[thread()] = dynamic[thread()] = x[thread()];
  y[blockIdx.x * kBlock + thread()] = shared[thread()] + dynamic[thread()];
}

// y = how many came so far, then who they were
__global__ void arrivals(const float*, float* y, int) {
  const int before = y[0] < 0 ? 0 : int(y[0]);
  y[0] = float(before + 1);
  y[before + 1] = float(blockIdx.x * blockDim.x + thread());
}

__global__ void last_thread_wins(const float* x, float* y, int) { y[0] = x[thread()]; }
__global__ void last_block_wins(const float* x, float* y, int) { y[0] = x[blockIdx.x]; }

// Lane 3 is not in the mask of those that read it.
__global__ void lane_outside_mask(const float* x, float* y, int) {
  if (thread() >= 3) return;
  y[thread()] = __shfl_down_sync(0x7, x[thread()], 1);
}

// ---- barriers and masks ----

__global__ void barrier_after_exit(const float*, float*, int n) {
  if (thread() >= n) return;
  __syncthreads();  // divergent: others exited
}
__global__ void barrier_in_loop(const float*, float*, int n) {
  for (int i = thread() < n; i < 2; ++i) __syncthreads();  // divergent: other number of turns
}
__global__ void barriers_of_branches(const float*, float*, int n) {
  if (thread() < n)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void barrier_and_shuffle(const float* x, float* y, int n) {
  if (thread() < n)
    __syncthreads();  // divergent: others in a shuffle
  else
    y[thread()] = __shfl_sync(kAll, x[thread()], 0);
}
__global__ void exited_lane(const float* x, float* y, int n) {
  if (thread() >= n) return;
  y[thread()] = __shfl_xor_sync(kAll, x[thread()], 1);  // names exited lanes
}
__global__ void mask_without_caller(const float* x, float* y, int) {
  y[thread()] = __shfl_xor_sync(kAll ^ 0x10, x[thread()], 1);  // lacks lane 4
}
__global__ void missing_lanes(const float* x, float* y, int) {
  y[thread()] = __shfl_xor_sync(kAll, x[thread()], 1);  // of a block of less than a warp
}
__global__ void masks_disagree(const float* x, float* y, int) {
  y[thread()] = __shfl_xor_sync(thread() % 2 ? 0xaaaaaaab : kAll, x[thread()], 1);  // never meet
}
__global__ void shuffles_of_branches(const float* x, float* y, int) {
  if (thread() % 2)
    y[thread()] = __shfl_sync(kAll, x[thread()], 0);
  else
    y[thread()] = __shfl_sync(kAll, x[thread()], 1);
}
__global__ void width_of_twelve(const float* x, float* y, int) {
  y[thread()] = __shfl_xor_sync(kAll, x[thread()], 1, 12);  // no power of two
}

struct Thrown : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Every thread holds memory, which AddressSanitizer would miss, while one throws and the rest wait.
__global__ void throws(const float* x, float* y, int n) {
  std::vector<float> held(1000, x[thread()]);
  if (thread() == n) throw Thrown("thrown by the kernel");
  __syncthreads();
  y[thread()] = held.back();
}

// ---- bounds ----

// y has n elements, the grid more threads.
__global__ void write_past_end(const float* x, float* y, int) {
  const int i = blockIdx.x * kBlock + thread();
  y[i] = x[0];  // past the end of y
}
__global__ void write_before_start(const float* x, float* y, int) {
  y[thread() - 1] = x[0];  // before the start of y
}
__global__ void read_past_end(const float* x, float* y, int n) {
  if (thread() < n) y[thread()] = x[thread() + 1];  // past the end of x
}
__global__ void past_dynamic(const float* x, float*, int n) {
  KAF_DYNAMIC_SHARED(memory);
  if (thread() < n) reinterpret_cast<float*>(memory)[thread()] = x[0];  // past the end of dynamic shared memory
}
__global__ void past_static(const float* x, float* y, int n) {
  __shared__ float shared[kBlock];
  if (thread() < n) shared[thread() + 1] = x[0];  // past the end of static shared memory
  __syncthreads();
  y[thread()] = shared[thread()];
}
__global__ void misaligned(const float* x, float* y, int n) {
  if (thread() < n) y[thread()] = reinterpret_cast<const float4*>(x + 1)[thread()].x;  // not at a multiple of 16 bytes
}

using Kernel = void (*)(const float*, float*, int);
const std::map<std::string, Kernel> kKernels = {
    {"block_sum", block_sum<float>},
    {"block_sum_double", block_sum<double>},
    {"block_sum_dynamic", block_sum_dynamic},
    {"transpose", transpose},
    {"indices", indices},
    {"shuffles_int", shuffles<int>},
    {"shuffles_unsigned", shuffles<unsigned>},
    {"shuffles_int64", shuffles<int64_t>},
    {"shuffles_uint64", shuffles<unsigned long long>},
    {"shuffles_double", shuffles<double>},
    {"votes", votes},
    {"next", read_neighbour<kNext, true>},
    {"next_at_once", read_neighbour<kNext, false>},
    {"previous", read_neighbour<kPrevious, true>},
    {"previous_at_once", read_neighbour<kPrevious, false>},
    {"mirrored", read_neighbour<kMirrored, true>},
    {"mirrored_at_once", read_neighbour<kMirrored, false>},
    {"write_again", write_again<true>},
    {"write_again_at_once", write_again<false>},
    {"warp", warp_in_step<true>},
    {"warp_in_step", warp_in_step<false>},
    {"unwritten_static", unwritten_static<float>},
    {"unwritten_static_double", unwritten_static<double>},
    {"unwritten_dynamic", unwritten_dynamic},
    {"written_by_one_block", written_by_one_block},
    {"arrivals", arrivals},
    {"last_thread_wins", last_thread_wins},
    {"last_block_wins", last_block_wins},
    {"lane_outside_mask", lane_outside_mask},
    {"barrier_after_exit", barrier_after_exit},
    {"barrier_in_loop", barrier_in_loop},
    {"barriers_of_branches", barriers_of_branches},
    {"barrier_and_shuffle", barrier_and_shuffle},
    {"exited_lane", exited_lane},
    {"mask_without_caller", mask_without_caller},
    {"missing_lanes", missing_lanes},
    {"masks_disagree", masks_disagree},
    {"shuffles_of_branches", shuffles_of_branches},
    {"width_of_twelve", width_of_twelve},
    {"throws", throws},
    {"write_past_end", write_past_end},
    {"write_before_start", write_before_start},
    {"read_past_end", read_past_end},
    {"past_dynamic", past_dynamic},
    {"past_static", past_static},
    {"misaligned", misaligned},
};

namespace py = pybind11;
using Floats = py::array_t<float, py::array::c_style>;
using Size = std::array<uint64_t, 3>;

void run(const std::string& kernel, const Floats& x, Floats y, int n, Size grid, Size block, size_t shared) {
  const auto size = [](Size s) { return dim3(unsigned(s[0]), unsigned(s[1]), unsigned(s[2])); };
  kaf_emulator::launch(kKernels.at(kernel), size(grid), size(block), shared, x.data(), y.mutable_data(), n);
}

template <float (*function)(float)>
Floats each(const Floats& x) {
  Floats y(x.size());
  for (py::ssize_t i = 0; i < x.size(); ++i) y.mutable_data()[i] = function(x.data()[i]);
  return y;
}

}  // namespace

PYBIND11_MODULE(faults, module) {
  module.def("run", &run, py::arg("kernel"), py::arg("x"), py::arg("y").noconvert(), py::arg("n"), py::arg("grid"),
             py::arg("block"), py::arg("shared"));
  module.def("ex2_approx", &each<kaf_emulator::ex2_approx>);
  module.def("rcp_approx", &each<kaf_emulator::rcp_approx>);
}
