#include "autograd/matmul.h"

#include <memory>
#include <utility>

#include "autograd/op.h"
#include "kernels/dispatch.h"
#include "kernels/matmul.h"

namespace reprise {
namespace {

constexpr Mask bit(std::size_t i) {
  return Mask{1} << i;
}

// A product needs one operand for the gradient of the other.
Saved other_operands(Mask gradients) {
  Saved saved;
  if ((gradients & bit(1)) != 0) {
    saved.inputs |= bit(0);
  }
  if ((gradients & bit(0)) != 0) {
    saved.inputs |= bit(1);
  }
  return saved;
}

// Every operand is read once per product it takes part in.
Cost product_cost(const Call& call, std::int64_t inner, int products) {
  const std::int64_t bytes = call.input(0).bytes() + call.input(1).bytes() + call.output(0).bytes();
  return {products * 2 * call.output(0).numel() * inner, products * bytes};
}

Cost gradient_cost(const Call& call, std::int64_t inner, Mask gradients) {
  return product_cost(call, inner, ((gradients & bit(0)) != 0) + ((gradients & bit(1)) != 0));
}

class Linear final : public Op {
 public:
  explicit Linear(bool in_out) : in_out_(in_out) {}
  std::string_view name() const override { return "linear"; }

  void forward(Forward& run) const override {
    const Tensor &x = run.input(0), &weight = run.input(1);
    const Tensor bias = run.has(2) ? run.input(2) : Tensor();
    check(x, weight, bias);
    const Tensor y =
        run.output(0, x.shape().with(x.rank() - 1, weight.size(in_out_ ? 1 : 0)), x.dtype());
    kernels::matmul(x, weight, y, {.transpose_b = !in_out_}, bias);
  }

  Saved saved(Mask gradients) const override { return other_operands(gradients); }

  void backward(Backward& run) const override {
    const Tensor& dy = run.gradient(0);
    if (run.wants(0)) {
      const Target dx = run.into(0);
      kernels::matmul(dy, run.input(1), dx.tensor,
                      {.transpose_b = in_out_, .accumulate = dx.accumulate});
    }
    if (run.wants(1)) {
      const Target dw = run.into(1);
      const Tensor& x = run.input(0);
      kernels::matmul(in_out_ ? x : dy, in_out_ ? dy : x, dw.tensor,
                      {.transpose_a = true, .accumulate = dw.accumulate});
    }
    if (run.wants(2)) {
      const Target db = run.into(2);
      kernels::column_sums(dy, db.tensor, db.accumulate);
    }
  }

  Mask weights() const override { return 0b110; }
  Cost cost(const Call& call) const override { return product_cost(call, inner(call), 1); }
  Cost backward_cost(const Call& call, Mask gradients) const override {
    return gradient_cost(call, inner(call), gradients);
  }

 private:
  void check(const Tensor& x, const Tensor& weight, const Tensor& bias) const {
    constexpr std::string_view op = "linear";
    if (x.rank() == 0) {
      fail(op, "x must be [.., I], got a scalar");
    }
    const std::int64_t in = x.shape().back();
    if (weight.rank() != 2 || weight.size(in_out_ ? 0 : 1) != in) {
      fail(op, "weight must be {} with I = {}, got {}", in_out_ ? "[I, O]" : "[O, I]", in,
           to_string(weight.shape()));
    }
    kernels::expect_dtype(op, "weight", weight, x.dtype());
    if (bias.defined()) {
      kernels::expect_shape(op, "bias", bias, Shape{weight.size(in_out_ ? 1 : 0)}, "[O]");
    }
  }
  std::int64_t inner(const Call& call) const { return call.input(0).shape().back(); }

  bool in_out_;
};

class Product final : public Op {
 public:
  explicit Product(ProductOptions options) : options_(options) {}
  std::string_view name() const override { return "matmul"; }

  void forward(Forward& run) const override {
    const Tensor &a = run.input(0), &b = run.input(1);
    if (a.rank() == 0 || b.rank() != 2 || (options_.transpose_a && a.rank() != 2)) {
      fail("matmul", "a must be {} and b a matrix, got {} and {}",
           options_.transpose_a ? "a matrix" : "[.., K]", to_string(a.shape()),
           to_string(b.shape()));
    }
    const std::int64_t n = b.size(options_.transpose_b ? 0 : 1);
    const Shape shape =
        options_.transpose_a ? Shape{a.size(1), n} : a.shape().with(a.rank() - 1, n);
    kernels::matmul(a, b, run.output(0, shape, a.dtype()),
                    {options_.transpose_a, options_.transpose_b});
  }

  Saved saved(Mask gradients) const override { return other_operands(gradients); }

  void backward(Backward& run) const override {
    const Tensor& dc = run.gradient(0);
    if (run.wants(0)) {
      const Target da = run.into(0);
      const Tensor& b = run.input(1);
      if (options_.transpose_a) {  // dA = op(B) dC^T
        kernels::matmul(b, dc, da.tensor, {options_.transpose_b, true, da.accumulate});
      } else {  // dA = dC op(B)^T
        kernels::matmul(dc, b, da.tensor, {false, !options_.transpose_b, da.accumulate});
      }
    }
    if (run.wants(1)) {
      const Target db = run.into(1);
      const Tensor& a = run.input(0);
      if (options_.transpose_b) {  // dB = dC^T op(A)
        kernels::matmul(dc, a, db.tensor, {true, options_.transpose_a, db.accumulate});
      } else {  // dB = op(A)^T dC
        kernels::matmul(a, dc, db.tensor, {!options_.transpose_a, false, db.accumulate});
      }
    }
  }

  Cost cost(const Call& call) const override { return product_cost(call, inner(call), 1); }
  Cost backward_cost(const Call& call, Mask gradients) const override {
    return gradient_cost(call, inner(call), gradients);
  }

 private:
  std::int64_t inner(const Call& call) const {
    return options_.transpose_a ? call.input(0).size(0) : call.input(0).shape().back();
  }

  ProductOptions options_;
};

}  // namespace

Variable linear(Variable x, Variable weight, Variable bias, bool in_out) {
  return apply(std::make_unique<Linear>(in_out),
               {std::move(x), std::move(weight), std::move(bias)});
}

Variable matmul(Variable a, Variable b, ProductOptions options) {
  return apply(std::make_unique<Product>(options), {std::move(a), std::move(b)});
}

}  // namespace reprise
