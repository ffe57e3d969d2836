// Stands in for cuBLASLt and for the few calls of the runtime that kernels/matmul.cu makes: keeps
// what it is asked for, and does the product that the descriptors describe, in double.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <cublasLt.h>

namespace reprise::testing {

// A product, in the library's terms: matrices go down their columns.
struct RecordedProduct {
  cublasOperation_t first_op, second_op;
  cublasComputeType_t compute;
  cudaDataType_t scale_type, first_type, second_type, result_type;
  std::uint64_t first[2], second[2], result[2];  // rows, columns
  std::int64_t first_stride, second_stride, result_stride;
  cublasLtEpilogue_t epilogue;
  cudaDataType_t bias_type;
  const void* bias;
  float alpha, beta;
  bool in_place;  // C is D
  std::size_t workspace_bytes;
  std::uint64_t algorithm;
};

struct RecordedPreference {
  std::uint64_t workspace_bytes;
  std::uint32_t reductions, alignment[4];  // A, B, C, D in the library's order
};

struct RecordedLibrary {
  std::vector<RecordedProduct> products;
  std::vector<RecordedPreference> asked;  // calls of the heuristic
  std::vector<int> asked_for;             // how many results each
  std::vector<float> milliseconds = {1};  // of each candidate, as the events will say
  std::string card = "NVIDIA Imaginary";
  std::size_t version = 130400;
  bool knows_algorithms = true;  // false: AlgoCheck refuses all
  bool has_algorithm = true;     // false: the heuristic finds none
  bool multiplies = true;        // false: a product is refused
  int status = 0;                // what the next wait for the stream finds
};
RecordedLibrary& recorded_library();

}  // namespace reprise::testing
