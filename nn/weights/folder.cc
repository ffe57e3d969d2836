#include "nn/weights/folder.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <new>
#include <set>

#include <fmt/format.h>

#include "core/error.h"
#include "core/nearest.h"
#include "core/progress.h"
#include "nn/adapters/set.h"
#include "nn/weights/json.h"
#include "nn/weights/replace_file.h"

namespace reprise::nn {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kSingle = "model.safetensors";
constexpr std::string_view kIndex = "model.safetensors.index.json";

std::string inside(const std::string& folder, std::string_view file) {
  return (fs::path(folder) / file).string();
}

bool is_bare(const std::string& file) {
  return !file.empty() && file != "." && file != ".." &&
         file.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
}

// "a, b and 3 more"; a name that has a similar one among `others` with it: "a (there is aa)".
std::string listed(const std::vector<std::string>& names,
                   const std::vector<std::string>& others = {}) {
  constexpr std::size_t kShown = 1000, kCompared = 64;
  std::string text;
  for (std::size_t i = 0; i < std::min(kShown, names.size()); ++i) {
    // Names are compared letter by letter with each other: only for the first of very many.
    const std::string near = i < kCompared && others.size() <= kCompared * kCompared
                                 ? nearest(names[i], others)
                                 : std::string();
    text += fmt::format("{}{}{}", i > 0 ? ", " : "", names[i],
                        near.empty() ? "" : fmt::format(" (there is {})", near));
  }
  return names.size() > kShown ? fmt::format("{} and {} more", text, names.size() - kShown) : text;
}

// The dtype of config.json follows the weights, whichever of the two keys it has.
std::string config_with_dtype(const std::string& text, DType dtype) {
  auto config = nlohmann::ordered_json::parse(text);
  const std::string name = dtype == DType::bf16 ? "bfloat16" : "float32";
  bool found = false;
  for (const char* key : {"torch_dtype", "dtype"}) {
    if (config.contains(key)) {
      config[key] = name;
      found = true;
    }
  }
  if (!found) {
    config["torch_dtype"] = name;
  }
  return config.dump(2) + "\n";
}

// Those that the model's own files hold.
std::vector<NamedParameter> weights_of_file(Model& model) {
  std::vector<NamedParameter> entries = model.named_parameters();
  std::erase_if(entries, [](const NamedParameter& entry) { return entry.adapter; });
  return entries;
}

// Consecutive runs of at most the given size; one that is larger stands alone.
std::vector<std::span<const NamedParameter>> split(std::span<const NamedParameter> entries,
                                                   std::int64_t max_bytes) {
  std::vector<std::span<const NamedParameter>> shards;
  std::size_t begin = 0;
  std::int64_t bytes = 0;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const std::int64_t size = entries[i].parameter->value().bytes();
    if (i > begin && bytes + size > max_bytes) {
      shards.push_back(entries.subspan(begin, i - begin));
      begin = i;
      bytes = 0;
    }
    bytes += size;
  }
  shards.push_back(entries.subspan(begin));
  return shards;
}

absl::Status verify(const std::string& path, const std::vector<NamedTensor>& tensors) {
  const absl::StatusOr<SafetensorsFile> file = SafetensorsFile::open(path);
  if (!file.ok()) {
    return file.status();
  }
  for (const NamedTensor& entry : tensors) {
    const absl::StatusOr<Tensor> stored = file->read(entry.name);
    if (!stored.ok()) {
      return stored.status();
    }
    const Tensor written = entry.tensor.to(cpu).contiguous();
    bool same = stored->shape() == written.shape() && stored->dtype() == written.dtype();
    const std::size_t bytes = written.numel() == 0 ? 0 : static_cast<std::size_t>(written.bytes());
    for (std::size_t at = 0; same && at < bytes; at += kFilePieceBytes) {
      same = std::memcmp(static_cast<const char*>(stored->raw()) + at,
                         static_cast<const char*>(written.raw()) + at,
                         std::min(kFilePieceBytes, bytes - at)) == 0;
      progress().tick();
    }
    if (!same) {
      return absl::DataLossError(
          fmt::format("{}: tensor \"{}\" reads back as something else", path, entry.name));
    }
  }
  return absl::OkStatus();
}

