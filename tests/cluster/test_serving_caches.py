"""What is remembered of prompts: the same pictures with fewer steps, by weights, and never more bytes than allowed."""

import asyncio

import numpy as np
import torch
from prometheus_client import generate_latest

from oneira.cluster.serving.caches import ENTRY_BYTES, Cache, digest_of, key_of
from oneira.cluster.serving.engine import Engine
from oneira.cluster.serving.models import load_models
from oneira.cluster.serving.service import Service
from oneira.multimodal.stages import PictureRequest

DIGESTS = {("m", "text"): "t", ("m", "prior"): "p", ("n", "text"): "t", ("n", "prior"): "q"}


def state(floats):
    return {"x": np.zeros(floats, np.float32)}


def test_a_cache_never_has_more_bytes_than_it_may_and_forgets_what_was_not_used():
    cache = Cache(3 * (ENTRY_BYTES + 401))
    for name in "abc":
        cache.put((name,), state(100))
    assert cache.bytes == cache.most and cache.get(("a",)) is not None
    cache.put(("d",), state(100))
    assert cache.get(("b",)) is None and cache.get(("a",)) is not None
    cache.put(("huge",), state(10_000))
    assert cache.get(("huge",)) is None and cache.bytes == cache.most
    for number in range(100):
        cache.put((str(number),), state(number))
        assert cache.bytes <= cache.most


def test_a_row_of_a_batch_does_not_keep_the_batch():
    batch, cache = np.arange(20.0).reshape(4, 5), Cache(10_000)
    cache.put(("a",), {"x": batch[1]})
    found = cache.get(("a",))["x"]
    assert found.base is None and np.array_equal(found, batch[1])


def test_a_key_names_all_that_the_result_depends_on():
    def key(model="m", stage="prior", **fields):
        return key_of(DIGESTS, model, stage, PictureRequest(**{"prompt": "a", **fields}))

    base = key()
    others = [{"prompt": "b"}, {"seed": 1}, {"guidance": 3.0}, {"steps": 7}, {"model": "n"}]
    assert len({base, *(key(**other) for other in others)}) == 1 + len(others)
    assert (
        key(stage="text") == key(stage="text", seed=1) == key(stage="text", model="n") != key(stage="text", prompt="b")
    )
    picture = np.zeros((4, 4, 3), np.uint8)
    for unusual in ({"stage": "decoder"}, {"task": "variation", "picture": picture}, {"task": "embedding"}):
        assert key(**unusual) is None
    assert key_of({}, "m", "text", PictureRequest(prompt="a")) is None


def test_weights_and_settings_have_digests(tiny):
    def digests(model):
        return [digest_of(stage, [stage.net]) for stage in load_models([model], tiny)[model][1:]]

    first, again, other = digests("tiny"), digests("tiny"), digests("other")
    assert first == again and not set(first) & set(other) and len(set(first)) == 3
    prior = load_models(["tiny"], tiny)["tiny"][1]
    with torch.no_grad():
        prior.net[0].bias[0] += 1e-3
    assert digest_of(prior, [prior.net]) != first[0]
    prior.net[0].bias.data[0] -= 1e-3
    prior.steps = 9
    assert digest_of(prior, [prior.net]) != first[0]


def test_a_prompt_that_was_asked_before_skips_text_and_prior_and_gives_the_same_picture(tiny):
    async def main():
        models = load_models(["tiny"], tiny)
        engine = Engine(models, threads=1)
        service = Service(engine, engine.names)
        await service.begin()
        prior, decoder = models["tiny"][1:3]
        asked = PictureRequest(prompt="a red circle on a hill", seed=5, guidance=3.0)
        [first] = await service.draw("tiny", [asked])
        steps = len(prior.batches), len(decoder.batches)
        [again] = await service.draw("tiny", [asked])
        assert (len(prior.batches), len(decoder.batches)) == (steps[0], 2 * steps[1] - 1)  # begin made one
        await service.draw("tiny", [PictureRequest(prompt="a red circle on a hill", seed=6, guidance=3.0)])
        assert len(prior.batches) > steps[0]
        await engine.close()
        return first, again, service

    first, again, service = asyncio.run(main())
    rows = generate_latest(service.measures.registry).decode().splitlines()
    for row in ('hits_total{stage="text"} 2.0', 'hits_total{stage="prior"} 1.0', 'misses_total{stage="prior"} 3.0'):
        assert f"oneira_cache_{row}" in rows
    assert np.array_equal(first["picture"], again["picture"])
    assert service.caches["prior"].bytes > 0
