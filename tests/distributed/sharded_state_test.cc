// A run that was interrupted goes on as if it had not been, cut in the same way or another; and the
// trainer over shards.
#include "distributed/sharded_state.h"

#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <sys/resource.h>

#include "distributed/local_world.h"
#include "nn/lora.h"
#include "nn/weights/json.h"
#include "nn/weights/safetensors.h"
#include "tests/autograd/tape_fixture.h"
#include "tests/distributed/sharded_training.h"
#include "train/trainer.h"

namespace reprise::testing {
namespace {

namespace fs = std::filesystem;
using distributed::Communicator;
using distributed::run_ranks;
using distributed::Sharding;

std::string tiny_gpt2(double dropout) {
  return fmt::format(R"({{"model_type": "gpt2", "vocab_size": 61, "n_positions": 16, "n_embd": 24,
    "n_layer": 2, "n_head": 3, "embd_pdrop": {0}, "attn_pdrop": {0}, "resid_pdrop": {0}}})",
                     dropout);
}

std::string fresh_folder(const std::string& name) {
  const fs::path folder = fs::path(::testing::TempDir()) / ("sharded_state_" + name);
  fs::remove_all(folder);
  return folder.string();
}

std::string file_in(const std::string& folder) {
  std::ifstream file(fs::path(folder) / "training.safetensors", std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

struct Job {
  int size = 2, stage = 3;
  int shards = 0;  // of the batch
  double dropout = 0.1;
  DType dtype = DType::f32;
  std::int64_t lora_rank = 0;
};

// One rank's model and trainer.
class Rank {
 public:
  Rank(Communicator& ranks, const Job& job) : ranks_(ranks), job_(job) {
    const ShardedRun run{.config = tiny_gpt2(job.dropout),
                         .stage = job.stage,
                         .lora_rank = job.lora_rank,
                         .dtype = job.dtype};
    model = sharded_model(run, cpu);
    distributed::ReducerOptions reduction;
    reduction.shards = job.shards;
    if (job.stage > 0) {
      sharding.emplace(ranks, model->parameters(), reads_of(run),
                       distributed::ShardingOptions{job.stage, reduction});
    } else {
      reducer.emplace(ranks, model->trainable_parameters(), reduction);
    }
    train::TrainerOptions options;
    options.adamw = {.weight_decay = 0.01, .master_weights = job.dtype == DType::bf16};
    options.policies = Policies::named("inputs-only");
    trainer.emplace(*model, generator, options, sharding ? &*sharding : nullptr);
    if (reducer) {
      trainer->hooks.before = [&](BackwardOptions& o) { reducer->attach(o); };
      trainer->hooks.after = [&] { reducer->finish(); };
      trainer->hooks.before_accumulation = [&](BackwardOptions& o) {
        reducer->attach_accumulation(o);
      };
      trainer->hooks.after_accumulation = [&] { reducer->finish_accumulation(); };
    }
  }
  // Up to this step of the run.
  std::vector<double> train_to(std::int64_t step) {
    std::vector<double> losses;
    const int count = job_.shards > 0 ? job_.shards / job_.size : 2;
    while (trainer->steps() < step) {
      std::vector<nn::Batch> micro_batches;
      for (int m = 0; m < count; ++m) {
        micro_batches.push_back(
            sharded_batch(ranks_.rank() * count + m, static_cast<int>(trainer->steps()), 0));
      }
      losses.push_back(trainer->step(micro_batches, 1e-2, 1));
    }
    return losses;
  }

  std::unique_ptr<nn::Model> model;
  Generator generator{11, 0};
  std::optional<Sharding> sharding;
  std::optional<distributed::Reducer> reducer;
  std::optional<train::Trainer> trainer;

 private:
  Communicator& ranks_;
  const Job job_;
};

// Trains from what is in `from`, if anything, to this step, and saves; the losses of rank 0.
std::vector<double> run(const Job& job, const std::string& from, std::int64_t step,
                        const std::string& to) {
  std::vector<double> losses;
  run_ranks(job.size, [&](Communicator& ranks) {
    Rank rank(ranks, job);
    if (!from.empty()) {
      const absl::Status resumed = rank.trainer->resume(from, ranks);
      ASSERT_TRUE(resumed.ok()) << resumed;
    }
    const std::vector<double> own = rank.train_to(step);
    if (ranks.rank() == 0) {
      losses = own;
    }
    const absl::Status saved = rank.trainer->save(to, ranks);
    ASSERT_TRUE(saved.ok()) << saved;
  });
  return losses;
}

TEST(ShardedState, ARunThatGoesOnHasTheBitsOfOneThatWasNotInterrupted) {
  const std::string half = fresh_folder("half"), resumed = fresh_folder("resumed"),
                    whole = fresh_folder("whole");
  for (const DType dtype : {DType::f32, DType::bf16}) {
    std::string of_stage_0;
    for (const int stage : {0, 1, 2, 3}) {
      const Job job{.size = 3, .stage = stage, .dtype = dtype};
      std::vector<double> losses = run(job, "", 2, half);
      const std::vector<double> rest = run(job, half, 4, resumed);
      losses.insert(losses.end(), rest.begin(), rest.end());
      EXPECT_EQ(losses, run(job, "", 4, whole)) << stage;
      const std::string expected = file_in(whole);
      EXPECT_GT(expected.size(), 10000u);
      EXPECT_TRUE(file_in(resumed) == expected) << stage;
      EXPECT_FALSE(file_in(half) == expected);
      of_stage_0 = stage == 0 ? expected : of_stage_0;
      EXPECT_TRUE(expected == of_stage_0) << stage;  // whatever it is cut into
    }
  }
}

// With fixed shards of the batch every number of ranks computes the same.
TEST(ShardedState, OfOneNumberOfRanksGoesOnWithAnother) {
  const std::string begun = fresh_folder("begun"), other = fresh_folder("other"),
                    whole = fresh_folder("four");
  const Job four{.size = 4, .shards = 4, .dropout = 0};
  (void)run(four, "", 2, begun);
  (void)run(four, "", 4, whole);
  for (const Job& job : {Job{.size = 2, .stage = 2, .shards = 4, .dropout = 0},
                         Job{.size = 1, .stage = 0, .shards = 4, .dropout = 0},
                         Job{.size = 2, .stage = 0, .shards = 4, .dropout = 0},
                         Job{.size = 2, .stage = 1, .shards = 4, .dropout = 0},
                         Job{.size = 1, .stage = 3, .shards = 4, .dropout = 0}}) {
    (void)run(job, begun, 4, other);
    EXPECT_TRUE(file_in(other) == file_in(whole)) << job.size << " ranks, stage " << job.stage;
  }
}

TEST(ShardedState, OfAdaptersIsWithoutTheBase) {
  const std::string folder = fresh_folder("lora"), resumed = fresh_folder("lora_resumed"),
                    whole = fresh_folder("lora_whole");
  const Job job{.lora_rank = 2};
  (void)run(job, "", 2, folder);
  (void)run(job, folder, 3, resumed);
  (void)run(job, "", 3, whole);
  EXPECT_TRUE(file_in(resumed) == file_in(whole));
  const auto file = nn::SafetensorsFile::open(folder + "/training.safetensors");
  ASSERT_TRUE(file.ok());
  EXPECT_EQ(file->metadata().at("steps"), "2");
  EXPECT_NE(file->metadata().at("random_offset"), "0");
  std::map<std::string, int> roles;
  for (const nn::StoredTensor& tensor : file->tensors()) {
    EXPECT_NE(tensor.name.find("lora"), std::string::npos) << tensor.name;
    ++roles[tensor.name.substr(tensor.name.rfind('.'))];
  }
  EXPECT_EQ(roles.size(), 4u);
  EXPECT_EQ(roles[".value"], roles[".m"]);
  EXPECT_EQ(roles[".v"], roles[".step"]);
}

// No rank has the whole: what is in memory beyond the shards is one tensor.
TEST(ShardedState, IsWrittenATensorAtATime) {
  const std::string folder = fresh_folder("memory");
  run_ranks(1, [&](Communicator& ranks) {
    Rank rank(ranks, {.size = 1});
    (void)rank.train_to(1);
    std::int64_t largest = 0;
    for (const Parameter* p : rank.sharding->parameters()) {
      largest = std::max(largest, p->shape().numel() * 4);
    }
    const std::int64_t before = allocator(cpu).report().live_bytes;
    allocator(cpu).reset_peak();
    EXPECT_TRUE(rank.trainer->save(folder, ranks).ok());
    EXPECT_LE(allocator(cpu).report().peak_bytes - before, 2 * largest + 4096);
  });
}

// What was there stays as it was until another file is complete.
TEST(ShardedState, ASaveThatFailsLeavesTheOldOne) {
  const std::string folder = fresh_folder("full");
  (void)run({}, "", 1, folder);
  const std::string before = file_in(folder);
  rlimit old{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{before.size() / 2, old.rlim_max};
  std::vector<std::string> problems(2);
  run_ranks(2, [&](Communicator& ranks) {
    Rank rank(ranks, {});
    (void)rank.train_to(2);
    ranks.barrier({"trained"}).wait();
    if (ranks.rank() == 0) {
      ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
    }
    ranks.barrier({"the disk is full"}).wait();
    problems[static_cast<std::size_t>(ranks.rank())] =
        std::string(rank.trainer->save(folder, ranks).message());
    ranks.barrier({"saved"}).wait();
  });
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_NE(problems[0].find("training.safetensors"), std::string::npos) << problems[0];
  EXPECT_EQ(problems[1], "save_state: rank 0 has an error, which it reports");
  EXPECT_TRUE(file_in(folder) == before);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder), {}), 1);
}

