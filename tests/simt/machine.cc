#include "tests/simt/machine.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <string_view>

#include <pthread.h>
#include <sys/mman.h>

#include "tests/simt/memory.h"
#include "tests/simt/report.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

using boost::context::detail::jump_fcontext;
using boost::context::detail::make_fcontext;
using boost::context::detail::transfer_t;

constexpr std::size_t kGuardBytes = 4096;
constexpr std::size_t kMostThreads = 1024;
constexpr std::uint64_t kMostBlocks = std::uint64_t{1} << 31;

char* new_stack() {
  void* at = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED || mprotect(at, kGuardBytes, PROT_NONE) != 0) {
    throw std::bad_alloc();
  }
  return static_cast<char*>(at) + kGuardBytes;
}

std::uint64_t volume(dim3 size) {
  return std::uint64_t{size.x} * size.y * size.z;
}

uint3 unflatten(std::uint64_t number, dim3 size) {
  return {static_cast<unsigned>(number % size.x), static_cast<unsigned>(number / size.x % size.y),
          static_cast<unsigned>(number / size.x / size.y)};
}

template <class T>
void arrange(std::vector<T>& items) {
  const Options& how = options();
  if (how.order == Order::descending) {
    std::ranges::reverse(items);
  } else if (how.order == Order::shuffled) {
    std::shuffle(items.begin(), items.end(), std::mt19937(how.seed));
  }
}

bool same_place(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::string_view(a.file_name()) == b.file_name();
}

}  // namespace

thread_local Identity identity;
thread_local Thread* running = nullptr;

Options& options() {
  static Options instance;
  return instance;
}

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

Machine::Machine() : memory_(std::make_unique<Memory>()), pool_(kMostThreads) {}

Machine::~Machine() {
  for (const Thread& thread : pool_) {
    if (thread.stack != nullptr) {
      munmap(thread.stack - kGuardBytes, kStackBytes + kGuardBytes);
    }
  }
}

// ---- a launch ----------------------------------------------------------------------------------

void Machine::check_shape(const char* kernel, dim3 grid, dim3 block,
                          std::size_t shared_bytes) const {
  const std::uint64_t threads = volume(block), blocks = volume(grid);
  if (threads == 0 || threads > kMostThreads || blocks == 0 || blocks >= kMostBlocks ||
      grid.y > 65535 || grid.z > 65535 || block.z > 64) {
    throw Fault("launch", std::string("[") + kernel + "] launch: " + std::to_string(blocks) +
                              " blocks of " + std::to_string(threads) + " threads");
  }
  if (shared_bytes > options().max_shared_bytes) {
    throw Fault("launch", std::string("[") + kernel + "] launch: " + std::to_string(shared_bytes) +
                              " bytes of dynamic shared memory");
  }
}

namespace {

class Gate {
 public:
  Gate() { call(true); }
  ~Gate() { call(false); }
  Gate(const Gate&) = delete;

 private:
  static void call(bool open) {
    if (options().gate != nullptr) {
      options().gate(open);
    }
  }
};

std::vector<std::uint64_t> all_of(dim3 grid) {
  std::vector<std::uint64_t> blocks(volume(grid));
  std::iota(blocks.begin(), blocks.end(), std::uint64_t{0});
  return blocks;
}

std::vector<std::uint64_t> corners_of(dim3 grid) {
  std::set<std::uint64_t> blocks{volume(grid) / 2};
  for (const std::uint64_t z : {0u, grid.z - 1}) {
    for (const std::uint64_t y : {0u, grid.y - 1}) {
      for (const std::uint64_t x : {0u, grid.x - 1}) {
        blocks.insert((z * grid.y + y) * grid.x + x);
      }
    }
  }
  return {blocks.begin(), blocks.end()};
}

}  // namespace

