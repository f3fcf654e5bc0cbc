"""`python -m tests.accuracy [--json FILE] [--quick] [NAME...]`: a table of how many digits every function keeps."""

import argparse
import importlib.util
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
import optax
from tqdm import tqdm

from tests.accuracy import linear_head as linear
from tests.accuracy.measure import errors, linear_errors
from tests.accuracy.table import table
from tests.registry import FUNCTIONS


def runs(name: str, quick: bool) -> Iterator[dict]:
    """What is measured of a function: arguments of `errors`, or of `linear_errors`."""
    if name in linear.HEADS:
        yield from ({"num_classes": num_classes} for num_classes in ((10,) if quick else (10, 1000)))
        yield from ({"num_classes": 10, "dtype": dtype} for dtype in ("float64", "bfloat16", "float16"))
        yield {"num_classes": 10, "jit": False}
        return
    function = FUNCTIONS[name]
    base = {"num_classes": 5 if quick else 10, "quick": quick}
    yield base
    for peer in function.peers:
        yield base | {"peer": peer}
    small = {"num_classes": 5, "quick": True}
    for dtype in ("float64", "bfloat16", "float16"):
        yield small | {"dtype": dtype}
    yield small | {"jit": False}
    if not function.elementwise:
        for num_classes in (1, 2, 1000, 50257) if function.many and not quick else (1, 2):
            yield base | {"num_classes": num_classes, "quick": True}


def rows(name: str, quick: bool) -> Iterator[dict]:
    """One row per quantity and run."""
    for run in runs(name, quick):
        found = (linear_errors if name in linear.HEADS else errors)(name, **run)
        label = {"function": name, "library": run.get("peer") or "jaxsoftmax", "dtype": run.get("dtype", "float32")}
        label |= {"jit": run.get("jit", True), "num_classes": run["num_classes"]}
        for quantity in dict.fromkeys(q for q, _ in found):
            yield label | {"quantity": quantity, "units": {r: u for (q, r), u in found.items() if q == quantity}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.accuracy", description=__doc__)
    known = [*FUNCTIONS, *linear.HEADS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(known)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    parser.add_argument("--quick", action="store_true", help="five classes and fewer regimes")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    record: dict = {"jax": jax.__version__, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
    record |= {"optax": optax.__version__, "torch": importlib.util.find_spec("torch") is not None, "rows": []}
    progress = tqdm(options.names or known, unit="function")
    for name in progress:
        progress.set_postfix_str(name)
        record["rows"] += rows(name, options.quick)
        if options.json:  # after every function: an interrupted run keeps what it has measured
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("  ".join(f"{key} {value}" for key, value in record.items() if key != "rows"))
    print(*table(record["rows"]), sep="\n")


if __name__ == "__main__":
    main()
