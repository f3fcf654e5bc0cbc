"""optax's own tests of its losses, from its wheel, with its functions replaced by ours of the same name."""

import inspect
import re
import types
import unittest

import jax
import numpy as np
import pytest

from jaxsoftmax import losses


def their_tests(module, ours: set[str]) -> list[unittest.TestCase]:
    """The tests of every class that speaks of one of our functions."""
    cases = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, unittest.TestCase)]
    named = re.compile(rf"\.({'|'.join(ours)})\b")
    cases = [c for c in cases if named.search(inspect.getsource(c))]
    return [case(method) for case in cases for method in unittest.defaultTestLoader.getTestCaseNames(case)]


@pytest.mark.parametrize("kind", ["regression", pytest.param("classification", marks=pytest.mark.slow)])
def test_theirs(kind, monkeypatch):
    module = pytest.importorskip(f"optax.losses._{kind}_test")
    theirs, used = getattr(module, f"_{kind}"), set()
    ours = {name for name in losses.__all__ if hasattr(theirs, name)}
    assert len(ours) >= {"classification": 12, "regression": 4}[kind]

    class Namespace(types.SimpleNamespace):
        def __getattr__(self, name):
            if name in ours:
                used.add(name)
                return getattr(losses, name)
            return getattr(theirs, name)

    monkeypatch.setattr(module, f"_{kind}", Namespace())
    failed = []
    for case in their_tests(module, ours):
        if case.id().endswith("test_deprecated_alias"):
            continue  # convex_kl_divergence is another name here, without a warning
        np.random.seed(0)
        result = unittest.TestResult()
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            case.run(result)
        failed += [f"{case.id()}\n{text}" for _, text in result.failures + result.errors]
    assert not failed, "\n".join(failed)
    assert not ours - used - {"convex_kl_divergence"}, "ran without some of our functions"
