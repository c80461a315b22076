"""sparsemax.py: its parts, on short sequences."""

import csv

import pytest
import torch
from sparsemax import COLUMNS, MODES, exponent, main

from qflux.cli import main as qflux


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_rows_of_growth_and_of_hostile_states(tmp_path, capsys):
    path = tmp_path / "found.csv"
    sizes = "--sizes 600 1200 --dense-up-to 600 --scales 1 --hostile-sizes 64 --calls 1"
    main([*sizes.split(), "--output", str(path)])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    growth = [row for row in rows if row["part"] == "growth"]
    assert [(row["states"], row["S"], row["mode"]) for row in growth] == [
        (states, size, mode)
        for states in ("random", "circle")
        for size in ("600", "1200")
        for mode in MODES
    ]
    assert all(bool(row["ratio"]) == (row["S"] == "600") for row in growth)
    hostile = [row for row in rows if row["part"] == "hostile"]
    assert {row["algorithm"] for row in hostile} == {"auto"}
    assert len({row["states"] for row in hostile}) == 13
    assert "worst both" in capsys.readouterr().out


def test_states_of_a_trained_model(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 200)
    qflux(
        f"train --data {text} --output-dir {tmp_path / 'model'} --max-steps 1 --num-layers 2 "
        "--num-cylinders 4 --hidden-dim 16 --context-length 32".split()
    )
    capsys.readouterr()
    main(f"--parts model --model {tmp_path / 'model'} --text {text} --dense-up-to 600".split())
    found = capsys.readouterr().out.splitlines()[1:]
    assert len(found) == 6 and found[0].startswith("layer 0, cylinder")


def test_the_exponent_is_that_of_a_power():
    rows = [{"S": size, "ms": f"{3 * size**1.5}"} for size in (1 << 14, 1 << 16, 1 << 18)]
    assert exponent(rows) == pytest.approx(1.5)
    assert exponent(rows[:2]) is None
