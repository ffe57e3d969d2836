#include "autograd/policy.h"

#include <algorithm>

#include "core/error.h"
#include "core/pattern.h"

namespace reprise {
namespace {

Policy keep_where(std::vector<std::string> names, std::string_view Candidate::*field) {
  return [names = std::move(names), field](const Candidate& c) {
    return std::ranges::find(names, c.*field) != names.end() ? Keep::Output : Keep::Drop;
  };
}

}  // namespace

Policy keep_all() {
  return [](const Candidate&) { return Keep::Saved; };
}

Policy keep_inputs() {
  return [](const Candidate&) { return Keep::Drop; };
}

Policy keep_ops(std::initializer_list<std::string_view> ops) {
  return keep_where({ops.begin(), ops.end()}, &Candidate::op);
}

Policy keep_products() {
  return keep_ops({"linear", "matmul", "attention"});
}

Policy keep_named(std::initializer_list<std::string_view> values) {
  return keep_where({values.begin(), values.end()}, &Candidate::name);
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
  fail("policy", "must be one of keep-all, keep-products, inputs-only, nested, got \"{}\"", name);
}

std::vector<std::string> Policies::names() {
  return {"keep-all", "keep-products", "inputs-only", "nested"};
}

}  // namespace reprise
