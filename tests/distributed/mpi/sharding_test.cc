// Sharding between processes: the story of a stack that broke there, and a rank's own bytes, which
// ranks that are threads cannot tell apart.
#include "distributed/sharding.h"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <string>

#include <gtest/gtest.h>

#include "autograd/elementwise.h"
#include "autograd/tape.h"
#include "distributed/predicted_world.h"
#include "nn/weights/json.h"
#include "tests/distributed/mpi/world.h"
#include "tests/distributed/sharded_training.h"
#include "train/memory.h"
#include "train/trainer.h"

namespace reprise::testing {
namespace {

namespace fs = std::filesystem;
using distributed::Communicator;
using distributed::Reduce;
using distributed::Sharding;

std::string folder_of(const char* name) {
  const fs::path folder =
      fs::path(::testing::TempDir()) / fmt::format("{}_of_{}", name, world().size());
  if (world().rank() == 0) {
    fs::remove_all(folder);
  }
  world().barrier({"folder"}).wait();
  return folder.string();
}

std::map<std::string, std::string> files_in(const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder)) {
    std::ifstream file(entry.path(), std::ios::binary);
    files[entry.path().filename().string()] = {std::istreambuf_iterator<char>(file), {}};
  }
  return files;
}

// LLaMA-Factory on GLM-4-0414: a full fine-tune, values sharded, segments over wrapped forwards. It
// loads from a folder and saves one, and has every bit of the run that shards nothing.
TEST(MpiSharding, LlamaFactoryStory) {
  ShardedRun run{.steps = 5};
  run.folder = std::string(REPRISE_SOURCE_DIR) + "/tests/golden/glm4";
  int calls = 0;
  run.loss = [&](nn::Model& model, const nn::Batch& drawn) {
    const nn::Batch batch = sharded_batch(world().rank(), 0, 0, drawn.ids.device());
    const auto wrapped = [&](const nn::Batch& in) {
      ++calls;
      return model.loss(in);
    };
    return checkpoint("wrapped", wrapped, batch);
  };
  const std::string plain_folder = folder_of("plain"), sharded_folder = folder_of("sharded");
  run.save_to = plain_folder;
  const ShardedResult plain = train(world(), run);
  EXPECT_EQ(calls, run.steps);
  run.stage = 3;
  run.save_to = sharded_folder;
  calls = 0;
  int gathers = 0;
  run.look = [&](Sharding& sharding) {
    std::multiset<std::pair<std::size_t, bool>> seen;
    for (const distributed::GatherEvent& event : sharding.gathers()) {
      seen.emplace(event.unit, event.sweep);
      EXPECT_EQ(seen.count({event.unit, event.sweep}), 1u);
      ++gathers;
    }
    sharding.clear_gathers();
  };
  const ShardedResult sharded = train(world(), run);
  EXPECT_EQ(calls, run.steps + 1);  // and the one that noted the reads: none in backward
  EXPECT_GT(gathers, 0);
  EXPECT_EQ(sharded.losses, plain.losses);
  EXPECT_EQ(sharded.norms, plain.norms);
  EXPECT_TRUE(sharded == plain);
  const auto mean = [](double loss) {
    return all_reduce_value(world(), loss, Reduce::sum, "loss") / world().size();
  };
  EXPECT_LT(mean(plain.losses.back()), mean(plain.losses.front()) - 0.02);
  world().barrier({"folders are there"}).wait();
  const auto expected = files_in(plain_folder), written = files_in(sharded_folder);
  EXPECT_GT(expected.size(), 3u);  // an index and several shards
  EXPECT_TRUE(expected == written);
  world().barrier({"folders were read"}).wait();
}

// Branches of their own, data that runs out, updates as gradients arrive: over processes too.
TEST(MpiSharding, RanksThatDoNotDoTheSame) {
  ShardedRun run{.config = glm4(), .steps = 4, .micro_batches = 2};
  run.early = true;
  for (int r = 0; r < world().size(); ++r) {
    run.data_of.push_back(1 + (r + 1) % 3);
  }
  const ShardedResult plain = train(world(), run);
  for (int stage = 1; stage <= 3; ++stage) {
    run.stage = stage;
    const ShardedResult sharded = train(world(), run);
    EXPECT_EQ(sharded.losses, plain.losses) << stage;
    EXPECT_TRUE(sharded == plain) << stage;
  }
  run = {.config = glm4(), .stage = 0, .steps = 3};
  run.loss = [&](nn::Model& model, const nn::Batch& batch) {
    const Variable loss = model.loss(batch);
    // Some ranks go through the model twice; on meta, where reads are noted, all do.
    return world().rank() % 2 == 0 && batch.ids.device() == cpu
               ? loss
               : add(loss, model.loss(sharded_batch(7, 7, 7, batch.ids.device())));
  };
  const ShardedResult once_or_twice = train(world(), run);
  run.stage = 3;
  EXPECT_TRUE(train(world(), run) == once_or_twice);
}

struct Bytes {
  std::int64_t peak = 0;  // of a step, without what the communicator keeps
  BytesByKind at_peak{};
};

Bytes bytes_of(Communicator& ranks, const ShardedRun& run, Device device) {
  const MemoryReport before = allocator(device).report();
  const auto model = sharded_model(run, device);
  const distributed::ForwardReads reads = reads_of(run);
  Sharding sharding(ranks, model->parameters(), reads, {.stage = run.stage});
  Generator generator;
  train::Trainer trainer(*model, generator, {}, &sharding);
  const nn::Batch batch = sharded_batch(ranks.rank(), 0, 0, device);
  (void)trainer.step(batch, 1e-4);
  const train::MemoryRow row = train::measured_step(trainer, batch, run.policy, device);
  const auto communication = static_cast<std::size_t>(MemoryKind::communication);
  Bytes bytes;
  bytes.at_peak = row.at_peak;
  bytes.peak =
      row.peak_bytes - row.at_peak[communication] - before.live_bytes + before.live[communication];
  return bytes;
}

// Predicted by this one process for each rank of the job, as for jobs of any size.
TEST(MpiSharding, BytesOfARankAreThoseOfItsDryRun) {
  const std::string config = R"({"model_type": "llama", "hidden_size": 96,
    "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 211, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": false})";
  for (int stage = 1; stage <= 3; ++stage) {
    for (const std::int64_t lora_rank : {0, 4}) {
      for (const std::string& policy : Policies::names()) {
        const ShardedRun run{
            .config = config, .stage = stage, .policy = policy, .lora_rank = lora_rank};
        const Bytes measured = bytes_of(world(), run, cpu);
        const auto rank = distributed::predicted_world(world().rank(), world().size());
        const Bytes predicted = bytes_of(*rank, run, meta);
        EXPECT_NEAR(static_cast<double>(predicted.peak) / static_cast<double>(measured.peak), 1,
                    0.01)
            << "stage " << stage << ", " << policy << ", LoRA " << lora_rank << ": "
            << predicted.peak << " for " << measured.peak << ", by kind "
            << fmt::format("{} for {}", fmt::join(predicted.at_peak, " "),
                           fmt::join(measured.at_peak, " "));
      }
    }
  }
}

}  // namespace
}  // namespace reprise::testing
