// What the library's attention is asked for, seen by a stand-in.
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/error.h"
#include "kernels/attention.h"
#include "tests/error_of.h"
#include "tests/op_case.h"
#include "tests/simt/fused_simt.h"

namespace reprise::testing {
namespace {

using kernels::AttentionInputs;
using kernels::AttentionKernels;
using kernels::AttentionOptions;
using kernels::FusedRole;

constexpr Device kDevice{DeviceKind::cuda, 0};

struct Sizes {
  std::int64_t B, T, H, S, K, D;
};

struct Call {
  AttentionInputs in;
  Tensor out, log_sum_exp, dout;
};

Call drawn(const Sizes& s, DType dtype = DType::bf16) {
  const auto draw = [&](std::uint64_t seed, const Shape& shape) {
    return draw_normal(seed, shape, dtype, kDevice);
  };
  Call call;
  call.in = {draw(1, {s.B, s.T, s.H, s.D}),
             draw(2, {s.B, s.S, s.K, s.D}),
             draw(3, {s.B, s.S, s.K, s.D}),
             {},
             {}};
  call.out = Tensor::empty({s.B, s.T, s.H, s.D}, dtype, kDevice);
  call.log_sum_exp = Tensor::empty({s.B, s.H, s.T}, DType::f32, kDevice);
  call.dout = draw(4, {s.B, s.T, s.H, s.D});
  return call;
}

void forward(const Call& call, const AttentionOptions& options = {}) {
  kernels::attention(call.in, call.out, call.log_sum_exp, options);
}

struct Gradients {
  Tensor dq, dk, dv;
};
Gradients backward(const Call& call, const AttentionOptions& options, bool accumulate = false) {
  const auto one = [&](const Tensor& like) {
    return Tensor::full(like.shape(), like.dtype(), 1, kDevice);
  };
  const Gradients g{one(call.in.q), one(call.in.k), one(call.in.v)};
  kernels::attention_backward(call.in, call.out, call.log_sum_exp, call.dout,
                              {g.dq, g.dk, g.dv, accumulate, accumulate, accumulate}, options);
  return g;
}

class FusedAttention : public ::testing::Test {
 protected:
  FusedAttention() { fused_record() = {}; }
  ~FusedAttention() override {
    fused_refusal_of_library().clear();
    fused_library_missing().clear();
    kernels::set_attention_kernels(before_);
  }

