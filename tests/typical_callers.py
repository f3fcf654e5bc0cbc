"""How other people's code calls the package: pyright reads this file in `.ci/run`, nothing runs it."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from functools import partial
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jaxsoftmax as js
from jaxsoftmax import curvature, network, training
from jaxsoftmax.autodiff import custom_vjp


def maps_and_losses(x: np.ndarray, logits: Array, labels: Array) -> None:
    assert_type(js.softmax(x, axis=-1), Array)
    assert_type(js.logsumexp(x), Array)
    assert_type(js.logsumexp(x, -1, return_sign=True), tuple[Array, Array])
    js.softmx(x)  # pyright: ignore[reportAttributeAccessIssue]
    assert_type(js.log_softmax(x, where=np.array([True, False])), Array)
    assert_type(js.softmax_cross_entropy_with_integer_labels(logits, labels, label_smoothing=0.1), Array)
    assert_type(js.logits_hessian(js.softmax_cross_entropy, logits, labels).as_matrix(), Array)
    assert_type(js.logits_hessian(partial(js.brier_loss), logits, labels).mv(x), Array)
    assert_type(js.logits_ggn(js.brier_loss, logits, labels).sample(jax.random.key(0), (3,)), Array)


def operators(x: Array, v: np.ndarray) -> None:
    J = js.SoftmaxJacobian.from_logits(x)
    assert_type(J.scaled(2.0), js.SoftmaxJacobian)
    assert_type(J @ v, Array)
    assert_type(J.solve(v, 0.1), Array)
    values, vectors = J.eigh()
    assert_type((values, vectors), tuple[Array, Array])


def rules() -> None:
    @custom_vjp
    def twice(x: Array, times: int = 2) -> Array:
        return times * x

    twice.defvjp(lambda x, times=2: (twice(x, times), times), lambda times, ct: (times * ct, None))
    assert_type(twice(jnp.ones(3)), Array)
    assert_type(twice(jnp.ones(3), times=3), Array)
    twice("x")  # pyright: ignore[reportArgumentType]

    @custom_vjp(nondiff_argnums=(1,))
    def power(x: Array, exponent: int) -> tuple[Array, int]:
        return x**exponent, exponent

    assert_type(power(jnp.ones(3), exponent=3), tuple[Array, int])
    power(jnp.ones(3), "3")  # pyright: ignore[reportArgumentType]

    class Model:
        @custom_vjp
        def double(self, x: Array) -> Array:
            return 2 * x

    assert_type(Model().double(jnp.ones(3)), Array)
    Model().double("x")  # pyright: ignore[reportArgumentType]


def networks(x: Array, labels: Array) -> None:
    params = network.init(jax.random.key(0), (4, 8, 3))
    gradients = network.backprop(params, x, labels, js.softmax_cross_entropy_with_integer_labels, jnp.tanh)
    optimizer = optax.adam(1e-3)

    def loss(params, x, labels):
        return jnp.mean(js.softmax_cross_entropy_with_integer_labels(network.forward(params, x), labels))

    state = training.TrainState.create(params, optimizer)
    state, metrics = training.make_train_step(loss, optimizer)(state, x, labels)
    curvature.hvp(network.forward, js.softmax_cross_entropy_with_integer_labels, params, x, labels, gradients)


def heads(x: Array, labels: Array, weights: Array) -> None:
    assert_type(js.linear_softmax_cross_entropy_loss(x, labels, weights, reduction="mean", z_loss=1e-4), Array)
