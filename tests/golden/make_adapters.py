#!/usr/bin/env python3
"""Makes the ready cases of adapter options with transformers and PEFT.

    tests/golden/make_adapters.py [FOLDER]     default: the folder of this script

Needs torch, transformers, peft and safetensors. Every value is drawn from a seed of the case's own,
so a second run with the same versions writes the same files.
"""
import json
import pathlib
import sys
import zlib

import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from make_options import GPT2, LLAMA, OPTIMIZER, STEPS, fill

QWEN2 = {**LLAMA, "tie_word_embeddings": False}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name: (config class, model class, config, adapter, tokens in a row, padding at the end of row 1)
CASES = {
    # The table has a padding row, which the adapter's A respects too.
    "llama_lora_embedding": ("LlamaConfig", "LlamaForCausalLM", {**QWEN2, "pad_token_id": 5},
                             dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "v_proj"]), 11, 0),
    "llama_lora_tied_embedding": ("LlamaConfig", "LlamaForCausalLM", {**QWEN2, "tie_word_embeddings": True},
                                  dict(r=2, lora_alpha=4, target_modules=["embed_tokens"]), 11, 0),
    "llama_lora_head": ("LlamaConfig", "LlamaForCausalLM", QWEN2,
                        dict(r=2, lora_alpha=2, target_modules=["lm_head", "o_proj"]), 11, 3),
    "llama_dora_embedding": ("LlamaConfig", "LlamaForCausalLM", QWEN2,
                             dict(r=2, lora_alpha=4, use_dora=True, target_modules=["embed_tokens", "q_proj"]), 11, 0),
    "qwen2_lora_bias_only": ("Qwen2Config", "Qwen2ForCausalLM", QWEN2,
                             dict(r=2, lora_alpha=4, bias="lora_only", target_modules=["q_proj", "up_proj"]), 11, 3),
    "qwen2_lora_bias_all": ("Qwen2Config", "Qwen2ForCausalLM", QWEN2,
                            dict(r=2, lora_alpha=4, bias="all", target_modules=["q_proj"]), 11, 0),
    "qwen2_lora_layers": ("Qwen2Config", "Qwen2ForCausalLM", QWEN2,
                          dict(r=2, lora_alpha=3, target_modules=ALL, exclude_modules=["k_proj"],
                               layers_to_transform=[1], layers_pattern="layers"), 11, 0),
    "gpt2_dora": ("GPT2Config", "GPT2LMHeadModel", GPT2,
                  dict(r=2, lora_alpha=4, use_dora=True, fan_in_fan_out=True,
                       target_modules=["c_attn", "c_proj", "c_fc"]), 11, 3),
    "gpt2_lora_saved": ("GPT2Config", "GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False},
                        dict(r=2, lora_alpha=4, fan_in_fan_out=True, target_modules=["c_fc"],
                             modules_to_save=["ln_f", "wpe"]), 11, 0),
}


def randomise(model, generator):
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        values = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * values)
        elif "lora_" in name:
            parameter.data.copy_(0.3 * values)
        else:  # a saved module or a bias, unlike the base's
            parameter.data.add_(0.1 * values)


def file_key(name):
    """The key in adapter_model.safetensors of a parameter of the PEFT model."""
    name = name.replace(".modules_to_save.default.", ".").replace(".default", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def make(name, folder):
    config_class, model_class, options, adapter, tokens, padding = CASES[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    config = getattr(transformers, config_class)(**options)
    config._attn_implementation = "eager"
    config.architectures = [model_class]
    model = getattr(transformers, model_class)(config).eval()
    fill(model, generator)
    if config.pad_token_id is not None:
        model.get_input_embeddings().weight.data[config.pad_token_id].zero_()
    tied = config.tie_word_embeddings
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()
               if not (tied and key == "lm_head.weight") and not key.endswith((".attn.bias", ".masked_bias"))}

    ids = torch.randint(3, options["vocab_size"], (2, tokens), generator=generator)
    ids[0, 4] = ids[1, 2] = config.pad_token_id or options["vocab_size"] - 1
    labels = ids.clone()
    labels[0, :2] = -100
    inputs = {"input_ids": ids, "labels": labels}
    if padding:
        mask = torch.ones_like(ids)
        mask[1, tokens - padding:] = 0
        labels[1, tokens - padding:] = -100
        inputs["attention_mask"] = mask

    settings = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **adapter)
    model = peft.get_peft_model(model, settings).eval()
    randomise(model, generator)

    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())

    tensors = {f"in.{key}": value for key, value in inputs.items()}
    output = model(**inputs)
    output.loss.backward()
    tensors["out.logits"] = output.logits.detach().clone()
    tensors["out.loss"] = output.loss.detach().clone()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert file_key(key) in keys, key
            tensors[f"grad.{file_key(key)}"] = parameter.grad.clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **{**OPTIMIZER, "betas": tuple(OPTIMIZER["betas"])})
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    tensors["steps.loss"] = torch.tensor(losses)

    written = json.loads(config.to_json_string(use_diff=False))
    kept = set(options) | {"architectures", "model_type", "rope_parameters"}
    kept = {key: value for key, value in written.items() if key in kept and value is not None}
    (folder / "config.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    versions = f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    save_file(tensors, folder / "parity.safetensors",
              {"format": "pt", "case": name, "reference": versions, "train": "false",
               "optimizer": json.dumps(OPTIMIZER),
               "note": "mean causal language model loss, eager attention, float32"})


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    target = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else __file__)
    for case in CASES:
        make(case, target if target.is_dir() else target.parent)
