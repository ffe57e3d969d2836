#include "kernels/attention.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "core/cuda_device.h"
#include "core/parallel.h"
#include "kernels/attention_fused.h"
#include "kernels/attention_tasks.h"
#include "kernels/dispatch.h"

namespace reprise::kernels {
namespace {

struct Sizes {
  std::int64_t B, T, H, S, K, D;
};

void expect_heads(std::string_view op, std::string_view argument, const Tensor& tensor,
                  const Tensor& q) {
  if (tensor.rank() != 4) {
    fail(op, "{} must have four dimensions [B, T, H, D], got {}", argument,
         to_string(tensor.shape()));
  }
  expect_dtype(op, argument, tensor, q.dtype());
  expect_device(op, argument, tensor, q.device());
  if (tensor.size(3) > 1 && tensor.strides()[3] != 1 && tensor.numel() > 0) {
    fail(op, "{} must have unit inner stride, got {}: call contiguous()", argument,
         tensor.strides()[3]);
  }
}

Sizes expect_qkv(std::string_view op, const AttentionInputs& in) {
  const Tensor& q = in.q;
  if (q.dtype() != DType::f32 && q.dtype() != DType::bf16) {
    fail(op, "q must be f32 or bf16, got {}", name(q.dtype()));
  }
  expect_heads(op, "q", q, q);
  expect_heads(op, "k", in.k, q);
  expect_heads(op, "v", in.v, q);
  const Sizes s{q.size(0), q.size(1), q.size(2), in.k.size(1), in.k.size(2), q.size(3)};
  expect_shape(op, "k", in.k, Shape{s.B, s.S, s.K, s.D}, "[B, S, K, D]");
  expect_shape(op, "v", in.v, Shape{s.B, s.S, s.K, s.D}, "[B, S, K, D]");
  if (s.D == 0) {
    fail(op, "heads must have a size, got D = 0");
  }
  if (s.K == 0 ? s.H != 0 : s.H % s.K != 0) {
    fail(op, "H must be a multiple of K, got H = {} and K = {}", s.H, s.K);
  }
  return s;
}

std::string decreasing(const DeviceFault& fault) {
  return fmt::format("documents must not decrease along T, got {} after {} at [{}, {}]",
                     fault.value, fault.other, fault.index / fault.limit,
                     fault.index % fault.limit);
}
std::string not_padded_right(const DeviceFault& fault) {
  return fmt::format("padded_right must hold, but the mask is {} at [{}, {}]", fault.value,
                     fault.index / fault.limit, fault.index % fault.limit);
}
std::string too_many_documents(const DeviceFault& fault) {
  return fmt::format("most_documents must not be less than there are, got {} for {}", fault.limit,
                     fault.value);
}

void expect_documents_ascend(std::string_view op, const Tensor& documents) {
  const auto* const number = documents.data<std::int64_t>();
  const std::int64_t T = documents.size(1);
  for (std::int64_t at = 0; at < documents.numel(); ++at) {
    if (at % T != 0 && number[at] < number[at - 1]) {
      fail(op, "{}",
           decreasing({.index = at, .value = number[at], .limit = T, .other = number[at - 1]}));
    }
  }
}

// The options' promises, where they can be seen to be broken.
void expect_promises(std::string_view op, const AttentionInputs& in, const Sizes& s,
                     const AttentionOptions& options) {
  if (in.mask.defined() && options.padded_right) {
    const auto* const mask = in.mask.data<std::int64_t>();
    for (std::int64_t at = 0; at < in.mask.numel(); ++at) {
      const std::int64_t j = at % s.S;
      if (mask[at] != 0 ? j > 0 && mask[at - 1] == 0 : j == 0) {
        fail(op, "{}", not_padded_right({.index = at, .value = mask[at], .limit = s.S}));
      }
    }
  }
  if (in.documents.defined() && options.most_documents > 0) {
    const auto* const number = in.documents.data<std::int64_t>();
    std::int64_t count = 0;
    for (std::int64_t at = 0; at < in.documents.numel(); ++at) {
      count += at % s.T == 0 || number[at] != number[at - 1] ? 1 : 0;
    }
    if (count > options.most_documents) {
      fail(op, "{}", too_many_documents({.value = count, .limit = options.most_documents}));
    }
  }
}

// The same by a cuda device.
void check_on_device(std::string_view op, const AttentionInputs& in, const Sizes& s,
                     const AttentionOptions& options) {
  const bool promised = in.mask.defined() && options.padded_right;
  if (in.q.device().kind != DeviceKind::cuda || !(promised || in.documents.defined())) {
    return;
  }
  [[maybe_unused]] const VisibilityCheck check{
      in.documents.defined() ? in.documents.data<std::int64_t>() : nullptr,
      promised ? in.mask.data<std::int64_t>() : nullptr,
      s.B,
      s.T,
      s.S,
      options.most_documents,
      fault_site(op, decreasing),
      fault_site(op, not_padded_right),
      fault_site(op, too_many_documents)};
  const Device device = in.q.device();
  REPRISE_CUDA_SIDE(op,
                    cuda::check_visibility(check, cuda_fault_word(device), cuda_stream(device)));
  settle_faults(device);
}

void expect_visibility(std::string_view op, const AttentionInputs& in, const Sizes& s,
                       const AttentionOptions& options) {
  if (options.window < 0) {
    fail(op, "window must not be negative, got {}", options.window);
  }
  if (options.window > 0 && !options.causal) {
    fail(op, "window must be 0 without causal, got {}", options.window);
  }
  if (!(options.dropout >= 0 && options.dropout < 1)) {
    fail(op, "dropout must be in [0, 1), got {}", options.dropout);
  }
  if (in.mask.defined()) {
    expect_dtype(op, "mask", in.mask, DType::i64);
    expect_shape(op, "mask", in.mask, Shape{s.B, s.S}, "[B, S]");
    expect_contiguous(op, "mask", in.mask);
    expect_device(op, "mask", in.mask, in.q.device());
  }
  if (in.documents.defined()) {
    expect_dtype(op, "documents", in.documents, DType::i64);
    expect_shape(op, "documents", in.documents, Shape{s.B, s.T}, "[B, T]");
    expect_contiguous(op, "documents", in.documents);
    expect_device(op, "documents", in.documents, in.q.device());
    if (s.T != s.S) {
      fail(op, "documents need as many keys as queries, got T = {} and S = {}", s.T, s.S);
    }
    if (in.q.device().kind != DeviceKind::cuda) {
      expect_documents_ascend(op, in.documents);
    }
  }
  if (options.most_documents < 0) {
    fail(op, "most_documents must not be negative, got {}", options.most_documents);
  }
  if (in.q.device().kind != DeviceKind::cuda) {
    expect_promises(op, in, s, options);
  }
}

void expect_result(std::string_view op, std::string_view argument, const Tensor& tensor,
                   const Shape& shape, std::string_view letters, DType dtype, Device device) {
  expect_dtype(op, argument, tensor, dtype);
  expect_shape(op, argument, tensor, shape, letters);
  expect_contiguous(op, argument, tensor);
  expect_device(op, argument, tensor, device);
}

Sizes checked(std::string_view op, const AttentionInputs& in, const Tensor& out,
              const Tensor& log_sum_exp, const AttentionOptions& options) {
  const Sizes s = expect_qkv(op, in);
  expect_visibility(op, in, s, options);
  const Device device = in.q.device();
  expect_result(op, "out", out, Shape{s.B, s.T, s.H, s.D}, "[B, T, H, D]", in.q.dtype(), device);
  expect_result(op, "log_sum_exp", log_sum_exp, Shape{s.B, s.H, s.T}, "[B, H, T]", DType::f32,
                device);
  return s;
}

// Bounds of documents [B, 2, T]; undefined without documents.
Tensor bounds_of([[maybe_unused]] std::string_view op, const AttentionInputs& in, const Sizes& s) {
  if (!in.documents.defined()) {
    return {};
  }
  const Device device = in.q.device();
  const Tensor bounds =
      Tensor::empty(Shape{s.B, 2, s.T}, DType::i64, device, MemoryKind::workspace);
  const auto* const documents = in.documents.data<std::int64_t>();
  auto* const to = bounds.data<std::int64_t>();
  if (device.kind == DeviceKind::cuda) {
    REPRISE_CUDA_SIDE(op, cuda::document_bounds(documents, s.B, s.T, to, cuda_stream(device)));
  } else {
    cpu::document_bounds(documents, s.B, s.T, to);
  }
  return bounds;
}

void expect_fits_cuda(std::string_view op, const Sizes& s) {
  if (s.D > cuda::kMaxAttentionHead) {
    fail(op, "heads must have at most {} elements on a CUDA device, got D = {}",
         cuda::kMaxAttentionHead, s.D);
  }
  if (std::max(s.T, s.S) > cuda::kMaxAttentionTokens) {
    fail(op, "T and S must be at most {} on a CUDA device, got {} and {}",
         cuda::kMaxAttentionTokens, s.T, s.S);
  }
}

AttentionHeads heads(const Tensor& tensor) {
  if (!tensor.defined()) {
    return {};
  }
  const auto element = static_cast<std::int64_t>(size_bytes(tensor.dtype()));
  const auto& strides = tensor.strides();
  AttentionHeads to{.at = tensor.is_meta() ? nullptr : static_cast<char*>(tensor.raw()),
                    .batch = strides[0] * element,
                    .token = strides[1] * element,
                    .head = strides[2] * element,
                    .given = true};
  to.aligned = tensor.offset() * element % 16 == 0;
  for (int dim = 0; dim < 3; ++dim) {
    const std::int64_t bytes = strides[static_cast<std::size_t>(dim)] * element;
    to.aligned = to.aligned && (tensor.size(dim) == 1 || (bytes > 0 && bytes % 16 == 0));
  }
  return to;
}

cpu::AttentionPlan plan_of(const AttentionInputs& in, const Sizes& s,
                           const AttentionOptions& options, bool backward) {
  const bool whole = !options.causal && !in.documents.defined();
  return {s.T, s.S, s.D, in.q.dtype(), options, whole, backward};
}

Tensor workspace_of(const cpu::AttentionPlan& plan, std::int64_t slots, Device device) {
  return Tensor::empty(Shape{slots * plan.slot_bytes() / 4}, DType::f32, device,
                       MemoryKind::workspace);
}

Tensor workspace_of(const std::optional<FusedCall>& fused, Device device) {
  return Tensor::empty(Shape{fused ? fused->bytes / 4 : 0}, DType::f32, device,
                       MemoryKind::workspace);
}

AttentionCall call_of(const AttentionInputs& in, const Sizes& s, const Tensor& bounds,
                      const Tensor& log_sum_exp, const AttentionOptions& options) {
  AttentionCall call{
      s.B, s.T, s.H, s.S, s.K, s.D, in.q.dtype(), options, Visibility(s.T, s.S, options)};
  if (bounds.defined()) {
    call.visibility.set_documents(bounds.data<std::int64_t>());
  }
  call.q = heads(in.q);
  call.k = heads(in.k);
  call.v = heads(in.v);
  call.log_sum_exp = log_sum_exp.is_meta() ? nullptr : log_sum_exp.data<float>();
  call.mask = in.mask.defined() ? in.mask.data<std::int64_t>() : nullptr;
  call.documents = in.documents.defined() ? in.documents.data<std::int64_t>() : nullptr;
  call.device = in.q.device().index;
  return call;
}

void set_gradients(AttentionCall& call, const Tensor& dout, const AttentionGradients& gradients) {
  call.dout = heads(dout);
  call.dq = heads(gradients.dq);
  call.dk = heads(gradients.dk);
  call.dv = heads(gradients.dv);
  call.accumulate_q = gradients.accumulate_q;
  call.accumulate_k = gradients.accumulate_k;
  call.accumulate_v = gradients.accumulate_v;
}

void clear(const Tensor& gradient, bool accumulate) {
  if (gradient.defined() && !accumulate) {
    gradient.zero();
  }
}

// On a CUDA device, or on meta that stands for one.
void attention_on_cuda(std::string_view op, const AttentionInputs& in, const Sizes& s,
                       const Tensor& out, const Tensor& log_sum_exp,
                       const AttentionOptions& options) {
  expect_fits_cuda(op, s);
  const Tensor bounds = bounds_of(op, in, s);
  AttentionCall call = call_of(in, s, bounds, log_sum_exp, options);
  call.out = heads(out);
  const std::optional<FusedCall> fused = fused_call(call, false);
  const Tensor workspace = workspace_of(fused, out.device());
  if (out.is_meta()) {
    return;
  }
  REPRISE_CUDA_SIDE(op, cuda::attention(call, fused, workspace.raw(), cuda_stream(out.device())));
}

void backward_on_cuda(std::string_view op, const AttentionInputs& in, const Sizes& s,
                      const Tensor& out, const Tensor& log_sum_exp, const Tensor& dout,
                      const AttentionGradients& gradients, const AttentionOptions& options) {
  expect_fits_cuda(op, s);
  const Tensor bounds = bounds_of(op, in, s);
  const Tensor deltas =
      Tensor::empty(log_sum_exp.shape(), DType::f32, out.device(), MemoryKind::workspace);
  AttentionCall call = call_of(in, s, bounds, log_sum_exp, options);
  call.out = heads(out);
  set_gradients(call, dout, gradients);
  const std::optional<FusedCall> fused = fused_call(call, true);
  const Tensor workspace = workspace_of(fused, out.device());
  if (out.is_meta()) {
    return;
  }
  REPRISE_CUDA_SIDE(op, cuda::attention_backward(call, deltas.data<float>(), fused, workspace.raw(),
                                                 cuda_stream(out.device())));
}

}  // namespace

void attention(const AttentionInputs& in, const Tensor& out, const Tensor& log_sum_exp,
               const AttentionOptions& options) {
  constexpr std::string_view op = "attention";
  const Sizes s = checked(op, in, out, log_sum_exp, options);
  if (out.numel() == 0) {
    return;
  }
  if (s.S == 0) {
    out.zero();
    if (!log_sum_exp.is_meta()) {
      log_sum_exp.copy_from(Tensor::full(log_sum_exp.shape(), DType::f32,
                                         -std::numeric_limits<double>::infinity(), out.device()));
    }
    return;
  }
  check_on_device(op, in, s, options);
  if (side_of(out.device()) == DeviceKind::cuda) {
    return attention_on_cuda(op, in, s, out, log_sum_exp, options);
  }
  const auto plan = plan_of(in, s, options, false);
  const std::int64_t slots =
      std::min<std::int64_t>(threads(), cpu::AttentionPlan::tasks(s.B, s.T, s.H));
  const Tensor bounds = bounds_of(op, in, s);
  const Tensor workspace = workspace_of(plan, slots, out.device());
  if (out.is_meta()) {
    return;
  }
  AttentionCall call = call_of(in, s, bounds, log_sum_exp, options);
  call.out = heads(out);
  plan.forward(call, workspace.raw(), slots);
}

void attention_backward(const AttentionInputs& in, const Tensor& out, const Tensor& log_sum_exp,
                        const Tensor& dout, const AttentionGradients& gradients,
                        const AttentionOptions& options) {
  constexpr std::string_view op = "attention_backward";
  const Sizes s = checked(op, in, out, log_sum_exp, options);
  const DType dtype = in.q.dtype();
  const Device device = in.q.device();
  expect_heads(op, "dout", dout, in.q);
  expect_shape(op, "dout", dout, Shape{s.B, s.T, s.H, s.D}, "[B, T, H, D]");
  const auto& g = gradients;
  if (g.dq.defined()) {
    expect_result(op, "dq", g.dq, in.q.shape(), "[B, T, H, D]", dtype, device);
  }
  if (g.dk.defined()) {
    expect_result(op, "dk", g.dk, in.k.shape(), "[B, S, K, D]", dtype, device);
  }
  if (g.dv.defined()) {
    expect_result(op, "dv", g.dv, in.v.shape(), "[B, S, K, D]", dtype, device);
  }
  if (out.numel() == 0 || s.S == 0) {
    clear(g.dq, g.accumulate_q);
    clear(g.dk, g.accumulate_k);
    clear(g.dv, g.accumulate_v);
    return;
  }
  if (side_of(device) == DeviceKind::cuda) {
    return backward_on_cuda(op, in, s, out, log_sum_exp, dout, g, options);
  }
  const auto plan = plan_of(in, s, options, true);
  const std::int64_t slots = std::min<std::int64_t>(threads(), s.B * s.K);
  const Tensor bounds = bounds_of(op, in, s);
  const Tensor workspace = workspace_of(plan, slots, device);
  if (out.is_meta()) {
    return;
  }
  AttentionCall call = call_of(in, s, bounds, log_sum_exp, options);
  call.out = heads(out);
  set_gradients(call, dout, g);
  plan.backward(call, workspace.raw(), slots);
}

std::int64_t visible_pairs(const AttentionInputs& in, const AttentionOptions& options) {
  const Sizes s = expect_qkv("attention", in);
  expect_visibility("attention", in, s, options);
  if (s.B == 0 || s.T == 0) {
    return 0;  // S may be anything
  }
  const bool readable = in.q.device().kind != DeviceKind::cuda;
  const std::int64_t* const mask =
      readable && in.mask.defined() ? in.mask.data<std::int64_t>() : nullptr;
  Visibility visibility(s.T, s.S, options);
  std::vector<std::int64_t> bounds;
  if (readable && in.documents.defined()) {
    bounds.resize(static_cast<std::size_t>(2 * s.B * s.T));
    cpu::document_bounds(in.documents.data<std::int64_t>(), s.B, s.T, bounds.data());
    visibility.set_documents(bounds.data());
  }
  std::vector<std::int64_t> tokens(static_cast<std::size_t>(s.S + 1));  // before each key
  std::int64_t pairs = 0;
  for (std::int64_t b = 0; b < s.B; ++b) {
    for (std::int64_t j = 0; j < s.S; ++j) {
      const bool token = mask == nullptr || mask[b * s.S + j] != 0;
      tokens[static_cast<std::size_t>(j + 1)] = tokens[static_cast<std::size_t>(j)] + token;
    }
    for (std::int64_t i = 0; i < s.T; ++i) {
      const Range range = visibility.keys(b, i);
      pairs += tokens[static_cast<std::size_t>(range.end)] -
               tokens[static_cast<std::size_t>(range.begin)];
    }
  }
  return pairs;
}

}  // namespace reprise::kernels