std::string problem_of_loading(const std::string& folder, const Job& job) {
  std::string text;
  run_ranks(job.size, [&](Communicator& ranks) {
    Rank rank(ranks, job);
    const absl::Status status = rank.trainer->resume(folder, ranks);
    if (ranks.rank() == 0) {
      text = std::string(status.message());
    }
    EXPECT_EQ(rank.trainer->steps(), 0);
    EXPECT_FALSE(status.ok());
  });
  return text.substr(text.find(": ") + 2);  // without the path
}

TEST(ShardedState, WhatDoesNotFitIsRefused) {
  const std::string folder = fresh_folder("refused"), bad = fresh_folder("bad");
  const Job job{.size = 2};
  EXPECT_NE(problem_of_loading(folder, job).find("No such file"), std::string::npos);
  (void)run(job, "", 1, folder);
  const auto file = nn::SafetensorsFile::open(folder + "/training.safetensors");
  ASSERT_TRUE(file.ok());
  std::vector<nn::NamedTensor> tensors;
  for (const nn::StoredTensor& tensor : file->tensors()) {
    tensors.push_back({tensor.name, *file->read(tensor.name)});
  }
  fs::create_directories(bad);
  const auto with = [&](std::vector<nn::NamedTensor> changed, nn::Metadata metadata) {
    EXPECT_TRUE(nn::write_safetensors(bad + "/training.safetensors", changed, metadata).ok());
    return problem_of_loading(bad, job);
  };
  const nn::Metadata good = file->metadata();
  const auto named = [&](const std::string& name) {
    return std::ranges::find(tensors, name, &nn::NamedTensor::name) - tensors.begin();
  };
  nn::Metadata metadata = good;
  metadata["steps"] = "two";
  EXPECT_EQ(with(tensors, metadata), "steps must be a whole number, got \"two\"");
  metadata.erase("steps");
  EXPECT_EQ(with(tensors, metadata), "steps is not in the metadata");
  auto changed = tensors;
  changed.push_back({"stranger.m", Tensor::zeros({2}, DType::f32)});
  EXPECT_EQ(with(changed, good), "stranger.m belongs to no parameter that is trained");
  changed = tensors;
  changed[static_cast<std::size_t>(named("transformer.h.0.ln_1.weight.m"))].tensor =
      Tensor::zeros({23}, DType::f32);
  EXPECT_EQ(with(changed, good), "transformer.h.0.ln_1.weight.m must be f32 [24], got f32 [23]");
  changed = tensors;
  changed[static_cast<std::size_t>(named("transformer.h.0.ln_1.weight.step"))].tensor =
      Tensor::from(std::vector<std::int64_t>{0}, Shape{});
  EXPECT_EQ(with(changed, good), "transformer.h.0.ln_1.weight.step must be one i64 of 1 or more");
  changed = tensors;
  changed.erase(changed.begin() + named("transformer.h.0.ln_1.weight.v"));
  EXPECT_NE(with(changed, good).find("transformer.h.0.ln_1.weight.v"), std::string::npos);
  const std::string text = error_of([&] {
    run_ranks(2, [&](Communicator& ranks) {
      Rank rank(ranks, job);
      rank.generator.next_offset = static_cast<std::uint64_t>(ranks.rank());
      (void)rank.trainer->save(bad, ranks);
    });
  });
  EXPECT_NE(text.find("random offset"), std::string::npos) << text;
}

