// Learning rates by step, as Hugging Face's Trainer has them.
//
//   k < W:     peak * k / max(1, W)                     the first step has rate 0 when W > 0
//   linear:    peak * (K - k) / max(1, K - W)           not below 0
//   cosine:    peak * 0.5 (1 + cos(pi (k - W) / max(1, K - W)))   0 from K on
//   constant:  peak
//
// k the optimizer step from 0, W warmup steps, K total steps.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace reprise::nn {

enum class ScheduleKind : std::uint8_t { constant, linear, cosine };

// "constant", "linear", "cosine". Throws Error on another name.
ScheduleKind schedule_named(std::string_view name);
std::vector<std::string> schedule_names();

// ceil(total * ratio). Throws Error unless the ratio is in [0, 1].
std::int64_t warmup_steps_of(std::int64_t total_steps, double ratio);

class Schedule {
 public:
  // Throws Error for negative steps or a peak that is negative or not finite.
  Schedule(ScheduleKind kind, double peak, std::int64_t total_steps, std::int64_t warmup_steps = 0);
  // Throws Error for a negative step.
  double at(std::int64_t step) const;

 private:
  ScheduleKind kind_;
  double peak_;
  std::int64_t total_steps_, warmup_steps_;
};

}  // namespace reprise::nn
