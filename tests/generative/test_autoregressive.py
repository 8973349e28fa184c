"""PixelCNN, recurrent models and the choosing of values: hand-computed cases, cached against whole passes, learning."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from oneira.generative.choosing import draw, narrowed
from oneira.generative.datasets import (
    Arrays,
    DataConfig,
    batches,
    first_rows,
    learn_tokens,
    load_data,
    text_space,
    token_rows,
)
from oneira.generative.pixelcnn import PixelCNN, PixelCNNConfig, logistic_log_prob
from oneira.generative.recurrent import Recurrent, RecurrentConfig
from oneira.generative.spaces import Space
from oneira.generative.training import TrainSettings, fit
from oneira.platform.errors import ConfigError, UsageError

# Choosing -------------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_narrowing_by_hand(settings, shares):
    assert torch.allclose(
        narrowed(LOGITS, **settings).softmax(-1), torch.tensor(shares, dtype=torch.float32), atol=1e-6
    )


def test_equal_scores_are_cut_at_k():
    assert (narrowed(torch.zeros(2, 5), top_k=2) > -1).sum(-1).tolist() == [2, 2]


def test_drawing_by_hand():
    u = torch.tensor([0.0, 0.05, 0.0999, 0.11, 0.49, 0.51, 0.69, 0.71, 0.99999])
    assert draw(LOGITS.expand(9, 4), u).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    never = torch.tensor([-torch.inf, 0.0, -torch.inf])
    assert draw(never.expand(3, 3), torch.tensor([0.0, 0.5, 0.9999999])).tolist() == [1, 1, 1]


# PixelCNN -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig(name="digits"))


def pixelcnn(space, seed=0, **values):
    torch.manual_seed(seed)
    model = PixelCNN(PixelCNNConfig(**{"width": 24, "blocks": 2, **values}), space).eval()
    with torch.no_grad():  # as if it had learned something: fresh, every pixel is nearly uniform
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


@pytest.mark.parametrize("head", ["softmax", "logistic"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (5, 4, 3)])
def test_cached_sampling_gives_the_same_pixels(head, shape):
    model = pixelcnn(Space(kind="pictures", shape=shape, levels=17), head=head)
    quick, slow = model.sample(5, 3), model.sample(5, 3, cached=False)
    assert torch.equal(quick, slow) and len(quick.unique()) > 5
    known = torch.zeros(shape, dtype=torch.bool)
    known[: shape[0] // 2] = True
    completed = model.complete(quick, known, 4)
    assert torch.equal(completed, model.complete(quick, known, 4, cached=False))
    assert torch.equal(completed[:, known], quick[:, known]) and not torch.equal(completed, quick)


@pytest.mark.parametrize("head", ["softmax", "logistic"])
def test_probabilities_of_all_pictures_add_up_to_1(head):
    model = pixelcnn(Space(kind="pictures", shape=(2, 1, 3), levels=3), head=head, mixture=2)
    every = torch.tensor(list(itertools.product(range(3), repeat=6)), dtype=torch.uint8).reshape(-1, 2, 1, 3)
    assert model.log_prob(every).double().exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_samples_come_as_often_as_their_probability_says():
    model = pixelcnn(Space(kind="pictures", shape=(1, 2, 1), levels=2))
    every = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.uint8).reshape(4, 1, 2, 1)
    wanted = model.log_prob(every).exp().numpy()
    drawn = model.sample(8000, 0).reshape(-1, 2).numpy()
    shares = np.bincount(drawn[:, 0] * 2 + drawn[:, 1], minlength=4) / 8000
    assert np.abs(shares - wanted).max() < 4 * 0.5 / 8000**0.5


def test_logistic_by_hand():
    # One part with mean 0 and scale 1 over levels -1, 0, 1: p(0) = s(1/2) - s(-1/2) with half a level either way.
    parameters = torch.tensor([0.0, 0.0, 0.0])
    found = logistic_log_prob(parameters, torch.arange(3), 3).exp()
    s = 1 / (1 + math.exp(-0.5))
    assert found.tolist() == pytest.approx([1 - s, 2 * s - 1, 1 - s], rel=1e-5)


def test_the_logistic_is_exact_and_has_gradients_far_out():
    values, scale, levels = torch.arange(256), math.exp(-4.0), 256
    for mean in (-0.9, 0.1, 0.9):
        found = logistic_log_prob(torch.tensor([0.0, mean, -4.0]), values, levels)
        upper, lower = ((values.double() * 2 / 255 - 1 - mean + side / 255) / scale for side in (1, -1))
        # On either side of the mean the difference of the two tails that are small there.
        below, above = torch.sigmoid(upper) - torch.sigmoid(lower), torch.sigmoid(-lower) - torch.sigmoid(-upper)
        exact = torch.where(upper + lower > 0, above, below).log()
        assert torch.allclose(found[1:-1].double(), exact[1:-1], rtol=1e-4, atol=1e-4)
    parameters = torch.tensor([0.0, -0.9, -4.0], requires_grad=True)
    logistic_log_prob(parameters, torch.tensor([250]), levels).sum().backward()
    assert parameters.grad[1] == pytest.approx(1 / scale, rel=1e-3), "the mean is to move towards what was seen"


def test_pixelcnn_learns_digits(digits):
    torch.manual_seed(0)
    model = PixelCNN(PixelCNNConfig(width=32, blocks=2), digits.space)
    fit(model, batches(digits, 32, 0), TrainSettings(steps=120, batch_size=32, lr=5e-3, warmup=10, precision="fp32"))
    bits = -float(model.log_prob(torch.as_tensor(first_rows(digits, "test", 200)["x"])).mean()) / math.log(2) / 64
    x = first_rows(digits, "train", 2000)["x"].reshape(-1, 64)
    shares = np.stack([(x == level).mean(0) for level in range(17)])  # of each pixel alone
    alone = -np.mean([(shares * np.log2(shares.clip(1e-9))).sum(0)])
    assert bits < alone - 0.1, (bits, alone)


# Texts ----------------------------------------------------------------------------------------------------------------

VERSES = [
    f"the {colour} {shape} sleeps"
    for colour in ("red", "green", "blue")
    for shape in ("dog", "cat", "owl", "fish", "bee", "ant")
]


@pytest.fixture(scope="module")
def verses():
    tokenizer = learn_tokens(VERSES, 300)
    rows = token_rows(tokenizer, VERSES * 20, 12)
    return Arrays.divide(text_space(tokenizer, 12), {"x": rows})


@pytest.fixture(scope="module", params=["lstm", "gru"])
def taught(request, verses):
    torch.manual_seed(0)
    model = Recurrent(RecurrentConfig(cell=request.param, width=48, layers=2), verses.space)
    return fit(
        model, batches(verses, 32, 0), TrainSettings(steps=180, batch_size=32, lr=1e-2, warmup=10, precision="fp32")
    )


def test_tokenizer_keeps_every_text(verses):
    reader = verses.space.reader()
    for text in [*VERSES, "Zürich  costs 3€ — 猫\n", "a [EOS] b [PAD] c [BOS]", ""]:
        assert reader.decode(reader.encode(text).ids) == text


def test_a_text_model_learns_its_texts(taught):
    drawn = taught.sample(30, 0, top_p=0.95)
    assert sum(text in VERSES for text in drawn) >= 24 and len(set(drawn)) >= 8
    assert taught.sample(2, 0, temperature=0)[0] == taught.sample(2, 1, temperature=0)[1]


def test_completion_goes_on_from_the_beginning(taught):
    texts = taught.complete(["the blue ", "the red dog", ""], 0, top_p=0.9)
    assert [text.startswith(start) for text, start in zip(texts, ["the blue ", "the red dog", ""], strict=True)] == [
        True
    ] * 3
    assert texts[1] == "the red dog sleeps"
    assert taught.complete(["the blue "], 0, top_p=0.9) == texts[:1], "a text's draws do not depend on the other texts"
    with pytest.raises(UsageError, match="tokens"):
        taught.complete(["the dog " * 9], 0)
    with pytest.raises(UsageError, match="top_p"):
        taught.sample(1, 0, top_p=0.0)


def test_token_probabilities_add_up(taught, verses):
    text = "the green owl sleeps"
    pairs = taught.token_log_probs(text)
    assert "".join(token for token, _ in pairs) == text
    row = torch.as_tensor(token_rows(verses.space.reader(), [text], 12))
    end = taught.logits(taught.tokens_of(text))[0, -1].log_softmax(-1)[2].item()
    assert taught.log_prob(row).item() == pytest.approx(sum(value for _, value in pairs) + end, abs=1e-4)
    assert taught.log_prob(row).item() == pytest.approx(-math.log(18), abs=0.7), "one of 18 verses"
    assert "".join(token for token, _ in taught.token_log_probs("Zü 猫")) == "Zü 猫"
    assert taught.token_log_probs("") == []


def test_advancing_agrees_with_a_whole_pass(taught):
    tokens = taught.tokens_of("the green owl sleeps")
    state = taught.begin(1)
    for place in range(tokens.shape[1]):
        step = taught.advance(state, tokens[:, place : place + 1])
        assert torch.allclose(step, taught.logits(tokens)[:, place], atol=1e-5)


def test_impossible_configs_are_refused(digits, verses):
    for make in (
        lambda: PixelCNNConfig(head="sofmax"), lambda: PixelCNNConfig(blocks=0), lambda: RecurrentConfig(cell="gur"),
        lambda: PixelCNN(PixelCNNConfig(), verses.space), lambda: Recurrent(RecurrentConfig(), digits.space),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            make()
