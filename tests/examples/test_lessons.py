"""examples/backprop_by_hand.py and examples/second_order.py: short runs, what they print, the pictures they leave."""

import re

import backprop_by_hand
import pytest
import second_order


@pytest.mark.slow
def test_backprop_by_hand(tmp_path, capsys):
    backprop_by_hand.main(["--steps", "50", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    differences = [float(found) for found in re.findall(r"relative difference (\S+)", text)]
    assert len(differences) == 10 and max(differences) < 1e-5
    *_, (_, loss, accuracy) = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+)%$", text, re.MULTILINE)
    assert float(loss) < 0.5 and float(accuracy) > 80
    assert {path.name for path in tmp_path.iterdir()} == {"gradient_flow_before.png", "gradient_flow_after.png"}
    with pytest.raises(SystemExit):
        backprop_by_hand.main(["--steps", "1"])


@pytest.mark.slow
def test_second_order(tmp_path, capsys):
    second_order.main(["--steps", "8", "--lanczos-steps", "10", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    fewer = [line.split() for line in text.splitlines() if re.match(r" +(1\.0|0\.3) ", line)]
    assert len(fewer) == 2 and all("Gauss-Newton" in line for line in fewer)
    rows = re.findall(r"^(network|Laplace\S*(?: best prior| 1000 draws)?) +([\d.]+)% ", text, re.MULTILINE)
    assert len(rows) == 4 and all(float(accuracy) > 85 for _, accuracy in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"race.png", "spectrum.png", "calibration.png"}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