void Machine::launch(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Body body,
                     const void* call) {
  const std::lock_guard lock(mutex_);
  const Gate gate;
  check_shape(kernel, grid, block, shared_bytes);
  body_ = body;
  call_ = call;
  grid_ = grid;
  prepare(block);
  memory_->start_launch(shared_bytes);
  note_main_stack();
  finding_ = {};
  std::vector<std::uint64_t> blocks = options().corners ? corners_of(grid) : all_of(grid);
  arrange(blocks);
  for (const std::uint64_t number : blocks) {
    run_block(number);
    if (finding_.kind != Finding::Kind::none) {
      throw Fault(kind_name(finding_.kind),
                  report(kernel, finding_, memory_->describe(finding_.address), waiting()));
    }
  }
}

// The address sanitizer must be told of the stack that it comes back to.
void Machine::note_main_stack() {
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &main_stack_, &main_stack_bytes_);
    pthread_attr_destroy(&attributes);
  }
#endif
}

void Machine::prepare(dim3 block) {
  block_size_ = block;
  const std::size_t count = volume(block);
  in_block_.clear();
  for (std::size_t i = 0; i < count; ++i) {
    Thread& thread = pool_[i];
    if (thread.stack == nullptr) {
      thread.stack = new_stack();
    }
    thread.number = static_cast<int>(i);
    thread.index = unflatten(i, block);
    in_block_.push_back(&thread);
  }
  run_order_ = in_block_;
  arrange(run_order_);
  ready_.assign(count, nullptr);
}

void Machine::run_block(std::uint64_t number) {
  identity.block = unflatten(number, grid_);
  identity.block_size = block_size_;
  identity.grid_size = grid_;
  groups_.clear();
  ready_head_ = ready_count_ = 0;
  done_ = at_barrier_ = 0;
  memory_->start_block();
  for (Thread* thread : run_order_) {
#if defined(__SANITIZE_ADDRESS__)
    // What ran here before was left in the middle, with its locals marked.
    __asan_unpoison_memory_region(thread->stack, kStackBytes);
#endif
    thread->context = make_fcontext(thread->stack + kStackBytes, kStackBytes, &Machine::entry);
    push_ready(*thread);
  }
  Thread* first = ready_[ready_head_];
  ready_head_ = (ready_head_ + 1) % ready_.size();
  --ready_count_;
  jump(first->context, main_, first);
}

void Machine::push_ready(Thread& thread) {
  thread.state = Thread::State::ready;
  ready_[(ready_head_ + ready_count_) % ready_.size()] = &thread;
  ++ready_count_;
}

// ---- switching ---------------------------------------------------------------------------------

// `from`: where the context that is left goes. Whoever is jumped to stores it there.
void Machine::jump(Context to, Context& from, Thread* next) {
  running = next;
  if (next != nullptr) {
    identity.thread = next->index;
  }
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, next != nullptr ? next->stack : main_stack_,
                                 next != nullptr ? kStackBytes : main_stack_bytes_);
#endif
  const transfer_t back = jump_fcontext(to, &from);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  *static_cast<Context*>(back.data) = back.fctx;
}

void Machine::entry(transfer_t transfer) {
  Machine& machine = instance();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  *static_cast<Context*>(transfer.data) = transfer.fctx;
  Thread& self = *running;
  machine.body_(machine.call_);
  machine.finish(self);
}

void Machine::finish(Thread& self) {
  self.state = Thread::State::done;
  if (++done_ == static_cast<int>(in_block_.size())) {
    memory_->end_interval();
    jump(main_, self.context, nullptr);
  }
  wait(self);
  std::abort();  // a thread that is done is never made ready
}

void Machine::wait(Thread& self) {
  if (ready_count_ == 0) {
    stall();
  }
  Thread* next = ready_[ready_head_];
  ready_head_ = (ready_head_ + 1) % ready_.size();
  --ready_count_;
  jump(next->context, self.context, next);
}

void Machine::stop(const Finding& finding) {
  finding_ = finding;
  Context abandoned = nullptr;
  jump(main_, abandoned, nullptr);
  std::abort();
}

Finding found(Finding::Kind kind, const char* note) {
  Finding finding;
  finding.kind = kind;
  finding.note = note;
  finding.access.thread = identity.thread;
  finding.access.block = identity.block;
  return finding;
}

