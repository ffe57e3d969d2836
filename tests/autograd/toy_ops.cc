#include "tests/autograd/toy_ops.h"

#include <cmath>
#include <memory>

namespace reprise::testing {
namespace {

class Toy : public Op {
 public:
  void forward(Forward& run) const final {
    if (ToyHook::call) {
      ToyHook::call(name(), false);
    }
    compute(run);
  }
  void backward(Backward& run) const final {
    if (ToyHook::call) {
      ToyHook::call(name(), true);
    }
    derive(run);
  }
  Cost cost(const Call& call) const override {
    return {call.input(0).numel(), 2 * call.input(0).bytes()};
  }

 protected:
  virtual void compute(Forward& run) const = 0;
  virtual void derive(Backward& run) const = 0;
};

// y[i] = f(i), nothing on meta.
template <class F>
void fill(const Tensor& y, F&& f) {
  if (y.is_meta()) {
    return;
  }
  float* out = y.data<float>();
  for (std::int64_t i = 0; i < y.numel(); ++i) {
    out[i] = f(i);
  }
}
template <class F>
void write(const Target& target, F&& f) {
  if (target.tensor.is_meta()) {
    return;
  }
  float* out = target.tensor.data<float>();
  for (std::int64_t i = 0; i < target.tensor.numel(); ++i) {
    out[i] = target.accumulate ? out[i] + f(i) : f(i);
  }
}
const float* elements(const Tensor& x) {
  return x.is_meta() ? nullptr : x.data<float>();
}

class Add final : public Toy {
 public:
  std::string_view name() const override { return "toy_add"; }
  Saved saved(Mask) const override { return {}; }

 protected:
  void compute(Forward& run) const override {
    if (run.input(0).shape() != run.input(1).shape()) {
      fail("toy_add", "b must be {}, got {}", to_string(run.input(0).shape()),
           to_string(run.input(1).shape()));
    }
    const float* a = elements(run.input(0));
    const float* b = elements(run.input(1));
    fill(run.output(0, run.input(0).shape(), DType::f32, 0), [&](auto i) { return a[i] + b[i]; });
  }
  void derive(Backward& run) const override {
    for (std::size_t i = 0; i < 2; ++i) {
      if (run.wants(i)) {
        run.give(i, run.gradient(0));
      }
    }
  }
};

class Mul final : public Toy {
 public:
  std::string_view name() const override { return "toy_mul"; }
  Saved saved(Mask gradients) const override {
    return {((gradients & 1u) != 0 ? 2u : 0u) | ((gradients & 2u) != 0 ? 1u : 0u), 0};
  }

 protected:
  void compute(Forward& run) const override {
    const float* a = elements(run.input(0));
    const float* b = elements(run.input(1));
    fill(run.output(0, run.input(0).shape(), DType::f32, 0), [&](auto i) { return a[i] * b[i]; });
  }
  void derive(Backward& run) const override {
    const float* dy = elements(run.gradient(0));
    for (std::size_t i = 0; i < 2; ++i) {
      if (run.wants(i)) {
        const float* other = elements(run.input(1 - i));
        write(run.into(i), [&](auto k) { return dy[k] * other[k]; });
      }
    }
  }
};

class MulAdd final : public Toy {
 public:
  std::string_view name() const override { return "toy_mul_add"; }
  Saved saved(Mask gradients) const override {
    return {((gradients & 1u) != 0 ? 2u : 0u) | ((gradients & 2u) != 0 ? 1u : 0u), 0};
  }

 protected:
  void compute(Forward& run) const override {
    const float* a = elements(run.input(0));
    const float* b = elements(run.input(1));
    const float* c = elements(run.input(2));
    fill(run.output(0, run.input(0).shape(), DType::f32, 2),
         [&](auto i) { return a[i] * b[i] + c[i]; });
  }
  void derive(Backward& run) const override {
    const float* dy = elements(run.gradient(0));
    for (std::size_t i = 0; i < 2; ++i) {
      if (run.wants(i)) {
        const float* other = elements(run.input(1 - i));
        write(run.into(i), [&](auto k) { return dy[k] * other[k]; });
      }
    }
    if (run.wants(2)) {
      run.give(2, run.gradient(0));
    }
  }
};

class Tanh final : public Toy {
 public:
  std::string_view name() const override { return "toy_tanh"; }
  Saved saved(Mask) const override { return {0, 1}; }

