// The oracle: the program's text evaluated in double precision, and a reverse mode of its own.
#include <algorithm>
#include <array>
#include <cmath>
#include <memory>

#include "core/philox.h"
#include "tests/autograd/random_program.h"

namespace reprise::testing {
namespace {

using Doubles = std::vector<double>;

struct Node;
using NodePtr = std::shared_ptr<Node>;

// A value. `bound` grows as the sum of the absolute values of all that went into it.
struct Node {
  Doubles value, bound;
  bool needs = false;
  bool parameter = false;
  Doubles gradient, gradient_bound;  // empty: none
  struct Edge {
    NodePtr to;
    // gradient of `to`'s element j += factor[k] * gradient of ours at k, j = k + shift
    Doubles factor, factor_bound;
    std::size_t shift = 0;
    bool sums = false;  // we are one element, the sum of to's
  };
  std::vector<Edge> edges;
};

class Evaluate {
 public:
  explicit Evaluate(const Program& program) : program_(program) {}

  Oracle run() {
    Oracle oracle;
    std::vector<NodePtr> parameters;
    std::uint64_t offset = 0;
    for (int p = 0; p < Program::kParameters; ++p) {
      parameters.push_back(source(-1, p, program_.trainable[static_cast<std::size_t>(p)]));
      parameters.back()->parameter = true;
    }
    parameters_ = parameters;
    for (int m = 0; m < program_.micro_batches; ++m) {
      slots_ = {};
      wanted_.clear();
      losses_.clear();
      order_.clear();
      forward(m, offset);
      for (int sweep = 0; sweep < 2; ++sweep) {
        for (NodePtr& n : order_) {
          n->gradient = n->gradient_bound = {};
        }
        bool any = false;
        for (std::size_t i = 0; i < losses_.size(); ++i) {
          if ((static_cast<int>(i) < program_.first_losses) == (sweep == 0) && losses_[i]->needs) {
            add(*losses_[i], 0, program_.scale(i), std::abs(program_.scale(i)));
            any = true;
          }
        }
        swept_ = any;
        for (auto it = order_.rbegin(); it != order_.rend(); ++it) {
          push(**it);
        }
      }
    }
    auto result = [](const NodePtr& n) -> std::optional<OracleNumbers> {
      if (n == nullptr || n->gradient.empty()) {
        return std::nullopt;
      }
      return OracleNumbers{n->gradient, n->gradient_bound};
    };
    for (const NodePtr& p : parameters) {
      oracle.gradients.push_back(result(p));
    }
    for (const NodePtr& w : wanted_) {
      if (swept_ && w->needs && !w->parameter) {
        oracle.wanted.push_back(result(w));
      }
    }
    for (const NodePtr& s : slots_) {
      oracle.handles.push_back(s == nullptr ? std::optional<OracleNumbers>()
                                            : OracleNumbers{s->value, s->bound});
    }
    return oracle;
  }

