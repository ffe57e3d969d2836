// Model folders as the Hugging Face libraries write and read them:
//
//   config.json
//   model.safetensors, or model.safetensors.index.json and its shards
//
//   auto model = load_model("qwen2-0.5b", {.place = {cpu, DType::bf16}});
//   absl::Status saved = save_model(**model, "out");
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nn/models/model.h"
#include "nn/weights/safetensors.h"

namespace reprise::nn {

// The tensors of a folder, in one file or many.
class WeightFolder {
 public:
  // Reads DIR/model.safetensors, or the index and every shard. Checks that each file of the index
  // is a bare name inside of the folder, that each tensor is in the file it is said to be in, and
  // in no other.
  static absl::StatusOr<WeightFolder> open(const std::string& folder);

  const std::string& folder() const { return folder_; }
  // In byte order.
  std::vector<std::string> names() const;
  // Null when there is no tensor of that name.
  const SafetensorsFile* find(std::string_view name) const;

 private:
  std::string folder_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, const SafetensorsFile*, std::less<>> index_;
};

struct LoadOptions {
  Place place{};  // the parameters get this type whatever the file holds
  // Parameters of the file's own type stay in the mapped file (on cpu): nothing is read before it
  // is used, processes on one machine share what none of them writes, and writing does not change
  // the file; the allocator counts them as any others. Until it is written to, though, such a
  // parameter is the file: while the model lives the file must not be written to in place
  // (nn/weights/safetensors.h); another file may take its place. False: a copy.
  bool map = true;
  // Without values: the parameters have shape, dtype and device but no memory, and what is in the
  // files is only checked. For who reads parts of it (distributed/sharded_folder.h).
  bool values = true;
};

// A finished model, all parameters trainable. Every tensor must have its place and every parameter
// its tensor; what is missing and what is unexpected is told at once. Known buffers of old files
// and the head of a tied model are passed over.
absl::StatusOr<std::unique_ptr<Model>> load_model(const std::string& folder,
                                                  const LoadOptions& options = {});
// The parameters of DIR into a model that was built already.
absl::Status load_weights(const std::string& folder, Model& model, bool map = true);

// Elements [first, first + n) in row-major order of the parameter at `path`, into `to` [n]. The
// folder must have been checked, as load_model does.
absl::Status read_elements(const WeightFolder& weights, const Model& model, const std::string& path,
                           std::int64_t first, const Tensor& to);

struct SaveOptions {
  std::int64_t max_shard_bytes = 5'000'000'000;
  // What is written for a parameter, of its shape and dtype; by default the model's own value. It
  // is asked for a file at a time, or with `one_by_one`, which excludes `verify`, for a parameter
  // at a time in save_order().
  std::function<Tensor(const NamedParameter&)> value;
  bool one_by_one = false;
  // Every file is read again after it was written, and compared bit by bit.
  bool verify = false;
};

// Writes config.json and the weights, in shards when they exceed one. A folder that is there is
// overwritten file by file; no reader sees half a file. Adapters, and what they train besides, are
// not written (see nn/lora.h); one that is merged is in the weights.
absl::Status save_model(Model& model, const std::string& folder, const SaveOptions& options = {});

// Those that save_model writes, in the order in which it asks for them one by one.
std::vector<NamedParameter> save_order(Model& model, const SaveOptions& options = {});

// The key of the parameter at `path` in these files: that of model.file_keys() which they have. The
// path itself when they have none, or hold the parameter as rows of a larger tensor.
std::string key_in(const WeightFolder& weights, const Model& model, const std::string& path);

}  // namespace reprise::nn
