#!/usr/bin/env python3
"""bench/gpu_dossier from end to end on the SIMT shim: it stops when its time is up, goes on after it was killed, from
its archive in another folder, and writes every file; a failing item is seen as one and done again when asked. Items
end at their limit and the session at its end, with all that they started."""

import argparse
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = ["stage1.json", "stage2.json", "stage3.json", "stage4.json", "targets.json", "curve.json", "curve.svg", "summary.md"]
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "bench"))
checks = importlib.import_module("dossier.checks")
run = importlib.import_module("dossier.run")
report = importlib.import_module("dossier.report")
steps = importlib.import_module("dossier.steps")
machine = importlib.import_module("dossier.machine")
every = importlib.import_module("dossier.items")


def command_of(build, out, archive, *more):
    command = [sys.executable, ROOT / "bench/gpu_dossier", "--dry", "--reduced", "--no-peers", "--build", build]
    command += ["--out", out, "--archive", archive, "--scratch", out.parent / "scratch", *more]
    return [str(word) for word in command]


class Printed:
    """A session whose programs print this."""

    def __init__(self, *lines):
        self.said = "\n".join(lines)

    def program(self, command, timeout=0, environment=None):
        return subprocess.CompletedProcess(command, 9 if "FAILED" in self.said else 0, self.said, "")


def judged():
    """What GoogleTest and compute-sanitizer print."""
    ran = "[==========] 3 tests from 1 test suite ran. (5 ms total)"
    of = lambda *lines, **more: checks.tests(Printed(*lines), "program", "*", **more)
    assert of(ran, "[  PASSED  ] 3 tests.")["status"] == "ok"
    assert of(ran, "[  PASSED  ] 1 test.", "[  SKIPPED ] 2 tests.")["skipped"] == 2
    assert of(ran, "[  PASSED  ] 0 tests.", "[  SKIPPED ] 3 tests.")["status"] == "not run"
    assert of("[==========] 0 tests from 0 test suites ran. (0 ms total)", shards=4)["status"] == "not run"
    failed = of("[  FAILED  ] All/OpCases.X/relu_cuda, where GetParam() = relu (3 ms)", ran, "[  FAILED  ] 1 test, listed below:")
    assert failed["status"] == "failed" and failed["failed"] == ["All/OpCases.X/relu_cuda"], failed
    refused = of("========= Error: Device not supported. Please refer to the tool's documentation", "FAILED", wrapper=["compute-sanitizer"])
    assert refused["status"] == "not run" and "Device not supported" in refused["error"], refused
    # Tests that ran without the tool: nothing was checked by it, but what failed has failed.
    refusal = "========= Error: Device not supported"
    assert of(refusal, ran, "[  PASSED  ] 3 tests.", wrapper=["compute-sanitizer"])["status"] == "not run"
    hidden = of(refusal, "[  FAILED  ] All/OpCases.X/relu_cuda (3 ms)", ran, wrapper=["compute-sanitizer"])
    assert hidden["status"] == "failed" and hidden["failed"], hidden
    assert of("Unable to open a file", "[  FAILED  ] A.B (3 ms)", ran, wrapper=["compute-sanitizer"])["status"] == "failed"


def dossier(*words):
    done = subprocess.run(command_of(*words), capture_output=True, text=True)
    print(done.stdout + done.stderr, flush=True)
    return done


def items(out):
    return {key: item for stage in [1, 2, 3, 4] for key, item in json.loads((out / f"stage{stage}.json").read_text())["items"].items()}


def killed(build, out, archive):
    """Killed after its first items: they are in the archive."""
    process = subprocess.Popen(command_of(build, out, archive), stdout=subprocess.PIPE, text=True)
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with tarfile.open(archive) as kept:
        names = [name for name in kept.getnames() if name.startswith("items/")]
    assert len(names) >= 2, names
    return names


