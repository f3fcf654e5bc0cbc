"""From the arguments of a call to its result: checked, divided over a mesh, reduced.

A call on global arrays is the call inside a `jax.shard_map`: each device gets its tokens and its block of the classes,
and works as if alone. What devices add up then are JAX's transposes of what they share. How the arrays lie is read from
their types where axes of the mesh are of type Explicit, and told by `token_axes` and `class_axes` where they are Auto.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxsoftmax._core import checks
from jaxsoftmax._core.mesh import tied, varies_over, varying
from jaxsoftmax.linear_head.plan import Head, Reduction, Tokens, operand_dtype, wide_dtype
from jaxsoftmax.linear_head.rows import class_weight
from jaxsoftmax.linear_head.stream import total, value_and_gradient

if hasattr(jax, "shard_map"):
    from jax import shard_map
else:  # JAX 0.6.0
    from jax.experimental.shard_map import shard_map

Names = tuple[str, ...]
PRECISIONS = "default", "fastest", "bfloat16", "high", "tensorfloat32", "highest", "float32"
OPTIONS = {  # that are one number: how it is checked, and the value that is off
    "label_smoothing": (functools.partial(checks.number, low=0.0, high=1.0), 0),
    "z_loss": (checks.number, 0),
    "temperature": (checks.positive, 1),
    "logit_softcap": (checks.positive, None),
    "target_softcap": (checks.positive, None),
}


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
        """How the argument `name` is split."""
        if name in ("x", "token_weights"):
            return spec_of(*self.tokens)
        if name == "weights":
            return spec_of(*(self.gathered, self.classes)[:: 1 if vocab_axis == 1 else -1])
        return spec_of(self.classes) if name in ("bias", "class_weights") else PartitionSpec()


class Call(NamedTuple):
    """The checked arguments that all heads share.

    Attributes:
      theta: arrays to differentiate in, by name: x (..., D), weights, token_weights (...), and where given bias (V,).
      head: what is static, but for the rule.
      reduction: "none", "sum" or "mean".
      layout: how the arrays lie on a mesh, outside of a `shard_map`.
    """

    theta: dict[str, Array]
    head: Head
    reduction: str
    layout: Layout | None

    @property
    def vocab(self) -> int:
        """The number of classes, inside a `shard_map` of this device's."""
        return self.theta["weights"].shape[self.head.vocab_axis]

    @property
    def num_classes(self) -> int:
        """With those of other devices."""
        return self.vocab * (1 if self.layout else self.head.devices)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of logits, losses and sums."""
        return self.theta["token_weights"].dtype


def called(
    x, weights, bias, token_weights, reduction, chunk_size, precision, vocab_axis, axis_name, token_axes, class_axes,
    *beside: Array,
) -> Call:  # fmt: skip
    """The call; with axis_name the weights, or what is `beside` them, vary over it."""
    x, weights = (_as_array(name, x) for name, x in (("x", x), ("weights", weights)))
    if x.ndim == 0:
        raise ValueError("x must have a feature axis, (..., D), got a scalar")
    if weights.ndim != 2:
        raise ValueError(f"weights must have shape (D, V), or (V, D) with vocab_axis=0, got {weights.shape}")
    if not all(isinstance(n, int) for n in weights.shape):
        sizes = f"weights must have known sizes, got {weights.shape}"
        raise TypeError(f"{sizes}: only the number of tokens may be symbolic")
    axis = checks.axis_index(vocab_axis, 2, "vocab_axis")
    if weights.shape[1 - axis] != x.shape[-1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, weights of shape {weights.shape} has {weights.shape[1 - axis]} with "
            f"vocab_axis={vocab_axis}: need the same; a (V, D) array goes with vocab_axis=0"
        )
    theta = {"x": x, "weights": weights}
    if bias is not None:
        theta["bias"] = checks.as_loss_float("bias", bias)
        checks.same_shape("bias", theta["bias"], "the classes", (weights.shape[axis],))
    wide, every = wide_dtype(theta), token_weights is None
    if token_weights is None:
        token_weights = jnp.ones_like(jnp.sum(x, -1), wide)  # typed as x is on a mesh
    token_weights = checks.as_real("token_weights", token_weights, wide).astype(wide)
    theta["token_weights"] = checks.broadcast("token_weights", token_weights, x.shape[:-1])
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(map(repr, get_args(Reduction)))}, got {reduction!r}")
    if chunk_size is not None:
        checks.at_least("chunk_size", chunk_size, 1)
    if not (precision is None or isinstance(precision, lax.Precision) or precision in PRECISIONS):
        names = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision must be None, a jax.lax.Precision or one of {names}, got {precision!r}")
    names, layout, spread = checks.split_over(axis_name, "weights", weights, *beside), None, 1
    if names and (token_axes is not None or class_axes is not None):
        raise ValueError("axis_name is for use inside shard_map, token_axes and class_axes outside of it: give one")
    if not names:
        layout = layout_of(x, weights, axis, token_axes, class_axes)
        spread = 1 if layout else divided_by_xla(x, weights)
    head = Head(axis, names or (layout.classes if layout else ()), chunk_size, precision, every, spread)
    return Call(theta, head, reduction, layout)


def _as_array(name: str, x) -> Array:
    """An argument to differentiate in: floating point, with a 0 and negative numbers."""
    x = checks.as_loss_float(name, x)
    if x.dtype.name == "float8_e8m0fnu":
        raise TypeError(
            f"{name} must have a dtype that holds 0 and negative numbers, got {x.dtype}: scale and convert it"
        )
    return x


def options(dtype: jnp.dtype, **given) -> dict[str, Array]:
    """The options that are one number, checked, without those that are off."""
    out = {}
    for name, value in given.items():
        check, off = OPTIONS[name]
        if not (value is off or checks.is_known_as(off, check(name, value))):
            out[name] = jnp.asarray(check(name, value), dtype)
    return out


def evaluate(call: Call, rule, tokens: Tokens, options: dict[str, Array], columns: int = 1) -> tuple[Array, Any]:
    """The reduced loss; with several columns the numbers (..., columns) of the tokens and their indices (...)."""
    head = call.head._replace(rule=rule, columns=columns)
    return _evaluate(head, call.layout, call.reduction, {**call.theta, **options}, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _evaluate(head: Head, layout: Layout | None, reduction: str, theta, tokens: Tokens):
    work = functools.partial(_on_device, head, layout, reduction)
    if layout is not None:
        work = divided(work, layout, head.vocab_axis, reduction == "none")
    out, counted, facts = work(theta, tokens)
    if reduction == "mean":
        out = jnp.where(counted == 0, 0.0, out / jnp.where(counted == 0, 1.0, counted))
    return out, facts


def _on_device(head: Head, layout: Layout | None, reduction: str, theta: dict[str, Array], tokens: Tokens):
    """The losses or their sum, what was counted, and the numbers and indices of the tokens, of this device's tokens."""
    a, valid, columns = theta["token_weights"], tokens.valid, head.columns
    counts = lambda row: row if valid is None else jnp.where(valid, row, 0.0)
    theta, tokens = _as_multiplied(head, layout, theta, tokens)
    # Each device differentiates in a copy of its own. Over axes that split no classes, it computes a sum of its own.
    around = frozenset().union(head.classes, *map(varies_over, jax.tree.leaves((theta, tokens))))
    weights = tied(jnp.ones_like(a), a) if reduction == "none" else a
    theta["token_weights"] = jnp.pad(weights.reshape(-1, 1), ((0, 0), (0, columns - 1)))
    theta, facts, counted = varying(theta, around), None, jnp.zeros((), a.dtype)
    rows = ("token_weights",) if reduction == "none" or columns > 1 else ()
    out, found, index = value_and_gradient(head, rows, theta, tokens)
    numbers = {name: total(row, head.classes).reshape(*a.shape, columns) for name, row in found.items()}
    if columns > 1:
        facts = numbers["token_weights"], index.reshape(a.shape)
    if reduction == "none":
        return counts(numbers["token_weights"][..., 0] * a), counted, facts
    if reduction == "mean":
        if "class_weights" in theta:
            a = a * class_weight(head, theta["class_weights"], tokens.rows).reshape(a.shape)
        counted = jnp.sum(counts(a))
    axes = () if layout is None else sum(layout.tokens, ())
    # One by one: JAX 0.6.0 does not transpose a sum of two of which one is not differentiated.
    return total(out, axes), total(counted, axes), facts


