"""TrainState and make_train_step: any optax optimizer, buffers donated, compiled once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsoftmax.training import TrainState, make_train_step
from tests.helpers import assert_close

TARGET = np.array([1.0, -2.0, 3.0], np.float32)
START = {"w": np.zeros(3, np.float32), "b": np.float32(1.0)}


def loss_fn(params, target):
    """Convex, with its minimum 0 at w = target, b = 0."""
    return jnp.sum((params["w"] - target) ** 2) + params["b"] ** 2


def sgd_step(params, rate):
    return {"w": params["w"] - rate * 2 * (params["w"] - TARGET), "b": params["b"] - rate * 2 * params["b"]}


# --- the state ---


def test_state_is_a_frozen_pytree():
    optimizer = optax.adam(0.1)
    state = TrainState.create(START, optimizer)
    leaves, tree = jax.tree.flatten(state)
    assert isinstance(jax.tree.unflatten(tree, leaves), TrainState)
    assert len(leaves) == 2 + len(jax.tree.leaves(optimizer.init(START))) + 1
    assert (state.step.shape, state.step.dtype, int(state.step)) == ((), jnp.int32, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.step = 1


def test_the_callers_parameters_stay_valid_and_the_state_is_donated():
    params = jax.tree.map(jnp.asarray, START)
    state = TrainState.create(params, optax.adam(0.1))
    make_train_step(loss_fn, optax.adam(0.1))(state, TARGET)
    np.testing.assert_array_equal(params["w"], START["w"])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


# --- the step ---


def test_one_step_of_gradient_descent():
    optimizer = optax.sgd(0.25)
    state, metrics = make_train_step(loss_fn, optimizer)(TrainState.create(START, optimizer), TARGET)
    jax.tree.map(np.testing.assert_array_equal, state.params, sgd_step(START, np.float32(0.25)))
    assert metrics.keys() == {"loss"}
    assert metrics["loss"] == 15.0  # 1 + 4 + 9 + 1, before the step
    assert int(state.step) == 1


def test_metrics_and_batches_of_any_structure():
    def with_metrics(params, batch, weight):
        loss = weight * loss_fn(params, batch["target"])
        return loss, {"w": params["w"], "half": loss / 2}

    optimizer = optax.sgd(0.25)
    state, metrics = make_train_step(with_metrics, optimizer)(
        TrainState.create(START, optimizer), {"target": TARGET}, np.float32(2.0)
    )
    assert metrics.keys() == {"loss", "w", "half"}
    assert (metrics["loss"], metrics["half"]) == (30.0, 15.0)
    np.testing.assert_array_equal(metrics["w"], START["w"])
    jax.tree.map(np.testing.assert_array_equal, state.params, sgd_step(START, np.float32(0.5)))


def test_the_step_is_that_of_optax():
    """Adam for ten steps, against the same written out with optax alone, bit for bit."""
    optimizer = optax.adamw(0.1)

    @jax.jit
    def plain(params, opt_state):
        grads = jax.grad(loss_fn)(params, TARGET)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state, params, opt_state = TrainState.create(START, optimizer), START, optimizer.init(START)
    train_step = make_train_step(loss_fn, optimizer)
    for _ in range(10):
        state, _ = train_step(state, TARGET)
        params, opt_state = plain(params, opt_state)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (params, opt_state))


def test_dtypes_are_kept(x64):
    params = {"w": jnp.zeros(3, jnp.float64), "b": jnp.ones((), jnp.bfloat16)}
    optimizer = optax.adam(0.1)

    def mixed_loss(params, target):
        return jnp.sum((params["w"] - target) ** 2) + params["b"].astype(jnp.float64) ** 2

    state, _ = make_train_step(mixed_loss, optimizer)(TrainState.create(params, optimizer), TARGET.astype(np.float64))
    assert jax.tree.map(jnp.result_type, state.params) == jax.tree.map(jnp.result_type, params)


# --- any optimizer ---

OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam, clipped and scheduled": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(0.1, 100))
    ),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "accumulated": optax.MultiSteps(optax.adam(0.1), 2),
    "partly frozen": optax.multi_transform(
        {"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, {"w": "train", "b": "freeze"}
    ),
    "noisy": optax.chain(optax.add_noise(0.01, 0.5, key=jax.random.key(0)), optax.sgd(0.1)),
    # The parameters are in the state as well:
    "schedule-free": optax.contrib.schedule_free_sgd(0.1),
    "prodigy": optax.contrib.prodigy(),
    # Extra arguments are needed:
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
    "backtracking, accumulated": optax.MultiSteps(
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)), 2
    ),
    "polyak": optax.polyak_sgd(),
    "plateau": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
    "sophia": optax.contrib.sophia(0.1),
    "sharpness-aware": optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.01)),
    "sharpness-aware, opaque": optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.01), opaque_mode=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains_and_compiles_once(name):
    traces = []

    def traced_loss(params, target):
        traces.append(name)
        return loss_fn(params, target)

    state = TrainState.create(START, OPTIMIZERS[name])
    train_step = make_train_step(traced_loss, OPTIMIZERS[name])
    state, first = train_step(state, TARGET)
    traced = len(traces)
    for _ in range(20):
        state, last = train_step(state, TARGET)
    assert len(traces) == traced
    assert last["loss"] < first["loss"]
    assert int(state.step) == 21


def test_a_line_search_finds_the_minimum():
    """On a quadratic with equal curvatures the gradient points at the minimum: one searched step goes there."""
    optimizer = optax.lbfgs()
    state, train_step = TrainState.create(START, optimizer), make_train_step(loss_fn, optimizer)
    for _ in range(3):
        state, _ = train_step(state, TARGET)
    assert_close(state.params["w"], TARGET)


@pytest.mark.parametrize("given", [lambda params: params, optax.LookaheadParams.init_synced])
def test_lookahead_is_that_of_optax(given):
    """Two synchronizations, against the same written out with optax alone; the gradient is taken at the fast ones."""
    optimizer = optax.lookahead(optax.adam(0.1), sync_period=3, slow_step_size=0.5)

    @jax.jit
    def plain(params, opt_state):
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(jax.grad(loss_fn)(params.fast, TARGET), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state, train_step = TrainState.create(given(START), optimizer), make_train_step(loss_fn, optimizer)
    params = optax.LookaheadParams.init_synced(START)
    opt_state = optimizer.init(params)
    for _ in range(7):
        state, metrics = train_step(state, TARGET)
        expected = loss_fn(params.fast, TARGET)
        params, opt_state = plain(params, opt_state)
        assert_close(metrics["loss"], expected)
    assert isinstance(state.params, optax.LookaheadParams)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (params, opt_state))


def test_a_module_is_partitioned():
    """As the error for functions among the leaves says."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, "scalar", 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"^params .* got \w+ at params.*activation.*equinox.partition"):
        TrainState.create(model, optax.sgd(0.1))

    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    loss = lambda arrays, x: eqx.combine(arrays, rest)(x) ** 2
    state, train_step = TrainState.create(arrays, optax.sgd(0.1)), make_train_step(loss, optax.sgd(0.1))
    state, first = train_step(state, jnp.ones(3))
    assert train_step(state, jnp.ones(3))[1]["loss"] < first["loss"]


