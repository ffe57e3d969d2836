// Times kernels on a device for the shapes of a model, beside a plain copy. Prints one JSON object:
// milliseconds, the fewest bytes that the kernel must move and the operations that it must do.
// bench/peers/torch_kernels.py prints the same rows.
//
//   device_kernels --device cuda --dtype bf16 --batch 32 --tokens 1024 --width 768 --inner 3072
//                  --heads 12 --kv-heads 12 --head-size 64 --vocabulary 50257
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <vector>

#include <fmt/format.h>

#include "core/out_of_memory.h"
#include "kernels/activation.h"
#include "kernels/adamw.h"
#include "kernels/attention.h"
#include "kernels/cross_entropy.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/rope.h"
#include "nn/initialize.h"
#include "train/on_device.h"

namespace reprise::bench {
namespace {

struct Options {
  std::string place = "cpu", dtype = "bf16", only;
  std::int64_t batch = 2, tokens = 32, width = 64, inner = 128, heads = 4, kv_heads = 2,
               head_size = 16, vocabulary = 512;
  double least_ms = 30;  // a sample takes at least this long
  int samples = 5;
  Device device = cpu;

  DType type() const { return dtype == "bf16" ? DType::bf16 : DType::f32; }
  std::int64_t rows() const { return batch * tokens; }
};

double ms_of(const std::function<void()>& call, int times, Device device) {
  train::wait_for(device);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < times; ++i) {
    call();
  }
  train::wait_for(device);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

class Kernels {
 public:
  explicit Kernels(const Options& options) : o_(options) {}

  nlohmann::json run() {
    part({"copy"}, [&] { copies(); });
    part({"rms_norm", "layer_norm"}, [&] { norms(); });
    part({"gated_silu", "gelu_tanh"}, [&] { activations(); });
    part({"rope"}, [&] { rotation(); });
    part({"cross_entropy", "linear_cross_entropy", "full_logits_cross_entropy"}, [&] { losses(); });
    part({"adamw"}, [&] { optimizer(); });
    part({"attention"}, [&] { attention(); });
    part({"matmul"}, [&] { products(); });
    return rows_;
  }

 private:
  Tensor drawn(const Shape& shape) { return drawn(shape, o_.type()); }
  Tensor drawn(const Shape& shape, DType dtype) {
    const Tensor x = Tensor::empty(shape, dtype, o_.device), flat = x.reshape({shape.numel()});
    // The host draws: a part, of which the rest are copies.
    std::int64_t drawn = std::min<std::int64_t>(shape.numel(), std::int64_t{1} << 22);
    nn::fill_normal(flat.slice(0, 0, drawn), 1.0, generator_);
    while (drawn < shape.numel()) {
      const std::int64_t next = std::min(shape.numel(), 2 * drawn);
      flat.slice(0, drawn, next).copy_from(flat.slice(0, 0, next - drawn));
      drawn = next;
    }
    return x;
  }
  Tensor numbers(const Shape& shape, std::int64_t limit) {
    std::vector<std::int64_t> values(static_cast<std::size_t>(shape.numel()));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<std::int64_t>((i * 2654435761u) % static_cast<std::uint64_t>(limit));
    }
    return Tensor::from(values, shape, o_.device);
  }

  // Nothing is drawn for kernels that are not asked for.
  void part(const std::vector<std::string>& stems, const std::function<void()>& run) {
    if (std::ranges::any_of(stems, [&](const std::string& stem) {
          return o_.only.starts_with(stem) || stem.starts_with(o_.only);
        })) {
      run();
    }
  }

