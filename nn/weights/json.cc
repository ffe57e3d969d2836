#include "nn/weights/json.h"

#include <limits>

#include <fmt/format.h>

#include "nn/weights/replace_file.h"

namespace reprise::nn {
namespace {

using nlohmann::json;

const json kNull;

std::string cut(std::string_view text) {
  return text.size() > 60 ? std::string(text.substr(0, 57)) + "..." : std::string(text);
}

// Values as the file has them, long ones cut.
std::string shown(const json& value) {
  return cut(value.dump(-1, ' ', false, json::error_handler_t::replace));
}

bool is_whole(const json& value) {
  return value.is_number_integer() &&
         (!value.is_number_unsigned() ||
          value.get<std::uint64_t>() <=
              static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()));
}

// Nesting that would overflow the stack when the values are freed or printed.
constexpr int kMaxDepth = 128;

}  // namespace

absl::StatusOr<JsonReader> JsonReader::open(const std::string& path) {
  std::string text;
  const absl::Status status = read_file(path, text);
  return status.ok() ? parse(text, path) : absl::StatusOr<JsonReader>(status);
}

absl::StatusOr<JsonReader> JsonReader::parse(const std::string& text, const std::string& path) {
  auto document = std::make_shared<Document>();
  document->path = path;
  bool too_deep = false;
  try {
    document->root =
        json::parse(text.begin(), text.end(), [&](int depth, json::parse_event_t, json&) {
          too_deep = too_deep || depth > kMaxDepth;
          return !too_deep;
        });
  } catch (const json::out_of_range& error) {
    // "... number overflow parsing '1e400'"
    const std::string_view text_of = error.what();
    const std::size_t quote = text_of.find('\'');
    return absl::InvalidArgumentError(
        fmt::format("{}: the number {} is too large", path,
                    quote == std::string_view::npos ? "there" : cut(text_of.substr(quote))));
  } catch (const json::exception& error) {
    const auto* const where = dynamic_cast<const json::parse_error*>(&error);
    return absl::InvalidArgumentError(
        fmt::format("{}: byte {}: not valid JSON", path, where != nullptr ? where->byte : 0));
  }
  if (too_deep) {
    return absl::InvalidArgumentError(path + ": nested too deep");
  }
  if (!document->root.is_object()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: must hold an object, got {}", path, shown(document->root)));
  }
  const json* const root = &document->root;
  return JsonReader(std::move(document), root, "");
}

bool JsonReader::has(std::string_view key) const {
  return !value(key).is_null();
}

bool JsonReader::is_null(std::string_view key) const {
  const auto found = at_->find(std::string(key));
  return found != at_->end() && found->is_null();
}

std::vector<std::string> JsonReader::keys() const {
  std::vector<std::string> result;
  for (const auto& item : at_->items()) {
    result.push_back(item.key());
  }
  return result;
}

const json& JsonReader::value(std::string_view key) const {
  const auto found = at_->find(std::string(key));
  return found == at_->end() ? kNull : *found;
}

void JsonReader::refuse(std::string_view key, std::string_view what) {
  if (document_->status.ok()) {
    document_->status =
        absl::InvalidArgumentError(fmt::format("{}: {}{} {}", document_->path, prefix_, key, what));
  }
}

const json* JsonReader::get(std::string_view key, bool may_be_absent, std::string_view expected,
                            bool (*fits)(const json&)) {
  const json& found = value(key);
  if (found.is_null()) {
    if (!may_be_absent) {
      refuse(key, "is missing");
    }
    return nullptr;
  }
  if (!fits(found)) {
    refuse(key, fmt::format("must be {}, got {}", expected, shown(found)));
    return nullptr;
  }
  return &found;
}

std::int64_t JsonReader::integer(std::string_view key, std::optional<std::int64_t> otherwise) {
  const json* const found = get(key, otherwise.has_value(), "a whole number", is_whole);
  return found != nullptr ? found->get<std::int64_t>() : otherwise.value_or(0);
}

std::int64_t JsonReader::integer_from(std::int64_t least, std::string_view key,
                                      std::optional<std::int64_t> otherwise) {
  const std::int64_t result = integer(key, otherwise);
  if (document_->status.ok() && result < least) {
    refuse(key, fmt::format("must be at least {}, got {}", least, result));
  }
  return result;
}

std::int64_t JsonReader::integer_between(std::int64_t least, std::int64_t most,
                                         std::string_view key,
                                         std::optional<std::int64_t> otherwise) {
  const std::int64_t result = integer_from(least, key, otherwise);
  if (document_->status.ok() && result > most) {
    refuse(key, fmt::format("must be at most {}, got {}", most, result));
  }
  return result;
}

double JsonReader::number(std::string_view key, std::optional<double> otherwise) {
  const json* const found = get(key, otherwise.has_value(), "a number",
                                [](const json& value) { return value.is_number(); });
  return found != nullptr ? found->get<double>() : otherwise.value_or(0);
}

bool JsonReader::boolean(std::string_view key, std::optional<bool> otherwise) {
  const json* const found = get(key, otherwise.has_value(), "true or false",
                                [](const json& value) { return value.is_boolean(); });
  return found != nullptr ? found->get<bool>() : otherwise.value_or(false);
}

std::string JsonReader::string(std::string_view key, std::optional<std::string> otherwise) {
  const json* const found = get(key, otherwise.has_value(), "a string",
                                [](const json& value) { return value.is_string(); });
  return found != nullptr ? found->get<std::string>() : otherwise.value_or("");
}

std::vector<std::string> JsonReader::strings(std::string_view key,
                                             std::optional<std::vector<std::string>> otherwise) {
  const json* const found =
      get(key, otherwise.has_value(), "a list of strings", [](const json& value) {
        return value.is_array() && std::all_of(value.begin(), value.end(),
                                               [](const json& item) { return item.is_string(); });
      });
  return found != nullptr ? found->get<std::vector<std::string>>()
                          : otherwise.value_or(std::vector<std::string>{});
}

std::vector<std::int64_t> JsonReader::integers(std::string_view key,
                                               std::optional<std::vector<std::int64_t>> otherwise) {
  const json* const found =
      get(key, otherwise.has_value(), "a list of whole numbers", [](const json& value) {
        return value.is_array() && std::all_of(value.begin(), value.end(), is_whole);
      });
  return found != nullptr ? found->get<std::vector<std::int64_t>>()
                          : otherwise.value_or(std::vector<std::int64_t>{});
}

JsonReader JsonReader::object(std::string_view key) {
  static const json kEmpty = json::object();
  const json* const found =
      get(key, true, "an object", [](const json& value) { return value.is_object(); });
  return JsonReader(document_, found != nullptr ? found : &kEmpty,
                    fmt::format("{}{}.", prefix_, key));
}

}  // namespace reprise::nn
