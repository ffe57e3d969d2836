"""What the dossier asks, what is worth most first."""

from . import checks, kernels, steps


def all_items(session):
    every = [*checks.items(session), *kernels.items(session), *steps.stage3(session), *steps.stage4(session)]
    return sorted(every, key=lambda item: item.rank)
