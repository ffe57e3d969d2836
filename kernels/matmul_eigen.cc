// One thread a product: the cut over threads is ours (matmul.cc).
#define EIGEN_DONT_PARALLELIZE

#include <Eigen/Core>

#include "kernels/matmul_tile.h"

namespace reprise::kernels {
namespace eigen {
namespace {

using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Strided = Eigen::Map<const RowMajor, 0, Eigen::OuterStride<>>;

class Product final : public TileProduct {
 public:
  explicit Product(const TileShape& shape) : shape_(shape) {}
  std::int64_t scratch_bytes() const override { return 0; }

  void run(const void* a, const void* b, void* c, const void* bias, void*) const override {
    const auto& s = shape_;
    const Strided a_map(static_cast<const float*>(a), s.transpose_a ? s.k : s.m,
                        s.transpose_a ? s.m : s.k, Eigen::OuterStride<>(s.lda));
    const Strided b_map(static_cast<const float*>(b), s.transpose_b ? s.n : s.k,
                        s.transpose_b ? s.k : s.n, Eigen::OuterStride<>(s.ldb));
    Eigen::Map<RowMajor, 0, Eigen::OuterStride<>> to(static_cast<float*>(c), s.m, s.n,
                                                     Eigen::OuterStride<>(s.ldc));
    if (!s.accumulate) {
      if (s.bias) {
        using Row = Eigen::Matrix<float, 1, Eigen::Dynamic>;
        to.rowwise() = Eigen::Map<const Row>(static_cast<const float*>(bias), s.n);
      } else {
        to.setZero();
      }
    }
    if (s.transpose_a && s.transpose_b) {
      to.noalias() += a_map.transpose() * b_map.transpose();
    } else if (s.transpose_a) {
      to.noalias() += a_map.transpose() * b_map;
    } else if (s.transpose_b) {
      to.noalias() += a_map * b_map.transpose();
    } else {
      to.noalias() += a_map * b_map;
    }
  }

 private:
  TileShape shape_;
};

}  // namespace

std::unique_ptr<TileProduct> tile_product(const TileShape& shape) {
  if (shape.inputs != DType::f32 || shape.output != DType::f32 ||
      shape.bias.value_or(DType::f32) != DType::f32) {
    return nullptr;
  }
  return std::make_unique<Product>(shape);
}

}  // namespace eigen

#if !defined(REPRISE_HAS_ONEDNN)
namespace cpu {
std::unique_ptr<TileProduct> library_tile_product(const TileShape& shape) {
  return eigen::tile_product(shape);
}
}  // namespace cpu
#endif

}  // namespace reprise::kernels
