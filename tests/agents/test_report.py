"""The report of a world-model run, from metrics like those of a real one, and at every moment of a run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from oneira.agents.evaluation import reported_seeds, score
from oneira.agents.recording import side_by_side, write_video
from oneira.agents.report import _clock, _outside, _told, build_report
from oneira.platform.errors import DataError
from oneira.platform.presets import load_preset
from oneira.platform.runs import Run

START = 1_700_000_000.0


def new_run(path: Path) -> Run:
    run = Run.create(path, "carracing-quick", load_preset("carracing-quick"), ["oneira", "train", "carracing-quick"])
    provenance = run.provenance()
    provenance["started"] = [{"time": stamp(0)}]
    (path / "provenance.json").write_text(json.dumps(provenance))
    return run


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(START + seconds, UTC).isoformat()


def write_metrics(run: Run, lines: list[dict]) -> None:
    with open(run.path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps({**line, "time": START + line["time"]}) + "\n" for line in lines)


def two_rounds() -> list[dict]:
    """What a run of two rounds with a real and two dream populations logs, in 40 minutes."""
    rng, lines, now = np.random.default_rng(0), [], 0.0

    def log(stage: str, step: int, took: float, /, **values: float | str) -> None:
        nonlocal now
        now += took
        lines.append({"time": now, "stage": stage, "step": step, **values})

    for r in range(2):
        for i in range(10):
            log("collect", r * 1000 + i, 6, round=r, env_steps=8000, mean_return=-20 + 300 * r + rng.normal(0, 9))
        for i in range(60):
            error = 60 * np.exp(-i / 12) + 9 + rng.normal(0, 0.7) - 2 * r
            log(
                "vision",
                r * 10**6 + i * 50,
                2.5,
                round=r,
                loss=error + 20,
                recon=error,
                kl=20 + i / 8,
                frames_per_s=1480.0,
            )
        for i in range(60):
            nll = 1.4 * np.exp(-i / 20) + 0.1 - 0.1 * r + rng.normal(0, 0.03)
            log("memory", r * 10**6 + i * 50, 2, round=r, loss=nll, nll=nll, reward_mse=0.4 + 0.6 * np.exp(-i / 9),
                done_bce=0.01, transitions_per_s=21500.0)  # fmt: skip
        for g in range(60):
            for k, (world, name) in enumerate([("real", "real"), ("dream", "dream-a"), ("dream", "dream-b")]):
                level = (800 if world == "real" else 150 + 30 * k) * (1 - np.exp(-(g + 60 * r) / 35)) - 20
                values = {"mean": level + rng.normal(0, 12), "best": level * 1.25 + 25 + rng.normal(0, 8)}
                values |= {"mean_of_mean": level + 30} if g % 10 == 0 else {}
                values |= {"sigma": 0.5 * np.exp(-g / 60), "env_steps": 256 * (700 if world == "real" else 300)}
                step = r * 10**6 + k * 10**5 + g
                log(f"evolve-{world}", step, 4, population=name, round=r, generation=g, **values)
        for k, name in enumerate(["real", "dream-a", "dream-b"]):
            rho = [[0.35, 0.62, -0.12], [0.71, 0.80, 0.55]][r][k]
            for c in range(16):
                dream = rng.normal(120, 30)
                values = {"dream": dream, "real": rho * 4 * dream + rng.normal(0, 90)}
                log("candidate", r * 1000 + k * 100 + c, 0.1, round=r, population=name, **values)
            values = {"real_mean": 420 + 220 * r - 60 * k, "real_std": 190.0, "dream_mean": 150.0}
            values |= {"rank_correlation": rho, "alarm": int(rho <= 0)}
            log("check", r * 100 + k, 8, round=r, population=name, world=name[:5].rstrip("-"), **values)
        for k, (name, seconds) in enumerate(
            {"collect": 60, "vision": 150, "memory": 120, "evolve": 720, "check": 29}.items()
        ):
            log("stage", r * 7 + k, 0, name=name, round=r, seconds=float(seconds))
    return lines


def write_media(run: Run) -> None:
    frames = np.full((40, 64, 64, 3), (96, 170, 80), np.uint8)
    for i, frame in enumerate(frames):
        frame[:, 20 + i // 2 : 36 + i // 2] = 105
        frame[44:54, 28 + i // 4 : 33 + i // 4] = (200, 30, 30)
    blurred = [np.clip(frame.astype(int) + 14, 0, 255).astype(np.uint8) for frame in frames]
    write_video(run.media("real-and-dream.mp4"), side_by_side([("reality", frames), ("dream", blurred)]))
    from PIL import Image

    sheet = np.concatenate([np.concatenate(frames[::4], 1), np.concatenate(blurred[::4], 1)], 0)
    Image.fromarray(sheet.repeat(2, 0).repeat(2, 1)).save(run.media("reconstructions.png"))


def write_scores(run: Run) -> None:
    folder = run.path / "evaluations"
    folder.mkdir()
    for stage, mean in (("best", 780.0), ("dream", 640.0)):
        returns = np.random.default_rng(int(mean)).normal(mean, 120, 32)
        result = score(
            list(returns), reported_seeds(32), env_id="CarRacing-v3", env_version="gymnasium 1.4.0", wall_s=912.0,
            preprocessing="rows 0..83 of 96x96, area resize to 64x64x3 uint8", conditions={}, stage=stage, env_steps=31_000,
        )  # fmt: skip
        (folder / f"{stage}.json").write_text(json.dumps(result))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = new_run(tmp_path / "carracing-quick-1")
    write_metrics(run, two_rounds())
    write_media(run)
    write_scores(run)
    return run


def section(html: str, title: str) -> str:
    """The part of a page below a heading."""
    return html.split(f">{title}</h2>")[1].split("<h2")[0]


def test_the_report_says_what_the_run_holds(run: Run) -> None:
    path = build_report(run)
    html = path.read_text()
    assert path == run.path / "report.html"
    scores = section(html, "Scores")
    best = json.loads((run.path / "evaluations" / "best.json").read_text())
    assert f"{best['mean']:.0f} ± {best['std']:.0f}" in scores and "1 of 6" in scores
    assert (
        f"{best['ci95'][0]:.0f}\u00a0…\u00a0{best['ci95'][1]:.0f}" in scores
        and "CarRacing-v3 (gymnasium 1.4.0)" in scores
    )
    assert "1073741824\u00a0…\u00a01073741855" in scores and "rows 0..83" in scores
    truth = section(html, "Does the dream tell the truth?")
    assert truth.count("exploits the dream") == 1 and truth.count("<svg") == 1
    assert section(html, "Evolution").count("<svg") == 3
    assert "data:video/mp4" in section(html, "Reality and dream")
    assert "data:image/png" in section(html, "V, the eye")
    time = section(html, "Where the time went")
    assert "160,000 env steps, 1,333/s" in time and "1,480 frames/s" in time and "67%" in time
    assert "oneira train carracing-quick" in section(html, "How it was made")
    # everything is inside the file
    assert not re.search(r'(src|href)="(?!data:|#)', html) and "url(http" not in html
    assert path.stat().st_size < 3_000_000


def test_the_same_run_makes_the_same_report(run: Run) -> None:
    assert build_report(run).read_bytes() == build_report(run).read_bytes()


@pytest.mark.parametrize("kept", [0, 40, 200])
def test_an_unfinished_run_has_a_report_too(tmp_path: Path, kept: int) -> None:
    run = new_run(tmp_path / "young")
    write_metrics(run, two_rounds()[:kept])
    assert "not been scored yet" in build_report(run).read_text()


def test_a_dream_score_is_no_real_score(run: Run) -> None:
    place = run.path / "evaluations" / "best.json"
    dreamt = json.loads(place.read_text()) | {"env_id": "oneira/Dream-v0", "mean": 4321.0, "ci95": [4300.0, 4350.0]}
    (place.parent / "dream-best-5-3.json").write_text(json.dumps(dreamt))
    html = build_report(run).read_text(encoding="utf-8")
    before, after = html.split("what they believe and not what they are worth")
    assert "4321" not in before.replace(",", "") and "4321" in after.replace(",", "")


def test_a_damaged_evaluation_is_named(run: Run) -> None:
    (run.path / "evaluations" / "best.json").write_text("{}")
    with pytest.raises(DataError, match=r"best\.json"):
        build_report(run)


def test_wall_time_leaves_out_pauses(tmp_path: Path) -> None:
    """Killed 100 s after its start, resumed 1000 s after it: the line at 1020 s stands at 120 s."""
    run = new_run(tmp_path / "resumed")
    provenance = run.provenance()
    provenance["started"] = [{"time": stamp(0)}, {"time": stamp(1000)}]
    (run.path / "provenance.json").write_text(json.dumps(provenance))
    write_metrics(run, [{"time": t, "stage": "vision", "step": t, "loss": 1.0} for t in (40, 100, 1020)])
    assert [_clock(run)(line) for line in run.metrics()] == pytest.approx([40, 100, 120])


def test_lines_older_than_the_first_start_are_counted(tmp_path):
    """As where stages of another run were copied: the pause before this run's start is none of its work."""
    run = new_run(tmp_path / "run")
    write_metrics(run, [{"time": t, "stage": "fit", "step": t} for t in (-500, -440, 10)])
    assert [_clock(run)(line) for line in run.metrics()] == pytest.approx([0, 60, 70])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_shows_it(run: Run, tmp_path: Path) -> None:
    """As a browser lays it out: charts, film and picture have a size, and nothing runs out of the window."""
    html = build_report(run).read_text()
    probe = """<script>addEventListener('load', () => {
        const shown = [...document.querySelectorAll('figure svg, img, video')];
        const sizes = shown.map(e => Math.round(e.getBoundingClientRect().width));
        document.title = JSON.stringify({sizes, wide: document.documentElement.scrollWidth, window: innerWidth});
    });</script></body>"""
    page = tmp_path / "probed.html"
    page.write_text(html.replace("</body>", probe))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--dump-dom"]
    command += ["--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom).group(1))
    assert len(seen["sizes"]) == 10 and min(seen["sizes"]) > 300 and max(seen["sizes"]) < 1200
    assert seen["wide"] <= seen["window"]


def test_the_share_outside_counts_stages_without_units_too(run):
    stage = {"time": 1, "stage": "stage", "round": 0}
    evolve = {**stage, "step": 3, "name": "evolve", "seconds": 90.0, "core_seconds": 175.0, "cores": 2}
    film = {**stage, "step": 6, "name": "film", "seconds": 10.0, "core_seconds": 0.0, "cores": 2}
    write_metrics(run, [evolve, film])
    assert "12.5%" in _outside(run)  # 25 of 200 core-seconds


def test_conditions_are_told_in_words():
    assert _told({"conditions": {"skill": 4, "frame_skip": 1}}) == "Conditions: skill 4, frame_skip 1. "
    assert _told({"conditions": {}}) == _told({}) == ""
