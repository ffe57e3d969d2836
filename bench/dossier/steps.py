"""Stages 3 and 4: whole training steps, in turn with PyTorch's, and the curve of memory and time."""

import math
import shutil

from . import kernels
from .programs import Programs
from .run import Item

# The cells of PyTorch, joined as bench/peers/torch_train.py reads them; fused AdamW but in eager+foreach.
CELLS = [
    "compile", "compile+cudnn", "max-autotune", "eager", "compile+flash", "compile+checkpoint", "compile+selective",
    "compile+budget0.5", "eager+foreach", "eager+cudnn", "eager+flash", "eager+checkpoint", "eager+selective", "compile+budget0.2",
]  # fmt: skip
# Of each model before any more of one: an answer to most targets. Then its likely rivals, and then what takes a search.
FIRST = ["inputs-only", "keep-all", "compile"]
SECOND = ["keep-products", "compile+cudnn", "eager"]
SEARCHES = ["keep-all+searched", "keep-all+graph", "max-autotune"]
ROUND = 35
LEAST_FALL, LORA_RATE = 0.3, 3e-3  # of the losses that are compared
# Ours; "searched" uses the choices of a search among cuBLASLt's algorithms, "graph" launches captured steps.
POLICIES = ["inputs-only", "keep-all", "keep-products", "keep-all+searched", "keep-all+graph"]
CURVE = ["nested", "keep-products+offload"]
# batch, tokens: of a step. config: its file, where it is not called as the model. rank: what is worth most.
MODELS = {
    "gpt2-124m": {"batch": 32, "tokens": 1024, "layers": 12, "rounds": 3, "seconds": 60, "rank": 21},
    "llama-8b-lora": {"config": "llama-8b", "batch": 1, "tokens": 2048, "layers": 32, "lora": 16, "rounds": 2, "seconds": 100, "rank": 24},
    "llama-1.2b": {"batch": 4, "tokens": 2048, "layers": 16, "rounds": 2, "seconds": 80, "rank": 22},
    "llama-8b-8-layers": {"batch": 1, "tokens": 2048, "layers": 8, "rounds": 2, "seconds": 80, "rank": 23},
}
WEIGHTS_SECONDS = {"gpt2-124m": 5, "llama-1.2b": 30, "llama-8b": 150, "llama-8b-8-layers": 60}
TINY_MODELS = {
    "tiny-gpt2": {"batch": 2, "tokens": 16, "layers": 2, "rounds": 1, "seconds": 10, "rank": 21},
    "tiny-llama-lora": {"config": "tiny-llama", "batch": 2, "tokens": 16, "layers": 2, "lora": 4, "rounds": 1, "seconds": 10, "rank": 22},
}
TINY_CELLS = ["eager", "compile", "compile+budget0.5", "eager+checkpoint", "eager+selective", "eager+foreach"]


def models(session):
    return TINY_MODELS if session.args.dry else MODELS


def folder_of(session, name, model):
    return session.scratch / model.get("config", name)


def seconds_of_weights(name, model):
    """What a machine needs first that has no weights yet."""

    def seconds(session):
        there = (folder_of(session, name, model) / "config.json").exists()
        return 0 if there else WEIGHTS_SECONDS.get(model.get("config", name), 5)

    return seconds


def prepare(session, name, model):
    """A folder of random weights, and an adapter of its own; on this machine only."""
    folder = folder_of(session, name, model)
    if not (folder / "config.json").exists():
        config = session.root / "bench/configs" / (model.get("config", name) + ".json")
        made = folder.with_name(folder.name + ".new")
        shutil.rmtree(made, ignore_errors=True)  # of a run that was ended
        done = session.program([Programs(session.args).reprise, "init", config, made, "--dtype", "bf16"])
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-500:])
        made.rename(folder)
    words = ["--folder", folder, "--dtype", "bf16"]
    if "lora" in model:
        words += ["--lora", model["lora"], "--adapter", session.scratch / f"{name}-adapter"]
        if not (session.scratch / f"{name}-adapter").exists():
            made = session.json_of([Programs(session.args).step, *words, "--device", "cuda", "--warmup", 1, "--steps", 1, "--batch", 1, "--tokens", 16])
            if made["status"] != "ok":
                raise RuntimeError(made["error"])
    return [*words, "--batch", model["batch"], "--tokens", model["tokens"]]


def counted(session):
    return ["--warmup", 1, "--steps", 1] if session.args.dry else ["--warmup", 3, "--steps", 10]


def ours(name, model, policy, more=(), repeat=None):
    def call(session):
        words = prepare(session, name, model)
        program, searched = Programs(session.args).step, policy.endswith("+searched")
        shape = [program, *words, "--policy", policy.replace("+searched", "").replace("+graph", ""), *(repeat or counted(session)), *more]
        graph = ["--graph"] if policy.endswith("+graph") else []
        if graph and "--graph" not in session.program([program, "--help"]).stdout:
            return {"status": "not run", "error": "bench_step has no --graph"}
        result = session.json_of([*shape, *graph, "--device", "cuda"], environment=kernels.environment_of(session, "searched" if searched else ""))
        if result["status"] == "ok":
            planned = session.json_of([*shape, "--device", "cuda", "--dry-run"])
            result["planned"] = planned.get("result", {}).get("peak_bytes")
        return result

    return call


