#include "nn/blocks.h"

#include <fmt/format.h>

#include "autograd/tape.h"

namespace reprise::nn {
namespace {

struct Stack {
  std::string_view name;
  const RunBlock& run;

  Variable one(std::size_t i, Variable x) const {
    return checkpoint(fmt::format("{}.{}", name, i), run, i, std::move(x));
  }

  // Blocks [begin, end), with begin < end, each half in a segment of its own.
  Variable halves(std::size_t begin, std::size_t end, Variable x) const {
    if (end - begin == 1) {
      return one(begin, std::move(x));
    }
    const std::size_t middle = begin + (end - begin + 1) / 2;
    x = half(begin, middle, std::move(x));
    return half(middle, end, std::move(x));
  }
  Variable half(std::size_t begin, std::size_t end, Variable x) const {
    if (end - begin == 1) {
      return one(begin, std::move(x));
    }
    return checkpoint(
        fmt::format("{}.{}-{}", name, begin, end - 1),
        [&](Variable in) { return halves(begin, end, std::move(in)); }, std::move(x));
  }
};

}  // namespace

Variable run_blocks(std::string_view name, std::size_t count, Variable x, const RunBlock& run,
                    const IsTrained& is_trained) {
  const Stack stack{name, run};
  const Tape* const tape = Tape::current();
  std::size_t first = 0;
  for (; first < count && !x.needs_gradient() && !is_trained(first); ++first) {
    x = run(first, std::move(x));
  }
  if (first < count && tape != nullptr && tape->policies().nested()) {
    return stack.halves(first, count, std::move(x));
  }
  for (std::size_t i = first; i < count; ++i) {
    x = stack.one(i, std::move(x));
  }
  return x;
}

}  // namespace reprise::nn