def _as_multiplied(head: Head, layout: Layout | None, theta, tokens: Tokens):
    """The arrays of this device with one axis of tokens, in the dtypes of the products, weights with all features."""
    shape, out = theta["x"].shape[:-1], dict(theta)
    flat = lambda row: row.reshape(math.prod(shape), *row.shape[len(shape) :])
    for name in ("x", "weights"):
        out[name] = theta[name].astype(operand_dtype(head.precision, theta))
    if layout is not None and layout.gathered:
        out["weights"] = lax.all_gather(out["weights"], layout.gathered, axis=1 - head.vocab_axis, tiled=True)
    if head.spread > 1:
        mesh, *_ = _auto_meshes(theta["x"], theta["weights"])
        out["weights"] = _with_all_features(out["weights"], head.vocab_axis, mesh)
    out["x"] = flat(out["x"])
    return out, Tokens(*jax.tree.map(flat, tokens[:2]), tokens.shared)


# On a mesh.


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
    return max((mesh.shape[n] for mesh in _auto_meshes(*arrays) for n in _of_type(mesh, AxisType.Auto)), default=1)


def _auto_meshes(*arrays: Array) -> list[Any]:
    meshes = jax.sharding.get_abstract_mesh(), *map(_mesh, arrays)
    return [mesh for mesh in meshes if mesh is not None and _of_type(mesh, AxisType.Auto)]


def _with_all_features(weights: Array, vocab_axis: int, mesh: Any) -> Array:
    """The weights, for XLA to gather their features once and not for every chunk, their classes as it likes."""
    free = PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(*(None if axis == 1 - vocab_axis else free for axis in range(2)))
    return lax.with_sharding_constraint(weights, NamedSharding(mesh, spec))


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
