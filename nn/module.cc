#include "nn/module.h"

#include "core/pattern.h"

namespace reprise::nn {

Tensor parameter_tensor(const Shape& shape, Place place) {
  return Tensor::empty(shape, place.dtype, place.device, MemoryKind::parameters);
}

void Module::add(std::string name, Module& child) {
  child.set_generator(generator_);
  children_.emplace_back(std::move(name), &child);
}

void Module::add(std::string name, Parameter& parameter) {
  parameters_.emplace_back(std::move(name), &parameter);
}

void Module::remove(const Module& child) {
  std::erase_if(children_, [&](const auto& entry) { return entry.second == &child; });
}

void Module::collect(const std::string& prefix, bool adapter, std::vector<NamedParameter>& into) {
  adapter = adapter || is_adapter();
  for (const auto& [name, parameter] : parameters_) {
    if (parameter->defined()) {
      into.push_back({prefix + name, parameter, adapter});
    }
  }
  for (const auto& [name, child] : children_) {
    child->collect(name.empty() ? prefix : prefix + name + ".", adapter, into);
  }
}

void Module::collect(const std::string& prefix, std::vector<NamedModule>& into) {
  for (const auto& [name, child] : children_) {
    if (!name.empty()) {
      into.push_back({prefix + name, child});
      child->collect(prefix + name + ".", into);
    }
  }
}

std::vector<NamedParameter> Module::named_parameters() {
  std::vector<NamedParameter> result;
  collect("", false, result);
  return result;
}

std::vector<Parameter*> Module::parameters() {
  std::vector<Parameter*> result;
  for (const NamedParameter& entry : named_parameters()) {
    result.push_back(entry.parameter);
  }
  return result;
}

std::vector<Parameter*> Module::trainable_parameters() {
  std::vector<Parameter*> result = parameters();
  std::erase_if(result, [](const Parameter* parameter) { return !parameter->trainable(); });
  return result;
}

std::vector<NamedModule> Module::named_modules() {
  std::vector<NamedModule> result;
  collect("", result);
  return result;
}

Parameter* Module::find_parameter(std::string_view path) {
  for (const NamedParameter& entry : named_parameters()) {
    if (entry.path == path) {
      return entry.parameter;
    }
  }
  return nullptr;
}

Module* Module::find_module(std::string_view path) {
  for (const NamedModule& entry : named_modules()) {
    if (entry.path == path) {
      return entry.module;
    }
  }
  return nullptr;
}

void Module::name_parameters() {
  for (const NamedParameter& entry : named_parameters()) {
    entry.parameter->set_name(entry.path);
  }
}

int Module::set_trainable(std::string_view pattern, bool on) {
  int matched = 0;
  for (const NamedParameter& entry : named_parameters()) {
    if (matches(pattern, entry.path)) {
      entry.parameter->set_trainable(on);
      ++matched;
    }
  }
  return matched;
}

void Module::set_generator(Generator* generator) {
  generator_ = generator;
  for (const auto& [name, child] : children_) {
    child->set_generator(generator);
  }
}

}  // namespace reprise::nn
