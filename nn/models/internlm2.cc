#include "nn/models/internlm2.h"

#include <cmath>
#include <utility>

#include "autograd/elementwise.h"
#include "autograd/shape.h"
#include "nn/blocks.h"
#include "nn/models/decoder_config.h"
#include "nn/models/limits.h"

namespace reprise::nn {

InternLm2Config read_internlm2_config(JsonReader& json) {
  InternLm2Config config;
  config.vocabulary = json.integer_between(1, kMostTokens, "vocab_size", 103168);
  config.width = json.integer_between(1, kMostWidth, "hidden_size", 4096);
  config.inner = json.integer_between(1, kMostWidth, "intermediate_size", 11008);
  config.layers = json.integer_between(0, kMostLayers, "num_hidden_layers", 32);
  const Heads heads = read_heads(json, config.width, {.heads = 32});
  config.heads = heads.heads;
  config.kv_heads = heads.kv_heads;
  config.head_size = heads.head_size;
  config.positions = json.integer_between(1, kMostPositions, "max_position_embeddings", 2048);
  config.activation = read_activation(json, "hidden_act", "silu");
  config.epsilon = json.number("rms_norm_eps", 1e-6);
  config.rope = read_rope(json, config.head_size, config.positions, 10000);
  config.bias = json.boolean("bias", true);
  config.initializer_range = json.number("initializer_range", 0.02);
  config.padding = read_padding(json, config.vocabulary, 0);
  config.tied = json.boolean("tie_word_embeddings", false);
  return config;
}

nlohmann::json internlm2_json(const InternLm2Config& config) {
  nlohmann::json json = {{"vocab_size", config.vocabulary},
                         {"hidden_size", config.width},
                         {"intermediate_size", config.inner},
                         {"num_hidden_layers", config.layers},
                         {"num_attention_heads", config.heads},
                         {"num_key_value_heads", config.kv_heads},
                         {"max_position_embeddings", config.positions},
                         {"hidden_act", name(config.activation)},
                         {"rms_norm_eps", config.epsilon},
                         {"rope_theta", config.rope.theta},
                         {"rope_scaling", rope_json(config.rope)},
                         {"bias", config.bias},
                         {"initializer_range", config.initializer_range},
                         {"pad_token_id", nullptr},
                         {"tie_word_embeddings", config.tied}};
  if (config.padding) {
    json["pad_token_id"] = *config.padding;
  }
  if (config.head_size * config.heads != config.width) {
    json["head_dim"] = config.head_size;
  }
  if (config.rope.dim != config.head_size) {
    json["partial_rotary_factor"] =
        static_cast<double>(config.rope.dim) / static_cast<double>(config.head_size);
  }
  return json;
}

Variable InternLm2Linear::operator()(Variable x, const Variable&) const {
  return Linear::operator()(std::move(x));
}

std::unique_ptr<InternLm2Linear> plain_internlm2_linear(std::string_view, std::int64_t in,
                                                        std::int64_t out, LinearOptions options,
                                                        Place place) {
  return std::make_unique<InternLm2Linear>(in, out, options, place);
}

InternLm2Attention::InternLm2Attention(const InternLm2Config& config,
                                       const MakeInternLm2Linear& make, Place place)
    : wqkv(make("wqkv", config.width, (config.heads + 2 * config.kv_heads) * config.head_size,
                {.bias = config.bias}, place)),
      wo(make("wo", config.heads * config.head_size, config.width, {.bias = config.bias}, place)),
      heads_(config.heads),
      kv_heads_(config.kv_heads),
      head_size_(config.head_size) {
  add("wqkv", *wqkv);
  add("wo", *wo);
}

Variable InternLm2Attention::operator()(Variable x, const InternLm2Context& context) const {
  const std::int64_t B = x.size(0), T = x.size(1), K = kv_heads_, D = head_size_;
  const std::int64_t G = heads_ / K;
  // Each key/value head has its G query heads, its key and its value next to each other. Three
  // copies, since a view would hold the whole for as long as one of its parts is saved.
  Variable qkv = reshape((*wqkv)(std::move(x), context.images), {B, T, K, G + 2, D});
  Variable q = contiguous(slice(qkv, 3, 0, G));                     // [B, T, K, G, D]
  Variable k = contiguous(slice(qkv, 3, G, G + 1));                 // [B, T, K, 1, D]
  Variable v = contiguous(slice(std::move(qkv), 3, G + 1, G + 2));  // [B, T, K, 1, D]
  q = context.rotation(reshape(std::move(q), {B, T, heads_, D}));   // [B, T, H, D]
  k = context.rotation(reshape(std::move(k), {B, T, K, D}));        // [B, T, K, D]
  v = reshape(std::move(v), {B, T, K, D});                          // [B, T, K, D]
  Variable a = attend(std::move(q), std::move(k), std::move(v), context.visible,
                      {.scale = 1 / std::sqrt(static_cast<double>(D))});    // [B, T, H, D]
  return (*wo)(reshape(std::move(a), {B, T, heads_ * D}), context.images);  // [B, T, C]
}

InternLm2Mlp::InternLm2Mlp(const InternLm2Config& config, const MakeInternLm2Linear& make,
                           Place place)
    : w1(make("w1", config.width, config.inner, {}, place)),
      w3(make("w3", config.width, config.inner, {}, place)),
      w2(make("w2", config.inner, config.width, {}, place)),
      activation_(config.activation) {
  add("w1", *w1);
  add("w3", *w3);
  add("w2", *w2);
}

Variable InternLm2Mlp::operator()(Variable x, const InternLm2Context& context) const {
  Variable gate = (*w1)(x, context.images);                                  // [B, T, F]
  Variable up = (*w3)(std::move(x), context.images);                         // [B, T, F]
  Variable h = activate_gated(activation_, std::move(gate), std::move(up));  // [B, T, F]
  return (*w2)(std::move(h), context.images);                                // [B, T, C]
}

InternLm2Block::InternLm2Block(const InternLm2Config& config, const MakeInternLm2Linear& make,
                               Place place)
    : attention(config, make, place),
      feed_forward(config, make, place),
      attention_norm(config.width, config.epsilon, place),
      ffn_norm(config.width, config.epsilon, place) {
  add("attention", attention);
  add("feed_forward", feed_forward);
  add("attention_norm", attention_norm);
  add("ffn_norm", ffn_norm);
}

Variable InternLm2Block::operator()(Variable x, const InternLm2Context& context) const {
  Variable a = attention(attention_norm(x), context);                            // [B, T, C]
  Normed n = ffn_norm(std::move(a), std::move(x));                               // sum = a + x
  return reprise::add(feed_forward(std::move(n.y), context), std::move(n.sum));  // [B, T, C]
}

InternLm2Trunk::InternLm2Trunk(const InternLm2Config& config, const MakeInternLm2Linear& make,
                               Place place)
    : tok_embeddings(config.vocabulary, config.width, config.padding, place),
      norm(config.width, config.epsilon, place) {
  add("tok_embeddings", tok_embeddings);
  add("layers", layers);
  add("norm", norm);
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    layers.append(config, make, place);
  }
}

