// Products by cuBLASLt, in f32 arithmetic without TF32.
//
// The library's matrices go down their columns, so the row-major C = op(A) op(B) is asked for as
// C^T = op(B)^T op(A)^T. The algorithm is the library's first choice for the sizes and alignments,
// kept for as long as the process lives: the same product is always computed in the same way, also
// when a segment is replayed. Split sums go through the workspace, in order. With
// REPRISE_MATMUL_CHOICES=<file> the choices of a search are read from the file, and with
// REPRISE_MATMUL_SEARCH=1 too a product that is not in it runs on each candidate at its first call,
// and the fastest is kept there (matmul_choices.h).
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include "core/cuda_device.h"
#include "core/cuda_errors.h"
#include "core/error.h"
#include "core/step_graph.h"
#include "kernels/matmul_choices.h"
#include "kernels/matmul_sides.h"

namespace reprise::kernels::cuda {
namespace {

constexpr int kMostDevices = 16;

void check(const char* what, cublasStatus_t status) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    fail("matmul", "cuBLASLt: {}: {}", what, cublasLtGetStatusString(status));
  }
}

std::string sizes_of(const TileShape& s) {
  return fmt::format("[{}, {}] x [{}, {}] of {}{} to {}{}", s.m, s.k, s.k, s.n, name(s.inputs),
                     s.bias ? " with a bias" : "", name(s.output), s.accumulate ? ", added" : "");
}

template <class T>
struct Destroy {
  void operator()(T handle) const {
    if constexpr (std::is_same_v<T, cublasLtMatmulDesc_t>) {
      cublasLtMatmulDescDestroy(handle);
    } else if constexpr (std::is_same_v<T, cublasLtMatrixLayout_t>) {
      cublasLtMatrixLayoutDestroy(handle);
    } else {
      cublasLtMatmulPreferenceDestroy(handle);
    }
  }
};
template <class T>
using Owned = std::unique_ptr<std::remove_pointer_t<T>, Destroy<T>>;

template <class T>
void set(cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t name, const T& value) {
  check("attribute", cublasLtMatmulDescSetAttribute(description, name, &value, sizeof(value)));
}
template <class T>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t name,
         const T& value) {
  check("preference",
        cublasLtMatmulPreferenceSetAttribute(preference, name, &value, sizeof(value)));
}

cudaDataType_t type(DType dtype) {
  return dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F;
}

Owned<cublasLtMatrixLayout_t> layout(DType dtype, std::int64_t columns, std::int64_t rows,
                                     std::int64_t stride) {
  cublasLtMatrixLayout_t made = nullptr;
  check("layout",
        cublasLtMatrixLayoutCreate(&made, type(dtype), static_cast<std::uint64_t>(columns),
                                   static_cast<std::uint64_t>(rows), stride));
  return Owned<cublasLtMatrixLayout_t>(made);
}

// The largest power of two up to 16 by which an address is divisible.
int alignment(const void* at) {
  int bytes = 16;
  while (reinterpret_cast<std::uintptr_t>(at) % static_cast<unsigned>(bytes) != 0) {
    bytes /= 2;
  }
  return bytes;
}

struct Key {
  TileShape shape;
  std::array<int, 3> aligned;  // A, B, C
  int device;
  bool operator==(const Key& other) const {
    return shape == other.shape && aligned == other.aligned && device == other.device;
  }
};

