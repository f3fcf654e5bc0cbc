"""What holds for the package as a whole: import, names, versions, and how its source is written."""

import doctest
import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import re
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import jaxsoftmax

ROOT = Path(__file__).parent.parent
PACKAGE = Path(jaxsoftmax.__file__).parent
VERSION = jaxsoftmax.__version__  # its one place; the build reads it there
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
MODULES = ["jaxsoftmax", *(name for _, name, _ in pkgutil.walk_packages(jaxsoftmax.__path__, "jaxsoftmax."))]

# Public names and the arguments users may count on. Further arguments may follow, with defaults.
PUBLIC = {
    "softmax": "x, axis=-1, where=None",
    "log_softmax": "x, axis=-1, where=None",
    "logsumexp": "a, axis=None, b=None, keepdims=False, return_sign=False, where=None",
    "softmax_jvp": "t, p, axis=-1",
    "softmax_vjp": "g, p, axis=-1",
    "softmax_jacobian": "x",
    "softmax_cross_entropy": "logits, labels, axis=-1, where=None",
    "softmax_cross_entropy_with_integer_labels": "logits, labels, axis=-1, where=None",
    "squared_error": "predictions, targets=None",
    "sum_squared_error": "predictions, targets, axis=-1",
    "softmax_hessian": "x",
    "sparsemax": "x, axis=-1",
    "entmax15": "x, axis=-1",
    "entmax": "x, alpha=1.5, axis=-1",
    "verify_jacobian_properties": "x",
    "visualize_jacobian": "x",
    "safe_softmax_cross_entropy": "logits, labels",
    "softmax_kl_divergence": "logits, target_logits, axis=-1, where=None, temperature=1.0",
    "softmax_entropy": "logits, axis=-1, where=None, temperature=1.0",
    "l2_loss": "predictions, targets=None",
    "autodiff.custom_vjp": "fun, nondiff_argnums=()",
    "network.init": "key, sizes",
    "network.forward": "params, x, activation",
    "network.backprop": "params, x, targets, loss, activation",
    "training.TrainState": "",
    "training.make_train_step": "loss_fn, optimizer",
}


def python(code: str) -> object:
    """What `code` prints, read as JSON, in a fresh interpreter that imports this jaxsoftmax."""
    path = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_changes_nothing():
    """No jax.config value and no NumPy error state; no plotting, no backend: the platform asked for does not exist."""
    before, after, plotting = python("""
import json, os
os.environ["JAX_PLATFORMS"] = "none_such"
import jax, optax, numpy as np
state = lambda: {**jax.config.values, "numpy": np.geterr()}
before = state()
import jaxsoftmax
print(json.dumps([before, state(), "matplotlib" in sys.modules], default=repr))
""")
    assert after == before
    assert before["jax_platforms"] == "none_such"
    assert not plotting


def test_chapters_are_attributes():
    """Of the package right after its import, and no library that they alone need is paid for before."""
    chapters = "autodiff curvature linear_head losses matrix_calculus network plotting"
    before, found, listed, missing = python(f"""
import json, jaxsoftmax
before = [name for name in ("optax", "matplotlib") if name in sys.modules]
names = {[*chapters.split(), "training", "verify"]}
found = [type(getattr(jaxsoftmax, name)).__name__ for name in [*names, "estimators", "laplace", "second_order"]]
print(json.dumps([before, found, sorted(set(names) - set(dir(jaxsoftmax))), hasattr(jaxsoftmax, "no_such_chapter")]))
""")
    assert (before, set(found), listed, missing) == ([], {"module"}, [], False)


@pytest.mark.slow
def test_import_is_quick():
    """At most 0.4 of the processor time of `import jax, optax`; median of 3."""
    code = """\
    import time
    start = time.process_time(); import jax, optax
    there = time.process_time(); import jaxsoftmax
    print((time.process_time() - there) / (there - start))"""
    assert statistics.median(python(textwrap.dedent(code)) for _ in range(3)) <= 0.4


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_and_arguments(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(f"jaxsoftmax.{module}".rstrip(".")), attribute)
    assert_shows_an_example(found)
    assert "ndarray" not in str(inspect.signature(found))  # ArrayLike as it is written, not what it stands for
    promised = inspect.signature(eval(f"lambda {PUBLIC[name]}: None")).parameters.values()
    given = list(inspect.signature(found).parameters.values())
    assert [p.name for p in given[: len(promised)]] == [p.name for p in promised]
    for promise, parameter in zip(promised, given):
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert promise.default in (parameter.default, promise.empty)
    if promised:  # TrainState's fields are its own affair
        assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in given[len(promised) :])


@pytest.mark.parametrize("name", [name for name in MODULES if not re.search(r"\._", name)])
def test_exports_show_an_example(name):
    module = importlib.import_module(name)
    for attribute in getattr(module, "__all__", ()):
        found = getattr(module, attribute)
        if callable(found):
            assert_shows_an_example(found)


def assert_shows_an_example(found) -> None:
    """`found` has a docstring with >>> lines, in a place where pytest finds and runs them."""
    home = importlib.import_module(found.__module__)
    examples = {test.name for test in doctest.DocTestFinder().find(home) if test.examples}
    assert f"{home.__name__}.{found.__name__}" in examples, f"{found.__name__}: no >>> example in its docstring"


@pytest.mark.parametrize("source", SOURCES)
def test_source_uses_public_jax(source):
    assert not re.search(r"\bjax(lib)?\._|from jax(lib)? import _|hijax", SOURCES[source])
    if source not in ("training.py", "curvature/optimizer.py"):
        assert not re.search(r"^\s*(import|from) optax", SOURCES[source], re.MULTILINE)


def test_versions_agree():
    latest = re.search(r"^## \[(\S+)\] - ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert latest is not None and latest[1] == VERSION


def test_distribution():
    """py.typed is shipped, with the package alone; what is installed is this version."""
    assert (PACKAGE / "py.typed").is_file()
    try:
        installed = importlib.metadata.distribution("jaxsoftmax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("jaxsoftmax is not installed here, only imported from its folder")
    assert installed.version == VERSION
    tops = {file.parts[0] for file in installed.files or ()}
    assert not tops & {"tests", "examples"}
    if "jaxsoftmax" in tops:  # not so for an editable install
        assert "jaxsoftmax/py.typed" in {str(file) for file in installed.files or ()}
