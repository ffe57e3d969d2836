// How slices are cut, and folders that are read and written in shards.
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "distributed/local_world.h"
#include "distributed/predicted_world.h"
#include "distributed/sharded_folder.h"
#include "kernels/reduce_blocks.h"
#include "nn/weights/folder.h"
#include "tests/distributed/sharded_training.h"

namespace reprise::testing {
namespace {

namespace fs = std::filesystem;
using distributed::Communicator;
using distributed::run_ranks;
using distributed::Sharding;
using distributed::ShardUnit;

TEST(ShardUnits, SlotsAreCutBetweenBlocksOnlyAndCoverTheirElements) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 2000; ++round) {
    const int ranks = 1 + static_cast<int>(random() % 9);
    const DType dtype = random() % 2 == 0 ? DType::f32 : DType::bf16;
    ShardUnit unit;
    std::int64_t total = 0;
    for (std::size_t s = 0; s < 1 + random() % 12; ++s) {
      const std::int64_t limit = std::int64_t{1} << (random() % 17);
      unit.slots.push_back({s, 0, 1 + static_cast<std::int64_t>(random()) % limit});
      unit.slots.back().numel = std::max<std::int64_t>(1, std::abs(unit.slots.back().numel));
      total += unit.slots.back().numel;
    }
    unit.slice = distributed::place_slots(unit.slots, ranks, dtype);
    std::int64_t end = 0, most = 0;
    for (const ShardUnit::Slot& slot : unit.slots) {
      ASSERT_GE(slot.offset, end);
      ASSERT_EQ(slot.offset * static_cast<std::int64_t>(size_bytes(dtype)) % 64, 0);
      end = slot.offset + slot.numel;
      most = std::max(most, slot.numel);
      std::int64_t covered = 0;
      for (int r = 0; r < ranks; ++r) {
        const auto [first, last] = unit.part_of(slot, r);
        if (first < last) {
          ASSERT_EQ(first, covered);
          ASSERT_EQ(first % kernels::kBlockElements, 0);
          covered = last;
        }
      }
      ASSERT_EQ(covered, slot.numel);
    }
    ASSERT_LE(end, ranks * unit.slice);
    // Padding: at most a block at each cut, and 64 bytes a slot.
    const auto slots = static_cast<std::int64_t>(unit.slots.size());
    ASSERT_LE(unit.slice, total / ranks + kernels::kBlockElements * 3 + 64 * slots) << round;
  }
}

std::map<std::string, std::string> files_in(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder)) {
    std::ifstream file(entry.path(), std::ios::binary);
    files[entry.path().filename().string()] = {std::istreambuf_iterator<char>(file), {}};
  }
  return files;
}

fs::path fresh_folder(const std::string& name) {
  const fs::path folder = fs::path(::testing::TempDir()) / ("sharded_" + name);
  fs::remove_all(folder);
  return folder;
}

const std::string kGlm4 = std::string(REPRISE_SOURCE_DIR) + "/tests/golden/glm4";

// Read and written in shards, a folder has the bytes of one that a whole model wrote, and all ranks
// together never held the model more than once, but for one parameter each.
TEST(ShardedFolder, RoundTripsWithoutAWholeModelAnywhere) {
  const fs::path whole = fresh_folder("whole");
  auto model = nn::load_model(kGlm4);
  ASSERT_TRUE(model.ok()) << model.status();
  ASSERT_TRUE(nn::save_model(**model, whole.string(), {.max_shard_bytes = 20000}).ok());
  std::int64_t model_bytes = 0, largest = 0;
  for (const Parameter* p : (*model)->parameters()) {
    model_bytes += p->value().bytes();
    largest = std::max(largest, p->value().bytes());
  }
  for (int stage = 1; stage <= 3; ++stage) {
    const fs::path out = fresh_folder("parts");
    const std::int64_t before = allocator(cpu).report().live_bytes;
    allocator(cpu).reset_peak();
    constexpr int kRanks = 4;
    run_ranks(kRanks, [&](Communicator& ranks) {
      const ShardedRun run{.stage = stage, .folder = kGlm4};
      const auto cut = sharded_model(run, cpu);
      Sharding sharding(ranks, cut->parameters(), reads_of(run), {.stage = stage});
      const absl::Status loaded = distributed::load_sharded(kGlm4, *cut, sharding, ranks);
      EXPECT_TRUE(loaded.ok()) << loaded;
      const absl::Status saved =
          distributed::save_sharded(*cut, out.string(), sharding, ranks, 20000);
      EXPECT_TRUE(saved.ok()) << saved;
    });
    EXPECT_TRUE(files_in(whole) == files_in(out)) << stage;
    if (stage == 3) {
      const std::int64_t peak = allocator(cpu).report().peak_bytes - before;
      EXPECT_LT(peak, 3 * model_bytes / 2 + 2 * kRanks * largest);
      EXPECT_LT(peak, 2 * model_bytes + largest);  // whole models would be four
    }
  }
}

TEST(ShardedFolder, ErrorsReachAllRanks) {
  run_ranks(2, [](Communicator& ranks) {
    const ShardedRun run{.stage = 3, .folder = kGlm4};
    const auto cut = sharded_model(run, cpu);
    Sharding sharding(ranks, cut->parameters(), reads_of(run), {.stage = 3});
    const absl::Status loaded =
        distributed::load_sharded(ranks.rank() == 1 ? "/nowhere" : kGlm4, *cut, sharding, ranks);
    EXPECT_FALSE(loaded.ok());
    EXPECT_EQ(loaded.code() == absl::StatusCode::kAborted, ranks.rank() == 0) << loaded;
    const absl::Status saved =
        distributed::save_sharded(*cut, "/proc/none/folder", sharding, ranks);
    EXPECT_FALSE(saved.ok());
    EXPECT_EQ(saved.code() == absl::StatusCode::kAborted, ranks.rank() == 1) << saved;
  });
}

TEST(ShardedFolder, PartsOfTensors) {
  const auto file = nn::SafetensorsFile::open(kGlm4 + "/model.safetensors");
  ASSERT_TRUE(file.ok());
  const std::string name = "model.embed_tokens.weight";
  const std::vector<float> all = file->read(name)->to_vector<float>();
  const Tensor part = Tensor::empty({100}, DType::f32);
  ASSERT_TRUE(file->read_elements_into(name, 37, part).ok());
  EXPECT_EQ(part.to_vector<float>(), std::vector<float>(all.begin() + 37, all.begin() + 137));
  const auto last = static_cast<std::int64_t>(all.size()) - 99;
  EXPECT_EQ(file->read_elements_into(name, last, part).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(file->read_elements_into(name, -1, part).code(), absl::StatusCode::kInvalidArgument);
  const nn::TensorLayout layout{"x", {2}, DType::f32};
  const absl::Status wrong = nn::stream_safetensors(
      (fs::path(::testing::TempDir()) / "x.safetensors").string(), {&layout, 1},
      [](std::size_t) { return Tensor::zeros({3}, DType::f32); });
  EXPECT_NE(wrong.message().find("must be f32 [2], got f32 [3]"), std::string::npos) << wrong;
  EXPECT_THROW((void)distributed::predicted_world(2, 2), Error);
}

}  // namespace
}  // namespace reprise::testing