def end_to_end(build, folder):
    first, second, archive = (folder / name for name in ["first", "second", "archive.tar.gz"])
    stopped = dossier(build, first, archive, "--minutes", "0")
    assert stopped.returncode == 3 and " items are left: run again" in stopped.stdout, stopped.returncode
    assert "waiting" in (first / "summary.md").read_text() and "| pass |" not in (first / "summary.md").read_text()
    broken = dossier("/nowhere", first, archive, "--only", "kernels/")
    assert broken.returncode == 0 and items(first)["kernels/tiny/bf16/reprise"]["status"] == "failed"
    names = killed(build, first, archive)
    # Another machine: what was done there is not done again, but what failed is.
    whole = dossier(build, second, archive, "--minutes", "14", "--again")
    assert whole.returncode == 0, whole.returncode
    for name in names:
        assert name.startswith("items/kernels/") or f" {name[6:-5]} " not in whole.stdout, name
    done = items(second)
    states = {key: item["status"] for key, item in done.items()}
    allowed = lambda key: ["not run"] if key.startswith("sanitizer/") else ["ok"]
    assert all(state in allowed(key) for key, state in states.items()), states
    assert done["op_rows/part1"]["ran"] > 20
    for item in done.values():
        assert len(item["versions"]["commit"]) >= 7 and item["card"]["before"] and item["card"]["after"]
    curve = json.loads((second / "curve.json").read_text())["models"]["tiny-gpt2"]
    assert len(curve) >= 8, curve.keys()
    for name, row in curve.items():
        kept = row["peak_bytes"] - row["planned"]  # a graph's ids and scalars are the device's, and small
        assert row["tokens_per_s"] > 0 and row["planned"] > 0 and (0 <= kept < 4096 if name.endswith("+graph") else kept == 0), row
    assert all((second / name).stat().st_size > 0 for name in FILES)
    circles = [node for node in xml.etree.ElementTree.parse(second / "curve.svg").iter() if node.tag.endswith("circle")]
    assert len(circles) == 2 * len(curve), len(circles)  # two models
    commit = done["graphs"]["versions"]["commit"]
    assert all(commit in (second / name).read_text() for name in FILES)
    again = dossier(build, second, archive)
    assert again.returncode == 0 and " ok " not in again.stdout, again.stdout
    # No dry run, and a build without CUDA: nothing is begun.
    command = [word for word in command_of(build, folder / "fourth", folder / "none.tar.gz") if word not in ("--dry", "--reduced")]
    alone = subprocess.run(command, capture_output=True, text=True)
    assert alone.returncode == 1 and "CUDA" in alone.stderr, (alone.returncode, alone.stderr)
    assert not (folder / "fourth").exists()
    listed = dossier(build, folder / "fifth", archive, "--list")
    assert listed.returncode == 0 and "  done" in listed.stdout and "0 of " in listed.stdout, listed.stdout
    assert not (folder / "fifth").exists()
    making = dossier(build, folder / "fifth", folder / "none.tar.gz", "--list", "--make", "--stages", "3", "--only", "nothing")
    assert making.stdout.startswith("build  (stage 1") and "1 of 1 items are left, about 1 minutes" in making.stdout, making.stdout
    (folder / "damaged.tar.gz").write_text("no archive")
    damaged = dossier(build, folder / "third", folder / "damaged.tar.gz")
    assert damaged.returncode == 1 and "no archive of a dossier" in damaged.stderr


def watched():
    """What the card says while an item runs."""
    said = iter([{"clocks.sm": "1980", "temperature.gpu": "60", "power.draw": "[N/A]", "reasons": "0x4"}, {}])
    watch = machine.Watch("reasons", lambda: next(said, {"clocks.sm": "1410", "temperature.gpu": "70", "power.draw": "[N/A]", "reasons": "0x1"}), 0.02)
    with watch:
        time.sleep(0.5)
    told = watch.told()
    assert told["samples"] > 2 and told["clocks.sm"] == {"min": 1410, "median": 1410, "max": 1980}, told
    assert told["reasons"]["0x4"] == 1 and told["reasons"]["0x1"] > 0 and "power.draw" not in told, told


