"""examples/train_digits.py: what it learns and prints, IDX files, checkpoints, damage, and a real kill."""

import gzip
import importlib
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import _common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_digits
from _common import FileError, load_checkpoint, read_idx, read_idx_pair, save_checkpoint
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
QUICK = ["--epochs", "2", "--hidden", "16", "--batch-size", "256"]


def arrays_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """The arrays of the state, read with plain NumPy."""
    with np.load(checkpoint, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "header"}


def assert_same_bits(first: Path, second: Path) -> None:
    a, b = arrays_of(first), arrays_of(second)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].tobytes() == b[name].tobytes(), name


def train(out: Path, *options: str) -> None:
    """The training of a quick run, without the report that follows it."""
    parsed = train_digits.parse([*QUICK, "--out", str(out), *options])
    out.mkdir(parents=True, exist_ok=True)
    train_digits.train(train_digits.load_data(parsed.idx_dir), parsed)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """The checkpoint of a quick run."""
    out = tmp_path_factory.mktemp("quick")
    train(out)
    return out / "checkpoint.npz"


# --- the example as a stranger runs it ---


@pytest.mark.slow
def test_default_run(tmp_path, capsys):
    """At least 97 % on the test images; the derivatives agree; three pictures."""
    train_digits.main(["--out", str(tmp_path)])
    printed = capsys.readouterr()
    rows = re.findall(r"^ *(\d+) +([\d.]+) +([\d.]+)% +([\d,]+)$", printed.out, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, 21))
    assert float(rows[-1][1]) < 0.01 < 0.1 < float(rows[0][1])
    assert float(rows[-1][2]) >= 97
    assert "28160/28160" in printed.err  # the progress bar, 20 epochs of 44 batches of 32

    gradients = re.findall(r"^([Wb]\d) +\S+ +(\S+) +(\S+) +(\S+) +(\S+)$", printed.out, re.MULTILINE)
    assert [row[0] for row in gradients] == ["W1", "b1", "W2", "b2", "W3", "b3"]
    for _, by_hand, by_grad, by_jacrev, difference in gradients:
        assert abs(float(by_hand)) > 0
        np.testing.assert_allclose([float(by_hand), float(by_jacrev)], float(by_grad), rtol=1e-5)
        assert float(difference) <= 1e-5 * abs(float(by_grad))
    (difference,) = re.findall(r"largest difference over all 100 entries: (\S+)", printed.out)
    assert float(difference) <= 1e-7

    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert pictures.keys() == {"training_curve.png", "jacobian.png", "predictions.png"}
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in pictures.values())


def test_options(tmp_path):
    """No hidden layer is softmax regression; a name that is no optimizer, or a count of 0, is refused."""
    train_digits.main([*QUICK, "--hidden", "--optimizer", "sgd", "--learning-rate", "0.1", "--out", str(tmp_path)])
    assert [array.shape for array in arrays_of(tmp_path / "checkpoint.npz").values()][:2] == [(10, 64), (10,)]
    for wrong in (["--optimizer", "none"], ["--epochs", "0"], ["--batch-size", "x"], ["--seed", "-1"]):
        with pytest.raises(SystemExit):
            train_digits.parse(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "1438"], "--batch-size 1438: there are only 1437 training images"),
        (["--learning-rate", "1e30"], "the loss is .* in epoch 1: try a smaller --learning-rate"),
        (["--idx-dir", "/nowhere"], "/nowhere/train-images-idx3-ubyte: no such file"),
    ],
)
def test_errors_are_one_line(tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"^error: {message}") as caught:
        train_digits.main([*QUICK, "--out", str(tmp_path), *options])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoint.npz").exists()


@pytest.mark.parametrize("name", ["train_digits", "train_language_model", "second_order", "backprop_by_hand"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "/dev/null/x"], "--out: /dev/null/x cannot be written to"),
        (["--learning-rate", "-1"], "--learning-rate: must be larger than 0, got -1"),
        (["--steps", "0"], "--steps: must be at least 1, got 0|--steps must be at least 5, got 0"),
    ],
)
def test_wrong_options(name, options, message, capsys):
    example = importlib.import_module(name)
    if options[0] not in Path(str(example.__file__)).read_text(encoding="utf-8"):
        pytest.skip("no such option")
    with pytest.raises(SystemExit):
        example.main(options)
    assert re.search(message, capsys.readouterr().err)


