#include "tests/distributed/sharded_training.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "distributed/local_world.h"
#include "distributed/reducer.h"
#include "distributed/sharded_folder.h"
#include "kernels/accumulate.h"
#include "nn/lora.h"
#include "nn/optimizer/adamw.h"
#include "nn/optimizer/clip.h"
#include "nn/weights/folder.h"
#include "nn/weights/json.h"

namespace reprise::testing {
namespace {

using distributed::Communicator;
using distributed::Reducer;
using distributed::Sharding;

std::vector<float> numbers_of(const Tensor& value) {
  const Tensor f32 = Tensor::empty(value.shape(), DType::f32);
  kernels::cast(value, f32);
  return f32.to_vector<float>();
}

// Sums over ranks of gradients as one optimizer sees them: whole or sharded.
class Trained {
 public:
  Trained(Communicator& ranks, const ShardedRun& run, nn::Model& model)
      : model_(model), trainable_(model.trainable_parameters()) {
    if (run.stage == 0) {
      reducer_ = std::make_unique<Reducer>(ranks, trainable_, run.reduction);
    } else {
      sharding_ = std::make_unique<Sharding>(
          ranks, model.parameters(), reads_of(run),
          distributed::ShardingOptions{run.stage, run.reduction, run.gather_again});
    }
    if (run.stage != 0 && !run.folder.empty()) {
      const absl::Status loaded = distributed::load_sharded(run.folder, model, *sharding_, ranks);
      EXPECT_TRUE(loaded.ok()) << loaded;
    }
    optimizer_ = std::make_unique<nn::AdamW>(
        run.stage == 0 ? trainable_ : sharding_->shards(),
        nn::AdamWOptions{.weight_decay = 0.01, .master_weights = run.master_weights});
    early_ = run.early;
    if (early_) {
      const auto update = [this](std::span<Parameter* const> some) {
        optimizer_->step_some(some, 1e-2);
      };
      reducer_ != nullptr ? reducer_->update_early(update) : sharding_->update_early(update);
    }
  }

  void zero() {
    if (sharding_ != nullptr) {
      sharding_->zero_gradients();
    } else {
      optimizer_->zero_gradients();
    }
  }
  void sweep(const Variable& loss, bool last) {
    if (sharding_ != nullptr) {
      last ? sharding_->backward(loss) : sharding_->accumulate(loss);
    } else {
      last ? reducer_->backward(loss) : reducer_->accumulate(loss);
    }
  }
  void add_tokens(std::int64_t n) {
    sharding_ != nullptr ? sharding_->add_tokens(n) : reducer_->add_tokens(n);
  }
  bool join() { return sharding_ != nullptr ? sharding_->join() : reducer_->join(); }
  double step() {
    if (early_) {
      if (sharding_ != nullptr) {
        sharding_->updated();
      }
      return 0;
    }
    const double norm =
        sharding_ != nullptr ? sharding_->global_norm() : nn::global_norm(trainable_);
    optimizer_->step(1e-2, nn::clip_coefficient(norm, 0.5));
    if (sharding_ != nullptr) {
      sharding_->updated();
    }
    return norm;
  }
  std::map<std::string, std::vector<float>> values() {
    std::map<std::string, std::vector<float>> result;
    for (const nn::NamedParameter& entry : model_.named_parameters()) {
      result[entry.path] = numbers_of(sharding_ != nullptr ? sharding_->gathered(*entry.parameter)
                                                           : entry.parameter->value());
    }
    return result;
  }
  Sharding* sharding() { return sharding_.get(); }

 private:
  nn::Model& model_;
  std::vector<Parameter*> trainable_;
  std::unique_ptr<Reducer> reducer_;
  std::unique_ptr<Sharding> sharding_;
  std::unique_ptr<nn::AdamW> optimizer_;
  bool early_ = false;
};

}  // namespace

std::string tied_llama() {
  return R"({"model_type": "llama", "hidden_size": 32, "intermediate_size": 72,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": true})";
}

std::string glm4() {
  return R"({"model_type": "glm4", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 61, "max_position_embeddings": 32, "attention_bias": true,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-4, "pad_token_id": 5,
    "tie_word_embeddings": false})";
}

