"""MeanFlow on a toy: a small transformer in Equinox that draws a ring of points in one step.

    python examples/meanflow.py                 a minute; writes meanflow.svg
    python examples/meanflow.py --steps 200     less

The loss (Geng et al. 2025, https://arxiv.org/abs/2505.13447) has a forward derivative of the network inside: attention
in forward mode, without an array of queries times keys.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from _common import positive
from tqdm import trange

import jaxsoftmax as js

POINTS, FEATURES, HEADS, LAYERS, BATCH = 16, 32, 2, 2, 64


def rings(key, count: int) -> jax.Array:
    """Points on a circle of radius 1, evenly spread from a random angle on: (count, POINTS, 2)."""
    angles = 2 * jnp.pi * (jax.random.uniform(key, (count, 1)) + jnp.arange(POINTS)[None] / POINTS)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1)


class Block(eqx.Module):
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    mlp: eqx.nn.MLP

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.qkv = eqx.nn.Linear(FEATURES, 3 * FEATURES, key=k1)
        self.out = eqx.nn.Linear(FEATURES, FEATURES, key=k2)
        self.mlp = eqx.nn.MLP(FEATURES, FEATURES, 2 * FEATURES, 1, jax.nn.silu, key=k3)

    def __call__(self, x):
        q, k, v = jnp.moveaxis(jax.vmap(self.qkv)(x).reshape(len(x), 3, HEADS, -1), 1, 0)
        x = x + jax.vmap(self.out)(js.dot_product_attention(q, k, v).reshape(len(x), -1))
        return x + jax.vmap(self.mlp)(x)


class MeanVelocity(eqx.Module):
    """u(z, r, t): the mean velocity of the points z between the times r and t."""

    first: eqx.nn.Linear
    blocks: list[Block]
    last: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, *keys = jax.random.split(key, 2 + LAYERS)
        self.first = eqx.nn.Linear(2 + 2 + POINTS, FEATURES, key=k1)
        self.blocks = [Block(key) for key in keys]
        self.last = eqx.nn.Linear(FEATURES, 2, key=k2)

    def __call__(self, z, r, t):
        times = jnp.broadcast_to(jnp.stack([r, t]), (POINTS, 2))
        x = jax.vmap(self.first)(jnp.concatenate([z, times, jnp.eye(POINTS)], -1))
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.last)(x)


def loss(model: MeanVelocity, key, x) -> jax.Array:
    """|u - (v - (t - r) du/dt)|², the derivative along the flow: dz = v, dr = 0, dt = 1."""
    of_noise, of_times, of_ends = jax.random.split(key, 3)
    noise, times = jax.random.normal(of_noise, x.shape), jax.random.uniform(of_times, (2, len(x)))
    t, r = times.max(0), times.min(0)
    r = jnp.where(jax.random.uniform(of_ends, t.shape) < 0.5, t, r)  # half of them are flow matching
    velocity, z = noise - x, x + t[:, None, None] * (noise - x)
    mean, change = jax.jvp(jax.vmap(model), (z, r, t), (velocity, jnp.zeros_like(r), jnp.ones_like(t)))
    target = velocity - (t - r)[:, None, None] * change
    errors = jnp.mean((mean - jax.lax.stop_gradient(target)) ** 2, (1, 2))
    return jnp.mean(errors / jax.lax.stop_gradient(errors + 1e-2) ** 0.5)


def draw(model: MeanVelocity, key, count: int) -> jax.Array:
    """Rings from noise in one step."""
    noise = jax.random.normal(key, (count, POINTS, 2))
    return noise - jax.vmap(model)(noise, jnp.zeros(count), jnp.ones(count))


def picture(model: MeanVelocity, path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(6, 3), sharex=True, sharey=True, layout="constrained")
    keys = jax.random.split(jax.random.key(7), 2)
    for ax, points, title in zip(axes, (rings(keys[0], 4), draw(model, keys[1], 4)), ("data", "drawn in one step")):
        for ring in points:
            ax.plot(*ring.T, ".")
        ax.set(title=title, aspect="equal", xlim=(-2, 2), ylim=(-2, 2))
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=3000)
    parser.add_argument("--picture", default="meanflow.svg", help="file to write; empty for none")
    given = parser.parse_args(arguments)
    model = MeanVelocity(jax.random.key(0))
    optimizer = optax.adam(2e-3)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state, key):
        of_data, of_loss = jax.random.split(key)
        value, gradient = eqx.filter_value_and_grad(loss)(model, of_loss, rings(of_data, BATCH))
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for i in (bar := trange(given.steps, desc="MeanFlow")):
        model, state, value = step(model, state, jax.random.key(i))
        losses.append(float(value))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    radii = jnp.linalg.norm(draw(model, jax.random.key(1), 256), axis=-1)
    print(f"radius of the points drawn in one step: {radii.mean():.3f} ± {radii.std():.3f} (1 ± 0 in the data)")
    if given.picture:
        picture(model, given.picture)
    return losses


if __name__ == "__main__":
    main()
