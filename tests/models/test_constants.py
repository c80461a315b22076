"""Constants are what the configuration says, whatever a model is built, cast or loaded under."""

import copy

import pytest
import torch
from torch import nn

from qflux import QuantumFluxConfig, QuantumFluxLM, make_config, make_model
from qflux.models.constants import WithConstants
from qflux.models.embedding import position_angles

LM = {"num_layers": 2, "num_cylinders": 32, "hidden_dim": 12, "value_dim": 2}
PUBLISHED = {"num_layers": 2, "hidden_dim": 12, "num_cylinders": 3, "context_length": 2048}
MODELS = {
    "thresholds": ("lm", {**LM, "score": "threshold", "evolution": True}),
    "scales": ("lm", LM),
    "flux": ("flux", PUBLISHED),
    "qfnn": ("qfnn", {**PUBLISHED, "position": "phase"}),
}
IDS = torch.arange(2 * 9).view(2, 9) % 11


def build(name, dtype=torch.float32, device="cpu"):
    """A model that is built as `from_pretrained(dtype=...)` does."""
    preset, changes = MODELS[name]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make_model(make_config(preset, 11, **changes)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def constants(model):
    return {
        f"{place}.{name}": getattr(module, name)
        for place, module in model.named_modules()
        if isinstance(module, WithConstants)
        for name in module.constants()
    }


def assert_right(model, dtype=torch.float32):
    for place, module in model.named_modules():
        if isinstance(module, WithConstants):
            for name, value in module.constants().items():
                buffer = getattr(module, name)
                assert buffer.dtype == dtype, (place, name, buffer.dtype)
                assert torch.equal(buffer, value.to(dtype)), (place, name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_at_construction_changes_none(name, dtype):
    model, usual = build(name, dtype), build(name)
    assert_right(usual)
    assert_right(model, torch.promote_types(dtype, torch.float32))
    # Parameters that start at numbers of the configuration start at them, rounded once.
    for key in ("log_scale", "log_frequency", "log_dt", "embedding.table"):
        for place, value in model.state_dict().items():
            if place.endswith(key):
                assert value.dtype == dtype
                wanted = usual.state_dict()[place]
                torch.testing.assert_close(
                    value.float(), wanted, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-6
                )


@pytest.mark.parametrize("name", MODELS)
def test_casts_take_no_digits_from_them(name):
    model = build(name)
    assert_right(model.bfloat16())
    assert_right(model.half())
    assert_right(model.double(), torch.float64)
    assert model(IDS).logits.dtype == torch.float64


def through_empty(make):
    return make("meta").to_empty(device="cpu")


def through_meta(make):
    return make("cpu").to("meta").to_empty(device="cpu")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("route", [through_empty, through_meta])
def test_emptied_memory_is_filled_again(name, route, poisoned_memory):
    usual = build(name)
    model = route(lambda device: build(name, device=device))
    model.load_state_dict(usual.state_dict())
    assert_right(model)
    assert torch.equal(model(IDS).logits, usual(IDS).logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("inside", [False, True])
def test_assigned_states_bring_them_along(name, inside):
    """Also where the model is a part of another."""
    usual = build(name)
    model = build(name, device="meta")
    if inside:
        nn.Sequential(model).load_state_dict(nn.Sequential(usual).state_dict(), assign=True)
    else:
        model.load_state_dict(usual.state_dict(), assign=True)
    assert_right(model)
    assert torch.equal(model(IDS).logits, usual(IDS).logits)


def test_they_are_in_no_file():
    for name in MODELS:
        assert not set(constants(build(name))) & set(build(name).state_dict())


def test_angles_of_far_positions_keep_their_digits_in_half_precision():
    """In bfloat16 itself position 2,047 would be radians off."""
    for name in ("flux", "qfnn"):
        model = build(name)
        usual, half = model.frequency, copy.deepcopy(model).bfloat16().frequency
        assert torch.equal(position_angles(usual, 2048), position_angles(half, 2048))
    lm = QuantumFluxLM(QuantumFluxConfig(vocab_size=11, **LM)).bfloat16()
    exact = lm.rotation.log_frequency.double().exp()[:, None] * torch.arange(2048)
    torch.testing.assert_close(lm.rotation(2048).double(), exact, rtol=1e-6, atol=1e-6)
    assert lm(IDS).logits.dtype == torch.bfloat16
