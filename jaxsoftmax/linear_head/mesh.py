"""A call on global arrays, divided over the devices of a mesh.

It is the call inside a `jax.shard_map`: each device gets its tokens and its block of the classes, and works as if
alone. What devices add up then are JAX's transposes of what they share. How the arrays lie is read from their types
where axes of the mesh are of type Explicit, and told by `token_axes` and `class_axes` where they are of type Auto.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxsoftmax._core import checks
from jaxsoftmax.linear_head.plan import Tokens

if hasattr(jax, "shard_map"):
    from jax import shard_map
else:  # JAX 0.6.0
    from jax.experimental.shard_map import shard_map

Names = tuple[str, ...]


class Layout(NamedTuple):
    """How a call lies on a mesh.

    Attributes:
      mesh: the mesh.
      manual: those of its axes that the call is divided over, or lies on in copies.
      tokens: axes that split the tokens, for each axis of x but the features.
      classes: axes that split the classes.
      gathered: axes that split the features of the weights, which are gathered once.
    """

    mesh: Any
    manual: frozenset[str]
    tokens: tuple[Names, ...]
    classes: Names = ()
    gathered: Names = ()

    def spec(self, name: str, vocab_axis: int) -> PartitionSpec:
        """How the argument `name` is split; "" stands for anything with a row per token."""
        if name in ("", "x", "token_weights"):
            return spec_of(*self.tokens)
        if name == "weights":
            return spec_of(*(self.gathered, self.classes)[:: 1 if vocab_axis == 1 else -1])
        return spec_of(self.classes) if name in ("bias", "class_weights") else PartitionSpec()


def layout_of(x: Array, weights: Array, vocab_axis: int, token_axes: Any, class_axes: Any) -> Layout | None:
    """The layout of a call, or None where every device does all of it or XLA divides it."""
    if token_axes is not None or class_axes is not None:
        return _as_told(x, weights, vocab_axis, token_axes, class_axes)
    mesh = next((mesh for mesh in map(_mesh, (x, weights)) if _of_type(mesh, AxisType.Explicit)), None)
    if mesh is None:
        return None
    tokens, over_weights = _split_by(x)[:-1], _split_by(weights)
    classes, features = over_weights[vocab_axis], over_weights[1 - vocab_axis]
    taken = set(sum(tokens, ()))
    # Axes that split the tokens cannot split the classes, too: the weights are then gathered beforehand.
    classes, gathered = () if taken & set(classes) else classes, features if taken >= set(features) else ()
    layout = Layout(mesh, _of_type(mesh, AxisType.Explicit), tokens, classes, gathered)
    return layout if taken or classes else None


def _as_told(x: Array, weights: Array, vocab_axis: int, token_axes: Any, class_axes: Any) -> Layout:
    meshes = [_mesh(x), _mesh(weights), jax.sharding.get_abstract_mesh()]
    mesh = next((mesh for mesh in meshes if mesh is not None and mesh.axis_names), None)
    if mesh is None:
        raise ValueError(
            "token_axes and class_axes name axes of a mesh, and there is none: put the arrays on one with "
            "jax.device_put, or enter one with jax.set_mesh"
        )
    per_axis = isinstance(token_axes, PartitionSpec)
    tokens = [checks.axis_names("token_axes", names) for names in (token_axes if per_axis else (token_axes,))]
    classes = checks.axis_names("class_axes", class_axes)
    named = [*itertools.chain(*tokens), *classes]
    for axis in named:
        if axis not in mesh.axis_names:
            raise ValueError(f"token_axes and class_axes must be axes of the mesh, {mesh.axis_names}, got {axis!r}")
        if named.count(axis) > 1:
            raise ValueError(f"token_axes and class_axes must name an axis of the mesh once, got {axis!r} twice")
    if len(tokens) >= x.ndim and any(tokens):
        raise ValueError(
            f"token_axes={token_axes!r} splits {len(tokens)} axes of tokens, x of shape {x.shape} has fewer"
        )
    tokens = (*tokens, *[()] * (x.ndim - 1))[: x.ndim - 1]
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes))
    for what, length, names in [
        *((f"axis {i} of x", x.shape[i], names) for i, names in enumerate(tokens)),
        ("the number of classes", weights.shape[vocab_axis], classes),
    ]:
        devices = math.prod(sizes[name] for name in names)
        if length % devices:
            raise ValueError(f"{what}, {length}, must be a multiple of the {devices} devices of {names}: pad it")
    return Layout(mesh, frozenset(named), tokens, classes)


def divided_by_xla(*arrays: Array) -> int:
    """Over how many devices XLA divides the tokens, supposedly: those of the largest axis of type Auto; 1 for none.

    Only XLA knows how the arrays lie. Where more devices divide the tokens, chunks are shorter than they might be;
    where fewer do, and none the classes, a chunk's logits take as much more memory.
    """
    meshes = [mesh for mesh in (jax.sharding.get_abstract_mesh(), *map(_mesh, arrays)) if mesh is not None]
    return max((mesh.shape[name] for mesh in meshes for name in _of_type(mesh, AxisType.Auto)), default=1)


def divided(work: Callable, layout: Layout, vocab_axis: int, per_token: bool) -> Callable:
    """work(theta, tokens) on every device. Its results: one `per_token` or summed, one summed, one per token."""

    def run(theta, tokens: Tokens):
        row, whole = spec_of(*layout.tokens), layout._replace(gathered=())
        of = lambda layout, arrays: {name: layout.spec(name, vocab_axis) for name in arrays}
        shared = None if tokens.shared is None else of(whole, tokens.shared)
        specs = of(layout, theta), Tokens(*jax.tree.map(lambda _: row, tokens[:2]), shared)
        args = jax.tree.map(functools.partial(_placed, layout), (theta, tokens), specs)
        manual: dict[str, Any] = {"axis_names": layout.manual}
        if not hasattr(jax, "shard_map"):
            manual = {"auto": frozenset(layout.mesh.axis_names) - layout.manual}
        out_specs = row if per_token else PartitionSpec(), PartitionSpec(), row
        return shard_map(work, mesh=layout.mesh, in_specs=specs, out_specs=out_specs, **manual)(*args)

    return run


def _placed(layout: Layout, x: Array, spec: PartitionSpec) -> Array:
    """x, moved where its type says that it lies otherwise."""
    mesh = _mesh(x)
    if not hasattr(jax.sharding, "reshard") or not _of_type(layout.mesh, AxisType.Explicit):
        return x
    wanted = tuple(map(_names, (*spec, *[None] * x.ndim)))[: x.ndim]
    if mesh is not None and _split_by(x) == wanted and mesh.axis_names:
        return x
    return jax.sharding.reshard(x, NamedSharding(layout.mesh, spec))


def _mesh(x: Array) -> Any:
    """The mesh of x's type, or None."""
    return getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)


def _of_type(mesh: Any, kind: AxisType) -> frozenset[str]:
    types = getattr(mesh, "axis_types", None) or ()
    return frozenset(name for name, found in zip(mesh.axis_names, types) if found == kind) if types else frozenset()


def _split_by(x: Array) -> tuple[Names, ...]:
    """For each axis of x, the mesh axes that split it, according to its type."""
    spec = jax.typeof(x).sharding.spec
    return tuple(map(_names, (*spec, *[None] * x.ndim)))[: x.ndim]


def _names(entry: Any) -> Names:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spec_of(*entries: Names) -> PartitionSpec:
    return PartitionSpec(*(names or None for names in entries))
