"""README.md is executed and compared with pyproject.toml, so that neither its code nor its versions can drift."""

import doctest
import re
import tomllib
from pathlib import Path

import pytest

from jaxsoftmax import losses

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def fenced_blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(line number of the fence, content) of every ```language block."""
    fences = re.finditer(rf"^```{language}[^\S\n]*\n(.*?)^```[^\S\n]*$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, fence.start()) + 1, fence[1]) for fence in fences]


def run_block(source: str, line: int, namespace: dict) -> None:
    """Execute one block; one with prompts is a doctest and must print what it shows."""
    if ">>> " in source:
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        example = doctest.DocTestParser().get_doctest(source, {}, "README", "README.md", line)
        example.globs = namespace
        doctest.DebugRunner(optionflags=flags).run(example, clear_globs=False)
    else:
        exec(compile("\n" * line + source, "README.md", "exec"), namespace)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = fenced_blocks(README, "python")
    assert blocks, "README.md shows no ```python block"
    namespace = {"__name__": "readme"}
    for line, source in blocks:
        run_block(source, line, namespace)


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


def test_the_two_commands_are_there():
    lines = [line for _, block in fenced_blocks(README, "bash") for line in block.splitlines()]
    assert lines.count('pip install ".[examples]" && python examples/train_digits.py') == 1
    assert lines.count('pip install ".[test]" && pytest') == 1


def test_the_table_of_heads_is_the_one_of_the_package():
    (table,) = re.findall(r"^\| head \|.*?(?=\n\n)", str(losses.__doc__), re.MULTILINE | re.DOTALL)
    assert len(table.splitlines()) > 15 and table in README


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


def test_own_version_agrees_with_pyproject():
    assert set(stated_versions(README, "jaxsoftmax")) <= {version(PROJECT["version"])}


def test_stated_versions_are_found():
    text = "Python ≥ 3.11; tested on JAX 0.6.0 and 0.12.0, `jax>=0.6`, Python 3.11, 3.13. A JAX user: 0.5 is a number."
    assert stated_versions(text, "Python") == [(3, 11, 0), (3, 11, 0), (3, 13, 0)]
    assert stated_versions(text, "JAX") == [(0, 6, 0), (0, 12, 0), (0, 6, 0)]