 protected:
  void compute(Forward& run) const override {
    const float* x = elements(run.input(0));
    fill(run.output(0, run.input(0).shape(), DType::f32, 0),
         [&](auto i) { return std::tanh(x[i]); });
  }
  void derive(Backward& run) const override {
    const float* y = elements(run.output(0));
    const float* dy = elements(run.gradient(0));
    write(run.into(0, 0), [&](auto i) { return dy[i] * (1 - y[i] * y[i]); });
  }
};

class Square final : public Toy {
 public:
  std::string_view name() const override { return "toy_square"; }
  Saved saved(Mask) const override { return {1, 0}; }

 protected:
  void compute(Forward& run) const override {
    const float* x = elements(run.input(0));
    fill(run.output(0, run.input(0).shape(), DType::f32, 0), [&](auto i) { return x[i] * x[i]; });
  }
  void derive(Backward& run) const override {
    const float* x = elements(run.input(0));
    const float* dy = elements(run.gradient(0));
    write(run.into(0, 0), [&](auto i) { return 2 * x[i] * dy[i]; });
  }
};

class Scale final : public Toy {
 public:
  explicit Scale(float factor) : factor_(factor) {}
  std::string_view name() const override { return "toy_scale"; }
  Saved saved(Mask) const override { return {}; }

 protected:
  void compute(Forward& run) const override {
    const float* x = elements(run.input(0));
    fill(run.output(0, run.input(0).shape(), DType::f32, 0),
         [&](auto i) { return factor_ * x[i]; });
  }
  void derive(Backward& run) const override {
    const float* dy = elements(run.gradient(0));
    write(run.into(0, 0), [&](auto i) { return factor_ * dy[i]; });
  }

 private:
  float factor_;
};

class Dropout final : public Toy {
 public:
  Dropout(float p, std::uint64_t seed, std::uint64_t offset)
      : p_(p), seed_(seed), offset_(offset) {}
  std::string_view name() const override { return "toy_dropout"; }
  Saved saved(Mask) const override { return {}; }

 protected:
  float factor(std::int64_t i) const {
    const auto block = philox(seed_, offset_ + static_cast<std::uint64_t>(i) / 4);
    return uniform(block[static_cast<std::size_t>(i % 4)]) < p_ ? 0.0f : 1.0f / (1.0f - p_);
  }
  void compute(Forward& run) const override {
    const float* x = elements(run.input(0));
    fill(run.output(0, run.input(0).shape(), DType::f32, 0),
         [&](auto i) { return factor(i) * x[i]; });
  }
  void derive(Backward& run) const override {
    const float* dy = elements(run.gradient(0));
    write(run.into(0, 0), [&](auto i) { return factor(i) * dy[i]; });
  }

 private:
  float p_;
  std::uint64_t seed_, offset_;
};

class KeepOp final : public Toy {
 public:
  std::string_view name() const override { return "toy_keep"; }
  Saved saved(Mask) const override { return {}; }
  bool must_keep() const override { return true; }

 protected:
  void compute(Forward& run) const override {
    const float* x = elements(run.input(0));
    fill(run.output(0, run.input(0).shape(), DType::f32), [&](auto i) { return 2 * x[i]; });
  }
  void derive(Backward& run) const override {
    const float* dy = elements(run.gradient(0));
    write(run.into(0, 0), [&](auto i) { return 2 * dy[i]; });
  }
};

class Split final : public Toy {
 public:
  std::string_view name() const override { return "toy_split"; }
  std::size_t outputs() const override { return 2; }
  Saved saved(Mask) const override { return {1, 0}; }

