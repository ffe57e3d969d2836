#include "nn/optimizer/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"

namespace reprise::nn {

std::vector<std::string> schedule_names() {
  return {"constant", "linear", "cosine"};
}

ScheduleKind schedule_named(std::string_view name) {
  const std::vector<std::string> names = schedule_names();
  const auto it = std::ranges::find(names, name);
  if (it == names.end()) {
    fail("schedule", "kind must be constant, linear or cosine, got \"{}\"", name);
  }
  return static_cast<ScheduleKind>(it - names.begin());
}

std::int64_t warmup_steps_of(std::int64_t total_steps, double ratio) {
  if (!(ratio >= 0 && ratio <= 1)) {
    fail("schedule", "warmup ratio must be in [0, 1], got {}", ratio);
  }
  return static_cast<std::int64_t>(std::ceil(static_cast<double>(total_steps) * ratio));
}

Schedule::Schedule(ScheduleKind kind, double peak, std::int64_t total_steps,
                   std::int64_t warmup_steps)
    : kind_(kind), peak_(peak), total_steps_(total_steps), warmup_steps_(warmup_steps) {
  if (!(peak >= 0) || std::isinf(peak)) {
    fail("schedule", "peak must be 0 or more, got {}", peak);
  }
  if (total_steps < 0 || warmup_steps < 0) {
    fail("schedule", "steps must be 0 or more, got {} in total and {} of warmup", total_steps,
         warmup_steps);
  }
}

double Schedule::at(std::int64_t step) const {
  if (step < 0) {
    fail("schedule", "step must be 0 or more, got {}", step);
  }
  const auto k = static_cast<double>(step), warmup = static_cast<double>(warmup_steps_);
  if (step < warmup_steps_) {
    return peak_ * k / std::max(1.0, warmup);
  }
  const double span = std::max(1.0, static_cast<double>(total_steps_ - warmup_steps_));
  switch (kind_) {
    case ScheduleKind::linear:
      return peak_ * std::max(0.0, (static_cast<double>(total_steps_) - k) / span);
    case ScheduleKind::cosine:
      return step >= total_steps_
                 ? 0.0
                 : peak_ * 0.5 * (1 + std::cos(std::numbers::pi * (k - warmup) / span));
    case ScheduleKind::constant:
      break;
  }
  return peak_;
}

}  // namespace reprise::nn
