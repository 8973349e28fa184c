"""Builds a report: one HTML file with everything inside (styles, charts, pictures, videos), readable by light and by dark.

    page = Report("carracing-quick", "a world model and a controller trained in its dream")
    page.section("Scores", "On tracks that were not used in training.")
    page.tiles({"real score": "742 ± 31"})
    page.table(["stage", "mean"], [["dream", 512.3]])
    page.chart({"loss": (steps, losses)}, xlabel="step", ylabel="loss")
    page.video(run.media("drive.mp4"), "The controller on track 2^30")
    page.write(run.report_path)

Charts are SVG whose ink is the page's text colour, so that they follow the theme.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import write_replacing
from .console import show
from .errors import DataError

INK = "#010203"  # stands for the page's text colour until the SVG is written
COLOURS = ("#3b82c4", "#d9822b", "#3f9c6b", "#b5548f", "#8a6fd1", "#8c8c3c")
MIME = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}

STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #ffffff; --ink: #1d2430; --soft: #667085; --line: #e4e4df; --accent: #3b6fb0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --card: #1c2027; --ink: #e6e8ec; --soft: #98a2b3; --line: #2f353f; --accent: #86b3ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
.subtitle { color: var(--soft); font-size: 1.1rem; margin: .4rem 0 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: .6rem 0; border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
nav a { color: var(--accent); text-decoration: none; } nav a:hover { text-decoration: underline; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .4rem; } h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p { margin: .4rem 0 1rem; max-width: 46rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.tile .name { color: var(--soft); font-size: .85rem; } .tile .value { font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: var(--soft); font-size: .87rem; padding-top: .5rem; }
th, td { text-align: left; padding: .4rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } .number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: .87rem; margin-top: .4rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: .8rem; } .grid figure { margin: 0; }
img, video, figure svg { max-width: 100%; height: auto; display: block; border-radius: 6px; } .pixels { image-rendering: pixelated; }
figure svg { color: var(--ink); width: 100%; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
"""


