#include "train/parity.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "autograd/tape.h"
#include "core/error.h"
#include "nn/lora.h"
#include "nn/optimizer/adamw.h"
#include "nn/weights/folder.h"
#include "nn/weights/json.h"
#include "nn/weights/safetensors.h"
#include "train/digest.h"
#include "train/on_device.h"

namespace reprise::train {
namespace {

using nn::SafetensorsFile;

constexpr std::int64_t kUsualSteps = 5;

struct Optimizer {
  double rate = 0, beta1 = 0, beta2 = 0, epsilon = 0, decay = 0;
};

struct Case {
  std::string folder;
  std::unique_ptr<SafetensorsFile> file;
  nn::Batch batch;
  std::optional<Optimizer> optimizer;
  std::int64_t steps = kUsualSteps;

  const std::string& path() const { return file->path(); }
  std::string metadata(const std::string& key) const {
    const auto found = file->metadata().find(key);
    return found == file->metadata().end() ? "" : found->second;
  }
};

// The parameters under the keys of their gradients.
struct Subject {
  std::unique_ptr<nn::Model> model;
  std::map<std::string, Parameter*> gradients;
};

using Values = std::map<std::string, Tensor>;

// What each input must be; [B, T] is that of in.input_ids.
struct Input {
  std::string_view key;
  Tensor nn::Batch::*to;
  DType dtype;
  bool tokens;  // [B, T], or [3, B, T] for positions
  std::string_view expected;
};
constexpr Input kInputs[] = {
    {"in.input_ids", &nn::Batch::ids, DType::i64, true, "i64 [B, T]"},
    {"in.labels", &nn::Batch::labels, DType::i64, true, "i64 [B, T]"},
    {"in.attention_mask", &nn::Batch::mask, DType::i64, true, "i64 [B, T]"},
    {"in.position_ids", &nn::Batch::positions, DType::i64, true, "i64 [B, T] or [3, B, T]"},
    {"in.im_mask", &nn::Batch::image_tokens, DType::i64, true, "i64 [B, T]"},
    {"in.pixel_values", &nn::Batch::pixels, DType::f32, false, "f32"},
    {"in.image_grid_thw", &nn::Batch::grids, DType::i64, false, "i64 [images, 3]"},
};

bool fits(const Input& input, const Tensor& tensor, const std::optional<Shape>& tokens) {
  if (tensor.dtype() != input.dtype) {
    return false;
  }
  if (!input.tokens) {
    return input.to != &nn::Batch::grids || (tensor.rank() == 2 && tensor.size(1) == 3);
  }
  if (!tokens) {
    return tensor.rank() == 2;
  }
  const bool three = input.to == &nn::Batch::positions && tensor.rank() == 3;
  return tensor.shape() == (three ? Shape{3, (*tokens)[0], (*tokens)[1]} : *tokens);
}

absl::Status read_inputs(Case& result) {
  const SafetensorsFile& file = *result.file;
  for (const nn::StoredTensor& stored : file.tensors()) {
    const bool known =
        std::ranges::any_of(kInputs, [&](const Input& input) { return input.key == stored.name; });
    if (stored.name.starts_with("in.") && !known) {
      return absl::UnimplementedError(
          fmt::format("{}: {} is not an input that any model takes", file.path(), stored.name));
    }
  }
  std::optional<Shape> tokens;  // input_ids come first in the table
  for (const Input& input : kInputs) {
    if (file.find(std::string(input.key)) == nullptr) {
      continue;
    }
    const absl::StatusOr<Tensor> tensor = file.read(std::string(input.key));
    if (!tensor.ok()) {
      return tensor.status();
    }
    if (!fits(input, *tensor, tokens)) {
      return absl::InvalidArgumentError(
          fmt::format("{}: {} must be {}{}, got {} {}", file.path(), input.key, input.expected,
                      input.tokens && tokens ? " = " + to_string(*tokens) : "",
                      name(tensor->dtype()), to_string(tensor->shape())));
    }
    result.batch.*input.to = *tensor;
    if (input.to == &nn::Batch::ids) {
      tokens = tensor->shape();
    }
  }
  if (!result.batch.ids.defined() && !result.batch.pixels.defined()) {
    return absl::InvalidArgumentError(file.path() +
                                      ": has neither in.input_ids nor in.pixel_values");
  }
  return absl::OkStatus();
}

absl::Status read_optimizer(Case& result) {
  const std::string text = result.metadata("optimizer");
  if (text.empty()) {
    if (result.file->find("steps.loss") != nullptr) {
      return absl::InvalidArgumentError(result.path() +
                                        ": has steps.loss but no \"optimizer\" in its metadata");
    }
    return absl::OkStatus();
  }
  absl::StatusOr<nn::JsonReader> json =
      nn::JsonReader::parse(text, result.path() + ": metadata \"optimizer\"");
  if (!json.ok()) {
    return json.status();
  }
  const nlohmann::json& betas = json->value("betas");
  const bool pair =
      betas.is_array() && betas.size() == 2 && betas[0].is_number() && betas[1].is_number();
  if (!pair) {
    json->refuse("betas", "must be two numbers, got " + betas.dump());
    return json->status();
  }
  result.optimizer = Optimizer{json->number("lr"), betas[0].get<double>(), betas[1].get<double>(),
                               json->number("eps"), json->number("weight_decay")};
  const std::string steps = result.metadata("steps");
  if (!steps.empty()) {
    const bool digits =
        steps.size() < 7 && steps.find_first_not_of("0123456789") == std::string::npos;
    if (!digits) {
      return absl::InvalidArgumentError(
          fmt::format("{}: metadata \"steps\" must be a number, got \"{}\"", result.path(), steps));
    }
    result.steps = std::stoll(steps);
  }
  return json->status();
}

absl::StatusOr<Case> read_case(const std::string& folder) {
  absl::StatusOr<SafetensorsFile> file =
      SafetensorsFile::open((std::filesystem::path(folder) / "parity.safetensors").string());
  if (!file.ok()) {
    return file.status();
  }
  Case result;
  result.folder = folder;
  result.file = std::make_unique<SafetensorsFile>(*std::move(file));
  absl::Status status = read_inputs(result);
  if (status.ok()) {
    status = read_optimizer(result);
  }
  if (status.ok() && result.metadata("train") == "true") {
    status = absl::UnimplementedError(
        result.path() + ": was made with dropout on, whose random numbers cannot agree");
  }
  if (!status.ok()) {
    return status;
  }
  return result;
}

absl::StatusOr<Subject> load_subject(const Case& parity, nn::Place place) {
  absl::StatusOr<std::unique_ptr<nn::Model>> model =
      nn::load_model(parity.folder, {.place = place});
  if (!model.ok()) {
    return model.status();
  }
  Subject result{*std::move(model), {}};
  const std::filesystem::path adapter = std::filesystem::path(parity.folder) / "adapter";
  if (std::filesystem::exists(adapter)) {
    const absl::StatusOr<nn::LoraConfig> config = nn::load_adapter(*result.model, adapter.string());
    if (!config.ok()) {
      return config.status();
    }
    for (const nn::NamedParameter& entry : nn::adapter_parameters(*result.model)) {
      result.gradients.emplace("grad." + entry.path, entry.parameter);
    }
    return result;
  }
  const absl::StatusOr<nn::WeightFolder> weights = nn::WeightFolder::open(parity.folder);
  if (!weights.ok()) {
    return weights.status();
  }
  for (const nn::NamedParameter& entry : result.model->named_parameters()) {
    result.gradients.emplace("grad." + nn::key_in(*weights, *result.model, entry.path),
                             entry.parameter);
  }
  return result;
}

// Loss, and gradients left in the parameters.
Tensor forward_backward(Subject& subject, const nn::Batch& batch, const std::string& policy) {
  for (const auto& [key, parameter] : subject.gradients) {
    parameter->zero_gradient();
  }
  Tape tape;
  const Tape::Scope scope(tape, Policies::named(policy));
  const Variable loss = subject.model->loss(batch);
  const Tensor value = loss.tensor().to(cpu).clone();
  backward(loss);
  return value;
}

void add_gradients(const Subject& subject, Values& values) {
  for (const auto& [key, parameter] : subject.gradients) {
    if (parameter->has_gradient()) {
      values[key] = parameter->gradient().to(cpu).clone();
    }
  }
}

std::vector<float> step_losses(Subject& subject, const Case& parity, const nn::Batch& batch,
                               const std::string& policy) {
  const Optimizer& o = *parity.optimizer;
  nn::AdamW optimizer(
      subject.model->trainable_parameters(),
      {.beta1 = o.beta1, .beta2 = o.beta2, .epsilon = o.epsilon, .weight_decay = o.decay});
  std::vector<float> losses;
  for (std::int64_t step = 0; step < parity.steps; ++step) {
    losses.push_back(forward_backward(subject, batch, policy).item<float>());
    optimizer.step(o.rate);
  }
  return losses;
}

std::vector<double> doubles(const Tensor& tensor) {
  if (tensor.dtype() == DType::bf16) {
    std::vector<double> result;
    for (const bfloat16 x : tensor.to_vector<bfloat16>()) {
      result.push_back(static_cast<double>(to_float(x)));
    }
    return result;
  }
  const std::vector<float> values = tensor.to_vector<float>();
  return {values.begin(), values.end()};
}

// Rows of tokens that are padding become zero on both sides.
void drop_padding(std::vector<double>& values, const Tensor& mask) {
  if (!mask.defined() || mask.numel() == 0) {
    return;
  }
  const std::vector<std::int64_t> tokens = mask.to_vector<std::int64_t>();
  const std::size_t width = values.size() / tokens.size();
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    if (tokens[t] == 0) {
      std::fill_n(values.begin() + static_cast<std::ptrdiff_t>(t * width), width, 0.0);
    }
  }
}

double tolerance_of(std::string_view key, DType dtype) {
  if (key.starts_with("grad.")) {
    return dtype == DType::f32 ? 1e-4 : 0.15;
  }
  return dtype != DType::f32 ? 3e-2 : key == "steps.loss" ? 1e-4 : 1e-5;
}

void judge(ParityRow& row) {
  const double error = row.zero ? row.absolute : row.relative;
  row.within = error <= row.tolerance;  // also false for NaN
}

ParityRow compared(const std::string& key, std::vector<double> ours, std::vector<double> theirs,
                   double tolerance) {
  ParityRow row{.key = key, .tolerance = tolerance};
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const double error = ours[i] - theirs[i];
    // A NaN must stay: max() would drop it.
    row.absolute = std::isnan(error) ? error : std::max(row.absolute, std::abs(error));
    difference += error * error;
    norm += theirs[i] * theirs[i];
  }
  row.zero = norm == 0;
  row.relative = std::sqrt(difference / (row.zero ? 1 : norm));
  judge(row);
  return row;
}

