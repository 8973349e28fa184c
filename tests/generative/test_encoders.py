"""The encoders, transformer and recurrent, and the encoder-decoder: masks by perturbation, the cache, learning."""

from __future__ import annotations

import pytest
import torch

from oneira.generative.bidirectional import Bidirectional, BidirectionalConfig
from oneira.generative.datasets import Arrays, batches, learn_tokens, text_space, token_rows
from oneira.generative.encoder import Encoder, EncoderConfig
from oneira.generative.spaces import PAD
from oneira.generative.training import TrainSettings, fit
from oneira.generative.translator import Translator, TranslatorConfig
from oneira.platform.errors import ConfigError, UsageError

WORDS = ("red", "green", "blue", "dog", "cat", "owl", "bee")
PAIRS = [(f"{a} {b}", f"{b} {a}") for a in WORDS for b in WORDS if a != b]


@pytest.fixture(scope="module")
def pairs():
    tokenizer = learn_tokens([" ".join(WORDS)] * 3 + [text for pair in PAIRS for text in pair], 300)
    rows = {key: token_rows(tokenizer, [pair[i] for pair in PAIRS] * 4, 8) for i, key in enumerate(("source", "x"))}
    return Arrays.divide(text_space(tokenizer, 8), rows)


def tokens(pairs, *texts):
    return torch.from_numpy(token_rows(pairs.space.reader(), list(texts), 8))


def test_the_encoder_sees_both_ways_but_no_padding(pairs):
    torch.manual_seed(0)
    model = Encoder(EncoderConfig(width=16, layers=2, heads=2), pairs.space).eval()
    a, b = tokens(pairs, "red dog"), tokens(pairs, "red cat")
    assert not torch.allclose(model.states(a)[0, 1], model.states(b)[0, 1], atol=1e-4), "the first word sees the second"
    short = a[:, : int((a != PAD).sum())]
    assert torch.allclose(model.states(a)[:, : short.shape[1]], model.states(short), atol=1e-5)
    assert torch.allclose(model.encode(a), model.encode(short), atol=1e-5)
    maps = model.attention_maps(a)
    assert maps.shape == (2, 1, 2, 8, 8) and maps[..., short.shape[1] :].abs().max() == 0
    assert torch.allclose(maps.sum(-1), torch.ones(2, 1, 2, 8), atol=1e-5)
    with pytest.raises(UsageError, match="9 tokens"):
        model.states(torch.ones(1, 9, dtype=torch.long))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_recurrent_encoder_reads_both_ways_but_no_padding(cell, pairs):
    torch.manual_seed(0)
    model = Bidirectional(BidirectionalConfig(cell=cell, width=16, layers=2), pairs.space).eval()
    a, b, c = tokens(pairs, "red dog", "red cat", "owl dog").split(1)
    length = int((a != PAD).sum())
    assert not torch.allclose(model.states(a)[0, 1], model.states(b)[0, 1], atol=1e-4), "the first word sees the second"
    assert not torch.allclose(model.states(a)[0, length - 1], model.states(c)[0, length - 1], atol=1e-4), (
        "and the last the first"
    )
    assert torch.allclose(model.states(a)[:, :length], model.states(a[:, :length]), atol=1e-6)
    assert torch.allclose(model.encode(torch.cat([a, b]))[:1], model.encode(a[:, :length]), atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda space: Encoder(EncoderConfig(width=32, layers=2, heads=2), space),
        lambda space: Bidirectional(BidirectionalConfig(width=64, layers=1), space),
    ],
)
def test_the_encoders_learn_to_fill_in(make, pairs):
    torch.manual_seed(0)
    model = make(pairs.space)
    fit(model, batches(pairs, 64, 0), TrainSettings(steps=200, batch_size=64, lr=5e-3, warmup=20, precision="fp32"))
    x = tokens(pairs, "red dog", "green owl")
    known = torch.ones_like(x, dtype=torch.bool)
    known[:, 1] = False
    said = model.texts({"x": x})
    assert len(said) == len(x) and all("_" in text and " -> " in text for text in said)
    filled = model.complete(x, known, 0)
    assert torch.equal(filled[known], x[known])
    words = {
        pairs.space.reader().decode(row.tolist()).split()[0]
        for row in model.complete(x.repeat(20, 1), known.repeat(20, 1), 0)
    }
    assert len(words & set(WORDS)) >= 3 and len(words - set(WORDS)) <= 1, words


def test_the_decoder_sees_the_source_and_not_the_future(pairs):
    torch.manual_seed(0)
    model = Translator(TranslatorConfig(width=16, layers=2, heads=2), pairs.space).eval()
    source, target = tokens(pairs, "red dog"), tokens(pairs, "dog red")
    said = model.logits(model.read(source), target)
    changed = target.clone()
    changed[:, 2:] = 7
    assert torch.allclose(model.logits(model.read(source), changed)[:, :2], said[:, :2], atol=1e-5)
    assert not torch.allclose(model.logits(model.read(tokens(pairs, "blue dog")), target)[:, 0], said[:, 0], atol=1e-4)
    short = source[:, : int((source != PAD).sum())]
    maps = model.attention_maps(source, target[:, :5])
    assert maps.shape == (2, 1, 2, 5, 8) and maps[..., short.shape[1] :].abs().max() == 0
    assert torch.allclose(maps.sum(-1), torch.ones(2, 1, 2, 5), atol=1e-5)
    assert not torch.allclose(maps[0], maps[1], atol=1e-4) and model.pictures({"source": source, "x": target})
    assert [text.partition(" -> ")[0] for text in model.texts({"source": source})] == [
        pairs.space.reader().decode(row) for row in source.tolist()
    ]
    assert torch.allclose(model.logits(model.read(short), target), said, atol=1e-5), "padding of the source is not seen"


def test_the_translator_learns_to_turn_words_round(pairs):
    torch.manual_seed(0)
    model = Translator(TranslatorConfig(width=48, layers=2, heads=4), pairs.space)
    fit(model, batches(pairs, 64, 0), TrainSettings(steps=200, batch_size=64, lr=4e-3, warmup=20, precision="fp32"))
    said = model.translate([a for a, _ in PAIRS], 0, temperature=0)
    assert sum(text == b for text, (_, b) in zip(said, PAIRS, strict=True)) >= 38, said  # of 42
    assert model.translate([PAIRS[0][0]], 0, temperature=0) == said[:1]
    assert not model.can_sample


def test_impossible_configs_are_refused():
    for make in (
        lambda: EncoderConfig(width=30, heads=4), lambda: TranslatorConfig(layers=0), lambda: BidirectionalConfig(width=15),
        lambda: BidirectionalConfig(cell="lstn"),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            make()
