#include "nn/optimizer/adamw.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <map>
#include <numeric>
#include <set>

#include "core/error.h"
#include "kernels/accumulate.h"
#include "kernels/adamw.h"

namespace reprise::nn {
namespace {

std::vector<AdamW::Group> one_group(std::vector<Parameter*> parameters, double weight_decay) {
  std::vector<AdamW::Group> groups(1);
  groups[0] = {std::move(parameters), weight_decay};
  return groups;
}

void check_options(const AdamWOptions& options) {
  if (options.state_dtype && *options.state_dtype != DType::f32 &&
      *options.state_dtype != DType::bf16) {
    fail("adamw", "state_dtype must be f32 or bf16, got {}", name(*options.state_dtype));
  }
}

bool is_zeroed(const Parameter& p) {
  return !p.has_gradient() && !p.stale();
}

}  // namespace

AdamW::AdamW(std::vector<Parameter*> parameters, const AdamWOptions& options)
    : AdamW(std::span<const Group>(one_group(std::move(parameters), options.weight_decay)),
            options) {}

AdamW::AdamW(std::span<const Group> groups, const AdamWOptions& options) : options_(options) {
  check_options(options);
  std::set<std::string> names;
  for (const Group& group : groups) {
    for (Parameter* p : group.parameters) {
      if (p == nullptr || !p->defined()) {
        fail("adamw", "parameter {} is not defined", parameters_.size());
      }
      if (p->name().empty()) {
        fail("adamw", "parameter {} of shape {} has no name", parameters_.size(),
             to_string(p->shape()));
      }
      if (!names.insert(p->name()).second) {
        fail("adamw", "parameter {} is given twice", p->name());
      }
      index_.emplace(p, parameters_.size());
      parameters_.push_back(p);
      slots_.emplace_back().decay = group.weight_decay;
    }
  }
}

DType AdamW::state_dtype(const Parameter& p) const {
  return options_.state_dtype.value_or(p.dtype());
}

bool AdamW::has_master(const Parameter& p) const {
  return options_.master_weights && p.dtype() != DType::f32;
}

AdamW::Slot AdamW::fresh_slot(const Parameter& p, double decay) const {
  const Device device = p.value().device();
  Slot slot;
  slot.decay = decay;
  slot.m = Tensor::zeros(p.shape(), state_dtype(p), device, MemoryKind::optimizer);
  slot.v = Tensor::zeros(p.shape(), state_dtype(p), device, MemoryKind::optimizer);
  if (has_master(p)) {
    slot.master = Tensor::empty(p.shape(), DType::f32, device, MemoryKind::optimizer);
    kernels::cast(p.value(), slot.master);
    slot.version = p.version();
  }
  return slot;
}

void AdamW::step(double learning_rate, double gradient_scale) {
  std::vector<std::size_t> all(parameters_.size());
  std::iota(all.begin(), all.end(), std::size_t{0});
  step_slots(all, learning_rate, gradient_scale);
}

void AdamW::step_some(std::span<Parameter* const> parameters, double learning_rate,
                      double gradient_scale) {
  std::vector<std::size_t> which;
  for (const Parameter* p : parameters) {
    const auto it = index_.find(p);
    if (it == index_.end()) {
      fail("adamw", "parameter {} is not the optimizer's", p == nullptr ? "null" : p->name());
    }
    which.push_back(it->second);
  }
  step_slots(which, learning_rate, gradient_scale);
}

void AdamW::expect_master_of_value(std::size_t i) const {
  const Parameter& p = *parameters_[i];
  if (slots_[i].master.defined() && slots_[i].version != p.version()) {
    fail("adamw",
         "{} was written after its f32 master was made: call reload_masters(), or load the "
         "optimizer's state after the parameters",
         p.name());
  }
}

void AdamW::step_slots(std::span<const std::size_t> which, double learning_rate,
                       double gradient_scale) {
  for (const std::size_t i : which) {
    const Parameter& p = *parameters_[i];
    if (is_zeroed(p)) {
      continue;
    }
    (void)p.gradient();
    expect_master_of_value(i);
  }
  const kernels::AdamWSettings settings{learning_rate, options_.beta1, options_.beta2,
                                        options_.epsilon, gradient_scale};
  kernels::adamw({}, settings);  // its checks, before a state or a version changes
  std::vector<kernels::AdamWTensor> tensors;
  std::vector<std::pair<std::size_t, Slot>> stepped;  // slots take effect when the step has
  for (const std::size_t i : which) {
    const Parameter& p = *parameters_[i];
    if (is_zeroed(p)) {
      continue;
    }
    Slot slot = slots_[i].m.defined() ? slots_[i] : fresh_slot(p, slots_[i].decay);
    ++slot.step;
    tensors.push_back(
        {p.value(), p.gradient(), slot.m, slot.v, slot.master, slot.decay, slot.step});
    stepped.emplace_back(i, std::move(slot));
  }
  kernels::adamw(tensors, settings);
  for (auto& [i, slot] : stepped) {
    (void)parameters_[i]->write();
    slot.version = parameters_[i]->version();
    slots_[i] = std::move(slot);
  }
}

Tensor AdamW::next_scalars(double learning_rate, double gradient_scale) const {
  std::vector<kernels::AdamWTensor> rows(parameters_.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    expect_master_of_value(i);
    rows[i].decay = slots_[i].decay;
    rows[i].step = slots_[i].step + 1;
  }
  return kernels::adamw_scalars(
      rows, {learning_rate, options_.beta1, options_.beta2, options_.epsilon, gradient_scale});
}

void AdamW::step_from(const Tensor& scalars) {
  const auto count = std::ssize(parameters_);
  if (scalars.dtype() != DType::f32 || scalars.shape() != Shape{count, kernels::kAdamWScalars}) {
    fail("adamw", "scalars must be f32 {}, got {} {}",
         to_string(Shape{count, kernels::kAdamWScalars}), name(scalars.dtype()),
         to_string(scalars.shape()));
  }
  in_memory_.clear();
  std::vector<kernels::AdamWTensor> run;  // parameters next to each other
  const auto take = [&](std::int64_t end) {
    kernels::adamw(run, scalars.slice(0, end - std::ssize(run), end));
    run.clear();
  };
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& p = *parameters_[i];
    if (is_zeroed(p)) {
      take(static_cast<std::int64_t>(i));
      continue;
    }
    (void)p.gradient();
    expect_master_of_value(i);
    Slot& slot = slots_[i];
    if (!slot.m.defined()) {
      slot = fresh_slot(p, slot.decay);
      slot.version = p.version();
    }
    run.push_back(
        {p.value(), p.gradient(), slot.m, slot.v, slot.master, slot.decay, slot.step + 1});
    in_memory_.push_back(i);
  }
  take(count);
}

