#include "tests/simt/memory.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "tests/simt/report.h"

// Of the linker: what lies between is code and constants.
extern "C" const char __executable_start;
extern "C" const char __data_start;

namespace simt {
namespace {

std::uintptr_t address_of(const void* at) {
  return reinterpret_cast<std::uintptr_t>(at);
}

std::vector<Cell> cells_for(std::size_t bytes) {
  return std::vector<Cell>((bytes + kCellBytes - 1) / kCellBytes);
}

}  // namespace

Memory::Memory() : dynamic_(new unsigned char[options().max_shared_bytes + 16]) {
  const auto add_shared = [this](std::uintptr_t begin, std::size_t bytes, std::string name) {
    auto region = std::make_unique<Region>();
    region->begin = begin;
    region->end = begin + bytes;
    region->name = std::move(name);
    region->shared = true;
    region->cells = cells_for(bytes);
    return (regions_[begin] = std::move(region)).get();
  };
  for (StaticVariable& variable : static_locals()) {
    add_shared(variable.address, variable.bytes, "shared " + variable.name);
  }
  const std::uintptr_t aligned = (address_of(dynamic_.get()) + 15) / 16 * 16;
  dynamic_region_ = add_shared(aligned, options().max_shared_bytes, "dynamic shared");
}

void* Memory::dynamic_shared() {
  return reinterpret_cast<void*>(dynamic_region_->begin);
}

void Memory::add(void* at, std::size_t bytes, std::string name, bool defined) {
  auto region = std::make_unique<Region>();
  region->begin = address_of(at);
  region->end = region->begin + bytes;
  region->name = std::move(name);
  if (!options().corners) {
    region->cells = cells_for(bytes);
  }
  regions_[region->begin] = std::move(region);
  if (defined) {
    define(at, bytes);
  }
}

Region& Memory::expect(const void* at, std::size_t bytes, const std::string& who) {
  Region* region = find(address_of(at));
  if (region == nullptr || address_of(at) + bytes > region->end) {
    throw Fault("out of bounds",
                who + " " + std::to_string(bytes) + " bytes at " + describe(address_of(at)));
  }
  return *region;
}

void Memory::define(const void* at, std::size_t bytes) {
  Region* const region = &expect(at, bytes, "the host writes");
  if (region->cells.empty()) {
    return;
  }
  const std::size_t first = (address_of(at) - region->begin) / kCellBytes;
  const std::size_t end = (address_of(at) + bytes - region->begin + kCellBytes - 1) / kCellBytes;
  for (std::size_t i = first; i < end; ++i) {
    region->cells[i].write.interval = std::max(region->cells[i].write.interval, kHost);
  }
}

void Memory::remove(void* at) {
  regions_.erase(address_of(at));
  last_ = nullptr;
}

void Memory::start_launch(std::size_t shared_bytes) {
  dynamic_region_->end = dynamic_region_->begin + shared_bytes;
  launch_first_ = ++interval_;
}

void Memory::start_block() {
  block_first_ = ++interval_;
  lane_reads_.clear();
  has_pending_ = false;
}

void Memory::end_interval() {
  if (has_pending_) {
    Machine::instance().stop(pending_);
  }
  ++interval_;
  lane_reads_.clear();
}

void Memory::synchronise(unsigned mask, Thread* const* lanes) {
  Clock joined{};
  for (std::size_t l = 0; l < kLanes; ++l) {
    for (std::size_t m = 0; (mask >> l & 1u) != 0 && m < kLanes; ++m) {
      joined[m] = std::max(joined[m], lanes[l]->clock[m]);
    }
  }
  for (std::size_t m = 0; m < kLanes; ++m) {
    joined[m] = (mask >> m & 1u) != 0 ? time_ : joined[m];
  }
  for (std::size_t l = 0; l < kLanes; ++l) {
    if ((mask >> l & 1u) != 0) {
      lanes[l]->clock = joined;
    }
  }
  ++time_;
}

Region* Memory::find(std::uintptr_t at) {
  if (last_ != nullptr && at >= last_->begin && at < last_->end) {
    return last_;
  }
  const auto next = regions_.upper_bound(at);
  if (next == regions_.begin()) {
    return nullptr;
  }
  Region* region = std::prev(next)->second.get();
  if (at >= region->end) {
    return nullptr;
  }
  return last_ = region;
}

// Memory that is neither device nor shared but the thread's own, or a constant.
bool Memory::is_foreign_fine(std::uintptr_t at, std::size_t bytes, bool write,
                             const Thread& thread) {
  const auto within = [&](std::uintptr_t begin, std::uintptr_t end) {
    return at >= begin && at + bytes <= end;
  };
  const std::uintptr_t stack = address_of(thread.stack), ids = address_of(&identity);
  return within(stack, stack + kStackBytes) || within(ids, ids + sizeof identity) ||
         (!write && within(address_of(&__executable_start), address_of(&__data_start)));
}

void Memory::access(std::uintptr_t at, std::size_t bytes, bool write, bool atomic,
                    std::uintptr_t pc) {
  Thread& thread = *running;
  const std::uintptr_t stack = address_of(thread.stack);
  if (at - stack < kStackBytes) {
    return;
  }
  Finding access = found(Finding::Kind::bounds, "");
  access.access.write = write;
  access.access.atomic = atomic;
  access.access.pc = pc;
  access.address = at;
  access.bytes = bytes;
  Region* region = find(at);
  if (region == nullptr || at + bytes > region->end) {
    if (region == nullptr && is_foreign_fine(at, bytes, write, thread)) {
      return;
    }
    Machine::instance().stop(access);
  }
  if (region->cells.empty()) {
    return;
  }
  const Stamp stamp{interval_, static_cast<std::uint32_t>(pc - program_base()), time_,
                    static_cast<std::uint16_t>(thread.number), atomic};
  const std::size_t first = (at - region->begin) / kCellBytes;
  const std::size_t last = (at + bytes - 1 - region->begin) / kCellBytes;
  for (std::size_t i = first; i <= last; ++i) {
    Cell& cell = region->cells[i];
    if (!write || atomic) {
      check_read(*region, cell, access, stamp, thread);
    }
    if (write) {
      check_write(*region, cell, access, stamp, thread);
    }
  }
}

bool Memory::is_ordered_before(const Stamp& stamp, const Thread& thread) {
  return stamp.thread == thread.number ||
         (stamp.thread / kLanes == thread.warp() &&
          thread.clock[static_cast<std::size_t>(stamp.thread % kLanes)] >= stamp.time);
}

void Memory::race(Finding access, const Stamp& other, bool other_writes) {
  access.kind = Finding::Kind::race;
  access.other_block = other.interval < block_first_;
  access.other.write = other_writes;
  access.other.atomic = other.atomic;
  access.other.pc = other.pc == 0 ? 0 : other.pc + program_base();
  if (!access.other_block) {
    access.other.thread = Machine::instance().threads()[other.thread]->index;
  }
  Machine::instance().stop(access);
}

void Memory::check_against_write(const Region& region, const Cell& cell, const Finding& access,
                                 const Stamp& stamp, const Thread& thread) {
  const Stamp& write = cell.write;
  if (write.interval < launch_first_ || (write.atomic && stamp.atomic)) {
    return;
  }
  if (write.interval < block_first_) {
    if (!region.shared) {
      race(access, write, true);
    }
  } else if (write.interval == interval_ && !is_ordered_before(write, thread)) {
    race(access, write, true);
  }
}

void Memory::check_write(const Region& region, Cell& cell, const Finding& access,
                         const Stamp& stamp, const Thread& thread) {
  check_against_write(region, cell, access, stamp, thread);
  const Stamp& read = cell.read;
  if (!region.shared && cell.other_block.interval >= launch_first_) {
    race(access, cell.other_block, false);
  }
  if (!region.shared && read.interval >= launch_first_ && read.interval < block_first_) {
    race(access, read, false);
  }
  if (read.interval == interval_ && !reads_are_ordered(cell, thread)) {
    race(access, read, false);
  }
  cell.write = stamp;
}

void Memory::check_read(const Region& region, Cell& cell, const Finding& access, const Stamp& stamp,
                        const Thread& thread) {
  const bool defined =
      region.shared ? cell.write.interval >= block_first_ : cell.write.interval > 0;
  if (defined) {
    check_against_write(region, cell, access, stamp, thread);
  } else {
    Finding uninitialised = access;
    uninitialised.kind = Finding::Kind::uninitialised;
    if (!region.shared) {
      Machine::instance().stop(uninitialised);
    }
    // A write that comes later in this interval makes it a race.
    if (!has_pending_) {
      pending_ = uninitialised;
      has_pending_ = true;
    }
  }
  if (!stamp.atomic) {
    note_read(cell, stamp, thread);
  }
}

void Memory::note_read(Cell& cell, const Stamp& stamp, const Thread& thread) {
  using Readers = Cell::Readers;
  Stamp& read = cell.read;
  if (read.interval != interval_) {
    if (read.interval >= launch_first_ && read.interval < block_first_) {
      cell.other_block = read;
    }
    cell.readers = Readers::one;
  } else if (read.thread / kLanes != thread.warp()) {
    cell.readers = Readers::warps;
  } else if (cell.readers == Readers::one && !is_ordered_before(read, thread)) {
    cell.readers = Readers::lanes;
    cell.lanes = static_cast<std::uint32_t>(lane_reads_.size());
    lane_reads_.emplace_back()[static_cast<std::size_t>(read.thread % kLanes)] = read.time;
  }
  if (cell.readers == Readers::lanes) {
    lane_reads_[cell.lanes][static_cast<std::size_t>(thread.lane())] = stamp.time;
  }
  read = stamp;
}

bool Memory::reads_are_ordered(const Cell& cell, const Thread& thread) const {
  if (cell.readers == Cell::Readers::one) {
    return is_ordered_before(cell.read, thread);
  }
  if (cell.readers == Cell::Readers::warps || cell.read.thread / kLanes != thread.warp()) {
    return false;
  }
  const auto& times = lane_reads_[cell.lanes];
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    if (times[lane] > thread.clock[lane] && static_cast<int>(lane) != thread.lane()) {
      return false;
    }
  }
  return true;
}

