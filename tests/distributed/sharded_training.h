// A few steps of training on ranks that are threads, whole or sharded, for comparison bit by bit.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "distributed/sharding.h"
#include "nn/models/model.h"

namespace reprise::testing {

struct ShardedRun {
  std::string config;  // of the model
  int stage = 0;       // 0: not sharded
  std::string policy = "inputs-only";
  int steps = 3;
  int micro_batches = 1;
  std::int64_t lora_rank = 0;
  DType dtype = DType::f32, grad_dtype = DType::f32;
  bool master_weights = false;
  distributed::ReducerOptions reduction = {};  // with shards, they are the micro-batches
  std::size_t gather_again = 0;
  bool early = false;             // updates as gradients arrive, without a clip
  std::vector<int> data_of = {};  // steps for which a rank has data; empty: all have it for all
  // Instead of the model's loss: for other forwards over it.
  std::function<Variable(nn::Model&, const nn::Batch&)> loss = {};
  // Where the model comes from, instead of `config` and random values, and where it goes at the
  // end.
  std::string folder = {}, save_to = {};
  // After each step, on each rank.
  std::function<void(distributed::Sharding&)> look = {};
};

struct ShardedResult {
  std::vector<double> losses, norms;
  std::map<std::string, std::vector<float>> values;  // of all parameters, at the end
  bool operator==(const ShardedResult&) const = default;
};

// Configs of tiny models: tied Llama, GLM-4-0414.
std::string tied_llama();
std::string glm4();

std::unique_ptr<nn::Model> sharded_model(const ShardedRun& run, Device device);
nn::Batch sharded_batch(int rank, int step, int micro_batch, Device device = cpu);
Variable loss_of(const ShardedRun& run, nn::Model& model, const nn::Batch& batch);
distributed::ForwardReads reads_of(const ShardedRun& run);

// What one rank gets; it is to be the same on all in norms and values.
ShardedResult train(distributed::Communicator& ranks, const ShardedRun& run);

// What each of `size` ranks gets, on threads.
std::vector<ShardedResult> train_on(int size, const ShardedRun& run);
// Stages 1 to 3 have the bits of the run that is not sharded, which is returned.
std::vector<ShardedResult> expect_every_stage_equal(int size, ShardedRun run);

}  // namespace reprise::testing
