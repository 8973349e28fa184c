from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import imageio
import numpy as np
import pytest

from oneira.platform.errors import DataError
from oneira.platform.report import Report

VOID = {"meta", "img", "br", "link", "input"}


class Outline(HTMLParser):
    """Checks that every tag is closed, and collects tags and addresses."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attributes if key in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def build(tmp_path: Path) -> Report:
    frames = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    imageio.mimwrite(tmp_path / "drive.mp4", frames, fps=10, macro_block_size=16)
    page = Report("A <run>", "& its score")
    page.section("Scores", "First.\n\nSecond <script>alert(1)</script>.")
    page.tiles({"mean": 742.4, "solved": False})
    page.table(["stage", "mean"], [["dream <1>", 512.345], ["real", None]], "with conditions")
    x = np.arange(20)
    page.chart(
        {"a": (x, x**2), "b": (x, x)}, bands={"a": (x**2 - 1, x**2 + 1)}, levels={"solved": 90}, caption="Curves"
    )
    page.image(frames[0], "real", scale=2)
    page.images([(frames[1], "one"), (frames[2, :, :, 0], "grey")])
    page.video(tmp_path / "drive.mp4", "driving")
    page.details("Config", '{"seed": 1}')
    return page


def test_the_page_is_whole_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = build(tmp_path).write(tmp_path / "report.html").read_text()
    outline = Outline(page)
    assert {"svg", "table", "video", "img", "details", "nav"} <= set(outline.tags)
    assert all(address.startswith(("data:", "#")) for address in outline.addresses)
    assert not re.findall(r"url\((?!#)", page)
    assert "<script>" not in page and "A &lt;run&gt;" in page and "prefers-color-scheme: dark" in page


def test_charts_take_the_ink_of_the_page(tmp_path: Path) -> None:
    page = build(tmp_path).html()
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert "currentColor" in svg and "#010203" not in page and "#000000" not in svg
    assert ">solved<" in svg  # texts stay texts


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    assert build(tmp_path).html() == build(tmp_path).html()


def test_what_cannot_be_shown_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.mp4"):
        Report("x").video(tmp_path / "absent.mp4")
    with pytest.raises(DataError, match=r"x\.exe"):
        Report("x").image(tmp_path / "x.exe")
    with pytest.raises(TypeError, match="uint8"):
        Report("x").image(np.zeros((2, 2)))
