"""Where the programs of a build are."""

import pathlib


class Programs:
    """Of the build, or of its shim when dry."""

    targets = ["reprise", "bench_step", "bench_device_kernels", "op_cases_test", "device_test", "kernels_test", "cudnn_test", "distributed_test"]

    def __init__(self, args):
        build = pathlib.Path(args.build)
        shim = build / "tests/simt"
        self.reprise = shim / "reprise_shim" if args.dry else build / "reprise"
        self.step = shim / "bench_step_shim" if args.dry else build / "bench/bench_step"
        self.kernels = shim / "bench_device_kernels_shim" if args.dry else build / "bench/bench_device_kernels"
        self.op_cases = shim / "op_cases_simt_test" if args.dry else build / "tests/op_cases_test"
        self.steps_test = shim / "device_simt_test" if args.dry else build / "tests/device_test"

    def used(self):
        return [self.reprise, self.step, self.kernels, self.op_cases, self.steps_test]


def flags(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]
