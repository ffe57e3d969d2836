// The tape's run of a random program.
#include <algorithm>
#include <array>
#include <limits>
#include <memory>

#include <fmt/format.h>

#include "autograd/parameter_sweep.h"
#include "autograd/tape_state.h"
#include "autograd/value.h"
#include "core/host_copy.h"
#include "tests/autograd/random_program.h"
#include "tests/autograd/toy_ops.h"
#include "tests/core/cuda_stand_in.h"

namespace reprise::testing {
namespace {

struct Escape {
  int levels;
};
struct InjectedFailure {};

MaybeNumbers read(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_meta()) {
    return std::nullopt;
  }
  return tensor.to_vector<float>();
}

class Run {
 public:
  Run(const Program& program, const RunOptions& options, Tape& tape)
      : program_(program),
        options_(options),
        tape_(tape),
        memory_(allocator(options.device)),
        host_(allocator(host_of(options.device))) {
    std::vector<std::size_t> open;
    closes_.resize(program.text.size());
    for (std::size_t i = 0; i < program.text.size(); ++i) {
      if (program.text[i].act == Act::open) {
        open.push_back(i);
      } else if (program.text[i].act == Act::close) {
        closes_[open.back()] = i;
        open.pop_back();
      }
    }
    for (int p = 0; p < Program::kParameters; ++p) {
      parameters_.push_back(std::make_unique<Parameter>(
          std::to_string(p), tensor(-1, p), program.trainable[static_cast<std::size_t>(p)]));
      values_.push_back(read(parameters_.back()->value()));
      listed_.push_back(parameters_.back().get());
      if (program.bound[static_cast<std::size_t>(p)]) {
        parameters_.back()->bind_gradient(
            Tensor::zeros({Program::kLength}, DType::f32, options.device));
      }
    }
  }

  RunResult run() {
    const std::int64_t base = live();
    memory_.reset_peak();
    host_.reset_peak();
    {
      Tape::Scope scope(tape_, options_.policies);
      steps(base);
      if (result_.failed) {
        // The tape and the parameters must be as good as new.
        const bool complained = !result_.complaint.empty();
        result_.outcome = {};
        result_.bytes = {};
        for (auto& p : parameters_) {
          p->zero_gradient();
        }
        if (!complained) {
          steps(base);
        }
      }
    }
    std::int64_t gradients = 0;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const Parameter& p = *parameters_[i];
      result_.outcome.gradients.push_back(p.has_gradient() ? read(p.gradient()) : MaybeNumbers());
      gradients += p.has_gradient() && !program_.bound[i] ? p.gradient().bytes() : 0;
    }
    if (live() != base + gradients) {
      complain("{} bytes are live at the end, expected {}", live() - base, gradients);
    }
    if (host_.report().live_bytes != 0) {
      complain("{} bytes are left in host memory", host_.report().live_bytes);
    }
    if (!tape_.state().values().empty() || !tape_.state().records().empty()) {
      complain("the tape is not empty at the end");
    }
    return std::move(result_);
  }

 private:
  template <class... A>
  void complain(fmt::format_string<A...> format, A&&... args) {
    result_.complaint += fmt::format(format, std::forward<A>(args)...) + "\n";
  }
  std::int64_t live() const { return memory_.report().live_bytes; }
  Tensor tensor(int micro_batch, std::int64_t number) const {
    std::vector<float> values;
    for (int i = 0; i < Program::kLength; ++i) {
      values.push_back(program_.number(micro_batch, number, i));
    }
    return Tensor::from(values, {Program::kLength}, options_.device);
  }

  void steps(std::int64_t base) {
    generator_ = {program_.seed, 0};
    shared_ = {Variable(tensor(-1, 50)), Variable(tensor(-1, 51))};
    for (micro_batch_ = 0; micro_batch_ < program_.micro_batches; ++micro_batch_) {
      const bool last = micro_batch_ + 1 == program_.micro_batches;
      constants_ = 0;
      execute(0);
      if (last) {
        shared_ = {};
      }
      result_.bytes.forward_peak =
          std::max(result_.bytes.forward_peak, memory_.report().peak_bytes - base);
      result_.bytes.dropped += tape_.report().dropped_bytes;
      result_.bytes.offloaded += tape_.report().offloaded_bytes;
      sweeps(last);
      result_.outcome.handles.clear();
      if (last) {
        for (Variable& v : slots_) {
          result_.outcome.handles.push_back(v.defined() ? read(v.tensor()) : MaybeNumbers());
        }
      }
      slots_ = {};
      wanted_.clear();
      losses_.clear();
    }
    result_.bytes.peak = memory_.report().peak_bytes - base;
    result_.bytes.host_peak = host_.report().peak_bytes;
  }

  void count() {
    result_.bytes.fetched += tape_.report().fetched_bytes;
    result_.bytes.restored += tape_.report().restored_bytes;
    result_.bytes.replayed_records += tape_.report().replayed_records;
    result_.bytes.replay_flops += tape_.report().replay_flops;
    result_.bytes.backward_flops += tape_.report().backward_flops;
  }

