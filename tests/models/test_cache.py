"""Decoding with a cache gives the logits of the full forward."""

import warnings

import pytest
import torch

from qflux import PublishedConfig, QuantumFluxConfig, generate, make_model

LENGTH, VOCABULARY = 60, 11
LM = {"vocab_size": VOCABULARY, "num_layers": 2, "hidden_dim": 16, "context_length": 64}
LM |= {"num_cylinders": 3}
PUBLISHED = LM | {"num_cylinders": 2, "hidden_dim": 32}  # wide enough for a collapsed head
# It decides as much as the score does.
MEMORY = {"memory": True, "memory_strength": 2.0, "memory_weight": 2.0, "dt_scale": 0.1}
CONFIGS = {
    "lm": QuantumFluxConfig(**LM),
    "lm, evolution": QuantumFluxConfig(**LM, evolution=True),
    "lm, gate, no convolution": QuantumFluxConfig(**LM, score="inverse_gate", conv_width=0),
    "lm, states alone": QuantumFluxConfig(**LM, value_dim=0),
    "lm, hard, no mlp, width 1": QuantumFluxConfig(
        **LM, score="threshold", shrinkage="hard", mlp_ratio=0, conv_width=1
    ),
    "lm, no layers": QuantumFluxConfig(**LM | {"num_layers": 0}),
    "published": PublishedConfig(**PUBLISHED, statistics="prefix"),
    "published, bounds by context": PublishedConfig(
        **PUBLISHED, statistics="prefix", position="phase", radius_bounds="context"
    ),
    "published, learned bounds, mean": PublishedConfig(
        **PUBLISHED, statistics="prefix", radius_bounds="learned", reduction="mean"
    ),
    "published, gate, beta": PublishedConfig(
        **PUBLISHED, score="inverse_gate", timestep="beta", readout="layers"
    ),
    "published, memory": PublishedConfig(**PUBLISHED, **MEMORY),
    "published, memory, mean, bounds by context": PublishedConfig(
        **PUBLISHED, **MEMORY, reduction="mean", radius_bounds="context", score="inverse_gate"
    ),
}


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(", ", "_").replace(" ", "-"))
def model(request):
    model = make_model(CONFIGS[request.param]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def draw(low, high):
    return int(torch.randint(low, high, ()))


def test_pieces_truncations_and_beams_give_the_full_logits(model):
    ids = torch.randint(0, VOCABULARY, (3, LENGTH))
    full = model(ids).logits.detach()
    cache = model.new_cache(3)
    for trial in range(30):
        start = len(cache)
        if trial % 4 == 3:
            cache.truncate(draw(0, start + 1))
            continue
        if trial % 5 == 4:
            index = torch.randint(0, len(ids), (draw(1, 5),))
            cache.reorder(index)
            ids, full = ids[index], full[index]
        end = min(LENGTH, start + draw(1, 12))
        if start == end:
            continue
        logits = model(ids[:, start:end], cache=cache).logits
        close(logits, full[:, start:end])
        assert len(cache) == end and not logits.requires_grad


def test_prompts_of_different_lengths_make_a_batch(model):
    prompts = [torch.randint(0, VOCABULARY, (n,)) for n in (17, 20, 13, 20)]
    padding = torch.tensor([20 - len(prompt) for prompt in prompts])
    ids = torch.stack([torch.nn.functional.pad(p, (20 - len(p), 0)) for p in prompts])
    cache = model.new_cache(4, padding=padding)
    pieces = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 5), (5, 12), (12, 20))]
    cache.truncate(9)
    index = torch.tensor([2, 0, 3, 1])
    cache.reorder(index)
    again = model(ids[index, 9:], cache=cache).logits
    whole = torch.cat(pieces, 1)
    for row, prompt in enumerate(prompts):
        close(whole[row, -len(prompt) :], model(prompt[None]).logits[0])
        at = int((index == row).nonzero())
        own = slice(max(9, int(padding[row])), None)
        close(again[at, own.start - 9 :], whole[row, own])
    out = model.generate(ids, 8, temperature=0, padding=padding)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], 8, temperature=0)
        assert torch.equal(out[row, 20:], alone[0, len(prompt) :])


