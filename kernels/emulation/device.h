// Runs a CUDA kernel's source on one CPU thread, to prove it where there is no GPU. Every lane of a block is a fiber;
// the next one to run is drawn at random, and it runs until it has to wait for others; now and then one warp is let
// far ahead. So a kernel that relies on an order it did not ask for reads poison or what is out of date: shared memory
// starts as NaN, and a copy in flight holds NaN until waited for.
//
// What it cannot show: shuffles, votes and matrix products let all lanes of a warp meet, so a missing sync_warp next
// to one of them stays hidden, as do the memory model between blocks and what the instructions cost.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// a library holds one kernel and runs one launch at a time
static Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;
constexpr int kBarriers = 16;
constexpr size_t kStack = 128 * 1024;
// behind the shared memory that was asked for: whoever writes there is found out
constexpr size_t kGuard = 1024;
constexpr unsigned char kPoison = 0xff;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Copy {
  void *to;
  const void *from;
};

// what a lane shows to the others of its warp
struct Words {
  uint32_t word[6];
};

struct Lane {
  ucontext_t start;
  jmp_buf paused;
  bool started, done;
  unsigned thread;
  const char *waits_for;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open_group;
};

struct Warp {
  unsigned arrived, rounds;
  const char *meeting;
  // a fast lane may already show words of the next meeting while a slow one still reads those of the last
  Words words[2][kWarp];
};

struct Barrier {
  unsigned expected;
  std::vector<Lane *> waiting;
};

class Block;
static Block *running = nullptr;

class Block {
 public:
  Block(std::function<void()> kernel, unsigned threads, size_t shared_bytes, uint64_t seed)
      : kernel_(std::move(kernel)), random_((seed + 1) * 0x9e3779b97f4a7c15u), shared_bytes_(shared_bytes),
        lanes_(threads), warps_(threads / kWarp), stacks_(new char[threads * kStack]) {
    if (threads == 0 || threads % kWarp) throw Failure("a block must be whole warps");
    room_.resize((shared_bytes + kGuard) / sizeof(uint4) + 1);
  }

  void run() {
    std::memset(room_.data(), kPoison, room_.size() * sizeof(uint4));
    for (auto &warp : warps_) warp = Warp{};
    for (auto &barrier : barriers_) barrier = Barrier{};
    ready_.clear();
    for (unsigned i = 0; i < lanes_.size(); ++i) prepare(lanes_[i], i);
    running = this;
    unsigned left = static_cast<unsigned>(lanes_.size());
    while (left) {
      if (ready_.empty()) throw Failure(deadlock());
      resume(draw());
      if (!failure_.empty()) throw Failure(failure_);
      if (current_->done) --left;
    }
    const unsigned char *guard = reinterpret_cast<unsigned char *>(shared()) + shared_bytes_;
    for (size_t i = 0; i < kGuard; ++i)
      if (guard[i] != kPoison) throw Failure("wrote behind the shared memory, byte " + std::to_string(i));
  }

