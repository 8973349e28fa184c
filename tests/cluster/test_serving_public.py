"""Models that others made, over HTTP: what they can do, and what they say they cannot."""

import io

import numpy as np
import pytest
from PIL import Image

from ..multimodal import foreign
from .test_serving_web import BLEND, EDIT, EMBED, GENERATE, VARY, Site, must_be, picture, png

LOADER = "oneira.multimodal.text_to_image:load_text_to_image"


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    folder = foreign.stable_diffusion(tmp_path_factory.mktemp("public") / "stable")
    made = Site(LOADER, name=str(folder), places=4)
    yield made
    made.close()


def test_stable_diffusion_over_http(stable):
    asked = {"prompt": "a red circle", "seed": 5, "steps": 2}
    [drawn] = stable.post(GENERATE, json=asked).json()["data"]
    assert picture(drawn).shape == (16, 16, 3)
    assert stable.ask("GET", "/v1/models").json()["data"][0]["id"] == "stable"
    mask = np.full((16, 16), 255, np.uint8)
    mask[:8] = 0
    files = {"image": ("a.png", png(16)), "mask": ("m.png", png(16, alpha=mask))}
    [edited] = stable.post(EDIT, data={"prompt": "a star", "steps": "2"}, files=files).json()["data"]
    original = np.array(Image.open(io.BytesIO(png(16))))
    assert np.array_equal(picture(edited)[8:], original[8:])
    [embedding] = stable.post(EMBED, json={"model": "stable", "input": "a star"}).json()["data"]
    assert len(embedding["embedding"]) == foreign.WIDTH


def test_what_stable_diffusion_cannot_do_is_the_requests_mistake(stable):
    variation = stable.post(VARY, data={}, files={"image": ("a.png", png(16))})
    must_be(variation, 400, None, "has no 'variation'")
    must_be(stable.post(BLEND, json={"from": "a", "to": "b"}), 400, None, "has no image embeddings")
    too_many = stable.post(GENERATE, json={"prompt": "a" * 1000, "steps": 250, "guidance": 0})
    assert too_many.status_code == 200  # a prompt of any length is cut where the encoder ends
