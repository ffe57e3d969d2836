#include "tests/cuda/cublaslt_recorded.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#include <cuda_runtime_api.h>

#include "core/cuda_device.h"
#include "core/cuda_errors.h"
#include "core/dtype.h"
#include "core/error.h"

namespace reprise::testing {

RecordedLibrary& recorded_library() {
  static RecordedLibrary library;
  return library;
}

namespace {

struct Layout {
  cudaDataType_t type;
  std::uint64_t rows, columns;
  std::int64_t stride;
};

template <class T, class Handle>
T& as(Handle handle) {
  return *reinterpret_cast<T*>(handle);
}

double element(const void* from, const Layout& x, std::uint64_t row, std::uint64_t column) {
  const auto at = column * static_cast<std::uint64_t>(x.stride) + row;
  return static_cast<double>(x.type == CUDA_R_32F
                                 ? static_cast<const float*>(from)[at]
                                 : to_float(static_cast<const bfloat16*>(from)[at]));
}

float elapsed = 0;  // of the candidates run since the last event

}  // namespace
}  // namespace reprise::testing

namespace reprise {
void cuda_check(const char* operation, int status) {
  if (status != 0) {
    const std::string advice = cuda_advice(status);
    fail(operation, "CUDA: status {}{}{}", status, advice.empty() ? "" : ": ", advice);
  }
}
int cuda_wait(void*) {
  return std::exchange(testing::recorded_library().status, 0);
}
}  // namespace reprise

using namespace reprise::testing;

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = reinterpret_cast<cublasLtHandle_t>(&recorded_library());
  return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion() {
  return recorded_library().version;
}
const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? "success" : "not supported";
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  auto* const product = new RecordedProduct{};
  product->compute = compute;
  product->scale_type = scale;
  product->epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  *made = reinterpret_cast<cublasLtMatmulDesc_t>(product);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
  delete &as<RecordedProduct>(description);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                              cublasLtMatmulDescAttributes_t name,
                                              const void* value, size_t bytes) {
  auto& product = as<RecordedProduct>(description);
  void* const to = name == CUBLASLT_MATMUL_DESC_TRANSA     ? static_cast<void*>(&product.first_op)
                   : name == CUBLASLT_MATMUL_DESC_TRANSB   ? static_cast<void*>(&product.second_op)
                   : name == CUBLASLT_MATMUL_DESC_EPILOGUE ? static_cast<void*>(&product.epilogue)
                   : name == CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE
                       ? static_cast<void*>(&product.bias_type)
                   : name == CUBLASLT_MATMUL_DESC_BIAS_POINTER ? static_cast<void*>(&product.bias)
                                                               : nullptr;
  if (to == nullptr) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  std::memcpy(to, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* made, cudaDataType_t type,
                                          uint64_t rows, uint64_t columns, int64_t stride) {
  *made = reinterpret_cast<cublasLtMatrixLayout_t>(new Layout{type, rows, columns, stride});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete &as<Layout>(layout);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) {
  *made = reinterpret_cast<cublasLtMatmulPreference_t>(new RecordedPreference{});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete &as<RecordedPreference>(preference);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t name,
                                                    const void* value, size_t bytes) {
  auto& p = as<RecordedPreference>(preference);
  void* const to =
      name == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES     ? static_cast<void*>(&p.workspace_bytes)
      : name == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK ? static_cast<void*>(&p.reductions)
      : name == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES ? static_cast<void*>(&p.alignment[0])
      : name == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES ? static_cast<void*>(&p.alignment[1])
      : name == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES ? static_cast<void*>(&p.alignment[2])
      : name == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES ? static_cast<void*>(&p.alignment[3])
                                                           : nullptr;
  if (to == nullptr) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  std::memcpy(to, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t preference, int most,
                                              cublasLtMatmulHeuristicResult_t* results,
                                              int* count) {
  RecordedLibrary& library = recorded_library();
  library.asked.push_back(as<RecordedPreference>(preference));
  library.asked_for.push_back(most);
  *count = library.has_algorithm
               ? std::min<int>(most, static_cast<int>(library.milliseconds.size()))
               : 0;
  for (int i = 0; i < *count; ++i) {
    results[i] = {};
    results[i].state = CUBLAS_STATUS_SUCCESS;
    results[i].algo.data[0] = static_cast<std::uint64_t>(i) + 100;
  }
  return *count > 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                       cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       const cublasLtMatmulAlgo_t*,
                                       cublasLtMatmulHeuristicResult_t* result) {
  result->workspaceSize = 0;
  return recorded_library().knows_algorithms ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t description, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t,
                              const cublasLtMatmulAlgo_t* algorithm, void*, size_t workspace_bytes,
                              cudaStream_t) {
  if (!recorded_library().multiplies) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  RecordedProduct p = as<RecordedProduct>(description);
  const Layout &x = as<Layout>(a_layout), &y = as<Layout>(b_layout), &z = as<Layout>(c_layout);
  p.first_type = x.type, p.second_type = y.type, p.result_type = z.type;
  p.first[0] = x.rows, p.first[1] = x.columns, p.first_stride = x.stride;
  p.second[0] = y.rows, p.second[1] = y.columns, p.second_stride = y.stride;
  p.result[0] = z.rows, p.result[1] = z.columns, p.result_stride = z.stride;
  p.alpha = *static_cast<const float*>(alpha), p.beta = *static_cast<const float*>(beta);
  p.in_place = c == d, p.workspace_bytes = workspace_bytes, p.algorithm = algorithm->data[0];
  const bool turn_x = p.first_op == CUBLAS_OP_T, turn_y = p.second_op == CUBLAS_OP_T;
  const std::uint64_t depth = turn_x ? x.rows : x.columns;
  reprise::ensure((turn_x ? x.columns : x.rows) == z.rows &&
                      (turn_y ? y.rows : y.columns) == z.columns &&
                      (turn_y ? y.columns : y.rows) == depth,
                  "the matrices fit");
  for (std::uint64_t row = 0; row < z.rows; ++row) {
    for (std::uint64_t column = 0; column < z.columns; ++column) {
      double sum = 0;
      for (std::uint64_t k = 0; k < depth; ++k) {
        sum += (turn_x ? element(a, x, k, row) : element(a, x, row, k)) *
               (turn_y ? element(b, y, column, k) : element(b, y, k, column));
      }
      sum *= static_cast<double>(p.alpha);
      if (p.beta != 0) {
        sum += static_cast<double>(p.beta) * element(c, z, row, column);
      }
      if (p.epilogue == CUBLASLT_EPILOGUE_BIAS) {
        sum += element(p.bias, {p.bias_type, z.rows, 1, 0}, row, 0);
      }
      const auto at = column * static_cast<std::uint64_t>(z.stride) + row;
      if (z.type == CUDA_R_32F) {
        static_cast<float*>(d)[at] = static_cast<float>(sum);
      } else {
        static_cast<reprise::bfloat16*>(d)[at] = reprise::to_bfloat16(static_cast<float>(sum));
      }
    }
  }
  const auto number = static_cast<std::size_t>(p.algorithm - 100);
  elapsed += recorded_library().milliseconds.at(number);
  recorded_library().products.push_back(p);
  return CUBLAS_STATUS_SUCCESS;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, recorded_library().card.c_str());
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = nullptr;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) {
  return cudaSuccess;
}
// Before the runs of a candidate, and after them.
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  static bool begins = false;
  begins = !begins;
  elapsed = begins ? 0 : elapsed;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = elapsed;
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** at, size_t bytes, cudaStream_t) {
  *at = std::malloc(bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* at, cudaStream_t) {
  std::free(at);
  return cudaSuccess;
}
}
