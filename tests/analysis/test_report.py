"""Reports: files that agree with the model, pages without a network, and what is left out."""

from __future__ import annotations

import base64
import csv
import json
import math
import re

import numpy as np
import pytest
import torch
from inputs import TEXT
from safetensors.torch import load_file

from qflux import BpeVocabulary, ByteVocabulary, load_model, save_model
from qflux.analysis import static
from qflux.analysis.picture import shown_text
from qflux.analysis.record import record_layers
from qflux.report import files, page, study, write
from qflux.text.vocabulary import CharacterVocabulary

for _package in ("matplotlib", "plotly", "networkx"):
    pytest.importorskip(_package, reason='pip install "qflux[analysis]" for reports')

VOCABULARY = CharacterVocabulary(TEXT)
PICTURES = {
    "token-embedding", "token-states", "state-evolution", "attention", "thresholds", "degrees",
    "sparsity", "phases", "paths", "radii", "similarities", "attention-flow", "token-network",
    "boundaries", "logit-rank", "training",
}  # fmt: skip


def columns(path):
    rows = list(csv.reader(path.open(encoding="utf-8", newline="")))
    return {
        name: list(column)
        for name, column in zip(rows[0], zip(*rows[1:], strict=True), strict=True)
    }


@pytest.fixture(scope="module")
def again(folder, report):
    """The model of the report on its tokens, as anybody would run it."""
    model, vocabulary = load_model(folder / "run")
    ids = vocabulary.encode(TEXT)[2:50].long()[None]
    return ids, record_layers(model, ids), model(ids).logits[0].detach()


@pytest.fixture
def quick(monkeypatch):
    """Reports without figures in files, which take most of the time."""
    monkeypatch.setattr(static, "draw", lambda picture: picture)
    monkeypatch.setattr(static, "save", lambda figure, kind: (kind.encode(), True))


def page_data(path, element):
    text = path.read_text(encoding="utf-8")
    found = re.search(rf'<script type="application/json" id="{element}">(.*?)</script>', text)
    return json.loads(found[1])


def floats(array):
    return np.frombuffer(base64.b64decode(array["float32"]), "<f4").reshape(array["shape"])


