// What the tape knows of one tensor. Internal to autograd.
//
// A value is resident while handles + need + pend > 0. The three counts sit on the root of a
// buffer; a view is a layout over its root and has no storage of its own. Parameters are leaves,
// always resident, outside the counting. A value that only a policy's needs keep may be in host
// memory instead (autograd/offload.h); reading it brings it back.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "autograd/parameter.h"
#include "core/host_copy.h"
#include "core/tensor.h"

namespace reprise {

class TapeState;

struct Value {
  std::uint32_t references = 0;  // of this cell: handles on it, views of it, its tape
  std::int32_t handles = 0;      // of a root: user Variables on it or on a view of it
  std::int32_t need = 0;         // of a root: pending consumers
  std::int32_t pend = 0;         // of a root: reads left in the replay under way
  Value* root = this;
  TapeState* tape = nullptr;   // null: a constant not bound yet, or stale
  std::int32_t producer = -1;  // record; -1: a leaf
  std::int32_t segment = -1;   // innermost open when it was made; -1: none
  bool needs_gradient = false;
  bool stale = false;              // its tape has forgotten how it was made
  Parameter* parameter = nullptr;  // of a parameter's leaf; not to be followed once life has ended
  std::shared_ptr<const ParameterLife> life;
  std::uint64_t version = 0;       // of the parameter when it was read
  std::uint32_t asked = 0;         // equal to the tape's epoch: in the set being built
  std::uint32_t candidate = 0;     // the same, for a second set
  std::uint32_t reached = 0;       // the same, for the losses' history
  Tensor tensor;                   // the layout, and of a resident root the storage
  Tensor gradient;                 // in a sweep
  std::unique_ptr<HostCopy> host;  // of a root in host memory, or on its way there or back
  bool leaving = false;            // of a root: it goes there once no handle is left
  std::unique_ptr<std::vector<std::string>> names;  // of a root: given to it or to a view of it

  bool is_view() const { return root != this; }
  bool is_parameter() const { return parameter != nullptr; }
  bool at_hand() const { return tensor.has_storage() || host != nullptr; }  // of a root
  bool outlived() const { return life != nullptr && life->ended; }          // of a parameter's leaf
  // The tensor with its elements; throws InternalError when it is dropped, Error when it is of a
  // parameter that was destroyed.
  Tensor read() const;
};

// Cell lifetime.
void retain(Value* value);
void release(Value* value);

// Counting, on the root of `value`; parameters are left out. Dropping to zero releases the storage.
void add_handle(Value* value);
void drop_handle(Value* value);
void add_need(Value* value);
void drop_need(Value* value);
void add_pend(Value* value);
void drop_pend(Value* value);

}  // namespace reprise