void AdamW::advance() {
  for (const std::size_t i : in_memory_) {
    (void)parameters_[i]->write();
    ++slots_[i].step;
    slots_[i].version = parameters_[i]->version();
  }
}

void AdamW::zero_gradients() {
  for (Parameter* p : parameters_) {
    p->zero_gradient();
  }
}

void AdamW::reload_masters() {
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (slots_[i].master.defined()) {
      kernels::cast(parameters_[i]->value(), slots_[i].master);
      slots_[i].version = parameters_[i]->version();
    }
  }
}

std::vector<std::pair<std::string, Tensor>> AdamW::state() const {
  std::vector<std::pair<std::string, Tensor>> state;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.step == 0) {  // none, or made for a step that did not take place
      continue;
    }
    const std::string& name = parameters_[i]->name();
    state.emplace_back(name + ".m", slot.m);
    state.emplace_back(name + ".v", slot.v);
    state.emplace_back(name + ".step", Tensor::from(std::vector{slot.step}, Shape{}));
    if (slot.master.defined()) {
      state.emplace_back(name + ".master", slot.master);
    }
  }
  return state;
}

namespace {

// The entry, which must be there.
const Tensor& entry(const std::map<std::string, Tensor>& entries, const std::string& name,
                    const Shape& shape, DType dtype) {
  const auto it = entries.find(name);
  if (it == entries.end()) {
    fail("adamw", "state lacks {}", name);
  }
  if (it->second.shape() != shape || it->second.dtype() != dtype) {
    fail("adamw", "state {} must be {} {}, got {} {}", name, reprise::name(dtype), to_string(shape),
         reprise::name(it->second.dtype()), to_string(it->second.shape()));
  }
  return it->second;
}

}  // namespace

