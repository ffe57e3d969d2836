#!/usr/bin/env python3
"""Kernels in PyTorch for the shapes of a model: the rows of bench/device_kernels.cc, each as the best of
its eager and compiled forms. Prints one JSON object.

  torch_kernels.py --device cuda --dtype bf16 --batch 32 --tokens 1024 --width 768 --inner 3072 --heads 12
                   --kv-heads 12 --head-size 64 --vocabulary 50257
"""

import argparse
import contextlib
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

OUT_OF_MEMORY = "not run: out of memory"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16", choices=["f32", "bf16"])
    for name, value in {"batch": 2, "tokens": 32, "width": 64, "inner": 128, "heads": 4, "kv-heads": 2, "head-size": 16, "vocabulary": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--least-ms", type=float, default=30)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


class Kernels:
    def __init__(self, args):
        self.a = args
        self.rows = []
        self.dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
        self.on_gpu = args.device != "cpu"
        torch.manual_seed(3)

    def wait(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def drawn(self, *shape, dtype=None):
        return torch.randn(*shape, device=self.a.device, dtype=dtype or self.dtype)

    def ms(self, call, times):
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def sample(self, call):
        call()
        once = max(1e-4, self.ms(call, 2) / 2)
        times = int(min(2000, max(1, self.a.least_ms / once)))
        return statistics.median(self.ms(call, times) / times for _ in range(self.a.samples))

    def why(self, error):
        if not isinstance(error, torch.OutOfMemoryError):
            return str(error)[:300]
        torch.cuda.empty_cache()
        return OUT_OF_MEMORY

    def guarded(self, names, call):
        """Rows whose tensors alone are too large for the card say so; the others go on."""
        try:
            call()
        except torch.OutOfMemoryError as error:
            done = {row["kernel"] for row in self.rows}
            self.rows += [{"kernel": name, "ms": None, "forms": {}, "error": self.why(error)} for name in names if name not in done]

    def time(self, name, call, *tensors, compile=True, **more):
        """`call` of the tensors; the compiled form too where there is a choice."""
        forms = {"eager": lambda: call(*tensors)}
        if compile and not self.a.no_compile:
            compiled = torch.compile(call, dynamic=False)
            forms["compiled"] = lambda: compiled(*tensors)
        times = {}
        for form, run in forms.items():
            try:
                times[form] = self.sample(run)
            except Exception as error:  # a form that the peer does not have here
                more[f"{form}_error"] = self.why(error)
        row = {"kernel": name, "ms": min(times.values()) if times else None, "forms": times, **more}
        self.rows.append(row)

    def backward(self, name, forward, *leaves, compile=True, **more):
        """The gradients of all leaves by autograd, of a forward that is kept."""
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        forms = {"eager": forward}
        if compile and not self.a.no_compile:
            forms["compiled"] = torch.compile(forward, dynamic=False)
        times = {}
        for form, run in forms.items():
            try:
                out = run(*inputs)
                upstream = torch.randn_like(out)
                times[form] = self.sample(lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True))
            except Exception as error:
                more[f"{form}_error"] = self.why(error)
        self.rows.append({"kernel": name, "ms": min(times.values()) if times else None, "forms": times, **more})

    def run(self):
        a, N = self.a, self.a.batch * self.a.tokens
        x, y = self.drawn(N, a.width), self.drawn(N, a.width)
        weight, bias = self.drawn(a.width), self.drawn(a.width)
        self.copies(N)
        rms = lambda t, w: F.rms_norm(t, (a.width,), w, 1e-5)
        layer = lambda t, w, b: F.layer_norm(t, (a.width,), w, b, 1e-5)
        self.time("rms_norm", rms, x, weight)
        self.time("rms_norm_residual", lambda t, r, w: (t + r, rms(t + r, w)), x, y, weight)
        self.backward("rms_norm_backward", rms, x, weight)
        self.time("layer_norm", layer, x, weight, bias)
        self.backward("layer_norm_backward", layer, x, weight, bias)
        gate, up = self.drawn(N, a.inner), self.drawn(N, a.inner)
        gated = lambda g, u: F.silu(g) * u
        gelu = lambda t: F.gelu(t, approximate="tanh")
        self.time("gated_silu", gated, gate, up)
        self.backward("gated_silu_backward", gated, gate, up)
        self.time("gelu_tanh", gelu, gate)
        self.backward("gelu_tanh_backward", gelu, gate)
        del gate, up
        self.rope()
        self.guarded(["cross_entropy", "cross_entropy_backward", "linear_cross_entropy"], self.losses)
        self.optimizer()
        self.attention()
        self.products(N)
        return self.rows

    def copies(self, N):
        a = self.a
        for name, shape in {"copy": (N, a.width), "copy_inner": (N, a.inner), "copy_logits": (N, a.vocabulary), "copy_table": (a.vocabulary, a.width * 8)}.items():
            self.guarded([name], lambda: self.copy(name, shape))

    def copy(self, name, shape):
        x = torch.full(shape, 0.5, device=self.a.device, dtype=self.dtype)
        self.time(name, lambda t, s: t.copy_(s), torch.empty_like(x), x, compile=False)

    def rope(self):
        a = self.a
        x = self.drawn(a.batch, a.tokens, a.heads, a.head_size)
        angle = torch.arange(a.tokens, device=a.device)[:, None] * self.drawn(a.head_size // 2, dtype=torch.float32)[None]
        angle = torch.cat([angle, angle], -1)[:, None]
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)

        def rotate(t, c, s):
            first, second = t.chunk(2, -1)
            return t * c + torch.cat([-second, first], -1) * s

        self.time("rope", rotate, x, cos, sin)

    def losses(self):
        a = self.a
        rows = a.batch * a.tokens  # all of a step's
        labels = torch.arange(rows, device=a.device) * 2654435761 % a.vocabulary
        logits = self.drawn(rows, a.vocabulary)
        loss = lambda t, l: F.cross_entropy(t.float(), l)
        self.time("cross_entropy", loss, logits, labels)
        self.backward("cross_entropy_backward", lambda t: loss(t, labels), logits)
        del logits
        self.full_logits(loss, self.drawn(rows, a.width), self.drawn(a.vocabulary, a.width), labels)

    def full_logits(self, loss, x, w, labels):
        """Both forms with what they take beside inputs and gradients, as bench/device_kernels.cc counts it."""
        x, w = x.requires_grad_(), w.requires_grad_()
        forward = lambda t, v, l: loss(F.linear(t, v), l)
        forms = {"eager": forward}
        if not self.a.no_compile:
            forms["compiled"] = torch.compile(forward, dynamic=False)
        times, extra, more = {}, {}, {}
        for form, run in forms.items():
            try:
                whole = lambda: torch.autograd.grad(run(x, w, labels), [x, w])
                times[form] = self.sample(whole)
                extra[form] = self.extra_bytes(whole, x.nbytes + w.nbytes)
            except Exception as error:
                more[f"{form}_error"] = self.why(error)
        best = min(times, key=times.get) if times else None
        self.rows.append({"kernel": "linear_cross_entropy", "ms": times.get(best), "forms": times, "extra_bytes": extra.get(best, 0), "extra_bytes_of": extra, **more})

    def extra_bytes(self, call, gradients):
        if not self.on_gpu:
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before - gradients

    def optimizer(self):
        value = torch.nn.Parameter(self.drawn(self.a.vocabulary, self.a.width, dtype=torch.float32))
        value.grad = torch.randn_like(value)
        optimizer = torch.optim.AdamW([value], fused=True)
        self.time("adamw", optimizer.step, compile=False, note="float32 values and states, no copy in the dtype of the model")

    def attention(self):
        """PyTorch's choice, and cuDNN's and flash attention called alone. Where a kernel does not take grouped heads, it
        is given as many as there are queries' (copied before the time is taken)."""
        a = self.a
        q = self.drawn(a.batch, a.heads, a.tokens, a.head_size)
        k, v = (self.drawn(a.batch, a.kv_heads, a.tokens, a.head_size) for _ in range(2))
        backends = {"": None, "_cudnn": SDPBackend.CUDNN_ATTENTION, "_flash": SDPBackend.FLASH_ATTENTION}
        for suffix, kind in backends.items() if self.on_gpu else [("", None)]:
            self.attention_by(suffix, kind, q, k, v)

    def attention_by(self, suffix, kind, q, k, v, note=""):
        grouped = q.shape[1] != k.shape[1]

        def forward(q, k, v):
            with sdpa_kernel(kind) if kind is not None else contextlib.nullcontext():
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        try:
            forward(q, k, v)
        except RuntimeError as error:
            if grouped:
                k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
                return self.attention_by(suffix, kind, q, k, v, f"heads copied: {str(error)[:200]}")
        more = {"note": note} if note else {}
        self.time(f"attention{suffix}", forward, q, k, v, compile=False, **more)
        self.backward(f"attention_backward{suffix}", forward, q, k, v, compile=False, **more)

    def products(self, N):
        a = self.a
        qkv = (a.heads + 2 * a.kv_heads) * a.head_size
        for name, inner, outer in [("qkv", a.width, qkv), ("up", a.width, a.inner), ("down", a.inner, a.width)]:
            x, w, y = self.drawn(N, inner), self.drawn(outer, inner), self.drawn(N, outer)
            self.time(f"matmul_{name}", lambda s, t: s @ t.T, x, w, compile=False)
            self.time(f"matmul_{name}_dx", lambda s, t: s @ t, y, w, compile=False)
            self.time(f"matmul_{name}_dw", lambda s, t: s.T @ t, y, x, compile=False)


def main():
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = False
    functorch.donated_buffer = False  # a backward is timed again and again over one forward
    rows = Kernels(args).run()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    print(json.dumps({"peer": "pytorch", "device": args.device, "dtype": args.dtype, "rows": rows, "versions": versions}))


if __name__ == "__main__":
    main()
