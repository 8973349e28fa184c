"""POST /v1/samples over a real engine, without Ray, with models trained here: what they give, who shares a step, wrong requests."""

import asyncio
import base64
import io
from dataclasses import replace

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

from oneira.cluster.serving.engine import Engine
from oneira.cluster.serving.line import Line
from oneira.cluster.serving.models import anywhere, load_models, needed_kinds
from oneira.cluster.serving.sampling import MOST_PASSES, SampleRequest, SampleStage
from oneira.cluster.serving.service import Service
from oneira.generative.classifier import Classifier, ClassifierConfig
from oneira.generative.datasets import DataConfig, load_data
from oneira.generative.ddpm import DDPM, DDPMConfig
from oneira.generative.gan import GANConfig
from oneira.generative.models import load_model
from oneira.generative.realnvp import RealNVPConfig
from oneira.generative.recurrent import Recurrent, RecurrentConfig
from oneira.platform.errors import UsageError
from oneira.platform.executor import SerialExecutor
from oneira.platform.presets import load_preset
from oneira.platform.runs import Run

PATH = "/v1/samples"
TRAINED = {
    "realnvp-moons": RealNVPConfig(couplings=2, width=8),
    "cgan-digits": GANConfig(z=4, width=4, conditional=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs, and folders of models with random weights: "says" writes texts, "paints" digits, "reads" is a classifier."""
    place = tmp_path_factory.mktemp("models")
    for preset, model in TRAINED.items():
        run = Run.create(place / preset, preset, replace(load_preset(preset).smoke(), model=model))
        with SerialExecutor() as executor:
            run.config.train(run, executor)
    digits = load_data(DataConfig(name="digits")).space
    texts = load_preset("gru-captions").dataset().space
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {
            "says": Recurrent(RecurrentConfig(width=16), texts),
            "paints": DDPM(DDPMConfig(widths=(8, 16), steps=3, conditional=True), digits),
            "reads": Classifier(ClassifierConfig(width=2), digits),
        }
    for name, model in made.items():
        (place / name).mkdir()
        model.save(place / name)
    return place


class Site:
    def __init__(self, models, **line):
        from oneira.cluster.serving.web import make_app

        self.loop, self.models = asyncio.new_event_loop(), models

        async def begin():
            self.engine = Engine(models, threads=1)
            names = {name: [stage.name for stage in stages] for name, stages in models.items()}
            self.service = Service(self.engine, names, Line(**line))
            self.app = make_app(self.service)
            await self.service.begin()

        self.loop.run_until_complete(begin())
        transport = httpx2.ASGITransport(self.app)
        self.client = httpx2.AsyncClient(transport=transport, base_url="http://localhost")

    def ask(self, *documents):
        async def all_of_them():
            return await asyncio.gather(*(self.client.post(PATH, json=document) for document in documents))

        answers = self.loop.run_until_complete(all_of_them())
        return answers if len(answers) > 1 else answers[0]

    def get(self, path):
        return self.loop.run_until_complete(self.client.get(path)).json()

    def close(self):
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()


@pytest.fixture(scope="module")
def site(folder, tiny):
    names = [*(str(folder / name) for name in (*TRAINED, "says", "paints")), "tiny"]
    made = Site(load_models(names, tiny))
    yield made
    made.close()


def pictures(answer):
    return np.stack([np.array(Image.open(io.BytesIO(base64.b64decode(row["b64_json"])))) for row in answer["data"]])


def test_points_pictures_and_texts_are_those_of_load_model(site, folder):
    asked = {"n": 5, "seed": 3}
    points = site.ask({"model": "realnvp-moons"} | asked).json()
    own = load_model(folder / "realnvp-moons").sample(5, 3)
    assert points["kind"] == "points" and points["seed"] == 3
    assert np.allclose([row["point"] for row in points["data"]], own, atol=1e-5)
    digits = site.ask({"model": "cgan-digits", "params": {"labels": 4}} | asked).json()
    own = load_model(folder / "cgan-digits").sample(5, 3, labels=torch.full((5,), 4))
    assert np.allclose(pictures(digits)[..., :1] / 255, own / 16, atol=1 / 16)
    settings = {"temperature": 0.5, "beginning": "a red"}
    texts = site.ask({"model": "says", "params": settings} | asked).json()
    assert [row["text"] for row in texts["data"]] == load_model(folder / "says").sample(5, 3, **settings)


def test_requests_of_one_model_and_the_same_settings_share_a_step(site):
    [stage] = site.models["paints"]
    alone = [site.ask({"model": "paints", "n": n, "seed": n}).json() for n in (1, 2, 3)]
    stage.batches.clear()
    wanted = [{"model": "paints", "n": n, "seed": n} for n in (1, 2, 3)]
    other = {"model": "paints", "n": 2, "params": {"steps": 2, "labels": [7, 8]}}
    answers = [answer.json() for answer in site.ask(*wanted, other)]
    assert len(stage.batches) <= 3 and max(stage.batches) >= 5 and sum(stage.batches) == 8
    for one, shared in zip(alone, answers, strict=False):
        assert np.abs(pictures(one).astype(int) - pictures(shared)).max() <= 16  # one level of 16


def test_a_seed_is_told_where_none_was_given(site):
    first = site.ask({"model": "realnvp-moons"}).json()
    again = site.ask({"model": "realnvp-moons", "seed": first["seed"]}).json()
    assert len(first["data"]) == 1 and first["data"] == again["data"]
    assert site.ask({}).json()["model"] == "realnvp-moons"  # the first that samples


def test_models_say_what_they_give(site):
    described = {model["id"]: model for model in site.get("/v1/models")["data"]}
    assert {name: of.get("samples") for name, of in described.items()} == {
        "realnvp-moons": "points", "cgan-digits": "pictures", "says": "text", "paints": "pictures", "tiny": None,
    }  # fmt: skip
    assert site.get("/v1/models/says")["samples"] == "text"
    assert (
        'oneira_steps_total{model="says",stage="sampler"}'
        in site.loop.run_until_complete(site.client.get("/metrics")).text
    )
    assert PATH in site.get("/openapi.json")["paths"]


WRONG = [
    ({"model": "realnvp-mons"}, 404, "model", "Did you mean 'realnvp-moons'"),
    ({"model": "tiny"}, 400, "model", "/v1/images/generations"),
    ({"n": 0}, 400, "n", "1"),
    ({"n": 65}, 400, "n", "64"),
    ({"n": 10**12}, 400, "n", "64"),
    ({"seed": -1}, 400, "seed", "0"),
    ({"seed": 1.5}, 400, "seed", "integer"),
    ({"sed": 1}, 400, "sed", "Did you mean 'seed'"),
    ({"params": {"steps": 10**9}}, 400, "params", "250"),
    ({"params": {"temperature": "hot"}}, 400, "params", "number"),
    ({"params": {"top_k": 1}}, 400, "params", "Unknown setting 'top_k'"),
    ({"model": "says", "params": {"top_k": -1}}, 400, "params", "0"),
    ({"model": "says", "params": {"beginning": "a red circle " * 50}}, 400, "params", "tokens"),
    ({"model": "paints", "params": {"labels": 10}}, 400, "params", "[0, 10)"),
    ({"model": "paints", "n": 2, "params": {"labels": [1, 2, 3]}}, 400, "params", "2 labels"),
    ({"model": "paints", "n": 64, "params": {"steps": 250}}, 400, "params", "4000"),
    ({"model": "cgan-digits", "params": {"steps": 3}}, 400, "params", "labels"),
]


@pytest.mark.parametrize("document, status, param, word", WRONG)
def test_wrong_requests_name_what_is_wrong_and_draw_nothing(site, document, status, param, word):
    before = {name: len(stages[0].batches) for name, stages in site.models.items() if name != "tiny"}
    answer = site.ask(document)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and word in error["message"] and error["type"] == "invalid_request_error"
    assert before == {name: len(stages[0].batches) for name, stages in site.models.items() if name != "tiny"}


def test_pictures_of_prompts_are_not_asked_of_a_sampler(site):
    post = site.client.post("/v1/images/generations", json={"prompt": "a", "model": "says"})
    answer = site.loop.run_until_complete(post)
    assert answer.status_code == 400 and "/v1/samples" in answer.json()["error"]["message"]


def test_a_full_line_answers_429(folder):
    site = Site(load_models([str(folder / "paints")], "none:none"), places=1, limit=1)
    try:
        answers = site.ask(*[{"n": 64, "params": {"steps": 20}}] * 4)
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
    finally:
        site.close()


def test_what_cannot_be_sampled_is_not_served(folder):
    with pytest.raises(UsageError, match="nothing to sample"):
        load_models([str(folder / "reads")], "none:none")
    assert needed_kinds([str(folder / "says")]) == ["sampler"]
    assert anywhere("tiny") == "tiny" and anywhere(str(folder / "says")) == str(folder / "says")
    assert needed_kinds(["tiny"]) == ["text", "prior", "decoder", "upsampler"]
    assert load_models([str(folder / "says")], "none:none", ["text"]) == {"says": []}


def test_one_call_is_no_longer_than_the_largest_request_may_be(folder):
    """Nobody can interrupt it: neither who goes nor who is more urgent."""
    stage = SampleStage(load_model(folder / "paints"))
    for steps, calls in ((3, 1), (1000, 3)):
        stage._draw = lambda plans: [np.zeros(plan.request.n) for plan in plans]
        plans = [stage.plan(SampleRequest(n=2, seed=k, params={"steps": steps}), {}) for k in range(6)]
        stage.batches.clear()
        while left := [plan for plan in plans if not plan.done]:
            stage.step(left)
        assert len(stage.batches) == calls and max(stage.batches) * steps <= MOST_PASSES
