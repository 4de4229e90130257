// CUDA on the CPU: with this header g++ compiles device code and its launches, and kernels run here, thread by thread.
//
// Every CUDA thread is a fiber with a stack of its own, and blocks run one after another. A thread runs until it waits
// for others, so what a kernel computes without waiting where it should depends on the order of the threads, which
// KAFOPS_EMULATOR_ORDER chooses at every launch: forward, reverse, or a number: threads (anew at every step) and blocks
// shuffled by that seed. Shared memory is full of NaN before every block. What CUDA leaves undefined is an exception of
// launch() as far as it can be seen: a divergent barrier, a wrong mask, a deadlock, an impossible grid.
//
// Not here: <<<>>>, streams, atomics but atomicAdd, textures, inline PTX, memory of the device (pointers are the host's), a spinning
// wait of one thread for another. It shows logic, bounds and order, never speed.
#pragma once
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>  // and <memory>: before __noinline__ is a macro, for they use an attribute of that name
#include <limits>
#include <memory>
#include <mutex>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define KAF_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KAF_EMULATOR_ASAN 1
#endif
#endif
#ifdef KAF_EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

#pragma GCC visibility push(hidden)  // each module has its own state, as it has its own shared variables

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// thread_local, for that is how the variables of templates are found too (g++ ignores their section attribute); used,
// for a variable that nothing writes would be taken for the constant 0.
#define __shared__ static thread_local __attribute__((used))
#define KAF_DYNAMIC_SHARED(name) unsigned char* const name = ::kaf_emulator::dynamic_shared()

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The scheduler writes these at every switch.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// A stack's registers lie on it while it is suspended; its pointer is all that is kept.
#if defined(__x86_64__)
asm(R"(
  .pushsection .text.kaf_emulator_switch,"axG",@progbits,kaf_emulator_switch,comdat
  .weak kaf_emulator_switch
  .hidden kaf_emulator_switch
  .type kaf_emulator_switch,@function
kaf_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size kaf_emulator_switch,.-kaf_emulator_switch
  .popsection
)");
#elif defined(__aarch64__)
asm(R"(
  .pushsection .text.kaf_emulator_switch,"axG",%progbits,kaf_emulator_switch,comdat
  .weak kaf_emulator_switch
  .hidden kaf_emulator_switch
  .type kaf_emulator_switch,%function
kaf_emulator_switch:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x9, [sp], #160
  mov x30, xzr
  br x9
  .size kaf_emulator_switch,.-kaf_emulator_switch
  .popsection
)");
#endif
#if defined(__x86_64__) || defined(__aarch64__)
extern "C" void kaf_emulator_switch(void** from, void* to);
#endif

