"""docs/first-hour.md, command after command, with a small text and a small network."""

import json
import re
import shlex
import signal
from pathlib import Path

import pytest

from qflux import load_model
from qflux.cli import main
from qflux.text.windows import TrainingWindows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "first-hour.md"
TEXT = "It was the best of times, it was the worst of times.\n"
SMALL = ["--num-layers", "1", "--hidden-dim", "8", "--num-cylinders", "2", "--context-length", "16"]
STEPS = 8
STOPPED_AT = 5


def commands():
    """The commands of the page, with the number of steps that a test has time for."""
    lines = re.findall(r"^    qflux (.+)$", PAGE.read_text(), re.MULTILINE)
    return [shlex.split(re.sub(r"--max-steps \d+", f"--max-steps {STEPS}", line)) for line in lines]


@pytest.fixture
def call(capsys):
    """Run the program in this process: status, standard output, standard error."""

    def inner(*arguments):
        status = main(list(arguments))
        return status, *capsys.readouterr()

    return inner


def test_the_commands_of_the_page_work_one_after_another(tmp_path, call, monkeypatch):
    pytest.importorskip("transformers", reason="loads the exported model")
    monkeypatch.chdir(tmp_path)
    Path("my-text.txt").write_text(TEXT * 20)
    Path("other-text.txt").write_text("Ça n'était pas le meilleur des temps.\n" * 20)
    begin, resume, evaluate, again, generate, export = commands()
    original = TrainingWindows.batch

    def batch(self, step):
        if step == STOPPED_AT - 1:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingWindows, "batch", batch)
        status, _, err = call(*begin, *SMALL)
    assert status == 130
    assert err.splitlines()[-1].endswith(f"go on with: qflux {shlex.join(resume)}")
    assert f"saved at step {STOPPED_AT}" in err

    status, out, err = call(*resume)
    assert status == 0, err
    assert f"{STEPS} steps" in out and "bigram" in out and "next: qflux generate" in out
    whole = ["runs/whole" if part == "runs/first" else part for part in begin]
    assert call(*whole, *SMALL)[0] == 0
    for name in ("model.safetensors", "config.json", "vocabulary.json"):
        assert Path("runs/first", name).read_bytes() == Path("runs/whole", name).read_bytes()

    status, out, err = call(*evaluate)
    assert status == 0 and "bits per byte" in out, err

    before = {path: path.read_bytes() for path in Path("runs/first").iterdir()}
    status, out, err = call(*again)
    assert status == 0 and "starts from runs/first" in err, err
    assert {path: path.read_bytes() for path in Path("runs/first").iterdir()} == before
    assert json.loads(Path("runs/second/config.json").read_text())["hidden_dim"] == 8

    status, out, err = call(*generate)
    assert status == 0 and out.startswith("It was") and "tokens/s" in err, err

    status, out, err = call(*export)
    assert status == 0, err
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    exec(program, names)
    assert names["text"].startswith("It was")
    weights = load_model("runs/second")[0].state_dict()
    for name, value in names["model"].model.state_dict().items():
        assert value.equal(weights[name]), name