  // The median of several samples, each of as many calls as fill the time.
  void time(const std::string& name, std::int64_t bytes, std::int64_t flops,
            const std::function<void()>& call) {
    if (!name.starts_with(o_.only)) {
      return;
    }
    call();
    const double once = std::max(1e-4, ms_of(call, 2, o_.device) / 2);
    const int times = static_cast<int>(std::clamp(o_.least_ms / once, 1.0, 2000.0));
    std::vector<double> samples;
    for (int i = 0; i < o_.samples; ++i) {
      samples.push_back(ms_of(call, times, o_.device) / times);
    }
    std::ranges::sort(samples);
    rows_.push_back({{"kernel", name},
                     {"ms", samples[samples.size() / 2]},
                     {"ms_least", samples.front()},
                     {"ms_most", samples.back()},
                     {"bytes", bytes},
                     {"flops", flops}});
  }

  // Of the sizes that the kernels below have: what fits a cache is copied faster.
  void copies() {
    copy("copy", {o_.rows(), o_.width});
    copy("copy_inner", {o_.rows(), o_.inner});
    copy("copy_logits", {o_.rows(), o_.vocabulary});
    copy("copy_table", {o_.vocabulary, o_.width * 8});
  }
  void copy(const std::string& name, const Shape& shape) {
    const Tensor x = Tensor::full(shape, o_.type(), 0.5, o_.device);
    const Tensor y = Tensor::empty(shape, o_.type(), o_.device);
    time(name, 2 * x.bytes(), 0, [&] { y.copy_from(x); });
  }

  void norms() {
    const Tensor x = drawn({o_.rows(), o_.width}), y = drawn(x.shape()), dx = drawn(x.shape());
    const Tensor residual = drawn(x.shape()), sum = drawn(x.shape());
    const Tensor weight = drawn({o_.width}), bias = drawn({o_.width});
    const Tensor mean = drawn({o_.rows()}, DType::f32), scale = drawn({o_.rows()}, DType::f32);
    const Tensor dw = drawn({o_.width}, DType::f32), db = drawn({o_.width}, DType::f32);
    time("rms_norm", 2 * x.bytes(), 0, [&] { kernels::rms_norm(x, weight, 1e-5, y, scale); });
    time("rms_norm_residual", 4 * x.bytes(), 0,
         [&] { kernels::rms_norm_residual(x, residual, weight, 1e-5, y, sum, scale); });
    time("rms_norm_backward", 3 * x.bytes(), 0, [&] {
      kernels::rms_norm_backward(y, {}, x, weight, scale, {{dx}, {dw}, {}});
    });
    time("layer_norm", 2 * x.bytes(), 0,
         [&] { kernels::layer_norm(x, weight, bias, 1e-5, y, mean, scale); });
    time("layer_norm_backward", 3 * x.bytes(), 0, [&] {
      kernels::layer_norm_backward(y, {}, x, weight, mean, scale, {{dx}, {dw}, {db}});
    });
  }

  void activations() {
    const Tensor gate = drawn({o_.rows(), o_.inner}), up = drawn(gate.shape());
    const Tensor y = drawn(gate.shape()), dgate = drawn(gate.shape()), dup = drawn(gate.shape());
    time("gated_silu", 3 * y.bytes(), 0, [&] { kernels::gated_silu(gate, up, y); });
    time("gated_silu_backward", 5 * y.bytes(), 0,
         [&] { kernels::gated_silu_backward(gate, up, y, dgate, false, dup, false); });
    time("gelu_tanh", 2 * y.bytes(), 0,
         [&] { kernels::activation(kernels::Activation::gelu_tanh, gate, y); });
    time("gelu_tanh_backward", 3 * y.bytes(), 0,
         [&] { kernels::activation_backward(kernels::Activation::gelu_tanh, gate, up, y, false); });
  }

  void rotation() {
    const Tensor x = drawn({o_.batch, o_.tokens, o_.heads, o_.head_size}), y = drawn(x.shape());
    const Tensor positions = numbers({o_.tokens}, o_.tokens);
    const Tensor frequencies = drawn({o_.head_size / 2}, DType::f32);
    time("rope", 2 * x.bytes(), 0, [&] { kernels::rope(x, positions, frequencies, {}, y); });
  }