namespace kaf_emulator {

using Site = std::source_location;

constexpr unsigned kWarp = 32;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 << 10;  // as on compute capability 9.0, with the opt-in of cudaFuncSetAttribute
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPageBytes = 64 << 10;  // the largest page of any system this may run on
constexpr size_t kGuardBytes = 256;      // behind dynamic shared memory, where AddressSanitizer does not watch it
constexpr unsigned kVote = ~0u;          // in place of the lane a shuffle reads: all lanes' predicates are wanted

// A bijection that leaves no pattern of its input (the finaliser of splitmix64).
inline uint64_t scramble(uint64_t v) {
  v += 0x9e3779b97f4a7c15u;
  v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9u;
  v = (v ^ (v >> 27)) * 0x94d049bb133111ebu;
  return v ^ (v >> 31);
}

// What a suspended flow of control needs to go on.
struct Context {
#if defined(__x86_64__) || defined(__aarch64__)
  void* pointer = nullptr;
#else
  ucontext_t registers;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Stack {
  char* memory;  // a page that may not be touched, then kStackBytes
  Context context;

  Stack() {
    void* mapped = mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(mapped);
    mprotect(memory, kPageBytes, PROT_NONE);
  }
  ~Stack() { munmap(memory, kPageBytes + kStackBytes); }
  Stack(const Stack&) = delete;
  char* bottom() const { return memory + kPageBytes; }
};

enum class Status : uint8_t { ready, at_barrier, in_warp, finished };

struct Thread {
  uint3 index;
  unsigned number;  // in the block, x fastest
  Status status;
  int stack;  // of State::stacks; -1 before it starts and after it finishes
  Site site;  // of the call it waits in, then that call's mask, deposit and result
  unsigned mask;
  unsigned source;
  uint64_t value, result;
};

struct Warp {
  unsigned lanes, waiting, exited;  // as bits
};

struct State {
  std::mutex mutex;  // one launch at a time: static shared variables are there once
  std::deque<Stack> stacks;  // contexts may point into themselves, and stay where they are
  std::vector<int> free_stacks;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned> order;
  Context scheduler;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_bytes = 0;
  Thread* current = nullptr;
  void (*run)(void*) = nullptr;
  void* arguments = nullptr;
  unsigned char* dynamic_shared = nullptr;
  unsigned at_barrier = 0, finished = 0;
  unsigned predicates = 0, predicates_of_last_barrier = 0;
  bool cancelling = false;
  std::exception_ptr failure;
  uint64_t launches = 0;
};
inline State state;

// Thrown in suspended threads when another has failed, so that their stacks are left in order.
struct Cancelled {};

inline std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}
inline std::string text(dim3 v) { return text(uint3{v.x, v.y, v.z}); }
inline std::string text(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}
inline std::string bits(unsigned mask) {
  std::string digits;
  for (int shift = 28; shift >= 0; shift -= 4) digits += "0123456789abcdef"[mask >> shift & 15];
  return "0x" + digits;
}
inline std::string where(const Thread& thread) {
  return text(thread.site) + ": block " + text(blockIdx) + ", thread " + text(thread.index) + ": ";
}
[[noreturn]] inline void fail(const Thread& thread, const std::string& what) {
  throw std::runtime_error("CUDA emulator: " + where(thread) + what);
}

inline bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}

// The three functions below run across a switch of stacks, of which AddressSanitizer's bookkeeping in their own frames
// would know nothing.
#define KAF_EMULATOR_RAW __attribute__((no_sanitize("address"), noinline))