// One rank's loss is not finite: it looks for the op, for which the others gather values with it.
TEST(ShardedTrainer, NamesTheFirstOpThatIsNotFiniteAtEveryStage) {
  for (const int stage : {1, 2, 3}) {
    for (const bool everywhere : {false, true}) {
      for (const bool evaluation : {false, true}) {
        const std::string text = error_of([&] {
          run_ranks(2, [&](Communicator& ranks) {
            Rank rank(ranks, {.stage = stage, .dropout = 0});
            (void)rank.train_to(1);
            // A position that only rank 1 comes to is not finite.
            constexpr std::int64_t kPosition = 7, kWidth = 24;
            const Parameter& p = *rank.model->find_parameter("transformer.wpe.weight");
            for (const Sharding::Part& part : rank.sharding->parts_of(p)) {
              for (std::int64_t i = kWidth * kPosition; i < kWidth * (kPosition + 1); ++i) {
                if (i >= part.first && i < part.first + part.values.numel()) {
                  part.values.data<float>()[i - part.first] =
                      std::numeric_limits<float>::quiet_NaN();
                }
              }
            }
            rank.sharding->values_written();
            const std::int64_t tokens = ranks.rank() == 1 || everywhere ? kPosition + 1 : 6;
            nn::Batch batch;
            batch.ids = batch.labels = Tensor::zeros({2, tokens}, DType::i64);
            if (evaluation) {
              (void)rank.trainer->evaluate(batch);
            } else {
              (void)rank.trainer->step(batch, 1e-3);
            }
          });
        });
        EXPECT_NE(text.find("first op with a non-finite output: ["), std::string::npos) << text;
        EXPECT_NE(text.find("the loss is nan"), std::string::npos) << text;
      }
    }
  }
}

}  // namespace
}  // namespace reprise::testing
