"""Programs without Python: torch.export and AOTInductor, of the forward and of decoding."""

import io

import pytest
import torch
from torch.export import Dim

from qflux import make_config, make_model
from qflux.models.step import DecodeStep

SMALL = {"num_layers": 1, "hidden_dim": 16}
MODELS = {
    "lm": ("lm", {**SMALL, "num_cylinders": 3}),
    "evolution": ("lm", {**SMALL, "num_cylinders": 3, "evolution": True}),
    "flux": ("flux", {**SMALL, "num_layers": 2, "num_cylinders": 2, "context_length": 64}),
    "qfnn": ("qfnn", {**SMALL, "radius_bounds": "context"}),
}
VOCABULARY = 11
IDS = torch.arange(3 * 20).view(3, 20) ** 2 % VOCABULARY


def build(name, **changes):
    preset, options = MODELS[name]
    torch.manual_seed(0)
    return make_model(make_config(preset, VOCABULARY, **options, **changes)).eval()


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def exported_step(step):
    """A program for one token of any number of sequences behind any past."""
    batch, length = Dim("batch"), Dim("past")
    _, *past = step(IDS[:, :7])
    sizes = tuple({0: batch, 2: length} if tensor.dim() == 4 else {0: batch} for tensor in past)
    return torch.export.export(
        step,
        (IDS[:, 7:8].contiguous(), *past),
        dynamic_shapes={"input_ids": {0: batch}, "past": sizes},
    )


def assert_decodes(step, run, wanted):
    """`run` goes on, token by token, from what a prompt of two sequences leaves."""
    _, *past = step(IDS[:2, :3])
    for n in range(3, 14):
        logits, *past = run(IDS[:2, n : n + 1].contiguous(), *past)
        close(logits, wanted[:2, n : n + 1])


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_a_function_of_tensors(name):
    model = build(name)
    step, wanted = DecodeStep(model), model(IDS).logits.detach()
    logits, *past = step(IDS[:, :5])
    kept = [tensor.clone() for tensor in past]
    close(logits, wanted[:, :5])
    for _ in range(2):  # what it is given stays as it was
        further, *longer = step(IDS[:, 5:11], *past)
        close(further, wanted[:, 5:11])
        assert len(longer) == len(past) and all(t.is_contiguous() for t in longer)
        assert all(map(torch.equal, past, kept))


@pytest.mark.parametrize("name", ["lm", "flux"])
def test_a_step_is_exported_and_saved(name):
    model, file = build(name), io.BytesIO()
    step, wanted = DecodeStep(model), model(IDS).logits.detach()
    torch.export.save(exported_step(step), file)
    file.seek(0)
    assert_decodes(step, torch.export.load(file).module(), wanted)


def test_a_step_is_compiled_ahead_of_time(tmp_path):
    model = build("lm")
    step, wanted = DecodeStep(model), model(IDS).logits.detach()
    path = torch._inductor.aoti_compile_and_package(
        exported_step(step),
        package_path=str(tmp_path / "step.pt2"),
        inductor_configs={  # a compiler's time is all there is to it
            "aot_inductor.compile_wrapper_opt_level": "O0",
            "aot_inductor.precompile_headers": False,
            "cpp_cache_precompile_headers": False,
        },
    )
    assert_decodes(step, torch._inductor.aoti_load_package(path), wanted)


def test_what_has_no_step_is_refused():
    for model, message in (
        (build("flux", statistics="row"), "must have a cache"),
        (build("flux", memory=True), "must have no connection memory"),
        (make_model(make_config("lm", VOCABULARY, num_layers=0)), "and layers"),
    ):
        with pytest.raises(ValueError, match=message):
            DecodeStep(model)
