// What the operating system says of loading: resident memory and time beside plain reading.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "nn/models/llama.h"
#include "nn/weights/folder.h"
#include "tests/nn/files.h"

namespace reprise::nn {
namespace {

using testing::Folder;

// A line of /proc/self/status, in bytes.
double status_bytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(key + ":")) {
      return std::stod(line.substr(key.size() + 1)) * 1024;
    }
  }
  ADD_FAILURE() << "no " << key;
  return 0;
}

// Most resident bytes during the call, beyond those before.
double growth(const std::function<void()>& call) {
  std::ofstream("/proc/self/clear_refs") << "5";
  const double before = status_bytes("VmRSS");
  EXPECT_LE(status_bytes("VmHWM"), before + (4 << 20)) << "the peak does not start anew";
  call();
  return status_bytes("VmHWM") - before;
}

double seconds(const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// As `cat` reads.
void read_all(const std::string& path) {
  std::vector<char> buffer(128 << 10);
  const int file = open(path.c_str(), O_RDONLY);
  ASSERT_GE(file, 0);
  while (read(file, buffer.data(), buffer.size()) > 0) {
  }
  close(file);
}

// A model of about 300 MB in bf16, written once.
class Load : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new Folder;
    LlamaConfig config{.vocabulary = 16000, .width = 1024, .inner = 4096, .layers = 8, .heads = 16};
    config.kv_heads = 16;
    config.head_size = config.rope.dim = 64;
    Llama model(config, {cpu, DType::bf16});
    for (Parameter* p : model.parameters()) {
      p->write().zero();
    }
    for (const NamedParameter& entry : model.named_parameters()) {
      bytes_ += static_cast<double>(entry.parameter->value().bytes());
    }
    ASSERT_TRUE(save_model(model, folder_->path().string()).ok());
  }
  static void TearDownTestSuite() {
    delete folder_;
    folder_ = nullptr;
  }
  static std::string path() { return folder_->path().string(); }

  static Folder* folder_;
  static double bytes_;
};
Folder* Load::folder_ = nullptr;
double Load::bytes_ = 0;

TEST_F(Load, ResidentMemoryGrowsByTheWeightsOnly) {
  for (const DType dtype : {DType::bf16, DType::f32}) {
    absl::StatusOr<std::unique_ptr<Model>> model = absl::UnknownError("");
    const double weights = bytes_ * (dtype == DType::f32 ? 2 : 1);
    const double grown = growth([&] { model = load_model(path(), {.place = {cpu, dtype}}); });
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_LE(grown, 1.05 * weights) << name(dtype);
    EXPECT_GE(grown, 0.9 * weights) << name(dtype);  // it was measured
  }
  // Mapped, nothing is there before it is used.
  absl::StatusOr<std::unique_ptr<Model>> mapped = absl::UnknownError("");
  EXPECT_LE(growth([&] {
              mapped = load_model(path(), {.place = {cpu, DType::bf16}, .map = true});
            }),
            0.05 * bytes_);
  ASSERT_TRUE(mapped.ok());
  const Parameter& head = *(*mapped)->find_parameter("lm_head.weight");
  EXPECT_GE(growth([&] { EXPECT_EQ(head.value().to_vector<bfloat16>().size(), 16000u * 1024); }),
            16000 * 1024);
}

TEST_F(Load, TakesAboutAsLongAsReadingTheFile) {
  const std::string file = path() + "/model.safetensors";
  read_all(file);
  // The machine may be busy for a while: some pair of neighbours has to be quiet.
  double best = 1e9;
  for (int attempt = 0; attempt < 20 && best > 1.25; ++attempt) {
    const double reading = seconds([&] { read_all(file); });
    const double loading = seconds([&] {
      const auto model = load_model(path(), {.place = {cpu, DType::bf16}, .map = true});
      ASSERT_TRUE(model.ok());
    });
    best = std::min(best, loading / reading);
  }
  EXPECT_LE(best, 1.25);
  double copied = 1e9;
  for (int attempt = 0; attempt < 20 && copied > 1.25; ++attempt) {
    const double reading = seconds([&] { read_all(file); });
    const double loading = seconds([&] {
      const auto model = load_model(path(), {.place = {cpu, DType::bf16}});
      ASSERT_TRUE(model.ok());
    });
    copied = std::min(copied, loading / reading);
  }
  EXPECT_LE(copied, 1.25);
}

}  // namespace
}  // namespace reprise::nn
