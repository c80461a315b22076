"""Weights of the linear layers in int8, by torchao."""

import copy
import io

import pytest
import torch
from torch import nn

from qflux import make_config, make_model

quantization = pytest.importorskip("torchao.quantization", reason="it stores weights as int8")
VOCABULARY = 64
MODELS = {
    "lm": {"num_cylinders": 4},
    "flux": {"context_length": 64},
    "qfnn": {},
}


def build(name):
    torch.manual_seed(0)
    options = {"num_layers": 2, "hidden_dim": 32, **MODELS[name]}
    return make_model(make_config(name, VOCABULARY, **options)).eval()


def int8(model):
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert linear and all(type(module.weight.data) is not torch.Tensor for module in linear)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_models_have_int8_weights(name):
    """Logits are those of the weights as they are rounded, with a cache, and from a file."""
    model, ids = build(name), torch.randint(VOCABULARY, (2, 40))
    small, rounded = int8(copy.deepcopy(model)), copy.deepcopy(model)
    for module, of_int8 in zip(rounded.modules(), small.modules(), strict=True):
        if isinstance(module, nn.Linear):
            weight = of_int8.weight.dequantize()
            step = module.weight.abs().amax(1, keepdim=True) / 127
            assert ((weight - module.weight).abs() <= 0.51 * step).all()
            module.weight.copy_(weight)
    found = small(ids, labels=ids)
    torch.testing.assert_close(found.logits, rounded(ids).logits, rtol=1e-4, atol=1e-5)
    # A thousandth of the loss; 1e-4 of it was seen.
    torch.testing.assert_close(found.loss, model(ids, labels=ids).loss, rtol=1e-3, atol=0)

    cache = small.new_cache(2)
    pieces = [small(piece, cache=cache).logits for piece in ids.split((7, 1, 1, 31), 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), found.logits, rtol=1e-4, atol=1e-5)
    out = small.generate(ids[:, :5], 6, temperature=0)
    assert torch.equal(out[:, 5:], small(out[:, :-1]).logits[:, 4:].argmax(-1))

    file, again = io.BytesIO(), build(name)
    torch.save(small.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(again(ids).logits, found.logits)


@torch.no_grad()
def test_an_exported_model_generates_with_int8_weights():
    pytest.importorskip("transformers", reason="qflux.hf is for it")
    from qflux.hf import from_model

    model = build("lm")
    loaded = from_model(int8(model)).eval()
    ids = torch.randint(VOCABULARY, (2, 7))
    out = loaded.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    assert torch.equal(out, model.generate(ids, out.shape[1] - 7, temperature=0))
