"""Items of work, done at most once each and kept as files."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import time
from typing import Callable

from . import machine


@dataclasses.dataclass
class Item:
    stage: int
    key: str  # "parity/f32/gpt2", also the name of its file
    seconds: float  # about, with room
    call: Callable  # of the session: {"status": "ok" | "failed" | "not run", ...}


class Session:
    def __init__(self, args, root):
        self.args, self.root = args, root
        self.start = time.monotonic()
        self.out = pathlib.Path(args.out)
        self.scratch = pathlib.Path(args.scratch)
        self.out.mkdir(parents=True, exist_ok=True)
        if args.archive and os.path.exists(args.archive):
            with tarfile.open(args.archive) as archive:
                archive.extractall(self.out, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(self.out)
        self.versions = machine.versions(args.python, root)
        self.environment = dict(os.environ, PYTHONUNBUFFERED="1")
        folders = [str(pathlib.Path(args.build) / "lib"), *self.library_folders()]
        self.environment["LD_LIBRARY_PATH"] = ":".join([*folders, os.environ.get("LD_LIBRARY_PATH", "")]).strip(":")
        self.has_peers = not args.no_peers and bool(self.versions["peers"])

    def library_folders(self):
        """Where PyTorch's packages put NVIDIA's libraries."""
        code = "import nvidia, os; print(':'.join(os.path.join(p, d, 'lib') for p in nvidia.__path__ for d in os.listdir(p)))"
        return machine.text_of([self.args.python, "-c", code]).split(":")

    def file(self, item):
        return self.out / "items" / (item.key + ".json")

    def result(self, item):
        return json.loads(self.file(item).read_text()) if self.file(item).exists() else None

    def done(self, item):
        result = self.result(item)
        return result is not None and not (self.args.again and result["status"] == "failed")

    def seconds_left(self):
        return 60 * self.args.minutes - (time.monotonic() - self.start)

    def work(self, items):
        """Number of items that are left."""
        for at, item in enumerate(items):
            if self.done(item):
                continue
            if self.seconds_left() < item.seconds:
                return sum(not self.done(other) for other in items[at:])
            before, start = machine.card_state(), time.monotonic()
            try:
                result = item.call(self)
            except subprocess.TimeoutExpired as error:
                result = {"status": "failed", "error": f"no end within {error.timeout:.0f} s", "command": error.cmd}
            except Exception as error:  # an item that breaks must not take the others along
                result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            result.update(
                key=item.key, stage=item.stage, seconds=time.monotonic() - start, versions=self.versions,
                card={"before": before, "after": machine.card_state()},
            )  # fmt: skip
            self.file(item).parent.mkdir(parents=True, exist_ok=True)
            self.file(item).write_text(json.dumps(result, indent=1) + "\n")
            print(f"{result['status']:>8}  {item.key}  {result['seconds']:.1f} s  {result.get('error', '')[:200]}", flush=True)
        return 0

    def program(self, command, timeout, environment=None):
        """Runs it in the tree; never raises for an exit code."""
        return subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=timeout, cwd=self.root,
            env={**self.environment, **(environment or {})}, stdin=subprocess.DEVNULL, errors="replace",
        )  # fmt: skip

    def json_of(self, command, timeout, environment=None):
        """The last line of the output as JSON, in a result."""
        done = self.program(command, timeout, environment)
        said = {"command": [str(word) for word in command], "exit_code": done.returncode}
        if done.returncode != 0:
            return {"status": "failed", "error": (done.stderr or done.stdout)[-1500:], **said}
        return {"status": "ok", "result": json.loads(done.stdout.strip().splitlines()[-1]), **said}

    def pack(self):
        if self.args.archive:
            temporary = self.args.archive + ".new"
            with tarfile.open(temporary, "w:gz") as archive:
                for path in sorted(self.out.rglob("*")):
                    if path.is_file():
                        archive.add(path, path.relative_to(self.out))
            os.replace(temporary, self.args.archive)


if sys.version_info < (3, 9):
    sys.exit("bench/gpu_dossier needs Python 3.9")
