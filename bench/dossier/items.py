"""What the dossier asks, in order."""

import json
import pathlib
import shutil

from .run import Item

SANITIZERS = ["memcheck", "racecheck", "initcheck", "synccheck"]
# What the host of a card says that does not let the sanitizers in.
REFUSALS = ["Device not supported", "not supported on this", "Unable to", "No attachable"]
OP_SHARDS = 4

# batch, tokens: of training steps. kernels: shapes. `compared`: peers' cells. The order of the models is
# that of the targets.
CELLS = ["eager", "eager+foreach", "compile", "compile+max-autotune", "compile+cudnn", "compile+flash", "compile+checkpoint", "compile+selective", "compile+budget0.5"]
POLICIES = ["keep-all", "keep-products", "inputs-only", "nested"]
MODELS = {
    "gpt2-124m": {"batch": 32, "tokens": 1024, "layers": 12, "rounds": 3, "seconds": 120},
    "llama-1.2b": {"batch": 4, "tokens": 2048, "layers": 16, "rounds": 2, "seconds": 200},
    "llama-8b-lora": {"config": "llama-8b", "batch": 1, "tokens": 2048, "layers": 32, "lora": 16, "rounds": 2, "seconds": 260},
    "llama-8b-8-layers": {"batch": 1, "tokens": 2048, "layers": 8, "rounds": 2, "seconds": 220},
}
TINY_MODELS = {
    "tiny-gpt2": {"batch": 2, "tokens": 16, "layers": 2, "rounds": 1, "seconds": 10},
    "tiny-llama-lora": {"config": "tiny-llama", "batch": 2, "tokens": 16, "layers": 2, "lora": 4, "rounds": 1, "seconds": 10},
}
TINY_CELLS = ["eager", "eager+checkpoint"]
KERNELS = {
    "gpt2-124m": {"batch": 32, "tokens": 1024, "width": 768, "inner": 3072, "heads": 12, "kv-heads": 12, "head-size": 64, "vocabulary": 50257},
    "gpt2-1.5b": {"batch": 8, "tokens": 1024, "width": 1600, "inner": 6400, "heads": 25, "kv-heads": 25, "head-size": 64, "vocabulary": 50257},
    "llama-8b": {"batch": 4, "tokens": 2048, "width": 4096, "inner": 14336, "heads": 32, "kv-heads": 8, "head-size": 128, "vocabulary": 128256},
}
TINY_KERNELS = {"tiny": {"batch": 1, "tokens": 8, "width": 32, "inner": 48, "heads": 2, "kv-heads": 1, "head-size": 16, "vocabulary": 40, "least-ms": 0, "samples": 1}}


class Programs:
    def __init__(self, args):
        build, shim = pathlib.Path(args.build), pathlib.Path(args.build) / "tests/simt"
        self.reprise = shim / "reprise_shim" if args.dry else build / "reprise"
        self.step = shim / "bench_step_shim" if args.dry else build / "bench/bench_step"
        self.kernels = shim / "bench_device_kernels_shim" if args.dry else build / "bench/bench_device_kernels"
        self.op_cases = shim / "op_cases_simt_test" if args.dry else build / "tests/op_cases_test"
        self.steps_test = shim / "device_simt_test" if args.dry else build / "tests/device_test"


