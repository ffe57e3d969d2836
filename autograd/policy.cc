#include "autograd/policy.h"

#include <algorithm>

#include "core/error.h"
#include "core/pattern.h"

namespace reprise {
namespace {

Offload where(std::initializer_list<std::string_view> names, std::string_view Candidate::*field) {
  return [names = std::vector<std::string>(names.begin(), names.end()), field](const Candidate& c) {
    return std::ranges::find(names, c.*field) != names.end();
  };
}

Policy keep_where(std::initializer_list<std::string_view> names,
                  std::string_view Candidate::*field) {
  return
      [is = where(names, field)](const Candidate& c) { return is(c) ? Keep::Output : Keep::Drop; };
}

}  // namespace

Policy keep_all() {
  return [](const Candidate&) { return Keep::Saved; };
}

Policy keep_inputs() {
  return [](const Candidate&) { return Keep::Drop; };
}

Policy keep_ops(std::initializer_list<std::string_view> ops) {
  return keep_where(ops, &Candidate::op);
}

Policy keep_products() {
  return keep_ops({"linear", "matmul", "attention"});
}

Policy keep_named(std::initializer_list<std::string_view> values) {
  return keep_where(values, &Candidate::name);
}

Offload offload_all() {
  return [](const Candidate&) { return true; };
}

Offload offload_ops(std::initializer_list<std::string_view> ops) {
  return where(ops, &Candidate::op);
}

Offload offload_named(std::initializer_list<std::string_view> values) {
  return where(values, &Candidate::name);
}

Policy operator|(Policy a, Policy b) {
  if (!a || !b) {
    fail("policy", "one side of | is empty");
  }
  return [a = std::move(a), b = std::move(b)](const Candidate& c) { return std::max(a(c), b(c)); };
}

Policies& Policies::set(std::string pattern, Policy policy) {
  if (!policy) {
    fail("policy", "the policy for segments \"{}\" is empty", pattern);
  }
  rules_.emplace_back(std::move(pattern), std::move(policy));
  return *this;
}

Policies& Policies::nest(bool on) {
  nested_ = on;
  return *this;
}

Policies& Policies::offload(std::string pattern, Offload which) {
  if (!which) {
    fail("policy", "what leaves segments \"{}\" is empty", pattern);
  }
  offloads_.emplace_back(std::move(pattern), std::move(which));
  return *this;
}

Policies& Policies::offload_outside(Offload which) {
  if (!which) {
    fail("policy", "what leaves outside of segments is empty");
  }
  outside_ = std::move(which);
  return *this;
}

Policies& Policies::offload_distance(int ops) {
  if (ops < 0) {
    fail("policy", "the distance of values in host memory must be 0 or more ops, got {}", ops);
  }
  distance_ = ops;
  return *this;
}

const Offload* Policies::find_offload(std::string_view segment) const {
  for (const auto& [pattern, which] : offloads_) {
    if (matches(pattern, segment)) {
      return &which;
    }
  }
  return nullptr;
}

const Policy& Policies::find(std::string_view segment) const {
  static const Policy kInputs = keep_inputs();
  for (const auto& [pattern, policy] : rules_) {
    if (matches(pattern, segment)) {
      return policy;
    }
  }
  return kInputs;
}

Policies Policies::named(std::string_view name) {
  constexpr std::string_view kOffload = "+offload";
  if (name.ends_with(kOffload)) {
    return named(name.substr(0, name.size() - kOffload.size())).offload("*").offload_outside();
  }
  Policies policies;
  if (name == "keep-all") {
    return policies.set("*", keep_all());
  }
  if (name == "keep-products") {
    return policies.set("*", keep_products());
  }
  if (name == "inputs-only") {
    return policies;
  }
  if (name == "nested") {
    return policies.nest();
  }
  fail("policy",
       "must be one of keep-all, keep-products, inputs-only, nested, or one of them with +offload, "
       "got \"{}\"",
       name);
}

std::vector<std::string> Policies::names() {
  return {"keep-all", "keep-products", "inputs-only", "nested", "keep-products+offload"};
}

}  // namespace reprise
