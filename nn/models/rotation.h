// The rotary positions of one forward, as all decoders that have them rotate q and k.
//
//   const Rotation rotation = rotation_of(config.rope, positions_of(batch), table.device());
//   q = rotation(std::move(q));   // [B, T, H, D]
#pragma once

#include <utility>

#include "autograd/rope.h"
#include "nn/rope_config.h"

namespace reprise::nn {

// Made once, read by every block.
struct Rotation {
  Variable positions;    // i64 [T], or [B, T] when rows differ; with R sections [R, B, T]
  Variable frequencies;  // f32 [D_rot / 2]
  RopeOptions options;

  Variable operator()(Variable x) const {
    return rope(std::move(x), positions, frequencies, options);
  }
};

// `options` but for the attention factor, which the config has. Positions [T] count from 0. Throws
// Error for positions below 0 or from kMostPositions on. A cuda device checks them itself
// (core/device_faults.h); the host waits for them only where frequencies depend on the length
// (RopeScaling::dynamic) and rows differ.
Rotation rotation_of(const RopeConfig& config, const Tensor& positions, Device device,
                     RopeOptions options = {});

}  // namespace reprise::nn