def theirs(name, model, cell, more=(), repeat=None):
    def call(session):
        if lacking := session.lacks("torch", "transformers", *(["peft"] if "lora" in model else [])):
            return lacking
        device = "cpu" if session.args.dry else "cuda"
        words = prepare(session, name, model)
        peer = session.root / "bench/peers/torch_train.py"
        command = [session.args.python, peer, *words, "--cell", cell, "--device", device, *(repeat or counted(session)), *more]
        return session.json_of(command, environment=no_caches(session, f"{name}-{cell}"))

    return call


def no_caches(session, name):
    """What was compiled in an earlier round is compiled again: its time is the first step's."""
    folder = session.scratch / "compiled" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}


def compared(ours, theirs, count, least_fall):
    """Equal losses: each within 1%, and the same fall, without which 20 steps that teach nothing would be equal too. A
    dry run's have none to ask for: of a tiny vocabulary all ids are drawn."""
    numbers = [*ours, *theirs]
    said = {"reprise": ours, "pytorch": theirs}
    if len(ours) != count or len(theirs) != count:
        return {"status": "failed", "error": f"{len(ours)} and {len(theirs)} losses instead of {count}", **said}
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        return {"status": "failed", "error": "a loss is no number", **said}
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs))
    falls = [ours[0] - ours[-1], theirs[0] - theirs[-1]]
    said.update(worst=worst, falls=falls)
    if worst >= 0.01:
        return {"status": "failed", "error": f"losses differ by {worst:.2%}", **said}
    if least_fall is None:
        return {"status": "ok", "error": "", **said}
    if falls[1] <= least_fall:
        return {"status": "failed", "error": f"PyTorch's loss falls by {falls[1]:.3f} only: nothing is learned", **said}
    if abs(falls[0] / falls[1] - 1) >= 0.1:
        return {"status": "failed", "error": f"losses fall by {falls[0]:.3f}, PyTorch's by {falls[1]:.3f}", **said}
    return {"status": "ok", "error": "", **said}


def losses(name, model):
    """20 steps, each on another batch, from the same weights in both."""

    def call(session):
        count = 3 if session.args.dry else 20
        rate = ["--learning-rate", LORA_RATE] if "lora" in model else []
        repeat, more = ["--warmup", 1, "--steps", count - 1], ["--fresh", *rate]
        both = {}
        # The peer first: where it lacks a package, nothing else is spent.
        for peer, run in [("pytorch", theirs(name, model, "eager", more, repeat)), ("reprise", ours(name, model, "inputs-only", more, repeat))]:
            outcome = run(session)
            if outcome["status"] != "ok":
                return {**outcome, "error": f"{peer}: {outcome['error']}"}
            both[peer] = outcome["result"]["losses"]
        return compared(both["reprise"], both["pytorch"], count, None if session.args.dry else LEAST_FALL)

    return call


def in_turn(a, b):
    """a0 b0 a1 b1 ..., so that a card that grows warm does so for both."""
    longest = max(len(a), len(b))
    return [x for pair in zip([*a, *[None] * (longest - len(a))], [*b, *[None] * (longest - len(b))]) for x in pair if x is not None]


def later(cell, turn):
    tier = 0 if cell in FIRST else 10 if cell in SECOND else 25 if cell in SEARCHES else 35
    return tier + ROUND * turn


def cells_of(dry):
    return TINY_CELLS if dry else CELLS


def stage3(session):
    for name, model in models(session).items():
        seconds, rank, before = model["seconds"], model["rank"], seconds_of_weights(name, model)
        item = lambda key, call, more=0, after=0: Item(3, f"steps/{name}/{key}", seconds + more, call, rank=rank + after, before=before)
        if session.has_peers:
            yield item("losses", losses(name, model), seconds)
        for turn in range(model["rounds"]):
            mine = [item(f"reprise/{policy}/round{turn + 1}", ours(name, model, policy), 0, later(policy, turn)) for policy in POLICIES]
            peers = []
            for cell in cells_of(session.args.dry) if session.has_peers else []:
                peers.append(item(f"pytorch/{cell}/round{turn + 1}", theirs(name, model, cell), 3 * seconds if "max" in cell else 0, later(cell, turn)))
            yield from in_turn(mine, peers)


def stage4(session):
    """What stage 3 does not have: policies in between. The curve is of both."""
    for name, model in models(session).items():
        item = lambda key, call: Item(4, f"curve/{name}/{key}", model["seconds"], call, rank=model["rank"] + 30, before=seconds_of_weights(name, model))
        for policy in CURVE:
            yield item(policy, ours(name, model, policy))
        for base in ["inputs-only", "keep-products"]:
            for part in [1] if session.args.dry else [1, 2, 3]:
                kept = max(1, model["layers"] * part // 4)
                yield item(f"{base}+first{kept}", ours(name, model, base, ["--keep-first", kept]))
