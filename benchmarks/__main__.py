"""`python -m benchmarks NAME... [--gpu-sizes] [--json FILE]`: times and ratios, as a table and as JSON.

`python -m benchmarks compiled …` bounds times on accelerators instead, without one: see its `--help`.
"""

import argparse
import importlib
import itertools
import json
import os
import platform
import sys
from pathlib import Path

import jax
import optax

from benchmarks import BENCHMARKS, GPU_SIZES, Row
from benchmarks.compiled import attention, table

COLUMNS = f"{'name':52} {'size':>12} {'ours ms':>10} {'theirs ms':>10} {'ratio':>6} {'goal':>5}"


def load() -> None:
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        importlib.import_module(f"benchmarks.{path.stem}")


def environment() -> dict[str, str | int | None]:
    return {
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }


def line(row: Row) -> str:
    goal = "" if row.goal is None else f"{row.goal:5.2f} {'reached' if row.ratio <= row.goal else 'MISSED'}"
    times = f"{row.name:52} {row.size:>12} {row.ours_ms:10.3f} {row.theirs_ms:10.3f} {row.ratio:6.2f}"
    return f"{times} {goal:13} {row.note}".rstrip()


def main() -> None:
    load()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [*BENCHMARKS, "all"]
    parser.add_argument("names", nargs="+", metavar="NAME", choices=names, help=", ".join(names))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    parser.add_argument("--gpu-sizes", action="store_true", help="also sizes that need the memory of a large GPU")
    options = parser.parse_args()
    record: dict = {**environment(), "rows": []}
    print("  ".join(f"{key} {value}" for key, value in record.items() if key != "rows"), COLUMNS, sep="\n", flush=True)
    for name in BENCHMARKS if "all" in options.names else dict.fromkeys(options.names):
        more = GPU_SIZES[name]() if options.gpu_sizes and name in GPU_SIZES else ()
        for row in itertools.chain(BENCHMARKS[name](), more):
            print(line(row), flush=True)
            record["rows"].append({"benchmark": name, **row._asdict()})
            if options.json:  # after every row: an interrupted run keeps what it has measured
                options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def accelerators() -> None:
    """The bounds; this process runs nothing on a device, and looks for none."""
    jax.config.update("jax_platforms", "cpu")
    attention.main(sys.argv[3:]) if sys.argv[2:3] == ["attention"] else table.main(sys.argv[2:])


if __name__ == "__main__":
    accelerators() if sys.argv[1:2] == ["compiled"] else main()
