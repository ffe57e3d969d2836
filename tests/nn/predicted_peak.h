// What a dry run says of a step, beside the step.
#pragma once

#include "autograd/dry_run.h"
#include "nn/models/model.h"

namespace reprise::testing {

// Under every named policy, a dry run of `shapes`, the model on meta, tells the peak bytes, the
// records and the FLOPs of replay that a step of `real`, the same model on the cpu, then takes.
void expect_predicted_peak(nn::Model& real, nn::Model& shapes, const nn::Batch& batch);

}  // namespace reprise::testing