KAF_EMULATOR_RAW inline void switch_context(Context& from, Context& to) {
#if defined(__x86_64__) || defined(__aarch64__)
  kaf_emulator_switch(&from.pointer, to.pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
}

KAF_EMULATOR_RAW inline void to_scheduler(Context& from, [[maybe_unused]] bool for_good) {
#ifdef KAF_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, state.scheduler_bottom, state.scheduler_bytes);
#endif
  switch_context(from, state.scheduler);
#ifdef KAF_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

inline void finish_thread();

// The first frame of every stack.
KAF_EMULATOR_RAW inline void thread_main() {
#ifdef KAF_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &state.scheduler_bottom, &state.scheduler_bytes);
#endif
  try {
    state.run(state.arguments);
    finish_thread();
  } catch (const Cancelled&) {
  } catch (...) {
    if (!state.failure) state.failure = std::current_exception();
  }
  state.current->status = Status::finished;
  ++state.finished;
  to_scheduler(state.stacks[state.current->stack].context, true);
  __builtin_trap();
}

inline void prepare(Stack& stack, int number) {
  // Stacks begin at different cache lines of a page, else a few sets of the cache would hold all of them.
  char* top = stack.bottom() + kStackBytes - 64 * size_t(number % 32);
#if defined(__x86_64__)
  void** slot = reinterpret_cast<void**>(top) - 2;
  slot[0] = reinterpret_cast<void*>(&thread_main);  // where the switch returns to
  slot[1] = nullptr;                                // where thread_main would: the end of a backtrace
  std::fill(slot - 6, slot, nullptr);
  stack.context.pointer = slot - 6;
#elif defined(__aarch64__)
  void** slot = reinterpret_cast<void**>(top) - 20;
  std::fill(slot, slot + 20, nullptr);
  slot[1] = reinterpret_cast<void*>(&thread_main);
  stack.context.pointer = slot;
#else
  getcontext(&stack.context.registers);
  stack.context.registers.uc_stack.ss_sp = stack.bottom();
  stack.context.registers.uc_stack.ss_size = top - stack.bottom();
  stack.context.registers.uc_link = nullptr;
  makecontext(&stack.context.registers, &thread_main, 0);
#endif
}

// Scheduler: lets a thread run until it waits or finishes.
inline void resume(Thread& thread) {
  State& s = state;
  if (thread.stack < 0) {
    if (s.free_stacks.empty()) {
      s.free_stacks.push_back(int(s.stacks.size()));
      s.stacks.emplace_back();
    }
    thread.stack = s.free_stacks.back();  // the one left last: warm in the cache
    s.free_stacks.pop_back();
    prepare(s.stacks[thread.stack], thread.stack);
  }
  Stack& stack = s.stacks[thread.stack];
  s.current = &thread;
  threadIdx = thread.index;
#ifdef KAF_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&s.scheduler.fake_stack, stack.bottom(), kStackBytes);
#endif
  switch_context(s.scheduler, stack.context);
#ifdef KAF_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(s.scheduler.fake_stack, nullptr, nullptr);
#endif
  s.current = nullptr;
  if (thread.status == Status::finished) {
    s.free_stacks.push_back(thread.stack);
    thread.stack = -1;
  }
}

// Thread: waits until its status is ready again.
inline void wait(Thread& me, Status status) {
  if (!state.cancelling) {
    me.status = status;
    to_scheduler(state.stacks[me.stack].context, false);
  }
  if (state.cancelling) throw Cancelled{};
}

inline unsigned barrier(bool predicate, Site site) {
  Thread& me = *state.current;
  me.site = site;
  ++state.at_barrier;
  state.predicates += predicate;
  wait(me, Status::at_barrier);
  return state.predicates_of_last_barrier;
}

// The lanes of a mask meet in one call; the last to arrive hands each of them what it wants: the value of another lane,
// or the mask of the lanes whose value is not 0.
inline uint64_t meet(unsigned mask, uint64_t value, unsigned source, Site site) {
  Thread& me = *state.current;
  Warp& warp = state.warps[me.number / kWarp];
  Thread* lanes = &state.threads[me.number / kWarp * kWarp];
  const unsigned bit = 1u << me.number % kWarp;
  me.site = site, me.mask = mask, me.value = value, me.source = source;
  if (!(mask & bit)) fail(me, "the mask " + bits(mask) + " lacks the calling lane " + std::to_string(me.number % kWarp));
  if (mask & ~warp.lanes) fail(me, "the mask " + bits(mask) + " names lanes that the block does not have");
  if (mask & warp.exited) fail(me, "the mask " + bits(mask) + " names exited lanes, " + bits(mask & warp.exited));
  warp.waiting |= bit;
  bool all = (warp.waiting & mask) == mask;
  for (unsigned i = 0; all && i < kWarp; ++i) all = !(mask >> i & 1) || lanes[i].mask == mask;
  if (!all) {
    wait(me, Status::in_warp);
    return me.result;
  }
  unsigned votes = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    if (!same(lanes[i].site, site))
      fail(me, "lane " + std::to_string(i) + " of the mask " + bits(mask) + " is in another call, at " + text(lanes[i].site));
    votes |= unsigned(lanes[i].value != 0) << i;
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    const unsigned from = lanes[i].source;
    lanes[i].result = from == kVote ? votes : mask >> from & 1 ? lanes[from].value : ~uint64_t(0);  // else undefined: NaN
    lanes[i].status = Status::ready;
  }
  warp.waiting &= ~mask;
  return me.result;
}

inline void finish_thread() {
  Thread& me = *state.current;
  Warp& warp = state.warps[me.number / kWarp];
  const unsigned bit = 1u << me.number % kWarp;
  warp.exited |= bit;
  for (unsigned i = 0; warp.waiting >> i; ++i) {
    const Thread& other = state.threads[me.number / kWarp * kWarp + i];
    if ((warp.waiting >> i & 1) && (other.mask & bit))
      fail(other, "the mask " + bits(other.mask) + " names lane " + std::to_string(me.number % kWarp) + ", which exited");
  }
}

inline void release_barrier() {
  State& s = state;
  const Thread& first = s.threads.front();
  for (Thread& thread : s.threads) {
    if (!same(thread.site, first.site))
      fail(thread, "divergent __syncthreads(): thread " + text(first.index) + " waits in another, at " + text(first.site));
    thread.status = Status::ready;
  }
  s.predicates_of_last_barrier = std::exchange(s.predicates, 0);
  s.at_barrier = 0;
}

[[noreturn]] inline void stuck() {
  const State& s = state;
  const auto is = [](Status status) { return [status](const Thread& t) { return t.status == status; }; };
  const auto in_warp = std::find_if(s.threads.begin(), s.threads.end(), is(Status::in_warp));
  const auto at_barrier = std::find_if(s.threads.begin(), s.threads.end(), is(Status::at_barrier));
  if (at_barrier == s.threads.end()) {
    const unsigned arrived = s.warps[in_warp->number / kWarp].waiting & in_warp->mask;
    fail(*in_warp, "deadlock: the lanes of the mask " + bits(in_warp->mask) + " never meet; of them wait " + bits(arrived) +
                       ", with the same mask or others");
  }
  std::string what = "divergent __syncthreads(): " + std::to_string(s.at_barrier) + " of " +
                     std::to_string(s.threads.size()) + " threads wait in it, " + std::to_string(s.finished) + " have exited";
  if (in_warp != s.threads.end())
    what += ", " + std::to_string(std::count_if(s.threads.begin(), s.threads.end(), is(Status::in_warp))) +
            " wait for lanes of their warp, as at " + text(in_warp->site);
  fail(*at_barrier, what);
}

// How threads and blocks are ordered: read at every launch.
struct Order {
  bool reverse = false, shuffled = false;
  uint64_t draws = 0;

  Order() {
    const char* chosen = std::getenv("KAFOPS_EMULATOR_ORDER");
    const std::string name = chosen && *chosen ? chosen : "forward";
    if (name == "forward") return;
    reverse = name == "reverse";
    if (reverse) return;
    shuffled = name.size() <= 18 && name.find_first_not_of("0123456789") == std::string::npos;
    if (!shuffled)
      throw std::runtime_error("CUDA emulator: KAFOPS_EMULATOR_ORDER is forward, reverse or a seed, got " + name);
    draws = scramble(std::stoull(name));
  }

  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t left = items.size(); left > 1; --left)  // 32 bits times at most 2^31 items
      std::swap(items[left - 1], items[uint64_t(uint32_t(scramble(++draws))) * left >> 32]);
  }
};