def test_a_report_is_whole(report):
    path, notes = report
    root = path.parent
    figures = {file.name for file in (root / "figures").iterdir()}
    assert figures == {f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")}
    assert set(page_data(path, "figures")) == PICTURES
    assert path.stat().st_size < 10e6
    named = re.findall(r'href="((?:data|figures)/[^"]+)"', path.read_text(encoding="utf-8"))
    assert named and all((root / name).is_file() for name in named)
    assert {p.name for p in root.parent.iterdir()} == {"run", "text.txt", "out"}
    assert any("Of the 62 tokens of the text, 48 are studied" in note for note in notes)
    assert any("1 lines of metrics.jsonl" in note for note in notes)
    assert any("lacks characters of the text" in note for note in notes)
    summary = json.loads((root / "data" / "summary.json").read_text(encoding="utf-8"))
    assert summary["text"]["tokens"] == 48
    text = path.read_text(encoding="utf-8")
    assert all(page.html.escape(note) in text for note in notes)


def test_a_page_fetches_nothing(report):
    text = report[0].read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "connect-src" not in text
    body = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?!data[:/]|figures/|#)', body)
    assert "@import" not in body and "url(" not in body
    # Tokens that are markup are text.
    assert body.count("<b>") == 0


def test_the_data_are_the_models(report, again):
    data, (ids, layers, logits) = report[0].parent / "data", again
    tokens = columns(data / "tokens.csv")
    assert list(map(int, tokens["id"])) == ids[0].tolist()
    assert tokens["text"] == [shown_text(VOCABULARY.decode([i])) for i in ids[0].tolist()]
    loss = -logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(list(map(float, tokens["surprise_nats"][1:])), loss, rtol=1e-5)
    assert math.isnan(float(tokens["surprise_nats"][0]))
    rows = columns(data / "rows.csv")
    degree = torch.stack([layer.degree[0] for layer in layers])
    assert list(map(int, rows["degree"])) == degree.flatten().tolist()
    strength = torch.stack([layer.strength[0] for layer in layers]).flatten()
    np.testing.assert_allclose(list(map(float, rows["strength"])), strength, rtol=1e-4, atol=1e-5)
    states = load_file(data / "states.safetensors")
    assert torch.equal(states["layer1.keys"], layers[1].keys[0].double())
    weights = load_file(data / "weights.safetensors")["layer0"]
    kept = weights.isfinite()
    assert torch.equal(kept.sum(-1), layers[0].degree[0].long())
    metrics = columns(data / "metrics.csv")
    assert metrics["train_loss"] == ["4", "2", "1"] and metrics["density/1"] == ["0.5"] * 3


def test_the_page_has_the_numbers_of_the_files(report):
    path, data = report[0], report[0].parent / "data"
    explorer = page_data(path, "explorer-data")
    weights = load_file(data / "weights.safetensors")
    states = load_file(data / "states.safetensors")
    lower = np.tril_indices(48)
    assert explorer["first"] == 2 and len(explorer["labels"]) == 48
    for number, layer in enumerate(explorer["layers"]):
        wanted = weights[f"layer{number}"].numpy()[:, lower[0], lower[1]]
        np.testing.assert_array_equal(floats(layer["weight"]), wanted)
        for name in ("keys", "direction", "low", "high"):
            wanted = states[f"layer{number}.{name}"].float().numpy()
            np.testing.assert_array_equal(floats(layer[name]), wanted)
    figures = page_data(path, "figures")
    rows = columns(data / "rows.csv")
    at = [i for i, (a, b) in enumerate(zip(rows["layer"], rows["cylinder"], strict=True))
          if (a, b) == ("1", "0")]  # fmt: skip
    drawn = figures["degrees"][0]["data"][2]
    assert drawn["name"] == "layer 1" and drawn["y"] == [float(rows["degree"][i]) for i in at]
    values = [float(v) for v in columns(data / "singular-values.csv")["value"]]
    drawn = figures["logit-rank"][0]["data"][0]["y"]
    np.testing.assert_allclose(drawn[:5], np.array(values[:5]) / values[0], rtol=1e-6)


def make_study(model, text="To be, or not", vocabulary=VOCABULARY, **options):
    excerpt = study.take_excerpt(text, vocabulary, model.config.context_length)
    found = study.study(model, vocabulary, excerpt, **options)
    content = page.render(found, "title")
    return found, content.decode()


@pytest.mark.parametrize("preset", ["lm", "flux", "qfnn"])
@pytest.mark.parametrize("text", ["T", "To"], ids=["one token", "two tokens"])
def test_short_texts(make, preset, text):
    found, _ = make_study(make(preset), text)
    assert found.summary["text"]["tokens"] == len(text)
    assert (found.summary["text"]["nats_per_token"] is None) == (len(text) == 1)
    for picture in found.pictures:
        if picture.name in ("attention", "boundaries", "logit-rank"):
            static.draw(picture)


def test_a_model_without_layers(make):
    found, _ = make_study(make("flux", num_layers=0))
    assert {p.name for p in found.pictures} == {"token-embedding", "logit-rank"}
    assert any("no layers" in note for note in found.notes)
    assert "layers.csv" not in found.tables and not found.tensors
    assert any("no metrics.jsonl" in note for note in found.notes)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("preset", ["flux", "qfnn"])
def test_states_that_are_not_finite(make, preset, everything):
    model = make(preset)
    with torch.no_grad():
        table = model.embedding.table
        table[slice(None) if everything else VOCABULARY.encode("n")] = math.nan
    found, text = make_study(model)
    bad = 13 if everything else 3
    assert found.notes[0].startswith(f"Layer 0: {bad} of 13 tokens")
    assert any(note.startswith(f"The logits of {bad} of 13") for note in found.notes)
    assert "NaN" not in re.search('id="figures">(.*?)</script>', text)[1]
    for picture in found.pictures:
        if picture.name == "boundaries" or (everything and preset == "flux"):
            static.draw(picture)
    json.loads(files.json_bytes(found.summary))


def test_memory_is_told_of(make):
    found, _ = make_study(make("flux", memory=True))
    assert any("connection memory" in note for note in found.notes)


def test_long_texts_keep_the_page_small(make, monkeypatch):
    for shape in ((512, 4, 32), (100, 12, 12), (3, 1, 1), (512, 100, 100)):
        shown = study.shown_tokens(*shape)
        pairs = shown * (shown + 1) / 2 * shape[1] * shape[2]
        assert 1 <= shown <= shape[0]
        assert pairs <= study.PAIR_BUDGET or shown == 1
    monkeypatch.setattr(study, "PAIR_BUDGET", 600)
    found, _ = make_study(make(), TEXT[:48])
    shown = study.shown_tokens(48, 2, 3)
    assert shown == 13 and len(found.explorer["labels"]) == shown
    assert any(f"first {shown} tokens" in note for note in found.notes)


def test_bytes_and_pairs_have_labels(make):
    assert study.token_labels(ByteVocabulary(), [65, 0xC3, 10, 0]) == ["A", "[c3]", "↵", "\\u0000"]
    bpe = BpeVocabulary.train("low lower lowest " * 20, 270)
    ids = bpe.encode("lower low").tolist()
    assert "".join(study.token_labels(bpe, ids)).replace("␣", " ") == "lower low"


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ("To be%", {}, "replaced by ' '"),
        ("To be%", {"unknown": "drop"}, "dropped"),
        (TEXT * 3, {}, "Of the 186 tokens of the text, 48 are studied, from token 0 on"),
        (TEXT, {"more": True}, "tokens 0 to 47 are studied; the rest was not read"),
    ],
)
def test_what_is_done_to_a_text_is_told(text, options, told):
    assert any(told in note for note in study.take_excerpt(text, VOCABULARY, 48, **options).notes)


