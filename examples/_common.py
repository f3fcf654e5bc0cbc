"""What the examples share: MNIST-format IDX files, checkpoints that survive a kill at any moment, the command line."""

import argparse
import gzip
import hashlib
import io
import json
import math
import os
import struct
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class FileError(Exception):
    """A file that cannot be used; the message names the file and says why."""


# --- IDX files: two zero bytes, the type code (8: unsigned bytes), the number of axes, their lengths, the entries ---


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, gzipped or not.

    Raises:
      FileError: if the file is unreadable, damaged, of another type or of another length than its header says.
    """
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path}: cannot be read: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise FileError(f"{path}: not an IDX file of unsigned bytes: it starts with {raw[:4].hex() or 'nothing'}")
    ndim = raw[3]
    if len(raw) < 4 + 4 * ndim:
        raise FileError(f"{path}: the header of {ndim} axes is cut short")
    shape = struct.unpack_from(f">{ndim}I", raw, 4)
    found, needed = len(raw) - 4 - 4 * ndim, math.prod(shape)
    if found != needed:
        raise FileError(f"{path}: its header announces {shape}, that is {needed} bytes, but {found} follow")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def find_idx(folder: Path, name: str) -> Path:
    """The file `name`, as the MNIST family spells it: with a dash or a dot before `idx`, with or without .gz."""
    candidates = [folder / (spelling + end) for spelling in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    for path in candidates:
        if path.is_file():
            return path
    raise FileError(f"{candidates[0]}: no such file (nor {', '.join(path.name for path in candidates[1:])})")


def read_idx_pair(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, height, width) and labels (count,) of the part `prefix`, "train" or "t10k"."""
    image_path, label_path = (
        find_idx(folder, f"{prefix}-images-idx3-ubyte"),
        find_idx(folder, f"{prefix}-labels-idx1-ubyte"),
    )
    images, labels = read_idx(image_path), read_idx(label_path)
    for path, array, ndim in ((image_path, images, 3), (label_path, labels, 1)):
        if array.ndim != ndim or not array.size:
            raise FileError(f"{path}: needs {ndim} axes and at least one entry, got shape {array.shape}")
    if len(images) != len(labels):
        raise FileError(f"{label_path}: {len(labels)} labels, but {image_path.name} has {len(images)} images")
    return images, labels


# --- checkpoints: an .npz file without pickle, whose zip comment is the SHA-256 of all that stands before it ---

FORMAT = 1
DIGEST = 64


def save_checkpoint(path: Path, state: Any, settings: dict, progress: Any) -> None:
    """Write a checkpoint so that at every moment `path` holds either the old one or the new one, whole.

    Args:
      path: the file; a temporary one is written beside it first.
      state: pytree of arrays.
      settings: what must be the same when the run is resumed; JSON values.
      progress: anything else to remember; JSON values.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    header = {"format": FORMAT, "settings": settings, "progress": progress, "leaves": describe(state)}
    buffer = io.BytesIO()
    header_bytes = np.frombuffer(json.dumps(header).encode(), np.uint8)
    arrays: dict[str, Any] = {f"leaf_{i}": leaf for i, leaf in enumerate(leaves)}
    np.savez(buffer, header=header_bytes, **arrays)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = bytes(DIGEST)  # room for the digest
    body = buffer.getvalue()[:-DIGEST]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(body)
        file.write(digest(body))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, like: Any, settings: dict) -> tuple[Any, Any]:
    """The state, shaped like the pytree `like`, and the progress that `save_checkpoint` wrote.

    Raises:
      FileError: if the file is unreadable, damaged, of another format, or of a run with other settings or arrays.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error}") from error
    body = raw[:-DIGEST]
    if digest(body) != raw[-DIGEST:]:
        raise FileError(f"{path}: damaged, or not a checkpoint: its checksum is wrong; remove it to start again")
    with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
        header = json.loads(arrays["header"].tobytes())
        if header["format"] != FORMAT:
            raise FileError(f"{path}: has format {header['format']}, this program reads format {FORMAT}")
        check_settings(path, header["settings"], settings)
        if header["leaves"] != describe(like):
            raise FileError(f"{path}: holds other arrays than this run: {difference(header['leaves'], describe(like))}")
        leaves = [arrays[f"leaf_{i}"] for i in range(len(header["leaves"]))]
    # The view gives bfloat16 its name back, which .npz does not know; the copy is JAX's own and may be donated.
    leaves = [jnp.array(leaf.view(jnp.dtype(dtype))) for leaf, (_, dtype, _) in zip(leaves, header["leaves"])]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), header["progress"]


def digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def describe(state: Any) -> list[list]:
    """Path, dtype and shape of every leaf, as JSON gives them back."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [[jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves]


def difference(found: list, wanted: list) -> str:
    """The first entry in which two unequal descriptions differ."""
    longest = max(len(found), len(wanted))
    pairs = zip(found + [None] * (longest - len(found)), wanted + [None] * (longest - len(wanted)))
    return next(f"{a} instead of {b}" for a, b in pairs if a != b)


def check_settings(path: Path, found: dict, wanted: dict) -> None:
    wanted = json.loads(json.dumps(wanted))
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if names:
        listed = ", ".join(f"{name} {found.get(name)} instead of {wanted.get(name)}" for name in names)
        raise FileError(f"{path}: belongs to another run, with {listed}; use the same options or another folder")


# --- the command line ---


def explain(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """One line for what the reader can mend, and Python's traceback for all else."""
    if issubclass(kind, KeyboardInterrupt):
        resumes = " --resume continues after the last epoch." if "resume" in _options else ""
        print(f"\ninterrupted.{resumes}", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError) and error.name != "jaxsoftmax":
        print(f'error: {error.name} is missing: pip install ".[examples,frameworks]"', file=sys.stderr)
    elif issubclass(kind, (FileError, OSError)):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # an example runs, and is not just imported
    sys.excepthook = explain
_options: set[str] = set()  # names of those of the example that runs


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The text as it stands, and the default of each option."""


class Parser(argparse.ArgumentParser):
    """Options of an example, whose docstring is the description."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=_Help)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found = super().parse_args(args, namespace)
        _options.update(vars(found))
        return found


def folder(text: str) -> Path:
    """A folder to write to, made if it is not there."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written to: {error.strerror}") from error


def rate(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be larger than 0, got {text}")
    return float(text)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def natural(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return int(text)


def first_devices(text: str) -> list[Any]:
    """As many devices as the text says."""
    count, devices = positive(text), jax.devices()
    if count > len(devices):
        found = f"{count} devices needed, {len(devices)} of platform {devices[0].platform} found"
        flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        raise argparse.ArgumentTypeError(f"{found}; CPUs can be divided: {flag}")
    return devices[:count]
