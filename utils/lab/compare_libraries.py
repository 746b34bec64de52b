"""Compare two parts of our own with libraries that do the same: estimates of memory, and frozen weights in few bits.

    python -m utils.lab.compare_libraries --output compare-output

prints two tables, for the CPU. The first: what short runs of the scripts needed, what our `MemoryTracker` estimates,
and what torch's `MemTracker` and `RuntimeEstimator` do under `FakeTensorMode`. The second: a U-Net with LoRA whose
base is in float32, in our int8 and NF4, or in SDNQ's int8 and uint4 (`pip install sdnq`, or its folder in PYTHONPATH).

Each line is measured in processes of its own. Seconds are those of the processor, so that a busy machine does not
change them much; with OMP_NUM_THREADS=1 they are those of a clock on an idle one. --only makes one table. Runs
are those of `utils.lab.benchmark`. To add one, add its name to `ESTIMATED` in `compare_estimates`, or a line
to `QUANTIZED` in `compare_quantized`.
"""

import argparse
import json
import sys
from pathlib import Path

from utils.devices import accelerator_setup
from utils.lab.compare_estimates import ESTIMATES, collect_estimates, show_estimates
from utils.lab.compare_quantized import QUANTIZED_TABLE, collect_quantized, show_quantized
from utils.lab.forked_cases import FORKS, Settings
from utils.lab.measured_runs import WARM_UP, describe_machine, size_of
from utils.synthetic.model_sizes import SHAPES

TABLES = {ESTIMATES: (collect_estimates, show_estimates), QUANTIZED_TABLE: (collect_quantized, show_quantized)}


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables and write what was measured as JSON; return 1 if anything failed."""
    args = parse_args(argv)
    accelerator_setup.silence_libraries()
    sizes = {"size": size_of(args.shape), "unet_shape": args.unet_shape, "unet_size": args.unet_size}
    settings = Settings(args.output, args.names, args.shape, steps=args.steps, **sizes)
    args.output.mkdir(parents=True, exist_ok=True)
    FORKS.set_forkserver_preload(["utils.lab.compare_libraries"])
    report, failed = describe_machine(None), False
    for table, (collect, show) in TABLES.items():
        if args.only in (None, table):
            report[table] = collect(settings)
            failed |= any("problem" in one for one in report[table].values())
            print(f"\n{show(report[table])}\n", flush=True)
    path = args.output / "libraries.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"Wrote {path}")
    return int(failed)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.lab.compare_libraries", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    add, known = parser.add_argument, [name for name, shape in SHAPES.items() if shape["family"] == "sd"]
    add("--only", choices=(ESTIMATES, QUANTIZED_TABLE), help="one of the tables; default: both")
    add("--names", default="", metavar="TEXT", help="only lines with this in their name; default: all")
    add("--shape", choices=known, default="small", help="of the estimates' networks; default: small")
    add("--unet_shape", choices=known, default="sd15", help="of the U-Net that is quantized; default: sd15")
    add("--unet_size", type=int, default=128, metavar="PIXELS", help="of its pictures; default: 128")
    add("--steps", type=int, default=5, help=f"of each run, the first {WARM_UP} not counted; default: 5")
    add("--output", type=Path, default=Path("compare-output"), metavar="DIR", help="default: compare-output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
