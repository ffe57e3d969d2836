#!/usr/bin/env python3
"""Makes the ready cases of single model options with transformers.

    tests/golden/make_options.py [FOLDER [CASE]...]     default: the folder of this script, all

Needs torch, transformers and safetensors. Every value is drawn from a seed of the case's own, so a
second run with the same versions writes the same files.
"""
import json
import pathlib
import sys
import zlib

import torch
import transformers
from safetensors.torch import save_file

STEPS = 5
OPTIMIZER = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}

LLAMA = dict(vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-4,
             tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
QWEN3 = {**LLAMA, "head_dim": 12, "max_window_layers": 28}
GLM = {**{key: value for key, value in LLAMA.items() if key != "rms_norm_eps"}, "head_dim": 12,
       "tie_word_embeddings": False}
GPT2 = dict(vocab_size=41, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)


def rope(kind, **values):
    return {"rope_type": kind, "rope_theta": 10000.0, **values}


VL_TEXT = {**LLAMA, "num_attention_heads": 1, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
           "rope_parameters": rope("default", mrope_section=[2, 3, 3])}
VL_VISION = dict(depth=2, embed_dim=8, num_heads=1, mlp_ratio=2, patch_size=2, hidden_size=16)
VL = dict(text_config=VL_TEXT, vision_config=VL_VISION, vision_start_token_id=36, vision_end_token_id=37,
          image_token_id=38, video_token_id=39, tie_word_embeddings=False)

# Rows of tokens: numbers are grids (pairs of frames, patch rows, patch columns), of which four patches
# are one token.
ROWS = {"qwen2_vl_frames": [[5, 9, 36, (2, 4, 4), 37, 40, 7, 21],
                            [36, (1, 2, 4), 37, 11, 36, (1, 4, 2), 37, 30, 4]]}

# name: (config class, model class, config, tokens in a row, padding at the end of row 1)
CASES = {
    "llama_biases": ("LlamaConfig", "LlamaForCausalLM",
                     {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 12}, 11, 3),
    "llama_pad_from_end": ("LlamaConfig", "LlamaForCausalLM",
                           {**LLAMA, "num_hidden_layers": 1, "pad_token_id": -1,
                            "tie_word_embeddings": False}, 11, 0),
    "llama_linear_rope": ("LlamaConfig", "LlamaForCausalLM",
                          {**LLAMA, "rope_parameters": rope("linear", factor=3.0)}, 13, 0),
    # Rows longer than max_position_embeddings.
    "llama_dynamic_rope": ("LlamaConfig", "LlamaForCausalLM",
                           {**LLAMA, "max_position_embeddings": 8,
                            "rope_parameters": rope("dynamic", factor=2.0)}, 13, 0),
    # The ramp lies inside of the four frequencies.
    "llama_yarn": ("LlamaConfig", "LlamaForCausalLM",
                   {**LLAMA, "rope_parameters": rope("yarn", factor=4.0, beta_fast=2.0, beta_slow=0.05,
                                                     original_max_position_embeddings=16)}, 13, 0),
    "llama_yarn_mscale": ("LlamaConfig", "LlamaForCausalLM",
                          {**LLAMA, "rope_parameters": rope("yarn", factor=4.0, mscale=0.7,
                                                            mscale_all_dim=1.2, truncate=False,
                                                            original_max_position_embeddings=16)}, 13, 0),
    "qwen2_window": ("Qwen2Config", "Qwen2ForCausalLM",
                     {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, 13, 4),
    "qwen3_options": ("Qwen3Config", "Qwen3ForCausalLM",
                      {**QWEN3, "attention_bias": True, "use_sliding_window": True, "sliding_window": 3,
                       "layer_types": ["sliding_attention", "full_attention"],
                       "tie_word_embeddings": False}, 13, 3),
    # The epsilon, the share of a head that is rotated and the bias are the class's defaults.
    "glm": ("GlmConfig", "GlmForCausalLM", {**GLM, "pad_token_id": 40}, 13, 4),
    "glm4_options": ("Glm4Config", "Glm4ForCausalLM",
                     {**GLM, "attention_bias": False, "pad_token_id": None, "hidden_act": "gelu",
                      "rope_parameters": rope("default", partial_rotary_factor=0.34),
                      "tie_word_embeddings": True}, 11, 0),
    # Pairs of frames that do not see each other, several images in a batch, today's names of weights.
    "qwen2_vl_frames": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", VL, None, 0),
    "gpt2_options": ("GPT2Config", "GPT2LMHeadModel",
                     {**GPT2, "n_inner": 20, "tie_word_embeddings": False,
                      "scale_attn_by_inverse_layer_idx": True}, 13, 0),
}


def fill(model, generator):
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith(".bias"):
            values *= 0.2
        elif parameter.dim() == 1:
            values = 1 + 0.1 * values
        elif "embed_tokens" in name or "wte" in name or "wpe" in name:
            values *= 0.5
        else:
            # Conv1D of GPT-2 stores [in, out], Linear and convolutions [out, in ...].
            inputs = parameter.shape[0] if ".c_" in name else parameter[0].numel()
            values *= inputs**-0.5
        parameter.data.copy_(values)


def text_inputs(vocabulary, tokens, padding, generator):
    ids = torch.randint(3, vocabulary, (2, tokens), generator=generator)
    ids[0, 4] = ids[1, 2] = vocabulary - 1
    labels = ids.clone()
    labels[0, :2] = -100
    inputs = {"input_ids": ids, "labels": labels}
    if padding:
        mask = torch.ones_like(ids)
        mask[1, tokens - padding:] = 0
        labels[1, tokens - padding:] = -100
        inputs["attention_mask"] = mask
    return inputs


def image_inputs(rows, config, generator):
    grids = [part for row in rows for part in row if isinstance(part, tuple)]
    flat = [[token for part in row for token in
             ([config.image_token_id] * (part[0] * part[1] * part[2] // 4) if isinstance(part, tuple) else [part])]
            for row in rows]
    width = max(len(row) for row in flat)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in flat])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in flat])
    labels = ids.masked_fill((mask == 0) | (ids == config.image_token_id), -100)
    labels[0, :2] = -100
    vision = config.vision_config
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels,
            "image_grid_thw": torch.tensor(grids)}


