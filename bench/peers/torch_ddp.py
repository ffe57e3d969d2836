#!/usr/bin/env python3
"""A data-parallel step of GPT-2 with PyTorch's DistributedDataParallel over gloo, as bench_reduce does it:
same shapes, AdamW, bucket sizes, ranks and threads. Prints one JSON object. Needs torch and transformers.

  torch_ddp.py [--ranks 2] [--layers 12] [--tokens 128] [--bucket-mib 25]
"""

import argparse
import json
import os
import platform
import socket
import statistics
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bucket-mib", type=float, default=25)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    return parser.parse_args()


def rank_main(rank, args, port):
    # Threads of the products are counted when torch is loaded.
    os.environ.update(OMP_NUM_THREADS=str(args.threads), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    import torch.distributed as dist
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks)
    config = transformers.GPT2Config(
        vocab_size=args.vocabulary,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.train()
    # The first bucket has 1 MiB, as DDP sets it itself; gradients are views of the buckets.
    wrapped = torch.nn.parallel.DistributedDataParallel(
        model, bucket_cap_mb=args.bucket_mib, gradient_as_bucket_view=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    torch.manual_seed(7 + rank)
    ids = torch.randint(0, config.vocab_size, (args.batch, args.tokens))

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    for _ in range(args.warmup):
        step()
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    if rank == 0:
        print(
            json.dumps(
                {
                    "peer": "pytorch ddp, gloo",
                    "ranks": args.ranks,
                    "threads": args.threads,
                    "batch": args.batch,
                    "tokens": args.tokens,
                    "layers": args.layers,
                    "gradient_bytes": sum(4 * p.numel() for p in model.parameters()),
                    "step_ms": times,
                    "median_ms": statistics.median(times),
                    "versions": {
                        "python": platform.python_version(),
                        "torch": torch.__version__,
                        "transformers": transformers.__version__,
                    },
                }
            ),
            flush=True,
        )
    dist.barrier()
    dist.destroy_process_group()


def main():
    args = arguments()
    import multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_main, args=(r, args, port)) for r in range(args.ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode != 0 for process in ranks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
