"""Stage 2: how fast are the kernels?"""

import json

from .programs import Programs, flags
from .run import Item

SHAPES = {
    "gpt2-124m": {"batch": 32, "tokens": 1024, "width": 768, "inner": 3072, "heads": 12, "kv-heads": 12, "head-size": 64, "vocabulary": 50257},
    "gpt2-1.5b": {"batch": 8, "tokens": 1024, "width": 1600, "inner": 6400, "heads": 25, "kv-heads": 25, "head-size": 64, "vocabulary": 50257},
    "llama-8b": {"batch": 4, "tokens": 2048, "width": 4096, "inner": 14336, "heads": 32, "kv-heads": 8, "head-size": 128, "vocabulary": 128256},
}
TINY_SHAPES = {"tiny": {"batch": 1, "tokens": 8, "width": 32, "inner": 48, "heads": 2, "kv-heads": 1, "head-size": 16, "vocabulary": 40, "least-ms": 0, "samples": 1}}
RANKS = {"gpt2-124m": 20, "llama-8b": 25, "gpt2-1.5b": 55, "tiny": 20}
# Ours beside ours: cuBLASLt's first choice beside the best of its candidates, cuDNN's attention beside the tiled one.
VARIANTS = {"searched": "matmul", "tiled": "attention"}


def environment_of(session, variant):
    """The choices of a search are results: they come along in the archive, and steps may use them."""
    if variant == "searched":
        of_this_card(session)
        return {"REPRISE_MATMUL_SEARCH": "1", "REPRISE_MATMUL_CHOICES": str(session.out / "matmul_choices")}
    return {"REPRISE_ATTENTION": "tiled"} if variant == "tiled" else {}


def of_this_card(session):
    """The choices name no card: a file beside them does, and those of another one are not taken."""
    choices, beside = session.out / "matmul_choices", session.out / "matmul_choices.json"
    known = beside.exists() and session.is_own(json.loads(beside.read_text()))
    if choices.exists() and not known:
        choices.unlink()
    session.keep(beside, {"origin": session.origin, "versions": session.versions})


def ours(words, variant=""):
    def call(session):
        more = ["--only", VARIANTS[variant]] if variant else []
        return session.json_of([*words, *more], environment=environment_of(session, variant))

    return call


def items(session):
    args = session.args
    for name, shape in (TINY_SHAPES if args.dry else SHAPES).items():
        for dtype in ["bf16"] if args.dry else ["bf16", "f32"]:
            rank = RANKS[name] + (30 if dtype == "f32" else 0)
            stem = f"kernels/{name}/{dtype}"
            words = [Programs(args).kernels, "--device", "cuda", "--dtype", dtype, *flags(shape)]
            yield Item(2, f"{stem}/reprise", 10 if args.dry else 60, ours(words), rank=rank)
            for variant in VARIANTS:
                yield Item(2, f"{stem}/reprise-{variant}", 5 if args.dry else 30, ours(words, variant), rank=rank + 20)
            if session.has_peers:
                peer = [args.python, session.root / "bench/peers/torch_kernels.py", "--device", "cpu" if args.dry else "cuda", "--dtype", dtype, *flags(shape)]
                more = ["--no-compile"] if args.dry else []
                yield Item(2, f"{stem}/pytorch", 30 if args.dry else 150, lambda s, c=peer + more: s.lacks("torch") or s.json_of(c), rank=rank)
