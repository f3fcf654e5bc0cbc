"""optax's own tests of its losses, from its wheel, with its functions replaced by ours."""

import inspect
import types
import unittest

import jax
import numpy as np
import pytest

from jaxsoftmax import losses

classification = pytest.importorskip("optax.losses._classification_test")
regression = pytest.importorskip("optax.losses._regression_test")

# Where this library differs on purpose, and why.
DIFFERENT = {}
NAMES = {
    classification: {
        "convex_kl_divergence",
        "generalized_kl_divergence",
        "kl_divergence",
        "kl_divergence_with_log_targets",
        "multiclass_sparsemax_loss",
        "poly_loss_cross_entropy",
        "safe_softmax_cross_entropy",
        "sigmoid_binary_cross_entropy",
        "sigmoid_focal_loss",
        "softmax_cross_entropy",
        "softmax_cross_entropy_with_integer_labels",
        "sparsemax_loss",
    },
    regression: {"huber_loss", "l2_loss", "log_cosh", "squared_error"},
}


def their_tests(module) -> list:
    """The tests of every class that speaks of one of our functions, as (module, class, method)."""
    found = []
    for case in vars(module).values():
        if not (isinstance(case, type) and issubclass(case, unittest.TestCase)):
            continue
        if any(f".{name}(" in inspect.getsource(case) for name in NAMES[module]):
            for method in unittest.defaultTestLoader.getTestCaseNames(case):
                found.append(pytest.param(module, case, method, id=f"{case.__name__}.{method}"))
    return found


@pytest.fixture
def replaced(monkeypatch, request):
    """The namespace of theirs with our functions in it; gives the set of those that are asked for."""
    module, used = request.param, set()
    name = "_classification" if module is classification else "_regression"
    theirs = getattr(module, name)

    class Namespace(types.SimpleNamespace):
        def __getattr__(self, attribute):
            if attribute in NAMES[module]:
                used.add(attribute)
                return getattr(losses, attribute)
            return getattr(theirs, attribute)

    monkeypatch.setattr(module, name, Namespace())
    return used


@pytest.mark.parametrize(
    "replaced, case, method", [*their_tests(classification), *their_tests(regression)], indirect=["replaced"]
)
def test_theirs(replaced, case, method):
    if method == "test_deprecated_alias":
        pytest.skip("convex_kl_divergence is another name here, without a warning")
    np.random.seed(0)
    result = unittest.TestResult()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        case(method).run(result)
    assert replaced, "ran without our functions"
    failed = [text for _, text in result.failures + result.errors]
    if reason := DIFFERENT.get(f"{case.__name__}.{method}"):
        assert failed, f"listed as different ({reason}), but passes"
    else:
        assert not failed, failed[0]


@pytest.mark.parametrize("module", NAMES, ids=["classification", "regression"])
def test_every_name_is_theirs_too(module):
    theirs = getattr(module, "_classification" if module is classification else "_regression")
    assert all(hasattr(theirs, name) for name in NAMES[module])