// Each loss by itself; the row shows the worst.
ParityRow compared_each(const std::string& key, const std::vector<double>& ours,
                        const std::vector<double>& theirs, double tolerance) {
  ParityRow row{.key = key, .tolerance = tolerance, .within = true};
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const ParityRow one = compared(key, {ours[i]}, {theirs[i]}, tolerance);
    row.within = row.within && one.within;
    row.absolute = std::isnan(one.absolute) ? one.absolute : std::max(row.absolute, one.absolute);
    row.relative = std::isnan(one.relative) ? one.relative : std::max(row.relative, one.relative);
  }
  return row;
}

absl::StatusOr<ParityRow> compare(const Case& parity, const std::string& key, const Values& values,
                                  DType dtype) {
  const double tolerance = tolerance_of(key, dtype);
  absl::StatusOr<Tensor> theirs = parity.file->read(key);
  if (!theirs.ok()) {
    return theirs.status();
  }
  if (theirs->dtype() != DType::f32) {
    return absl::InvalidArgumentError(
        fmt::format("{}: {} must be f32, got {}", parity.path(), key, name(theirs->dtype())));
  }
  const auto found = values.find(key);
  if (found == values.end()) {
    const double none = std::numeric_limits<double>::infinity();
    return ParityRow{.key = key, .absolute = none, .relative = none, .tolerance = tolerance};
  }
  const Tensor& ours = found->second;
  if (ours.shape() != theirs->shape()) {
    return absl::InvalidArgumentError(fmt::format("{}: {} must have shape {}, got {}",
                                                  parity.path(), key, to_string(ours.shape()),
                                                  to_string(theirs->shape())));
  }
  std::vector<double> a = doubles(ours), b = doubles(*theirs);
  // In bf16 they are one tensor: the noise of a single step's loss is larger than what is allowed.
  if (key == "steps.loss" && dtype == DType::f32) {
    return compared_each(key, a, b, tolerance);
  }
  if (key == "out.logits") {
    drop_padding(a, parity.batch.mask);
    drop_padding(b, parity.batch.mask);
  }
  return compared(key, std::move(a), std::move(b), tolerance);
}