// The static shared variables: the thread-local storage of this module. There may be others in it, which no kernel
// touches: they are put back after the launch.
class StaticShared {
 public:
  StaticShared() {
    dl_iterate_phdr(&find, this);
    saved_.assign(begin_, begin_ + bytes_);
  }
  ~StaticShared() { std::copy(saved_.begin(), saved_.end(), begin_); }
  StaticShared(const StaticShared&) = delete;
  void fill() { std::memset(begin_, 0xff, bytes_); }

 private:
  static int find(dl_phdr_info* module, size_t, void* found) {
    static thread_local char here;
    auto* begin = static_cast<char*>(module->dlpi_tls_data);
    for (int i = 0; begin && i < module->dlpi_phnum; ++i) {
      const auto& segment = module->dlpi_phdr[i];
      if (segment.p_type != PT_TLS || std::less<>()(&here, begin) || !std::less<>()(&here, begin + segment.p_memsz)) continue;
      static_cast<StaticShared*>(found)->begin_ = begin;
      static_cast<StaticShared*>(found)->bytes_ = segment.p_memsz;
      return 1;
    }
    return 0;
  }

  char* begin_ = nullptr;
  size_t bytes_ = 0;
  std::vector<char> saved_;
};

// One block's dynamic shared memory.
class DynamicShared {
 public:
  explicit DynamicShared(size_t bytes) : bytes_(bytes), memory_(static_cast<unsigned char*>(std::malloc(bytes + kGuard))) {
    if (!memory_) throw std::bad_alloc();
    state.dynamic_shared = memory_;
  }
  ~DynamicShared() {
    state.dynamic_shared = nullptr;
    std::free(memory_);
  }
  DynamicShared(const DynamicShared&) = delete;
  void fill() {
    std::memset(memory_, 0xff, bytes_);
    std::memset(memory_ + bytes_, 0xa5, kGuard);
  }
  void check() const {
    for (size_t i = 0; i < kGuard; ++i)
      if (memory_[bytes_ + i] != 0xa5)
        throw std::runtime_error("CUDA emulator: block " + text(blockIdx) + " wrote byte " + std::to_string(bytes_ + i) +
                                 " of " + std::to_string(bytes_) + " bytes of dynamic shared memory");
  }

