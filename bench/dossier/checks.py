"""Stage 1: is it right on the device?"""

import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess

from . import machine
from .programs import Programs, flags
from .run import Item, Left

SANITIZERS = ["memcheck", "racecheck", "initcheck", "synccheck"]
# What the host of a card says that does not let the sanitizers in.
REFUSALS = ["Device not supported", "not supported on this", "No attachable", "insufficient permission", "ERR_NVGPUCTRPERM"]
OP_SHARDS, SANITIZER_SHARDS, PARITY_PARTS = 4, 8, 6


def build(session):
    """The preset, on the machine itself: where the work left off, as often as it takes."""
    folder = pathlib.Path(session.args.build)
    generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
    configure = ["cmake", "--preset", "device", "-G", generator, "-B", folder, "-DREPRISE_WERROR=OFF", f"-DREPRISE_PYTHON={session.args.python}"]
    if session.args.prefix:
        configure.append(f"-DCMAKE_PREFIX_PATH={session.args.prefix}")
    programs = Programs(session.args).targets
    for command in [configure, ["cmake", "--build", folder, "-j", os.cpu_count(), "--target", *programs]]:
        try:
            done = session.program(command)
        except subprocess.TimeoutExpired as error:
            raise Left() from error  # what is compiled stays
        if done.returncode != 0:
            return {"status": "failed", "error": (done.stdout + done.stderr)[-3000:], "command": [str(word) for word in command]}
    return {"status": "ok", "generator": generator, "programs": programs}


def no_device(session):
    """Why nothing can be asked of the device; empty where it copies. Asked at every start: else each item would fail of it."""
    if session.args.dry:
        return ""
    shape = {"batch": 1, "tokens": 8, "width": 32, "inner": 48, "samples": 1, "least-ms": 0, "only": "copy"}
    try:
        done = session.program([Programs(session.args).kernels, "--device", "cuda", *flags(shape)], 100)
    except (Left, subprocess.TimeoutExpired):
        return "the device did not copy 512 bytes before the time was up"
    except OSError as error:
        return f"{error}: build the preset device, or name a folder of tools/pack_device by --build"
    return "" if done.returncode == 0 else (done.stderr or done.stdout).strip()[-1500:]


def no_sign_of_a_device(session):
    """Before anything is built for one."""
    return "" if session.args.dry or machine.may_be_there() else "no device: there is no /dev/nvidia*, and nvidia-smi names no card"


def tests(session, program, gtest_filter, shards=1, shard=0, wrapper=()):
    """A GoogleTest program: how many ran and which failed."""
    environment = {"GTEST_TOTAL_SHARDS": str(shards), "GTEST_SHARD_INDEX": str(shard), "OMP_WAIT_POLICY": "passive"}
    command = [*wrapper, program, "--gtest_brief=1", f"--gtest_filter={gtest_filter}"]
    done = session.program(command, environment=environment)
    text = done.stdout + done.stderr
    result = {"command": [str(word) for word in command], "exit_code": done.returncode}
    failed = {line.split("]")[1].split(",")[0].split(" (")[0].strip() for line in text.splitlines() if line.startswith("[  FAILED  ]")}
    failed = sorted(name for name in failed if "." in name)
    ran = next((int(line.split()[1]) for line in text.splitlines() if line.startswith("[==========]") and "ran" in line), 0)
    skipped = next((int(line.split()[3]) for line in text.splitlines() if line.startswith("[  SKIPPED ]") and line.endswith((" test.", " tests."))), 0)
    refusal = next((line for line in text.splitlines() if any(words in line for words in REFUSALS)), "")
    # A refused tool may still let the tests run: what they pass then says nothing, what they fail does.
    if wrapper and refusal and (ran == 0 or done.returncode == 0):
        return {"status": "not run", "error": refusal, **result}
    if done.returncode == 0 and ran == skipped:
        return {"status": "not run", "error": f"all {skipped} tests skip themselves" if ran else "no test of that name", **result}
    status = "ok" if done.returncode == 0 else "failed"
    return {"status": status, "ran": ran, "skipped": skipped, "failed": failed, "error": "" if status == "ok" else text[-3000:], **result}