 private:
  AttentionKernels before_ = kernels::set_attention_kernels(AttentionKernels::automatic);
};

TEST_F(FusedAttention, OnePlanForEqualCalls_cuda) {
  const Call call = drawn({2, 21, 2, 21, 1, 8});
  const AttentionOptions options{.scale = 0.3, .causal = true};
  for (int i = 0; i < 3; ++i) {
    forward(call, options);
  }
  ASSERT_EQ(fused_record().runs.size(), 3u);
  EXPECT_EQ(fused_record().asked.size(), 1u);
  const FusedRun& run = fused_record().runs.front();
  EXPECT_EQ(run.graph.batch, 2);
  EXPECT_EQ(run.graph.scale, 0.3f);
  EXPECT_TRUE(run.graph.causal && !run.graph.from_last_key && !run.graph.padded);
  EXPECT_EQ(run.pointers.at(static_cast<std::size_t>(fused_id(FusedRole::q))), call.in.q.raw());
  EXPECT_EQ(run.pointers.at(static_cast<std::size_t>(fused_id(FusedRole::stats))),
            call.log_sum_exp.raw());
}

TEST_F(FusedAttention, WhatTheLibraryDoesNotTakeIsTiled_cuda) {
  const auto runs = [&](const Call& call, const AttentionOptions& options) {
    fused_record() = {};
    forward(call, options);
    return fused_record().runs.size();
  };
  const Call call = drawn({1, 6, 1, 6, 1, 8});
  EXPECT_EQ(runs(call, {}), 1u);
  EXPECT_EQ(runs(call, {.dropout = 0.5}), 0u);
  EXPECT_EQ(runs(drawn({1, 6, 1, 6, 1, 8}, DType::f32), {}), 0u);
  EXPECT_EQ(runs(drawn({1, 6, 1, 6, 1, 12}), {}), 0u);
  EXPECT_EQ(runs(drawn({1, 1, 1, 6, 1, 8}), {}), 0u);
  EXPECT_EQ(runs(drawn({1, 6, 1, 5, 1, 8}), {.causal = true}), 0u);
  Call masked = call;
  masked.in.mask = Tensor::full({1, 6}, DType::i64, 1, kDevice);
  EXPECT_EQ(runs(masked, {}), 0u);
  EXPECT_EQ(runs(masked, {.padded_right = true}), 1u);
  EXPECT_EQ(runs(masked, {.causal = true, .window = 2, .padded_right = true}), 0u);
  Call packed = call;
  packed.in.documents = Tensor::full({1, 6}, DType::i64, 1, kDevice);
  EXPECT_EQ(runs(packed, {}), 0u);
  EXPECT_EQ(runs(packed, {.most_documents = 3}), 1u);
  EXPECT_EQ(fused_record().runs.front().graph.batch, 4);  // a power of two
}

TEST_F(FusedAttention, WhatIsNotAlignedIsCopied_cuda) {
  const Call call = drawn({2, 6, 2, 6, 1, 8});
  forward(call);
  const Array expected = to_array(call.out);
  Call odd = call;
  const Tensor wide = Tensor::zeros({2, 6, 2, 11}, DType::bf16, cpu);
  wide.slice(3, 2, 10).copy_from(call.in.q.to(cpu));
  odd.in.q = wide.to(kDevice).slice(3, 2, 10);
  fused_record() = {};
  forward(odd);
  ASSERT_EQ(fused_record().runs.size(), 1u);
  EXPECT_NE(fused_record().runs.front().pointers.at(1), odd.in.q.raw());
  EXPECT_TRUE(fused_record().asked.empty());  // the plan of the dense one
  EXPECT_EQ(to_array(odd.out).at, expected.at);
}

TEST_F(FusedAttention, ARefusalIsKeptAndTiledKernelsGiveTheSame_cuda) {
  const Call call = drawn({1, 22, 2, 22, 2, 8});
  const AttentionOptions options{.scale = 0.4, .causal = true};
  fused_refusal_of_library() = "no engine";
  forward(call, options);
  const Array tiled = to_array(call.out);
  forward(call, options);
  EXPECT_EQ(fused_record().asked.size(), 1u);
  EXPECT_TRUE(fused_record().runs.empty());
  const AttentionKernels before = kernels::set_attention_kernels(AttentionKernels::fused);
  EXPECT_EQ(error_of([&] { forward(call, options); }),
            "[attention] no fused kernel takes this call: no engine");
  kernels::set_attention_kernels(before);
  fused_refusal_of_library().clear();
  const Call other = drawn({2, 22, 2, 22, 2, 8});  // another graph
  forward(other, options);
  ASSERT_EQ(fused_record().runs.size(), 1u);
  const Array fused = to_array(other.out);
  (void)tiled;
  kernels::set_attention_kernels(AttentionKernels::tiled);
  forward(other, options);
  EXPECT_EQ(fused_record().runs.size(), 1u);
  const Array again = to_array(other.out);
  for (std::int64_t i = 0; i < again.shape.numel(); ++i) {
    EXPECT_NEAR(again[i], fused[i], 0.02);
  }
}

TEST_F(FusedAttention, WhoWantsItFusedIsToldWhyNot_cuda) {
  kernels::set_attention_kernels(AttentionKernels::fused);
  const Call f32 = drawn({1, 6, 1, 6, 1, 8}, DType::f32);
  EXPECT_EQ(error_of([&] { forward(f32); }), "[attention] no fused kernel takes f32");
  EXPECT_EQ(error_of([&] { backward(f32, {}); }), "[attention_backward] no fused kernel takes f32");
}

TEST_F(FusedAttention, NoCudnn_cuda) {
  fused_library_missing() = "libcudnn.so.9: cannot open shared object file";
  const Call call = drawn({1, 23, 1, 23, 1, 8});
  EXPECT_EQ(error_of([&] { forward(call); }),
            "[attention] cuDNN cannot be loaded: libcudnn.so.9: cannot open shared object file: "
            "install cuDNN 9 (Debian: cudnn9-cuda-13; PyPI: nvidia-cudnn-cu13) where the loader "
            "finds it, or run with REPRISE_ATTENTION=tiled");
  kernels::set_attention_kernels(AttentionKernels::tiled);
  EXPECT_EQ(error_of([&] { forward(call); }), "no error");
}

TEST_F(FusedAttention, GradientsAreAddedOrReplaced_cuda) {
  const Call call = drawn({2, 7, 4, 9, 2, 8});
  const AttentionOptions options{.scale = 0.3};
  forward(call, options);
  const Gradients replaced = backward(call, options), added = backward(call, options, true);
  ASSERT_EQ(fused_record().runs.size(), 3u);
  for (const auto& [r, a] : {std::pair(replaced.dq, added.dq), std::pair(replaced.dk, added.dk),
                             std::pair(replaced.dv, added.dv)}) {
    const Array x = to_array(r), y = to_array(a);
    for (std::int64_t i = 0; i < x.shape.numel(); ++i) {
      ASSERT_NEAR(y[i], x[i] + 1, 0.01 * (1 + std::abs(x[i])));
    }
  }
}

}  // namespace
}  // namespace reprise::testing