def test_what_the_reader_can_mend_is_one_line(capsys, monkeypatch):
    """In place of a traceback, for every example that is run as a program."""
    monkeypatch.setattr(_common, "_options", set())
    for error, message in (
        (KeyboardInterrupt(), "interrupted."),
        (ModuleNotFoundError(name="tqdm"), 'error: tqdm is missing: pip install ".[examples,frameworks]"'),
        (PermissionError(13, "Permission denied", "x.png"), "error: [Errno 13] Permission denied: 'x.png'"),
    ):
        _common.explain(type(error), error, None)
        assert capsys.readouterr().err.strip() == message
    _common.explain(ValueError, ValueError("x"), None)
    assert "ValueError: x" in capsys.readouterr().err
    train_digits.parse(["--epochs", "1"])
    _common.explain(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "--resume continues after the last epoch" in capsys.readouterr().err


# --- IDX files ---


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_digits(folder: Path, *, dot: bool = False, end: str = "") -> Path:
    """scikit-learn's digits in MNIST's format: 1500 for training, 297 for testing."""
    folder.mkdir()
    digits = load_digits()
    for prefix, chosen in (("train", slice(1500)), ("t10k", slice(1500, None))):
        for kind, array in (("images-idx3", digits.images), ("labels-idx1", digits.target)):
            name = f"{prefix}-{kind}-ubyte{end}"
            write_idx(folder / (name.replace("-idx", ".idx") if dot else name), array[chosen].astype(np.uint8))
    return folder


def test_idx_folder(tmp_path, capsys):
    """Plain, gzipped, with a dot in the names: the same data, and the network learns them."""
    plain = train_digits.load_data(write_digits(tmp_path / "plain"))
    assert plain.train.images.shape == (1500, 64)
    assert plain.num_classes == 10
    np.testing.assert_array_equal(plain.test.labels, load_digits().target[1500:])
    np.testing.assert_array_equal(plain.pictures, load_digits().images[1500:])
    for folder in (write_digits(tmp_path / "gz", end=".gz"), write_digits(tmp_path / "dot", dot=True)):
        jax.tree.map(np.testing.assert_array_equal, train_digits.load_data(folder), plain)
    options = ["--hidden", "64", "--epochs", "5", "--idx-dir", str(tmp_path / "gz"), "--out", str(tmp_path / "out")]
    train_digits.main(options)
    (accuracy,) = re.findall(r"^test accuracy ([\d.]+)%", capsys.readouterr().out, re.MULTILINE)
    assert float(accuracy) > 85


@pytest.mark.parametrize("end", ["", ".gz"])
def test_damaged_idx(tmp_path, end):
    """Cut anywhere, or lengthened: an error with the file's name. So is any flipped bit, where gzip has a checksum."""
    path = tmp_path / f"x{end}"
    array = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    write_idx(path, array)
    np.testing.assert_array_equal(read_idx(path), array)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(len(whole))] + [whole + b"x"]
    covered = range(10, len(whole)) if end else range(16)  # gzip's header itself has no checksum; IDX has a header only
    damaged += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in covered]
    for raw in damaged:
        path.write_bytes(raw)
        with pytest.raises(FileError, match=f"^{re.escape(str(path))}: "):
            read_idx(path)


def test_idx_of_another_kind(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\0\0\x0d\x01" + struct.pack(">If", 1, 0.5))
    with pytest.raises(FileError, match="not an IDX file of unsigned bytes: it starts with 00000d01"):
        read_idx(path)
    with pytest.raises(FileError, match="cannot be read"):
        read_idx(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("train-labels-idx1-ubyte", (1499,), "1499 labels, but train-images-idx3-ubyte has 1500 images"),
        ("train-labels-idx1-ubyte", (1500, 8, 8), r"needs 1 axes and at least one entry, got shape \(1500, 8, 8\)"),
        ("t10k-images-idx3-ubyte", (297,), r"needs 3 axes and at least one entry, got shape \(297,\)"),
        ("t10k-images-idx3-ubyte", (0, 8, 8), r"needs 3 axes and at least one entry, got shape \(0, 8, 8\)"),
        ("t10k-images-idx3-ubyte", (297, 8, 7), r"the images have two sizes, \(8, 8\) for training, \(8, 7\) for"),
    ],
)
def test_idx_files_that_do_not_belong_together(tmp_path, name, shape, message):
    folder = write_digits(tmp_path / "idx")
    write_idx(folder / name, np.zeros(shape, np.uint8))
    with pytest.raises(FileError, match=message) as caught:
        train_digits.load_data(folder)
    assert str(caught.value).startswith(str(folder))
    (folder / name).unlink()
    with pytest.raises(FileError, match=f"^{re.escape(str(folder / name))}: no such file"):
        read_idx_pair(folder, "train")
        read_idx_pair(folder, "t10k")


