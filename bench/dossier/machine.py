"""What the machine is, and how the card stands at a moment."""

import os
import pathlib
import platform
import re
import shutil
import subprocess

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


def told(state):
    """A line for readers."""
    if "absent" in state:
        return state["absent"]
    return f"{state['name']}, driver {state['driver_version']}, {state['clocks.sm']} of {state['clocks.max.sm']}, memory {state['clocks.mem']}, {state['temperature.gpu']} C, {state['power.draw']}"


def card(dry):
    name = card_state().get("name", "no-card").lower()
    name = name[len("nvidia ") :] if name.startswith("nvidia ") else name
    return "dry" if dry else re.sub(r"[^a-z0-9]+", "-", name).strip("-")


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


def commit_of(root, build):
    """Of the tree, or of what was packed."""
    git = ["git", "-C", str(root), "-c", "safe.directory=*"]
    packed = build / "commit"
    commit = text_of([*git, "rev-parse", "HEAD"]) or os.environ.get("REPRISE_COMMIT", "")
    changed = bool(text_of([*git, "status", "--porcelain", "-uno"]))
    return {"commit": commit or (packed.read_text().strip() if packed.exists() else "unknown"), "changed": changed, "packed": packed.read_text().strip() if packed.exists() else ""}


def versions(python, root, build):
    asked = f"import importlib.metadata as m, json; print(json.dumps({{d.metadata['Name']: d.version for d in m.distributions() if d.metadata['Name'] in {PACKAGES}}}))"
    cpu = ""
    if os.path.exists("/proc/cpuinfo"):
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        **commit_of(root, build),
        "nvcc": (text_of(["nvcc", "--version"]).splitlines() or ["not here"])[-1],
        "peers": text_of([python, "-c", asked]) or "none",
        "sanitizer": (text_of([compute_sanitizer() or "compute-sanitizer", "--version"]).splitlines() or ["not here"])[-1],
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": cpu,
        "cores": os.cpu_count(),
    }