std::string digest_of(const Values& values) {
  Digest digest;
  for (const auto& [key, tensor] : values) {
    digest.add(key, tensor);
  }
  return digest.text();
}

// The first key at which they differ by a bit; empty when they do not.
std::string first_difference(const Values& a, const Values& b) {
  for (const auto& [key, tensor] : a) {
    const auto found = b.find(key);
    const bool same =
        found != b.end() && found->second.bytes() == tensor.bytes() &&
        (tensor.numel() == 0 || std::memcmp(tensor.raw(), found->second.raw(),
                                            static_cast<std::size_t>(tensor.bytes())) == 0);
    if (!same) {
      return key;
    }
  }
  for (const auto& [key, tensor] : b) {
    if (!a.contains(key)) {
      return key;
    }
  }
  return "";
}

// Loss and gradients under each policy, the first of which are also the values to compare.
void run_policies(Subject& subject, const nn::Batch& batch, const ParityOptions& options,
                  Values& values, ParityReport& report) {
  std::vector<std::string> policies{options.policy};
  if (options.every_policy) {
    policies = Policies::names();
  }
  Values first;
  for (const std::string& policy : policies) {
    Values run;
    run["out.loss"] = forward_backward(subject, batch, policy);
    add_gradients(subject, run);
    if (first.empty()) {
      first = run;
    }
    const std::string difference = first_difference(first, run);
    report.policies.push_back({policy, digest_of(run), difference.empty(), difference});
  }
  values.insert(first.begin(), first.end());
}

