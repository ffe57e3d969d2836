// Parameter: a named tensor with a gradient, a trainable flag and a version.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "core/tensor.h"

namespace reprise {

// What a tape that has read a parameter keeps of it: an address alone could be another one's later.
struct ParameterLife {
  bool ended = false;
  std::string name;  // once ended
};

class Parameter;

// Where a parameter is that is not always in memory: a shard of it on each rank, say.
class ParameterHost {
 public:
  virtual ~ParameterHost() = default;
  // An op, a replay or a backward is about to read the value: on return it has storage.
  virtual void before_read(const Parameter& p) = 0;
  // Storage for a gradient that is absent, as for bind_gradient(), bound from then on. Undefined: a
  // storage of its own.
  virtual Tensor gradient_storage(const Parameter& p) = 0;
};

class Parameter {
 public:
  Parameter() = default;
  Parameter(std::string name, Tensor value, bool trainable = true);
  Parameter(const Parameter&) = delete;
  Parameter& operator=(const Parameter&) = delete;
  ~Parameter();

  const std::string& name() const { return name_; }
  void set_name(std::string name) { name_ = std::move(name); }
  bool defined() const { return value_.defined(); }
  const Tensor& value() const { return value_; }
  const Shape& shape() const { return value_.shape(); }
  DType dtype() const { return value_.dtype(); }
  // The tensor for writing: the version grows. A tape that has read the older version refuses to
  // replay with the new one.
  Tensor write();
  std::uint64_t version() const { return version_; }
  // Another storage for the value, of the same shape and dtype (a slice of a bucket, a mapped
  // file); counts as a write. Throws Error in a sweep that may still read the data, so not before
  // on_last_read.
  void bind_value(Tensor value);

  // Null, the default: the value is in memory always. The host must outlive its stay.
  void set_host(ParameterHost* host) { host_ = host; }
  ParameterHost* host() const { return host_; }
  // value(), with storage. What computes with a parameter reads it through a Variable, which calls
  // this.
  const Tensor& read() const {
    if (host_ != nullptr) {
      host_->before_read(*this);
    }
    return value_;
  }
  // For the host. The value's storage goes, its layout stays: reading elements is an Error. The
  // same elements come back in a storage of the same layout. Neither is a write.
  void release_value() { value_.drop_storage(); }
  void restore_value(const Tensor& storage);

  bool trainable() const { return trainable_; }
  void set_trainable(bool on) { trainable_ = on; }

  // Gradient. Absent until a sweep reaches the parameter; accumulates (+=) over sweeps.
  bool has_gradient() const { return has_gradient_; }
  // Throws Error when it is absent, or stale after a failed sweep.
  const Tensor& gradient() const;
  // For the optimizer, clipping and reduction; the same errors.
  Tensor write_gradient();
  bool stale() const { return stale_; }
  // Absent again; a bound storage stays bound. Ends staleness. Like all that changes the gradient
  // from outside it throws Error in a sweep that has yet to make the gradient ready.
  void zero_gradient();
  // f32 or the parameter's dtype; default the parameter's dtype. Only while absent.
  DType grad_dtype() const { return grad_dtype_.value_or(value_.dtype()); }
  void set_grad_dtype(DType dtype);
  // Later gradients live here (a bucket's slice): shape of the parameter, dtype grad_dtype.
  void bind_gradient(Tensor storage);
  // Later gradients have storage of their own again. Only while absent.
  void unbind_gradient();
  // The bound storage was written from outside (by a reduction over ranks): it is the gradient now.
  // Throws Error when none is bound, or the gradient is stale.
  void set_gradient_present();

  const std::shared_ptr<ParameterLife>& life() const { return life_; }

  // For the sweep.
  struct Sweep;
  friend struct Sweep;

 private:
  void expect_ready(const char* caller) const;

  std::string name_;
  std::shared_ptr<ParameterLife> life_ = std::make_shared<ParameterLife>();
  Tensor value_;
  Tensor gradient_;  // bound or own storage; meaningful when has_gradient_
  std::optional<DType> grad_dtype_;
  std::uint64_t version_ = 0;
  ParameterHost* host_ = nullptr;
  bool trainable_ = true;
  bool has_gradient_ = false;
  bool bound_ = false;
  bool stale_ = false;
  bool sweeping_ = false;
  bool gradient_pending_ = false;  // in a sweep: not ready yet
  bool data_pending_ = false;      // in a sweep: its last read was not announced yet
};

}  // namespace reprise