std::vector<TensorLayout> layouts_of(const Model& model, std::span<const NamedParameter> entries) {
  std::vector<TensorLayout> layouts;
  for (const NamedParameter& entry : entries) {
    layouts.push_back({model.file_keys(entry.path).front().key, entry.parameter->shape(),
                       entry.parameter->dtype()});
  }
  return layouts;
}

absl::Status write_shard(const Model& model, const std::string& path,
                         std::span<const NamedParameter> entries,
                         const std::function<Tensor(const NamedParameter&)>& value,
                         const SaveOptions& options) {
  if (options.one_by_one) {
    return stream_safetensors(path, layouts_of(model, entries),
                              [&](std::size_t i) { return value(entries[i]); });
  }
  std::vector<NamedTensor> tensors;
  for (const NamedParameter& entry : entries) {
    tensors.push_back({model.file_keys(entry.path).front().key, value(entry)});
  }
  const absl::Status status = write_safetensors(path, tensors);
  return status.ok() && options.verify ? verify(path, tensors) : status;
}

absl::Status write_index(const Model& model, const std::string& folder,
                         std::span<const std::span<const NamedParameter>> shards,
                         const std::vector<std::string>& files) {
  nlohmann::json index;
  index["weight_map"] = nlohmann::json::object();
  std::int64_t total_bytes = 0;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    for (const NamedParameter& entry : shards[i]) {
      index["weight_map"][model.file_keys(entry.path).front().key] = files[i];
      total_bytes += entry.parameter->value().bytes();
    }
  }
  index["metadata"] = {{"total_size", total_bytes}};
  return replace_file(inside(folder, kIndex), index.dump(2) + "\n");
}

// "model-00001-of-00003.safetensors" as a save writes it: other files are the user's.
bool is_shard(std::string_view file) {
  constexpr std::string_view kForm = "model-#####-of-#####.safetensors";
  return std::ranges::equal(file, kForm, [](char c, char form) {
    return form == '#' ? c >= '0' && c <= '9' : c == form;
  });
}

// Weights of an earlier save would be read in place of, or beside, the new ones.
absl::Status remove_old_weights(const std::string& folder, std::size_t shards) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string file = entry.path().filename().string();
    const bool shard = is_shard(file);
    const bool current = shard && file.ends_with(fmt::format("-of-{:05}.safetensors", shards));
    const bool old = shards == 1 ? shard || file == kIndex : file == kSingle || (shard && !current);
    if (old) {
      fs::remove(entry.path(), error);
    }
    if (error) {
      break;
    }
  }
  return error ? absl::ErrnoToStatus(error.value(), folder) : absl::OkStatus();
}

}  // namespace