std::unique_ptr<nn::Model> sharded_model(const ShardedRun& run, Device device) {
  absl::StatusOr<std::unique_ptr<nn::Model>> model;
  if (run.folder.empty()) {
    nn::JsonReader json = *nn::JsonReader::parse(run.config, "config.json");
    model = nn::build_model(json, {device, run.dtype});
  } else {
    model = nn::load_model(run.folder, {.place = {device, run.dtype}, .values = run.stage == 0});
  }
  EXPECT_TRUE(model.ok()) << model.status();
  Generator generator{5, 0};
  if (device == cpu && run.folder.empty()) {
    (*model)->initialize(generator);
  }
  if (run.lora_rank > 0) {
    nn::add_lora(**model, {.rank = run.lora_rank, .alpha = 8, .all_linear = true}, generator);
  }
  (*model)->name_parameters();
  for (Parameter* p : (*model)->trainable_parameters()) {
    if (run.grad_dtype == DType::f32) {
      p->set_grad_dtype(DType::f32);
    }
  }
  return *std::move(model);
}

nn::Batch sharded_batch(int rank, int step, int micro_batch, Device device) {
  std::vector<std::int64_t> ids;
  for (int i = 0; i < 12; ++i) {
    ids.push_back((7 * i * i + 13 * rank + 5 * step + 3 * micro_batch + i) % 61);
  }
  nn::Batch batch;
  batch.ids = batch.labels = Tensor::from(ids, {2, 6}, device);
  return batch;
}

Variable loss_of(const ShardedRun& run, nn::Model& model, const nn::Batch& batch) {
  return run.loss ? run.loss(model, batch) : model.loss(batch);
}

distributed::ForwardReads reads_of(const ShardedRun& run) {
  const auto model = sharded_model(run, meta);
  return distributed::record_reads(
      model->parameters(), [&] { (void)loss_of(run, *model, sharded_batch(0, 0, 0, meta)); });
}

ShardedResult train(Communicator& ranks, const ShardedRun& run) {
  const auto model = sharded_model(run, cpu);
  Trained trained(ranks, run, *model);
  ShardedResult result;
  const auto rank = static_cast<std::size_t>(ranks.rank());
  const int micro_batches =
      run.reduction.shards > 0 ? run.reduction.shards / ranks.size() : run.micro_batches;
  for (int step = 0; step < run.steps; ++step) {
    trained.zero();
    double sum = 0;
    const bool has_data = run.data_of.empty() || step < run.data_of[rank];
    for (int m = 0; has_data && m < micro_batches; ++m) {
      Tape tape;
      const Tape::Scope scope(tape, Policies::named(run.policy));
      const int source = run.reduction.shards > 0 ? ranks.rank() * micro_batches + m : ranks.rank();
      const Variable loss =
          loss_of(run, *model, sharded_batch(source, step, run.reduction.shards > 0 ? 0 : m));
      sum += static_cast<double>(loss.tensor().item<float>());
      if (run.reduction.mean == distributed::Mean::tokens) {
        trained.add_tokens(2 + source + m);
      }
      trained.sweep(loss, m + 1 == micro_batches);
    }
    if (!has_data && !trained.join()) {
      break;
    }
    result.losses.push_back(sum);
    result.norms.push_back(trained.step());
    if (run.look && trained.sharding() != nullptr) {
      run.look(*trained.sharding());
    }
  }
  result.values = trained.values();
  if (!run.save_to.empty() && trained.sharding() != nullptr) {
    const absl::Status saved =
        distributed::save_sharded(*model, run.save_to, *trained.sharding(), ranks, 20000);
    EXPECT_TRUE(saved.ok()) << saved;
  } else if (!run.save_to.empty() && ranks.rank() == 0) {
    const absl::Status saved = nn::save_model(*model, run.save_to, {.max_shard_bytes = 20000});
    EXPECT_TRUE(saved.ok()) << saved;
  }
  return result;
}

std::vector<ShardedResult> train_on(int size, const ShardedRun& run) {
  std::vector<ShardedResult> results(static_cast<std::size_t>(size));
  distributed::run_ranks(size, [&](distributed::Communicator& ranks) {
    results[static_cast<std::size_t>(ranks.rank())] = train(ranks, run);
  });
  return results;
}

std::vector<ShardedResult> expect_every_stage_equal(int size, ShardedRun run) {
  run.stage = 0;
  const std::vector<ShardedResult> plain = train_on(size, run);
  EXPECT_NE(plain[0].losses.front(), plain[0].losses.back());
  for (int stage = 1; stage <= 3; ++stage) {
    run.stage = stage;
    const std::vector<ShardedResult> sharded = train_on(size, run);
    for (std::size_t r = 0; r < sharded.size(); ++r) {
      EXPECT_EQ(sharded[r].losses, plain[r].losses) << "stage " << stage << ", rank " << r;
      EXPECT_EQ(sharded[r].norms, plain[r].norms) << "stage " << stage << ", rank " << r;
      EXPECT_TRUE(sharded[r] == plain[r]) << "stage " << stage << ", rank " << r;
    }
  }
  return plain;
}

}  // namespace reprise::testing
