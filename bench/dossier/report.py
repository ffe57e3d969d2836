"""From the items that are there: a file a stage, the targets as a table, a summary and the curve."""

import math
import statistics
from typing import NamedTuple, Optional

from . import checks, kernels, machine, plot, steps

PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200 with SXM
COPIES = ["copy", "copy_inner", "copy_logits", "copy_table"]
BANDWIDTH_KERNELS = [
    "rms_norm", "rms_norm_residual", "rms_norm_backward", "layer_norm", "layer_norm_backward", "gated_silu", "gated_silu_backward", "rope", "adamw",
    "cross_entropy", "cross_entropy_backward",
]  # fmt: skip


class Target(NamedTuple):
    what: str
    sign: str
    wanted: float
    value: Optional[float]
    stage: int
    without: tuple = ()  # what failed of that which it is compared with: it does not pass then


class Results:
    def __init__(self, session, all_items):
        self.by_key = {item.key: session.result(item) for item in all_items}
        self.all_items = all_items

    def ok(self, prefix):
        return {k: r for k, r in self.by_key.items() if k.startswith(prefix) and r and r["status"] == "ok"}

    def steps(self, model):
        """{"reprise keep-all": row, "pytorch compile": row}: medians over rounds, of stage 3 and 4."""
        rounds = {}
        for key, result in {**self.ok(f"steps/{model}/reprise/"), **self.ok(f"steps/{model}/pytorch/")}.items():
            _, _, peer, cell, _ = key.split("/")
            rounds.setdefault(f"{peer} {cell}", []).append(result)
        for key, result in self.ok(f"curve/{model}/").items():
            rounds.setdefault(f"reprise {key.split('/')[-1]}", []).append(result)
        rows = {}
        for name, several in rounds.items():
            results = [r["result"] for r in several]
            speed = [r["tokens_per_s"] for r in results]
            rows[name] = {
                "tokens_per_s": statistics.median(speed),
                "spread": [min(speed), max(speed)],
                "first_step_ms": statistics.median(r["first_step_ms"] for r in results),
                "peak_bytes": max(r["peak_bytes"] for r in results),
                "peak_is": results[0].get("peak_is", "allocated"),
                "driver_bytes": max(r["driver_bytes"] - r["driver_bytes_before"] for r in results),
                "flops": next((r["flops"] for r in results if "flops" in r), None),
                "tokens": results[0]["batch"] * results[0]["tokens"],
                "planned": several[0].get("planned"),
            }
        flops = next((row["flops"] for row in rows.values() if row["flops"]), None)
        for row in rows.values():
            row["utilisation"] = row["tokens_per_s"] / row["tokens"] * flops / PEAK_FLOPS if flops else None
        return rows

    def kernels(self, shape, dtype):
        """{kernel: {"reprise": row, "pytorch": row, "reprise-searched": row, "reprise-tiled": row}}"""
        both = {}
        for peer in ["reprise", "pytorch", *(f"reprise-{variant}" for variant in kernels.VARIANTS)]:
            result = self.ok(f"kernels/{shape}/{dtype}/{peer}").get(f"kernels/{shape}/{dtype}/{peer}")
            for row in result["result"]["rows"] if result else []:
                both.setdefault(row["kernel"], {})[peer] = row
        return both


def best(rows, peer):
    speeds = [row["tokens_per_s"] for name, row in rows.items() if name.startswith(peer)]
    return max(speeds) if speeds else None


def ratio(a, b):
    return a / b if a is not None and b else None


def share_bad(results, prefix):
    """How many of these items failed; None while one is left or was not run."""
    mine = [result for key, result in results.by_key.items() if key.startswith(prefix)]
    failed = sum(result is not None and result["status"] == "failed" for result in mine)
    return failed if mine and (failed or all(result and result["status"] == "ok" for result in mine)) else None


