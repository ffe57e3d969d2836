#!/usr/bin/env python3
"""Makes the ready cases of single options of CLIP with transformers.

    tests/golden/make_clip.py [FOLDER]     default: the folder of this script
"""
import json
import pathlib
import sys
import zlib

import torch
import transformers
from safetensors.torch import save_file

from make_options import OPTIMIZER, STEPS

VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=12,
              patch_size=4, layer_norm_eps=1e-4)
TEXT = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, vocab_size=31,
            max_position_embeddings=10, eos_token_id=7, bos_token_id=0, pad_token_id=1, hidden_act="gelu")

# name: (config.json, pixels, tokens or None)
CASES = {
    # The text ends at its first 7, larger ids or not; padding that only the mask tells; images of
    # another shape than the table of positions; a text_config whose values and the defaults of the
    # class for what text_config_dict lacks are both overridden.
    "clip_options": ({"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 6,
                      "logit_scale_init_value": 2.0, "vision_config": VISION,
                      "text_config": {**TEXT, "eos_token_id": 2, "layer_norm_eps": 0.5, "vocab_size": 5},
                      "text_config_dict": TEXT},
                     (3, 3, 16, 8),
                     [[0, 9, 30, 7, 7, 7], [1, 0, 29, 30, 12, 7], [0, 7, 30, 7, 1, 1]]),
    "clip_vision_resized": ({"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], **VISION},
                            (2, 3, 8, 20), None),
}
MASK = [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]


def fill(model, generator):
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name == "logit_scale":
            continue
        if name.endswith(".bias"):
            values *= 0.2
        elif parameter.dim() == 1:
            values = 1 + 0.1 * values
        elif "token_embedding" in name or "position_embedding" in name:
            values *= 0.5
        else:
            values *= parameter[0].numel()**-0.5
        parameter.data.copy_(values)


def key_of(name, tower):
    return f"vision_model.{name}" if tower and not name.startswith("vision_model.") else name


def make(name, folder):
    written, pixels, ids = CASES[name]
    tower = ids is None
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    kind = transformers.CLIPVisionConfig if tower else transformers.CLIPConfig
    config = kind(**json.loads(json.dumps({k: v for k, v in written.items() if k != "model_type"})))
    config._attn_implementation = "eager"
    model = (transformers.CLIPVisionModel if tower else transformers.CLIPModel)(config).eval()
    fill(model, generator)
    inputs = {"pixel_values": torch.randn(pixels, generator=generator)}
    if not tower:
        inputs["input_ids"] = torch.tensor(ids)
        inputs["attention_mask"] = torch.tensor(MASK)

    def run():
        if not tower:
            output = model(**inputs, interpolate_pos_encoding=True, return_loss=True)
            return output.loss, output
        output = model(**inputs, interpolate_pos_encoding=True, output_hidden_states=True)
        return output.hidden_states[-2][:, 1:].pow(2).mean(), output

    weights = {key_of(key, tower): value.detach().clone() for key, value in model.state_dict().items()
               if not key.endswith("position_ids")}
    tensors = {f"in.{key}": value for key, value in inputs.items()}
    loss, output = run()
    loss.backward()
    tensors["out.loss"] = loss.detach().clone()
    if tower:
        tensors["out.hidden"] = output.last_hidden_state.detach().clone()
    else:
        for key in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
            tensors[f"out.{key}"] = getattr(output, key).detach().clone().contiguous()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            # Exactly zero in exact arithmetic: softmax ignores a shift common to all keys.
            zero = key.endswith("k_proj.bias")
            tensors[f"grad.{key_of(key, tower)}"] = parameter.grad.clone() * (0 if zero else 1)
    settings = {**OPTIMIZER, "betas": tuple(OPTIMIZER["betas"])}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, _ = run()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    tensors["steps.loss"] = torch.tensor(losses)

    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    reference = f"transformers {transformers.__version__}, torch {torch.__version__}"
    save_file(tensors, folder / "parity.safetensors",
              {"format": "pt", "case": name, "reference": reference, "train": "false",
               "optimizer": json.dumps(OPTIMIZER),
               "note": "eager attention, float32, interpolate_pos_encoding"})


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    target = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else __file__)
    for case in CASES:
        make(case, target if target.is_dir() else target.parent)
