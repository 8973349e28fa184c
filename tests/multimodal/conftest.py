from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Networks this small lose more to threads that wait for each other than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """The folder of an untrained CLIP whose text states are as wide as its embeddings."""
    from oneira.multimodal.clip import Clip, ClipConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    config = ClipConfig(embed=32, image_size=32, vision_width=32, vision_layers=1, text_width=32, text_layers=1)
    Clip.new(config).save(folder)
    return folder


@pytest.fixture(scope="session")
def parts(tiny_clip):
    """Tiny untrained networks by name, all of one CLIP: "prior", "ar", "decoder" (16 pixels), "upsampler"."""
    from oneira.multimodal.ar_prior import ArPrior, ArPriorConfig, Code
    from oneira.multimodal.decoder import Decoder, DecoderConfig
    from oneira.multimodal.embedding import encode, load_clip
    from oneira.multimodal.prior import Prior, PriorConfig
    from oneira.multimodal.scenes import sample
    from oneira.multimodal.upsampler import Upsampler, UpsamplerConfig

    clip = load_clip(str(tiny_clip))
    found = encode(clip, sample(np.arange(300)), 0)
    images, texts = found["image_embedding"], found["text_embedding"]
    fitted = {"mean": images.mean(0), "std": images.std(0)}
    torch.manual_seed(1)
    return {
        "prior": Prior.new(PriorConfig(width=32, layers=1), embed=32, length=32, **fitted).eval(),
        "ar": ArPrior(
            ArPriorConfig(width=32, layers=1, components=6, buckets=8), Code.fit(images, texts, 6, 8), text_width=32, length=32
        ).eval(),
        "decoder": Decoder.new(DecoderConfig(size=16, widths=(8, 32)), embed=32, text_width=32, **fitted).eval(),
        "upsampler": Upsampler.new(UpsamplerConfig(size=32, widths=(8, 16))).eval(),
    }  # fmt: skip
