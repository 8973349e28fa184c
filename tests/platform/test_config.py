from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneira.platform.config import difference, from_dict, override, to_dict
from oneira.platform.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 10
    rate: float = 0.5
    kind: Literal["full", "separable"] = "full"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "x"
    seed: int | None = None
    fast: bool = True
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    inner: Inner = field(default_factory=Inner)
    rounds: tuple[Inner, ...] = ()


inners = st.builds(
    Inner,
    steps=st.integers(1, 2**80),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    kind=st.sampled_from(["full", "separable"]),
)
outers = st.builds(
    Outer,
    name=st.text(),
    seed=st.none() | st.integers(),
    fast=st.booleans(),
    sizes=st.lists(st.integers()).map(tuple),
    pair=st.tuples(st.integers(), st.text()),
    inner=inners,
    rounds=st.lists(inners, max_size=3).map(tuple),
)


@given(outers)
def test_there_and_back_through_json(config: Outer) -> None:
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


@given(outers, outers)
def test_difference_is_empty_exactly_for_equal_configs(a: Outer, b: Outer) -> None:
    assert not difference(a, a)
    assert bool(difference(a, b)) == (a != b)


@given(inners)
def test_what_a_person_types_is_read_as_the_type_of_the_key(inner: Inner) -> None:
    texts = {"inner.steps": str(inner.steps), "inner.rate": repr(inner.rate), "inner.kind": inner.kind}
    assert override(Outer(), texts).inner == inner


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "none", None),
        ("seed", "7", 7),
        ("fast", "False", False),
        ("sizes", "3,4,5", (3, 4, 5)),
        ("sizes", "[3, 4]", (3, 4)),
        ("sizes", "", ()),
        ("pair", "2,b", (2, "b")),
        ("name", "none", "none"),
    ],
)
def test_texts(key: str, text: str, value: object) -> None:
    assert getattr(override(Outer(), {key: text}), key) == value


def test_counts_may_be_written_with_exponents() -> None:
    assert override(Outer(), {"inner.steps": "1e6"}).inner.steps == 1_000_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inner.step": "3"}, ["inner.step", "Did you mean 'steps'"]),
        ({"iner.steps": "3"}, ["iner", "Did you mean 'inner'"]),
        ({"name.x": "3"}, ["'name' is not a group"]),
        ({"inner": "3"}, ["group of settings", "steps"]),
        ({"inner.steps": "many"}, ["inner.steps", "int", "'many'"]),
        ({"inner.steps": "1.5"}, ["inner.steps", "int"]),
        ({"inner.steps": "0"}, ["inner", "at least 1"]),
        ({"inner.rate": "nan"}, ["inner.rate", "finite"]),
        ({"inner.kind": "ful"}, ["Did you mean 'full'", "separable"]),
        ({"fast": "maybe"}, ["fast", "true or false"]),
        ({"seed": "x"}, ["seed", "int or none", "'x'"]),
        ({"pair": "1"}, ["pair", "2 values"]),
        ({"sizes": "[1"}, ["sizes", "not a list"]),
        ({"inner.steps": True}, ["inner.steps", "int", "bool"]),
    ],
)
def test_a_bad_override_names_key_value_and_what_is_allowed(changes: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        override(Outer(), changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_mapping_with_unknown_or_missing_keys_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needs:
        size: int

    with pytest.raises(ConfigError, match=r"Unknown key 'sizes'\. Did you mean 'size'"):
        from_dict(Needs, {"sizes": 3})
    with pytest.raises(ConfigError, match="Missing key 'size'"):
        from_dict(Needs, {})
    with pytest.raises(ConfigError, match=r"rounds\.1\.steps"):
        from_dict(Outer, {"rounds": [{}, {"steps": "3"}]})


def test_keys_of_one_group_are_validated_together() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Span:
        low: int = 0
        high: int = 10

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ConfigError("low is above high")

    assert override(Span(), {"low": "20", "high": "30"}) == Span(low=20, high=30)
    with pytest.raises(ConfigError, match="low is above high"):
        override(Span(), {"low": "20"})


def test_groups_in_a_tuple_are_reached_by_their_place():
    config = Outer(rounds=(Inner(), Inner(steps=20)))
    changed = override(config, {"rounds.1.steps": "30", "rounds.1.kind": "separable", "rounds.0.rate": "2"})
    assert changed.rounds == (Inner(rate=2.0), Inner(steps=30, kind="separable"))
    with pytest.raises(ConfigError, match="holds 2 groups, 0 to 1"):
        override(config, {"rounds.2.steps": "1"})
    with pytest.raises(ConfigError, match="Did you mean 'steps'"):
        override(config, {"rounds.0.step": "1"})