 private:
#ifdef KAF_EMULATOR_ASAN
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = kGuardBytes;
#endif
  size_t bytes_;
  unsigned char* memory_;
};

inline unsigned char* dynamic_shared() { return state.dynamic_shared; }

inline void run_threads(Order& order) {
  State& s = state;
  const unsigned n = unsigned(s.threads.size());
  while (s.finished < n) {
    if (order.shuffled) order.shuffle(s.order);
    bool moved = false;
    for (unsigned i : s.order) {
      if (s.threads[i].status != Status::ready) continue;
      resume(s.threads[i]);
      if (s.failure) std::rethrow_exception(s.failure);
      moved = true;
    }
    if (s.at_barrier == n)
      release_barrier();
    else if (!moved)
      stuck();
  }
}

inline void run_block(Order& order) {
  State& s = state;
  for (Thread& thread : s.threads) {
    thread.status = Status::ready;
    thread.stack = -1;
  }
  for (Warp& warp : s.warps) warp.waiting = warp.exited = 0;
  s.at_barrier = s.finished = s.predicates = 0;
  s.failure = nullptr;
  try {
    run_threads(order);
  } catch (...) {
    s.cancelling = true;
    for (Thread& thread : s.threads)
      if (thread.stack >= 0) resume(thread);
    s.cancelling = false;
    s.failure = nullptr;
    throw;
  }
}

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes) {
  constexpr unsigned kMaxX = 0x7fffffff, kMaxYZ = 65535;
  const size_t n = size_t(block.x) * block.y * block.z;
  std::string wrong;
  if (!grid.x || !grid.y || !grid.z || grid.x > kMaxX || grid.y > kMaxYZ || grid.z > kMaxYZ)
    wrong = "a grid has 1 to 2147483647 x 65535 x 65535 blocks";
  else if (!block.x || !block.y || !block.z || block.x > 1024 || block.y > 1024 || block.z > 64 || n > kMaxThreads)
    wrong = "a block has 1 to 1024 threads, of at most 1024 x 1024 x 64";
  else if (shared_bytes > kMaxShared)
    wrong = "a block has at most " + std::to_string(kMaxShared) + " bytes of shared memory";
  if (!wrong.empty())
    throw std::runtime_error("CUDA emulator: invalid configuration: " + wrong + "; got grid " + text(grid) + ", block " +
                             text(block) + ", " + std::to_string(shared_bytes) + " bytes of shared memory");
  State& s = state;
  Order order;
  gridDim = grid;
  blockDim = block;
  s.threads.resize(n);
  s.order.resize(n);
  for (unsigned i = 0; i < n; ++i) {
    s.threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    s.threads[i].number = i;
    s.order[i] = order.reverse ? unsigned(n) - 1 - i : i;
  }
  s.warps.resize((n + kWarp - 1) / kWarp);
  for (size_t w = 0; w < s.warps.size(); ++w)
    s.warps[w].lanes = n - w * kWarp >= kWarp ? ~0u : (1u << (n - w * kWarp)) - 1;
  StaticShared static_shared;
  DynamicShared dynamic_shared(shared_bytes);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> shuffled(order.shuffled ? blocks : 0);
  for (uint64_t i = 0; i < shuffled.size(); ++i) shuffled[i] = i;
  if (order.shuffled) order.shuffle(shuffled);
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = order.shuffled ? shuffled[i] : order.reverse ? blocks - 1 - i : i;
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    static_shared.fill();
    dynamic_shared.fill();
    run_block(order);
    dynamic_shared.check();
  }
}