// ---- barriers and collectives ------------------------------------------------------------------

int Machine::barrier(Barrier kind, int predicate, Place at) {
  Thread& self = *running;
  self.at = at;
  self.state = Thread::State::barrier;
  if (at_barrier_ == 0) {
    barrier_kind_ = kind;
    barrier_at_ = at;
    barrier_value_ = kind == Barrier::all ? 1 : 0;
  } else if (kind != barrier_kind_ || !same_place(at, barrier_at_)) {
    stop(found(Finding::Kind::divergent, "other threads of the block wait at another barrier"));
  }
  switch (kind) {
    case Barrier::plain:
      break;
    case Barrier::count:
      barrier_value_ += predicate != 0 ? 1 : 0;
      break;
    case Barrier::all:
      barrier_value_ = barrier_value_ != 0 && predicate != 0 ? 1 : 0;
      break;
    case Barrier::any:
      barrier_value_ = barrier_value_ != 0 || predicate != 0 ? 1 : 0;
      break;
  }
  if (++at_barrier_ < static_cast<int>(in_block_.size())) {
    wait(self);
    return static_cast<int>(self.result);
  }
  memory_->end_interval();
  at_barrier_ = 0;
  for (Thread* thread : run_order_) {
    thread->result = static_cast<std::uint64_t>(barrier_value_);
    if (thread != &self) {
      push_ready(*thread);
    }
  }
  self.state = Thread::State::ready;
  return barrier_value_;
}

Machine::Group& Machine::group_of(const Thread& self, Collective kind, unsigned mask, Place at) {
  for (Group& group : groups_) {
    if (group.warp == self.warp() && group.mask == mask && group.kind == kind &&
        same_place(group.at, at) && (group.arrived >> self.lane() & 1u) == 0) {
      return group;
    }
  }
  return groups_.emplace_back(Group{self.warp(), kind, mask, 0, at, {}, {}, kLanes});
}

std::uint64_t Machine::collective(Collective kind, unsigned mask, std::uint64_t value, int lane,
                                  int width, Place at) {
  Thread& self = *running;
  self.at = at;
  const auto self_lane = static_cast<std::size_t>(self.lane());
  if ((mask >> self_lane & 1u) == 0) {
    stop(found(Finding::Kind::mask, "the mask leaves out the caller"));
  }
  for (int other = 0; other < kLanes; ++other) {
    const std::size_t number = static_cast<std::size_t>(self.warp() * kLanes + other);
    if ((mask >> other & 1u) != 0 && number >= in_block_.size()) {
      stop(found(Finding::Kind::mask, "the mask names lanes that the block does not have"));
    }
    if ((mask >> other & 1u) != 0 && in_block_[number]->state == Thread::State::done) {
      stop(found(Finding::Kind::mask, "the mask names lanes that have returned"));
    }
  }
  Group& group = group_of(self, kind, mask, at);
  group.arrived |= 1u << self_lane;
  group.values[self_lane] = value;
  group.lanes[self_lane] = lane;
  group.width = width;
  self.state = Thread::State::collective;
  if (group.arrived != mask) {
    wait(self);
  } else {
    complete(group);
    self.state = Thread::State::ready;
  }
  return self.result;
}

// The last lane is here: it computes for all and lets the others go on.
void Machine::complete(Group& group) {
  std::array<Thread*, kLanes> lanes{};
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((group.mask >> lane & 1u) != 0) {
      lanes[static_cast<std::size_t>(lane)] =
          in_block_[static_cast<std::size_t>(group.warp * kLanes + lane)];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (Thread* thread = lanes[static_cast<std::size_t>(lane)]) {
      thread->result = result_of(group, lane);
    }
  }
  if (group.kind == Collective::sync) {
    memory_->synchronise(group.mask, lanes.data());
  }
  for (Thread* thread : run_order_) {
    if (thread->warp() == group.warp && (group.mask >> thread->lane() & 1u) != 0 &&
        thread != running) {
      push_ready(*thread);
    }
  }
  group = groups_.back();
  groups_.pop_back();
}

