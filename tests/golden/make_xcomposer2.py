#!/usr/bin/env python3
"""Makes the ready cases of single options of InternLM-XComposer2.

    tests/golden/make_xcomposer2.py [FOLDER]          default: the folder of this script
    tests/golden/make_xcomposer2.py --check FOLDER    compares with a case that is there

The model is no class of transformers; it is written out here, with the tower from transformers.
"""
import json
import math
import pathlib
import sys
import zlib

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from make_options import OPTIMIZER, STEPS


class Plora(nn.Linear):
    def __init__(self, inputs, outputs, rank, scale):
        super().__init__(inputs, outputs, bias=False)
        self.Plora_A = nn.Linear(inputs, rank, bias=False)
        self.Plora_B = nn.Linear(rank, outputs, bias=False)
        self.scale = scale

    def forward(self, x, images):
        y = super().forward(x)
        rows = x[images] if images.any() else x.reshape(-1, x.shape[-1])[:1] * 0
        part = self.scale * self.Plora_B(self.Plora_A(rows))
        if not images.any():
            return y + 0 * part.sum()
        y = y.clone()
        y[images] += part
        return y


class Norm(nn.Module):
    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


def rotate(x, theta):  # [B, T, H, D]
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).float()[:, None] * theta**(-torch.arange(half).float() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, c, ranks):
        super().__init__()
        self.heads, self.kv, self.theta = c["num_attention_heads"], c["num_key_value_heads"], c["rope_theta"]
        width = c["hidden_size"]
        self.size = width // self.heads
        self.wqkv = Plora(width, (self.heads + 2 * self.kv) * self.size, *ranks["wqkv"])
        self.wo = Plora(width, width, *ranks["wo"])

    def forward(self, x, images, visible):
        rows, tokens, _ = x.shape
        group = self.heads // self.kv
        y = self.wqkv(x, images).view(rows, tokens, self.kv, group + 2, self.size)
        q = rotate(y[..., :group, :].reshape(rows, tokens, self.heads, self.size), self.theta)
        k = rotate(y[..., group, :], self.theta).repeat_interleave(group, 2)
        v = y[..., group + 1, :].repeat_interleave(group, 2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(self.size)
        weights = scores.masked_fill(~visible[:, None], torch.finfo(x.dtype).min).softmax(-1)
        return self.wo(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(x.shape), images)


class FeedForward(nn.Module):
    def __init__(self, c, ranks):
        super().__init__()
        width, inner = c["hidden_size"], c["intermediate_size"]
        self.w1, self.w3 = Plora(width, inner, *ranks["w1"]), Plora(width, inner, *ranks["w3"])
        self.w2 = Plora(inner, width, *ranks["w2"])

    def forward(self, x, images):
        return self.w2(F.silu(self.w1(x, images)) * self.w3(x, images), images)


class Block(nn.Module):
    def __init__(self, c, ranks):
        super().__init__()
        self.attention, self.feed_forward = Attention(c, ranks), FeedForward(c, ranks)
        self.attention_norm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.ffn_norm = Norm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x, images, visible):
        x = x + self.attention(self.attention_norm(x), images, visible)
        return x + self.feed_forward(self.ffn_norm(x), images)


