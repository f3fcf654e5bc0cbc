"""One training step with any optax optimizer: jitted, with the old state's memory given to the new one."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxsoftmax._core import checks

__all__ = ["TrainState", "make_train_step"]

Metrics = dict[str, Any]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training carries from step to step; a pytree.

    Args:
      params: parameters, any pytree of arrays; with `optax.lookahead`, an `optax.LookaheadParams` of two such.
      opt_state: the optimizer's state.
      step: number of steps taken, an int32 scalar.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxsoftmax.training import TrainState
      >>> state = TrainState.create({"w": jnp.ones(3)}, optax.sgd(0.1))
      >>> int(state.step)
      0
    """

    params: Any
    opt_state: Any
    step: Array

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation) -> "TrainState":
        """The state before the first step.

        Args:
          params: parameters, any pytree of floating-point arrays. They are copied, so that the caller's stay valid when
            a training step gives away the state's memory. For `optax.lookahead` they become the fast and the slow
            ones, unless they are an `optax.LookaheadParams` already.
          optimizer: any optax optimizer.

        Raises:
          TypeError: if a leaf of params is not such an array: a function or a counter in a module, for instance.
        """
        _check_optimizer(optimizer)
        params = jax.tree_util.tree_map_with_path(_as_parameter, params)
        opt_state = optimizer.init(params)
        if _looks_ahead(opt_state) and not isinstance(params, optax.LookaheadParams):
            params = optax.LookaheadParams.init_synced(params)
        state = cls(params, opt_state, jnp.zeros((), jnp.int32))
        # Leaf by leaf, because some optimizers keep the parameters in their state and no buffer can be donated twice;
        # with a definite dtype, because a weakly typed leaf would come back from the first step with another type.
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf)), state)


def make_train_step(
    loss_fn: Callable[..., Any], optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A jitted function that takes one step down the gradient of a loss.

    params ← params + u,   (u, opt_state) = optimizer(∂loss/∂params, opt_state, params)

    Args:
      loss_fn: `loss_fn(params, *batch)` -> the loss, a real scalar, or the pair (loss, metrics) with a dict of further
        arrays to report. Of `optax.LookaheadParams` it gets the fast ones.
      optimizer: any optax optimizer. One that takes extra arguments gets those of optax's names for line searches,
        plateau schedules, sharpness and curvature: `value` (the loss), `grad`, `value_fn` and `obj_fn` (params -> loss
        on this batch), `grad_fn` ((params, i) -> its gradient), and `batch`.

    Returns:
      `train_step(state, *batch)` -> `(state, metrics)`: the next `TrainState`, and a dict of the loss before the step,
      `metrics["loss"]`, and of `loss_fn`'s own metrics. The old state is donated: its arrays are given away.

    Raises:
      TypeError: if `loss_fn` is not callable or `optimizer` has no init and update; when the step is first called, if
        the loss is not a real scalar or the metrics are not a dict.
      ValueError: then too, if the metrics have an entry "loss".

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxsoftmax.training import TrainState, make_train_step
      >>> optimizer = optax.sgd(0.25)
      >>> train_step = make_train_step(lambda w, target: jnp.sum((w - target) ** 2), optimizer)
      >>> state = TrainState.create(jnp.zeros(2), optimizer)
      >>> state, metrics = train_step(state, jnp.array([1.0, 2.0]))
      >>> print(metrics["loss"], state.params, state.step)
      5.0 [0.5 1. ] 1
    """
    checks.function("loss_fn", loss_fn)
    _check_optimizer(optimizer)

    @functools.partial(jax.jit, donate_argnames="state")
    def train_step(state: TrainState, *batch: Any) -> tuple[TrainState, Metrics]:
        _check_state(state)

        def objective(params):
            return _loss_and_metrics(loss_fn(params, *batch))

        # optax's line searches hand on to it the extra arguments that they do not use themselves.
        def value_fn(params, obj_fn=None, grad_fn=None, batch=None):
            return objective(params)[0]

        trained = state.params.fast if isinstance(state.params, optax.LookaheadParams) else state.params
        (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(trained)
        updates, opt_state = _update(optimizer, grads, state, batch, value=loss, value_fn=value_fn)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), {"loss": loss, **metrics}

    return train_step


def _check_optimizer(optimizer: Any) -> None:
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        got = type(optimizer).__name__
        raise TypeError(f"optimizer must be an optax optimizer, with init and update, got {got}; params come before it")


def _check_state(state: Any) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(
            f"state must be a TrainState, as from TrainState.create(params, optimizer), got {type(state).__name__}; a "
            "checkpoint gives one back where it is restored into one (orbax: the state itself as the target)"
        )


def _as_parameter(path: tuple, leaf: Any) -> Array:
    got = type(leaf).__name__
    if not callable(leaf):
        leaf = checks.as_array("params", leaf)
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        got = leaf.dtype
    raise TypeError(
        f"params must be a pytree of floating-point arrays, got {got} at params{jax.tree_util.keystr(path)}. Train "
        "only the arrays of a module: arrays, rest = equinox.partition(module, equinox.is_inexact_array), and put the "
        "module together in the loss: equinox.combine(arrays, rest)"
    )


def _looks_ahead(opt_state: Any) -> bool:
    is_lookahead = lambda state: isinstance(state, optax.LookaheadState)
    return any(map(is_lookahead, jax.tree.leaves(opt_state, is_leaf=is_lookahead)))


def _update(optimizer, grads, state: TrainState, batch: tuple, value: Array, value_fn: Callable) -> tuple[Any, Any]:
    """The optimizer's updates and next state, from as many extra arguments as it takes."""
    extra = {
        "value": value,
        "grad": grads,
        "value_fn": value_fn,
        "obj_fn": value_fn,
        "grad_fn": lambda params, _: jax.grad(value_fn)(params),
        "batch": batch,
    }
    takes = inspect.signature(optimizer.update).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        extra = {parameter.name: extra[parameter.name] for parameter in takes if parameter.name in extra}
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies its int32 counters by floats
        return optimizer.update(grads, state.opt_state, state.params, **extra)


def _loss_and_metrics(out: Any) -> tuple[Array, Metrics]:
    loss: Any
    loss, metrics = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
    if not isinstance(metrics, dict):
        raise TypeError(f"loss_fn must return loss or (loss, dict of metrics), got (loss, {type(metrics).__name__})")
    if "loss" in metrics:
        raise ValueError("loss_fn's metrics must not have an entry 'loss': the loss itself is reported under that name")
    shape, dtype = jnp.shape(loss), jnp.result_type(loss)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"loss_fn must return a real scalar loss, got shape {shape} and dtype {dtype}")
    return loss, metrics