std::uint64_t Machine::result_of(const Group& group, int lane) {
  const int first = lane & ~(group.width - 1), end = first + group.width;
  const int given = group.lanes[static_cast<std::size_t>(lane)];
  int source = lane;
  switch (group.kind) {
    case Collective::sync:
      return 0;
    case Collective::ballot: {
      std::uint64_t bits = 0;
      for (std::size_t i = 0; i < kLanes; ++i) {
        bits |= (group.mask >> i & 1u) != 0 && group.values[i] != 0 ? std::uint64_t{1} << i : 0;
      }
      return bits;
    }
    case Collective::shuffle:
      source = first + (given & (group.width - 1));
      break;
    case Collective::up:
      source = lane - given < first ? lane : lane - given;
      break;
    case Collective::down:
      source = lane + given >= end ? lane : lane + given;
      break;
    case Collective::exclusive_or:
      source = (lane ^ given) >= end ? lane : lane ^ given;
      break;
  }
  if ((group.mask >> source & 1u) == 0) {
    Finding finding = found(Finding::Kind::mask, "a shuffle from a lane outside of the mask");
    finding.access.thread = in_block_[static_cast<std::size_t>(group.warp * kLanes + lane)]->index;
    stop(finding);
  }
  return group.values[static_cast<std::size_t>(source)];
}

// Nobody can go on.
void Machine::stall() {
  for (const Group& group : groups_) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (((group.mask & ~group.arrived) >> lane & 1u) == 0) {
        continue;
      }
      switch (in_block_[static_cast<std::size_t>(group.warp * kLanes + lane)]->state) {
        case Thread::State::done:
          stop(found(Finding::Kind::mask, "the mask names lanes that have returned"));
        case Thread::State::collective:
          stop(found(Finding::Kind::mask,
                     "the mask names lanes that wait in another collective or with another mask"));
        default:
          stop(found(Finding::Kind::deadlock, "threads wait for each other"));
      }
    }
  }
  stop(found(Finding::Kind::divergent, "threads have returned that others wait for"));
}

std::string Machine::waiting() const {
  std::vector<std::pair<std::string, int>> groups;
  for (const Thread* thread : in_block_) {
    std::string what = "run";
    if (thread->state == Thread::State::done) {
      what = "have returned";
    } else if (thread->state == Thread::State::barrier) {
      what = "wait at the barrier " + to_string(thread->at);
    } else if (thread->state == Thread::State::collective) {
      what = "wait at the collective " + to_string(thread->at);
    }
    const auto it = std::ranges::find(groups, what, &std::pair<std::string, int>::first);
    if (it == groups.end()) {
      groups.emplace_back(what, 1);
    } else {
      ++it->second;
    }
  }
  std::string text;
  for (const auto& [what, count] : groups) {
    text += (text.empty() ? "" : "; ") + std::to_string(count) + " threads " + what;
  }
  return text;
}

// ---- what device code calls --------------------------------------------------------------------

int barrier(Barrier kind, int predicate, Place at) {
  return Machine::instance().barrier(kind, predicate, at);
}

std::uint64_t collective(Collective kind, unsigned mask, std::uint64_t value, int lane, int width,
                         Place at) {
  return Machine::instance().collective(kind, mask, value, lane, width, at);
}

namespace {

Capture capture_;
std::atomic<std::int64_t> launches_{0};

}  // namespace

void run(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Body body,
         const void* call) {
  ++launches_;
  Machine::instance().launch(kernel, grid, block, shared_bytes, body, call);
}

void set_capture(const Capture& capture) {
  capture_ = capture;
}

bool capturing() {
  return capture_.capturing != nullptr && capture_.capturing();
}

void capture(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Body body,
             const void* call, Body destroy) {
  capture_.keep(kernel, [=, owned = std::shared_ptr<const void>(call, destroy)] {
    Machine::instance().launch(kernel, grid, block, shared_bytes, body, owned.get());
  });
}

std::int64_t launches() {
  return launches_;
}

}  // namespace simt
