#!/usr/bin/env python3
"""tools/check_ptxas over reports that tools/with_ptxas_report made of a compiler that only talks: a planted spill, a kept
local array, a kernel that is missing and a report that was lost each fail, with the kernel named."""

import importlib.machinery
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.dont_write_bytecode = True
loader = importlib.machinery.SourceFileLoader("check_ptxas", str(ROOT / "tools/check_ptxas"))
check_ptxas = importlib.util.module_from_spec(importlib.util.spec_from_loader("check_ptxas", loader))
loader.exec_module(check_ptxas)


def mangled(kernel):
    return f"_ZN7reprise7kernels4cuda{len(kernel)}{kernel}Ev"


def report(kernel, card, stack=0, stores=0, loads=0):
    name = mangled(kernel)
    return f"""ptxas info    : Compiling entry function '{name}' for '{card}'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem, 504 bytes cmem[0]
ptxas info    : Compile time = 1.5 ms
"""


def compiled(build, file, text, code=0):
    """The report of a source file, by a compiler that says this; what is left for the terminal."""
    folder = build / "CMakeFiles/reprise_kernels.dir/kernels"
    folder.mkdir(parents=True, exist_ok=True)
    (build / "said").write_text(text)
    target = folder / f"{file}.cu.o"
    command = [ROOT / "tools/with_ptxas_report", "sh", "-c", f'cat "{build}/said" >&2; : > "{target}"; exit {code}', "-o", target]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == code, done.returncode
    return done.stderr


def judged(build):
    done = subprocess.run([str(ROOT / "tools/check_ptxas"), str(build)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def good(build):
    files = {}
    for entry in filter(None, check_ptxas.HOT):
        file, _, part = entry.partition(" ")
        files.setdefault(file, []).append(part or "some_kernel")
    for file, kernels in files.items():
        compiled(build, file, "".join(report(kernel, card) for kernel in kernels for card in check_ptxas.CARDS))
    # Spills where nobody waits for them are told, and allowed.
    compiled(build, "resize", "".join(report("resize_kernel", card, 8, 4, 4) for card in check_ptxas.CARDS))


def main():
    with tempfile.TemporaryDirectory() as folder:
        build = pathlib.Path(folder)
        code, text = judged(build)
        assert code == 1 and "build the preset cuda" in text, text
        good(build)
        code, text = judged(build)
        assert code == 0 and "1 use local memory" in text and "sm_90a" in text, text
        recorded = (build / "ptxas.txt").read_text()
        assert "sm_80           40    2048      0      0      0  rope: rope_kernel" in recorded, recorded
        assert "sm_90a          40    2048      8      4      4  resize: resize_kernel" in recorded, recorded

        rope = "".join(report("rope_kernel", card) for card in check_ptxas.CARDS)
        for planted in [(0, 4, 0), (0, 0, 4), (16, 0, 0)]:
            compiled(build, "rope", report("rope_kernel", "sm_80") + report("rope_kernel", "sm_90a", *planted))
            code, text = judged(build)
            assert code == 1 and "sm_90a: rope: rope_kernel" in text and "sm_80" not in text, text
        compiled(build, "rope", report("rope_kernel", "sm_80"))
        code, text = judged(build)
        assert code == 1 and "rope: rope_kernel is in no report for sm_90a" in text, text
        # Warnings and errors reach the terminal, reports do not; the exit code is the compiler's.
        shown = compiled(build, "rope", rope + "kernels/rope.cu(3): warning #1: planted\n", code=2)
        assert "planted" in shown and "ptxas info" not in shown and "bytes stack" not in shown, shown
        compiled(build, "rope", rope)
        assert judged(build)[0] == 0
        next(build.rglob("resize.cu.o.ptxas")).unlink()
        code, text = judged(build)
        assert code == 1 and "resize.cu.o has no report" in text, text
        compiled(build, "resize", "")
        code, text = judged(build)
        assert code == 1 and "resize.cu.o.ptxas is empty" in text, text
    print("spills of hot kernels are seen")


if __name__ == "__main__":
    main()
