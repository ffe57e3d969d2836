// The machine that kernels run on: fibers for the threads of a block, barriers and warp
// collectives. One block runs at a time, all of it on the thread that called run().
#pragma once

#include <array>
#include <boost/context/detail/fcontext.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tests/simt/simt.h"

namespace simt {

inline constexpr int kLanes = 32;
inline constexpr std::size_t kStackBytes = std::size_t{128} << 10;
// When lane l of a warp last came to know of what lane m did before: see Memory.
using Clock = std::array<std::uint32_t, kLanes>;

struct Thread {
  enum class State : std::uint8_t { ready, barrier, collective, done };

  boost::context::detail::fcontext_t context = nullptr;
  char* stack = nullptr;  // lowest address above the guard page
  State state = State::ready;
  uint3 index{};
  int number = 0;  // in the block
  Place at;        // where it waits
  std::uint64_t result = 0;
  Clock clock{};

  int warp() const { return number / kLanes; }
  int lane() const { return number % kLanes; }
};

// What was found, in plain numbers: written on a fiber that is then abandoned, so nothing in it
// may own memory. Report makes text of it.
struct Finding {
  enum class Kind : std::uint8_t {
    none,
    race,
    bounds,
    index,
    misaligned,
    uninitialised,
    divergent,
    mask,
    deadlock,
  };
  struct Access {
    uint3 thread{}, block{};
    bool write = false, atomic = false;
    std::uintptr_t pc = 0;
  };
  Kind kind = Kind::none;
  Access access;               // who was caught, at what
  std::uintptr_t address = 0;  // of memory; 0: it is about something else
  std::size_t bytes = 0;
  Access other;              // of a race
  bool other_block = false;  // its thread is in another block
  const char* note = "";     // a phrase
  const char* file = "";     // where, when it is not an instruction
  unsigned line = 0;
};

class Memory;

// The thread that runs on this OS thread; null outside of kernels.
extern thread_local Thread* running;

class Machine {
 public:
  static Machine& instance();
  Machine(const Machine&) = delete;
  ~Machine();

  void launch(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Body body,
              const void* call);

  // From fibers.
  int barrier(Barrier kind, int predicate, Place at);
  std::uint64_t collective(Collective kind, unsigned mask, std::uint64_t value, int lane, int width,
                           Place at);
  // Ends the launch.
  [[noreturn]] void stop(const Finding& finding);

  const std::vector<Thread*>& threads() const { return in_block_; }
  Memory& memory() { return *memory_; }
  // Held by a launch, and by who changes what memory there is.
  std::mutex& mutex() { return mutex_; }

 private:
  using Context = boost::context::detail::fcontext_t;
  struct Group {  // lanes of a warp at one collective
    int warp;
    Collective kind;
    unsigned mask, arrived;
    Place at;
    std::array<std::uint64_t, kLanes> values;
    std::array<int, kLanes> lanes;
    int width;
  };

  Machine();
  static void entry(boost::context::detail::transfer_t transfer);
  void check_shape(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes) const;
  void note_main_stack();
  void prepare(dim3 block);
  void run_block(std::uint64_t number);
  void push_ready(Thread& thread);
  void jump(Context to, Context& from, Thread* next);
  void wait(Thread& self);
  [[noreturn]] void finish(Thread& self);
  [[noreturn]] void stall();
  Group& group_of(const Thread& self, Collective kind, unsigned mask, Place at);
  void complete(Group& group);
  std::uint64_t result_of(const Group& group, int lane);
  std::string waiting() const;

  std::mutex mutex_;
  std::unique_ptr<Memory> memory_;
  std::vector<Thread> pool_;
  std::vector<Thread*> in_block_;  // by number
  std::vector<Thread*> run_order_;
  std::vector<Thread*> ready_;  // a ring
  std::size_t ready_head_ = 0, ready_count_ = 0;
  std::vector<Group> groups_;
  Body body_ = nullptr;
  const void* call_ = nullptr;
  dim3 grid_, block_size_;
  int done_ = 0;
  int at_barrier_ = 0, barrier_value_ = 0;
  Barrier barrier_kind_ = Barrier::plain;
  Place barrier_at_;
  Context main_ = nullptr;
  void* main_stack_ = nullptr;  // for the address sanitizer
  std::size_t main_stack_bytes_ = 0;
  Finding finding_;
};

// A finding of the running thread.
Finding found(Finding::Kind kind, const char* note);

// "kernels/norm.cu:12"
std::string to_string(const Place& place);

}  // namespace simt