class Report:
    """A page that is built from top to bottom. All texts are escaped."""

    def __init__(self, title: str, subtitle: str = ""):
        self.title, self.subtitle = title, subtitle
        self.parts: list[str] = []
        self.sections: list[str] = []
        self.charts = 0

    def section(self, title: str, text: str = "") -> None:
        """A heading, with an entry in the navigation, and a paragraph below it."""
        self.sections.append(title)
        self.parts.append(f'<h2 id="section-{len(self.sections)}">{_text(title)}</h2>')
        if text:
            self.text(text)

    def heading(self, title: str) -> None:
        """A smaller heading inside a section."""
        self.parts.append(f"<h3>{_text(title)}</h3>")

    def text(self, text: str) -> None:
        """Paragraphs, separated by empty lines."""
        self.parts += [f"<p>{_text(paragraph)}</p>" for paragraph in re.split(r"\n\s*\n", text.strip())]

    def tiles(self, values: Mapping[str, Any]) -> None:
        """The few numbers that matter most, large."""
        tiles = [
            f'<div class="tile"><div class="name">{_text(name)}</div><div class="value">{_text(show(value))}</div></div>'
            for name, value in values.items()
        ]
        self.parts.append(f'<div class="tiles">{"".join(tiles)}</div>')

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
        """A table; columns that hold only numbers stand to the right."""
        numeric = [all(_is_number(row[i]) for row in rows) and bool(rows) for i in range(len(columns))]

        def line(tag: str, cells: Sequence[Any]) -> str:
            marks = [' class="number"' if right else "" for right in numeric]
            written = [f"<{tag}{mark}>{_text(show(cell))}</{tag}>" for cell, mark in zip(cells, marks, strict=True)]
            return f"<tr>{''.join(written)}</tr>"

        body = "".join(line("td", row) for row in rows)
        below = f"<caption>{_text(caption)}</caption>" if caption else ""
        self.parts.append(
            f'<div class="scroll card"><table>{below}<thead>{line("th", columns)}</thead><tbody>{body}</tbody></table></div>'
        )

    def facts(self, values: Mapping[str, Any], caption: str = "") -> None:
        """A table of two columns without a head: names and values."""
        rows = "".join(
            f"<tr><th>{_text(name)}</th><td>{_text(show(value))}</td></tr>" for name, value in values.items()
        )
        below = f"<caption>{_text(caption)}</caption>" if caption else ""
        self.parts.append(f'<div class="scroll card"><table>{below}<tbody>{rows}</tbody></table></div>')

    def details(self, title: str, text: str) -> None:
        """Preformatted text that unfolds on a click, such as a config."""
        self.parts.append(f"<details><summary>{_text(title)}</summary><pre>{_text(text)}</pre></details>")

    def chart(
        self,
        series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        *,
        title: str = "",
        xlabel: str = "",
        ylabel: str = "",
        caption: str = "",
        bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
        levels: Mapping[str, float] | None = None,
        log_y: bool = False,
    ) -> None:
        """Lines {name: (x, y)}, with bands {name: (low, high)} around some of them and level lines {name: y} across."""
        from matplotlib.figure import Figure

        with chart_style():
            figure = Figure(figsize=(7.2, 3.2), layout="constrained")
            axes = figure.subplots()
            for (name, (x, y)), colour in zip(series.items(), _cycle(), strict=False):
                axes.plot(x, y, label=name, color=colour, marker="o" if len(x) < 2 else None)
                if bands and name in bands:
                    axes.fill_between(x, *bands[name], color=colour, alpha=0.18, linewidth=0)
            for name, level in (levels or {}).items():
                axes.axhline(level, color=INK, alpha=0.5, linestyle="--", linewidth=1)
                axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
            if log_y:
                axes.set_yscale("log")
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
            if len(series) > 1:
                axes.legend(frameon=False)
            self.figure(figure, caption)

    def figure(self, figure: Any, caption: str = "") -> None:
        """A matplotlib figure, as SVG; made under `chart_style()` it follows the theme."""
        self.charts += 1
        with chart_style(salt=f"oneira-{self.charts}"):
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
        self.parts.append(_figure(f'<div class="card">{svg}</div>', caption))

    def image(self, picture: str | Path | np.ndarray, caption: str = "", *, scale: int = 1) -> None:
        """A picture file, or uint8 [H, W, 3] (or [H, W]); `scale` enlarges it in whole pixels."""
        self.parts.append(_figure(_image_tag(picture, caption, scale), caption))

    def images(self, pictures: Sequence[tuple[str | Path | np.ndarray, str]], *, scale: int = 1) -> None:
        """Pictures with captions, side by side."""
        figures = "".join(_figure(_image_tag(picture, caption, scale), caption) for picture, caption in pictures)
        self.parts.append(f'<div class="grid">{figures}</div>')

    def video(self, path: str | Path, caption: str = "") -> None:
        """An MP4 (H.264, yuv420p plays everywhere) or WebM file."""
        self.parts.append(_figure(_video_tag(Path(path)), caption))

    def videos(self, paths: Sequence[tuple[str | Path, str]]) -> None:
        """Videos with captions, side by side."""
        figures = "".join(_figure(_video_tag(Path(path)), caption) for path, caption in paths)
        self.parts.append(f'<div class="grid">{figures}</div>')

    def html(self) -> str:
        """The whole page."""
        links = [f'<a href="#section-{i}">{_text(title)}</a>' for i, title in enumerate(self.sections, start=1)]
        subtitle = f'<p class="subtitle">{_text(self.subtitle)}</p>' if self.subtitle else ""
        body = "\n".join(self.parts)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_text(self.title)}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<header><h1>{_text(self.title)}</h1>{subtitle}</header>\n"
            f"<nav>{''.join(links)}</nav>\n{body}\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Writes the page, whole or not at all. Raises DataError when the disk refuses."""
        path = Path(path)
        try:
            write_replacing(path, self.html().encode())
        except OSError as error:
            raise DataError(f"Cannot write the report '{path}': {error.strerror or error}.") from error
        return path


@contextmanager
def chart_style(salt: str = "oneira") -> Iterator[None]:
    """matplotlib settings for figures of a report: no box, soft grid, ink that follows the page's theme."""
    import matplotlib as mpl
    from cycler import cycler

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 10,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": INK, "grid.alpha": 0.12,
        "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "lines.linewidth": 1.6,
        "axes.prop_cycle": cycler(color=COLOURS), "figure.facecolor": "none", "axes.facecolor": "none",
    }  # fmt: skip
    with mpl.rc_context(settings):
        yield


def _cycle() -> Iterator[str]:
    while True:
        yield from COLOURS


def _text(value: Any) -> str:
    return html.escape(str(value))


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float, np.number)) and not isinstance(value, bool))


def _figure(inner: str, caption: str) -> str:
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f"<figure>{inner}{below}</figure>"


def _data_uri(path: Path) -> str:
    if path.suffix.lower() not in MIME:
        raise DataError(f"'{path}' cannot stand in a report; allowed are: {', '.join(MIME)}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read for the report: {error.strerror or error}.") from error
    return f"data:{MIME[path.suffix.lower()]};base64,{base64.b64encode(data).decode()}"


def _image_tag(picture: str | Path | np.ndarray, caption: str, scale: int) -> str:
    if isinstance(picture, np.ndarray):
        from PIL import Image

        if picture.dtype != np.uint8:
            raise TypeError(f"a picture must be uint8 [H, W, 3] or [H, W], not {picture.dtype} {picture.shape}")
        buffer = io.BytesIO()
        Image.fromarray(picture.repeat(scale, axis=0).repeat(scale, axis=1)).save(buffer, format="png")
        source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    else:
        source = _data_uri(Path(picture))
    return f'<img class="pixels" src="{source}" alt="{_text(caption)}">'


def _video_tag(path: Path) -> str:
    return f'<video controls loop muted playsinline src="{_data_uri(path)}"></video>'
