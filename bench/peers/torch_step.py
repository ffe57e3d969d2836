#!/usr/bin/env python3
"""One training step in PyTorch, as bench/step does it: same shapes, AdamW, random weights and tokens.
Prints one JSON object. Needs torch and transformers from PyPI, and peft for --lora.

  torch_step.py [--model gpt2|qwen2-0.5b] [--lora R] --mode eager|compiled|checkpointed|budget --dtype f32|bf16 --tokens 512
"""

import argparse
import json
import platform
import resource
import statistics
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mode", default="eager", choices=["eager", "compiled", "checkpointed", "budget"])
    parser.add_argument("--budget", type=float, default=0.1, help="activation memory budget of mode budget")
    parser.add_argument("--dtype", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--model", default="gpt2", choices=["gpt2", "qwen2-0.5b"])
    parser.add_argument("--layers", type=int, default=0, help="instead of the model's own number")
    parser.add_argument("--lora", type=int, default=0, help="rank of PEFT's adapter on its default targets")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    return parser.parse_args()


def build(args, dtype):
    import transformers

    layers = {"num_hidden_layers": args.layers} if args.layers else {}
    if args.model == "gpt2":
        config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **layers)
        return transformers.GPT2LMHeadModel(config).to(dtype), config
    sizes = {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
    config = transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
        use_cache=False,
        **{**sizes, **layers},
    )
    return transformers.Qwen2ForCausalLM(config).to(dtype), config


def main():
    args = arguments()
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model, config = build(args, dtype)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if args.lora:
        import peft

        versions["peft"] = peft.__version__
        adapter = peft.LoraConfig(r=args.lora, lora_alpha=2 * args.lora, task_type="CAUSAL_LM")
        if args.mode == "checkpointed":
            model.enable_input_require_grads()
        model = peft.get_peft_model(model, adapter)
    model.train()
    if args.mode == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1)
    run = model
    if args.mode in ("compiled", "budget"):
        if args.mode == "budget":
            import torch._functorch.config

            torch._functorch.config.activation_memory_budget = args.budget
        run = torch.compile(model)
    ids = torch.randint(0, config.vocab_size, (args.batch, args.tokens))

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    start = time.perf_counter()
    losses = [step()]
    first_step_ms = 1e3 * (time.perf_counter() - start)
    for _ in range(args.warmup - 1):
        losses.append(step())
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - start)
    tokens = args.batch * args.tokens
    print(
        json.dumps(
            {
                "peer": "pytorch",
                "model": args.model,
                "mode": args.mode,
                "dtype": args.dtype,
                "lora": args.lora,
                "trained": sum(p.numel() for p in trained),
                "batch": args.batch,
                "tokens": args.tokens,
                "threads": args.threads,
                "tokens_per_s": tokens / statistics.median(times),
                "step_ms": [1e3 * t for t in times],
                "first_step_ms": first_step_ms,
                "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "losses": losses,
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