  // The losses in one or two sweeps.
  void sweeps(bool last) {
    std::vector<Variable> first, rest;
    std::vector<double> first_scale, rest_scale;
    for (std::size_t i = 0; i < losses_.size(); ++i) {
      if (losses_[i].needs_gradient()) {
        const bool now = static_cast<int>(i) < program_.first_losses;
        (now ? first : rest).push_back(losses_[i]);
        (now ? first_scale : rest_scale).push_back(program_.scale(i));
      }
    }
    losses_.clear();
    if (!first.empty()) {
      BackwardOptions options = listening();
      options.keep = true;
      options.scale = first_scale;
      backward(first, options);
      count();
    }
    first.clear();
    if (rest.empty()) {
      tape_.reset();
      return;
    }
    std::vector<Variable> wanted;
    for (const Variable& v : wanted_) {
      if (v.needs_gradient() && !v.value()->is_parameter()) {
        wanted.push_back(v);
      }
    }
    BackwardOptions options = listening();
    options.scale = rest_scale;
    // After its last read a parameter's data is not looked at any more.
    options.on_last_read = [&](Parameter& p) {
      if (options_.device == cpu) {
        std::fill_n(p.value().data<float>(), Program::kLength,
                    std::numeric_limits<float>::quiet_NaN());
      }
    };
    const bool fail_now = last && options_.fail_at >= 0 && !result_.failed;
    if (fail_now) {
      failing_sweep(rest, wanted, options);
    } else {
      sweep(rest, wanted, options);
    }
    restore();
  }

  BackwardOptions listening() {
    BackwardOptions options;
    options.undo = program_.undo;
    options.parameters = listed_;
    options.on_plan = [&](const Plan& plan) {
      announced_.clear();
      fired_ = 0;
      for (const Ready& r : plan.order) {
        announced_.push_back(r.parameter);
        result_.outcome.ready.push_back(fmt::format("{} x {}", r.parameter->name(), r.expected));
      }
    };
    options.on_ready = [&](Parameter& p) {
      if (fired_ >= announced_.size() || announced_[fired_] != &p) {
        complain("{} is ready out of order", p.name());
      }
      ++fired_;
    };
    return options;
  }

  void sweep(const std::vector<Variable>& losses, const std::vector<Variable>& wanted,
             const BackwardOptions& options) {
    const std::vector<Tensor> gradients = grad(losses, wanted, options);
    result_.outcome.wanted.clear();
    for (const Tensor& g : gradients) {
      result_.outcome.wanted.push_back(read(g));
    }
    count();
  }