Variable InternLm2Trunk::operator()(Variable x, const InternLm2Context& context) const {
  x = run_blocks("layers", layers, std::move(x), [&](const InternLm2Block& block, Variable in) {
    return block(std::move(in), context);
  });
  return norm(std::move(x));  // [B, T, C]
}

InternLm2::InternLm2(const InternLm2Config& config, Place place)
    : model(config, plain_internlm2_linear, place), config_(config) {
  add("model", model);
  if (!config.tied) {
    output.emplace(config.width, config.vocabulary, LinearOptions{}, place);
    add("output", *output);
  }
  name_parameters();
}

Variable InternLm2::hidden(const Batch& batch) {
  check(batch);
  const InternLm2Context context{
      visible_of(batch),
      rotation_of(config_.rope, positions_of(batch), embedding_table().value().device())};
  return model(model.tok_embeddings(batch.ids), context);
}

void InternLm2::initialize(Generator& generator) {
  for (const NamedParameter& entry : named_parameters()) {
    initialize_parameter(entry, config_.initializer_range, generator);
  }
  if (config_.padding) {
    embedding_table().write().slice(0, *config_.padding, *config_.padding + 1).zero();
  }
}

bool InternLm2::is_buffer(std::string_view key) const {
  return key.ends_with("rotary_emb.inv_freq") || (config_.tied && key == "output.weight");
}

std::string InternLm2::write_config() const {
  nlohmann::json json = internlm2_json(config_);
  json["model_type"] = type();
  json["architectures"] = {"InternLM2ForCausalLM"};
  return json.dump(2) + "\n";
}

}  // namespace reprise::nn