def test_a_prompt_is_read_in_pieces_of_bounded_size(model):
    ids = torch.randint(0, VOCABULARY, (2, 30))
    longest, read = 0, model.read

    def watched(input_ids, *args, **kwargs):
        nonlocal longest
        longest = max(longest, input_ids.shape[1])
        return read(input_ids, *args, **kwargs)

    model.read = watched
    cache = model.new_cache(2)
    logits = model.prefill(ids, cache, chunk=7)
    assert longest == 7 and len(cache) == 30
    close(logits, model(ids).logits[:, -1].detach())


def test_generation_reads_each_token_once_and_goes_beyond_the_context(model):
    ids = torch.randint(0, VOCABULARY, (1, 5))
    tokens, read = 0, model.read

    def counted(input_ids, *args, **kwargs):
        nonlocal tokens
        tokens += input_ids.shape[1]
        return read(input_ids, *args, **kwargs)

    model.read = counted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, ids, 60, temperature=0)
    assert tokens == 64
    with pytest.warns(UserWarning, match="grows to 74 tokens, beyond the model's context of 64"):
        out = generate(model, ids, 70, temperature=0)
    assert tokens == 64 + 74
    logits = model(out[:, :-1]).logits
    assert torch.equal(out[0, 5:], logits[0, 4:].argmax(-1))


def test_what_fails_leaves_the_cache_as_it_was(model):
    ids = torch.randint(0, VOCABULARY, (2, 20))
    cache = model.new_cache(2)
    model(ids[:, :9], cache=cache)
    before = cache.nbytes
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 10\]"):
        model(ids[:, 9:] + VOCABULARY, cache=cache)
    with pytest.raises(ValueError, match="input_ids must be 2 sequences"):
        model(ids[:1, 9:], cache=cache)
    for options in ({"labels": ids[:, 9:]}, {"return_layers": True}):
        with pytest.raises(ValueError, match="cannot be given with a cache"):
            model(ids[:, 9:], cache=cache, **options)
    for length in (-1, 10, 2.0, True):
        with pytest.raises((TypeError, ValueError), match="length must be an integer"):
            cache.truncate(length)
    for index in ([0, 2], [-1, 0], [[0, 1]], [0.0, 1.0]):
        with pytest.raises((TypeError, ValueError), match="index must"):
            cache.reorder(torch.tensor(index))
    if len(model.layers):
        layer = model.layers[-1]
        layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            model(ids[:, 9:], cache=cache)
        with pytest.raises(RuntimeError, match="stop"):
            model.prefill(ids[:, 9:], cache, chunk=4)
        layer._forward_hooks.clear()
        assert cache.nbytes >= before
    assert len(cache) == 9
    close(model(ids[:, 9:], cache=cache).logits, model(ids).logits[:, 9:].detach())


def test_bad_padding_is_refused():
    model = make_model(CONFIGS["lm"])
    for padding in ([1], [[0, 0]], [-1, 0], [0.0, 1.0]):
        with pytest.raises((TypeError, ValueError), match="padding must"):
            model.new_cache(2, padding=torch.tensor(padding))
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="padding must be less than the 3 tokens"):
        model.generate(ids, 2, padding=torch.tensor([0, 3]))


@pytest.mark.parametrize("extra", [{}, {"memory": True}])
def test_what_the_future_moves_has_no_cache_and_is_read_again(extra):
    model = make_model(PublishedConfig(**PUBLISHED, statistics="row", **extra)).eval()
    with pytest.raises(ValueError, match="stats='row'"):
        model.new_cache(1)
    ids = torch.randint(0, VOCABULARY, (1, 5))
    out = model.generate(ids, 4, temperature=0)
    for step in range(4):
        assert out[0, 5 + step] == model(out[:, : 5 + step]).logits[0, -1].argmax()
    with pytest.raises(ValueError, match="padding must be None for a model without a cache"):
        model.generate(ids, 4, padding=torch.tensor([1]))


def test_half_precision_and_int32_ids():
    model = make_model(CONFIGS["lm"]).bfloat16().eval()
    ids = torch.randint(0, VOCABULARY, (2, 9), dtype=torch.int32)
    cache = model.new_cache(2)
    found = torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(9)], 1)
    torch.testing.assert_close(found, model(ids).logits, rtol=0.1, atol=0.1)
    assert found.dtype == torch.bfloat16