def others(folder):
    """Results of another card or commit are not this one's; an unfinished folder is gone on with, whatever the day."""
    item = run.Item(1, "kind/one", 10.0, lambda s: {"status": "ok"})
    first = session_of(folder, 30, "others")
    first.begin()
    assert first.work([item]) == 0 and first.done(item)
    for name in first.origin:
        session = session_of(folder, 30, "others")
        session.origin = {**session.origin, name: "another"}
        session.begin()
        assert session.result(item) is None and not session.done(item)
        assert any("another" not in line and "not counted" in line for line in report.origins_text(session)), report.origins_text(session)
        session.args.keep_others = True
        assert session.done(item)
    # Items that were quick make the next ones of their kind need less, but not nothing.
    more = [run.Item(1, f"kind/{name}", 10.0, lambda s: {"status": "ok"}) for name in ["two", "three"]]
    assert session_of(folder, 30, "others").needs(more[1]) == 10
    assert first.work(more[:1]) == 0 and first.needs(more[1]) == 2.5, first.needs(more[1])
    results = folder / "results"
    session = session_of(folder, 30)
    today = session.unfinished(results)
    assert today.parent == results and not today.exists()
    for left, card, day, expected in [(0, "dry", "2026-01-01", today.name), (None, "dry", "2026-01-02", "2026-01-02-dry"), (3, "dry", "2026-01-03", "2026-01-03-dry"), (3, "h200", "2026-01-04", "2026-01-03-dry")]:
        session.keep(results / f"{day}-{card}/progress.json", {"left": left, **session.origin})
        assert session.unfinished(results).name == expected, (session.unfinished(results), expected)
    assert session_of(folder, 30, "others").lacks("json5000")["status"] == "not run"


def order(folder):
    """Half an hour says something of every model."""
    session = session_of(folder, 30)
    session.args.dry, session.args.no_peers, session.has_peers = False, False, True
    session.args.make, session.args.reduced = True, False
    keys = [item.key for item in every.all_items(session)]
    assert keys[0] == "build" and "tests/distributed_test" in keys and len(set(keys)) == len(keys)
    at = lambda *names: [keys.index(f"steps/{model}/{name}") for model in steps.MODELS for name in names]
    tiers = [at("losses", "reprise/inputs-only/round1", "reprise/keep-all/round1", "pytorch/compile/round1")]
    tiers.append(at("reprise/keep-products/round1", "pytorch/eager/round1"))
    tiers.append(at("reprise/keep-all+searched/round1", "pytorch/max-autotune/round1", "reprise/keep-all+graph/round1"))
    assert max(tiers[0]) < min(tiers[1]) and max(tiers[1]) < min(tiers[2]), tiers
    shape = "kernels/llama-8b/bf16"
    assert keys.index(f"{shape}/reprise") < keys.index(f"{shape}/reprise-searched") < keys.index("steps/llama-8b-lora/reprise/keep-all+searched/round1")
    missing = next(item for item in every.all_items(session) if item.key == "tests/distributed_test").call(session)
    assert missing == {"status": "not run", "error": "distributed/distributed_test was not built"}, missing


def session_of(folder, seconds, out="limits"):
    args = argparse.Namespace(
        minutes=seconds / 60, out=str(folder / out), scratch=str(folder / "scratch"), archive=None, build="/nowhere",
        python=sys.executable, no_peers=True, dry=True, again=False, prefix="", keep_others=False,
    )  # fmt: skip
    return run.Session(args, ROOT)


def limits(folder):
    pid_file = folder / "pid"
    child = ["sh", "-c", f"sleep 60 & echo $! > {pid_file}; wait"]

    def sleeps(session):
        session.program(child)
        return {"status": "ok"}

    quick = run.Item(1, "quick", 0.1, lambda s: {"status": "ok"}, rank=3)
    too_long = run.Item(1, "long", 0.5, sleeps, limit=1.0)
    session = session_of(folder, 30)
    assert session.work([too_long, quick]) == 0
    failed = session.result(too_long)
    assert failed["status"] == "failed" and "no end within 1 s" in failed["error"], failed
    assert session.result(quick)["status"] == "ok"
    time.sleep(0.2)
    assert gone(int(pid_file.read_text())), "what an item started outlives it"

    # The session's end comes before the item's: it is left, and wants more the next time.
    pause = run.Item(1, "pause", 1.0, lambda s: time.sleep(1.0) or {"status": "ok"})
    cut = run.Item(1, "cut", 1.0, sleeps)
    start = time.monotonic()
    session = session_of(folder, 4)
    assert session.work([pause, cut]) == 1 and session.result(cut) is None
    assert time.monotonic() - start < 20
    longer = session_of(folder, 60)
    assert longer.needs(cut) > 2, longer.needs(cut)
    assert session_of(folder, 2).work([cut]) in (0, 1)

    # A build goes on where it was ended.
    endless = argparse.Namespace(args=argparse.Namespace(build="/nowhere", python="python3", prefix="", dry=False))
    endless.program = lambda command: (_ for _ in ()).throw(subprocess.TimeoutExpired(command, 1))
    try:
        checks.build(endless)
        raise AssertionError("a build that was ended counts as one")
    except run.Left:
        pass

    # A whole session was not enough: it has failed, and the dossier comes to an end.
    hopeless = run.Item(1, "hopeless", 1.0, sleeps)
    session = session_of(folder, 2)
    assert session.work([hopeless]) == 0 and session.result(hopeless)["status"] == "failed"