class XComposer2(nn.Module):
    def __init__(self, c, ranks, tiles):
        super().__init__()
        width, vision = c["hidden_size"], transformers.CLIPVisionConfig(**c["vision_config"])
        vision._attn_implementation = "eager"
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(c["vocab_size"], width, c["pad_token_id"])
        self.model.layers = nn.ModuleList(Block(c, ranks) for _ in range(c["num_hidden_layers"]))
        self.model.norm = Norm(width, c["rms_norm_eps"])
        self.output = nn.Linear(width, c["vocab_size"], bias=False)
        self.vit = nn.Module()
        self.vit.vision_tower = nn.Module()
        self.vit.vision_tower.vision_model = transformers.CLIPVisionModel(vision)
        features = vision.hidden_size * (4 if tiles else 1)
        self.vision_proj = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        if tiles:
            self.plora_glb_GN = nn.Parameter(torch.zeros(1, 1, features))
            self.plora_sub_GN = nn.Parameter(torch.zeros(1, 1, 1, features))

    def assembled(self, features, grids):
        """Patches [tiles, P, C] of all images, each with its global view first, to tokens."""
        side = math.isqrt(features.shape[1])
        x = features.reshape(-1, side // 2, 2, side // 2, 2, features.shape[-1])
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(x.shape[0], side // 2, side // 2, -1)
        parts, at, half = [], 0, side // 2
        for _, height, width in grids.tolist():
            whole, tiles = x[at], x[at + 1:at + 1 + height * width]
            at += 1 + height * width
            stitched = tiles.reshape(height, width, half, half, -1).permute(0, 2, 1, 3, 4)
            stitched = stitched.reshape(height * half, width * half, -1)

            def closed(rows):
                return torch.cat([rows, self.plora_sub_GN[0].expand(rows.shape[0], 1, -1)], 1).flatten(0, 1)

            parts += [closed(whole), self.plora_glb_GN[0], closed(stitched)]
        return torch.cat(parts)

    def forward(self, input_ids, labels, im_mask, attention_mask=None, pixel_values=None, image_grid_thw=None):
        images = im_mask.bool()
        x = self.model.tok_embeddings(input_ids)
        if pixel_values is not None:
            tower = self.vit.vision_tower.vision_model
            features = tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
            if image_grid_thw is not None:
                features = self.assembled(features, image_grid_thw)
            x = x.clone()
            x[images] = self.vision_proj(features).flatten(0, -2)
        rows, tokens = input_ids.shape
        visible = torch.ones(tokens, tokens).tril().bool().expand(rows, -1, -1)
        if attention_mask is not None:
            visible = visible & attention_mask[:, None].bool()
        for block in self.model.layers:
            x = block(x, images, visible)
        logits = self.output(self.model.norm(x))
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


CONFIG = dict(model_type="internlmxcomposer2", architectures=["InternLMXComposer2ForCausalLM"], bias=False,
              bos_token_id=1, eos_token_id=2, pad_token_id=2, hidden_act="silu", hidden_size=16,
              intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
              max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1000000, rope_scaling=None,
              tie_word_embeddings=False, vocab_size=37, max_length=64,
              vision_config=dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                                 image_size=12, patch_size=4, layer_norm_eps=1e-5))
TILES = {**CONFIG, "vision_config": {**CONFIG["vision_config"], "image_size": 16}}
SAME = {name: (4, 1) for name in ("wqkv", "wo", "w1", "w2", "w3")}

# name: (config, (rank, scale) of each linear, images of each row, grids, text around them)
CASES = {
    # Two images of tiles, one in each row; wqkv of rank 8 where the others have another.
    "xcomposer2_tiles": (TILES, {**SAME, "wqkv": (8, 2)}, [[(1, 2)], [(2, 1)]], 4),
    # No image token: the gradients of PLoRA are zero, not absent.
    "xcomposer2_text": ({**CONFIG, "img_size": 12}, SAME, [[], []], 7),
    # Nothing but image tokens.
    "xcomposer2_images": ({**CONFIG, "img_size": 12}, SAME, [[None], [None]], 0),
}


def tokens_of(grid):
    if grid is None:
        return 9
    height, width = grid
    return (height * width + 1) * 4 + 1 + (height + 1) * 2


def inputs_of(name, generator):
    config, _, rows, text = CASES[name]
    ids, labels, masks, lengths = [], [], [], []
    for images in rows:
        row, mask = torch.randint(3, config["vocab_size"], (text, ), generator=generator).tolist(), [0] * text
        for grid in images:  # after the first of the text
            count, at = tokens_of(grid), min(1, text)
            row[at:at], mask[at:at] = [0] * count, [1] * count
        ids.append(row)
        masks.append(mask)
        lengths.append(len(row))
    longest = max(lengths)
    for row, mask, length in zip(ids, masks, lengths):
        row += [2] * (longest - length)
        mask += [0] * (longest - length)
        wanted = text > 0
        labels.append([-100 if (wanted and mask[t]) or t >= length else
                       row[t] if wanted else 3 + (5 * t) % 30 for t in range(longest)])
    result = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "im_mask": torch.tensor(masks)}
    if min(lengths) < longest:
        result["attention_mask"] = torch.tensor([[int(t < n) for t in range(longest)] for n in lengths])
    grids = [grid for images in rows for grid in images]
    if grids:
        side = config["vision_config"]["image_size"]
        views = sum(1 if grid is None else 1 + grid[0] * grid[1] for grid in grids)
        result["pixel_values"] = torch.randn((views, 3, side, side), generator=generator)
        if grids[0] is not None:
            result["image_grid_thw"] = torch.tensor([[1, *grid] for grid in grids])
    return result


def fill(model, generator):
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith(".bias"):
            values *= 0.2
        elif parameter.dim() == 1:
            values = 1 + 0.1 * values
        elif "embedding" in name or name.endswith("_GN"):
            values *= 0.5
        else:
            values *= parameter[0].numel()**-0.5
        parameter.data.copy_(values)


def computed(model, inputs):
    logits, loss = model(**inputs)
    loss.backward()
    tensors = {"out.logits": logits.detach().clone(), "out.loss": loss.detach().clone()}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            zero = ".k_proj.bias" in key
            tensors[f"grad.{key}"] = parameter.grad.clone() * (0 if zero else 1)
    optimizer = torch.optim.AdamW(model.parameters(), **{**OPTIMIZER, "betas": tuple(OPTIMIZER["betas"])})
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        _, loss = model(**inputs)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    tensors["steps.loss"] = torch.tensor(losses)
    return tensors


def make(name, folder):
    config, ranks, _, _ = CASES[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    model = XComposer2(config, ranks, "img_size" not in config).eval()
    fill(model, generator)
    inputs = inputs_of(name, generator)
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()
               if not key.endswith("position_ids")}
    tensors = {f"in.{key}": value for key, value in inputs.items()} | computed(model, inputs)
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    reference = f"torch {torch.__version__}; tower transformers {transformers.__version__}"
    save_file(tensors, folder / "parity.safetensors",
              {"format": "pt", "case": name, "reference": reference, "train": "false",
               "optimizer": json.dumps(OPTIMIZER), "note": "float32, dropout off"})


def check(folder):
    config = json.loads((folder / "config.json").read_text())
    weights, parity = load_file(folder / "model.safetensors"), load_file(folder / "parity.safetensors")
    model = XComposer2(config, SAME, False).eval()
    model.load_state_dict(weights, strict=False)
    inputs = {key[3:]: value for key, value in parity.items() if key.startswith("in.")}
    ours = computed(model, inputs)
    for key, value in parity.items():
        if not key.startswith("in."):
            error = (ours[key] - value)
            if key == "out.logits":
                error = error[inputs["attention_mask"].bool()]
            print(f"{error.norm() / value.norm().clamp_min(1e-9):.1e} {key}")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if len(sys.argv) > 2 and sys.argv[1] == "--check":
        check(pathlib.Path(sys.argv[2]))
    else:
        target = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else __file__)
        for case in CASES:
            make(case, target if target.is_dir() else target.parent)
