#!/usr/bin/env python3
"""tools/pack_device over a build of one small program: unpacked elsewhere, it finds the library that was carried along
and needs nothing else; what CMake looks for is among the dependencies; a program whose library is nowhere is refused."""

import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPILER = sys.argv[1] if len(sys.argv) > 1 else "c++"
PRESENT = [
    "include/absl/status/statusor.h", "include/fmt/core.h", "include/nlohmann/json.hpp", "include/CLI/CLI.hpp", "include/eigen3/Eigen/Core",
    "include/hwy/highway.h", "include/xxhash.h", "include/utf8.h", "include/gtest/gtest.h", "/libhwy.so", "/libgtest_main.a", "/libfmt.so",
    "/libabsl_status.so", "/abslConfig.cmake", "/fmt-config.cmake", "/GTestConfig.cmake", "/Eigen3Config.cmake", "/nlohmann_jsonConfig.cmake",
]  # fmt: skip


def run(*command, **more):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, **more)


def compiled(folder, source, target, *flags):
    file = folder / "source.cc"
    file.write_text(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    done = run(COMPILER, file, "-o", target, *flags)
    assert done.returncode == 0, done.stderr


def pack(build, to):
    return run(ROOT / "tools/pack_device", "--build", build, to, env=dict(os.environ, XZ_OPT="-0"))


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        build, packed, there = folder / "build", folder / "packed", folder / "there"
        empty = pack(build, packed)
        assert empty.returncode == 1 and "nothing is built" in empty.stderr, empty
        library = folder / "libcarried.so"
        compiled(folder, "int carried() { return 42; }", library, "-shared", "-fPIC")
        source = "#include <cstdio>\nint carried();\nint main() { std::printf(\"%d\\n\", carried()); }"
        flags = ["-L", folder, "-lcarried", "-Wl,--disable-new-dtags", f"-Wl,-rpath,$ORIGIN/lib:$ORIGIN/../lib:{folder}"]
        for program in ["reprise", "bench/bench_step"]:
            compiled(folder, source, build / program, *flags)
        done = pack(build, packed)
        assert done.returncode == 0 and "2 programs" in done.stdout and "not built: tests/op_cases_test" in done.stdout, done
        library.rename(folder / "gone.so")
        with tarfile.open(packed / "programs.tar.xz") as archive:
            archive.extractall(there)
        for program in ["reprise", "bench/bench_step"]:
            said = run(there / program, env={})
            assert said.returncode == 0 and said.stdout == "42\n", said
        assert len((there / "commit").read_text().split()[0]) == 40
        with tarfile.open(packed / "dependencies.tar.xz") as archive:
            kept = archive.getnames()
            commit = archive.extractfile("usr/share/reprise/commit").read().decode()
        assert commit == (there / "commit").read_text(), commit
        absent = [wanted for wanted in PRESENT if not any(wanted in name for name in kept)]
        assert not absent, absent
        lacking = pack(build, packed)
        assert lacking.returncode == 1 and "libcarried.so is needed, and not on this machine either" in lacking.stderr, lacking
    print("what is packed runs elsewhere")


if __name__ == "__main__":
    main()
