"""Steps as CUDA graphs, with a stand-in for what records them."""

import copy

import pytest
import torch
from torch import Tensor

from qflux import QuantumFluxConfig, TextSplit, TrainingOptions, train
from qflux.models.presets import make_model
from qflux.text.vocabulary import CharacterVocabulary
from qflux.train import loop as loop_module
from qflux.train import step as step_module
from qflux.train.graph import WARMUP_STEPS
from qflux.train.step import TrainStep

CPU = torch.device("cpu")
TEXT = TextSplit({"a": "abcdefgh " * 60}, {"b": "abcdefgh " * 7})
VOCABULARY = CharacterVocabulary(TEXT.text)
# A cylinder that hardly turns has no gradient for a bias of its keys, and AdamW makes steps of what
# rounding leaves.
CONFIG = QuantumFluxConfig(
    VOCABULARY.size,
    num_layers=1,
    num_cylinders=2,
    hidden_dim=8,
    context_length=8,
    frequency_min=0.1,
)


class Recorder:
    """Records as a GPU does: nothing runs before a replay, and memory stays the same."""

    def __init__(self, device: torch.device) -> None:
        self.ran = self.replayed = 0

    def run(self, step):
        self.ran += 1
        return step()

    def record(self, step):
        results = (torch.zeros(()), torch.zeros(()))

        def replay() -> None:
            self.replayed += 1
            for to, result in zip(results, step(), strict=True):
                to.copy_(result)

        return replay, results


@pytest.fixture
def recorders(monkeypatch) -> list[Recorder]:
    made: list[Recorder] = []

    def make(device: torch.device) -> Recorder:
        made.append(Recorder(device))
        return made[-1]

    monkeypatch.setattr(step_module, "CudaRecorder", make)
    monkeypatch.setattr(loop_module, "check_recordable", lambda device: None)
    return made


def make_step(seed: int = 0, **options) -> TrainStep:
    torch.manual_seed(seed)
    return TrainStep(make_model(CONFIG), TrainingOptions("runs/x", **options), CPU)


def batches(count: int, length: int = 8) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY.size, (2, length), generator=draw) for _ in range(count)]


def assert_same(found, wanted) -> None:
    """Rates are float32 where graphs read them."""
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def losses(step: TrainStep, given: list[Tensor], **options) -> list[tuple[float, float, float]]:
    found = []
    for at, batch in enumerate(given):
        result = step(batch, at / len(given), **options)
        found.append((result.loss, result.norm, result.rate))
    # Read at the end: a result must not be what a later replay writes.
    return [(loss.item(), norm.item(), rate) for loss, norm, rate in found]


def test_replays_are_the_steps_themselves(recorders):
    """Other batches, rates that change, and two lengths, each recorded once."""
    given = batches(6) + batches(5, 5) + batches(2)
    graphed, plain = make_step(cuda_graph=True), make_step()
    assert_same(losses(graphed, given), losses(plain, given))
    (recorder,) = recorders
    assert recorder.ran == 2 * WARMUP_STEPS
    assert recorder.replayed == len(given) - recorder.ran
    for one, other in zip(graphed.moved, plain.moved, strict=True):
        torch.testing.assert_close(one, other)


def test_measured_steps_and_growing_radii_run_as_they_are(recorders):
    graphed = make_step(cuda_graph=True, radius_warmup=0.5)
    for progress in (0.0, 0.49):
        graphed(batches(1)[0], progress)
    assert graphed(batches(1)[0], 0.9, return_layers=True).layers
    assert recorders[0].ran == recorders[0].replayed == 0
    graphed(batches(1)[0], 0.5)
    assert recorders[0].ran == 1


@pytest.mark.parametrize("before, after", [(True, False), (False, True)])
def test_a_state_goes_on_in_a_run_of_the_other_kind(recorders, before, after):
    given = batches(WARMUP_STEPS + 3)
    first, second = make_step(cuda_graph=before), make_step(1, cuda_graph=after)
    losses(first, given)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same(losses(second, given), losses(first, given))


def test_a_whole_run_is_the_same(recorders, tmp_path):
    def run(name: str, **options):
        given = {"max_steps": 12, "batch_size": 2, "eval_interval": 6, "progress": False}
        options = TrainingOptions(tmp_path / name, **given, **options)
        return train(CONFIG, TEXT, VOCABULARY, options)

    graphed, plain = run("graph", cuda_graph=True), run("plain")
    assert graphed.validation_loss == pytest.approx(plain.validation_loss, rel=1e-6)
    assert recorders[0].replayed > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning": "hebbian"}, "cuda_graph needs learning='backprop', got 'hebbian'"),
        ({"precision": "float16"}, "cuda_graph needs precision='float32' or 'bfloat16'"),
        ({"max_seconds": 3.0}, "max_seconds=3.0"),
    ],
)
def test_what_does_not_go_with_it_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions("runs/x", cuda_graph=True, **options)


def test_a_cpu_is_refused_before_anything_is_written(tmp_path):
    options = TrainingOptions(tmp_path / "run", cuda_graph=True, max_steps=1)
    with pytest.raises(ValueError, match="cuda_graph needs a GPU, got device cpu"):
        train(CONFIG, TEXT, VOCABULARY, options)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_run_on_cuda_is_the_same(tmp_path):
    losses = []
    for graph in (True, False):
        options = TrainingOptions(
            tmp_path / str(graph), max_steps=12, batch_size=2, eval_interval=6, progress=False,
            device="cuda", cuda_graph=graph,
        )  # fmt: skip
        losses.append(train(CONFIG, TEXT, VOCABULARY, options).validation_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
