"""What the machine is, and how the card stands at a moment."""

import os
import platform
import re
import shutil
import subprocess

QUERY = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used,memory.total"


def text_of(command, **more):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, **more)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def card_state():
    """Clocks, temperature and memory, as nvidia-smi prints them; empty without a card."""
    if shutil.which("nvidia-smi") is None:
        return {}
    line = text_of(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]).splitlines()
    return dict(zip(QUERY.split(","), (part.strip() for part in line[0].split(",")))) if line else {}


def card(dry):
    name = card_state().get("name", "no-card")
    return "dry" if dry else re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def versions(python, root):
    torch = "import torch, json; print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda}))"
    cpu = ""
    if os.path.exists("/proc/cpuinfo"):
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "commit": text_of(["git", "-C", str(root), "-c", "safe.directory=*", "rev-parse", "HEAD"]) or os.environ.get("REPRISE_COMMIT", "unknown"),
        "changed": bool(text_of(["git", "-C", str(root), "-c", "safe.directory=*", "status", "--porcelain", "-uno"])),
        "nvcc": text_of(["nvcc", "--version"]).splitlines()[-1:],
        "peers": text_of([python, "-c", torch]),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": cpu,
        "cores": os.cpu_count(),
    }