def kept(config, options):
    """What of a whole config is written: the keys that were asked for, and those that say what it is."""
    keys = set(options) | {"architectures", "model_type", "rope_parameters"}
    return {key: kept(value, options[key]) if key.endswith("_config") else value
            for key, value in config.items()
            if key in keys and (value is not None or key == "pad_token_id")}


def make(name, folder):
    config_class, model_class, options, tokens, padding = CASES[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    config = getattr(transformers, config_class)(**options)
    config._attn_implementation = "eager"
    config.architectures = [model_class]
    model = getattr(transformers, model_class)(config).eval()
    fill(model, generator)

    extra = {}  # what the reference must be told, and we find by ourselves
    if name in ROWS:
        inputs = image_inputs(ROWS[name], config, generator)
        extra["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    else:
        inputs = text_inputs(options["vocab_size"], tokens, padding, generator)

    tied = config.tie_word_embeddings
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()
               if not (tied and key == "lm_head.weight") and not key.endswith((".attn.bias", ".masked_bias"))}
    tensors = {f"in.{key}": value for key, value in inputs.items()}
    output = model(**inputs, **extra)
    output.loss.backward()
    tensors["out.logits"] = output.logits.detach().clone()
    tensors["out.loss"] = output.loss.detach().clone()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            tensors[f"grad.{key}"] = parameter.grad.clone()
    settings = {**OPTIMIZER, "betas": tuple(OPTIMIZER["betas"])}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**inputs, **extra).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    tensors["steps.loss"] = torch.tensor(losses)

    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    written = config.to_json_string(use_diff=False)
    (folder / "config.json").write_text(
        json.dumps(kept(json.loads(written), options), indent=2, sort_keys=True) + "\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    reference = f"transformers {transformers.__version__}, torch {torch.__version__}"
    save_file(tensors, folder / "parity.safetensors",
              {"format": "pt", "case": name, "reference": reference, "train": "false",
               "optimizer": json.dumps(OPTIMIZER),
               "note": "mean causal language model loss, eager attention, float32"})


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    target = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else __file__)
    for case in sys.argv[2:] or CASES:
        make(case, target if target.is_dir() else target.parent)
