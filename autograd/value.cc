#include "autograd/value.h"

#include "autograd/tape_state.h"

namespace reprise {
namespace {

void release_if_unused(Value* root) {
  if (root->handles + root->need + root->pend != 0 || root->is_parameter() || !root->at_hand()) {
    return;
  }
  if (root->tape != nullptr) {
    root->tape->on_drop(*root);
  }
  root->host.reset();
  root->leaving = false;
  root->tensor.drop_storage();
}

void show_kind(Value* root) {
  if (root->producer >= 0 && root->tape != nullptr) {
    root->tensor.reclassify(root->handles == 0 && root->need > 0 ? MemoryKind::saved
                                                                 : MemoryKind::activations);
  }
}

}  // namespace

Tensor Value::read() const {
  if (root->host != nullptr) {
    bring_back(*root);
  }
  if (root->outlived() && !root->tensor.has_storage()) {
    fail("tensor", "parameter {} was destroyed", root->life->name);
  }
  if (is_view()) {
    Tensor view = tensor;
    view.set_storage(root->is_parameter() ? root->parameter->read() : root->tensor);
    ensure(view.has_storage(), "a view of shape {} was read after its buffer was dropped",
           to_string(tensor.shape()));
    return view;
  }
  if (is_parameter()) {
    return parameter->read();
  }
  ensure(tensor.has_storage(), "a value of shape {} was read after it was dropped",
         to_string(tensor.shape()));
  return tensor;
}

void retain(Value* value) {
  ++value->references;
}

void release(Value* value) {
  if (--value->references == 0) {
    Value* root = value->root;
    delete value;
    if (root != value) {
      release(root);
    }
  }
}

void add_handle(Value* value) {
  retain(value);
  ++value->root->handles;
  show_kind(value->root);
}

void drop_handle(Value* value) {
  Value* root = value->root;
  if (--root->handles == 0) {
    release_if_unused(root);
    show_kind(root);
    if (root->leaving && root->tape != nullptr) {
      root->tape->offload.let_go(root);
    }
  }
  release(value);
}

void add_need(Value* value) {
  if (!value->root->is_parameter()) {
    ++value->root->need;
    show_kind(value->root);
  }
}

void drop_need(Value* value) {
  Value* root = value->root;
  if (!root->is_parameter()) {
    ensure(root->need > 0, "a use of a value of shape {} was given back twice",
           to_string(root->tensor.shape()));
    --root->need;
    release_if_unused(root);
  }
}

void add_pend(Value* value) {
  if (!value->root->is_parameter()) {
    ++value->root->pend;
  }
}

void drop_pend(Value* value) {
  Value* root = value->root;
  if (!root->is_parameter()) {
    ensure(root->pend > 0, "a replay's read of a value of shape {} was given back twice",
           to_string(root->tensor.shape()));
    --root->pend;
    release_if_unused(root);
  }
}

}  // namespace reprise
