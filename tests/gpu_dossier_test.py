#!/usr/bin/env python3
"""bench/gpu_dossier from end to end on the SIMT shim: it stops when its time is up, goes on from its archive in
another folder, and writes every file; a failing item is seen as one and done again when asked."""

import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = ["stage1.json", "stage2.json", "stage3.json", "stage4.json", "targets.json", "curve.json", "curve.svg", "summary.md"]


def dossier(build, out, archive, *more):
    command = [sys.executable, ROOT / "bench/gpu_dossier", "--dry", "--reduced", "--no-peers", "--build", build]
    command += ["--out", out, "--archive", archive, "--scratch", out.parent / "scratch", *more]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    print(done.stdout + done.stderr, flush=True)
    return done


def items(out):
    return {key: item for stage in [1, 2, 3, 4] for key, item in json.loads((out / f"stage{stage}.json").read_text())["items"].items()}


def main():
    build = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        first, second, archive = (pathlib.Path(folder) / name for name in ["first", "second", "archive.tar.gz"])
        stopped = dossier(build, first, archive, "--minutes", "0")
        assert stopped.returncode == 3 and " items are left: run again" in stopped.stdout, stopped.returncode
        broken = dossier("/nowhere", first, archive, "--only", "kernels/")
        assert broken.returncode == 0 and items(first)["kernels/tiny/bf16/reprise"]["status"] == "failed"
        # Another machine: what was done there is not done again, but what failed is.
        whole = dossier(build, second, archive, "--minutes", "14", "--again")
        assert whole.returncode == 0, whole.returncode
        done = items(second)
        states = {key: item["status"] for key, item in done.items()}
        assert all(state == "ok" for key, state in states.items() if not key.startswith(("sanitizer/", "graphs"))), states
        assert all(state == "not run" for key, state in states.items() if key.startswith("sanitizer/")), states
        assert done["op_rows/part1"]["ran"] > 20
        for item in done.values():
            assert item["versions"]["commit"] and "card" in item
        curve = json.loads((second / "curve.json").read_text())["models"]["tiny-gpt2"]
        for row in curve.values():
            assert row["tokens_per_s"] > 0 and row["peak_bytes"] == row["planned"] > 0, row
        assert all((second / name).stat().st_size > 0 for name in FILES)
        again = dossier(build, second, archive)
        assert again.returncode == 0 and " ok " not in again.stdout, again.stdout
    print("the dossier's script does what it says")


if __name__ == "__main__":
    main()
