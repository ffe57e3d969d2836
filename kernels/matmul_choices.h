// Algorithms of a products' library that were found by measuring, kept in a file. The file belongs
// to one kind of card and one version of the library; another's, or a damaged one, is ignored.
//
//   reprise matmul choices 1
//   card NVIDIA H200, library 130400
//   <product> = <16 hexadecimal digits, 8 times> # <digest of the line before it>
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "kernels/matmul_tile.h"

namespace reprise::kernels {

// As the library writes an algorithm.
using MatmulAlgorithm = std::array<std::uint64_t, 8>;

// "m8 n16 k32 lda32 ldb16 ldc16 nn bf16-f32 add align16,16,16": one line for one product.
std::string matmul_choice_key(const TileShape& product, const std::array<int, 3>& aligned);

class MatmulChoices {
 public:
  // Reads the file where there is one; says in warning() why one was ignored.
  MatmulChoices(std::string file, std::string card, std::int64_t library_version);

  std::optional<MatmulAlgorithm> find(const std::string& key) const;
  // Kept, and the file is written anew, whole or not at all.
  void add(const std::string& key, const MatmulAlgorithm& algorithm);
  // A choice that the library does not take any more.
  void drop(const std::string& key);
  // Empty: nothing to say.
  const std::string& warning() const { return warning_; }

 private:
  std::string header() const;
  void read();
  void write();

  std::string file_, card_;
  std::int64_t version_;
  std::map<std::string, MatmulAlgorithm> choices_;
  std::string warning_;
};

}  // namespace reprise::kernels