  void losses() {
    const std::int64_t rows = o_.rows();
    const Tensor labels = numbers({rows}, o_.vocabulary);
    const Tensor loss = drawn({}, DType::f32), one = Tensor::full({}, DType::f32, 1, o_.device);
    where_there_is_memory({"cross_entropy", "cross_entropy_backward"}, [&] {
      const Tensor logits = drawn({rows, o_.vocabulary}), dx = drawn(logits.shape());
      const Tensor lse = drawn({rows}, DType::f32);
      time("cross_entropy", logits.bytes(), 0,
           [&] { kernels::cross_entropy(logits, labels, loss, lse); });
      time("cross_entropy_backward", 2 * logits.bytes(), 0,
           [&] { kernels::cross_entropy_backward(one, logits, labels, lse, dx); });
    });
    const Tensor x = drawn({rows, o_.width}), w = drawn({o_.vocabulary, o_.width});
    const Tensor dx = drawn(x.shape()), dw = drawn(w.shape());
    const std::int64_t flops = 6 * rows * o_.width * o_.vocabulary;
    time_with_memory("linear_cross_entropy", flops,
                     [&] { kernels::linear_cross_entropy(x, w, labels, loss, dx, dw); });
    // The same from our own kernels, with the logits whole.
    const auto whole = [&] {
      const Tensor logits = Tensor::empty({rows, o_.vocabulary}, o_.type(), o_.device);
      const Tensor lse = Tensor::empty({rows}, DType::f32, o_.device);
      kernels::matmul(x, w, logits, {.transpose_b = true});
      kernels::cross_entropy(logits, labels, loss, lse);
      kernels::cross_entropy_backward(one, logits, labels, lse, logits);
      kernels::matmul(logits, w, dx);
      kernels::matmul(logits, x, dw, {.transpose_a = true});
    };
    where_there_is_memory({"full_logits_cross_entropy"},
                          [&] { time_with_memory("full_logits_cross_entropy", flops, whole); });
  }

  // Kernels that the device has no memory for are told as that.
  void where_there_is_memory(const std::vector<std::string>& names,
                             const std::function<void()>& run) {
    const std::size_t before = rows_.size();
    try {
      run();
    } catch (const OutOfMemory&) {
      rows_.erase(rows_.begin() + static_cast<std::ptrdiff_t>(std::min(before, rows_.size())),
                  rows_.end());
      for (const std::string& name : names) {
        rows_.push_back({{"kernel", name}, {"ms", nullptr}, {"error", "not run: out of memory"}});
      }
    }
  }

  // Also what it took beside its inputs and gradients.
  void time_with_memory(const std::string& name, std::int64_t flops,
                        const std::function<void()>& call) {
    allocator(o_.device).reset_peak();
    const std::int64_t before = allocator(o_.device).report().live_bytes;
    const std::size_t rows = rows_.size();
    time(name, 0, flops, call);
    if (rows_.size() > rows) {
      rows_.back()["extra_bytes"] = allocator(o_.device).report().peak_bytes - before;
    }
  }

  void optimizer() {
    const Shape shape{o_.vocabulary, o_.width};
    const Tensor value = drawn(shape), gradient = drawn(shape);
    const Tensor m = drawn(shape, DType::f32), master = drawn(shape, DType::f32);
    const Tensor v = Tensor::full(shape, DType::f32, 0.5, o_.device);
    const std::vector<kernels::AdamWTensor> list{{value, gradient, m, v, master, 0.1, 1}};
    time("adamw", value.bytes() + gradient.bytes() + 6 * m.bytes(), 0,
         [&] { kernels::adamw(list, kernels::AdamWSettings{}); });
  }

