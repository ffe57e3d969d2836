#!/usr/bin/env python3
"""Training steps in PyTorch with transformers and PEFT, as bench/step.cc does them: the same weights
(a model folder), the same tokens, AdamW. Prints one JSON object.

  torch_train.py --folder DIR [--lora R --adapter DIR] --cell compile+cudnn --dtype bf16 --batch 32 --tokens 1024

A cell is words joined by '+':
  eager | compile | max-autotune          how it runs
  cudnn | flash                           attention by that kernel alone (else PyTorch's choice)
  checkpoint | selective                  every block, or all but products and attention, computed again
  budgetX                                 the compiler's activation memory budget, 0 to 1
  foreach                                 AdamW by lists of tensors (else fused)
"""

import argparse
import contextlib
import functools
import json
import resource
import statistics
import time

import numpy
import torch

FRESH_IDS = 256  # batches that differ can only be learned from where most ids never come


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--adapter", default="")
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--cell", default="eager")
    parser.add_argument("--dtype", default="bf16", choices=["f32", "bf16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--fresh", action="store_true", help="another batch at every step")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args()


def tokens_of(args, vocabulary, step):
    """SplitMix64 of the place in the run, as bench/step.cc."""
    count = args.batch * args.tokens
    first = step * count if args.fresh else 0
    with numpy.errstate(over="ignore"):
        z = (numpy.arange(first, first + count, dtype=numpy.uint64) + numpy.uint64(1)) * numpy.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> numpy.uint64(31))) % numpy.uint64(min(vocabulary, FRESH_IDS) if args.fresh else vocabulary)
    ids = torch.from_numpy(z.astype(numpy.int64)).reshape(args.batch, args.tokens)
    return ids.to(args.device)


def selective():
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    aten = torch.ops.aten
    kept = [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
    return functools.partial(create_selective_checkpoint_contexts, kept)


def attention_of(words):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if "cudnn" in words:
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    if "flash" in words:
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return contextlib.nullcontext()


def build(args, words, versions):
    import transformers

    versions["transformers"] = transformers.__version__
    # No padding here: causal by the kernel. While it is compiled transformers would build a mask, which flash attention
    # refuses and which costs the others their causal kernels.
    if hasattr(transformers, "AttentionMaskInterface"):
        transformers.AttentionMaskInterface.register("sdpa", lambda *args, **more: None)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    model.to(args.device)
    if args.lora:
        import peft

        versions["peft"] = peft.__version__
        if "checkpoint" in words or "selective" in words:
            model.enable_input_require_grads()
        model = peft.PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    model.train()
    if "checkpoint" in words or "selective" in words:
        how = {"use_reentrant": False}
        if "selective" in words:
            how["context_fn"] = selective()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    return model


def compiled(model, words):
    for word in words:
        if word.startswith("budget"):
            from torch._functorch import config

            config.activation_memory_budget = float(word.removeprefix("budget"))
    if "max-autotune" in words:
        return torch.compile(model, mode="max-autotune")
    return torch.compile(model) if "compile" in words else model


def driver_bytes(device):
    if device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def begin_measuring(words):
    """The peak from here on. A captured graph's launches allocate nothing: what it holds is what is reserved, less what
    was reserved while kernels were tried."""
    if "max-autotune" in words:
        torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak_of(words, on_gpu):
    peak_is = "reserved by the allocator" if "max-autotune" in words else "allocated"
    if not on_gpu:
        return {"peak_bytes": 0, "reserved_bytes": 0, "peak_is": peak_is}
    reserved = torch.cuda.max_memory_reserved()
    peak = reserved if "max-autotune" in words else torch.cuda.max_memory_allocated()
    return {"peak_bytes": peak, "reserved_bytes": reserved, "peak_is": peak_is}


def main():
    args = arguments()
    words = args.cell.split("+")
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "numpy": numpy.__version__}
    on_gpu = args.device != "cpu"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.init()
        torch.zeros(1, device=args.device)
        versions["cudnn"] = torch.backends.cudnn.version()
    before = driver_bytes(args.device)
    model = build(args, words, versions)
    wait()
    ready = time.perf_counter()  # its weights are on the device
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = {"foreach": True} if "foreach" in words else {"fused": True}
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.1, **kind)
    run = compiled(model, words)
    vocabulary = model.config.vocab_size

    def step(number):
        ids = tokens_of(args, vocabulary, number)
        wait()
        start = time.perf_counter()
        torch.compiler.cudagraph_mark_step_begin()  # max-autotune captures graphs
        optimizer.zero_grad(set_to_none=True)
        with attention_of(words):
            loss = run(input_ids=ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        value = float(loss.detach())
        wait()
        return value, 1e3 * (time.perf_counter() - start)

    losses, times = [], []
    for number in range(args.warmup + args.steps):
        if number == args.warmup and on_gpu:
            begin_measuring(words)
        loss, ms = step(number)
        losses.append(loss)
        times.append(ms)
        if number == 0:
            first_ms = 1e3 * (time.perf_counter() - ready)
    timed = times[args.warmup :]
    result = {
        "peer": "pytorch",
        "model": args.folder,
        "mode": args.cell,
        "device": args.device,
        "dtype": args.dtype,
        "lora": args.lora,
        "batch": args.batch,
        "tokens": args.tokens,
        "trained": sum(p.numel() for p in trained),
        "tokens_per_s": args.batch * args.tokens / (statistics.median(timed) / 1e3),
        "step_ms": timed,
        "first_step_ms": first_ms,
        **peak_of(words, on_gpu),
        "driver_bytes": driver_bytes(args.device),
        "driver_bytes_before": before,
        "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": losses,
        "versions": versions,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
