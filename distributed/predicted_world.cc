#include "distributed/predicted_world.h"

#include <algorithm>
#include <utility>

#include "distributed/rank_tree.h"

namespace reprise::distributed {
namespace {

class PredictedWorld final : public Communicator {
 public:
  PredictedWorld(int rank, int size) : rank_(rank), size_(size) {}

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void abort(std::string) override {}
  void close() override {}

  Pending start(Collective collective) override {
    if (collective.kind == Collective::Kind::all_gather && !collective.in.is_meta()) {
      const std::int64_t part = collective.in.numel();
      const Tensor out = collective.out.reshape({part * size_});
      for (int r = 0; r < size_; ++r) {
        out.slice(0, r * part, (r + 1) * part).copy_from(collective.in.reshape({part}));
      }
    }
    const bool sums = collective.kind == Collective::Kind::all_reduce ||
                      collective.kind == Collective::Kind::reduce_scatter;
    if (sums && collective.in.is_meta()) {
      count_scratch(collective);
    }
    if (collective.kind == Collective::Kind::reduce_scatter && !collective.in.is_meta()) {
      const std::int64_t part = collective.out.numel();
      collective.out.reshape({part}).copy_from(
          collective.in.reshape({part * size_}).slice(0, rank_ * part, (rank_ + 1) * part));
    }
    return Pending::finished();
  }

 private:
  // The others' addends for this rank's slice of a piece.
  void count_scratch(const Collective& collective) {
    const auto width = static_cast<std::int64_t>(size_bytes(collective.in.dtype()));
    const std::int64_t step = kPieceBytes / width;
    std::int64_t slice = std::min(std::max<std::int64_t>(1, step / size_),
                                  collective.out.defined() ? collective.out.numel() : 0);
    if (collective.kind == Collective::Kind::all_reduce) {
      const auto [first, last] = slice_of(std::min(step, collective.in.numel()), rank_, size_);
      slice = last - first;
    }
    const std::int64_t bytes = slice * width * (size_ - 1);
    if (!scratch_.defined() || scratch_.bytes() < bytes) {
      scratch_ = Tensor();
      scratch_ = Tensor::empty({bytes / 4 + 2}, DType::f32, collective.in.device(),
                               MemoryKind::communication);
    }
  }

  static constexpr std::int64_t kPieceBytes = std::int64_t{32} << 20;  // as the engine cuts

  const int rank_, size_;
  Tensor scratch_;
};

}  // namespace

std::unique_ptr<Communicator> predicted_world(int rank, int size) {
  if (size < 1 || rank < 0 || rank >= size) {
    fail("predicted_world", "rank must be one of {}, got {}", size, rank);
  }
  return std::make_unique<PredictedWorld>(rank, size);
}

}  // namespace reprise::distributed