  void attention() {
    const Shape of_q{o_.batch, o_.tokens, o_.heads, o_.head_size};
    const Shape of_k{o_.batch, o_.tokens, o_.kv_heads, o_.head_size};
    const Tensor q = drawn(of_q), k = drawn(of_k), v = drawn(of_k), out = drawn(of_q);
    const Tensor dq = drawn(of_q), dk = drawn(of_k), dv = drawn(of_k), dout = drawn(of_q);
    const Tensor lse = drawn({o_.batch, o_.heads, o_.tokens}, DType::f32);
    const kernels::AttentionInputs in{q, k, v, {}, {}};
    kernels::AttentionOptions options;
    options.causal = true;
    const std::int64_t flops = 4 * kernels::visible_pairs(in, options) * o_.heads * o_.head_size;
    time("attention", 2 * q.bytes() + 2 * k.bytes(), flops,
         [&] { kernels::attention(in, out, lse, options); });
    time("attention_backward", 4 * q.bytes() + 4 * k.bytes(), flops * 5 / 2, [&] {
      kernels::attention_backward(in, out, lse, dout, {dq, dk, dv}, options);
    });
  }

  void products() {
    const std::int64_t N = o_.rows(), C = o_.width, F = o_.inner;
    const std::int64_t qkv = (o_.heads + 2 * o_.kv_heads) * o_.head_size;
    for (const auto& [name, in, out] :
         {std::tuple("qkv", C, qkv), std::tuple("up", C, F), std::tuple("down", F, C)}) {
      const Tensor x = drawn({N, in}), w = drawn({out, in}), y = drawn({N, out});
      const std::int64_t bytes = x.bytes() + w.bytes() + y.bytes(), flops = 2 * N * in * out;
      const std::string stem = std::string("matmul_") + name;
      time(stem, bytes, flops, [&] { kernels::matmul(x, w, y, {.transpose_b = true}); });
      time(stem + "_dx", bytes, flops, [&] { kernels::matmul(y, w, x); });
      time(stem + "_dw", bytes, flops, [&] { kernels::matmul(y, x, w, {.transpose_a = true}); });
    }
  }

  Options o_;
  Generator generator_{3, 0};
  nlohmann::json rows_ = nlohmann::json::array();
};

nlohmann::json run(Options options) {
  const absl::StatusOr<Device> device = train::parse_device(options.place);
  const absl::Status usable = device.ok() ? train::expect_usable(*device) : device.status();
  if (!usable.ok()) {
    fail("bench", "{}", std::string(usable.message()));
  }
  options.device = *device;
  return {{"peer", "reprise"},
          {"device", to_string(options.device)},
          {"dtype", options.dtype},
          {"rows", Kernels(options).run()}};
}

}  // namespace
}  // namespace reprise::bench

int main(int argc, char** argv) {
  reprise::bench::Options options;
  CLI::App app("Kernels on a device, as JSON.", "device_kernels");
  app.add_option("--device", options.place, "cpu, cuda or cuda:N");
  app.add_option("--dtype", options.dtype)->check(CLI::IsMember({"f32", "bf16"}));
  app.add_option("--batch", options.batch)->check(CLI::PositiveNumber);
  app.add_option("--tokens", options.tokens)->check(CLI::PositiveNumber);
  app.add_option("--width", options.width)->check(CLI::PositiveNumber);
  app.add_option("--inner", options.inner)->check(CLI::PositiveNumber);
  app.add_option("--heads", options.heads)->check(CLI::PositiveNumber);
  app.add_option("--kv-heads", options.kv_heads)->check(CLI::PositiveNumber);
  app.add_option("--head-size", options.head_size)->check(CLI::PositiveNumber);
  app.add_option("--vocabulary", options.vocabulary)->check(CLI::PositiveNumber);
  app.add_option("--least-ms", options.least_ms);
  app.add_option("--only", options.only, "The kernels whose name begins so");
  app.add_option("--samples", options.samples)->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  try {
    fmt::print("{}\n", reprise::bench::run(options).dump());
  } catch (const std::exception& error) {
    fmt::print(stderr, "device_kernels: {}\n", error.what());
    return 2;
  }
  return 0;
}
