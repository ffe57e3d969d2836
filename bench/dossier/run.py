"""Items of work, done at most once each and kept as files, within a time that the session never passes."""

import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time
from typing import Callable

from . import machine

HIGHEST_LIMIT = 500  # seconds: an item's longest time, below a run's


@dataclasses.dataclass
class Item:
    stage: int
    key: str  # "parity/f32/part1", also the name of its file
    seconds: float  # about: the session does not begin it with less left
    call: Callable  # of the session: {"status": "ok" | "failed" | "not run", ...}
    rank: int = 50  # lower ones first: what is worth most
    limit: float = HIGHEST_LIMIT  # it is ended then, and has failed
    before: Callable = None  # of the session: seconds more that this machine needs first


class Left(Exception):
    """The session's time was up before the item's own limit."""


def extract(archive, folder):
    with tarfile.open(archive) as opened:
        opened.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


class Session:
    def __init__(self, args, root):
        self.args, self.root = args, root
        self.start = time.monotonic()
        self.end = self.start + 60 * args.minutes
        self.deadline, self.ends_session = self.end, True  # of the item that is being done
        self.begun = 0
        self.tried, self.paces = set(), {}  # in this session
        self.scratch = pathlib.Path(args.scratch)
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.unpack_programs()
        self.environment = dict(os.environ, PYTHONUNBUFFERED="1")
        self.environment["LD_LIBRARY_PATH"] = ":".join([*machine.library_folders(args.python), os.environ.get("LD_LIBRARY_PATH", "")]).strip(":")
        self.versions = machine.versions(args.python, root, pathlib.Path(args.build), pathlib.Path(args.prefix) if args.prefix else None)
        self.origin = {"card": machine.card_state().get("name", "no card"), "commit": self.versions["commit"], "packed": self.versions["packed"]}
        self.has_peers = not args.no_peers
        self.out = pathlib.Path(args.out) if args.out else self.unfinished(root / "bench/results/gpu")
        self.throttle_field = machine.throttle_field()

    def begin(self):
        """The folder of results, with those of the archive."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.unpack()
        self.learn()
        self.progress(None)

    def look(self, folder):
        """As begin, but leaves no trace: what the archive or the folder of results has is looked at in `folder`."""
        if self.args.archive and os.path.exists(self.args.archive):
            self.out = pathlib.Path(folder)
            self.unpack()
        self.learn()

    def unfinished(self, results):
        """The folder that was left last, of this card and commit, also after midnight; else one of today."""
        card = "dry" if self.args.dry else machine.slug(self.origin["card"])
        for folder in sorted(results.glob(f"????-??-??-{card}"), reverse=True):
            file = folder / "progress.json"
            said = json.loads(file.read_text()) if file.exists() else {"left": 0}
            if said["left"] != 0 and all(said.get(name) == value for name, value in self.origin.items()):
                return folder
        return results / f"{datetime.date.today().isoformat()}-{card}"

    def progress(self, left):
        self.keep(self.out / "progress.json", {"left": left, **self.origin})

    def lacks(self, *packages):
        """Which of these PyTorch's side lacks, as a result; None where it has all."""
        absent = sorted(set(packages) - machine.packages(self.versions))
        return {"status": "not run", "error": f"{self.args.python} has no {', '.join(absent)}"} if absent else None

    def file(self, item):
        return self.out / "items" / (item.key + ".json")

    def result(self, item):
        """What is there of this card and commit; another's is as good as absent, and is written over."""
        result = json.loads(self.file(item).read_text()) if self.file(item).exists() else None
        return result if result and self.is_own(result) else None

    def is_own(self, record):
        return self.args.keep_others or record.get("origin") == self.origin

    def records(self):
        """All results that lie there, whosever they are."""
        return [json.loads(path.read_text()) for path in sorted((self.out / "items").rglob("*.json"))]

    def done(self, item):
        result = self.result(item)
        return result is not None and (result["status"] == "ok" or item.key in self.tried or not self.args.again)

    def seconds_left(self):
        return self.end - time.monotonic()

    # What an item that was cut short got: it is not begun again with as little.
    def cut_file(self, item):
        return self.out / "cut" / (item.key + ".json")

    def estimate(self, item):
        return item.seconds + (item.before(self) if item.before else 0)

    def learn(self):
        """How long items of each kind took, of what they were thought to: a quarter to all of it."""
        kinds = {}
        for record in self.records():
            if record["status"] == "ok" and record.get("origin") == self.origin:
                kinds.setdefault(record["key"].split("/")[0], []).append((record["seconds"], record["estimate"]))
        shares = {kind: sum(took for took, _ in both) / sum(thought for _, thought in both) for kind, both in kinds.items() if len(both) > 1}
        self.paces = {kind: min(1.0, max(0.25, share)) for kind, share in shares.items()}

    def pace(self, item):
        return self.paces.get(item.key.split("/")[0], 1.0)

    def needs(self, item):
        seconds = self.pace(item) * self.estimate(item)
        if self.cut_file(item).exists() and self.is_own(cut := json.loads(self.cut_file(item).read_text())):
            seconds = max(seconds, 1.5 * cut["seconds"])
        return min(seconds, item.limit, 0.95 * (self.end - self.start)) if self.args.minutes else seconds

    def keep(self, path, content):
        """Whole or not at all, also when this process is killed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".new")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)

    def work(self, items):
        """Number of items that are left. Passes over those that need more time than there is, for shorter ones."""
        for item in items:
            if self.done(item) or self.seconds_left() < self.needs(item):
                continue
            before, start, estimate = machine.card_state(), time.monotonic(), self.estimate(item)
            watch = machine.Watch(self.throttle_field)
            self.deadline = min(start + item.limit, self.end)
            # One that had a session for itself and did not end will not in the next one.
            self.ends_session = self.deadline < start + item.limit and self.begun > 0
            self.begun += 1
            try:
                with watch:
                    result = item.call(self)
            except Left:
                self.keep(self.cut_file(item), {"seconds": time.monotonic() - start, "origin": self.origin, "versions": self.versions})
                print(f"    left  {item.key}  cut after {time.monotonic() - start:.1f} s", flush=True)
                continue
            except subprocess.TimeoutExpired as error:
                result = {"status": "failed", "error": f"no end within {error.timeout:.0f} s", "command": [str(word) for word in error.cmd]}
            except Exception as error:  # an item that breaks must not take the others along
                result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            result.update(
                key=item.key, stage=item.stage, seconds=time.monotonic() - start, estimate=estimate, versions=self.versions,
                origin=self.origin, card={"before": before, "during": watch.told(), "after": machine.card_state()},
            )  # fmt: skip
            self.tried.add(item.key)
            self.keep(self.file(item), result)
            self.learn()
            self.pack()
            print(f"{result['status']:>8}  {item.key}  {result['seconds']:.1f} s  {' '.join(result.get('error', '').split())[-200:]}", flush=True)
        return sum(not self.done(item) for item in items)

    def program(self, command, timeout=HIGHEST_LIMIT, environment=None):
        """Runs it in the tree; never raises for an exit code. It ends, with all that it started, at the item's or the
        session's end."""
        command = [str(word) for word in command]
        left = self.deadline - time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.root, errors="replace",
            env={**self.environment, **(environment or {})}, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=max(0.0, min(timeout, left)))
        except subprocess.TimeoutExpired as error:
            if left < timeout and self.ends_session:
                raise Left() from error
            raise subprocess.TimeoutExpired(command, min(timeout, left)) from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def json_of(self, command, timeout=HIGHEST_LIMIT, environment=None):
        """The last line of the output as JSON, in a result."""
        done = self.program(command, timeout, environment)
        said = {"command": [str(word) for word in command], "exit_code": done.returncode, "environment": environment or {}}
        if done.returncode != 0:
            return {"status": "failed", "error": (done.stderr or done.stdout)[-1500:], **said}
        return {"status": "ok", "result": json.loads(done.stdout.strip().splitlines()[-1]), **said}

    def unpack_programs(self):
        """Of tools/pack_device, once a machine."""
        packed = pathlib.Path(self.args.build) / "programs.tar.xz"
        if not packed.exists():
            return
        folder = self.scratch / ("programs-" + hashlib.sha256(packed.read_bytes()).hexdigest()[:16])
        if not folder.exists():
            temporary = folder.with_name(folder.name + ".new")
            temporary.mkdir(exist_ok=True)
            extract(packed, temporary)  # not by tar, which asks for xz
            temporary.rename(folder)
        self.args.build = str(folder)

    def unpack(self):
        if not self.args.archive or not os.path.exists(self.args.archive):
            return
        try:
            extract(self.args.archive, self.out)
        except (tarfile.TarError, EOFError, OSError) as error:
            sys.exit(f"{self.args.archive}: no archive of a dossier ({error}); move it away to begin anew")

    def pack(self):
        if not self.args.archive:
            return
        temporary = self.args.archive + ".new"
        with tarfile.open(temporary, "w:gz") as archive:
            for path in sorted(self.out.rglob("*")):
                if path.is_file() and path.suffix != ".new":
                    archive.add(path, path.relative_to(self.out))
        os.replace(temporary, self.args.archive)


if sys.version_info < (3, 9):
    sys.exit("bench/gpu_dossier needs Python 3.9")
