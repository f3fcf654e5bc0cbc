"""README.md and the pages of docs/ are executed and compared with the package, so that nothing in them can drift."""

import ast
import contextlib
import doctest
import importlib.util
import inspect
import io
import re
import tomllib
from decimal import Decimal
from pathlib import Path

import api_pages
import digits
import jax
import pytest

import jaxsoftmax
from jaxsoftmax import losses

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
}
README = PAGES["README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def fenced_blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(line number of the fence, content) of every ```language block."""
    fences = re.finditer(rf"^```{language}[^\S\n]*\n(.*?)^```[^\S\n]*$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, fence.start()) + 1, fence[1]) for fence in fences]


def run_block(source: str, line: int, namespace: dict, page: str = "README.md") -> None:
    """Execute one block; one with prompts is a doctest and must print what it shows."""
    if ">>> " in source:
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        example = doctest.DocTestParser().get_doctest(source, {}, page, page, line)
        example.globs = namespace
        doctest.DebugRunner(optionflags=flags).run(example, clear_globs=False)
        return
    for statement in ast.parse("\n" * line + source, page).body:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(ast.Module([statement], []), page, "exec"), namespace)
        last = source.splitlines()[statement.end_lineno - line - 1]
        assert_shown(printed.getvalue(), last.partition("  # ")[2], f"{page}, line {statement.end_lineno + 1}")


NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d*)?(?:e[+-]?\d+)?(?![\w.]*\w)")


def assert_shown(printed: str, comment: str, where: str) -> None:
    """The numbers that a comment starts with, up to a semicolon, are those printed, to the digits it gives."""
    shown, got = NUMBER.findall(comment.partition(";")[0]), NUMBER.findall(printed)
    if printed and shown:
        assert len(got) >= len(shown), where
        for a, b in zip(shown, got):
            unit = Decimal(1).scaleb(Decimal(a).as_tuple().exponent)
            assert abs(Decimal(a) - Decimal(b)) <= unit / 2, f"{where}: the comment says {a}, and {b} is printed"


def imported(source: str) -> set[str]:
    """Top-level packages that a block imports."""
    code = re.sub(r"^(>>> |\.\.\. )", "", source, flags=re.MULTILINE) if ">>> " in source else source
    found = set()
    for node in ast.walk(ast.parse(code)) if ">>> " not in source else ():
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {str(name).split(".")[0] for name in names}
    return found


