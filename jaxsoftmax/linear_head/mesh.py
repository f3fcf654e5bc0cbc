"""A call on global arrays, divided over the devices of a mesh.

Each device gets its tokens and its block of the classes, and works as if alone; `stream` says what the devices tell
each other. How the arrays lie is read from their types where axes of the mesh are of type Explicit, and told by
`token_axes` and `class_axes` where they are of type Auto.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxsoftmax._core import checks
from jaxsoftmax._core.mesh import varying
from jaxsoftmax.linear_head.plan import Arrays, Axes, Head, Tokens

if hasattr(jax, "shard_map"):
    from jax import shard_map
else:  # JAX 0.6.0
    from jax.experimental.shard_map import shard_map

Names = tuple[str, ...]
LOCAL = ("x", "token_weights")  # one row per token
SPLIT = ("x", "weights", "bias", "class_weights")  # of whose gradient each device of the classes finds another part


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

    @property
    def axes(self) -> Axes:
        return Axes(sum(self.tokens, ()), self.classes, self.gathered)

    def spec(self, name: str, ndim: int, vocab_axis: int) -> PartitionSpec:
        """How the argument `name` is split; "" stands for anything with a row per token."""
        if name in ("", "x", "token_weights"):
            return spec_of(*self.tokens, *[()] * (ndim - len(self.tokens)))
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


def placed(head: Head, theta: dict[str, Array], tokens: Tokens) -> tuple[dict[str, Array], Tokens]:
    """The arguments, moved where their types say that they lie otherwise."""
    where = specs(head, theta), token_specs(head, tokens)
    return jax.tree.map(lambda x, spec: _placed(x, head.layout, spec), (theta, tokens), where)


def specs(head: Head, theta) -> dict[str, PartitionSpec]:
    return {name: head.layout.spec(name, x.ndim, head.vocab_axis) for name, x in theta.items()}


def token_specs(head: Head, tokens: Tokens) -> Tokens:
    rows, valid = jax.tree.map(lambda x: head.layout.spec("", x.ndim, head.vocab_axis), tokens[:2])
    shared = head._replace(layout=head.layout._replace(gathered=()))
    return Tokens(rows, valid, None if tokens.shared is None else specs(shared, tokens.shared))


def divided(work: Callable, head: Head, args: tuple, in_specs: tuple, out_specs):
    """work(head, *args) on every device."""
    layout, here = head.layout, head._replace(layout=None, axes=head.layout.axes)
    args = jax.tree.map(lambda x, spec: _placed(x, layout, spec), args, in_specs)
    work = functools.partial(work, here)
    if hasattr(jax, "shard_map"):
        manual = {"axis_names": layout.manual}
    else:
        manual = {"auto": frozenset(layout.mesh.axis_names) - layout.manual}
    return shard_map(work, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, **manual)(*args)


def _placed(x: Array, layout: Layout, spec: PartitionSpec) -> Array:
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


# On a device.


def whole(head: Head, arrays: Arrays, theta: Arrays) -> dict[str, Array]:
    """The arrays by name, tokens in one axis, as they are multiplied, weights with all features, copies as one."""
    axes, out = head.axes, dict(arrays)
    for name, x in arrays.items():
        if name in ("x", "weights"):
            x = x.astype(head.operand_dtype(theta))
        if name in LOCAL:
            x = flat(x, x.ndim - 1)
        if name == "weights" and axes.gathered:
            x = lax.all_gather(x, axes.gathered, axis=1 - head.vocab_axis, tiled=True)
        if axes.copies and name not in SPLIT:
            x = lax.pmean(x, axes.classes)
        out[name] = x
    return out


def added_up(head: Head, name: str, row: Array, argument: Array) -> Array:
    """The gradient in the argument `name`, of which each device has found a part, split and rounded as it is."""
    axes, row = head.axes, row.astype(argument.dtype) if name in ("x", "weights") and not head.exact else row
    if axes.copies and name not in SPLIT:
        row = varying(row / lax.psum(1, axes.classes), frozenset(axes.classes))
    elif name == "x":
        row = total(row, () if axes.copies else axes.classes)
    elif name == "weights" and axes.gathered:
        row = total(row, tuple(axis for axis in axes.tokens if axis not in axes.gathered))
        row = lax.psum_scatter(row, axes.gathered, scatter_dimension=1 - head.vocab_axis, tiled=True)
    elif name != "token_weights":
        row = total(row, axes.tokens)
    return row.astype(argument.dtype)


def total(x: Array, axes: tuple[str, ...]) -> Array:
    """Σ over the devices of the mesh axes."""
    return lax.psum(x, axes) if axes else x


def flat(rows: Array, axes: int) -> Array:
    """The first axes as one."""
    return rows.reshape(math.prod(rows.shape[:axes]), *rows.shape[axes:])
