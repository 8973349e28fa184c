"""CLIP and its words: open_clip's format both ways, unknown words, the loss, and that it learns."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from oneira.generative.training import TrainSettings, fit
from oneira.multimodal.clip import CONFIG, WEIGHTS, Clip, ClipConfig
from oneira.multimodal.scenes import COLOURS, SHAPES, captions, draw, sample, vocabulary
from oneira.multimodal.settings import caption_batch
from oneira.multimodal.words import BEGIN, END, PAD, UNKNOWN, Words, with_unknown_words
from oneira.platform.errors import ConfigError, DataError

TINY = ClipConfig(embed=32, image_size=32, patch=8, vision_width=64, vision_layers=2, text_width=64, text_layers=2)
TEXTS = ["a red circle", "Two  GREEN stars, on white!", "zwölf blaue Kugeln", ""]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return Clip.new(TINY).eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- words


def numbers(words, *texts):
    return [words.number(word) for word in texts]


def test_words_by_hand():
    words = Words.of(vocabulary(), 8)
    rows = words(TEXTS[:1] + ["A réd, CIRCLE..", "3 red circles", "a\x00red  🙂 circle", "a mauve circle", ""])
    assert rows.shape == (6, 8) and rows.dtype == np.int64
    plain = numbers(words, BEGIN, "a", "red", "circle", END, PAD, PAD, PAD)
    assert rows[0].tolist() == rows[1].tolist() == rows[3].tolist() == plain
    assert rows[2, 1:4].tolist() == numbers(words, "three", "red", "circles")
    assert rows[4, 1:4].tolist() == numbers(words, "a", UNKNOWN, "circle")
    assert rows[5, :2].tolist() == numbers(words, BEGIN, END)
    assert words.number(END) == len(words) - 1 and words.number(PAD) == 0


def test_no_caption_is_cut_or_has_unknown_words():
    words = Words.of(vocabulary(), ClipConfig().length)
    tokens = words(captions(sample(np.arange(20_000))) + captions(sample(np.arange(5000), "all"), full=True))
    assert (tokens == words.number(END)).any(1).all() and (tokens != words.number(UNKNOWN)).all()
    assert (tokens[:, -2] == 0).all()  # room for an unknown word
    assert Words.of(vocabulary(), 8)(["a " * 50])[0, -1] == words.number(END)


def test_unknown_words_are_added_where_asked():
    words = Words.of(vocabulary(), 32)
    tokens = words(captions(sample(np.arange(2000))))
    more = with_unknown_words(tokens, words, np.random.default_rng(0), share=0.25)
    unknown = (more == words.number(UNKNOWN)).sum(1)
    assert set(unknown) == {0, 1} and unknown.mean() == pytest.approx(0.25, abs=0.04)
    for row, before, added in zip(more, tokens, unknown, strict=True):
        kept = row[row != words.number(UNKNOWN)]
        assert kept.tolist() == before[: 32 - added].tolist() and row[0] == words.number(BEGIN)


# ---- open_clip's format


@pytest.mark.parametrize("vision", ["transformer", "resnet"])
def test_open_clip_and_transformers_read_our_folder(vision, tmp_path):
    import open_clip

    torch.manual_seed(0)
    tiny = Clip.new(replace(TINY, vision=vision)).eval()
    tiny.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json"}
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    assert np.array_equal(tokens.numpy(), tiny.words(TEXTS))
    pictures = draw(sample(np.arange(4)), 32)
    with torch.no_grad():
        assert torch.equal(theirs.encode_text(tokens, normalize=True), tiny.embed_texts(TEXTS))
        from PIL import Image

        images = torch.stack([preprocess(Image.fromarray(picture)) for picture in pictures])
        assert torch.allclose(images, tiny.pixels(pictures), atol=1e-6)
        ours = tiny.embed_images(pictures)
        assert torch.allclose(theirs.eval().encode_image(images, normalize=True), ours, atol=1e-5)


def test_save_and_load_is_exact(tiny, tmp_path):
    tiny.save(tmp_path)
    again = Clip.load(tmp_path)
    pictures = draw(sample(np.arange(4)), 32)
    assert torch.equal(again.embed_texts(TEXTS), tiny.embed_texts(TEXTS))
    assert torch.equal(again.embed_images(pictures), tiny.embed_images(pictures))
    assert not again.training and again.settings == tiny.settings


@pytest.mark.parametrize("damage", ["missing", "cut", "config", "tokenizer", "other"])
def test_a_folder_that_is_no_model_says_so(tiny, tmp_path, damage):
    tiny.save(tmp_path)
    if damage == "missing":
        (tmp_path / WEIGHTS).unlink()
    elif damage == "cut":
        (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-7])
    elif damage == "config":
        (tmp_path / CONFIG).write_text("{")
    elif damage == "tokenizer":
        (tmp_path / "tokenizer.json").write_text("{}")
    else:
        Clip.new(ClipConfig(**{**vars(TINY), "embed": 16})).save(tmp_path)
        (tmp_path / CONFIG).write_text((tmp_path / CONFIG).read_text().replace('"embed_dim": 16', '"embed_dim": 32'))
    with pytest.raises(DataError, match=str(tmp_path)):
        Clip.load(tmp_path)


# ---- embeddings


@pytest.mark.parametrize("vision", ["transformer", "resnet"])
def test_embeddings_have_length_one_and_do_not_depend_on_the_batch(vision):
    torch.manual_seed(0)
    tiny = Clip.new(replace(TINY, vision=vision)).eval()
    texts, pictures = captions(sample(np.arange(6))), draw(sample(np.arange(6)), 32)
    for embed, given in ((tiny.embed_texts, texts), (tiny.embed_images, pictures)):
        whole = embed(given)
        assert whole.shape == (6, 32) and torch.allclose(whole.norm(dim=1), torch.ones(6), atol=1e-5)
        assert torch.allclose(torch.cat([embed(given[i : i + 1]) for i in range(6)]), whole, atol=1e-5)
    embedding, states, mine = tiny.read_texts(texts)
    assert torch.equal(embedding, tiny.embed_texts(texts)) and states.shape == (6, 32, 64)
    assert mine.sum(1).tolist() == [len(text.replace(",", "").split()) + 2 for text in texts]


def test_what_follows_the_end_changes_nothing(tiny):
    tokens = tiny.tokens(["a red circle"])
    noisy = tokens.clone()
    noisy[0, 10:] = 7
    assert torch.allclose(tiny.text_features(tokens)[0], tiny.text_features(noisy)[0], atol=1e-6)


def test_pictures_of_any_size_are_taken(tiny):
    s = sample(np.arange(8))
    small, large = tiny.embed_images(draw(s, 32)), tiny.embed_images(draw(s, 128))
    assert (small * large).sum(1).min() > 0.98


def test_classes_of_several_texts_are_their_mean(tiny):
    pictures = draw(sample(np.arange(10)), 32)
    texts = captions(sample(np.arange(4)))
    with torch.no_grad():
        cosines = tiny.embed_images(pictures) @ tiny.embed_texts(texts).T
    assert torch.equal(tiny.classify(pictures, texts), cosines.argmax(1))
    doubled = [[text, text] for text in texts]
    assert torch.equal(tiny.classify(pictures, doubled), cosines.argmax(1))


# ---- training


@pytest.mark.parametrize("vision", ["transformer", "resnet"])
def test_every_parameter_gets_a_gradient(vision):
    torch.manual_seed(0)
    model = Clip.new(replace(TINY, vision=vision))
    with torch.no_grad():
        for parameter in model.parameters():  # gains that begin at zero hide what is before them
            parameter += 0.1 * (parameter == 0)
    loss, values = model.loss(as_tensors(caption_batch(model.words, sample(np.arange(16)), 32, 0)), generator())
    loss.backward()
    assert values.keys() == {"right", "scale"}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


def as_tensors(batch):
    return {key: torch.from_numpy(value) for key, value in batch.items()}


def test_loss_by_hand(tiny, monkeypatch):
    # Two rows of the same words and a third: positives are shared between the first two.
    images = torch.eye(3)
    monkeypatch.setattr(tiny, "image_features", lambda pictures: images)
    monkeypatch.setattr(tiny, "text_features", lambda tokens: (images, None))
    tokens = torch.tensor([[1, 2], [1, 2], [1, 3]])
    loss, values = tiny.loss({"pictures": None, "tokens": tokens}, generator())
    e = 1 / 0.07  # the first scale
    twins = -(e / 2 - math.log(math.exp(e) + 2))
    alone = -(e - math.log(math.exp(e) + 2))
    assert loss.item() == pytest.approx((2 * twins + alone) / 3, rel=1e-4)
    assert values["right"] == 1 and values["scale"].item() == pytest.approx(e, rel=1e-4)


def test_batches_are_pure_functions_of_their_place(tiny):
    a, b = (caption_batch(tiny.words, sample(np.arange(64, 72)), 32, 5) for _ in range(2))
    assert all(np.array_equal(a[key], b[key]) for key in a)
    other = caption_batch(tiny.words, sample(np.arange(72, 80)), 32, 5)
    assert not np.array_equal(a["pictures"], other["pictures"]) and not np.array_equal(a["tokens"], other["tokens"])


@pytest.mark.parametrize("count", [2, 7, 64])
def test_a_batch_holds_scenes_that_differ_in_one_thing_and_enough_of_one_object(tiny, count):
    batch = caption_batch(tiny.words, sample(np.arange(640, 640 + count)), 32, 5)
    assert batch["pictures"].shape == (count, 32, 32, 3) and len(batch["tokens"]) == count
    half = -(-count // 2)
    first, second = batch["pictures"][: count - half].astype(int), batch["pictures"][half:].astype(int)
    far = np.abs(first - np.roll(second, 1, 0)).mean()  # another scene's
    assert np.abs(first - second).mean() < 0.7 * far or count < 4
    some = sample(np.arange(640, 640 + count))
    base = np.flatnonzero(some.count == 1)[: max(half // 2, 1)]
    drawn = draw(some, 32)
    shown = {picture.tobytes() for picture in batch["pictures"][:half]}
    assert len(shown) == half and shown <= {picture.tobytes() for picture in drawn}
    assert count < 64 or (all(drawn[n].tobytes() in shown for n in base) and len(base) > 8)


def test_it_learns_colours():
    """From single objects of the training split: whose colour a picture shows, which chance gets right once in ten."""
    torch.manual_seed(0)
    model = Clip.new(TINY)
    s = sample(np.arange(40_000))
    s = s[s.kind == 0]
    texts = [f"a {COLOURS[c]} {SHAPES[k]}" for c, k in zip(s.colour[:, 0], s.shape[:, 0], strict=True)]

    def batch_at(step):
        rows = np.arange(step * 64, step * 64 + 64) % len(s)
        return {"pictures": draw(s[rows], 32), "tokens": model.words([texts[row] for row in rows])}

    fit(model, batch_at, TrainSettings(steps=200, batch_size=64, lr=1e-3, warmup=50, precision="fp32"))
    test = sample(np.arange(1 << 40, (1 << 40) + 1500), "pairs")[:300]
    found = model.classify(draw(test, 32), [f"a {colour} circle" for colour in COLOURS]).numpy()
    assert np.mean(found == test.colour[:, 0]) > 0.35


@pytest.mark.parametrize("bad", [{"embed": 0}, {"vision_width": 100}, {"patch": 7}, {"vision": "eye"}])
def test_impossible_configs_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ClipConfig(**bad)
