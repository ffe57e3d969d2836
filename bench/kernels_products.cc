#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "bench/kernels.h"
#include "core/error.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/matmul.h"
#include "tests/op_case.h"

namespace reprise::bench {
namespace {

constexpr std::int64_t kWidth = 768, kVocabulary = 50257, kLayers = 12;

// An operand, and how many of it a step goes through.
struct Operand {
  Shape shape;
  std::int64_t copies;
};

struct Product {
  std::string_view layer, kind;
  Operand a, b, c;
  kernels::MatmulOptions options;
  bool bias = false;
  DType output;
  std::int64_t per_step;
};

// y [N, O] = x [N, I] W [I, O] + b and its gradients, once a layer of the model.
void add_linear(std::vector<Product>& step, std::string_view layer, std::int64_t N, std::int64_t I,
                std::int64_t O, DType dtype) {
  const Operand x{{N, I}, kLayers}, w{{I, O}, kLayers}, y{{N, O}, kLayers};
  step.push_back({layer, "forward", x, w, y, {}, true, dtype, kLayers});
  step.push_back({layer, "input_gradient", y, w, x, {.transpose_b = true}, false, dtype, kLayers});
  step.push_back({layer, "weight_gradient", x, y, w, {.transpose_a = true}, false, dtype, kLayers});
}

// The tied head, in the chunks of tokens of linear_cross_entropy: W and its gradient are one, the
// logits of a chunk stand where those of the last did.
void add_head(std::vector<Product>& step, std::int64_t N, DType dtype) {
  const std::int64_t rows = kernels::linear_cross_entropy_rows(N, kWidth, kVocabulary, dtype);
  const std::int64_t chunks = N / rows;
  ensure(chunks * rows == N, "the head's chunks of {} rows do not fill {} tokens", rows, N);
  const Operand x{{rows, kWidth}, chunks}, w{{kVocabulary, kWidth}, 1},
      logits{{rows, kVocabulary}, 1};
  step.push_back({"head", "forward", x, w, logits, {.transpose_b = true}, false, dtype, chunks});
  step.push_back({"head", "input_gradient", logits, w, x, {}, false, dtype, chunks});
  const DType sum = chunks > 1 ? DType::f32 : dtype;
  step.push_back({"head", "weight_gradient", logits, x, w, {.transpose_a = true}, false, sum, 1});
  if (chunks > 1) {
    step.push_back({"head",
                    "weight_gradient_added",
                    logits,
                    x,
                    w,
                    {.transpose_a = true, .accumulate = true},
                    false,
                    sum,
                    chunks - 1});
  }
}

std::vector<Product> step_products(std::int64_t tokens, DType dtype) {
  std::vector<Product> step;
  add_linear(step, "qkv", tokens, kWidth, 3 * kWidth, dtype);
  add_linear(step, "proj", tokens, kWidth, kWidth, dtype);
  add_linear(step, "fc", tokens, kWidth, 4 * kWidth, dtype);
  add_linear(step, "fc_proj", tokens, 4 * kWidth, kWidth, dtype);
  add_head(step, tokens, dtype);
  return step;
}

std::int64_t bytes(const Operand& operand, DType dtype) {
  return operand.shape.numel() * static_cast<std::int64_t>(size_bytes(dtype));
}

Work work_of(const Product& p, DType dtype) {
  const std::int64_t inner = p.a.shape[p.options.transpose_a ? 0 : 1];
  const std::int64_t bias =
      p.bias ? p.c.shape[1] * static_cast<std::int64_t>(size_bytes(dtype)) : 0;
  return {2 * p.c.shape.numel() * inner,
          bytes(p.a, dtype) + bytes(p.b, dtype) + bias +
              bytes(p.c, p.output) * (p.options.accumulate ? 2 : 1),
          true};
}

std::vector<Tensor> copies(const Operand& operand, std::uint64_t seed, DType dtype) {
  const Tensor numbers = testing::draw_normal(seed, Shape{kDrawn}, dtype, cpu);
  std::vector<Tensor> all;
  for (std::int64_t i = 0; i < operand.copies; ++i) {
    all.push_back(repeated(numbers, operand.shape));
  }
  return all;
}

void run(benchmark::State& state, const Product& p, const StepRow& row, const Peaks& peaks) {
  const std::vector<Tensor> a = copies(p.a, 1, row.dtype), b = copies(p.b, 2, row.dtype),
                            c = copies(p.c, 3, p.output);
  const Tensor bias = p.bias ? testing::draw_normal(4, {p.c.shape[1]}, row.dtype, cpu) : Tensor();
  std::size_t turn = 0;
  const auto once = [&] {
    const std::size_t i = turn++;
    return seconds_of([&] {
      kernels::matmul(a[i % a.size()], b[i % b.size()], c[i % c.size()], p.options, bias);
    });
  };
  once();
  double seconds = 0;
  for (const auto& iteration : state) {
    (void)iteration;
    const double time = once();
    state.SetIterationTime(time);
    seconds += time;
  }
  set_counters(state, row.work, row.dtype, seconds, peaks);
  state.counters["per_step"] = static_cast<double>(row.per_step);
}

}  // namespace

std::vector<StepRow> register_step_products(const Peaks& peaks) {
  std::vector<StepRow> rows;
  for (const std::int64_t tokens : {256, 2048}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const Product& p : step_products(tokens, dtype)) {
        const StepRow row{fmt::format("step/gpt2/tokens:{}/{}/{}/{}", tokens, p.layer, p.kind,
                                      reprise::name(dtype)),
                          tokens, dtype, work_of(p, dtype), p.per_step};
        rows.push_back(row);
        const auto body = [p, row, &peaks](benchmark::State& state) { run(state, p, row, peaks); };
        benchmark::RegisterBenchmark(row.name.c_str(), body)
            ->UseManualTime()
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
  return rows;
}

}  // namespace reprise::bench
