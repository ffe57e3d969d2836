// Ready models with their adapters, and what tests of adapters compare.
#pragma once

#include <cmath>
#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "autograd/tape.h"
#include "nn/models/model.h"
#include "nn/weights/folder.h"
#include "nn/weights/safetensors.h"
#include "tests/nn/files.h"

namespace reprise::testing {

// Of tests/golden.
inline std::unique_ptr<nn::Model> load(const std::string& name, DType dtype = DType::f32) {
  auto model = nn::load_model(golden(name).string(), {.place = {cpu, dtype}});
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

inline nn::Batch batch_of(const std::string& name) {
  const auto file = nn::SafetensorsFile::open((golden(name) / "parity.safetensors").string());
  nn::Batch batch;
  batch.ids = file->read("in.input_ids")->clone();
  batch.labels = file->read("in.labels")->clone();
  return batch;
}

inline std::vector<float> logits(nn::Model& model, const nn::Batch& batch) {
  const Tensor value = model.outputs(batch)[0].value.tensor();
  if (value.dtype() == DType::f32) {
    return value.to_vector<float>();
  }
  std::vector<float> result;
  for (const bfloat16 x : value.to_vector<bfloat16>()) {
    result.push_back(to_float(x));
  }
  return result;
}

// |a - b| / |b|
inline double relative(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / norm);
}

inline void backward_of(nn::Model& model, const nn::Batch& batch,
                        const char* policy = "inputs-only") {
  Tape tape;
  const Tape::Scope scope(tape, Policies::named(policy));
  backward(model.loss(batch));
}

inline std::map<std::string, std::vector<std::byte>> bytes_of(nn::Model& model) {
  std::map<std::string, std::vector<std::byte>> result;
  for (const nn::NamedParameter& entry : model.named_parameters()) {
    const Tensor value = entry.parameter->value();
    const auto* const at = static_cast<const std::byte*>(value.raw());
    result.emplace(entry.path, std::vector<std::byte>(at, at + value.bytes()));
  }
  return result;
}

}  // namespace reprise::testing
