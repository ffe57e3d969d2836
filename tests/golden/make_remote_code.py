#!/usr/bin/env python3
"""Makes the ready cases of single options of InternLM2 and of the first Qwen.

    tests/golden/make_remote_code.py [FOLDER]     default: the folder of this script
    tests/golden/make_remote_code.py --check      compares with the cases qwen and internlm2

Neither is a class of transformers; both are written out here.
"""
import json
import math
import pathlib
import sys
import zlib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from make_options import OPTIMIZER, text_inputs
from make_xcomposer2 import Norm, computed


def rotate(x, theta):  # [B, T, H, D]
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).float()[:, None] * theta**(-torch.arange(half).float() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q, k, v, visible):
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible[:, None], torch.finfo(q.dtype).min).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)


def larger(theta, alpha, size):
    return theta * alpha**(size / (size - 2))


class InternLm2Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        width, inner, bias = c["hidden_size"], c["intermediate_size"], c.get("bias", True)
        self.heads, self.kv = c["num_attention_heads"], c["num_key_value_heads"]
        self.size = width // self.heads
        self.attention, self.feed_forward = nn.Module(), nn.Module()
        self.attention.wqkv = nn.Linear(width, (self.heads + 2 * self.kv) * self.size, bias)
        self.attention.wo = nn.Linear(width, width, bias)
        self.feed_forward.w1 = nn.Linear(width, inner, bias=False)
        self.feed_forward.w3 = nn.Linear(width, inner, bias=False)
        self.feed_forward.w2 = nn.Linear(inner, width, bias=False)
        self.attention_norm, self.ffn_norm = Norm(width, c["rms_norm_eps"]), Norm(width, c["rms_norm_eps"])

    def forward(self, x, visible):
        rows, tokens, _ = x.shape
        group, theta = self.heads // self.kv, self.c["rope_theta"]
        scaling, limit = self.c.get("rope_scaling"), self.c["max_position_embeddings"]
        if scaling and tokens > limit:
            theta = larger(theta, scaling["factor"] * tokens / limit - (scaling["factor"] - 1), self.size)
        y = self.attention.wqkv(self.attention_norm(x)).view(rows, tokens, self.kv, group + 2, self.size)
        q = rotate(y[..., :group, :].reshape(rows, tokens, self.heads, self.size), theta)
        k = rotate(y[..., group, :], theta).repeat_interleave(group, 2)
        v = y[..., group + 1, :].repeat_interleave(group, 2)
        x = x + self.attention.wo(attention(q, k, v, visible))
        n = self.ffn_norm(x)
        return x + self.feed_forward.w2(F.silu(self.feed_forward.w1(n)) * self.feed_forward.w3(n))


class QwenBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        width, inner = c["hidden_size"], c["intermediate_size"] // 2
        bias = not c.get("no_bias", True)
        self.ln_1, self.ln_2 = Norm(width, c["layer_norm_epsilon"]), Norm(width, c["layer_norm_epsilon"])
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn = nn.Linear(width, 3 * width)
        self.attn.c_proj = nn.Linear(width, width, bias)
        self.mlp.w1, self.mlp.w2 = nn.Linear(width, inner, bias), nn.Linear(width, inner, bias)
        self.mlp.c_proj = nn.Linear(inner, width, bias)

    def forward(self, x, visible):
        tokens, trained, theta = x.shape[1], self.c["seq_length"], self.c["rotary_emb_base"]
        if self.c["use_dynamic_ntk"]:
            alpha = max(2**math.ceil(math.log2(tokens / trained) + 1) - 1, 1)
            theta = larger(theta, alpha, self.c["kv_channels"])
        q, k, v = (part.unflatten(2, (-1, self.c["kv_channels"]))
                   for part in self.attn.c_attn(self.ln_1(x)).chunk(3, 2))
        q, k = rotate(q, theta), rotate(k, theta)
        if self.c["use_logn_attn"]:
            places = torch.arange(1, tokens + 1).float()
            q = q * (places.log() / math.log(trained)).clamp(min=1)[:, None, None]
        x = x + self.attn.c_proj(attention(q, k, v, visible))
        n = self.ln_2(x)
        return x + self.mlp.c_proj(self.mlp.w1(n) * F.silu(self.mlp.w2(n)))