LONG = {"docs/operators.md", "docs/networks.md", "docs/mesh.md"}
WITH_CODE = [page for page, text in PAGES.items() if "```python" in text]


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in LONG)) for page in WITH_CODE])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In the order of the page, in one namespace; a block of a neighbour that is not installed is left out."""
    if "jax.shard_map" in PAGES[page] and not hasattr(jax, "shard_map"):
        pytest.skip("jax.shard_map has another name in this JAX")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for line, source in fenced_blocks(PAGES[page], "python"):
        if all(importlib.util.find_spec(name) for name in imported(source) & NEIGHBOURS):
            run_block(source, line, namespace, page)


NEIGHBOURS = {"lineax", "matfree", "flax", "equinox"}


def test_the_page_of_digits_shows_what_is_measured():
    """docs/digits.py prints the table; a digit more or less is rounding of another version."""
    numbers = lambda text: [int(n) for line in text.splitlines()[2:] for n in re.findall(r"(?<=\| )\d(?= \|)", line)]
    shown = re.search(r"^\|  \| library.*?(?=\n\n)", PAGES["docs/exact_losses.md"], re.MULTILINE | re.DOTALL)
    assert shown is not None
    pairs = list(zip(numbers(shown[0]), numbers(digits.table()), strict=True))
    assert len(pairs) == 60 and all(abs(a - b) <= 1 for a, b in pairs)


def test_every_public_name_is_in_the_reference():
    """api_pages finds each name of each `__all__`, and has a page for it."""
    found = api_pages.public_objects()
    assert {f"jaxsoftmax.{name}" for name in jaxsoftmax.__all__ if not inspect.ismodule(getattr(jaxsoftmax, name))} <= {
        *found
    }
    assert {"jaxsoftmax.autodiff.custom_vjp", "jaxsoftmax.network.backprop", "jaxsoftmax.curvature.hvp"} <= {*found}
    assert {api_pages.room(path, thing) for path, thing in found.items()} == {*api_pages.ROOMS}


def test_docstrings_become_markdown():
    text = api_pages.markdown(
        "One line.\n\n    p = q\n\nz_n = W_n a_{n-1}, a_0 = x.\n\nWith β = 1 it is the reverse.\n\n"
        "Args:\n  x: an array\n    of numbers.\n  *rest: more.\n\nReturns:\n  It.\n\n"
        "Example:\n  >>> 1\n  1\n\nReference: docs/mathematics.md, sections 1 and 2.3; https://example.org/a."
    )
    assert "- **x**: an array\n  of numbers.\n- **\\*rest**: more." in text
    assert "**Example**\n\n```pycon\n>>> 1\n1\n```\n" in text
    blocks = "```text\np = q\n```\n\n```text\nz_n = W_n a_{n-1}, a_0 = x.\n```\n\n"
    assert f"One line.\n\n{blocks}With β = 1 it is the reverse.\n\n" in text
    links = "[1](../mathematics.md#1-softmax-and-its-jacobian) and [2.3](../mathematics.md#23-spectrum)"
    assert text.endswith(f"**Reference** [mathematics](../mathematics.md), sections {links}; <https://example.org/a>.")


def test_the_reference_is_complete(tmp_path):
    """It is not built where a public member has no docstring; "as in hvp" is spelled out; names are links."""
    api_pages.write(tmp_path)
    operators, curvature = (tmp_path / f"{name}.md" for name in ("operators", "curvature"))
    text = operators.read_text(encoding="utf-8")
    assert all(f"{{py:method}} {name}(" in text for name in ("as_matrix", "frobenius_norm", "is_psd", "__matmul__"))
    assert "axis=-1" in text and "ClassAxis(" not in text and " at 0x" not in text
    network = (tmp_path / "network.md").read_text(encoding="utf-8")
    assert "activation=tanh" in network and "dtype=float" in network
    text = curvature.read_text(encoding="utf-8")
    assert "as in `hvp`" not in text and text.count("- **batch_size**: examples at a time") >= 4
    assert "{py:obj}`damped_solve <jaxsoftmax.curvature.damped_solve>`" in text
    index = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert all(f"{{py:obj}}`{path}`" in index for path in api_pages.public_objects())

    class Bare:
        """A class."""

        def method(self):
            pass

    with pytest.raises(ValueError, match="x.Bare.method is public and has no docstring"):
        list(api_pages.entry("class", "x.Bare", Bare, {}))


def test_a_wrong_block_is_caught():
    (line, source), *rest = fenced_blocks("text\n```python\nx = 1\n```\n```bash\nls\n```\n", "python")
    assert (line, source, rest) == (2, "x = 1\n", [])
    namespace = {}
    run_block(source, line, namespace)
    run_block(">>> x + 1\n2\n", line, namespace)
    with pytest.raises(doctest.DocTestFailure):
        run_block(">>> x + 1\n3\n", line, namespace)
    with pytest.raises(NameError):
        run_block("y", line, namespace)
    run_block("print(x / 3, 4)  # 0.333 4; and x is 1", line, namespace)
    with pytest.raises(AssertionError, match=r"README.md, line \d+: the comment says 0.334, and 0.333\d+ is printed"):
        run_block("z = 1\nprint(x / 3)  # 0.334", line, namespace)


def test_the_two_commands_are_there():
    lines = [line for _, block in fenced_blocks(README, "bash") for line in block.splitlines()]
    assert lines.count('pip install ".[examples]" && python examples/train_digits.py') == 1
    assert lines.count('pip install ".[test]" && pytest') == 1


def test_the_table_of_heads_has_all_of_them():
    (table,) = re.findall(r"^\| head \|.*?(?=\n\n)", PAGES["docs/exact_losses.md"], re.MULTILINE | re.DOTALL)
    rows = {name for line in table.splitlines()[2:] for name in line.split("|")[1].strip().split(", ")}
    others = {"Curvature", "curvature_of", "natural_gradient_norm", "softcap_logits", "weighted_mean"}
    assert rows == {name for name in losses.__all__ if not name.startswith("logits_")} - others


def version(text: str) -> tuple[int, ...]:
    """Three numbers: 3.11 and 3.11.0 are the same version."""
    return (*map(int, text.split(".")), 0, 0)[:3]


def stated_versions(text: str, name: str) -> list[tuple[int, ...]]:
    """Every version that follows `name`, also in a list: "JAX 0.6.0 and 0.12.0", "Python >= 3.11"."""
    number = r"\d+(?:\.\d+)+"
    found = re.finditer(rf"\b{name}\W{{0,6}}({number}(?:(?:,| and| to|,? or)? {number})*)", text, re.IGNORECASE)
    return [version(v) for match in found for v in re.findall(number, match[1])]


LOWEST = {
    "Python": re.fullmatch(r">=([\d.]+)", PROJECT["requires-python"])[1],
    "JAX": next(m[1] for d in PROJECT["dependencies"] if (m := re.fullmatch(r"jax>=([\d.]+)", d))),
}


@pytest.mark.parametrize("name", LOWEST)
def test_lowest_versions_agree_with_pyproject(name):
    """The lowest version README names is the one pyproject asks for; it names the newest tested ones besides."""
    stated = stated_versions(README, name)
    assert stated, f"README.md does not say which {name} it needs"
    assert min(stated) == version(LOWEST[name])


def test_own_version():
    assert set(stated_versions(README, "jaxsoftmax")) <= {version(jaxsoftmax.__version__)}


def test_stated_versions_are_found():
    text = "Python ≥ 3.11; tested on JAX 0.6.0 and 0.12.0, `jax>=0.6`, Python 3.11, 3.13. A JAX user: 0.5 is a number."
    assert stated_versions(text, "Python") == [(3, 11, 0), (3, 11, 0), (3, 13, 0)]
    assert stated_versions(text, "JAX") == [(0, 6, 0), (0, 12, 0), (0, 6, 0)]
