// Module: a tree of parameters whose paths are the keys of the weight file.
//
//   class Mlp : public Module {                       // "mlp.c_fc.weight", "mlp.c_proj.bias", ...
//    public:
//     Mlp(const Gpt2Config& config, Place place)
//         : c_fc(config.width, config.inner, {.bias = true}, place), ... {
//       add("c_fc", c_fc);
//       add("c_proj", c_proj);
//     }
//     Variable operator()(Variable x);
//     Linear c_fc, c_proj;
//   };
//
// Children and parameters are members; add() makes them known under a name. A module stays where it
// was made. Built on meta it has shapes and byte counts but no memory. Values are not initialised:
// load a folder or call Model::initialize().
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "autograd/parameter.h"
#include "core/philox.h"
#include "core/tensor.h"

namespace reprise::nn {

// Where a model's parameters live, and their type.
struct Place {
  Device device = cpu;
  DType dtype = DType::f32;
};

// A parameter for add(): uninitialised, counted as MemoryKind::parameters.
Tensor parameter_tensor(const Shape& shape, Place place);

class Module;
struct NamedParameter {
  std::string path;
  Parameter* parameter;
  bool adapter;  // of a LoRA adapter: not in the model's weight file
};
struct NamedModule {
  std::string path;
  Module* module;
};

class Module {
 public:
  Module() = default;
  virtual ~Module() = default;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  // All parameters of the tree in order of registration, parents before children. Absent optional
  // ones (a bias that is not there) are left out.
  std::vector<NamedParameter> named_parameters();
  std::vector<Parameter*> parameters();
  // Those with the trainable flag.
  std::vector<Parameter*> trainable_parameters();
  // All modules below this one, in the same order.
  std::vector<NamedModule> named_modules();
  // Null when there is none at that path.
  Parameter* find_parameter(std::string_view path);
  Module* find_module(std::string_view path);
  // Gives every parameter its path as name, for messages and reports.
  void name_parameters();

  // Sets the flag of every parameter whose path matches; '*' stands for any run of characters.
  // Returns how many matched.
  int set_trainable(std::string_view pattern, bool on);
  int freeze(std::string_view pattern = "*") { return set_trainable(pattern, false); }

  // Training: dropout is on and draws from `generator`, which must outlive the mode.
  void train(Generator& generator) { set_generator(&generator); }
  // Evaluation, as built: no dropout.
  void evaluate() { set_generator(nullptr); }
  bool training() const { return generator_ != nullptr; }

  virtual bool is_adapter() const { return false; }

 protected:
  // A child of an empty name hands its parameters in as if they were this module's own, and is not
  // among named_modules().
  void add(std::string name, Module& child);
  void add(std::string name, Parameter& parameter);
  void remove(const Module& child);
  // Null in evaluation.
  Generator* generator() const { return generator_; }

 private:
  void set_generator(Generator* generator);
  void collect(const std::string& prefix, bool adapter, std::vector<NamedParameter>& into);
  void collect(const std::string& prefix, std::vector<NamedModule>& into);

  std::vector<std::pair<std::string, Parameter*>> parameters_;
  std::vector<std::pair<std::string, Module*>> children_;
  Generator* generator_ = nullptr;
};

// Children of one kind under "0", "1", ...: "h.0", "h.1".
template <class T>
class ModuleList : public Module {
 public:
  template <class... A>
  T& append(A&&... arguments) {
    items_.push_back(std::make_unique<T>(std::forward<A>(arguments)...));
    add(std::to_string(items_.size() - 1), *items_.back());
    return *items_.back();
  }
  std::size_t size() const { return items_.size(); }
  T& operator[](std::size_t i) const { return *items_[i]; }

 private:
  std::vector<std::unique_ptr<T>> items_;
};

}  // namespace reprise::nn
