#include "tests/nn/predicted_peak.h"

#include <gtest/gtest.h>

#include "autograd/tape.h"

namespace reprise::testing {
namespace {

nn::Batch on_meta(const nn::Batch& batch) {
  nn::Batch result = batch;
  for (Tensor nn::Batch::*const each :
       {&nn::Batch::ids, &nn::Batch::labels, &nn::Batch::mask, &nn::Batch::positions,
        &nn::Batch::pixels, &nn::Batch::grids, &nn::Batch::image_tokens}) {
    if ((batch.*each).defined()) {
      result.*each = (batch.*each).to(meta);
    }
  }
  return result;
}

void clear_gradients(nn::Model& model) {
  for (Parameter* parameter : model.parameters()) {
    parameter->zero_gradient();
  }
}

}  // namespace

void expect_predicted_peak(nn::Model& real, nn::Model& shapes, const nn::Batch& batch) {
  const nn::Batch dry = on_meta(batch);
  for (const std::string& name : Policies::names()) {
    const Policies policies = Policies::named(name);
    clear_gradients(real);
    clear_gradients(shapes);
    const std::int64_t meta_bytes = allocator(meta).report().live_bytes;
    const StepReport predicted = dry_run([&] { return shapes.loss(dry); }, policies);
    const std::int64_t cpu_bytes = allocator(cpu).report().live_bytes;
    const StepReport measured = measure_step([&] { return real.loss(batch); }, policies, cpu);
    EXPECT_EQ(predicted.peak_bytes - meta_bytes, measured.peak_bytes - cpu_bytes) << name;
    EXPECT_EQ(predicted.tape.records, measured.tape.records) << name;
    EXPECT_EQ(predicted.tape.dropped_bytes, measured.tape.dropped_bytes) << name;
    EXPECT_EQ(predicted.replay_flops, measured.replay_flops) << name;
    const auto saved = static_cast<std::size_t>(MemoryKind::saved);
    EXPECT_EQ(predicted.peak[saved], measured.peak[saved]) << name;
  }
}

}  // namespace reprise::testing