@pytest.mark.parametrize(
    ("leaf", "got"), [(jnp.tanh, "got \\w+ at"), (np.arange(3), "got int"), (True, "got bool"), ("relu", "got str")]
)
def test_parameters_that_are_none(leaf, got):
    with pytest.raises(TypeError, match=f"^params .*{got}"):
        TrainState.create({"w": jnp.ones(3), "other": [leaf]}, optax.sgd(0.1))


def test_extra_arguments_are_what_they_are_called():
    def update(updates, state, params, *, value, grad, value_fn, obj_fn, grad_fn, unknown="default"):
        assert unknown == "default"
        moved = jax.tree.map(lambda p: p + 1, params)
        report = {
            "value": value,
            "at": value_fn(params),
            "moved": obj_fn(moved),
            "grad": grad,
            "new": grad_fn(moved, 0),
        }
        return updates, report

    def init(params):
        return {"value": 0.0, "at": 0.0, "moved": 0.0, "grad": params, "new": params}

    optimizer = optax.GradientTransformationExtraArgs(init, update)
    state, _ = make_train_step(loss_fn, optimizer)(TrainState.create(START, optimizer), TARGET)
    found = state.opt_state
    assert (found["value"], found["at"], found["moved"]) == (15.0, 15.0, 17.0)  # 0 + 9 + 4 + 4 after the move
    np.testing.assert_array_equal(found["grad"]["w"], -2 * TARGET)
    np.testing.assert_array_equal(found["new"]["w"], 2 * (1 - TARGET))


# --- errors ---


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda w: w, TypeError, r"real scalar loss, got shape \(3,\) and dtype float32"),
        (lambda w: jnp.sum(w).astype(jnp.int32), TypeError, r"real scalar loss, got shape \(\) and dtype int32"),
        (lambda w: (jnp.sum(w), jnp.max(w)), TypeError, r"\(loss, dict of metrics\), got \(loss, \w*Tracer\)"),
        (lambda w: (jnp.sum(w), {"loss": 1.0}), ValueError, "must not have an entry 'loss'"),
    ],
)
def test_wrong_losses(wrong, error, message):
    optimizer = optax.sgd(0.1)
    state = TrainState.create(jnp.ones(3), optimizer)
    with pytest.raises(error, match=f"^loss_fn.*{message}"):
        make_train_step(wrong, optimizer)(state)
    assert not state.params.is_deleted()


def test_what_stands_in_the_place_of_another():
    params, optimizer = {"w": jnp.ones(3)}, optax.sgd(0.1)
    with pytest.raises(TypeError, match=r"^optimizer must be .*, got dict; params come before it$"):
        TrainState.create(optimizer, params)
    state, train_step = TrainState.create(params, optimizer), make_train_step(loss_fn, optimizer)
    for wrong in (params, dataclasses.asdict(state)):  # as a checkpoint comes back without a target
        with pytest.raises(TypeError, match=r"^state must be a TrainState, .* got dict; .* target"):
            train_step(wrong, TARGET)
