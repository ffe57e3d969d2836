// What cuBLASLt is asked for, and which of its algorithms are kept.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/cuda_errors.h"
#include "core/error.h"
#include "kernels/matmul_choices.h"
#include "kernels/matmul_sides.h"
#include "tests/cuda/cublaslt_recorded.h"
#include "tests/error_of.h"

namespace reprise::kernels {
namespace {

using testing::error_of;

using testing::recorded_library;
using testing::RecordedProduct;

// A matrix of small whole numbers, which every dtype has.
struct Numbers {
  DType dtype;
  std::vector<float> f32;
  std::vector<bfloat16> bf16;
  Numbers(DType type, std::int64_t count, int seed) : dtype(type) {
    for (std::int64_t i = 0; i < count; ++i) {
      const auto value = static_cast<float>((i * 7 + seed) % 5 - 2);
      f32.push_back(value);
      bf16.push_back(to_bfloat16(value));
    }
  }
  void* at() { return dtype == DType::f32 ? static_cast<void*>(f32.data()) : bf16.data(); }
  double operator[](std::int64_t i) const {
    const auto place = static_cast<std::size_t>(i);
    return static_cast<double>(dtype == DType::f32 ? f32[place] : to_float(bf16[place]));
  }
};

TileShape shape(std::int64_t m, std::int64_t n, std::int64_t k, bool ta = false, bool tb = false,
                DType inputs = DType::f32, DType output = DType::f32) {
  TileShape s;
  s.m = m, s.n = n, s.k = k;
  s.transpose_a = ta, s.transpose_b = tb;
  s.lda = ta ? m : k, s.ldb = tb ? k : n, s.ldc = n;
  s.inputs = inputs, s.output = output;
  return s;
}

// Runs the product, compares it with the formula, and returns what the library saw last.
RecordedProduct multiply(const TileShape& s) {
  Numbers a(s.inputs, s.m * s.k, 1), b(s.inputs, s.k * s.n, 2), c(s.output, s.m * s.n, 3);
  Numbers bias(s.bias.value_or(DType::f32), s.n, 4);
  const Numbers before = c;
  alignas(64) static char workspace[64];
  cuda::matmul(s, a.at(), b.at(), c.at(), s.bias ? bias.at() : nullptr, workspace, nullptr);
  for (std::int64_t i = 0; i < s.m; ++i) {
    for (std::int64_t j = 0; j < s.n; ++j) {
      double want = s.accumulate ? before[i * s.n + j] : s.bias ? bias[j] : 0;
      for (std::int64_t k = 0; k < s.k; ++k) {
        want += a[s.transpose_a ? k * s.m + i : i * s.k + k] *
                b[s.transpose_b ? j * s.k + k : k * s.n + j];
      }
      EXPECT_EQ(c[i * s.n + j], want) << i << ", " << j;
    }
  }
  return recorded_library().products.back();
}

TEST(MatmulLibrary, RowsAreTheLibrarysColumns) {
  for (const bool ta : {false, true}) {
    for (const bool tb : {false, true}) {
      const RecordedProduct p = multiply(shape(3, 5, 4, ta, tb));
      // C^T = op(B)^T op(A)^T: B comes first.
      EXPECT_EQ(p.first_op, tb ? CUBLAS_OP_T : CUBLAS_OP_N);
      EXPECT_EQ(p.second_op, ta ? CUBLAS_OP_T : CUBLAS_OP_N);
      EXPECT_EQ(p.first[0], tb ? 4u : 5u);
      EXPECT_EQ(p.first[1], tb ? 5u : 4u);
      EXPECT_EQ(p.first_stride, tb ? 4 : 5);
      EXPECT_EQ(p.second[0], ta ? 3u : 4u);
      EXPECT_EQ(p.second[1], ta ? 4u : 3u);
      EXPECT_EQ(p.second_stride, ta ? 3 : 4);
      EXPECT_EQ(p.result[0], 5u);
      EXPECT_EQ(p.result[1], 3u);
      EXPECT_EQ(p.result_stride, 5);
      EXPECT_EQ(p.alpha, 1);
      EXPECT_EQ(p.beta, 0);
      EXPECT_TRUE(p.in_place);
    }
  }
}

TEST(MatmulLibrary, ArithmeticIsF32WithoutTf32) {
  for (const DType inputs : {DType::f32, DType::bf16}) {
    for (const DType output : {DType::f32, DType::bf16}) {
      if (inputs == DType::f32 && output == DType::bf16) {
        continue;  // matmul.cc never asks for it
      }
      const RecordedProduct p = multiply(shape(2, 6, 3, false, true, inputs, output));
      EXPECT_EQ(p.compute, CUBLAS_COMPUTE_32F);  // not CUBLAS_COMPUTE_32F_FAST_TF32
      EXPECT_EQ(p.scale_type, CUDA_R_32F);
      EXPECT_EQ(p.first_type, inputs == DType::f32 ? CUDA_R_32F : CUDA_R_16BF);
      EXPECT_EQ(p.second_type, p.first_type);
      EXPECT_EQ(p.result_type, output == DType::f32 ? CUDA_R_32F : CUDA_R_16BF);
    }
  }
}

TEST(MatmulLibrary, GradientsAreAddedInPlaceByBeta) {
  for (const DType output : {DType::f32, DType::bf16}) {
    TileShape s = shape(4, 6, 5, true, false, DType::bf16, output);
    s.accumulate = true;
    const RecordedProduct p = multiply(s);
    EXPECT_EQ(p.beta, 1);
    EXPECT_TRUE(p.in_place);
    EXPECT_EQ(p.epilogue, CUBLASLT_EPILOGUE_DEFAULT);
  }
}

TEST(MatmulLibrary, BiasIsTheEpilogue) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    TileShape s = shape(3, 7, 2, false, true, dtype, dtype);
    s.bias = dtype;
    const RecordedProduct p = multiply(s);
    EXPECT_EQ(p.epilogue, CUBLASLT_EPILOGUE_BIAS);
    EXPECT_EQ(p.bias_type, dtype == DType::f32 ? CUDA_R_32F : CUDA_R_16BF);
    EXPECT_NE(p.bias, nullptr);
  }
}

