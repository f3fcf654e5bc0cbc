"""The comparison tool: what is right passes, what is wrong by little fails, what is missing is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from jaxsoftmax.verify import compare_derivatives, logit_regimes


def with_rule(f, factor=1.0, kind=jax.custom_vjp):
    """f with a rule of its own, off by a factor."""
    rule = kind(f)
    if kind is jax.custom_vjp:
        rule.defvjp(lambda x: (f(x), x), lambda x, ct: (factor * jax.vjp(f, x)[1](ct)[0],))
    else:
        rule.defjvp(lambda x, t: (f(*x), factor * jax.jvp(f, x, t)[1]))
    return rule


def worst(report, *names):
    return max(c.error for c in report.comparisons if {c.first, c.second} & set(names))


def test_right_functions_pass_within_a_unit_or_two():
    report = compare_derivatives(
        js.softmax, jnp.array([1.0, 0.0, 2.0]), analytic=js.softmax_jacobian, regimes=logit_regimes(3)
    )
    report.assert_ok()
    assert len(report.comparisons) == 6 * 6 and report.differences == "float64"
    assert max(c.error for c in report.comparisons) < 4
    assert "closed form - differences" in str(report) and "FAILS" not in str(report)


@pytest.mark.parametrize("kind", [jax.custom_vjp, jax.custom_jvp])
def test_a_rule_off_by_a_hundred_thousandth_fails(kind):
    x = jnp.array([0.5, -1.0])
    assert compare_derivatives(with_rule(jnp.exp, 1.0, kind), x).ok
    report = compare_derivatives(with_rule(jnp.exp, 1 + 1e-5, kind), x)
    assert not report.ok and 30 < worst(report, "differences") < 100
    with pytest.raises(AssertionError, match="derivatives disagree\n(?s:.*)FAILS"):
        report.assert_ok()


def test_a_wrong_closed_form_fails_alone():
    report = compare_derivatives(js.softmax, jnp.ones(3), analytic=lambda x: js.softmax_jacobian(x) + 1e-4)
    failing = {(c.first, c.second) for c in report.comparisons if c.error > report.tolerance}
    assert failing == {("reverse", "closed form"), ("forward", "closed form"), ("closed form", "differences")}


def test_missing_modes_are_named_and_the_rest_compared():
    report = compare_derivatives(with_rule(jnp.sin), jnp.ones(2))
    assert report.ok and list(report.missing) == ["forward"] and "custom_vjp" in report.missing["forward"]
    assert "forward mode is missing: " in str(report)
    power = lambda x: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * x), (0, x))[1]
    report = compare_derivatives(power, jnp.array([1.5]))
    assert report.ok and list(report.missing) == ["reverse"]


def test_cancellation_is_found():
    """jax.nn.log_softmax loses its digits at p near 1, where the differences in float64 keep them."""
    sure = jnp.array([20.0, 0.0])
    assert worst(compare_derivatives(jax.nn.log_softmax, sure), "differences") > 1e4
    assert worst(compare_derivatives(js.log_softmax, sure), "differences") < 2


def test_trees_several_arguments_and_constants():
    """The Jacobian's blocks lie as jax.jacrev has them; labels and Python values are passed on."""
    W, x = jnp.array([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]), jnp.array([1.0, -2.0, 0.5])
    f = lambda W, x, power: {"product": W @ x, "sum": jnp.sum(x**power)}

    def analytic(W, x, power):
        by_W = jnp.eye(2)[:, :, None] * x[None, None, :]
        return {"product": (by_W, W), "sum": (jnp.zeros((2, 3)), power * x ** (power - 1))}

    compare_derivatives(f, W, x, 3, analytic=analytic, argnums=(0, 1)).assert_ok()
    loss = lambda z, label: js.softmax_cross_entropy_with_integer_labels(z, label)
    regimes = {"sure": (jnp.array([30.0, 0.0, 1.0]), jnp.array(0)), "two": (jnp.array([1.0, 0.5]), jnp.array(1))}
    analytic = lambda z, label: js.softmax(z) - jax.nn.one_hot(label, z.size)
    report = compare_derivatives(loss, x, jnp.array(2), analytic=analytic, regimes=regimes)
    failing = {c.regime for c in report.comparisons if c.error > report.tolerance}
    assert failing == {"sure"}  # p - e itself cancels there
    with pytest.raises(ValueError, match=r"analytic must return arrays of \[9\] entries, got \[3\]"):
        compare_derivatives(js.softmax, x, analytic=js.softmax)


def test_in_the_arguments_own_dtype_where_float64_is_refused():
    scale = jnp.array([1.0, 2.0])  # float32, which strict promotion keeps from float64
    report = compare_derivatives(lambda x: scale * jnp.sin(x), jnp.array([0.3, 1.0]))
    assert report.ok and report.differences == "float32"
    assert not compare_derivatives(lambda x: scale * with_rule(jnp.sin, 1.01)(x), jnp.array([0.3, 1.0])).ok


def test_float64(x64):
    compare_derivatives(js.softmax, jnp.array([1.0, 0.0]), analytic=js.softmax_jacobian).assert_ok()
    assert not compare_derivatives(js.softmax, jnp.ones(2), analytic=lambda x: js.softmax_jacobian(x) + 1e-12).ok


def test_nan_fails():
    bad = with_rule(jnp.sqrt, jnp.nan)
    report = compare_derivatives(bad, jnp.ones(1))
    assert not report.ok and report.comparisons[0].error == np.inf


def test_wrong_calls():
    with pytest.raises(TypeError, match="f must be a function"):
        compare_derivatives(3, jnp.ones(2))
    with pytest.raises(TypeError, match="differentiated argument must have a floating-point dtype"):
        compare_derivatives(jnp.sin, jnp.arange(3))
    with pytest.raises(TypeError, match=r"args must hold .* compare_derivatives\(f, x\)"):
        compare_derivatives(jnp.sin)
    with pytest.raises(ValueError, match="argnums=1 names an argument .* the 1 given"):
        compare_derivatives(jnp.sin, jnp.ones(2), argnums=1)
    with pytest.raises(ValueError, match="num_classes"):
        logit_regimes(1)
