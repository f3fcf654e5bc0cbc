"""`python -m benchmarks compiled [NAME...]`: bounds of the time on accelerators, ours over theirs, without a device.

Each cell is the ratio of the bounds, then kernels and passes, ours for theirs. A pass is once the bytes of the logits,
read or written. A star: something depends on the numbers, and counts with the cheapest branch and one round of a loop,
or with as many rounds as the row says.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.compiled import chips, rows
from benchmarks.compiled.cost import Cost

GOAL, BEYOND, ROWS_FUSED = (
    1.10,
    1.30,
    16384,
)  # XLA's compiler for CUDA makes kernels of whole rows up to so many classes


@dataclasses.dataclass(frozen=True)
class Found:
    """One comparison: bounds, kernels and passes of ours and of theirs."""

    name: str
    mode: str
    dtype: str
    size: tuple[int, ...]
    seconds: tuple[float, float]
    kernels: tuple[int, int]
    passes: tuple[float, float]
    undecided: bool

    @property
    def key(self) -> tuple:
        return self.name, self.mode, self.dtype, self.size

    @property
    def ratio(self) -> float:
        return self.seconds[0] / self.seconds[1]

    def goal(self, chip: str) -> float:
        return GOAL if chip == "h100" and self.size[-1] <= ROWS_FUSED else BEYOND

    def cell(self) -> str:
        star = "*" if self.undecided else ""
        kernels, passes = (":".join(f"{x:.{d}f}" for x in pair) for pair, d in ((self.kernels, 0), (self.passes, 1)))
        return f"{self.ratio:.2f}{star} ({kernels}, {passes})"


def found(pair: rows.Pair, mode: str, dtype: str, size: tuple[int, ...], chip: str) -> Found:
    args = pair.arguments(size, dtype, *pair.kinds)
    logits = args[0].size * args[0].dtype.itemsize
    both: list[Cost] = []
    for f in (pair.ours, pair.theirs):
        call, inputs = rows.in_mode(f, mode, args, pair.wrt)
        both.append(chips.measure(call, *inputs, chip=chip, rounds=pair.rounds(chip, size)))
    ours, theirs = both
    return Found(
        pair.name,
        mode,
        dtype,
        size,
        (ours.seconds, theirs.seconds),
        (ours.kernels, theirs.kernels),
        (ours.bytes / logits, theirs.bytes / logits),
        bool(ours.undecided or theirs.undecided),
    )


def lines(
    pairs: Sequence[rows.Pair], options: argparse.Namespace, known: dict[tuple, Found]
) -> Iterator[tuple[str, list[Found]]]:
    """For each function, dtype and size: the line of the table, and what stands in it."""
    wanted = [
        (pair, dtype, size, [mode for mode in pair.modes if mode in options.mode])
        for pair in pairs
        for dtype in options.dtype
        for size in sizes(pair, options.size)
    ]
    everything, done = sum(len(modes) for *_, modes in wanted), 0
    for pair, dtype, size, modes in wanted:
        row = []
        for mode in modes:
            progress(f"{done} of {everything} compared; {pair.name} {mode} {dtype} {text_of(size)}")
            row.append(known.get((pair.name, mode, dtype, size)) or found(pair, mode, dtype, size, options.chip))
            done += 1
        progress("")
        cells = {result.mode: result.cell() for result in row}
        yield f"| {pair.name} | {dtype} {text_of(size)} | {' | '.join(cells.get(m, '') for m in options.mode)} |", row


def sizes(pair: rows.Pair, wanted: Sequence[tuple[int, ...]] | None) -> list[tuple[int, ...]]:
    """Those wanted; of a pair with sizes of its own, those wanted among them."""
    if wanted is None:
        return list(pair.sizes)
    return [size for size in wanted if size in pair.sizes or pair.sizes is rows.SIZES and len(size) == 2]


def text_of(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))


def progress(message: str) -> None:
    """A line that the next one overwrites, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def summary(results: list[Found], chip: str) -> str:
    """Per mode: the median, the largest, and how many reach the goal."""
    out = []
    for mode in rows.MODES:
        ratios = sorted((r for r in results if r.mode == mode), key=lambda r: r.ratio)
        if ratios:
            worst, reached = ratios[-1], sum(r.ratio <= r.goal(chip) for r in ratios)
            out.append(
                f"{mode}: median {statistics.median(r.ratio for r in ratios):.2f}, largest {worst.ratio:.2f} "
                f"({worst.name} {worst.dtype} {text_of(worst.size)}), {reached} of {len(ratios)} reach their goal"
            )
    return "\n".join(out)


def ratios_alone(results: list[Found]) -> str:
    """The short table of docs/performance.md: a line per function, the modes for each size and dtype."""
    table: dict[str, dict[str, str]] = {}
    for r in results:
        cells = table.setdefault(r.name, {})
        column = f"{text_of(r.size)} {r.dtype}"
        cells[column] = f"{cells[column]} / {r.ratio:.2f}" if column in cells else f"{r.ratio:.2f}"
    columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
    head = f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
    return "\n".join(
        [head, *(f"| {name} | {' | '.join(c.get(k, '') for k in columns)} |" for name, c in table.items())]
    )


def read(path: Path, chip: str) -> dict[tuple, Found]:
    """What an interrupted run left in its file, by what is compared."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    if (record["chip"], record["jax"]) != (chip, jax.__version__):
        raise ValueError(f"{path} has bounds on {record['chip']} by jax {record['jax']}: name another file")
    held: list[dict[str, Any]] = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in record["rows"]
    ]
    return {r.key: r for r in (Found(**row) for row in held)}


def size_of(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.replace("×", "x").split("x"))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(p.name for p in rows.PAIRS)}; all")
    parser.add_argument("--chip", default="h100", choices=list(chips.CHIPS), help="(default: %(default)s)")
    parser.add_argument("--mode", nargs="+", default=rows.MODES, choices=rows.MODES, help="(all)")
    parser.add_argument("--dtype", nargs="+", default=rows.DTYPES, choices=rows.DTYPES, help="(both)")
    parser.add_argument(
        "--size", nargs="+", type=size_of, metavar="N×K", help=f"of {[*map(text_of, rows.SIZES)]} (all)"
    )
    parser.add_argument("--ratios", action="store_true", help="print the short table of the documentation at the end")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows here too; what it holds is not compiled again"
    )
    options = parser.parse_args(arguments)
    try:
        pairs = rows.names(tuple(options.names))
        chips.devices(options.chip)
        known = read(options.json, options.chip) if options.json else {}
    except (ValueError, ImportError) as error:
        raise SystemExit(str(error)) from None
    print(f"bounds on {options.chip}, jax {jax.__version__}; ratio (kernels, passes), ours for theirs\n")
    print(f"| | | {' | '.join(options.mode)} |\n|---|---|{'---|' * len(options.mode)}", flush=True)
    results: list[Found] = []
    for line, row in lines(pairs, options, known):
        print(line, flush=True)
        results += row
        known |= {r.key: r for r in row}
        if options.json:
            held = [dataclasses.asdict(r) for r in known.values()]
            record = {"chip": options.chip, "jax": jax.__version__, "rows": held}
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("", summary(results, options.chip), sep="\n")
    if options.ratios:
        print("", ratios_alone(results), sep="\n")
