#include "autograd/shape.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "autograd/op.h"
#include "kernels/accumulate.h"

namespace reprise {
namespace {

// The outermost part `i` of dimension 0, one dimension less.
Tensor part(const Tensor& x, std::int64_t i) {
  const auto sizes = x.shape().sizes();
  Tensor::Strides strides{};
  std::copy(x.strides().begin() + 1, x.strides().end(), strides.begin());
  return x.as_view(Shape(sizes.subspan(1)), strides, x.offset() + i * x.strides()[0]);
}

// to (+)= from, any strides and dtypes. The kernel takes rows of unit stride: more dimensions are
// gone through one by one, and what has no unit stride is copied first.
void add_or_copy(const Tensor& from, const Tensor& to, bool accumulate) {
  if (to.numel() == 0) {
    return;
  }
  if (to.row_stride() && from.row_stride()) {
    if (accumulate) {
      kernels::accumulate(to, from);
    } else {
      kernels::cast(from, to);
    }
  } else if (!accumulate && to.dtype() == from.dtype()) {
    to.copy_from(from);
  } else if (from.strides()[from.rank() - 1] != 1) {
    add_or_copy(from.contiguous(MemoryKind::workspace), to, accumulate);
  } else {
    for (std::int64_t i = 0; i < to.size(0); ++i) {
      add_or_copy(part(from, i), part(to, i), accumulate);
    }
  }
}

class Reshape final : public ViewOp {
 public:
  explicit Reshape(const Shape& shape) : shape_(shape) {}
  std::string_view name() const override { return "reshape"; }
  Tensor view(const Tensor& x) const override { return x.reshape(shape_); }
  void backward(Backward& run) const override {
    run.give(0, run.gradient(0).reshape(run.input(0).shape()));
  }

 private:
  Shape shape_;
};

class Slice final : public ViewOp {
 public:
  Slice(int dim, std::int64_t begin, std::int64_t end) : dim_(dim), begin_(begin), end_(end) {}
  std::string_view name() const override { return "slice"; }
  Tensor view(const Tensor& x) const override { return x.slice(dim_, begin_, end_); }
  void backward(Backward& run) const override {
    const auto [dx, accumulate] = run.into(0);
    if (!accumulate) {
      dx.slice(dim_, 0, begin_).zero();
      dx.slice(dim_, end_, dx.size(dim_)).zero();
    }
    add_or_copy(run.gradient(0), dx.slice(dim_, begin_, end_), accumulate);
  }
  Cost backward_cost(const Call& call, Mask) const override {
    return {0, call.input(0).bytes() + call.output(0).bytes()};
  }

 private:
  int dim_;
  std::int64_t begin_, end_;
};

class Transpose final : public ViewOp {
 public:
  Transpose(int a, int b) : a_(a), b_(b) {}
  std::string_view name() const override { return "transpose"; }
  Tensor view(const Tensor& x) const override { return x.transpose(a_, b_); }
  void backward(Backward& run) const override {
    const auto [dx, accumulate] = run.into(0);
    add_or_copy(run.gradient(0).transpose(a_, b_), dx, accumulate);
  }
  Cost backward_cost(const Call& call, Mask) const override {
    return {0, 2 * call.input(0).bytes()};
  }

 private:
  int a_, b_;
};

class Contiguous final : public Op {
 public:
  std::string_view name() const override { return "contiguous"; }
  void forward(Forward& run) const override {
    const Tensor& x = run.input(0);
    add_or_copy(x, run.output(0, x.shape(), x.dtype()), false);
  }
  Saved saved(Mask) const override { return {}; }
  void backward(Backward& run) const override { run.give(0, run.gradient(0)); }
  Cost cost(const Call& call) const override { return {0, 2 * call.output(0).bytes()}; }
  Cost backward_cost(const Call&, Mask) const override { return {}; }
};

class Concat final : public Op {
 public:
  explicit Concat(int dim) : dim_(dim) {}
  std::string_view name() const override { return "concat"; }
  void forward(Forward& run) const override {
    const Tensor& first = run.input(0);
    if (dim_ < 0 || dim_ >= first.rank()) {
      fail("concat", "dimension must be in [0, {}), got {}", first.rank(), dim_);
    }
    std::int64_t size = 0;
    for (std::size_t i = 0; i < run.inputs(); ++i) {
      const Tensor& x = run.input(i);
      if (x.rank() != first.rank() || x.dtype() != first.dtype() ||
          x.shape().with(dim_, 0) != first.shape().with(dim_, 0)) {
        fail("concat", "part {} must be {} {} but for dimension {}, got {} {}", i,
             reprise::name(first.dtype()), to_string(first.shape()), dim_, reprise::name(x.dtype()),
             to_string(x.shape()));
      }
      size += x.size(dim_);
    }
    const Tensor y = run.output(0, first.shape().with(dim_, size), first.dtype());
    std::int64_t at = 0;
    for (std::size_t i = 0; i < run.inputs(); ++i) {
      const std::int64_t end = at + run.input(i).size(dim_);
      y.slice(dim_, at, end).copy_from(run.input(i));
      at = end;
    }
  }
  Saved saved(Mask) const override { return {}; }
  void backward(Backward& run) const override {
    std::int64_t at = 0;
    for (std::size_t i = 0; run.has(i); ++i) {
      const std::int64_t end = at + run.input(i).size(dim_);
      if (run.wants(i)) {
        const auto [dx, accumulate] = run.into(i);
        add_or_copy(run.gradient(0).slice(dim_, at, end), dx, accumulate);
      }
      at = end;
    }
  }
  Cost cost(const Call& call) const override { return {0, 2 * call.output(0).bytes()}; }
  Cost backward_cost(const Call& call, Mask) const override { return cost(call); }

 private:
  int dim_;
};

}  // namespace

Variable reshape(Variable x, const Shape& shape) {
  return apply(std::make_unique<Reshape>(shape), {std::move(x)});
}
Variable slice(Variable x, int dim, std::int64_t begin, std::int64_t end) {
  return apply(std::make_unique<Slice>(dim, begin, end), {std::move(x)});
}
Variable transpose(Variable x, int a, int b) {
  return apply(std::make_unique<Transpose>(a, b), {std::move(x)});
}

Variable contiguous(Variable x) {
  if (x.tensor().is_contiguous()) {
    return x;
  }
  return apply(std::make_unique<Contiguous>(), {std::move(x)});
}

Variable concat(std::span<Variable> parts, int dim) {
  if (parts.empty() || parts.size() > kMaxArity) {
    fail("concat", "needs from 1 to {} parts, got {}", kMaxArity, parts.size());
  }
  return std::move(apply_many(std::make_unique<Concat>(dim), parts).front());
}
Variable concat(std::initializer_list<Variable> parts, int dim) {
  std::vector<Variable> handles(parts);
  return concat(std::span<Variable>(handles), dim);
}

}  // namespace reprise