void AdamW::load_state(std::span<const std::pair<std::string, Tensor>> state) {
  std::map<std::string, Tensor> entries;
  for (const auto& [name, tensor] : state) {
    if (!entries.emplace(name, tensor).second) {
      fail("adamw", "state {} is there twice", name);
    }
  }
  std::size_t known = 0;
  const auto each_role = [](const Parameter& p, auto&& f) {
    for (const char* role : {".m", ".v", ".step", ".master"}) {
      f(p.name() + role);
    }
  };
  std::vector<Slot> slots;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& p = *parameters_[i];
    std::size_t found = 0;
    each_role(p, [&](const std::string& name) { found += entries.count(name); });
    known += found;
    if (found == 0) {
      slots.emplace_back().decay = slots_[i].decay;
      continue;
    }
    if (!has_master(p) && entries.count(p.name() + ".master") > 0) {
      fail("adamw", "state {}.master is for an optimizer with master weights", p.name());
    }
    Slot slot = fresh_slot(p, slots_[i].decay);
    slot.m.copy_from(entry(entries, p.name() + ".m", p.shape(), state_dtype(p))
                         .to(slot.m.device(), MemoryKind::workspace));
    slot.v.copy_from(entry(entries, p.name() + ".v", p.shape(), state_dtype(p))
                         .to(slot.v.device(), MemoryKind::workspace));
    slot.step = entry(entries, p.name() + ".step", Shape{}, DType::i64).item<std::int64_t>();
    if (slot.step < 1) {
      fail("adamw", "state {}.step must be 1 or more, got {}", p.name(), slot.step);
    }
    if (has_master(p)) {
      slot.master.copy_from(entry(entries, p.name() + ".master", p.shape(), DType::f32)
                                .to(slot.master.device(), MemoryKind::workspace));
    }
    slots.push_back(std::move(slot));
  }
  if (known != entries.size()) {
    for (const Parameter* p : parameters_) {
      each_role(*p, [&](const std::string& name) { entries.erase(name); });
    }
    fail("adamw", "state {} belongs to no parameter of the optimizer", entries.begin()->first);
  }
  slots_ = std::move(slots);
}

bool is_decay_excluded(std::string_view name) {
  std::string lower(name);
  std::ranges::transform(lower, lower.begin(), [](unsigned char c) { return std::tolower(c); });
  for (const std::string_view part : {"bias", "layernorm", "rmsnorm"}) {
    if (lower.find(part) != std::string::npos) {
      return true;
    }
  }
  std::size_t begin = 0;
  while (begin <= lower.size()) {
    const std::size_t end = std::min(lower.find('.', begin), lower.size());
    const std::string_view part = std::string_view(lower).substr(begin, end - begin);
    if (part == "norm" || part.ends_with("_norm")) {
      return true;
    }
    begin = end + 1;
  }
  return false;
}

std::vector<AdamW::Group> decay_groups(std::span<Parameter* const> parameters,
                                       double weight_decay) {
  std::vector<AdamW::Group> groups(2);
  groups[0].weight_decay = weight_decay;
  for (Parameter* p : parameters) {
    groups[is_decay_excluded(p->name()) ? 1 : 0].parameters.push_back(p);
  }
  return groups;
}

}  // namespace reprise::nn
