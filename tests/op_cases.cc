// The op table: one line a family.
#include <algorithm>
#include <iterator>
#include <utility>

#include "tests/op_case.h"

namespace reprise::testing {

std::vector<OpCase> attention_cases();
std::vector<OpCase> dropout_cases();
std::vector<OpCase> elementwise_cases();
std::vector<OpCase> embedding_cases();
std::vector<OpCase> l2_normalize_cases();
std::vector<OpCase> losses_cases();
std::vector<OpCase> low_rank_cases();
std::vector<OpCase> matmul_cases();
std::vector<OpCase> norm_cases();
std::vector<OpCase> resize_cases();
std::vector<OpCase> rope_cases();
std::vector<OpCase> rows_cases();
std::vector<OpCase> scaling_cases();
std::vector<OpCase> shape_cases();

std::vector<OpCase> all_op_cases() {
  std::vector<OpCase> all;
  for (const auto family :
       {attention_cases, dropout_cases, elementwise_cases, embedding_cases, l2_normalize_cases,
        losses_cases, low_rank_cases, matmul_cases, norm_cases, resize_cases, rope_cases,
        rows_cases, scaling_cases, shape_cases}) {
    std::vector<OpCase> cases = family();
    std::ranges::move(cases, std::back_inserter(all));
  }
  return all;
}

}  // namespace reprise::testing