struct Hash {
  std::size_t operator()(const Key& key) const {
    std::size_t hash = 0;
    const TileShape& s = key.shape;
    for (const std::int64_t value :
         {s.m, s.n, s.k, s.lda, s.ldb, s.ldc,
          std::int64_t{s.transpose_a} + 2 * s.transpose_b + 4 * s.accumulate +
              8 * static_cast<int>(s.inputs) + 64 * static_cast<int>(s.output) +
              512 * (s.bias.has_value() ? 1 : 0) + 1024 * key.device,
          std::int64_t{key.aligned[0]} + 32 * key.aligned[1] + 1024 * key.aligned[2]}) {
      hash = (hash ^ static_cast<std::size_t>(value)) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

// A product as the library knows it. Its first matrix is our B.
struct Plan {
  Owned<cublasLtMatmulDesc_t> description;
  Owned<cublasLtMatrixLayout_t> first, second, result;
  cublasLtMatmulAlgo_t algorithm;
};

// `bias` may be null while an algorithm is chosen.
Owned<cublasLtMatmulDesc_t> described(const TileShape& s, const void* bias) {
  cublasLtMatmulDesc_t description = nullptr;
  check("description", cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  Owned<cublasLtMatmulDesc_t> owned(description);
  set(description, CUBLASLT_MATMUL_DESC_TRANSA, s.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(description, CUBLASLT_MATMUL_DESC_TRANSB, s.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (s.bias.has_value()) {
    set(description, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type(*s.bias));
    set(description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  }
  return owned;
}

Plan planned(const TileShape& s) {
  Plan plan;
  plan.description = described(s, nullptr);
  plan.first = layout(s.inputs, s.transpose_b ? s.k : s.n, s.transpose_b ? s.n : s.k, s.ldb);
  plan.second = layout(s.inputs, s.transpose_a ? s.m : s.k, s.transpose_a ? s.k : s.m, s.lda);
  plan.result = layout(s.output, s.n, s.m, s.ldc);
  return plan;
}

// The library's candidates, the likeliest first.
std::vector<cublasLtMatmulAlgo_t> candidates(cublasLtHandle_t library, const Key& key,
                                             const Plan& plan, int most) {
  cublasLtMatmulPreference_t made = nullptr;
  check("preference", cublasLtMatmulPreferenceCreate(&made));
  const Owned<cublasLtMatmulPreference_t> preference(made);
  set(made, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
      static_cast<std::uint64_t>(matmul_workspace_bytes()));
  set(made, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      std::uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
  set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<std::uint32_t>(key.aligned[1]));
  set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<std::uint32_t>(key.aligned[0]));
  set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<std::uint32_t>(key.aligned[2]));
  set(made, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<std::uint32_t>(key.aligned[2]));
  std::vector<cublasLtMatmulHeuristicResult_t> found(static_cast<std::size_t>(most));
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      library, plan.description.get(), plan.first.get(), plan.second.get(), plan.result.get(),
      plan.result.get(), made, most, found.data(), &count);
  if (status != CUBLAS_STATUS_SUCCESS || count == 0) {
    const TileShape& s = key.shape;
    fail("matmul", "cuBLASLt has no algorithm for [{}, {}] x [{}, {}], {} to {}: {}", s.m, s.k, s.k,
         s.n, name(s.inputs), name(s.output), cublasLtGetStatusString(status));
  }
  std::vector<cublasLtMatmulAlgo_t> algorithms;
  for (int i = 0; i < count; ++i) {
    if (found[static_cast<std::size_t>(i)].state == CUBLAS_STATUS_SUCCESS) {
      algorithms.push_back(found[static_cast<std::size_t>(i)].algo);
    }
  }
  return algorithms;
}

// One product as it is handed to the library.
struct Operands {
  const void *a, *b;
  void* c;
  const void* bias;
  void* workspace;
  cudaStream_t stream;
};

// `to` is where the result goes; c is only read when it is elsewhere.
cublasStatus_t multiply(cublasLtHandle_t library, const TileShape& s, const Plan& plan,
                        const cublasLtMatmulAlgo_t& algorithm, const Operands& x, void* to) {
  cublasLtMatmulDesc_t description = plan.description.get();
  Owned<cublasLtMatmulDesc_t> with_bias;
  if (x.bias != nullptr) {
    // The address is part of a description, and others may be using this plan's.
    with_bias = described(s, x.bias);
    description = with_bias.get();
  }
  const float one = 1.0f, beta = s.accumulate ? 1.0f : 0.0f;
  return cublasLtMatmul(library, description, &one, x.b, plan.first.get(), x.a, plan.second.get(),
                        &beta, x.c, plan.result.get(), to, plan.result.get(), &algorithm,
                        x.workspace, static_cast<std::size_t>(matmul_workspace_bytes()), x.stream);
}

// Runs a candidate into memory of the search's own; infinite where it cannot run.
class Stopwatch {
 public:
  Stopwatch(cublasLtHandle_t library, const TileShape& s, const Plan& plan, const Operands& x)
      : library_(library), shape_(s), plan_(plan), x_(x) {
    cuda_check("matmul", cudaEventCreate(&begin_));
    cuda_check("matmul", cudaEventCreate(&end_));
    const auto bytes = static_cast<std::size_t>(((s.m - 1) * s.ldc + s.n)) * size_bytes(s.output);
    cuda_check("matmul", cudaMallocAsync(&to_, bytes, x.stream));
  }
  ~Stopwatch() {
    cudaFreeAsync(to_, x_.stream);
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Stopwatch(const Stopwatch&) = delete;

  float milliseconds(const cublasLtMatmulAlgo_t& algorithm) const {
    constexpr int kRuns = 5;
    if (multiply(library_, shape_, plan_, algorithm, x_, to_) != CUBLAS_STATUS_SUCCESS) {
      return std::numeric_limits<float>::infinity();
    }
    cuda_check("matmul", cudaEventRecord(begin_, x_.stream));
    for (int run = 0; run < kRuns; ++run) {
      multiply(library_, shape_, plan_, algorithm, x_, to_);
    }
    cuda_check("matmul", cudaEventRecord(end_, x_.stream));
    cuda_check("matmul", cudaEventSynchronize(end_));
    float total = 0;
    cuda_check("matmul", cudaEventElapsedTime(&total, begin_, end_));
    return total / kRuns;
  }

 private:
  cublasLtHandle_t library_;
  const TileShape& shape_;
  const Plan& plan_;
  const Operands& x_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  void* to_ = nullptr;
};

static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(MatmulAlgorithm));

// What a search found, by the file that REPRISE_MATMUL_CHOICES names; none without it.
class Search {
 public:
  Search() {
    const char* const file = std::getenv("REPRISE_MATMUL_CHOICES");
    const char* const on = std::getenv("REPRISE_MATMUL_SEARCH");
    file_ = file == nullptr ? "" : file;
    searches_ = on != nullptr && std::string(on) == "1";
  }

  bool searches() const { return searches_; }

  cublasLtMatmulAlgo_t choose(cublasLtHandle_t library, const Key& key, const Plan& plan,
                              const Operands& x) {
    constexpr int kCandidates = 16;
    if (file_.empty()) {
      return candidates(library, key, plan, 1).front();
    }
    const std::string product = matmul_choice_key(key.shape, key.aligned);
    MatmulChoices& choices = of_device(key.device);
    if (const auto found = choices.find(product)) {
      cublasLtMatmulAlgo_t algorithm;
      std::memcpy(&algorithm, found->data(), sizeof(algorithm));
      if (accepted(library, plan, algorithm)) {
        return algorithm;
      }
      choices.drop(product);
    }
    if (!searches() || capturing()) {
      return candidates(library, key, plan, 1).front();
    }
    const auto all = candidates(library, key, plan, kCandidates);
    const Stopwatch stopwatch(library, key.shape, plan, x);
    std::size_t best = 0;
    float least = std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (const float time = stopwatch.milliseconds(all[i]); time < least) {
        least = time;
        best = i;
      }
    }
    MatmulAlgorithm algorithm;
    std::memcpy(algorithm.data(), &all[best], sizeof(algorithm));
    choices.add(product, algorithm);
    return all[best];
  }

  std::string warning(int device) { return file_.empty() ? "" : of_device(device).warning(); }

 private:
  static bool accepted(cublasLtHandle_t library, const Plan& plan,
                       const cublasLtMatmulAlgo_t& algorithm) {
    cublasLtMatmulHeuristicResult_t result{};
    return cublasLtMatmulAlgoCheck(library, plan.description.get(), plan.first.get(),
                                   plan.second.get(), plan.result.get(), plan.result.get(),
                                   &algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= static_cast<std::size_t>(matmul_workspace_bytes());
  }

  MatmulChoices& of_device(int device) {
    auto& made = choices_.at(static_cast<std::size_t>(device));
    if (made == nullptr) {
      cudaDeviceProp properties{};
      cuda_check("matmul", cudaGetDeviceProperties(&properties, device));
      made = std::make_unique<MatmulChoices>(file_, properties.name,
                                             static_cast<std::int64_t>(cublasLtGetVersion()));
    }
    return *made;
  }

  std::string file_;
  bool searches_ = false;
  std::array<std::unique_ptr<MatmulChoices>, kMostDevices> choices_;
};

// A library handle for each device, and the products seen so far. Never destroyed: the driver may
// be gone before static objects are.
class Library {
 public:
  cublasLtHandle_t handle(int device) {
    const std::lock_guard lock(mutex_);
    cublasLtHandle_t& made = handles_.at(static_cast<std::size_t>(device));
    if (made == nullptr) {
      check("start", cublasLtCreate(&made));
    }
    return made;
  }

  std::shared_ptr<const Plan> find(const Key& key, const Operands& x) {
    const cublasLtHandle_t library = handle(key.device);
    const std::lock_guard lock(mutex_);
    if (const auto at = plans_.find(key); at != plans_.end()) {
      return at->second;
    }
    auto plan = std::make_shared<Plan>(planned(key.shape));
    plan->algorithm = search_.choose(library, key, *plan, x);
    if (search_.searches() && capturing()) {
      return plan;  // a search runs its candidates, which a capture cannot: at the next product
    }
    if (plans_.size() >= kMost) {
      plans_.clear();
    }
    return plans_.emplace(key, std::move(plan)).first->second;
  }

  std::string warning(int device) {
    const std::lock_guard lock(mutex_);
    return search_.warning(device);
  }

 private:
  static constexpr std::size_t kMost = 4096;
  std::mutex mutex_;
  std::array<cublasLtHandle_t, kMostDevices> handles_{};
  std::unordered_map<Key, std::shared_ptr<const Plan>, Hash> plans_;
  Search search_;
};

Library& library() {
  static Library& one = *new Library;
  return one;
}

}  // namespace

void matmul(const TileShape& s, const void* a, const void* b, void* c, const void* bias,
            void* workspace, void* stream) {
  int device = 0;
  cuda_check("matmul", cudaGetDevice(&device));
  const Key key{s, {alignment(a), alignment(b), alignment(c)}, device};
  const Operands operands{a, b, c, bias, workspace, static_cast<cudaStream_t>(stream)};
  const std::shared_ptr<const Plan> plan = library().find(key, operands);
  const cublasStatus_t status =
      multiply(library().handle(device), s, *plan, plan->algorithm, operands, c);
  if (status != CUBLAS_STATUS_SUCCESS) {
    fail("matmul", "cuBLASLt: product of {}: {}", sizes_of(s), cublasLtGetStatusString(status));
  }
  settle_call("matmul", stream, [&] { return sizes_of(s); });
}

std::string matmul_choices_warning() {
  int device = 0;
  cuda_check("matmul", cudaGetDevice(&device));
  return library().warning(device);
}

}  // namespace reprise::kernels::cuda