// kernel<<<grid, block, shared_bytes>>>(arguments...), done when it returns. Throws std::runtime_error for what the head
// of this file names, and whatever the kernel throws.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernels take copies of plain data");
  std::lock_guard lock(state.mutex);
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> values;
  } call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
  state.run = [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->values); };
  state.arguments = &call;
  ++state.launches;
  run_grid(grid, block, shared_bytes);
}

template <class T>
T shuffle(unsigned mask, T value, int width, Site site, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8);
  if (width < 1 || width > warpSize || !std::has_single_bit(unsigned(width))) {
    state.current->site = site;
    fail(*state.current, "the width of a shuffle is a power of two up to 32, got " + std::to_string(width));
  }
  uint64_t deposit = 0;
  std::memcpy(&deposit, &value, sizeof value);
  deposit = meet(mask, deposit, source, site);
  std::memcpy(&value, &deposit, sizeof value);
  return value;
}

inline unsigned lane() { return state.current->number % kWarp; }

// exact moved by less than the given number of float's ulps, by an amount that the input's bits decide.
inline double perturbed(double exact, double ulps, float input, uint64_t salt) {
  const double unit = double(scramble(uint64_t(std::bit_cast<uint32_t>(input)) ^ salt << 32) >> 11) * 0x1p-53;
  const double ulp = std::bit_cast<double>(std::bit_cast<uint64_t>(exact) & 0x7ff0000000000000u) * 0x1p-23;
  return exact + (2 * unit - 1) * ulps * ulp;
}

// ex2.approx.ftz.f32: 2^x with the error that the PTX ISA allows: 2 ulp "from correctly rounded result across the full
// range" (2^-22, relative, in its older editions: this keeps to both). Of what is computed in double 1.5 ulp are left for
// the perturbation. Subnormal inputs and results are 0.
inline float ex2_approx(float x) {
  if (std::isnan(x)) return std::numeric_limits<float>::quiet_NaN();
  if (std::fabs(x) < FLT_MIN) return 1.0f;
  const double exact = std::exp2(double(x));
  if (exact < FLT_MIN) return 0.0f;
  if (exact > FLT_MAX) return std::numeric_limits<float>::infinity();
  return std::max(float(perturbed(exact, 1.5, x, 2)), FLT_MIN);
}

// rcp.approx.ftz.f32: 1/x, "maximum ulp error is 1 across the full range of inputs". Subnormal inputs and results are
// zeros of their sign.
inline float rcp_approx(float x) {
  if (std::isnan(x)) return std::numeric_limits<float>::quiet_NaN();
  if (std::fabs(x) < FLT_MIN) return std::copysign(std::numeric_limits<float>::infinity(), x);
  const double exact = 1.0 / double(std::fabs(x));
  if (exact < FLT_MIN) return std::copysign(0.0f, x);
  return std::copysign(std::max(float(perturbed(exact, 0.5, x, 1)), FLT_MIN), x);
}

}  // namespace kaf_emulator

// The barriers and what warps exchange. Each takes the place it is called from, for the messages.