  void failing_sweep(const std::vector<Variable>& losses, const std::vector<Variable>& wanted,
                     const BackwardOptions& options) {
    std::vector<MaybeNumbers> before;
    for (auto& p : parameters_) {
      before.push_back(p->has_gradient() ? read(p->gradient()) : MaybeNumbers());
    }
    std::int64_t left = options_.fail_at;
    if (options_.fail_allocation) {
      const auto fault = [&](std::size_t) {
        if (left-- == 0) {
          throw InjectedFailure();
        }
      };
      memory_.set_fault(fault);
      host_.set_fault(fault);
    } else {
      ToyHook::call = [&](std::string_view, bool) {
        if (left-- == 0) {
          throw InjectedFailure();
        }
      };
    }
    try {
      sweep(losses, wanted, options);
    } catch (const InjectedFailure&) {
      result_.failed = true;
    }
    memory_.set_fault(nullptr);
    host_.set_fault(nullptr);
    ToyHook::call = nullptr;
    if (!result_.failed) {
      return;
    }
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      Parameter& p = *parameters_[i];
      const bool in_plan = std::ranges::find(announced_, &p) != announced_.end();
      if (p.stale() != (in_plan && !program_.undo)) {
        complain("after a failure {} is {}", p.name(), p.stale() ? "stale" : "not stale");
      }
      if (p.has_gradient() != before[i].has_value()) {
        complain("after a failure {} has {} gradient", p.name(), p.has_gradient() ? "a" : "no");
      } else if (p.has_gradient()) {
        const MaybeNumbers now = read(Parameter::Sweep::present(p));
        if (now != before[i] && (program_.undo || now != options_.clean->gradients[i])) {
          complain("after a failure the gradient of {} is neither untouched nor complete",
                   p.name());
        }
      }
    }
  }

  void restore() {
    for (std::size_t i = 0; i < parameters_.size() && options_.device == cpu; ++i) {
      std::ranges::copy(*values_[i], parameters_[i]->value().data<float>());
    }
  }

  Variable take(int slot, unsigned moved, unsigned bit) {
    Variable& v = slots_[static_cast<std::size_t>(slot)];
    return (moved >> bit & 1u) != 0 ? std::move(v) : v;
  }

  // From instruction `at` to the close of its segment; returns what follows it.
  std::size_t execute(std::size_t at) {
    while (at < program_.text.size()) {
      const Instruction& i = program_.text[at];
      if (i.act == Act::close) {
        return at + 1;
      }
      if (i.act == Act::open) {
        try {
          if (options_.segments) {
            checkpoint("s" + std::to_string(i.b), [&] { execute(at + 1); });
          } else {
            execute(at + 1);
          }
        } catch (Escape& escape) {
          if (--escape.levels > 0) {
            throw;
          }
        }
        at = closes_[at] + 1;
        continue;
      }
      if (i.act == Act::escape) {
        throw Escape{i.b};
      }
      if (i.no_gradient) {
        no_grad([&] { step(i); });
      } else {
        step(i);
      }
      ++at;
    }
    return at;
  }

  Variable source(const Instruction& i) {
    switch (i.act) {
      case Act::shared:
        return shared_[static_cast<std::size_t>(i.b)];
      case Act::leaf:
        return Variable::leaf(tensor(micro_batch_, constants_++));
      case Act::parameter:
        return Variable(*parameters_[static_cast<std::size_t>(i.b)]);
      default:
        return Variable(tensor(micro_batch_, constants_++));
    }
  }

  Variable pointwise(const Instruction& i, Variable x) {
    switch (i.act) {
      case Act::tanh:
        return toy_tanh(std::move(x));
      case Act::square:
        return toy_square(std::move(x));
      case Act::scale:
        return toy_scale(std::move(x), i.factor);
      case Act::dropout:
        return toy_dropout(std::move(x), i.factor, generator_);
      default:
        return toy_keep(std::move(x));
    }
  }

  void step(const Instruction& i) {
    Variable& d = slots_[static_cast<std::size_t>(i.d)];
    Variable& a = slots_[static_cast<std::size_t>(i.a)];
    auto input = [&](unsigned k) { return take(k == 0 ? i.a : k == 1 ? i.b : i.c, i.moved, k); };
    switch (i.act) {
      case Act::constant:
      case Act::shared:
      case Act::leaf:
      case Act::parameter:
        d = source(i);
        break;
      case Act::add: {
        Variable x = input(0), y = input(1);
        d = toy_add(std::move(x), std::move(y));
        break;
      }
      case Act::mul: {
        Variable x = input(0), y = input(1);
        d = toy_mul(std::move(x), std::move(y));
        break;
      }
      case Act::mul_add: {
        Variable x = input(0), y = input(1), z = input(2);
        d = toy_mul_add(std::move(x), std::move(y), std::move(z));
        break;
      }
      case Act::tanh:
      case Act::square:
      case Act::scale:
      case Act::dropout:
      case Act::keep:
        d = pointwise(i, input(0));
        break;
      case Act::split: {
        auto [x, y] = toy_split(input(0));
        d = std::move(x);
        slots_[static_cast<std::size_t>(i.c)] = std::move(y);
        break;
      }
      case Act::slice:
        d = toy_slice(a, 2 * i.b, 2 * i.b + 2);
        break;
      case Act::detach:
        d = detach(a);
        break;
      case Act::copy:
        d = Variable(a);
        break;
      case Act::drop:
        a = Variable();
        break;
      case Act::name:
        named(a, "n" + std::to_string(i.b));
        break;
      case Act::loss:
        if (i.b == 1 && options_.segments) {
          losses_.push_back(checkpoint("s9", [&] { return toy_sum(a); }));
        } else {
          losses_.push_back(toy_sum(a));
        }
        break;
      case Act::want:
        wanted_.push_back(a);
        break;
      case Act::open:
      case Act::close:
      case Act::escape:
        break;
    }
  }

  const Program& program_;
  const RunOptions& options_;
  Tape& tape_;
  Allocator& memory_;
  Allocator& host_;  // what leaves the device
  std::vector<std::size_t> closes_;
  std::vector<std::unique_ptr<Parameter>> parameters_;
  std::vector<Parameter*> listed_;
  std::vector<MaybeNumbers> values_;
  Generator generator_;
  int micro_batch_ = 0;
  std::int64_t constants_ = 0;
  std::array<Variable, Program::kSlots> slots_;
  std::array<Variable, 2> shared_;
  std::vector<Variable> wanted_, losses_;
  std::vector<Parameter*> announced_;
  std::size_t fired_ = 0;
  RunResult result_;
};

}  // namespace

RunResult run_program(const Program& program, const RunOptions& options, Tape& tape) {
  if (!options.late_copies) {
    return Run(program, options, tape).run();
  }
  CudaStandIn::Options host;
  host.first_stream_is_host = true;
  const auto device = std::make_shared<CudaStandIn>(host);
  Streams streams(device);
  const CopiesThrough through(streams);
  RunResult result = Run(program, options, tape).run();
  for (const std::string& violation : device->violations()) {
    result.complaint += violation + "\n";
  }
  return result;
}

}  // namespace reprise::testing