absl::StatusOr<WeightFolder> WeightFolder::open(const std::string& folder) {
  WeightFolder result;
  result.folder_ = folder;
  const auto open_file = [&](const std::string& name) -> absl::StatusOr<const SafetensorsFile*> {
    absl::StatusOr<SafetensorsFile> file = SafetensorsFile::open(inside(folder, name));
    if (!file.ok()) {
      return file.status();
    }
    return result.files_.emplace_back(std::make_unique<SafetensorsFile>(*std::move(file))).get();
  };
  if (fs::exists(inside(folder, kSingle)) || !fs::exists(inside(folder, kIndex))) {
    const auto file = open_file(std::string(kSingle));
    if (!file.ok()) {
      return file.status();
    }
    for (const StoredTensor& tensor : (*file)->tensors()) {
      result.index_.emplace(tensor.name, *file);
    }
    return result;
  }

  absl::StatusOr<JsonReader> index = JsonReader::open(inside(folder, kIndex));
  if (!index.ok()) {
    return index.status();
  }
  if (!index->has("weight_map")) {
    index->refuse("weight_map", "is missing");
  }
  JsonReader map = index->object("weight_map");
  std::map<std::string, std::vector<std::string>> by_file;
  for (const std::string& name : map.keys()) {
    const std::string file = map.string(name);
    if (map.status().ok() && !is_bare(file)) {
      map.refuse(name, fmt::format("must be the name of a file in the folder, got \"{}\"", file));
    }
    by_file[file].push_back(name);
  }
  if (!map.status().ok()) {
    return map.status();
  }
  for (const auto& [name, tensors] : by_file) {
    const auto file = open_file(name);
    if (!file.ok()) {
      return file.status();
    }
    const std::set<std::string> mapped(tensors.begin(), tensors.end());
    for (const std::string& tensor : tensors) {
      if ((*file)->find(tensor) == nullptr) {
        return absl::InvalidArgumentError(
            fmt::format("{}: weight_map puts tensor \"{}\" in {}, which does not hold it",
                        inside(folder, kIndex), tensor, name));
      }
      result.index_.emplace(tensor, *file);
    }
    for (const StoredTensor& tensor : (*file)->tensors()) {
      if (!mapped.contains(tensor.name)) {
        return absl::InvalidArgumentError(fmt::format(
            "{}: holds tensor \"{}\", which weight_map {}", inside(folder, name), tensor.name,
            map.has(tensor.name) ? "puts in " + map.string(tensor.name) : "does not list"));
      }
    }
  }
  return result;
}

std::vector<std::string> WeightFolder::names() const {
  std::vector<std::string> result;
  for (const auto& [name, file] : index_) {
    result.push_back(name);
  }
  return result;
}

const SafetensorsFile* WeightFolder::find(std::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : found->second;
}

namespace {

// Where these files hold the parameter; the first place that they may when they do not.
FileKey place_in(const WeightFolder& weights, const Model& model, const std::string& path) {
  const std::vector<FileKey> places = model.file_keys(path);
  for (const FileKey& place : places) {
    if (weights.find(place.key) != nullptr) {
      return place;
    }
  }
  return places.front();
}

}  // namespace

std::string key_in(const WeightFolder& weights, const Model& model, const std::string& path) {
  const FileKey place = place_in(weights, model, path);
  return place.rows == 0 && weights.find(place.key) != nullptr ? place.key : path;
}

namespace {

// Names first, all at once, then the shape and type of each.
absl::Status check_weights(const WeightFolder& weights, Model& model) {
  std::vector<std::string> missing, unexpected;
  std::set<std::string> used;
  for (const NamedParameter& entry : weights_of_file(model)) {
    const std::string key = place_in(weights, model, entry.path).key;
    if (weights.find(key) == nullptr) {
      missing.push_back(key);
    } else {
      used.insert(key);
    }
  }
  for (const std::string& name : weights.names()) {
    const bool tied_head = model.head() == nullptr && name == "lm_head.weight";
    if (!used.contains(name) && !model.is_buffer(name) && !tied_head) {
      unexpected.push_back(name);
    }
  }
  if (!missing.empty() || !unexpected.empty()) {
    std::string text = weights.folder() + ":";
    if (!missing.empty()) {
      text +=
          fmt::format(" {} tensors are missing: {}", missing.size(), listed(missing, unexpected));
    }
    if (!unexpected.empty()) {
      text += fmt::format("{} {} tensors have no place in a {}: {}", missing.empty() ? "" : ";",
                          unexpected.size(), model.type(), listed(unexpected));
    }
    return absl::InvalidArgumentError(text);
  }
  for (const NamedParameter& entry : weights_of_file(model)) {
    const FileKey place = place_in(weights, model, entry.path);
    const Tensor& value = entry.parameter->value();
    const Shape shape = place.rows > 0 ? value.shape().with(0, place.rows) : value.shape();
    const absl::Status status =
        weights.find(place.key)->read_into(place.key, Tensor::empty(shape, value.dtype(), meta));
    if (!status.ok()) {
      return status;
    }
  }
  return absl::OkStatus();
}

// A view over a mapped file that the allocator counts as a parameter's memory, which it is.
class CountedView {
 public:
  explicit CountedView(Tensor view) : view_(std::move(view)) {
    allocator(cpu).allocate(bytes(), MemoryKind::parameters, /*real=*/false, segment_, number_);
  }
  ~CountedView() {
    allocator(cpu).free(nullptr, bytes(), MemoryKind::parameters, segment_, number_);
  }
  CountedView(const CountedView&) = delete;

