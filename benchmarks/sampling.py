"""Sampling one value after another with what was computed kept: PixelCNN against a whole pass a pixel, GPT against transformers.

    python benchmarks/sampling.py                about two minutes on two cores

PixelCNN of the preset pixelcnn-digits, 64 pictures: the same pixels, and how many times as fast (the bar is 5). GPT with GPT-2's
own weights loaded, one and sixteen texts of 128 tokens, greedy, each with its cache: the largest difference of the logits (the
bar is 1e-4) and tokens/s against `transformers` (the bar is 1.0). Medians of three, taken in turns after a warm-up.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from oneira.generative.datasets import DataConfig, load_data
from oneira.generative.gpt import GPT, read_gpt2
from oneira.generative.pixelcnn import PixelCNN, PixelCNNConfig


def in_turns(jobs: dict[str, Callable[[], object]], times: int = 3) -> dict[str, float]:
    """Median seconds of each job."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(times + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def pixelcnn() -> None:
    torch.manual_seed(0)
    model = PixelCNN(PixelCNNConfig(), load_data(DataConfig(name="digits")).space).eval()
    same = torch.equal(model.sample(64, 0), model.sample(64, 0, cached=False))
    seconds = in_turns({"cached": lambda: model.sample(64, 1), "whole": lambda: model.sample(64, 1, cached=False)})
    print(
        f"PixelCNN, 64 digits: same pixels: {same}; cached {seconds['cached']:.2f} s, a whole pass a pixel "
        f"{seconds['whole']:.2f} s: {seconds['whole'] / seconds['cached']:.1f} times as fast"
    )


@torch.no_grad()
def greedy(model: GPT, first: torch.Tensor, count: int) -> torch.Tensor:
    """`count` most probable tokens after tokens int64 [B, L]."""
    state, token, found = model.begin(len(first)), first, []
    for _ in range(count):
        token = model.advance(state, token).argmax(-1, keepdim=True)
        found.append(token)
    return torch.cat(found, 1)


def gpt(width: int, layers: int, count: int) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=5000, n_positions=256)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = read_gpt2(folder)
    tokens = torch.randint(0, 5000, (2, 200))
    with torch.no_grad():
        off = (ours.logits(tokens) - theirs(tokens).logits).abs().max()
    print(f"GPT {width} wide, {layers} layers: largest difference of the logits {off:.1e}")
    settings = {
        "max_new_tokens": count,
        "min_new_tokens": count,
        "do_sample": False,
        "pad_token_id": 0,
        "use_cache": True,
    }
    for rows in (1, 16):
        first = tokens[:1, :8].expand(rows, -1).contiguous()
        mask = torch.ones_like(first)
        jobs = {
            "ours": lambda first=first: greedy(ours, first, count),
            "theirs": lambda first=first, mask=mask: theirs.generate(first, attention_mask=mask, **settings),
        }
        assert torch.equal(jobs["ours"](), jobs["theirs"]()[:, 8:]), "both must say the same"
        speed = {name: rows * count / seconds for name, seconds in in_turns(jobs).items()}
        print(
            f"  {rows} texts: {speed['ours']:.0f} tokens/s, transformers {speed['theirs']:.0f}: "
            f"{speed['ours'] / speed['theirs']:.2f} times as fast"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128)
    given = parser.parse_args()
    pixelcnn()
    gpt(given.width, given.layers, given.tokens)


if __name__ == "__main__":
    main()
