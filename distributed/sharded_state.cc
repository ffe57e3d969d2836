#include "distributed/sharded_state.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "distributed/disagreement.h"
#include "distributed/sharded_folder.h"
#include "nn/weights/safetensors.h"

namespace reprise::distributed {
namespace {

namespace fs = std::filesystem;

std::string file_of(const std::string& folder) {
  return (fs::path(folder) / "training.safetensors").string();
}

// What is trained: the parameters themselves, whole.
std::vector<Parameter*> trained(const nn::AdamW& optimizer, const Sharding* sharding) {
  if (sharding == nullptr) {
    return optimizer.parameters();
  }
  std::vector<Parameter*> list;
  std::ranges::copy_if(sharding->parameters(), std::back_inserter(list), &Parameter::trainable);
  return list;
}

// The tensors of the file, in the order in which ranks send them.
struct Entry {
  Parameter* parameter = nullptr;
  std::string role;  // "value", "m", ...
};

class Writer {
 public:
  Writer(const nn::AdamW& optimizer, Sharding* sharding, Communicator& ranks)
      : sharding_(sharding), parameters_(trained(optimizer, sharding)) {
    for (auto& [name, tensor] : optimizer.state()) {
      state_.emplace(name, tensor);
    }
    count_steps(ranks);
    std::vector<Entry> entries;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      Parameter& p = *parameters_[i];
      const DType state = optimizer.options().state_dtype.value_or(p.dtype());
      add(entries, p, "value", p.shape(), p.dtype());
      if (steps_.data<std::int64_t>()[i] > 0) {
        add(entries, p, "m", p.shape(), state);
        add(entries, p, "v", p.shape(), state);
        add(entries, p, "step", Shape{}, DType::i64);
        if (optimizer.options().master_weights && p.dtype() != DType::f32) {
          add(entries, p, "master", p.shape(), DType::f32);
        }
      }
    }
    entries_ = std::move(entries);
    order_ = nn::write_order(layouts_);
  }

  absl::Status write(const std::string& path, const RunPosition& position) {
    const auto value = [this](std::size_t i) {
      ensure(sent_ < order_.size() && order_[sent_] == i,
             "save_state: {} is asked for out of order", layouts_[i].name);
      return next();
    };
    return nn::stream_safetensors(path, layouts_, value,
                                  {{"format", "pt"},
                                   {"steps", std::to_string(position.steps)},
                                   {"random_offset", std::to_string(position.random_offset)}});
  }
  // What the writer did not come to is sent all the same.
  void send_rest() {
    while (sent_ < order_.size()) {
      (void)next();
    }
  }

 private:
  void add(std::vector<Entry>& entries, Parameter& p, const char* role, const Shape& shape,
           DType dtype) {
    entries.push_back({&p, role});
    layouts_.push_back({p.name() + "." + role, shape, dtype});
  }

  // Ranks without a part of a parameter do not know.
  void count_steps(Communicator& ranks) {
    steps_ = Tensor::zeros({std::ssize(parameters_)}, DType::i64, cpu, MemoryKind::communication);
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      if (const auto found = state_.find(parameters_[i]->name() + ".step"); found != state_.end()) {
        steps_.data<std::int64_t>()[i] = found->second.item<std::int64_t>();
      }
    }
    ranks.all_reduce(steps_, Reduce::max, {"steps of parameters"}).wait();
  }

  Tensor next() {
    const std::size_t i = order_[sent_++];
    const Entry& entry = entries_[i];
    if (entry.role == "step") {
      const auto at = std::ranges::find(parameters_, entry.parameter) - parameters_.begin();
      return Tensor::from(std::vector{steps_.data<std::int64_t>()[at]}, Shape{});
    }
    if (entry.role == "value") {
      return sharding_ == nullptr ? entry.parameter->value()
                                  : sharding_->gathered(*entry.parameter);
    }
    const auto found = state_.find(layouts_[i].name);
    const Tensor own = found == state_.end() ? Tensor() : found->second;
    return sharding_ == nullptr ? own
                                : sharding_->assembled(*entry.parameter, own, layouts_[i].dtype);
  }

  Sharding* const sharding_;
  const std::vector<Parameter*> parameters_;
  std::map<std::string, Tensor> state_;
  Tensor steps_;
  std::vector<Entry> entries_;
  std::vector<nn::TensorLayout> layouts_;
  std::vector<std::size_t> order_;
  std::size_t sent_ = 0;
};

// Reads a rank's parts; changes nothing until apply().
class Reader {
 public:
  Reader(nn::AdamW& optimizer, Sharding* sharding)
      : optimizer_(optimizer), sharding_(sharding), parameters_(trained(optimizer, sharding)) {}

  absl::Status read(const std::string& path) {
    absl::StatusOr<nn::SafetensorsFile> file = nn::SafetensorsFile::open(path);
    if (!file.ok()) {
      return file.status();
    }
    file_.emplace(*std::move(file));
    absl::Status status = read_position();
    std::set<std::string> known;
    for (std::size_t i = 0; status.ok() && i < parameters_.size(); ++i) {
      status = read_parameter(*parameters_[i], known);
    }
    for (const nn::StoredTensor& tensor : file_->tensors()) {
      if (status.ok() && !known.contains(tensor.name)) {
        status = refuse(tensor.name, "belongs to no parameter that is trained");
      }
    }
    return status;
  }

