// What an adapter is, in the terms of PEFT's adapter_config.json.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace reprise::nn {

// Module paths by PEFT's rules: an entry of the list is the path or ends it after a dot; the regex
// matches the whole path.
struct ModulePattern {
  std::vector<std::string> names;
  std::string regex;
  bool empty() const { return names.empty() && regex.empty(); }
};

enum class LoraInit : std::uint8_t {
  usual,     // A uniform, B zeros; of an embedding A zeros, B N(0, 1)
  gaussian,  // A N(0, 1/R^2), B zeros
  random,    // both random: not the unchanged model, for tests
};

struct LoraConfig {
  std::int64_t rank = 8;
  double alpha = 8;
  double dropout = 0;            // of the adapter's input; every target has a mask of its own
  bool rank_stabilized = false;  // s = alpha / sqrt(R)
  // DoRA: rows of W + s B A get a trained length m, and only their direction is W's and the
  // adapter's: y = m / |W + s B A| (W x + s B A x) + b. The length is a constant to the gradient.
  bool weight_decomposed = false;
  // B has a bias too (PEFT: lora_bias): y += s b_B. On linear layers, and not with DoRA.
  bool b_bias = false;
  LoraInit init = LoraInit::usual;
  // Nothing: what PEFT has for this type of model, q_proj and v_proj or c_attn.
  ModulePattern targets, exclude;
  bool all_linear = false;                   // every Linear but the head
  std::vector<std::string> modules_to_save;  // a copy of them is trained besides; ends of paths
  std::vector<std::int64_t> layers;          // only these blocks (with a list of names); empty: all
  std::vector<std::string> layer_lists;      // the lists that `layers` counts in: "h"
  // Other ranks and alphas where the regex matches the end of the path after a dot; the first
  // match counts.
  std::vector<std::pair<std::string, std::int64_t>> ranks;
  std::vector<std::pair<std::string, double>> alphas;
  // Biases trained besides (copies of them): none, all, or those of targets ("lora_only").
  std::string bias = "none";
  // Adapters of a bf16 model are f32 (PEFT: autocast_adapter_dtype; not in its file).
  bool widen = true;
  // The task counts for language models only; new adapters of others have none.
  std::optional<std::string> task = "CAUSAL_LM", base_model;
};

}  // namespace reprise::nn
