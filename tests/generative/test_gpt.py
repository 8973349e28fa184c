"""GPT: agreement with transformers' GPT-2, the cache, positions by hand, attention, learning."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from oneira.generative.datasets import Arrays, batches, learn_tokens, text_space, token_rows
from oneira.generative.gpt import GPT, GPTConfig, angles_of, attention_sheet, read_gpt2, sines, turned
from oneira.generative.training import TrainSettings, fit
from oneira.platform.errors import ConfigError, DataError, UsageError

KINDS = pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
LINES = [f"{a} and {b} make {a + b}" for a in range(1, 7) for b in range(1, 7)]


@pytest.fixture(scope="module")
def lines():
    tokenizer = learn_tokens(LINES, 300)
    return Arrays.divide(text_space(tokenizer, 16), {"x": token_rows(tokenizer, LINES * 10, 16)})


def make(space, positions="learned", seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(width=32, layers=2, heads=2, positions=positions), space).eval()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=40, vocab_size=101, bos_token_id=100, eos_token_id=100)
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms are not 0 and 1 in a trained one
            parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return theirs, folder


def test_gpt2s_weights_give_gpt2s_logits(gpt2):
    theirs, folder = gpt2
    ours = read_gpt2(folder)
    tokens = torch.randint(0, 101, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours.logits(tokens) - theirs(tokens).logits).abs().max() <= 1e-4
        theirs.set_attn_implementation("eager")  # the fused one keeps no maps
        maps = theirs(tokens, output_attentions=True).attentions
    assert (ours.attention_maps(tokens) - torch.stack(maps)).abs().max() < 1e-5
    assert (ours.first_token, ours.end_token, ours.pad) == (100, 100, -1)


def test_what_is_no_gpt2_is_refused(gpt2, tmp_path):
    with pytest.raises(DataError, match="no GPT-2"):
        read_gpt2(tmp_path)
    card = json.loads((gpt2[1] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((gpt2[1] / "model.safetensors").read_bytes())
    for change, said in (({"activation_function": "relu"}, "relu"), ({"n_layer": 4}, "not those of its config"),
                         ({"scale_attn_by_inverse_layer_idx": True}, "inverse"), ({"tie_word_embeddings": False}, "tie_word")):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(card | change))
        with pytest.raises(DataError, match=said):
            read_gpt2(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(card))
    weights = load_file(tmp_path / "model.safetensors")
    head = next(value for key, value in weights.items() if key.endswith("wte.weight"))
    save_file(weights | {"lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="lm_head"):
        read_gpt2(tmp_path)


@KINDS
def test_the_cache_changes_nothing(positions, lines):
    model = make(lines.space, positions)
    tokens = torch.randint(0, 260, (3, 16), generator=torch.Generator().manual_seed(0))
    whole = model.logits(tokens)
    state, found = model.begin(3), []
    for piece in tokens.split([5, 1, 1, 6, 3], 1):  # several at once too, first and later
        found.append(model.advance(state, piece))
    for place, logits in zip([4, 5, 6, 12, 15], found, strict=True):
        assert torch.allclose(logits, whole[:, place], atol=1e-5)
    with pytest.raises(UsageError, match="17 tokens"):
        model.advance(state, tokens[:, :1])


@KINDS
def test_order_matters(positions, lines):
    # Without positions a causal transformer of one layer could not tell "b a c" from "a b c" at c.
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=16, layers=1, heads=2, positions=positions), lines.space).eval()
    a, b = model.logits(torch.tensor([[1, 50, 60, 70]])), model.logits(torch.tensor([[1, 60, 50, 70]]))
    assert (a[0, 3] - b[0, 3]).abs().max() > 1e-5


def test_positions_by_hand():
    assert torch.allclose(angles_of(2, 4, 4, torch.device("cpu")), torch.tensor([[2.0, 0.02], [3.0, 0.03]]))
    wanted = torch.tensor([math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)])
    assert torch.allclose(sines(1, 2, 4, torch.device("cpu"))[0], wanted)
    angles = angles_of(0, 9, 4, torch.device("cpu"))
    q, k = (turned(torch.randn(4).expand(9, 4), (angles.cos(), angles.sin())) for _ in range(2))
    products = q @ k.T
    for distance in range(-5, 6):  # equal distance, equal product
        line = products.diagonal(distance)
        assert torch.allclose(line, line[:1].expand_as(line), atol=1e-5)


@KINDS
def test_attention_maps_look_back_only(positions, lines):
    maps = make(lines.space, positions).attention_maps(torch.randint(0, 260, (2, 7)))
    assert maps.shape == (2, 2, 2, 7, 7)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 2, 2, 7), atol=1e-5) and maps.triu(1).abs().max() == 0
    (page,) = attention_sheet(maps).values()
    assert page.shape == (16, 16, 3) and page[0, 0].tolist() == [0, 0, 0] and page[0, 1].tolist() == [255] * 3


@KINDS
def test_it_learns_to_add(positions, lines):
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=48, layers=2, heads=4, positions=positions), lines.space)
    fit(model, batches(lines, 32, 0), TrainSettings(steps=300, batch_size=32, lr=5e-3, warmup=20, precision="fp32"))
    starts = [line.rpartition(" ")[0] for line in LINES]
    right = sum(a == b for a, b in zip(model.complete(starts, 0, temperature=0), LINES, strict=True))
    assert right >= 24, right  # of 36; the most frequent sum alone is right for 6


def test_impossible_configs_are_refused():
    for bad in ({"positions": "rotery"}, {"width": 30, "heads": 4}, {"layers": 0}):
        with pytest.raises(ConfigError):
            GPTConfig(**bad)