std::string Memory::describe(std::uintptr_t at) const {
  if (at == 0) {
    return "a null pointer";
  }
  // The region that holds it, or the last one that begins before it, or the next one.
  const auto next = regions_.upper_bound(at);
  constexpr std::uintptr_t kNear = 4096;
  if (next != regions_.begin()) {
    const Region& region = *std::prev(next)->second;
    if (at < region.end + kNear) {
      std::string text = region.name + "+" + std::to_string(at - region.begin);
      if (at >= region.end) {
        text += " (it has " + std::to_string(region.end - region.begin) + " bytes)";
      }
      return text;
    }
  }
  if (next != regions_.end() && next->second->begin - at < kNear) {
    return next->second->name + "-" + std::to_string(next->second->begin - at);
  }
  return "an address that is no tensor's";
}

// ---- for tests and device code -----------------------------------------------------------------

void add_memory(void* at, std::size_t bytes, std::string name, bool defined) {
  Machine::instance().memory().add(at, bytes, std::move(name), defined);
}
void define_memory(const void* at, std::size_t bytes) {
  Machine::instance().memory().define(at, bytes);
}
void remove_memory(void* at) {
  Machine::instance().memory().remove(at);
}
void expect_memory(const void* at, std::size_t bytes, const char* name) {
  Machine::instance().memory().expect(at, bytes, std::string(name) + " has");
}
void* dynamic_shared_memory() {
  return Machine::instance().memory().dynamic_shared();
}
void atomic_access(void* at, std::size_t bytes, void* caller) {
  if (running != nullptr && options().check) {
    Machine::instance().memory().access(address_of(at), bytes, true, true, address_of(caller));
  }
}

}  // namespace simt

