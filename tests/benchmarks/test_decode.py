"""decode.py in small: what it compares decodes rightly, and every row is there."""

import decode
import pytest
import torch
from decode import PROVIDERS, VOCABULARY, main
from files import read_rows
from state_space import StateSpaceConfig, StateSpaceModel
from transformer import Transformer, TransformerConfig
from windowed import WindowedConfig, WindowedTransformer

from qflux import QuantumFluxConfig, make_model


def whole(name):
    torch.manual_seed(0)
    if name == "lm":
        model = make_model(QuantumFluxConfig(vocab_size=VOCABULARY)).eval()
        return lambda ids: model(ids).logits
    kind, config = {
        "transformer": (Transformer, TransformerConfig),
        "windowed": (WindowedTransformer, WindowedConfig),
        "state-space": (StateSpaceModel, StateSpaceConfig),
    }[name]
    return kind(config(vocab_size=VOCABULARY)).eval()


@pytest.mark.parametrize("name", PROVIDERS)
def test_pieces_give_the_logits_of_the_whole(name):
    length = 300  # beyond the window
    ids = torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        decoder = PROVIDERS[name](2, length)
        full = whole(name)(ids)
        for start, end in ((0, 5), (5, 6), (6, 9), (9, 250), (250, 299), (299, 300)):
            logits = decoder.read(ids[:, start:end])
            torch.testing.assert_close(logits, full[:, end - 1], rtol=1e-4, atol=1e-4)
    assert decoder.cache_bytes() > 0


def test_all_are_of_about_one_size():
    sizes = [make(1, 8).parameters for make in PROVIDERS.values()]
    assert max(sizes) < 1.25 * min(sizes)


def test_a_row_for_every_batch_context_and_provider(capsys):
    threads = torch.get_num_threads()
    try:
        main(["--contexts", "8", "16", "--batches", "1", "3", "--tokens", "2", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    rows = [row.split(",") for row in capsys.readouterr().out.splitlines()[2:]]
    expected = [[b, c, name] for b in "13" for c in ("8", "16") for name in PROVIDERS]
    assert [row[:3] for row in rows] == expected
    # Two tensors of 128 numbers for each of 4 layers. A state is the same behind any context.
    assert {row[-1] for row in rows if row[2] == "transformer"} == {"4096"}
    assert all(float(number) > 0 for row in rows for number in row[3:])


def test_a_cache_that_is_filled_goes_on_as_one_that_was_read(capsys):
    threads = torch.get_num_threads()
    line = ["--contexts", "40", "--batches", "2", "--tokens", "1", "--threads", "1"]
    try:
        main([*line, "--prefill-to", "39"])
    finally:
        torch.set_num_threads(threads)
    rows = [row.split(",") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1:3] for row in rows] == [["40", name] for name in PROVIDERS]
    assert all(row[4] == "" and float(row[5]) > 0 for row in rows)
    with torch.inference_mode():
        for name, make in PROVIDERS.items():
            decoder = make(2, 100)
            decoder.fill(90)
            assert decoder.read(torch.zeros(2, 1, dtype=torch.int64)).isfinite().all(), name


def test_rows_in_a_file_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "decode.csv", tmp_path / "decode.svg"
    line = ["--contexts", "8", "16", "--batches", "1", "2", "--tokens", "1"]
    main([*line, "--output", str(table), "--plot", str(picture)])
    rows = read_rows(table)
    assert [row["provider"] for row in rows] == list(PROVIDERS) * 4
    assert all(float(row["p50_ms"]) > 0 and row["commit"] for row in rows)
    text = picture.read_text()
    assert text.startswith("<?xml") and all(f"<!-- {name} -->" in text for name in PROVIDERS)


def test_a_stream_prints_where_its_length_doubles(capsys, monkeypatch):
    monkeypatch.setattr(decode, "BLOCK", 8)
    main(["--stream", "40"])
    rows = [row.split(",") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["8", "16", "32", "40"]
    assert all(float(number) >= 0 for row in rows for number in row)


def test_heads_are_timed_with_and_without_their_modules(capsys, monkeypatch):
    chosen = {"narrow": ("flux", {"hidden_dim": 64, "num_layers": 1})}
    monkeypatch.setattr(decode, "PUBLISHED", chosen)
    monkeypatch.setattr(decode, "READ", 32)
    main(["--heads", "7", "11", "--tokens", "2"])
    rows = [row.split(",") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [["narrow", n, v] for v in ("7", "11") for n in ("1", "32")]
    assert all(float(number) > 0 for row in rows for number in row[3:])


def test_bad_options_are_refused(capsys):
    bad = (["--contexts", "0"], ["--tokens", "-1"], ["--batches", "x"], ["--stream", "0"])
    for line in (*bad, ["--heads", "0"]):
        with pytest.raises(SystemExit) as error:
            main(line)
        assert error.value.code == 2