# --- checkpoints ---

STATE = {
    "W": jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)), jnp.float32),
    "half": jnp.asarray([1.5, -0.1], jnp.bfloat16),
    "step": jnp.asarray(7, jnp.int32),
    "none": None,
}
SETTINGS = {"hidden": [16, 8], "learning_rate": 0.1}


def test_checkpoint_holds_everything(tmp_path):
    path = tmp_path / "c.npz"
    save_checkpoint(path, STATE, SETTINGS, [{"loss": 0.1}])
    state, progress = load_checkpoint(path, jax.tree.map(jnp.zeros_like, STATE), SETTINGS)
    assert jax.tree.structure(state) == jax.tree.structure(STATE)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(STATE)):
        assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())
    assert progress == [{"loss": 0.1}]
    assert os.listdir(tmp_path) == ["c.npz"]


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_checkpoint(tmp_path, step):
    """A flipped bit in any byte, any cut, anything appended: an error with the file's name."""
    path = tmp_path / "c.npz"
    save_checkpoint(path, STATE, SETTINGS, [])
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 7 * step)] + [whole + b"x", bytes(len(whole))]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), step)]
    for raw in damaged:
        path.write_bytes(raw)
        with pytest.raises(FileError, match=f"^{re.escape(str(path))}: damaged, or not a checkpoint"):
            load_checkpoint(path, STATE, SETTINGS)


def test_mismatching_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.npz"
    save_checkpoint(path, STATE, SETTINGS, [])
    with pytest.raises(
        FileError, match=r"^/\S+c.npz: belongs to another run, with hidden \[16, 8\] instead of \[16\];"
    ):
        load_checkpoint(path, STATE, {**SETTINGS, "hidden": [16]})
    with pytest.raises(FileError, match="with seed None instead of 0;"):
        load_checkpoint(path, STATE, {**SETTINGS, "seed": 0})
    for like in ({**STATE, "W": STATE["W"].T}, {**STATE, "W": STATE["W"].astype(jnp.int32)}, {"W": STATE["W"]}):
        with pytest.raises(FileError, match="^/.*: holds other arrays than this run: .* instead of "):
            load_checkpoint(path, like, SETTINGS)
    monkeypatch.setattr(_common, "FORMAT", 2)
    with pytest.raises(FileError, match="^/.*: has format 1, this program reads format 2"):
        load_checkpoint(path, STATE, SETTINGS)
    with pytest.raises(FileError, match="cannot be read"):
        load_checkpoint(tmp_path, STATE, SETTINGS)


def test_checkpoint_is_on_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    """A failure before the renaming leaves the old file; the new one is flushed to disk first."""
    path, calls = tmp_path / "c.npz", []
    save_checkpoint(path, STATE, SETTINGS, "old")

    def fail(source, target):
        calls.append(("replace", Path(source).parent == path.parent, Path(source).stat().st_size))
        raise OSError("no")

    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("fsync", os.fstat(fd).st_size)))
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        save_checkpoint(path, STATE, SETTINGS, "new")
    (first, size), second = calls
    assert (first, second) == ("fsync", ("replace", True, size))
    assert load_checkpoint(path, STATE, SETTINGS)[1] == "old"


@pytest.mark.parametrize(
    ("options", "cut", "message"),
    [
        ([], 1, "damaged"),
        (["--seed", "1"], 0, "belongs to another run, with seed 0 instead of 1"),
        (["--hidden", "16", "8"], 0, r"belongs to another run, with hidden \[16\] instead of \[16, 8\]"),
        (["--epochs", "1"], 0, "has 2 epochs already, more than --epochs 1"),
    ],
    ids=["damaged", "another seed", "another network", "fewer epochs"],
)
def test_resume_refuses(tmp_path, quick, options, cut, message):
    whole, path = quick.read_bytes(), tmp_path / "checkpoint.npz"
    path.write_bytes(whole[: len(whole) - cut])
    with pytest.raises(SystemExit, match=f"^error: {re.escape(str(path))}: {message}"):
        train_digits.main([*QUICK, "--out", str(tmp_path), "--resume", *options])
    assert path.read_bytes() == whole[: len(whole) - cut]