TEST(MatmulLibrary, TheAlgorithmOfAShapeIsKept) {
  const auto asked = [] { return recorded_library().asked.size(); };
  const std::size_t before = asked();
  const TileShape s = shape(8, 8, 9);
  multiply(s);
  multiply(s);
  EXPECT_EQ(asked(), before + 1);
  multiply(shape(8, 8, 10));
  EXPECT_EQ(asked(), before + 2);
  const auto& preference = recorded_library().asked.back();
  EXPECT_EQ(preference.workspace_bytes, 32u << 20);
  // No sums by atomics, in no order.
  EXPECT_EQ(preference.reductions,
            static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE |
                                       CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  for (const std::uint32_t bytes : preference.alignment) {
    EXPECT_EQ(bytes, 16u);
  }
  EXPECT_EQ(recorded_library().products.back().workspace_bytes, 32u << 20);
  EXPECT_EQ(recorded_library().asked_for.back(), 1);
}

TEST(MatmulLibrary, NoAlgorithmIsAnErrorThatNamesTheProduct) {
  recorded_library().has_algorithm = false;
  EXPECT_EQ(error_of([] { multiply(shape(3, 1, 17)); }),
            "[matmul] cuBLASLt has no algorithm for [3, 17] x [17, 1], f32 to f32: not supported");
  recorded_library().has_algorithm = true;
}

// Run in a process of its own, with the environment that turns the search on.
TEST(MatmulSearch, TheFastestIsKeptInTheFile) {
  const char* const file = std::getenv("REPRISE_MATMUL_CHOICES");
  if (file == nullptr) {
    GTEST_SKIP() << "wants REPRISE_MATMUL_CHOICES";
  }
  std::filesystem::remove(file);
  const TileShape earlier = shape(2, 3, 4), refused = shape(2, 3, 5);
  {
    MatmulChoices found_earlier(file, "NVIDIA Imaginary", 130400);
    found_earlier.add(matmul_choice_key(earlier, {16, 16, 16}), {102});
    found_earlier.add(matmul_choice_key(refused, {16, 16, 16}), {102});
  }
  recorded_library().milliseconds = {3, 2, 5};
  const TileShape s = shape(5, 6, 7);
  EXPECT_EQ(multiply(s).algorithm, 101u);
  EXPECT_EQ(recorded_library().asked_for.back(), 16);
  EXPECT_EQ(recorded_library().products.size(), 3u * 6 + 1);
  EXPECT_FALSE(recorded_library().products.front().in_place);  // C is not spoilt by trials
  TileShape sum = shape(5, 6, 8);
  sum.accumulate = true;
  EXPECT_EQ(multiply(sum).algorithm, 101u);
  EXPECT_EQ(cuda::matmul_choices_warning(), "");
  const MatmulChoices kept(file, "NVIDIA Imaginary", 130400);
  EXPECT_EQ(kept.warning(), "");
  const auto found = kept.find(matmul_choice_key(s, {16, 16, 16}));
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->front(), 101u);
  // What was in the file is not searched for again, unless the library refuses it.
  const std::size_t asked = recorded_library().asked.size();
  EXPECT_EQ(multiply(earlier).algorithm, 102u);
  EXPECT_EQ(recorded_library().asked.size(), asked);
  recorded_library().knows_algorithms = false;
  EXPECT_EQ(multiply(refused).algorithm, 101u);
  EXPECT_EQ(recorded_library().asked.size(), asked + 1);
  EXPECT_NE(cuda::matmul_choices_warning().find("the library does not take the choice for m2 n3"),
            std::string::npos);
  std::filesystem::remove(file);
}