def check_targets(results):
    clean = lambda what, prefix: Target(what, "<=", 0, share_bad(results, prefix), 1)
    yield clean("op rows on the device: parts that failed", "op_rows/")
    yield clean("whole steps and other tests: programs that failed", "tests/")
    for dtype in ["f32", "bf16"]:
        yield clean(f"parity, {dtype}, every policy: parts that failed", f"parity/{dtype}/")
    yield clean("graph capture on and off: losses that differ", "graphs")
    for tool in checks.SANITIZERS:
        yield clean(f"compute-sanitizer {tool}: parts that failed", f"sanitizer/{tool}/")


def peers_of(results, model):
    """Which of PyTorch's cells have no result yet, and which never will as things are."""
    states = {}
    for cell in steps.cells_of(False):
        rounds = [r["status"] for k, r in results.by_key.items() if k.startswith(f"steps/{model}/pytorch/{cell}/") and r]
        states[cell] = "left" if not rounds else "ok" if "ok" in rounds else rounds[0]
    return [c for c, s in states.items() if s == "left"], {c: s for c, s in states.items() if s not in ("left", "ok")}


def against_best(results, model, wanted, rows):
    """Against the best of all cells, on a model whose losses were found equal: nothing less says that it is the best."""
    left, bad = peers_of(results, model)
    value = ratio(best(rows, "reprise "), best(rows, "pytorch "))
    if left or (results.by_key.get(f"steps/{model}/losses") or {}).get("status") != "ok":
        value = None
    without = tuple(f"{cell}: {status}" for cell, status in bad.items())
    more = f" (without {', '.join(without)})" if without else ""
    return Target(f"tokens/s, {model}: of the best PyTorch cell{more}", ">=", wanted, value, 3, without)


def step_targets(results):
    wanted = {"gpt2-124m": (1.25, 0.48, 1.19), "llama-1.2b": (1.15, 0.58, None), "llama-8b-lora": (1.08, 0.60, 1.36), "llama-8b-8-layers": (1.08, 0.60, 1.26)}
    for model, (speed, utilisation, replay) in wanted.items():
        rows = results.steps(model)
        yield Target(f"losses over 20 steps, {model}: unequal to PyTorch's", "<=", 0, share_bad(results, f"steps/{model}/losses"), 3)
        yield against_best(results, model, speed, rows)
        shares = [row["utilisation"] for name, row in rows.items() if name.startswith("reprise") and row["utilisation"]]
        yield Target(f"utilisation of {PEAK_FLOPS / 1e12:.0f} TFLOP/s, {model}", ">=", utilisation, max(shares, default=None), 3)
        first = rows.get("reprise inputs-only", {}).get("first_step_ms"), rows.get("pytorch compile", {}).get("first_step_ms")
        yield Target(f"time to the end of step 1, {model}: of the compiled peer's", "<=", 0.05, ratio(*first), 3)
        kept, dropped = (rows.get(f"reprise {policy}", {}).get("tokens_per_s") for policy in ["keep-all", "inputs-only"])
        if replay:
            yield Target(f"time of inputs-only, {model}: of keep-all", "<=", replay, ratio(kept, dropped), 3)
        row = rows.get("reprise inputs-only", {})
        yield Target(f"driver's bytes, {model}: of planned bytes, without the context", "<=", 1.03, ratio(row.get("driver_bytes") or None, row.get("planned")), 3)


def copy_rate(rows, wanted_bytes):
    """Bytes a millisecond of the plain copy whose size is nearest."""
    copies = [rows[name]["reprise"] for name in COPIES if ms_of(rows, name, "reprise")]
    if not copies or not wanted_bytes:
        return None
    nearest = min(copies, key=lambda row: abs(math.log(row["bytes"] / wanted_bytes)))
    return nearest["bytes"] / nearest["ms"]


def ms_of(rows, kernel, peer):
    return (rows.get(kernel, {}).get(peer) or {}).get("ms")