def gone(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def captured():
    """A session whose bench_step has --graph, or has not."""

    class Steps(Printed):
        def __init__(self, help_text, losses):
            super().__init__(help_text)
            self.losses, self.root, self.args = losses, ROOT, argparse.Namespace(dry=False, build="/nowhere")

        def json_of(self, command):
            with_graph = "--graph" in command
            result = {"losses": self.losses[with_graph], "step_ms": [1.0], "graph_launches": 5 * with_graph}
            return {"status": "ok", "result": result}

    assert checks.graphs(Steps("--fresh", [[1.0], [1.0]]))["status"] == "not run"
    assert checks.graphs(Steps("--graph", [[1.0, 2.0], [1.0, 2.0]]))["status"] == "ok"
    differ = checks.graphs(Steps("--graph", [[1.0, 2.0], [1.0, 2.5]]))
    assert differ["status"] == "failed" and differ["error"] == "losses differ", differ


class Fixed:
    """Results that are known, for the targets that come of them."""

    def __init__(self, by_key):
        self.by_key, self.all_items = by_key, []

    ok, steps, kernels = report.Results.ok, report.Results.steps, report.Results.kernels


def equal_losses():
    """20 steps: equal where each loss and the fall are, and where something was learned."""
    fall = lambda by, count=20: [10.0 - by * at / (count - 1) for at in range(count)]
    status = lambda ours, theirs: steps.compared(ours, theirs, 20, steps.LEAST_FALL)["status"]
    assert status(fall(2.0), fall(2.0)) == "ok"
    assert status(fall(1.95), fall(2.0)) == "ok"
    assert status(fall(0.45), fall(0.5)) == "failed"  # within 1% everywhere, but another fall
    assert status(fall(0.1), fall(0.1)) == "failed"
    assert status(fall(-2.0), fall(-2.0)) == "failed"
    assert status(fall(3.0), fall(2.0)) == "failed"
    assert steps.compared(fall(0.0), fall(0.0), 20, None)["status"] == "ok"
    assert status(fall(2.0, 19), fall(2.0)) == status(fall(2.0, 19), fall(2.0, 19)) == "failed"
    for broken in [float("nan"), float("inf"), None]:
        for at in [0, 7, 19]:
            wrong = [*fall(2.0)[:at], broken, *fall(2.0)[at + 1 :]]
            assert status(wrong, fall(2.0)) == status(fall(2.0), wrong) == status(wrong, wrong) == "failed"
    assert report.verdict(report.Target("a NaN", "<=", 1, float("nan"), 3)) == report.verdict(report.Target("a NaN", ">=", 1, float("nan"), 3)) == "miss"


def cells_of(model, speed=90, **states):
    """Every cell of PyTorch but those that are named: None for one that is left."""
    keys = {cell: f"steps/{model}/pytorch/{cell}/round1" for cell in steps.CELLS}
    return {key: states[cell] if cell in states else step(speed, 100, {}) for cell, key in keys.items()}


def best_of_all():
    """Nothing passes against the best cell while one has no result, one failed, or the losses were not equal."""
    model, losses = "gpt2-124m", "steps/gpt2-124m/losses"
    mine = {f"steps/{model}/reprise/keep-all/round1": step(130, 20, {}), losses: {"status": "ok"}}

    def said(**changed):
        rows = report.targets(Fixed({**mine, **cells_of(model), **changed}))
        return next(row for row in rows if row["target"].startswith(f"tokens/s, {model}"))

    assert said()["verdict"] == "pass" and "without" not in said()["target"]
    absent = said(**cells_of(model, eager=None))
    assert absent["verdict"] == "waiting" and absent["value"] is None, absent
    failed = {"status": "failed", "error": "out of memory"}
    without = said(**cells_of(model, eager=failed))
    assert without["verdict"] == "waiting" and "(without eager: failed)" in without["target"] and without["value"] > 1.25, without
    slow = said(**cells_of(model, 120, eager={"status": "not run"}))
    assert slow["verdict"] == "miss" and "(without eager: not run)" in slow["target"], slow
    for state in [None, failed, {"status": "not run"}]:
        assert said(**{losses: state})["verdict"] == "waiting" and said(**{losses: state})["value"] is None
    assert said(**cells_of(model, 120))["verdict"] == "miss"


def step(tokens_per_s, first_ms, more):
    result = {"tokens_per_s": tokens_per_s, "first_step_ms": first_ms, "peak_bytes": 100, "driver_bytes": 203, "driver_bytes_before": 100, "batch": 2, "tokens": 8, **more}
    return {"status": "ok", "result": result, "planned": 100}


def verdicts():
    row = lambda kernel, ms, size=0, **more: {"kernel": kernel, "ms": ms, "bytes": size, "flops": 0, **more}
    rows = [row("copy", 1, 1000), row("copy_table", 10, 20000), row("rms_norm", 1, 900), row("rms_norm_residual", 1, 870), {"kernel": "rope", "ms": None, "error": "not run: out of memory"}, row("adamw", 12, 19000), row("linear_cross_entropy", 2, extra_bytes=7)]
    peer = [row("attention_cudnn", None), row("linear_cross_entropy", 3, extra_bytes=100)]
    by_key = {
        "op_rows/part1": {"status": "ok"},
        "op_rows/part2": {"status": "failed"},
        "parity/f32/part1": {"status": "ok"},
        "parity/bf16/part1": None,
        "steps/gpt2-124m/reprise/keep-all/round1": step(130, 20, {"flops": 16}),
        "steps/gpt2-124m/reprise/inputs-only/round1": step(100, 10, {"flops": 16}),
        **cells_of("gpt2-124m", 90),
        "steps/gpt2-124m/pytorch/compile/round1": step(100, 100, {}),
        "steps/gpt2-124m/losses": {"status": "ok", "worst": 0.004},
        "kernels/gpt2-124m/bf16/reprise": {"status": "ok", "result": {"rows": rows}},
        "kernels/gpt2-124m/bf16/pytorch": {"status": "ok", "result": {"rows": peer}},
    }
    said = {row["target"]: row for row in report.targets(Fixed(by_key))}
    expected = {
        "op rows on the device: parts that failed": (1, "miss"),
        "parity, f32, every policy: parts that failed": (0, "pass"),
        "parity, bf16, every policy: parts that failed": (None, "waiting"),
        "tokens/s, gpt2-124m: of the best PyTorch cell": (1.3, "pass"),
        "time to the end of step 1, gpt2-124m: of the compiled peer's": (0.1, "miss"),
        "time of inputs-only, gpt2-124m: of keep-all": (1.3, "miss"),
        "driver's bytes, gpt2-124m: of planned bytes, without the context": (1.03, "pass"),
        "rms_norm, gpt2-124m: of copy bandwidth": (0.9, "pass"),
        "rms_norm_residual, gpt2-124m: of copy bandwidth": (0.87, "miss"),
        "rope, gpt2-124m: of copy bandwidth": (None, "waiting"),
        "losses over 20 steps, gpt2-124m: unequal to PyTorch's": (0, "pass"),
        "losses over 20 steps, llama-1.2b: unequal to PyTorch's": (None, "waiting"),
        "adamw, gpt2-124m: of copy bandwidth": (19000 / 12 / 2000, "miss"),
        "attention, gpt2-124m: speed of cuDNN called alone": (None, "waiting"),
        "fused linear cross entropy, gpt2-124m: speed of full logits": (1.5, "pass"),
        "fused linear cross entropy, gpt2-124m: its extra memory": (0.07, "pass"),
        "tokens/s, llama-1.2b: of the best PyTorch cell": (None, "waiting"),
    }
    for target, (value, verdict) in expected.items():
        row = said[target]
        same = row["value"] is None if value is None else abs(row["value"] - value) < 1e-9
        assert same and row["verdict"] == verdict, row


def main():
    with tempfile.TemporaryDirectory() as folder:
        judged()
        equal_losses()
        best_of_all()
        watched()
        others(pathlib.Path(folder))
        order(pathlib.Path(folder))
        captured()
        verdicts()
        limits(pathlib.Path(folder))
        end_to_end(sys.argv[1], pathlib.Path(folder))
    print("the dossier's script does what it says")


if __name__ == "__main__":
    main()