def test_resume_refuses_other_data(tmp_path, quick):
    (tmp_path / "checkpoint.npz").write_bytes(quick.read_bytes())
    with pytest.raises(FileError, match="belongs to another run, with data [0-9a-f]{16} instead of [0-9a-f]{16};"):
        train(tmp_path, "--resume", "--idx-dir", str(write_digits(tmp_path / "idx")))


def test_resume_continues(tmp_path, quick, capsys):
    """With nothing there it starts; after one of two epochs it ends at the bits of two; after two it only reports."""
    train(tmp_path, "--resume", "--epochs", "1")
    train(tmp_path, "--resume")
    assert_same_bits(quick, tmp_path / "checkpoint.npz")
    assert "after epoch 1\n" in capsys.readouterr().out
    before = (tmp_path / "checkpoint.npz").read_bytes()
    train_digits.main([*QUICK, "--out", str(tmp_path), "--resume"])
    assert (tmp_path / "checkpoint.npz").read_bytes() == before
    printed = capsys.readouterr().out
    assert "after epoch 2\n" in printed
    assert epochs_in(printed) == [1, 2]


# --- real kills ---


def start(*arguments: str) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True)


def epochs_in(text: str) -> list[int]:
    """The epochs whose rows of the table are in `text`."""
    return [int(epoch) for epoch in re.findall(r"^ *(\d+) +[\d.]+ +[\d.]+% ", text, re.MULTILINE)]


def kill_after(process: subprocess.Popen, epoch: int) -> int:
    """SIGKILL at a random moment soon after `epoch`; the last epoch in the table."""
    clock, done = [], []
    with process:
        while epoch not in done:
            line = process.stdout.readline()
            assert line, "the example ended early: see its output"
            done += epochs_in(line)
            clock.append(time.perf_counter())
        time.sleep(random.random() * min(0.2, clock[-1] - clock[-2]))  # not long: the epochs to come may be faster
        process.kill()
        done += epochs_in(process.stdout.read())
    assert process.returncode == -signal.SIGKILL
    return done[-1]


def checkpointed(folder: Path) -> int:
    """The number of epochs in the checkpoint."""
    with np.load(folder / "checkpoint.npz", allow_pickle=False) as arrays:
        return arrays["header"].tobytes().count(b'"epoch"')


@pytest.mark.slow
def test_kill_and_resume(tmp_path):
    """Killed twice and resumed twice: no finished epoch is lost, and the end has the bits of a run left alone."""
    command = [str(EXAMPLES / "train_digits.py"), "--epochs", "6", "--hidden", "16", "--batch-size", "4", "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with start(*command, str(whole)) as alone:
        for resume, epoch in (([], 2), (["--resume"], 4)):
            printed = kill_after(start(*command, str(parts), *resume), epoch)
            saved = checkpointed(parts)
            assert printed <= saved <= printed + 1 < 7
        with start(*command, str(parts), "--resume") as last:
            assert f"after epoch {saved}\n" in last.stdout.read()
        alone.stdout.read()
    assert (last.returncode, alone.returncode) == (0, 0)
    assert_same_bits(whole / "checkpoint.npz", parts / "checkpoint.npz")


WRITER = """
import itertools, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import jax.numpy as jnp
from _common import save_checkpoint
states = [{"x": jnp.full(500_000, float(value))} for value in range(10)]
for n in itertools.count():
    save_checkpoint(Path(sys.argv[2]), states[n % 10], {}, n % 10)
    print(n)
"""


@pytest.mark.slow
def test_kill_while_writing(tmp_path):
    """Whenever the writer is killed, the file is a whole checkpoint."""
    path = tmp_path / "c.npz"
    for _ in range(3):
        with start("-c", WRITER, str(EXAMPLES), str(path)) as process:
            process.stdout.readline()
            time.sleep(random.uniform(0, 0.3))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        state, value = load_checkpoint(path, {"x": jnp.zeros(500_000)}, {})
        assert np.all(state["x"] == value)