def sanitizer(tool, gtest_filter, shard):
    def call(session):
        found = machine.compute_sanitizer()
        if found is None or session.args.dry:
            return {"status": "not run", "error": "the shim is no device" if session.args.dry else "compute-sanitizer is not here"}
        wrapper = [found, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        return tests(session, Programs(session.args).op_cases, gtest_filter, SANITIZER_SHARDS, shard, wrapper)

    return call


def parity_of(session, case, dtype):
    command = [Programs(session.args).reprise, "parity", session.root / "tests/golden" / case, "--device", "cuda", "--every-policy", "--dtype", dtype, "--json"]
    done = session.program(command, environment={"OMP_WAIT_POLICY": "passive"})
    if done.returncode not in (0, 1):
        return {"status": "failed", "error": done.stderr[-1500:], "exit_code": done.returncode}
    report = json.loads(done.stdout)
    error = lambda t: t["absolute" if t["reference_is_zero"] else "relative"]  # null: it was not computed
    worst = max((error(t) / t["tolerance"] for t in report["tensors"] if error(t) is not None), default=0)
    missed = [t["key"] for t in report["tensors"] if not t["within"]]
    unequal = [p["name"] for p in report["policies"] if not p["equal"]]
    status = "ok" if report["passed"] else "failed"
    policies = [p["name"] for p in report["policies"]]
    return {"status": status, "worst": worst, "tensors": len(report["tensors"]), "missed": missed, "policies": policies, "unequal": unequal, "error": ", ".join(missed + unequal)}


def parity(cases, dtype, workers):
    """Several cases side by side: most of their time is the host's."""

    def call(session):
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            results = dict(zip(cases, pool.map(lambda case: parity_of(session, case, dtype), cases)))
        failed = [case for case, result in results.items() if result["status"] != "ok"]
        error = "; ".join(f"{case}: {results[case]['error']}" for case in failed)
        return {"status": "failed" if failed else "ok", "cases": results, "failed": failed, "error": error}

    return call


def graphs(session):
    """The same steps with and without a captured graph: the same losses, and what a step of a launch-bound size takes."""
    step = Programs(session.args).step
    if "--graph" not in session.program([step, "--help"], 60).stdout:
        return {"status": "not run", "error": "bench_step has no --graph"}
    config, steps = ("tiny-llama", 4) if session.args.dry else ("gpt2-124m", 20)
    shape = ["--config", session.root / f"bench/configs/{config}.json", "--batch", 1, "--tokens", 16 if session.args.dry else 128]
    both, launches = {}, 0
    for name, more in [("without", []), ("with", ["--graph"])]:
        words = [step, *shape, "--dtype", "bf16", "--fresh", "--device", "cuda", "--warmup", 3, "--steps", steps, *more]
        outcome = session.json_of(words)
        if outcome["status"] != "ok":
            return {**outcome, "status": "failed", "error": f"{name} graph: {outcome['error']}"}
        both[name] = {key: outcome["result"][key] for key in ["losses", "step_ms"]}
        launches = outcome["result"].get("graph_launches", launches)
    if launches == 0:
        return {"status": "not run", "error": "no step was a graph's launch", **both}
    equal = both["with"]["losses"] == both["without"]["losses"]
    return {"status": "ok" if equal else "failed", "error": "" if equal else "losses differ", "launches": launches, **both}


def other_tests(name, chosen):
    def call(session):
        program = pathlib.Path(session.args.build) / "tests" / name
        return tests(session, program, chosen) if program.exists() else {"status": "not run", "error": f"{name} was not built"}

    return call


def cases(session):
    if session.args.reduced:
        return ["gpt2_lora_saved"]
    return sorted(p.name for p in (session.root / "tests/golden").iterdir() if (p / "parity.safetensors").exists())


def items(session):
    args, programs = session.args, Programs(session.args)
    if args.make:
        yield Item(1, "build", 60, build, rank=0)
    rows = "All/OpCases.*norm_narrow*_cuda" if args.reduced else "All/OpCases.*_cuda"
    shards = 1 if args.reduced else 16 if args.dry else OP_SHARDS
    for shard in range(shards):
        yield Item(1, f"op_rows/part{shard + 1}", 20 if args.reduced else 100, lambda s, k=shard: tests(s, programs.op_cases, rows, shards, k), rank=10)
    steps = "Devices.TensorsWithAnyStrides" if args.reduced else "*"
    yield Item(1, "tests/steps", 20 if args.reduced else 100, lambda s: tests(s, programs.steps_test, steps), rank=11)
    for dtype, rank in [("f32", 12), ("bf16", 40)]:
        if not (args.dry and dtype == "bf16"):
            parts = min(24 if args.dry else PARITY_PARTS, len(cases(session)))
            for part in range(parts):
                yield Item(1, f"parity/{dtype}/part{part + 1}", 30, parity(cases(session)[part::parts], dtype, 2 if args.dry else 4), rank=rank)
    yield Item(1, "graphs", 40, graphs, rank=13)
    if not args.dry:
        for name, chosen in [("kernels_test", "*"), ("distributed/distributed_test", "Nccl*"), ("cuda/cudnn_test", "*")]:
            yield Item(1, f"tests/{name.split('/')[-1]}", 100, other_tests(name, chosen), rank=41)
    checked = "All/OpCases.ValuesAgree*_cuda:All/OpCases.GradientsAgree*_cuda"
    for tool in SANITIZERS:
        for shard in range(1 if args.dry else SANITIZER_SHARDS):
            rank = 45 if shard == 0 else 60 if tool == "memcheck" else 80
            yield Item(1, f"sanitizer/{tool}/part{shard + 1}", 5 if args.dry else 200, sanitizer(tool, checked, shard), rank=rank)
