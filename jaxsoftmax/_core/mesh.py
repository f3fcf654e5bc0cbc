"""How arrays lie on a mesh, and what JAX wants said of it: shardings and types that the mathematics does not show.

Outside a mesh each of these is its argument. Where one is left out JAX refuses the program; its words stand beside it
where they tell more than the name.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax.autodiff import varying_axes


def typed_like(z: Array, x: Array) -> Array:
    """x, of the shape of z, on a mesh typed as z is: a rule's cotangent for x will be of the type of z.

    Without it JAX says "Custom JVP rule must produce … {V:(rows,columns)} but got … {V:rows}".
    """
    return varying(sharded_like(z, x), varies_over(z))


def sharded_like(z: Array, x: Array) -> Array:
    """x, split as z is by mesh axes of type Explicit ("select `which` must … have the same sharding as cases").

    Of an axis of length 1 every device has all.
    """
    wanted = getattr(jax.typeof(z), "sharding", None)
    if wanted is None:
        return x
    spec = jax.sharding.PartitionSpec(*(None if n == 1 else names for n, names in zip(x.shape, wanted.spec)))
    if spec == jax.typeof(x).sharding.spec:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(wanted.mesh, spec))


def aligned(*arrays: Array | None) -> tuple[Any, ...]:
    """The arrays, of one shape but for axes of length 1, all split as the first that axes of type Explicit split.

    Without it JAX says "… produces an illegally sharded result" where axes differ.
    """
    like = next((x for x in arrays if x is not None and any(split_axes_of(x))), None)
    return tuple(x if x is None or like is None else sharded_like(like, x) for x in arrays)


def whole(x: Array) -> Array:
    """x, on every device in full also where mesh axes of type Explicit split it."""
    return jax.sharding.reshard(x, placement(x)) if any(split_axes_of(x)) else x


def placement(x: Array, *names: Any) -> jax.sharding.NamedSharding:
    """A sharding on the mesh of x by the mesh axes that split each axis, None for none."""
    return jax.sharding.NamedSharding(jax.typeof(x).sharding.mesh, jax.sharding.PartitionSpec(*names))


def split_axes_of(x: Array) -> tuple:
    """For each axis of x, the mesh axes of type Explicit that split it, None for none."""
    return tuple(getattr(getattr(jax.typeof(x), "sharding", None), "spec", ()))


def tensordot(a: Array, b: Array, axes: tuple, like: Array | None = None) -> Array:
    """`jnp.tensordot`, also where mesh axes of type Explicit split what it sums over.

    Without it JAX says "Contracting dimensions are sharded and it is ambiguous how the output should be sharded".

    Args:
      a, b, axes: as there, the axes an integer or a tuple for each.
      like: an array that is split as the result is to be; None for as a, then b are along their other axes.
    """
    of_a, of_b = (tuple(i % x.ndim for i in ((n,) if isinstance(n, int) else n)) for n, x in zip(axes, (a, b)))
    out, split = None, [x for x in (a, b) if any(split_axes_of(x))]
    if split and like is not None:
        out = placement(split[0], *split_axes_of(like))
    elif split:
        kept = [name for x, gone in ((a, of_a), (b, of_b)) for i, name in enumerate(split_axes_of(x)) if i not in gone]
        out = placement(split[0], *(name if name not in kept[:i] else None for i, name in enumerate(kept)))
    return lax.dot_general(a, b, ((of_a, of_b), ((), ())), out_sharding=out)


def in_auto_mode(fun: Callable, x: Any, *specs: tuple) -> Any:
    """fun(x), where XLA and not the types divide the work if mesh axes of type Explicit split arrays of x.

    For what has no rule for such axes ("Arguments to sort must be unsharded over the sorting dimension").

    Args:
      fun: function of x.
      x: a pytree of arrays.
      specs: for each result, a pytree of arrays too, and each of its first axes the mesh axes that split it, None for
        none.
    """
    if not any(any(split_axes_of(leaf)) for leaf in jax.tree.leaves(x)):
        return fun(x)
    out = tuple(jax.sharding.PartitionSpec(*spec) for spec in specs)
    return jax.sharding.auto_axes(fun, out_sharding=out if len(specs) > 1 else out[0])(x)


def tied(arrays, to):
    """`arrays` plus a 0 that is linear in all of `to`: they vary over a mesh, and have tangents, as that does."""
    zero = zero_of(to)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), arrays)


def zeros_like(x: Array) -> Array:
    """Zeros that lie on a mesh as x does: `jnp.zeros_like` forgets how since JAX 0.12."""
    return typed_like(x, jnp.zeros_like(x))


def zero_of(arrays) -> Array:
    """A 0 that is linear in all of the arrays, whatever stands there; XLA finds it without looking at them."""

    def zero(x):
        x = x.astype(jnp.float32)
        return jnp.sum(lax.select_n(False, zeros_like(x), x))

    return sum(map(zero, jax.tree.leaves(arrays)), jnp.float32(0))


def varies_over(x) -> frozenset[str]:
    """The axes of a `shard_map` that x varies over; none where JAX keeps no account of them in types (before 0.7)."""
    return varying_axes(jax.typeof(x))


def varying(arrays: Any, axes: frozenset[str]) -> Any:
    """The arrays of a tree as ones that vary over the mesh axes: each device has a copy of its own to differentiate in.

    A loop inside shard_map asks it of what it starts with ("carry input and carry output must have equal types").
    """

    def of(x):
        missing = tuple(axes - varies_over(x))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]  (JAX before 0.10)

    return jax.tree.map(of, arrays)
