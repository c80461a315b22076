"""short.py: the layer's call and the calls on a few tokens, timed once."""

import torch
from short import SCALES, SIZES, cases, main


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
        assert ours > 0 and theirs > 0 and ratio > 0


def test_gradients_reach_what_a_call_was_given():
    for ours, theirs, calls in cases([(2, 8)]).values():
        for made in (ours, theirs):
            outputs = made.forward()
            assert len(outputs) == calls
            for grads in made.backward(outputs):
                assert grads and all(bool(grad.any()) for grad in grads)


def test_thresholds_by_mass_are_compared_with_soft_ones(capsys):
    main(["--mass", "--rounds", "1", "--seconds", "0.001", "--largest", "64", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].split() == ["layer,", "1", "x", "32", "x", "64", "forward", "backward"]
    assert [line.split()[1] for line in lines[1:]] == [f"{scale:g}" for scale in SCALES]
    assert all(float(number) > 0 for line in lines[1:] for number in line.split()[2:])
