#include "train/digest.h"

#include <new>

#include <fmt/format.h>
#include <xxhash.h>

namespace reprise::train {

struct Digest::State {
  XXH3_state_t* xxh = XXH3_createState();
  ~State() { XXH3_freeState(xxh); }
};

Digest::Digest() : state_(std::make_unique<State>()) {
  if (state_->xxh == nullptr) {
    throw std::bad_alloc();
  }
  XXH3_128bits_reset(state_->xxh);
}
Digest::~Digest() = default;

void Digest::add(std::string_view name, const Tensor& tensor) {
  XXH3_128bits_update(state_->xxh, name.data(), name.size());
  if (tensor.numel() > 0) {
    const Tensor host = tensor.device().kind == DeviceKind::cuda ? tensor.to(cpu) : tensor;
    XXH3_128bits_update(state_->xxh, host.raw(), static_cast<std::size_t>(host.bytes()));
  }
}

std::string Digest::text() const {
  const XXH128_hash_t hash = XXH3_128bits_digest(state_->xxh);
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

}  // namespace reprise::train