class Decoder(nn.Module):
    """Either; the names of the trunk's parts and of the head differ."""
    NAMES = {"internlm2": ("model", "tok_embeddings", "layers", "norm", "output"),
             "qwen": ("transformer", "wte", "h", "ln_f", "lm_head")}

    def __init__(self, c):
        super().__init__()
        self.names = self.NAMES[c["model_type"]]
        trunk, table, blocks, norm, head = self.names
        qwen = c["model_type"] == "qwen"
        width = c["hidden_size"]
        parts = nn.Module()
        # No padding row in Qwen; row 0 of InternLM2 where the file does not say.
        padding = None if qwen else c.get("pad_token_id", 0)
        parts.add_module(table, nn.Embedding(c["vocab_size"], width, padding))
        block = QwenBlock if qwen else InternLm2Block
        parts.add_module(blocks, nn.ModuleList(block(c) for _ in range(c["num_hidden_layers"])))
        parts.add_module(norm, Norm(width, c["layer_norm_epsilon" if qwen else "rms_norm_eps"]))
        self.add_module(trunk, parts)
        self.add_module(head, nn.Linear(width, c["vocab_size"], bias=False))

    def forward(self, input_ids, labels, attention_mask=None):
        trunk, table, blocks, norm, head = self.names
        parts = getattr(self, trunk)
        rows, tokens = input_ids.shape
        visible = torch.ones(tokens, tokens).tril().bool().expand(rows, -1, -1)
        if attention_mask is not None:
            visible = visible & attention_mask[:, None].bool()
        x = getattr(parts, table)(input_ids)
        for block in getattr(parts, blocks):
            x = block(x, visible)
        logits = getattr(self, head)(getattr(parts, norm)(x))
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


SIZES = dict(hidden_size=24, num_hidden_layers=2, vocab_size=41, tie_word_embeddings=False)

# name: (config, tokens in a row)
CASES = {
    # Biases and padding row 0 by default; rows longer than max_position_embeddings.
    "internlm2_options": ({**SIZES, "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"],
                           "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 20,
                           "max_position_embeddings": 8, "rms_norm_eps": 1e-4, "rope_theta": 10000.0,
                           "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 13),
    # Rows longer than seq_length.
    "qwen_long": ({**SIZES, "model_type": "qwen", "architectures": ["QWenLMHeadModel"],
                   "num_attention_heads": 3, "kv_channels": 8, "intermediate_size": 40, "no_bias": False,
                   "layer_norm_epsilon": 1e-4, "max_position_embeddings": 64, "rotary_emb_base": 10000,
                   "seq_length": 4, "use_dynamic_ntk": True, "use_logn_attn": True}, 13),
}


def fill(model, generator):
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith(".bias"):
            values *= 0.2
        elif parameter.dim() == 1:
            values = 1 + 0.1 * values
        else:
            values *= 0.5 if "embeddings" in name or "wte" in name else parameter.shape[1]**-0.5
        parameter.data.copy_(values)


def make(name, folder):
    config, tokens = CASES[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    model = Decoder(config).eval()
    fill(model, generator)
    inputs = text_inputs(config["vocab_size"], tokens, 0, generator)
    inputs["input_ids"][1, 6] = 0
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    tensors = {f"in.{key}": value for key, value in inputs.items()} | computed(model, inputs)
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    save_file(tensors, folder / "parity.safetensors",
              {"format": "pt", "case": name, "reference": f"torch {torch.__version__}", "train": "false",
               "optimizer": json.dumps(OPTIMIZER),
               "note": "mean causal language model loss, eager attention, float32, evaluation"})


def check(folder):
    """The models above against cases that were made elsewhere."""
    model = Decoder(json.loads((folder / "config.json").read_text())).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    case = load_file(folder / "parity.safetensors")
    inputs = {key[3:]: value for key, value in case.items() if key.startswith("in.")}
    for key, value in computed(model, inputs).items():
        error = (value - case[key]).norm() / case[key].norm().clamp(min=1e-30)
        if key == "out.logits" and "attention_mask" in inputs:
            seen = inputs["attention_mask"].bool()
            error = (value[seen] - case[key][seen]).norm() / case[key][seen].norm()
        print(f"{error:.1e} {key}")
        assert error < 1e-4 or case[key].norm() == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = pathlib.Path(__file__).resolve().parent
    if sys.argv[1:] == ["--check"]:
        for case in ("qwen", "internlm2"):
            check(here / case)
    else:
        for case in CASES:
            make(case, pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here)