def flags(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


# ---- stage 1 -----------------------------------------------------------------------------------------


def tests(session, program, gtest_filter, timeout, shards=1, shard=0, wrapper=()):
    """A GoogleTest program: how many ran and which failed."""
    environment = {"GTEST_TOTAL_SHARDS": str(shards), "GTEST_SHARD_INDEX": str(shard), "OMP_WAIT_POLICY": "passive"}
    command = [*wrapper, program, "--gtest_brief=1", f"--gtest_filter={gtest_filter}"]
    done = session.program(command, timeout, environment)
    text = done.stdout + done.stderr
    result = {"command": [str(word) for word in command], "exit_code": done.returncode}
    if wrapper and any(refusal in text for refusal in REFUSALS):
        return {"status": "not run", "error": text[-800:], **result}
    failed = sorted({line.split("]")[1].split(",")[0].strip() for line in text.splitlines() if line.startswith("[  FAILED  ]")})
    ran = next((int(line.split()[1]) for line in text.splitlines() if line.startswith("[==========]") and "ran" in line), 0)
    if done.returncode == 0 and ran == 0 and shards == 1:
        return {"status": "not run", "error": "no test of that name", **result}
    status = "ok" if done.returncode == 0 else "failed"
    return {"status": status, "ran": ran, "failed": failed, "error": "" if status == "ok" else text[-3000:], **result}


def sanitizer(tool, gtest_filter, shard):
    def call(session):
        found = shutil.which("compute-sanitizer")
        if found is None or session.args.dry:
            return {"status": "not run", "error": "compute-sanitizer is not here" if found is None else "the shim is no device"}
        wrapper = [found, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        return tests(session, Programs(session.args).op_cases, gtest_filter, 500, OP_SHARDS, shard, wrapper)

    return call


def parity(case, dtype):
    def call(session):
        command = [Programs(session.args).reprise, "parity", session.root / "tests/golden" / case, "--device", "cuda", "--every-policy", "--dtype", dtype, "--json"]
        done = session.program(command, 300, {"OMP_WAIT_POLICY": "passive"})
        if done.returncode not in (0, 1):
            return {"status": "failed", "error": done.stderr[-1500:], "exit_code": done.returncode}
        report = json.loads(done.stdout)
        error = lambda t: t["absolute" if t["reference_is_zero"] else "relative"]  # null: it was not computed
        worst = max((error(t) / t["tolerance"] for t in report["tensors"] if error(t) is not None), default=0)
        missed = [t["key"] for t in report["tensors"] if not t["within"]]
        unequal = [p["name"] for p in report["policies"] if not p["equal"]]
        status = "ok" if report["passed"] else "failed"
        return {"status": status, "worst": worst, "tensors": len(report["tensors"]), "missed": missed, "unequal": unequal, "error": ", ".join(missed + unequal)}

    return call


def graphs(session):
    """The same steps with and without graph capture."""
    helped = session.program([Programs(session.args).step, "--help"], 60)
    if "--graph" not in helped.stdout:
        return {"status": "not run", "error": "bench_step has no --graph"}
    outcomes = []
    for more in [[], ["--graph"]]:
        shape = ["--config", session.root / "bench/configs/tiny-llama.json", "--batch", 2, "--tokens", 16, "--device", "cuda", "--warmup", 1, "--steps", 4]
        outcomes.append(session.json_of([Programs(session.args).step, *shape, *more], 300))
        if outcomes[-1]["status"] != "ok":
            return outcomes[-1]
    equal = outcomes[0]["result"]["losses"] == outcomes[1]["result"]["losses"]
    return {"status": "ok" if equal else "failed", "error": "" if equal else "losses differ", "losses": [o["result"]["losses"] for o in outcomes]}


def stage1(session):
    args, programs = session.args, Programs(session.args)
    rows = "All/OpCases.*norm_narrow*_cuda" if args.reduced else "All/OpCases.*_cuda"
    shards = 1 if args.reduced else OP_SHARDS
    slow = 600 if args.dry else 120
    for shard in range(shards):
        yield Item(1, f"op_rows/part{shard + 1}", 60 if args.reduced else slow, lambda s, k=shard: tests(s, programs.op_cases, rows, 520, shards, k))
    steps = "Devices.TensorsWithAnyStrides" if args.reduced else "*"
    yield Item(1, "tests/steps", 30 if args.reduced else slow, lambda s: tests(s, programs.steps_test, steps, 520))
    if not args.dry:
        build = pathlib.Path(args.build)
        for name, chosen in [("kernels_test", "*"), ("distributed/distributed_test", "Nccl*"), ("cuda_test", "*"), ("cuda/cuda_test", "*")]:
            if (build / "tests" / name).exists():
                yield Item(1, f"tests/{name.split('/')[-1]}", 200, lambda s, n=name, c=chosen: tests(s, build / "tests" / n, c, 520))
    yield Item(1, "graphs", 60, graphs)
    cases = sorted(p.name for p in (session.root / "tests/golden").iterdir() if (p / "parity.safetensors").exists())
    for dtype in ["f32", "bf16"]:
        for case in ["gpt2_lora_saved"] if args.reduced else cases:
            if not (args.dry and dtype == "bf16"):
                yield Item(1, f"parity/{dtype}/{case}", 60 if args.dry else 20, parity(case, dtype))
    checked = "All/OpCases.ValuesAgree*_cuda:All/OpCases.GradientsAgree*_cuda"
    for tool in SANITIZERS:
        for shard in range(1 if args.dry else OP_SHARDS):
            yield Item(1, f"sanitizer/{tool}/part{shard + 1}", 10 if args.dry else 500, sanitizer(tool, checked, shard))


# ---- stage 2 -----------------------------------------------------------------------------------------


def stage2(session):
    args = session.args
    shapes = TINY_KERNELS if args.dry else KERNELS
    device = "cpu" if args.dry else "cuda"
    for name, shape in shapes.items():
        for dtype in ["bf16"] if args.dry else ["bf16", "f32"]:
            ours = [Programs(args).kernels, "--device", "cuda", "--dtype", dtype, *flags(shape)]
            yield Item(2, f"kernels/{name}/{dtype}/reprise", 20 if args.dry else 120, lambda s, c=ours: s.json_of(c, 500))
            if session.has_peers:
                peer = [args.python, session.root / "bench/peers/torch_kernels.py", "--device", device, "--dtype", dtype, *flags(shape)]
                more = ["--no-compile"] if args.dry else []
                yield Item(2, f"kernels/{name}/{dtype}/pytorch", 60 if args.dry else 300, lambda s, c=peer + more: s.json_of(c, 500))


# ---- stages 3 and 4 ----------------------------------------------------------------------------------


def folder_of(session, name, model):
    return session.scratch / model.get("config", name)


def prepare(session, name, model):
    """A folder of random weights, and an adapter of its own; on this machine only."""
    folder = folder_of(session, name, model)
    if not (folder / "config.json").exists():
        config = session.root / "bench/configs" / (model.get("config", name) + ".json")
        done = session.program([Programs(session.args).reprise, "init", config, folder, "--dtype", "bf16"], 500)
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-500:])
    words = ["--folder", folder, "--batch", model["batch"], "--tokens", model["tokens"], "--dtype", "bf16"]
    if "lora" in model:
        words += ["--lora", model["lora"], "--adapter", session.scratch / f"{name}-adapter"]
        if not (session.scratch / f"{name}-adapter").exists():
            made = session.json_of([Programs(session.args).step, *words, "--device", "cuda", "--warmup", 1, "--steps", 1, "--batch", 1, "--tokens", 16], 500)
            if made["status"] != "ok":
                raise RuntimeError(made["error"])
    return words


