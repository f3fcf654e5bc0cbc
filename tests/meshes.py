"""Meshes of the first CPU devices, and arrays placed on them."""

import contextlib
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

KINDS = ["Auto", "Explicit"] if hasattr(jax, "set_mesh") else ["Auto"]


def mesh_of(kind: str = "Auto", **axes: int) -> jax.sharding.Mesh:
    """A mesh of so many devices along each axis, all of them of one type."""
    types = {"axis_types": (jax.sharding.AxisType[kind],) * len(axes)} if hasattr(jax.sharding, "AxisType") else {}
    devices = jax.devices()[: math.prod(axes.values())]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices, **types)


def placed(mesh: jax.sharding.Mesh, tree: Any, specs: Any) -> Any:
    """The arrays of the tree, each split by the mesh axes of its spec."""
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))), tree, specs)


def around(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager:
    """What a caller writes around calls on the mesh: nothing where no axis is of type Explicit."""
    explicit = "Explicit" in str(getattr(mesh, "axis_types", ""))
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()
