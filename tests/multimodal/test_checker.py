"""The judge of pictures: what it says is read right, it learns, and its folder is exact."""

import numpy as np
import pytest
import torch

from oneira.generative.training import TrainSettings, fit
from oneira.multimodal.checker import PARTS, Checker, CheckerConfig
from oneira.multimodal.scenes import agreement, draw, grid_labels, lesson_scenes, sample
from oneira.multimodal.settings import label_batch
from oneira.platform.errors import ConfigError, DataError

TINY = CheckerConfig(width=8, blocks=1)


def make():
    torch.manual_seed(0)
    return Checker(TINY)


def batch(count=16):
    return {key: torch.from_numpy(value) for key, value in label_batch(sample(np.arange(count), "all")).items()}


def test_every_parameter_gets_a_gradient():
    model = make()
    for block in model.trunk:  # a second convolution of zeros hides the first from the first step
        if hasattr(block, "convs"):
            torch.nn.init.normal_(block.convs[1].weight, std=0.1)
    model.loss(batch(), torch.Generator().manual_seed(0))[0].backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


def perfect(model, scenes, doubt=0.0):
    """Makes the network say the truth; `doubt` puts a second, weaker answer into the cell beside each object."""
    labels = {key: torch.from_numpy(value) for key, value in grid_labels(scenes).items()}

    def forward(pictures):
        found = {"present": 8 * labels["present"][:, None] - 4, "offset": labels["offset"].permute(0, 3, 1, 2)}
        for key in ("shape", "colour", "size"):
            classes = labels[key].clamp(min=0)
            found[key] = torch.nn.functional.one_hot(classes, PARTS[key]).permute(0, 3, 1, 2).float()
        for key, number in (("count", 3), ("background", 6)):
            found[key] = torch.nn.functional.one_hot(labels[key], number).float()
        beside = torch.roll(found["present"], 1, dims=3)
        beside[..., 0] = -4
        found["present"] = torch.maximum(found["present"], beside - doubt) if doubt else found["present"]
        return found

    model.forward = forward
    return model


@pytest.mark.parametrize("doubt", [0.0, 1.0])
def test_reading_undoes_the_labels(doubt):
    scenes = sample(np.arange(400), "all")
    if (
        doubt
    ):  # the answer beside has the offset of an empty cell, 0: near enough to be passed over only when left of it
        labels = grid_labels(scenes)
        keep = np.array([(labels["offset"][n][labels["present"][n] > 0][:, 0] > 0.5).all() for n in range(400)])
        scenes = scenes[keep]
    reading = perfect(make(), scenes, doubt).read(np.zeros((len(scenes), 64, 64, 3), np.uint8), chunk=1000)
    assert len(scenes) > 50 and all(value.all() for value in agreement(scenes, reading).values())


def test_readings_do_not_depend_on_the_batch_and_take_any_size():
    model = make().eval()
    scenes = sample(np.arange(40))
    whole, parts = model.read(draw(scenes, 64)), model.read(draw(scenes, 64), chunk=7)
    for key, value in vars(whole).items():
        assert np.allclose(value, getattr(parts, key), atol=1e-5), key
    assert len(model.read(draw(scenes, 128)).count) == 40


def test_save_and_load_is_exact(tmp_path):
    model = make()
    model.save(tmp_path)
    again = Checker.load(tmp_path)
    pictures = draw(sample(np.arange(8)), 64)
    assert again.config == TINY and not again.training
    for key, value in vars(model.read(pictures)).items():
        assert np.array_equal(value, getattr(again.read(pictures), key))
    (tmp_path / "checker.json").write_text('{"width": 16}')
    with pytest.raises(DataError, match="no checker"):
        Checker.load(tmp_path)


def test_it_learns():
    """Backgrounds, of which chance guesses one in six, and where an object is."""
    settings = TrainSettings(steps=150, batch_size=32, lr=4e-3, warmup=30, precision="fp32")
    model = fit(make(), lambda step: label_batch(lesson_scenes(0, step, 32, "all")), settings)
    scenes = sample(np.arange(300) + (1 << 40), "all")
    scenes = scenes[scenes.count == 1]
    reading = model.read(draw(scenes, 64))
    assert (reading.background == scenes.background).mean() > 0.4
    away = np.hypot(reading.x[:, 0] - scenes.x[:, 0] / 4096, reading.y[:, 0] - scenes.y[:, 0] / 4096)
    assert np.median(away) < 1 / 8


@pytest.mark.parametrize("bad", [{"width": 12}, {"blocks": 0}])
def test_impossible_configs_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        CheckerConfig(**bad)