  void apply() {
    for (const auto& [to, from] : values_) {
      to.copy_from(from);
    }
    if (sharding_ != nullptr) {
      sharding_->values_written();
    } else {
      for (Parameter* p : parameters_) {
        (void)p->write();
      }
    }
    optimizer_.load_state(state_);
  }
  const RunPosition& position() const { return position_; }

 private:
  absl::Status refuse(const std::string& name, const std::string& what) const {
    return absl::InvalidArgumentError(fmt::format("{}: {} {}", file_->path(), name, what));
  }

  absl::Status read_position() {
    const auto number = [&](const char* key, auto& to) {
      const auto found = file_->metadata().find(key);
      if (found == file_->metadata().end()) {
        return refuse(key, "is not in the metadata");
      }
      const std::string& text = found->second;
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), to);
      return error == std::errc() && end == text.data() + text.size() && to >= 0
                 ? absl::OkStatus()
                 : refuse(key, fmt::format("must be a whole number, got \"{}\"", text));
    };
    const absl::Status steps = number("steps", position_.steps);
    return steps.ok() ? number("random_offset", position_.random_offset) : steps;
  }

  // This rank's part of it, flat, as a view of the file.
  absl::StatusOr<Tensor> part(const std::string& name, const Parameter& p, DType dtype,
                              std::int64_t first, std::int64_t count) const {
    absl::StatusOr<Tensor> whole = file_->read(name);
    if (!whole.ok()) {
      return whole.status();
    }
    if (whole->dtype() != dtype || whole->shape() != p.shape()) {
      return refuse(
          name, fmt::format("must be {} {}, got {} {}", reprise::name(dtype), to_string(p.shape()),
                            reprise::name(whole->dtype()), to_string(whole->shape())));
    }
    return whole->reshape({p.shape().numel()}).slice(0, first, first + count);
  }

  absl::Status read_parameter(Parameter& p, std::set<std::string>& known) {
    const bool stepped = file_->find(p.name() + ".step") != nullptr;
    const bool master = optimizer_.options().master_weights && p.dtype() != DType::f32;
    const DType state = optimizer_.options().state_dtype.value_or(p.dtype());
    std::vector<std::pair<std::string, DType>> roles{{".value", p.dtype()}};
    if (stepped) {
      roles.insert(roles.end(), {{".m", state}, {".v", state}});
      if (master) {
        roles.emplace_back(".master", DType::f32);
      }
      known.insert(p.name() + ".step");
    }
    std::vector<Sharding::Part> parts;
    if (sharding_ != nullptr) {
      parts = sharding_->parts_of(p);
    } else {
      parts.push_back({0, p.value().reshape({p.shape().numel()})});
    }
    for (const auto& [role, dtype] : roles) {
      known.insert(p.name() + role);
      const std::int64_t first = parts.empty() ? 0 : parts[0].first;
      const std::int64_t count = parts.empty() ? 0 : parts[0].values.numel();
      const absl::StatusOr<Tensor> read = part(p.name() + role, p, dtype, first, count);
      if (!read.ok()) {
        return read.status();
      }
      if (parts.empty()) {
        continue;
      }
      if (role == ".value") {
        values_.emplace_back(parts[0].values, *read);
      } else {
        state_.emplace_back(p.name() + role,
                            sharding_ == nullptr ? read->reshape(p.shape()) : *read);
      }
    }
    if (stepped && !parts.empty()) {
      const absl::StatusOr<Tensor> step = file_->read(p.name() + ".step");
      if (!step.ok()) {
        return step.status();
      }
      if (step->dtype() != DType::i64 || step->shape() != Shape{} ||
          step->item<std::int64_t>() < 1) {
        return refuse(p.name() + ".step", "must be one i64 of 1 or more");
      }
      state_.emplace_back(p.name() + ".step", *step);
    }
    return absl::OkStatus();
  }

  nn::AdamW& optimizer_;
  Sharding* const sharding_;
  const std::vector<Parameter*> parameters_;
  std::optional<nn::SafetensorsFile> file_;
  RunPosition position_;
  std::vector<std::pair<Tensor, Tensor>> values_;  // to, from
  std::vector<std::pair<std::string, Tensor>> state_;
};

}  // namespace

absl::Status save_state(const std::string& folder, const nn::AdamW& optimizer, Sharding* sharding,
                        Communicator& ranks, const RunPosition& position) {
  const Setting settings[] = {{"steps", std::to_string(position.steps)},
                              {"random offset", std::to_string(position.random_offset)}};
  require_same(ranks, settings, "saving the state");
  Writer writer(optimizer, sharding, ranks);
  absl::Status own;
  if (ranks.rank() == 0) {
    std::error_code error;
    fs::create_directories(folder, error);
    own = error ? absl::UnavailableError(fmt::format("{}: {}", folder, error.message()))
                : writer.write(file_of(folder), position);
  }
  if (sharding != nullptr) {
    writer.send_rest();
  }
  return shared_status(ranks, own, "save_state");
}

absl::StatusOr<RunPosition> load_state(const std::string& folder, nn::AdamW& optimizer,
                                       Sharding* sharding, Communicator& ranks) {
  Reader reader(optimizer, sharding);
  const absl::Status status = shared_status(ranks, reader.read(file_of(folder)), "load_state");
  if (!status.ok()) {
    return status;
  }
  reader.apply();
  return reader.position();
}

}  // namespace reprise::distributed