// ---- what the instrumented code calls ----------------------------------------------------------

namespace {

inline void note(const void* at, std::size_t bytes, bool write, const void* pc) {
  if (simt::running != nullptr && simt::options().check) {
    simt::Machine::instance().memory().access(simt::address_of(at), bytes, write, false,
                                              simt::address_of(pc));
  }
}

// As the compiler lays out what it hands to the handlers below.
struct SourceLocation {
  const char* file;
  std::uint32_t line, column;
};
struct TypeMismatch {
  SourceLocation where;
  const void* type;
  unsigned char log_alignment, check;
};

[[noreturn]] void stop(simt::Finding::Kind kind, const SourceLocation& where, const char* note) {
  if (simt::running == nullptr) {
    std::fprintf(stderr, "%s:%u: %s\n", where.file, where.line, note);
    std::abort();
  }
  simt::Finding finding = simt::found(kind, note);
  finding.file = where.file;
  finding.line = where.line;
  simt::Machine::instance().stop(finding);
}

}  // namespace

#define SIMT_ACCESS(bytes)                               \
  void __tsan_read##bytes(void* at) {                    \
    note(at, bytes, false, __builtin_return_address(0)); \
  }                                                      \
  void __tsan_write##bytes(void* at) {                   \
    note(at, bytes, true, __builtin_return_address(0));  \
  }                                                      \
  void __tsan_unaligned_read##bytes(void* at) {          \
    note(at, bytes, false, __builtin_return_address(0)); \
  }                                                      \
  void __tsan_unaligned_write##bytes(void* at) {         \
    note(at, bytes, true, __builtin_return_address(0));  \
  }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
void __tsan_read_range(void* at, std::size_t bytes) {
  note(at, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* at, std::size_t bytes) {
  note(at, bytes, true, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

void __ubsan_handle_out_of_bounds(void* data, std::uintptr_t) {
  stop(simt::Finding::Kind::index, *static_cast<SourceLocation*>(data), "an index beyond an array");
}
void __ubsan_handle_out_of_bounds_abort(void* data, std::uintptr_t index) {
  __ubsan_handle_out_of_bounds(data, index);
}
void __ubsan_handle_type_mismatch_v1(void* data, std::uintptr_t at) {
  const auto& mismatch = *static_cast<TypeMismatch*>(data);
  const bool null = at == 0;
  stop(null ? simt::Finding::Kind::bounds : simt::Finding::Kind::misaligned, mismatch.where,
       null ? "a null pointer" : "an address that is not a multiple of what is read or written");
}
void __ubsan_handle_type_mismatch_v1_abort(void* data, std::uintptr_t at) {
  __ubsan_handle_type_mismatch_v1(data, at);
}
}