inline void __syncthreads(kaf_emulator::Site site = kaf_emulator::Site::current()) { kaf_emulator::barrier(false, site); }
inline int __syncthreads_count(int predicate, kaf_emulator::Site site = kaf_emulator::Site::current()) {
  return int(kaf_emulator::barrier(predicate != 0, site));
}
inline int __syncthreads_or(int predicate, kaf_emulator::Site site = kaf_emulator::Site::current()) {
  return kaf_emulator::barrier(predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, kaf_emulator::Site site = kaf_emulator::Site::current()) {
  return kaf_emulator::barrier(predicate == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, kaf_emulator::Site site = kaf_emulator::Site::current()) {
  kaf_emulator::meet(mask, 0, kaf_emulator::kVote, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, kaf_emulator::Site site = kaf_emulator::Site::current()) {
  return unsigned(kaf_emulator::meet(mask, predicate != 0, kaf_emulator::kVote, site));
}
inline int __any_sync(unsigned mask, int predicate, kaf_emulator::Site site = kaf_emulator::Site::current()) {
  return kaf_emulator::meet(mask, predicate != 0, kaf_emulator::kVote, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, kaf_emulator::Site site = kaf_emulator::Site::current()) {
  return kaf_emulator::meet(mask, predicate != 0, kaf_emulator::kVote, site) == mask;
}

// A lane outside of the caller's group of `width` lanes gives the caller its own value back.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              kaf_emulator::Site site = kaf_emulator::Site::current()) {
  const unsigned me = kaf_emulator::lane(), in_group = unsigned(width) - 1;
  return kaf_emulator::shuffle(mask, value, width, site, (me & ~in_group) | (unsigned(source) & in_group));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 kaf_emulator::Site site = kaf_emulator::Site::current()) {
  const unsigned me = kaf_emulator::lane(), in_group = unsigned(width) - 1;
  return kaf_emulator::shuffle(mask, value, width, site, delta > (me & in_group) ? me : me - delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   kaf_emulator::Site site = kaf_emulator::Site::current()) {
  const unsigned me = kaf_emulator::lane(), in_group = unsigned(width) - 1;
  return kaf_emulator::shuffle(mask, value, width, site, delta > in_group - (me & in_group) ? me : me + delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  kaf_emulator::Site site = kaf_emulator::Site::current()) {
  const unsigned me = kaf_emulator::lane(), in_group = unsigned(width) - 1, source = me ^ unsigned(lane_mask);
  return kaf_emulator::shuffle(mask, value, width, site, source > (me | in_group) ? me : source);
}

// Arithmetic that CUDA has in the global namespace and <cmath> has not.

#define KAF_EMULATOR_MIN_MAX(T)                            \
  constexpr T min(T a, T b) { return b < a ? b : a; }      \
  constexpr T max(T a, T b) { return a < b ? b : a; }
KAF_EMULATOR_MIN_MAX(int)
KAF_EMULATOR_MIN_MAX(unsigned)
KAF_EMULATOR_MIN_MAX(long)
KAF_EMULATOR_MIN_MAX(unsigned long)
KAF_EMULATOR_MIN_MAX(long long)
KAF_EMULATOR_MIN_MAX(unsigned long long)
#undef KAF_EMULATOR_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __clz(int v) { return std::countl_zero(unsigned(v)); }
inline int __ffs(int v) { return v ? std::countr_zero(unsigned(v)) + 1 : 0; }

inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}

// One thread runs at a time, and blocks one after another: no fence is ever missed.
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* at, unsigned v) { return std::exchange(*at, *at + v); }

#define KAF_EMULATOR_VECTORS(T, name)                                                                     \
  struct alignas(2 * sizeof(T)) name##2 {                                                                 \
    T x, y;                                                                                               \
  };                                                                                                      \
  struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) name##4 {                                           \
    T x, y, z, w;                                                                                         \
  };                                                                                                      \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                                           \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
KAF_EMULATOR_VECTORS(float, float)
KAF_EMULATOR_VECTORS(double, double)
KAF_EMULATOR_VECTORS(int, int)
KAF_EMULATOR_VECTORS(unsigned, uint)
KAF_EMULATOR_VECTORS(unsigned short, ushort)
#undef KAF_EMULATOR_VECTORS

#undef KAF_EMULATOR_RAW
#pragma GCC visibility pop