TEST(Launch, AFailureNamesKernelAndSizes) {
  const LaunchSizes sizes{{7, 2, 1}, {256, 1, 1}, 1024};
  const std::string as =
      ", launched as [7, 2, 1] blocks of [256, 1, 1] threads with 1024 bytes of shared memory";
  EXPECT_EQ(error_of([&] { fail_launch("rms_norm", sizes, false, 9); }),
            "[rms_norm] CUDA: status 9" + as);
  // Somebody else's fault, that this launch only met; in checked mode its own.
  const std::string met = error_of([&] { fail_launch("rms_norm", sizes, false, 700); });
  EXPECT_NE(met.find("a kernel that was started earlier made it"), std::string::npos) << met;
  EXPECT_EQ(error_of([&] { fail_launch("rms_norm", sizes, true, 700); }),
            "[rms_norm] CUDA: status 700" + as);
}

TEST(Matmul, ARefusedProductNamesItsSizes) {
  recorded_library().multiplies = false;
  EXPECT_EQ(error_of([] { multiply(shape(2, 3, 4, false, false, DType::bf16)); }),
            "[matmul] cuBLASLt: product of [2, 4] x [4, 3] of bf16 to f32: not supported");
  recorded_library().multiplies = true;
}

// REPRISE_CUDA_CHECKED=1
TEST(MatmulChecked, AFaultIsThatOfTheProductThatMadeIt) {
  if (!cuda_checked()) {
    GTEST_SKIP() << "not in checked mode";
  }
  recorded_library().status = 700;
  EXPECT_EQ(error_of([] { multiply(shape(2, 3, 4)); }),
            "[matmul] CUDA: status 700, asked for [2, 4] x [4, 3] of f32 to f32");
  EXPECT_EQ(error_of([] { multiply(shape(2, 3, 4)); }), "no error");
}

class MatmulChoicesFile : public ::testing::Test {
 protected:
  MatmulChoicesFile() {
    MatmulChoices choices(path_, "card", 7);
    choices.add("m1", {1, 2, 3, 4, 5, 6, 7, 0xffffffffffffffffu});
    choices.add("m2 add", {8, 0, 0, 0, 0, 0, 0, 0});
  }
  ~MatmulChoicesFile() override { std::filesystem::remove(path_); }
  std::string text() const {
    std::ifstream in(path_);
    return (std::ostringstream() << in.rdbuf()).str();
  }
  void write(const std::string& text) const { std::ofstream(path_, std::ios::trunc) << text; }

  const std::string path_ = ::testing::TempDir() + "reprise_matmul_choices";
};

TEST_F(MatmulChoicesFile, IsReadAsItWasWritten) {
  const MatmulChoices choices(path_, "card", 7);
  EXPECT_EQ(choices.warning(), "");
  EXPECT_EQ(choices.find("m1"), (MatmulAlgorithm{1, 2, 3, 4, 5, 6, 7, 0xffffffffffffffffu}));
  EXPECT_EQ(choices.find("m2 add"), (MatmulAlgorithm{8, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_FALSE(choices.find("m3").has_value());
}

TEST_F(MatmulChoicesFile, OfAnotherCardOrVersionIsIgnored) {
  for (const auto& [card, version] : {std::pair("other", 7), std::pair("card", 8)}) {
    const MatmulChoices choices(path_, card, version);
    EXPECT_FALSE(choices.find("m1").has_value());
    EXPECT_EQ(choices.warning(), path_ + ": it is for card card, library 7, this is card " + card +
                                     ", library " + std::to_string(version) + ": ignored");
  }
}

TEST_F(MatmulChoicesFile, DamagedIsIgnored) {
  const std::string whole = text();
  const auto warning = [&](const std::string& damaged) {
    write(damaged);
    const MatmulChoices choices(path_, "card", 7);
    EXPECT_FALSE(choices.find("m1").has_value());
    return choices.warning();
  };
  EXPECT_EQ(warning(""), path_ + ": it is no file of choices: ignored");
  EXPECT_EQ(warning("GIF89a"), path_ + ": it is no file of choices: ignored");
  EXPECT_EQ(warning(whole.substr(0, whole.size() - 5)), path_ + ": line 4 is damaged: ignored");
  std::string flipped = whole;
  flipped[flipped.find("0000000000000002") + 15] = '3';
  EXPECT_EQ(warning(flipped), path_ + ": line 3 is damaged: ignored");
  EXPECT_EQ(warning(whole + "m3 = 1\n"), path_ + ": line 5 is damaged: ignored");
}

TEST_F(MatmulChoicesFile, ThatCannotBeWrittenIsSaid) {
  MatmulChoices choices("/nowhere/choices", "card", 7);
  choices.add("m1", {});
  EXPECT_EQ(choices.warning(), "/nowhere/choices: cannot be written: No such file or directory");
  EXPECT_TRUE(choices.find("m1").has_value());
}

}  // namespace
}  // namespace reprise::kernels
