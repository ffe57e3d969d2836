"""What the machine is, and how the card stands at a moment."""

import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import threading

QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,memory.used,memory.total"
PACKAGES = ["torch", "transformers", "peft", "nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "triton"]


def text_of(command, **more):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, **more)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def card_state():
    """Clocks, temperature and memory, as nvidia-smi prints them; without it, why they are not there."""
    if shutil.which("nvidia-smi") is None:
        return {"absent": "no nvidia-smi: neither clocks nor temperature are known"}
    line = text_of(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]).splitlines()
    if not line:
        return {"absent": "nvidia-smi names no card: neither clocks nor temperature are known"}
    return dict(zip(QUERY.split(","), (part.strip() for part in line[0].split(","))))


WATCHED = ["clocks.sm", "temperature.gpu", "power.draw"]


def throttle_field():
    """Newer drivers have another name for it, and refuse a whole query for a field that they do not know."""
    if shutil.which("nvidia-smi") is None:
        return None
    names = ["clocks_event_reasons.active", "clocks_throttle_reasons.active"]
    return next((name for name in names if text_of(["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader"])), None)


class Watch:
    """How the card stands while something runs: a sample every `seconds`, by a thread."""

    def __init__(self, reasons, sample=None, seconds=2.0):
        self.fields = WATCHED + ([reasons] if reasons else [])
        self.sample = sample or self.ask
        self.seconds, self.samples, self.ended = seconds, [], threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def ask(self):
        line = text_of(["nvidia-smi", f"--query-gpu={','.join(self.fields)}", "--format=csv,noheader,nounits"]).splitlines()
        return dict(zip(self.fields, (part.strip() for part in line[0].split(",")))) if line else {}

    def watch(self):
        while not self.ended.wait(self.seconds):
            self.samples.append(self.sample())

    def __enter__(self):
        if shutil.which("nvidia-smi") is not None or self.sample != self.ask:
            self.thread.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        if self.thread.ident is not None:
            self.thread.join()

    def told(self):
        """Least, median and most of each; of the reasons for a lower clock, in how many samples each stood."""
        result = {"samples": len(self.samples)}
        for field in self.fields:
            said = [sample[field] for sample in self.samples if field in sample]
            if field not in WATCHED:
                result[field] = {reason: said.count(reason) for reason in sorted(set(said))}
            elif numbers := [number for text in said if (number := number_of(text)) is not None]:
                result[field] = {"min": min(numbers), "median": statistics.median(numbers), "max": max(numbers)}
        return result


def number_of(text):
    try:
        return float(text)
    except ValueError:
        return None  # "[N/A]"


def may_be_there():
    """Whether to look for a device at all, before anything is built for it."""
    files = [*pathlib.Path("/dev").glob("nvidia*"), *pathlib.Path("/dev").glob("dxg")]
    return bool(files) or "name" in card_state()


def told(state):
    """A line for readers."""
    if "absent" in state:
        return state["absent"]
    return f"{state['name']}, driver {state['driver_version']}, {state['clocks.sm']} of {state['clocks.max.sm']}, memory {state['clocks.mem']}, {state['temperature.gpu']} C, {state['power.draw']}"


def slug(card):
    name = card.lower()
    name = name[len("nvidia ") :] if name.startswith("nvidia ") else name
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def toolkits():
    """Folders of CUDA, also where they are in no search path."""
    nvcc = shutil.which("nvcc")
    found = [os.environ.get("CUDA_HOME", ""), str(pathlib.Path(nvcc).resolve().parent.parent) if nvcc else "", "/usr/local/cuda"]
    return list(dict.fromkeys(folder for folder in found if folder and os.path.isdir(folder)))


def library_folders(python):
    """Where PyTorch's packages and the toolkit put NVIDIA's libraries."""
    code = "import nvidia, os; print(':'.join(os.path.join(p, d, 'lib') for p in nvidia.__path__ for d in os.listdir(p)))"
    toolkit = [f"{folder}/{part}" for folder in toolkits() for part in ["lib64", "lib", "targets/x86_64-linux/lib"]]
    return [folder for folder in [*text_of([python, "-c", code]).split(":"), *toolkit] if os.path.isdir(folder)]


def compute_sanitizer():
    names = [shutil.which("compute-sanitizer")] + [f"{folder}/{part}/compute-sanitizer" for folder in toolkits() for part in ["bin", "compute-sanitizer"]]
    return next((name for name in names if name and os.access(name, os.X_OK)), None)


def commit_of(root, build, prefix):
    """Of the tree, or where that is no repository of what tools/pack_device packed; and that of packed programs."""
    git = ["git", "-C", str(root), "-c", "safe.directory=*"]
    said = lambda path: path.read_text().strip() if path.exists() else ""
    packed = said(build / "commit")
    travelled = packed or (said(prefix / "share/reprise/commit") if prefix else "")
    commit = text_of([*git, "rev-parse", "HEAD"]) or os.environ.get("REPRISE_COMMIT", "") or travelled or "unknown"
    changed = bool(text_of([*git, "status", "--porcelain", "-uno"])) or commit.endswith("with changes")
    return {"commit": commit.split()[0], "changed": changed, "packed": packed}


def versions(python, root, build, prefix=None):
    asked = f"import importlib.metadata as m, json; print(json.dumps({{d.metadata['Name']: d.version for d in m.distributions() if d.metadata['Name'] in {PACKAGES}}}))"
    cpu = ""
    if os.path.exists("/proc/cpuinfo"):
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        **commit_of(root, build, prefix),
        "nvcc": (text_of(["nvcc", "--version"]).splitlines() or ["not here"])[-1],
        "peers": text_of([python, "-c", asked]) or "none",
        "sanitizer": (text_of([compute_sanitizer() or "compute-sanitizer", "--version"]).splitlines() or ["not here"])[-1],
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": cpu,
        "cores": os.cpu_count(),
    }


def packages(versions):
    """Names of those of PACKAGES that the interpreter has."""
    return set() if versions["peers"] == "none" else set(json.loads(versions["peers"]))
