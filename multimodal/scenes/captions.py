"""Scenes in English. The words of a caption are drawn from the scene's index, like the scene itself.

A caption always names shapes and colours; sizes, background and relation may be left out. `variant` asks for another
wording of the same scene.
"""

from __future__ import annotations

import re
from itertools import chain

from .attributes import (
    GROUP,
    LIST,
    RELATION,
    SINGLE,
    Scenes,
    below,
    stream_of,
)

SHAPE_WORDS = (
    ("circle", "disc", "circle"), ("square", "square", "box"), ("triangle",), ("diamond", "diamond", "rhombus"),
    ("star",), ("heart",), ("cross", "cross", "plus sign"), ("ring", "ring", "hoop"),
)  # fmt: skip
COLOUR_WORDS = (
    ("red",), ("orange",), ("yellow",), ("green",), ("cyan", "cyan", "turquoise"), ("blue",),
    ("purple", "purple", "violet"), ("pink",), ("brown",), ("gray", "grey"),
)  # fmt: skip
SIZE_WORDS = (("small", "little", "tiny"), ("medium", "medium sized", "mid sized"), ("large", "big", "huge"))
RELATION_WORDS = (
    ("left of", "to the left of", "on the left of"), ("right of", "to the right of", "on the right of"),
    ("above", "higher than", "over"), ("below", "under", "beneath", "underneath"),
)  # fmt: skip
BACKGROUND_WORDS = (("white",), ("black",), ("cream", "beige"), ("navy", "dark blue"), ("mint",), ("lavender",))
OPENINGS = ("", "", "", "a picture of ", "an image of ", "a drawing of ", "there is ", "a photo of ")
GROUNDS = (" on a {} background", " on a {} background", " against a {} backdrop", " on {}", ", {} background")
COUNTS = ("", "", "two", "three")
PLURALS = {"box": "boxes", "cross": "crosses", "rhombus": "rhombuses"}
CAPTION = 17  # sets the words' random numbers apart from the scene's own


def captions(scenes: Scenes, variant: int = 0, *, full: bool = False) -> list[str]:
    """One English caption a scene, in small letters.

    Args:
        variant: another number, other words. full: leave out nothing that the scene has.
    """
    return [_Words(scenes, n, variant, full).caption() for n in range(len(scenes))]


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    named = chain(
        *SHAPE_WORDS, *COLOUR_WORDS, *SIZE_WORDS, *RELATION_WORDS, *BACKGROUND_WORDS, OPENINGS, GROUNDS, COUNTS,
        (_plural(word) for words in SHAPE_WORDS for word in words),
        ("a an with and the there are one",),
    )  # fmt: skip
    return sorted(set(chain.from_iterable(re.findall(r"[a-z]+", text) for text in named)))


def _plural(noun: str) -> str:
    return PLURALS.get(noun, f"{noun}s")


def with_article(phrase: str) -> str:
    """ "an orange star" """
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


class _Words:
    """Words for one scene, chosen by numbers of its own."""

    def __init__(self, scenes: Scenes, n: int, variant: int, full: bool):
        self.scenes, self.n, self.full = scenes, n, full
        self.stream = stream_of(variant, CAPTION, max(int(scenes.index[n]), 0))
        self.with_sizes = full or self.lot(10) < 6

    def lot(self, limit: int) -> int:
        return below(self.stream, limit)

    def one_of(self, words: tuple[str, ...]) -> str:
        return words[self.lot(len(words))] if len(words) > 1 else words[0]

    def caption(self) -> str:
        kind = self.scenes.kind[self.n]
        opening = self.one_of(OPENINGS)
        if kind == GROUP and opening == "there is ":
            opening = "there are "
        body = {SINGLE: self.single, RELATION: self.relation, GROUP: self.group, LIST: self.list}[int(kind)]()
        return f"{opening}{body}{self.background()}"

    def thing(self, o: int) -> str:
        """ "small red circle" """
        s, n = self.scenes, self.n
        words = [self.one_of(COLOUR_WORDS[s.colour[n, o]]), self.one_of(SHAPE_WORDS[s.shape[n, o]])]
        if self.with_sizes:
            words.insert(0, self.one_of(SIZE_WORDS[s.size[n, o]]))
        return " ".join(words)

    def single(self) -> str:
        return with_article(self.thing(0)) if self.lot(8) else f"one {self.thing(0)}"

    def group(self) -> str:
        words = self.thing(0).split(" ")
        return " ".join([COUNTS[self.scenes.count[self.n]], *words[:-1], _plural(words[-1])])

    def list(self) -> str:
        first, second, third = (with_article(self.thing(o)) for o in range(3))
        return f"{first}, {second} and {third}" if self.lot(2) else f"{first} and {second} and {third}"

    def relation(self) -> str:
        relation = int(self.scenes.relation[self.n])
        a, b = with_article(self.thing(0)), with_article(self.thing(1))
        if self.lot(3) == 0:  # the same said from the other's side
            a, b, relation = b, a, relation ^ 1
        if not self.full and self.lot(6) == 0:
            return f"{a} and {b}" if self.lot(2) else f"{a} with {b}"
        return f"{a} {self.one_of(RELATION_WORDS[relation])} {b}"

    def background(self) -> str:
        if not self.full and self.lot(2):
            return ""
        return self.one_of(GROUNDS).format(self.one_of(BACKGROUND_WORDS[self.scenes.background[self.n]]))