 protected:
  void compute(Forward& run) const override {
    const float* x = elements(run.input(0));
    fill(run.output(0, run.input(0).shape(), DType::f32), [&](auto i) { return x[i] * x[i]; });
    fill(run.output(1, run.input(0).shape(), DType::f32), [&](auto i) { return 3 * x[i]; });
  }
  void derive(Backward& run) const override {
    const float* x = elements(run.input(0));
    const float* da = run.has_gradient(0) ? elements(run.gradient(0)) : nullptr;
    const float* db = run.has_gradient(1) ? elements(run.gradient(1)) : nullptr;
    write(run.into(0), [&](auto i) {
      return (da != nullptr ? 2 * x[i] * da[i] : 0.0f) + (db != nullptr ? 3 * db[i] : 0.0f);
    });
  }
};

class Sum final : public Toy {
 public:
  std::string_view name() const override { return "toy_sum"; }
  Saved saved(Mask) const override { return {}; }

 protected:
  void compute(Forward& run) const override {
    const Tensor& x = run.input(0);
    fill(run.output(0, {}, DType::f32), [&](auto) {
      float sum = 0;
      for (std::int64_t i = 0; i < x.numel(); ++i) {
        sum += x.data<float>()[i];
      }
      return sum;
    });
  }
  void derive(Backward& run) const override {
    const float* dy = elements(run.gradient(0));
    write(run.into(0), [&](auto) { return dy[0]; });
  }
};

class Slice final : public ViewOp {
 public:
  Slice(std::int64_t begin, std::int64_t end) : begin_(begin), end_(end) {}
  std::string_view name() const override { return "toy_slice"; }
  Tensor view(const Tensor& x) const override { return x.slice(0, begin_, end_); }
  void backward(Backward& run) const override {
    const float* dy = elements(run.gradient(0));
    write(run.into(0), [&](auto i) { return i >= begin_ && i < end_ ? dy[i - begin_] : 0.0f; });
  }

 private:
  std::int64_t begin_, end_;
};

}  // namespace

Variable toy_add(Variable a, Variable b) {
  return apply(std::make_unique<Add>(), {std::move(a), std::move(b)});
}
Variable toy_mul(Variable a, Variable b) {
  return apply(std::make_unique<Mul>(), {std::move(a), std::move(b)});
}
Variable toy_mul_add(Variable a, Variable b, Variable c) {
  return apply(std::make_unique<MulAdd>(), {std::move(a), std::move(b), std::move(c)});
}
Variable toy_tanh(Variable x) {
  return apply(std::make_unique<Tanh>(), {std::move(x)});
}
Variable toy_square(Variable x) {
  return apply(std::make_unique<Square>(), {std::move(x)});
}
Variable toy_scale(Variable x, float factor) {
  return apply(std::make_unique<Scale>(factor), {std::move(x)});
}
Variable toy_dropout(Variable x, float p, Generator& generator) {
  const auto words = static_cast<std::uint64_t>(x.shape().numel());
  const std::uint64_t seed = generator.seed;
  const std::uint64_t offset = generator.reserve(words);
  return apply(std::make_unique<Dropout>(p, seed, offset), {std::move(x)});
}
Variable toy_keep(Variable x) {
  return apply(std::make_unique<KeepOp>(), {std::move(x)});
}
std::pair<Variable, Variable> toy_split(Variable x) {
  Variable inputs[] = {std::move(x)};
  auto outputs = apply_many(std::make_unique<Split>(), inputs);
  return {std::move(outputs[0]), std::move(outputs[1])};
}
Variable toy_sum(Variable x) {
  return apply(std::make_unique<Sum>(), {std::move(x)});
}
Variable toy_slice(Variable x, std::int64_t begin, std::int64_t end) {
  return apply(std::make_unique<Slice>(begin, end), {std::move(x)});
}

}  // namespace reprise::testing