absl::Status compute(const Case& parity, Subject& subject, const ParityOptions& options,
                     Values& values, ParityReport& report) {
  const bool all = !options.write.empty();
  const auto asked = [&](const std::string& prefix) {
    const auto& tensors = parity.file->tensors();
    return all || std::any_of(tensors.begin(), tensors.end(), [&](const nn::StoredTensor& tensor) {
             return tensor.name.starts_with(prefix);
           });
  };
  try {
    const nn::Batch batch = on(parity.batch, options.device);
    if (asked("out.")) {
      for (const nn::NamedOutput& output : subject.model->outputs(batch)) {
        values["out." + output.name] = output.value.tensor().to(cpu);
      }
    }
    if (subject.model->has_loss(batch)) {
      run_policies(subject, batch, options, values, report);
      if (asked("steps.loss") && parity.optimizer) {
        const std::vector<float> losses = step_losses(subject, parity, batch, options.policy);
        values["steps.loss"] =
            Tensor::from(losses, Shape{static_cast<std::int64_t>(losses.size())});
      }
    }
  } catch (const Error& mistake) {
    return absl::InvalidArgumentError(fmt::format("{}: {}", parity.path(), mistake.what()));
  }
  return absl::OkStatus();
}

absl::Status write_values(const std::string& path, const Case& parity, const Values& values) {
  std::vector<nn::NamedTensor> tensors;
  for (const auto& [key, tensor] : values) {
    const std::vector<double> wide = doubles(tensor);
    tensors.push_back(
        {key, Tensor::from(std::vector<float>(wide.begin(), wide.end()), tensor.shape())});
  }
  nn::Metadata metadata = parity.file->metadata();
  metadata["format"] = "pt";
  metadata["reference"] = "Reprise";
  return nn::write_safetensors(path, tensors, metadata);
}

// Rows by how many tolerances they are off; what is not a number first.
double badness(const ParityRow& row) {
  const double error = (row.zero ? row.absolute : row.relative) / row.tolerance;
  return std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
}

}  // namespace

absl::StatusOr<ParityReport> run_parity(const std::string& folder, const ParityOptions& options) {
  const absl::Status usable = expect_usable(options.device);
  if (!usable.ok()) {
    return usable;
  }
  const absl::StatusOr<Case> parity = read_case(folder);
  if (!parity.ok()) {
    return parity.status();
  }
  absl::StatusOr<Subject> subject = load_subject(*parity, {options.device, options.dtype});
  if (!subject.ok()) {
    return subject.status();
  }
  ParityReport report{.folder = folder,
                      .name = parity->metadata("case"),
                      .reference = parity->metadata("reference"),
                      .device = options.device,
                      .dtype = options.dtype,
                      .rows = {},
                      .policies = {}};
  Values values;
  absl::Status status = compute(*parity, *subject, options, values, report);
  for (const nn::StoredTensor& stored : parity->file->tensors()) {
    if (!status.ok()) {
      return status;
    }
    if (stored.name.starts_with("in.")) {
      continue;
    }
    absl::StatusOr<ParityRow> row = compare(*parity, stored.name, values, options.dtype);
    status = row.status();
    if (row.ok()) {
      report.rows.push_back(*std::move(row));
    }
  }
  if (status.ok() && !options.write.empty()) {
    status = write_values(options.write, *parity, values);
  }
  if (!status.ok()) {
    return status;
  }
  std::stable_sort(report.rows.begin(), report.rows.end(),
                   [](const ParityRow& a, const ParityRow& b) { return badness(a) > badness(b); });
  return report;
}

}  // namespace reprise::train