def ours(name, model, policy, more=()):
    def call(session):
        words = prepare(session, name, model)
        steps = ["--warmup", 1, "--steps", 1] if session.args.dry else ["--warmup", 3, "--steps", 10]
        shape = [Programs(session.args).step, *words, "--policy", policy, *steps, *more]
        result = session.json_of([*shape, "--device", "cuda"], 400)
        if result["status"] == "ok":
            planned = session.json_of([*shape, "--device", "cuda", "--dry-run"], 200)
            result["planned"] = planned.get("result", {}).get("peak_bytes")
        return result

    return call


def theirs(name, model, cell, more=()):
    def call(session):
        device = "cpu" if session.args.dry else "cuda"
        words = prepare(session, name, model)
        steps = ["--warmup", 1, "--steps", 1] if session.args.dry else ["--warmup", 3, "--steps", 10]
        peer = session.root / "bench/peers/torch_train.py"
        return session.json_of([session.args.python, peer, *words, "--cell", cell, "--device", device, *steps, *more], 500)

    return call


def losses(name, model):
    """20 steps, each on another batch, from the same weights in both."""

    def call(session):
        count = 3 if session.args.dry else 20
        more = ["--fresh", "--warmup", 1, "--steps", count - 1]
        both = [ours(name, model, "inputs-only", more)(session), theirs(name, model, "eager", more)(session)]
        failed = next((result for result in both if result["status"] != "ok"), None)
        if failed:
            return failed
        a, b = (result["result"]["losses"] for result in both)
        worst = max(abs(x - y) / abs(y) for x, y in zip(a, b))
        equal = len(a) == len(b) == count and worst < 0.01
        return {"status": "ok" if equal else "failed", "worst": worst, "reprise": a, "pytorch": b, "error": "" if equal else f"losses differ by {worst:.2%}"}

    return call


def stage3(session):
    models, cells = (TINY_MODELS, TINY_CELLS) if session.args.dry else (MODELS, CELLS)
    for name, model in models.items():
        seconds = model["seconds"]
        if session.has_peers:
            yield Item(3, f"steps/{name}/losses", seconds, losses(name, model))
        for turn in range(model["rounds"]):
            for policy in ["keep-all", "keep-products", "inputs-only"]:
                yield Item(3, f"steps/{name}/reprise/{policy}/round{turn + 1}", seconds, ours(name, model, policy))
            for cell in cells if session.has_peers else []:
                yield Item(3, f"steps/{name}/pytorch/{cell}/round{turn + 1}", seconds * 2 if "max" in cell else seconds, theirs(name, model, cell))


def stage4(session):
    """What stage 3 does not have: policies in between, and all cells by their memory."""
    models = TINY_MODELS if session.args.dry else MODELS
    for name, model in models.items():
        layers = model["layers"]
        yield Item(4, f"curve/{name}/nested", model["seconds"], ours(name, model, "nested"))
        for base in ["inputs-only", "keep-products"]:
            for part in [1] if session.args.dry else [1, 2, 3]:
                kept = max(1, layers * part // 4)
                yield Item(4, f"curve/{name}/{base}+first{kept}", model["seconds"], ours(name, model, base, ["--keep-first", kept]))


def all_items(session):
    return [*stage1(session), *stage2(session), *stage3(session), *stage4(session)]
