"""What an argument must not be, and whether a function says so: a ValueError or TypeError of this package, which names
the argument."""

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoftmax as js

N, K = 2, 3
Z, V = np.linspace(-1, 1, N * K, dtype=np.float32).reshape(N, K), np.ones((N, K), np.float32)
P = np.full((N, K), 1 / K, np.float32)
LABELS, MASK = np.array([0, 2]), np.ones((N, K), bool)

NOT_NUMBERS = ("abc", {"a": 1}, [[1.0], [1.0, 2.0]], None)
COMPLEX = 1j * np.ones((N, K))
SHAPELESS = np.ones((7, K), np.float32)
MAP = (*NOT_NUMBERS, COMPLEX)
LOGITS = (*MAP, np.ones((N, K), int), np.ones((N, K), bool))
SOFT = (*NOT_NUMBERS, COMPLEX, SHAPELESS, np.ones(7))
HARD = (*NOT_NUMBERS, np.ones(N), np.ones((N, K), int), np.ones(7, int), 1j * np.ones(N))
NUMBER = ("x", 1j, np.ones((2, 2)), None)
POSITIVE = (*NUMBER, 0.0, -1.0, float("nan"))
VECTOR = (*MAP, np.ones((N, K + 1)), np.ones((7, K)))
COUNT = (0, -1, 1.5, "x")
FUNCTION = ("abc", 1.0, None, np.ones(2))
KEY = (0, None, "abc", 1.0, np.ones(2), jax.random.split(jax.random.key(0), 2))

PACKAGE, TESTS = Path(js.__file__).parent, Path(__file__).parent
Arguments = Mapping[str, tuple[object, tuple]]  # of one call: a right value of each argument, and wrong ones


def complaint(f: Callable, arguments: Mapping, names: tuple[str, ...], own_frames_only: bool) -> str:
    """What is wrong with how `f` takes this call; empty if it raises as it must."""
    try:
        out = f(**arguments)
    except (ValueError, TypeError) as error:
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)[1:]]
        foreign = [file for file in files if PACKAGE not in file.parents and TESTS not in file.parents]
        if foreign and (own_frames_only or PACKAGE not in files[-1].parents):
            return f"raised in {foreign[-1]}: {error}"  # by JAX, or when a jitted function is already traced
        return "" if any(name in str(error) for name in names) else f"does not name it: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"returned {jax.tree.map(jnp.shape, out)}"


def assert_each_is_refused(
    f: Callable, call: Arguments, own_frames_only: bool = True, also: Mapping[str, str] | None = None
) -> None:
    """Each argument of a right call in turn is replaced by everything that it must not be.

    Args:
      f: the function.
      call: its arguments.
      own_frames_only: whether no frame of JAX may lie between the call and the error: nothing is traced before it.
      also: name of an argument -> what a message may call it in its place.
    """
    right = {name: value for name, (value, _) in call.items()}
    try:
        jax.eval_shape(lambda: [f(**right), None][1])
    except jax.errors.JAXTypeError:  # numbers are asked for
        f(**right)
    bad = {}
    for name, (_, wrong) in call.items():
        names = (name, *filter(None, [(also or {}).get(name)]))
        for value in wrong:
            what = complaint(f, right | {name: value}, names, own_frames_only)
            if what:
                bad[name, repr(value)[:60]] = what
    assert not bad, "\n".join(f"{k}: {v}" for k, v in bad.items())