def kernel_targets(results):
    for shape in kernels.SHAPES:
        rows = results.kernels(shape, "bf16")
        for name in BANDWIDTH_KERNELS:
            ms = ms_of(rows, name, "reprise")
            size = rows[name]["reprise"]["bytes"] if ms else None
            yield Target(f"{name}, {shape}: of copy bandwidth", ">=", 0.88, ratio(size / ms if ms else None, copy_rate(rows, size)), 2)
        for name in ["attention", "attention_backward"]:
            speed = ratio(ms_of(rows, f"{name}_cudnn", "pytorch"), ms_of(rows, name, "reprise"))
            yield Target(f"{name}, {shape}: speed of cuDNN called alone", ">=", 0.95, speed, 2)
        head = "linear_cross_entropy"
        speed = ratio(ms_of(rows, head, "pytorch"), ms_of(rows, head, "reprise"))
        yield Target(f"fused linear cross entropy, {shape}: speed of full logits", ">=", 1.5, speed, 2)
        ran = all(ms_of(rows, head, peer) for peer in ["reprise", "pytorch"])
        extra = [rows[head][peer].get("extra_bytes") if ran else None for peer in ["reprise", "pytorch"]]
        yield Target(f"fused linear cross entropy, {shape}: its extra memory", "<=", 0.07, ratio(*extra), 2)


def verdict(row, dry=False):
    """A dry run answers nothing: all of its targets wait for a device. What is no number never passes."""
    if row.value is None or dry:
        return "waiting"
    met = row.value >= row.wanted if row.sign == ">=" else row.value <= row.wanted
    return "miss" if not met else "waiting" if row.without else "pass"


def targets(results, dry=False):
    table = []
    for row in [*check_targets(results), *step_targets(results), *kernel_targets(results)]:
        said = {"target": row.what, "sign": row.sign, "wanted": row.wanted, "value": row.value, "stage": row.stage}
        table.append({**said, "verdict": verdict(row, dry)})
    return table


def stage_text(results, stage):
    mine = [item for item in results.all_items if item.stage == stage]
    states = [results.by_key[item.key]["status"] if results.by_key[item.key] else "left" for item in mine]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ["ok", "failed", "not run", "left"] if state in states)
    lines = [f"## Stage {stage}: {counts}", ""]
    for item in mine:
        result = results.by_key[item.key]
        if result and result["status"] != "ok":
            lines.append(f"- {item.key}: {result['status']}: {' '.join(result.get('error', '').split())[-200:]}")
    return [*lines, ""]


def graph_text(results):
    """What a launch-bound step takes with and without a captured graph."""
    result = results.by_key.get("graphs")
    if not result or result["status"] != "ok":
        return []
    ms = {name: statistics.median(result[name]["step_ms"]) for name in ["without", "with"]}
    return [f"A step of one row: {ms['without']:.2f} ms, as a captured graph {ms['with']:.2f} ms; losses equal bit by bit.", ""]


def step_text(results, model):
    rows = results.steps(model)
    if not rows:
        return []
    equal = results.by_key.get(f"steps/{model}/losses") or {}
    fall = f"Losses over 20 steps differ by at most {equal['worst']:.3%}; they fall by {equal['falls'][0]:.3f}, PyTorch's by {equal['falls'][1]:.3f}." if "falls" in equal else ""
    lines = [f"### {model}", "", *([fall, ""] if fall else []), "| | tokens/s | spread | utilisation | first step | peak, allocator | peak, driver |", "|---|---|---|---|---|---|---|"]
    for name, row in sorted(rows.items(), key=lambda entry: -entry[1]["tokens_per_s"]):
        share = "" if row["utilisation"] is None else f"{row['utilisation']:.3f}"
        lines.append(f"| {name} | {row['tokens_per_s']:.0f} | {row['spread'][0]:.0f}-{row['spread'][1]:.0f} | {share} | {row['first_step_ms']:.0f} ms | {row['peak_bytes'] / 2**30:.2f} GiB{'' if row['peak_is'] == 'allocated' else ', ' + row['peak_is']} | {row['driver_bytes'] / 2**30:.2f} GiB |")
    return [*lines, ""]