 private:
  NodePtr source(int micro_batch, std::int64_t number, bool needs) {
    auto n = std::make_shared<Node>();
    for (int i = 0; i < Program::kLength; ++i) {
      n->value.push_back(program_.number(micro_batch, number, i));
      n->bound.push_back(std::abs(n->value.back()));
    }
    n->needs = needs;
    return n;
  }
  static void add(Node& n, std::size_t i, double gradient, double bound) {
    if (n.gradient.empty()) {
      n.gradient.assign(n.value.size(), 0);
      n.gradient_bound.assign(n.value.size(), 0);
    }
    n.gradient[i] += gradient;
    n.gradient_bound[i] += bound;
  }
  static void push(Node& n) {
    if (n.gradient.empty()) {
      return;
    }
    for (Node::Edge& e : n.edges) {
      if (e.sums) {
        for (std::size_t j = 0; j < e.to->value.size(); ++j) {
          add(*e.to, j, n.gradient[0], n.gradient_bound[0]);
        }
        continue;
      }
      for (std::size_t k = 0; k < n.gradient.size(); ++k) {
        add(*e.to, k + e.shift, e.factor[k] * n.gradient[k],
            e.factor_bound[k] * n.gradient_bound[k]);
      }
      // A view's gradient covers its source, zeros included; add() has made them.
    }
  }
  NodePtr make(std::size_t length) {
    auto n = std::make_shared<Node>();
    n->value.resize(length);
    n->bound.resize(length);
    order_.push_back(n);
    return n;
  }
  void connect(const NodePtr& n, const NodePtr& to, Doubles factor, Doubles bound,
               std::size_t shift = 0) const {
    if (gradients_on_ && to->needs) {
      n->needs = true;
      n->edges.push_back({to, std::move(factor), std::move(bound), shift, false});
    }
  }
  // f(x) and f'(x), each with a bound.
  template <class F>
  NodePtr map(const NodePtr& a, F f) {
    NodePtr n = make(a->value.size());
    Doubles slope, slope_bound;
    for (std::size_t i = 0; i < a->value.size(); ++i) {
      const std::array<double, 4> r = f(a->value[i], a->bound[i], i);
      n->value[i] = r[0];
      n->bound[i] = r[1];
      slope.push_back(r[2]);
      slope_bound.push_back(r[3]);
    }
    connect(n, a, slope, slope_bound);
    return n;
  }
  NodePtr product(const NodePtr& a, const NodePtr& b, const NodePtr& c) {
    NodePtr n = make(a->value.size());
    for (std::size_t i = 0; i < a->value.size(); ++i) {
      n->value[i] = a->value[i] * b->value[i] + (c ? c->value[i] : 0);
      n->bound[i] = a->bound[i] * b->bound[i] + (c ? c->bound[i] : 0);
    }
    connect(n, a, b->value, b->bound);
    connect(n, b, a->value, a->bound);
    if (c) {
      connect(n, c, Doubles(a->value.size(), 1), Doubles(a->value.size(), 1));
    }
    return n;
  }

  NodePtr sum(const NodePtr& a, const NodePtr& b) {
    NodePtr n = make(a->value.size());
    for (std::size_t k = 0; k < n->value.size(); ++k) {
      n->value[k] = a->value[k] + b->value[k];
      n->bound[k] = a->bound[k] + b->bound[k];
    }
    connect(n, a, Doubles(n->value.size(), 1), Doubles(n->value.size(), 1));
    connect(n, b, Doubles(n->value.size(), 1), Doubles(n->value.size(), 1));
    return n;
  }
  // Elements from `shift` on; without an edge when detached.
  NodePtr part(const NodePtr& a, std::size_t shift, std::size_t length, bool detached) {
    NodePtr n = make(length);
    for (std::size_t k = 0; k < length; ++k) {
      n->value[k] = a->value[k + shift];
      n->bound[k] = a->bound[k + shift];
    }
    if (!detached) {
      connect(n, a, Doubles(length, 1), Doubles(length, 1), shift);
    }
    return n;
  }
  NodePtr total(const NodePtr& a) {
    NodePtr n = make(1);
    for (std::size_t k = 0; k < a->value.size(); ++k) {
      n->value[0] += a->value[k];
      n->bound[0] += a->bound[k];
    }
    if (a->needs) {
      n->needs = true;
      n->edges.push_back({a, {}, {}, 0, true});
    }
    return n;
  }
  NodePtr times(const NodePtr& a, double f) {
    return map(a, [f](double x, double bound, std::size_t) -> std::array<double, 4> {
      return {f * x, std::abs(f) * bound, f, std::abs(f)};
    });
  }
  NodePtr square(const NodePtr& a) {
    return map(a, [](double x, double bound, std::size_t) -> std::array<double, 4> {
      return {x * x, bound * bound, 2 * x, 2 * bound};
    });
  }
  NodePtr tangent(const NodePtr& a) {
    return map(a, [](double x, double bound, std::size_t) -> std::array<double, 4> {
      const double y = std::tanh(x), yb = std::max(1.0, bound);
      return {y, yb, 1 - y * y, 1 + yb * yb};
    });
  }
  NodePtr dropout(const NodePtr& a, float p, std::uint64_t& offset) {
    NodePtr n = map(a, [&](double x, double bound, std::size_t k) -> std::array<double, 4> {
      const auto word = philox(program_.seed, offset + k / 4)[k % 4];
      const double keep = uniform(word) < p ? 0.0 : 1.0 / (1.0 - static_cast<double>(p));
      return {keep * x, keep * bound, keep, keep};
    });
    offset += (a->value.size() + 3) / 4;
    return n;
  }

