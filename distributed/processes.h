// Other processes of this machine, held so that their number cannot come to mean another one.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include <sys/types.h>

namespace reprise::distributed {

class ProcessHandle {
 public:
  ProcessHandle() = default;
  // Empty when the process is gone, or the kernel is older than 5.3.
  explicit ProcessHandle(pid_t pid);
  ~ProcessHandle();
  ProcessHandle(ProcessHandle&& other) noexcept;
  ProcessHandle& operator=(ProcessHandle&& other) noexcept;

  bool valid() const { return descriptor_ >= 0; }
  int descriptor() const { return descriptor_; }
  void kill() const;  // also when it is stopped; does nothing once it is gone

 private:
  int descriptor_ = -1;
};

// 'R', 'S', 'T', ... as in /proc; 0 when there is no such process.
char process_state(pid_t pid);

// When it was started, in ticks since the machine was; 0 when there is no such process.
unsigned long long start_time(pid_t pid);
pid_t parent_of(pid_t pid);  // 0 when there is no such process

// Whether this process is a rank whose parent only watches it (train/guard.h): then the launcher is
// the parent's parent.
bool is_guarded();
pid_t launcher_pid();

// Of the processes that this one's launcher started, those that are stopped, with their ranks as
// the launcher's variables say: "rank 1 (pid 12) is stopped"; or that nothing is known.
std::string stopped_siblings();

// Becomes `program` with these arguments; says why to standard error and exits with 127 where it
// cannot.
[[noreturn]] void become(const std::string& program, std::vector<std::string> arguments);

// A process of its own that outlives this one and kills `process` unless it ends within `patience`;
// it ends with it. For a launcher that waits for ever for a machine that does not answer.
void leave_reaper(const ProcessHandle& process, std::chrono::milliseconds patience);

}  // namespace reprise::distributed