def test_a_long_file_is_not_read_whole(tmp_path):
    (tmp_path / "long.txt").write_text("To be. " * 400_000)
    text, more = write.read_start(tmp_path / "long.txt", 1000)
    assert more and 1000 < len(text) <= 2 * 2**20
    (tmp_path / "short.txt").write_text("To be")
    assert write.read_start(tmp_path / "short.txt", 1000) == ("To be", False)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"--model-path": "{root}"}, "config.json"),
        ({"--model-path": "{root}/nowhere"}, "nowhere"),
        ({"--input-file": "{root}/nowhere.txt"}, "nowhere.txt"),
        ({"--input-file": "{root}/empty.txt"}, "empty.txt' is empty"),
        ({"--input-file": "{root}/binary.txt"}, "not UTF-8"),
        ({"--input-file": "{root}/strange.txt", "--unknown": "refuse"}, "'%' at position 2"),
        ({"--input-file": "{root}/strange.txt", "--unknown": "drop"}, "length >= 1"),
        ({"--output-dir": "{root}"}, "not empty"),
        ({"--output-dir": "{root}/run", "--overwrite": ""}, "model's own folder"),
        ({"--output-dir": "{root}/text.txt"}, "is a file"),
        ({"--output-dir": ""}, "output_dir"),
        ({"--layer": "2"}, "layer must be below the model's 2"),
        ({"--cylinder": "3"}, "cylinder must be below the model's 3"),
        ({"--first-token": "62"}, "first_token must be below the 62 tokens"),
        ({"--max-tokens": "0"}, "max_tokens"),
        ({"--device": "abacus"}, "abacus"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, tmp_path, call, arguments, named):
    root = tmp_path
    (root / "run").symlink_to(folder / "run")
    for name, content in (("text", TEXT), ("empty", ""), ("strange", "%%%%"), ("binary", "")):
        (root / f"{name}.txt").write_text(content, encoding="utf-8")
    (root / "strange.txt").write_text("To%" if "refuse" in arguments.values() else "%%%")
    (root / "binary.txt").write_bytes(b"\xff\xfe\xfa" * 9)
    before = sorted(root.rglob("*"))
    given = {
        "--model-path": "{root}/run", "--input-file": "{root}/text.txt",
        "--output-dir": "{root}/new", **arguments,
    }  # fmt: skip
    line = [part.format(root=root) for item in given.items() for part in item]
    line = [part for part in line if part or "--overwrite" not in line]
    status, out, err = call("analyze", *line)
    assert (status, out) == (2, "") and named in err
    assert err.startswith("qflux analyze: ") and err.count("\n") == 1
    assert sorted(root.rglob("*")) == before


