// Reading JSON that came from outside. The first problem sticks, with file, key, what was expected
// and what was there; what is read after it has no meaning. So: read everything, then ask status()
// once.
//
//   absl::StatusOr<JsonReader> json = JsonReader::open("model/config.json");
//   const std::int64_t layers = json->integer("n_layer", 12);
//   if (!json->status().ok()) ...   // "model/config.json: n_layer must be a whole number, got
//   "12""
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/shape.h"

namespace reprise::nn {

class JsonReader {
 public:
  // The file must hold one object.
  static absl::StatusOr<JsonReader> open(const std::string& path);
  // `path` is for messages.
  static absl::StatusOr<JsonReader> parse(const std::string& text, const std::string& path);

  // Shared by an object and its children.
  const absl::Status& status() const { return document_->status; }
  const std::string& path() const { return document_->path; }
  // The document, keys in byte order.
  std::string text() const { return document_->root.dump(2) + "\n"; }

  // True when the key is there and not null.
  bool has(std::string_view key) const;
  // True when the key is there, as null.
  bool is_null(std::string_view key) const;
  std::vector<std::string> keys() const;

  // Without `otherwise` an absent key is an error; null counts as absent.
  std::int64_t integer(std::string_view key, std::optional<std::int64_t> otherwise = {});
  // As integer; an error below `least`.
  std::int64_t integer_from(std::int64_t least, std::string_view key,
                            std::optional<std::int64_t> otherwise = {});
  // As integer; an error outside of [least, most].
  std::int64_t integer_between(std::int64_t least, std::int64_t most, std::string_view key,
                               std::optional<std::int64_t> otherwise = {});
  double number(std::string_view key, std::optional<double> otherwise = {});
  bool boolean(std::string_view key, std::optional<bool> otherwise = {});
  std::string string(std::string_view key, std::optional<std::string> otherwise = {});
  std::vector<std::string> strings(std::string_view key,
                                   std::optional<std::vector<std::string>> otherwise = {});
  std::vector<std::int64_t> integers(std::string_view key,
                                     std::optional<std::vector<std::int64_t>> otherwise = {});
  // A nested object; an empty one when absent.
  JsonReader object(std::string_view key);
  // For values of several kinds; null when absent.
  const nlohmann::json& value(std::string_view key) const;

  // The shapes of the weights that a config came with: some sizes of a model stand nowhere else.
  using Shapes = std::function<std::optional<Shape>(const std::string& tensor)>;
  void set_shapes(Shapes shapes) { document_->shapes = std::move(shapes); }
  bool has_shapes() const { return document_->shapes != nullptr; }
  // Nothing when there is no such tensor, or the config came alone.
  std::optional<Shape> stored_shape(const std::string& tensor) const {
    return has_shapes() ? document_->shapes(tensor) : std::nullopt;
  }

  // Notes a problem of this key: "FILE: KEY WHAT".
  void refuse(std::string_view key, std::string_view what);

 private:
  struct Document {
    std::string path;
    nlohmann::json root;
    absl::Status status;
    Shapes shapes;
  };
  JsonReader(std::shared_ptr<Document> document, const nlohmann::json* at, std::string prefix)
      : document_(std::move(document)), at_(at), prefix_(std::move(prefix)) {}
  // The value, or null after noting what is wrong with it.
  const nlohmann::json* get(std::string_view key, bool may_be_absent, std::string_view expected,
                            bool (*fits)(const nlohmann::json&));

  std::shared_ptr<Document> document_;
  const nlohmann::json* at_;
  std::string prefix_;
};

}  // namespace reprise::nn
