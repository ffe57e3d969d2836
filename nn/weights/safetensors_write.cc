#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <tuple>

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>
#include <utf8.h>

#include "core/progress.h"
#include "nn/weights/replace_file.h"
#include "nn/weights/safetensors.h"

namespace reprise::nn {
namespace {

std::string quoted(const std::string& text) {
  return nlohmann::json(text).dump();
}

absl::Status check_names(const std::string& path, std::span<const TensorLayout> tensors,
                         const Metadata& metadata) {
  std::set<std::string_view> names;
  for (const TensorLayout& entry : tensors) {
    if (!utf8::is_valid(entry.name) || entry.name == "__metadata__") {
      return absl::InvalidArgumentError(
          fmt::format("{}: a tensor cannot be called \"{}\"", path, entry.name));
    }
    if (!names.insert(entry.name).second) {
      return absl::InvalidArgumentError(
          fmt::format("{}: tensor \"{}\" is given twice", path, entry.name));
    }
  }
  for (const auto& [key, value] : metadata) {
    if (!utf8::is_valid(key) || !utf8::is_valid(value)) {
      return absl::InvalidArgumentError(
          fmt::format("{}: metadata \"{}\" must be UTF-8", path, key));
    }
  }
  return absl::OkStatus();
}

absl::Status check_elements(const std::string& path, std::span<const NamedTensor> tensors) {
  for (const NamedTensor& entry : tensors) {
    if (!entry.tensor.defined() || entry.tensor.is_meta()) {
      return absl::InvalidArgumentError(
          fmt::format("{}: tensor \"{}\" has no elements", path, entry.name));
    }
  }
  return absl::OkStatus();
}

// Tensors that share bytes would come back as two. Slices of one storage side by side are fine.
absl::Status check_memory(const std::string& path, std::span<const NamedTensor> tensors) {
  std::vector<std::tuple<const std::byte*, const std::byte*, const NamedTensor*>> ranges;
  for (const NamedTensor& entry : tensors) {
    const Tensor& tensor = entry.tensor;
    if (tensor.numel() == 0) {
      continue;
    }
    std::int64_t last = 0;
    for (int dim = 0; dim < tensor.rank(); ++dim) {
      last += (tensor.size(dim) - 1) * tensor.strides()[static_cast<std::size_t>(dim)];
    }
    const auto* const begin = static_cast<const std::byte*>(tensor.raw());
    const auto bytes = static_cast<std::int64_t>(size_bytes(tensor.dtype()));
    ranges.emplace_back(begin, begin + (last + 1) * bytes, &entry);
  }
  std::sort(ranges.begin(), ranges.end());
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (std::get<0>(ranges[i]) < std::get<1>(ranges[i - 1])) {
      return absl::InvalidArgumentError(
          fmt::format("{}: tensors \"{}\" and \"{}\" share memory: write one of them", path,
                      std::get<2>(ranges[i - 1])->name, std::get<2>(ranges[i])->name));
    }
  }
  return absl::OkStatus();
}

std::string header_text(std::span<const TensorLayout> tensors,
                        const std::vector<std::size_t>& order, const Metadata& metadata) {
  std::string text = "{";
  if (!metadata.empty()) {
    text += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
      text += (text.back() == '{' ? "" : ",") + quoted(key) + ":" + quoted(value);
    }
    text += "}";
  }
  std::int64_t begin = 0;
  for (const std::size_t i : order) {
    const TensorLayout& entry = tensors[i];
    const std::int64_t bytes =
        entry.shape.numel() * static_cast<std::int64_t>(size_bytes(entry.dtype));
    text += fmt::format("{}{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                        text == "{" ? "" : ",", quoted(entry.name), name(stored_type(entry.dtype)),
                        fmt::join(entry.shape.sizes(), ","), begin, begin + bytes);
    begin += bytes;
  }
  text += "}";
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return text;
}

}  // namespace

std::vector<std::size_t> write_order(std::span<const TensorLayout> tensors) {
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::sort(order, [&](std::size_t a, std::size_t b) {
    const StoredType left = stored_type(tensors[a].dtype), right = stored_type(tensors[b].dtype);
    return left != right ? left > right : tensors[a].name < tensors[b].name;
  });
  return order;
}

absl::Status stream_safetensors(const std::string& path, std::span<const TensorLayout> tensors,
                                const std::function<Tensor(std::size_t)>& value,
                                const Metadata& metadata) {
  if (const absl::Status status = check_names(path, tensors, metadata); !status.ok()) {
    return status;
  }
  const std::vector<std::size_t> order = write_order(tensors);
  const std::string header = header_text(tensors, order, metadata);

  const PhaseScope phase(Phase::saving);
  ReplaceFile file(path);
  std::array<char, 8> length{};
  for (std::size_t i = 0; i < 8; ++i) {
    length[i] = static_cast<char>(header.size() >> (8 * i) & 0xff);
  }
  file.append(length.data(), length.size());
  file.append(header.data(), header.size());
  for (const std::size_t i : order) {
    const Tensor host = value(i).to(cpu).contiguous();
    if (host.shape() != tensors[i].shape || host.dtype() != tensors[i].dtype) {
      return absl::InvalidArgumentError(
          fmt::format("{}: tensor \"{}\" must be {} {}, got {} {}", path, tensors[i].name,
                      reprise::name(tensors[i].dtype), to_string(tensors[i].shape),
                      reprise::name(host.dtype()), to_string(host.shape())));
    }
    if (host.numel() > 0) {
      file.append(host.raw(), static_cast<std::size_t>(host.bytes()));
    }
  }
  return file.commit();
}

absl::Status write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                               const Metadata& metadata) {
  absl::Status status = check_elements(path, tensors);
  if (status.ok()) {
    status = check_memory(path, tensors);
  }
  if (!status.ok()) {
    return status;
  }
  std::vector<TensorLayout> layouts;
  for (const NamedTensor& entry : tensors) {
    layouts.push_back({entry.name, entry.tensor.shape(), entry.tensor.dtype()});
  }
  return stream_safetensors(
      path, layouts, [&](std::size_t i) { return tensors[i].tensor; }, metadata);
}

}  // namespace reprise::nn