def test_a_failure_on_the_way_leaves_nothing(folder, tmp_path, quick, monkeypatch):
    options = write.AnalysisOptions(
        str(folder / "run"), str(folder / "text.txt"), str(tmp_path / "out")
    )
    monkeypatch.setattr(write, "render", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write.analyze_file(options)
    assert list(tmp_path.iterdir()) == []

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(files.Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device.*data/a\.csv"):
        files.write_folder(tmp_path / "out", {"data/a.csv": b""})
    assert list(tmp_path.iterdir()) == []


def test_a_report_replaces_what_has_its_names(folder, tmp_path, quick, call):
    (tmp_path / "out").mkdir()
    line = ["analyze", "--model-dir", folder / "run", "--input_file", folder / "text.txt",
            "--output_dir", tmp_path / "out", "--layer", "0", "--cylinder", "2"]  # fmt: skip
    status, out, err = call(*line)
    assert status == 0 and out == f"report in {tmp_path / 'out' / 'report.html'}\n"
    assert "note: Of the 62 tokens" in err
    (tmp_path / "out" / "mine.txt").write_text("keep")
    (tmp_path / "out" / "report.html").write_text("old")
    assert call(*line)[0] == 2 and (tmp_path / "out" / "report.html").read_text() == "old"
    assert call(*line, "--overwrite")[0] == 0
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    assert "layer 0, cylinder 2" in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_generate_writes_a_report_too(folder, tmp_path, quick, call):
    line = ["generate", "--model_path", folder / "run", "--prompt", "To be", "--max_length", "9",
            "--analyze", "--output_dir", tmp_path / "out"]  # fmt: skip
    status, out, err = call(*line)
    assert status == 0, err
    tokens = columns(tmp_path / "out" / "data" / "tokens.csv")
    made = "".join(VOCABULARY.decode([int(i)]) for i in tokens["id"])
    assert len(made) == 14 and out == made + "\n" and made.startswith("To be")
    assert err.endswith(f"report in {tmp_path / 'out' / 'report.html'}\n")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--analyze"], "output_dir"),
        (["--output-dir", "x"], "analyze"),
        (["--analyze", "--output-dir", "x", "--num-samples", "2"], "num_samples"),
        (["--analyze", "--output-dir", "x", "--interactive"], "interactive"),
    ],
)
def test_options_of_generate_that_do_not_fit(folder, call, more, named):
    status, out, err = call("generate", "--model-path", folder / "run", *more)
    assert (status, out) == (2, "") and named in err and err.count("\n") == 1


@pytest.mark.parametrize("package", ["matplotlib", "plotly", "networkx"])
def test_a_missing_package_is_told_before_the_work(folder, tmp_path, call, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    base = ["--model-path", folder / "run", "--output-dir", tmp_path / "out"]
    for line in (["analyze", "--input-file", folder / "text.txt"], ["generate", "--analyze"]):
        status, out, err = call(*line, *base)
        assert (status, out) == (2, "") and 'pip install "qflux[analysis]"' in err


def test_csv_and_json_keep_every_digit_that_counts():
    table = {"text": np.array(['a,"b"', "line\n"]), "value": np.array([1 / 3, math.nan])}
    assert files.csv_bytes(table) == b'text,value\n"a,""b""",0.333333333\n"line\n",nan\n'
    assert json.loads(files.json_bytes({"a": (math.inf, np.float64(0.5), {"b": math.nan})})) == {
        "a": [None, 0.5, {"b": None}]
    }


def test_data_in_a_page_cannot_end_it():
    text = page._json({"a": "</script><!-- \u2028"})
    assert "<" not in text and "\u2028" not in text
    assert json.loads(text) == {"a": "</script><!-- \u2028"}
    assert page.encode_arrays({"a": np.array([[1.5, math.nan]])})["a"]["shape"] == [1, 2]


def test_a_backend_or_vocabulary_that_is_not_there_is_one_line(make, tmp_path, call):
    save_model(tmp_path / "run", make(), CharacterVocabulary(TEXT))
    (tmp_path / "run" / "vocabulary.json").write_text('{"kind": "char", "characters": "ab"}')
    (tmp_path / "text.txt").write_text("ab")
    status, _, err = call("analyze", "--model-path", tmp_path / "run", "--input-file",
                          tmp_path / "text.txt", "--output-dir", tmp_path / "out")  # fmt: skip
    assert status == 2 and "vocabulary.json" in err and err.count("\n") == 1