  char *shared() { return reinterpret_cast<char *>(room_.data()); }
  uint64_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    return random_ ^= random_ << 17;
  }

  // all lanes of the warp meet; each sees the words of all
  const Words *meet(const char *meeting, const Words &mine) {
    Warp &warp = warps_[current_->thread / kWarp];
    if (warp.arrived && std::strcmp(warp.meeting, meeting))
      throw Failure(std::string("one warp is in ") + warp.meeting + " and in " + meeting);
    warp.meeting = meeting;
    const Words *words = warp.words[warp.rounds % 2];
    warp.words[warp.rounds % 2][current_->thread % kWarp] = mine;
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      ++warp.rounds;
      const unsigned first = current_->thread / kWarp * kWarp;
      for (unsigned i = first; i < first + kWarp; ++i) ready_.push_back(&lanes_[i]);
    }
    pause(meeting);
    return words;
  }

  void meet_named(int number, unsigned threads) {
    if (number < 0 || number >= kBarriers || threads == 0 || threads % kWarp || threads > lanes_.size())
      throw Failure("no barrier " + std::to_string(number) + " of " + std::to_string(threads) + " threads");
    Barrier &barrier = barriers_[number];
    if (!barrier.waiting.empty() && barrier.expected != threads)
      throw Failure("barrier " + std::to_string(number) + " is expected by different numbers of threads");
    barrier.expected = threads;
    barrier.waiting.push_back(current_);
    if (barrier.waiting.size() == threads) {
      ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
      barrier.waiting.clear();
    }
    pause("a barrier");
  }

  void copy(void *to, const void *from, bool there) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (there && reinterpret_cast<uintptr_t>(from) % 16))
      throw Failure("an asynchronous copy needs addresses that are multiples of 16");
    char *target = static_cast<char *>(to);
    if (target < shared() || target + 16 > shared() + shared_bytes_)
      throw Failure("an asynchronous copy writes outside the shared memory");
    std::memset(to, kPoison, 16);
    current_->open_group.push_back({to, there ? from : nullptr});
  }

  void commit() {
    current_->groups.push_back(std::move(current_->open_group));
    current_->open_group.clear();
  }

  void wait(unsigned pending) {
    auto &groups = current_->groups;
    while (groups.size() > pending) {
      for (const Copy &copy : groups.front())
        if (copy.from) std::memcpy(copy.to, copy.from, 16);
        else std::memset(copy.to, 0, 16);
      groups.erase(groups.begin());
    }
  }

 private:
  static void enter() {
    Block &block = *running;
    try {
      block.kernel_();
    } catch (const std::exception &error) {
      block.failure_ = error.what();
    }
    block.current_->done = true;
    _longjmp(block.scheduler_, 1);
  }

  void prepare(Lane &lane, unsigned thread) {
    lane.started = lane.done = false;
    lane.thread = thread;
    lane.groups.clear();
    lane.open_group.clear();
    getcontext(&lane.start);
    lane.start.uc_stack.ss_sp = stacks_.get() + thread * kStack;
    lane.start.uc_stack.ss_size = kStack;
    lane.start.uc_link = nullptr;
    makecontext(&lane.start, enter, 0);
    ready_.push_back(&lane);
  }

  // for a random while one warp is favoured, to get as far ahead of the others as they let it
  Lane *draw() {
    if (favour_ends_-- == 0) {
      favoured_ = random() % warps_.size();
      favour_ends_ = random() % 4096;
    }
    size_t choice = random() % ready_.size();
    for (int i = 0; i < 8 && ready_[choice]->thread / kWarp != favoured_; ++i) choice = random() % ready_.size();
    std::swap(ready_[choice], ready_.back());
    Lane *lane = ready_.back();
    ready_.pop_back();
    return lane;
  }

  // contexts start a lane, jumps continue it: a jump does not ask the operating system
  __attribute__((noinline)) void resume(Lane *lane) {
    current_ = lane;
    threadIdx = {lane->thread % blockDim.x, lane->thread / blockDim.x, 0};
    if (_setjmp(scheduler_)) return;
    if (lane->started) _longjmp(lane->paused, 1);
    lane->started = true;
    setcontext(&lane->start);
  }

  __attribute__((noinline)) void pause(const char *waits_for) {
    current_->waits_for = waits_for;
    if (_setjmp(current_->paused) == 0) _longjmp(scheduler_, 1);
  }

  std::string deadlock() const {
    std::map<std::string, int> places;
    for (const Lane &lane : lanes_)
      if (lane.done) ++places["the end"];
      else ++places[lane.waits_for];
    std::string message = "deadlock:";
    for (const auto &[place, count] : places) message += " " + std::to_string(count) + " lanes in " + place + ",";
    message.back() = '.';
    return message;
  }

  std::function<void()> kernel_;
  uint64_t random_, favoured_ = 0, favour_ends_ = 0;
  size_t shared_bytes_;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  std::unique_ptr<char[]> stacks_;
  std::vector<uint4> room_;
  Barrier barriers_[kBarriers];
  std::vector<Lane *> ready_;
  Lane *current_ = nullptr;
  jmp_buf scheduler_;
  std::string failure_;
};

// the blocks of a launch run one after the other, in random order
inline void launch(const std::function<void()> &kernel, unsigned grid, unsigned threads, size_t shared_bytes,
                   uint64_t seed) {
  gridDim = {grid, 1, 1};
  blockDim = {threads, 1, 1};
  Block block(kernel, threads, shared_bytes, seed);
  std::vector<unsigned> order(grid);
  for (unsigned i = 0; i < grid; ++i) order[i] = i;
  for (unsigned i = grid; i > 1; --i) std::swap(order[i - 1], order[block.random() % i]);
  for (unsigned i : order) {
    blockIdx = {i, 0, 0};
    block.run();
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::running->meet_named(0, blockDim.x); }