def kernel_text(results, shape, dtype):
    rows = results.kernels(shape, dtype)
    if not rows:
        return []
    lines = [f"### {shape}, {dtype}", "", "| kernel | ours | GB/s | TFLOP/s | PyTorch | ratio | best candidate | tiled |", "|---|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        ours, theirs = row.get("reprise"), row.get("pytorch")
        peer = theirs["ms"] if theirs and theirs["ms"] else None
        others = " | ".join(f"{row[key]['ms']:.4f} ms" if key in row and row[key]["ms"] else "" for key in ["reprise-searched", "reprise-tiled"])
        if ours and not ours["ms"]:
            lines.append(f"| {name} | {ours.get('error', 'not run')} | | | {f'{peer:.4f} ms' if peer else ''} | | {others} |")
        elif ours:
            lines.append(f"{kernel_line(name, ours, peer)} | {others} |")
        elif peer:
            lines.append(f"| {name} | | | | {peer:.4f} ms | | {others} |")
    return [*lines, ""]


def kernel_line(name, ours, peer):
    rate = f"{ours['bytes'] / ours['ms'] / 1e6:.0f}" if ours["bytes"] else ""
    speed = f"{ours['flops'] / ours['ms'] / 1e9:.1f}" if ours["flops"] else ""
    beside = f"{peer:.4f} ms | {peer / ours['ms']:.2f}" if peer else " | "
    return f"| {name} | {ours['ms']:.4f} ms | {rate} | {speed} | {beside}"


def origins_text(session):
    """Whose the results are that lie here: those of another card or commit are not counted, unless that was asked for."""
    counts = {}
    for record in session.records():
        of = record.get("origin") or {"card": "no card named", "commit": record["versions"]["commit"], "packed": ""}
        name = f"{of['card']}, commit {of['commit']}" + (f", programs of {of['packed']}" if of["packed"] else "")
        counts.setdefault(name, [0, session.is_own(record)])[0] += 1
    return ["Results:", "", *(f"- {count} of {name}{'' if own else ': not counted'}" for name, (count, own) in sorted(counts.items())), ""]


def origin(session, state):
    versions = session.versions
    changed = ", with changes" if versions["changed"] else ""
    return f"Commit {versions['commit']}{changed}; {machine.told(state)}; nvcc {versions['nvcc']}; sanitizer {versions['sanitizer']}; peers {versions['peers']}; {versions['cpu']}, {versions['cores']} cores, Linux {versions['kernel']}."


def summary(session, results, table, curves, state):
    lines = ["# Dossier" + (" (dry: no numbers of a device)" if session.args.dry else ""), "", origin(session, state), ""]
    lines += [*origins_text(session), "Clocks, temperature and power stand in each item's file, before, during and after it.", "", "| target | wanted | value | |", "|---|---|---|---|"]
    for row in table:
        value = "" if row["value"] is None else f"{row['value']:.3f}"
        lines.append(f"| {row['target']} | {row['sign']} {row['wanted']} | {value} | {row['verdict']} |")
    lines.append("")
    for stage in [1, 2, 3, 4]:
        lines += stage_text(results, stage)
        if stage == 1:
            lines += graph_text(results)
        if stage == 2:
            for shape in kernels.TINY_SHAPES if session.args.dry else kernels.SHAPES:
                for dtype in ["bf16", "f32"]:
                    lines += kernel_text(results, shape, dtype)
        if stage == 3:
            for model in curves:
                lines += step_text(results, model)
        if stage == 4:
            lines += ["Memory against time: `curve.svg`, its numbers: `curve.json`.", ""]
    return "\n".join(lines) + "\n"


def write(session, all_items):
    results = Results(session, all_items)
    state = machine.card_state()
    head = {"versions": session.versions, "card": state, "dry": session.args.dry}
    for stage in [1, 2, 3, 4]:
        mine = {item.key: results.by_key[item.key] for item in all_items if item.stage == stage}
        session.keep(session.out / f"stage{stage}.json", {**head, "items": mine})
    table = targets(results, session.args.dry)
    session.keep(session.out / "targets.json", {**head, "targets": table})
    curves = {model: results.steps(model) for model in steps.models(session)}
    session.keep(session.out / "curve.json", {**head, "models": curves})
    (session.out / "curve.svg").write_text(plot.curves(curves, origin(session, state)))
    (session.out / "summary.md").write_text(summary(session, results, table, curves, state))
