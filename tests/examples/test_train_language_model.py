"""examples/train_language_model.py on a small text: it learns, resumes to the bit, and both heads agree."""

import pydoc_data.topics
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import train_language_model as example

QUICK = ["--vocabulary", "600", "--features", "16", "--hidden", "32", "--steps", "60", "--batch-size", "512"]


@pytest.fixture(autouse=True)
def small_text(monkeypatch):
    """Python's documentation without the sources of its library."""
    monkeypatch.setattr(example, "documents", lambda: [str(text) for text in pydoc_data.topics.topics.values()])


def arrays_of(folder: Path) -> dict[str, bytes]:
    with np.load(folder / "checkpoint.npz") as arrays:
        return {name: arrays[name].tobytes() for name in arrays.files if name != "header"}


def test_training_and_report(tmp_path, capsys):
    example.main([*QUICK, "--epochs", "2", "--eigenvalues", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    (unigram,) = re.findall(r"word frequencies alone: ([\d.]+);", printed.out)
    rows = re.findall(r"^ *(\d) +([\d.]+) +([\d.]+) +([\d,]+)$", printed.out, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "2"]
    assert float(rows[1][1]) < float(rows[0][1]) and float(rows[1][2]) < 0.9 * float(unigram)
    assert "token/s" in printed.err  # the progress bar
    fused, full = (float(size) for size in re.findall(r"head +([\d.,]+) MiB", printed.out))
    assert min(fused, full) > 0  # at this size one chunk holds everything
    (first, error), (second, _) = re.findall(r"^ +([\d.]+) ± (\S+)$", printed.out, re.MULTILINE)
    assert float(first) >= float(second) > 0 and float(error) < float(first)
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_ends_at_the_same_bits(tmp_path, capsys):
    text = example.load_text(600)
    for folder, calls in (("whole", [["2"]]), ("parts", [["1"], ["2", "--resume"]])):
        (tmp_path / folder).mkdir()
        for epochs in calls:
            options = [*QUICK, "--steps", "5", "--out", str(tmp_path / folder), "--epochs", *epochs]
            example.train(text, example.parse(options))
    assert "resumed from" in capsys.readouterr().out
    assert arrays_of(tmp_path / "whole") == arrays_of(tmp_path / "parts")
    with pytest.raises(example.FileError, match="features 8 instead|features 16 instead"):
        example.train(text, example.parse([*options[:-3], "--features", "8", "--epochs", "3", "--resume"]))


def test_both_heads_have_one_gradient(tmp_path):
    options = example.parse(QUICK)
    text = example.load_text(600)
    params = example.place(example.init(jax.random.key(0), options, len(text.words)), options.mesh)
    batch = example.windows(text.train, np.arange(10, 138), options)
    fused, full = (
        jax.jit(jax.value_and_grad(example.mean_loss(head)))(params, *batch) for head in example.HEADS.values()
    )
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(full)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * float(abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("head", example.HEADS)
def test_a_mesh_changes_nothing(head, tmp_path, capsys):
    """Two epochs on one device, against one on each of two meshes, the second from the first one's checkpoint."""
    text = example.load_text(601)

    def run(folder: str, epochs: str, *arguments: str):
        (tmp_path / folder).mkdir(exist_ok=True)
        settings = [*QUICK, "--steps", "5", "--head", head, "--epochs", epochs, "--out", str(tmp_path / folder)]
        options = example.parse([*settings, "--resume", *arguments])
        params, history = example.train(text, options)
        example.top_of_the_spectrum(params, text, options)
        eigenvalues = [float(value) for value in re.findall(r"^ +([\d.]+) ±", capsys.readouterr().out, re.MULTILINE)]
        return params, [(row["loss"], row["perplexity"]) for row in history], eigenvalues

    params, history, eigenvalues = run("whole", "2")
    run("parts", "1", "--mesh", "data=2,classes=2")
    split, *found = run("parts", "2", "--mesh", "classes=4")
    assert split["embeddings"].addressable_shards[0].data.shape == (640 // 4, 16)
    np.testing.assert_allclose(found[0], history, rtol=1e-5)
    np.testing.assert_allclose(found[1], eigenvalues, atol=2e-4)  # four digits are printed
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(params)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)  # of entries up to 1; Adam divides by small gradients


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=2,model=2"], "must be like data=2,classes=2, got 'data=2,model=2'"),
        (["--mesh", "data=2,data=2"], "must be like data=2,classes=2, got 'data=2,data=2'"),
        (["--mesh", "data=0"], "must be like data=2,classes=2, got 'data=0'"),
        (["--mesh", "classes=3"], "classes must divide 128, got 3"),
        (["--mesh", "data=4,classes=4"], "16 devices needed, 8 of platform cpu found; CPUs .*device_count=16"),
        (["--mesh", "data=2", "--batch-size", "511"], "--batch-size 511 must be a multiple of data=2"),
    ],
)
def test_wrong_meshes(arguments, message, capsys):
    with pytest.raises(SystemExit):
        example.parse(arguments)
    assert re.search(message, capsys.readouterr().err)