  static Tensor of(Tensor view) {
    const auto owner = std::make_shared<CountedView>(std::move(view));
    const Tensor& counted = owner->view_;
    return Tensor::wrap(counted.numel() > 0 ? counted.raw() : nullptr, counted.shape(),
                        counted.dtype(), cpu, owner);
  }

 private:
  std::size_t bytes() const { return static_cast<std::size_t>(view_.bytes()); }

  Tensor view_;
  std::uint32_t segment_ = 0;
  std::uint64_t number_ = 0;
};

// Of a folder that was checked.
absl::Status read_weights(const WeightFolder& weights, Model& model, bool map) {
  for (const NamedParameter& entry : weights_of_file(model)) {
    const FileKey place = place_in(weights, model, entry.path);
    const SafetensorsFile& file = *weights.find(place.key);
    Parameter& parameter = *entry.parameter;
    const bool in_place = map && parameter.value().device() == cpu && file.in_place(place.key) &&
                          file.find(place.key)->type == stored_type(parameter.value().dtype());
    if (in_place) {
      const Tensor whole = *file.read(place.key);
      const std::int64_t end = place.first + (place.rows > 0 ? parameter.shape()[0] : 0);
      parameter.bind_value(
          CountedView::of(place.rows > 0 ? whole.slice(0, place.first, end) : whole));
      continue;
    }
    const absl::Status status = place.rows > 0
                                    ? file.read_rows_into(place.key, place.first, parameter.write())
                                    : file.read_into(place.key, parameter.write());
    if (!status.ok()) {
      return status;
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status read_elements(const WeightFolder& weights, const Model& model, const std::string& path,
                           std::int64_t first, const Tensor& to) {
  const PhaseScope phase(Phase::loading);
  const FileKey place = place_in(weights, model, path);
  const SafetensorsFile* const file = weights.find(place.key);
  if (file == nullptr) {
    return absl::NotFoundError(
        fmt::format("{}: there is no tensor \"{}\"", weights.folder(), place.key));
  }
  const std::vector<std::uint64_t>& shape = file->find(place.key)->shape;
  std::int64_t row = 1;  // elements of a row of the larger tensor
  for (std::size_t dim = 1; place.rows > 0 && dim < shape.size(); ++dim) {
    row *= static_cast<std::int64_t>(shape[dim]);
  }
  return file->read_elements_into(place.key, place.first * row + first, to);
}

absl::Status load_weights(const std::string& folder, Model& model, bool map) {
  const PhaseScope phase(Phase::loading);
  const absl::StatusOr<WeightFolder> weights = WeightFolder::open(folder);
  if (!weights.ok()) {
    return weights.status();
  }
  const absl::Status status = check_weights(*weights, model);
  return status.ok() ? read_weights(*weights, model, map) : status;
}

namespace {

// Of a tensor that a parameter may be: sizes of other files are anything.
std::optional<Shape> shape_in(const WeightFolder& weights, const std::string& name) {
  const SafetensorsFile* const file = weights.find(name);
  const StoredTensor* const tensor = file != nullptr ? file->find(name) : nullptr;
  if (tensor == nullptr || tensor->shape.size() > static_cast<std::size_t>(Shape::kMaxRank)) {
    return std::nullopt;
  }
  const std::vector<std::int64_t> sizes(tensor->shape.begin(), tensor->shape.end());
  const bool small = std::ranges::all_of(
      sizes, [](std::int64_t size) { return size >= 0 && size <= std::int64_t{1} << 32; });
  return small ? std::optional<Shape>(std::span<const std::int64_t>(sizes)) : std::nullopt;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> load_model(const std::string& folder,
                                                  const LoadOptions& options) {
  const PhaseScope phase(Phase::loading);
  absl::StatusOr<JsonReader> config = JsonReader::open(inside(folder, "config.json"));
  if (!config.ok()) {
    return config.status();
  }
  const absl::StatusOr<WeightFolder> weights = WeightFolder::open(folder);
  if (weights.ok()) {
    config->set_shapes([&](const std::string& name) { return shape_in(*weights, name); });
  }
  try {
    // Without memory first: sizes that the files do not have are refused before anything is
    // allocated for them.
    absl::StatusOr<std::unique_ptr<Model>> shapes =
        build_model(*config, {meta, options.place.dtype});
    if (!shapes.ok()) {
      return shapes;
    }
    if (!weights.ok()) {
      return weights.status();
    }
    absl::Status status = check_weights(*weights, **shapes);
    if (!status.ok()) {
      return status;
    }
    if (!options.values) {
      for (Parameter* p : (*shapes)->parameters()) {
        Tensor layout = Tensor::wrap(nullptr, p->shape(), p->dtype(), options.place.device);
        layout.drop_storage();
        p->bind_value(std::move(layout));
      }
      return shapes;
    }
    absl::StatusOr<std::unique_ptr<Model>> model = build_model(*config, options.place);
    status = model.ok() ? read_weights(*weights, **model, options.map) : model.status();
    return status.ok() ? std::move(model) : status;
  } catch (const Error& error) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", folder, error.what()));
  } catch (const std::bad_alloc&) {
    return absl::InvalidArgumentError(folder + ": there is not enough memory for the model");
  }
}

std::vector<NamedParameter> save_order(Model& model, const SaveOptions& options) {
  const std::vector<NamedParameter> entries = weights_of_file(model);
  std::vector<NamedParameter> order;
  for (const auto& shard : split(entries, options.max_shard_bytes)) {
    for (const std::size_t i : write_order(layouts_of(model, shard))) {
      order.push_back(shard[i]);
    }
  }
  return order;
}

absl::Status save_model(Model& model, const std::string& folder, const SaveOptions& options) {
  const PhaseScope phase(Phase::saving);
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) {
    return absl::ErrnoToStatus(error.value(), folder);
  }
  if (options.verify && options.one_by_one) {
    return absl::InvalidArgumentError("verify and one_by_one exclude each other");
  }
  const std::vector<NamedParameter> entries = weights_of_file(model);
  const auto own = [&](const NamedParameter& entry) {
    return model.adapters().base_value(*entry.parameter);
  };
  const auto value = options.value ? options.value : own;
  const auto shards = split(entries, options.max_shard_bytes);
  std::vector<std::string> files;
  absl::Status status;
  for (std::size_t i = 0; i < shards.size() && status.ok(); ++i) {
    files.push_back(shards.size() == 1
                        ? std::string(kSingle)
                        : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size()));
    status = write_shard(model, inside(folder, files.back()), shards[i], value, options);
  }
  if (status.ok() && shards.size() > 1) {
    status = write_index(model, folder, shards, files);
  }
  if (status.ok()) {
    const DType dtype = entries.empty() ? DType::f32 : entries.front().parameter->dtype();
    status =
        replace_file(inside(folder, "config.json"), config_with_dtype(model.config_json(), dtype));
  }
  return status.ok() ? remove_old_weights(folder, shards.size()) : status;
}

}  // namespace reprise::nn
