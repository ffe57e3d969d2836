// What kernels may touch, and who has touched it: bounds, initialisation and races.
//
// Every two bytes of device and shared memory have a cell with the last write and the last reads.
// Each is stamped with an interval, a number that grows at the start of a block and at every
// barrier of it, so "the same interval, the same block, the same launch" are comparisons and
// nothing is ever cleared. Within an interval lanes of a warp are ordered by __syncwarp only: a
// stamp also holds the warp's count of them, and a lane knows up to which count it has seen each
// other lane (its clock).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tests/simt/machine.h"

namespace simt {

inline constexpr std::size_t kCellBytes = 2;

struct Stamp {
  std::uint32_t interval = 0;  // 0: never
  std::uint32_t pc = 0;        // from the start of the program
  std::uint32_t time = 0;      // of its warp
  std::uint16_t thread = 0;
  bool atomic = false;
};

struct Cell {
  Stamp write, read;
  // Reads of `read.interval`: by one thread; by lanes of one warp (`lanes`, an index); by several
  // warps. And whether another block of the launch read too.
  enum class Readers : std::uint8_t { one, lanes, warps } readers = Readers::one;
  std::uint32_t lanes = 0;
  Stamp other_block;  // a read by an earlier block
};

struct Region {
  std::uintptr_t begin = 0, end = 0;
  std::string name;
  bool shared = false;
  std::vector<Cell> cells;  // none: only its bounds are known
};

class Memory {
 public:
  Memory();

  void add(void* at, std::size_t bytes, std::string name, bool defined);
  void define(const void* at, std::size_t bytes);
  Region& expect(const void* at, std::size_t bytes, const std::string& who);
  void remove(void* at);

  void start_launch(std::size_t shared_bytes);
  void start_block();
  void end_interval();  // a barrier, or the end of a block
  // Lanes of a warp have met at __syncwarp.
  void synchronise(unsigned mask, Thread* const* lanes);

  void access(std::uintptr_t at, std::size_t bytes, bool write, bool atomic, std::uintptr_t pc);

  void* dynamic_shared();
  // "dynamic shared+8", "y+4096 (its end is at 4096)".
  std::string describe(std::uintptr_t at) const;

 private:
  static constexpr std::uint32_t kHost = 1;

  Region* find(std::uintptr_t at);
  bool is_foreign_fine(std::uintptr_t at, std::size_t bytes, bool write, const Thread& thread);
  // Of an access in this interval.
  static bool is_ordered_before(const Stamp& stamp, const Thread& thread);
  void check_against_write(const Region& region, const Cell& cell, const Finding& access,
                           const Stamp& stamp, const Thread& thread);
  void check_write(const Region& region, Cell& cell, const Finding& access, const Stamp& stamp,
                   const Thread& thread);
  void check_read(const Region& region, Cell& cell, const Finding& access, const Stamp& stamp,
                  const Thread& thread);
  void note_read(Cell& cell, const Stamp& stamp, const Thread& thread);
  bool reads_are_ordered(const Cell& cell, const Thread& thread) const;
  [[noreturn]] void race(Finding access, const Stamp& other, bool other_writes);

  std::map<std::uintptr_t, std::unique_ptr<Region>> regions_;
  Region* last_ = nullptr;
  std::unique_ptr<unsigned char[]> dynamic_;
  Region* dynamic_region_ = nullptr;
  std::uint32_t interval_ = 2, launch_first_ = 2, block_first_ = 2;
  std::uint32_t time_ = 1;
  std::vector<std::array<std::uint32_t, kLanes>> lane_reads_;  // times, 0: none; of this interval
  Finding pending_;  // the first read of unwritten shared memory in this interval
  bool has_pending_ = false;
};

}  // namespace simt