  void forward(int micro_batch, std::uint64_t& offset) {
    std::int64_t constants = 0;
    for (const Instruction& i : program_.text) {
      gradients_on_ = !i.no_gradient;
      const NodePtr a = slots_[static_cast<std::size_t>(i.a)];
      const NodePtr b = i.b < Program::kSlots ? slots_[static_cast<std::size_t>(i.b)] : nullptr;
      const NodePtr c = slots_[static_cast<std::size_t>(i.c)];
      auto moved = [&](int slot, unsigned bit) {
        if ((i.moved >> bit & 1u) != 0) {
          slots_[static_cast<std::size_t>(slot)] = nullptr;
        }
      };
      moved(i.a, 0);
      moved(i.b, 1);
      moved(i.c, 2);
      switch (i.act) {
        case Act::constant:
        case Act::shared:
        case Act::leaf:
        case Act::parameter:
          slots_[static_cast<std::size_t>(i.d)] = source(i, micro_batch, constants);
          break;
        case Act::split: {
          NodePtr first = square(a), second = times(a, 3);
          slots_[static_cast<std::size_t>(i.d)] = first;
          slots_[static_cast<std::size_t>(i.c)] = second;
          break;
        }
        case Act::drop:
          slots_[static_cast<std::size_t>(i.a)] = nullptr;
          break;
        case Act::loss:
          losses_.push_back(total(a));
          break;
        case Act::want:
          wanted_.push_back(a);
          break;
        case Act::name:
        case Act::open:
        case Act::close:
        case Act::escape:
          break;
        default:
          slots_[static_cast<std::size_t>(i.d)] = operation(i, a, b, c, offset);
      }
    }
  }
  NodePtr source(const Instruction& i, int micro_batch, std::int64_t& constants) {
    if (i.act == Act::parameter) {
      return parameters_[static_cast<std::size_t>(i.b)];
    }
    if (i.act == Act::shared) {
      return source(-1, 50 + i.b, false);
    }
    NodePtr n = source(micro_batch, constants++, i.act == Act::leaf);
    if (i.act == Act::leaf) {
      order_.push_back(n);
    }
    return n;
  }
  NodePtr operation(const Instruction& i, const NodePtr& a, const NodePtr& b, const NodePtr& c,
                    std::uint64_t& offset) {
    switch (i.act) {
      case Act::add:
        return sum(a, b);
      case Act::mul:
        return product(a, b, nullptr);
      case Act::mul_add:
        return product(a, b, c);
      case Act::tanh:
        return tangent(a);
      case Act::square:
        return square(a);
      case Act::scale:
        return times(a, i.factor);
      case Act::dropout:
        return dropout(a, i.factor, offset);
      case Act::keep:
        return times(a, 2);
      case Act::slice:
        return part(a, static_cast<std::size_t>(2 * i.b), 2, false);
      case Act::detach:
        return part(a, 0, a->value.size(), true);
      default:
        return a;  // a copy
    }
  }

  const Program& program_;
  std::vector<NodePtr> parameters_, wanted_, losses_, order_;
  std::array<NodePtr, Program::kSlots> slots_;
  bool gradients_on_ = true;
  bool swept_ = false;
};

}  // namespace

Oracle run_oracle(const Program& program) {
  return Evaluate(program).run();
}

}  // namespace reprise::testing
