#include "distributed/sharded_folder.h"

#include <fmt/format.h>

#include "nn/adapters/set.h"
#include "nn/weights/folder.h"

namespace reprise::distributed {
absl::Status shared_status(Communicator& ranks, const absl::Status& own, const char* what) {
  const double first = all_reduce_value(ranks, own.ok() ? ranks.size() : ranks.rank(), Reduce::min,
                                        std::string(what) + ": status");
  if (!own.ok() || first >= ranks.size()) {
    return own;
  }
  return absl::AbortedError(
      fmt::format("{}: rank {} has an error, which it reports", what, static_cast<int>(first)));
}

namespace {

absl::Status read_parts(const nn::WeightFolder& weights, nn::Model& model, Sharding& sharding) {
  for (const nn::NamedParameter& entry : model.named_parameters()) {
    if (entry.adapter) {
      continue;
    }
    Parameter& p = *entry.parameter;
    std::vector<Sharding::Part> parts = sharding.parts_of(p);
    if (!sharding.is_sharded(p)) {
      if (!p.value().has_storage()) {
        p.bind_value(nn::parameter_tensor(p.shape(), {p.value().device(), p.dtype()}));
      }
      parts.push_back({0, p.write().reshape({p.shape().numel()})});
    }
    for (const Sharding::Part& part : parts) {
      const absl::Status status =
          nn::read_elements(weights, model, entry.path, part.first, part.values);
      if (!status.ok()) {
        return status;
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status load_sharded(const std::string& folder, nn::Model& model, Sharding& sharding,
                          Communicator& ranks) {
  const absl::StatusOr<nn::WeightFolder> weights = nn::WeightFolder::open(folder);
  const absl::Status own = weights.ok() ? read_parts(*weights, model, sharding) : weights.status();
  const absl::Status status = shared_status(ranks, own, "load_sharded");
  if (status.ok()) {
    sharding.values_written();
  }
  return status;
}

absl::Status save_sharded(nn::Model& model, const std::string& folder, Sharding& sharding,
                          Communicator& ranks, std::int64_t max_shard_bytes) {
  nn::SaveOptions options{.max_shard_bytes = max_shard_bytes, .one_by_one = true};
  const std::vector<nn::NamedParameter> order = nn::save_order(model, options);
  std::size_t sent = 0;
  const auto send = [&](Parameter& p) {
    ++sent;
    return sharding.stage() == 3 ? sharding.gathered(p) : model.adapters().base_value(p);
  };
  absl::Status own;
  if (ranks.rank() == 0) {
    options.value = [&](const nn::NamedParameter& entry) {
      ensure(sent < order.size() && order[sent].parameter == entry.parameter,
             "save_sharded: {} is asked for out of order", entry.path);
      return send(*entry.parameter);
    };
    own = nn::save_model(model, folder, options);
  }
  while (sent < order.size()) {  // what rank 0 did not come to is sent all the same
    (void)send(*order[sent].parameter);
  }
  return shared_status(ranks, own, "save_sharded");
}

}  // namespace reprise::distributed
