"""short.py: the layer's call and the calls on a few tokens, timed once."""

import short
import torch
from common import Samples
from short import SCALES, SCORE, SIZES, cases, compare_mass, main

from qflux_kernels import Sparsemax


def test_a_row_for_every_case_and_mode(capsys):
    threads = torch.get_num_threads()
    try:
        main(["--threads", "1", "--rounds", "1", "--seconds", "0", "--largest", "64"])
    finally:
        torch.set_num_threads(threads)
    rows = capsys.readouterr().out.splitlines()[2:]
    names = list(cases([size for size in SIZES if size[1] <= 64]))
    assert len(names) == 4 and len(rows) == 3 * len(names)
    for number, row in enumerate(rows):
        assert row.startswith(names[number // 3]), row
        ours, theirs, ratio = map(float, row.split()[-3:])
        assert ours > 0 and theirs > 0 and ratio >= 0  # 0.00 where the machine is busy


def test_gradients_reach_what_a_call_was_given():
    for ours, theirs, calls in cases([(2, 8)]).values():
        for made in (ours, theirs):
            outputs = made.forward()
            assert len(outputs) == calls
            for grads in made.backward(outputs):
                assert grads and all(bool(grad.any()) for grad in grads)


def test_thresholds_by_mass_are_compared_with_soft_ones(capsys):
    threads = torch.get_num_threads()
    try:
        main(["--mass", "--rounds", "1", "--seconds", "0.001", "--largest", "64", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].split() == ["layer,", "1", "x", "32", "x", "64", "forward", "backward"]
    assert [line.split()[1] for line in lines[1:]] == [f"{scale:g}" for scale in SCALES]
    # One round of a busy machine may give a ratio that rounds to 0.00.
    ratios = [list(map(float, line.split()[2:])) for line in lines[1:]]
    assert all(len(row) == 2 and min(row) >= 0 for row in ratios), ratios


def test_what_a_threshold_by_mass_costs_is_its_time_over_the_soft_ones(capsys, monkeypatch):
    """Of the same layer, whose scores alone differ, at times that are known."""
    made = []
    monkeypatch.setattr(short, "layer", lambda *sizes, score=SCORE: made.append((sizes, score)))

    def times(runners, device, rounds, seconds):
        assert list(runners) == ["soft", "mass"]
        soft, mass = Samples(), Samples()
        soft.rounds |= {"forward": [1.0, 2.0, 4.0], "backward": [1.0, 1.0, 1.0], "both": [2.0] * 3}
        mass.rounds |= {"forward": [2.0, 6.0, 4.0], "backward": [3.0, 5.0, 4.0], "both": [9.0] * 3}
        return {"soft": soft, "mass": mass}

    monkeypatch.setattr(short, "time_in_turn", times)
    compare_mass(torch.device("cpu"), 64, 3, 1.0)
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[2:] for row in rows] == [["2.00", "4.00"]] * len(SCALES)
    assert made == [
        case for scale in SCALES for case in (((1, 64), SCORE), ((1, 64), Sparsemax(scale)))
    ]
