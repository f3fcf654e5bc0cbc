"""Rows of tests/accuracy/ as a table."""

from collections.abc import Iterator

REGIMES = ("normal", "gap to 60", "gap to 100", "offset", "ties", "tails", "K=1", "K=2", "K=1000", "K=50257")
NAMES = {"value": "value", "vjp": "gradient", "jvp": "JVP", "hvp": "HVP"}
NAMES |= {"x": "gradient in x", "weights": "gradient in W", "bias": "gradient in b"}


def cell(x: float | None) -> str:
    return "" if x is None else f"{x:.2g}" if x < 1e4 else f"{x:.0e}"


def table(found: list[dict]) -> Iterator[str]:
    """Lines: float32 by regime, beside the peers; then the worst case of each other dtype, and without jit."""
    yield f"{'float32':40} " + " ".join(f"{r:>10}" for r in REGIMES)
    lines: dict[tuple, dict[str, float]] = {}
    for row in found:
        if row["dtype"] == "float32" and row["jit"]:
            line = lines.setdefault((row["function"], row["quantity"], row["library"]), {})
            for regime, u in row["units"].items():
                few = row["num_classes"] not in (5, 10)
                column = f"K={row['num_classes']}" if few and regime != "gap to 100" else regime
                line[column] = max(u, line.get(column, 0.0))
    for (name, quantity, library), line in lines.items():
        own = library == "jaxsoftmax"
        title = f"{name} {NAMES.get(quantity, quantity)}" if own else f"    {library}"
        yield f"{title:40} " + " ".join(f"{cell(line.get(r)):>10}" for r in REGIMES)
    columns = ("float64", "bfloat16", "float16", "not jitted")
    yield f"\n{'worst of all regimes, gaps to 60':40} " + " ".join(f"{c:>10}" for c in columns)
    others: dict[tuple, dict[str, float]] = {}
    for row in found:
        column = row["dtype"] if row["jit"] else "not jitted"
        if column in columns and row["library"] == "jaxsoftmax":
            u = max(u for regime, u in row["units"].items() if regime != "gap to 100")
            others.setdefault((row["function"], row["quantity"]), {})[column] = u
    for (name, quantity), line in others.items():
        yield f"{f'{name} {NAMES.get(quantity, quantity)}':40} " + " ".join(f"{cell(line.get(c)):>10}" for c in columns)
