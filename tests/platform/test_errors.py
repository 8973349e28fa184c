import pytest

from oneira.platform import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("OneiraError", 1),
        ("UsageError", 2),
        ("ConfigError", 2),
        ("DataError", 3),
        ("CheckpointError", 3),
        ("NumericalError", 3),
        ("EnvironmentMissing", 4),
        ("ClusterError", 4),
        ("Interrupted", 75),
    ],
)
def test_exit_codes(kind: str, code: int) -> None:
    error = getattr(errors, kind)("why")
    assert isinstance(error, errors.OneiraError) and error.exit_code == code


def test_nearest_name_and_all_allowed_ones() -> None:
    text = errors.did_you_mean("popsise", ["sigma0", "popsize"])
    assert text == "Did you mean 'popsize'? Allowed: popsize, sigma0."
    assert errors.did_you_mean("zzz", ["popsize"]) == "Allowed: popsize."


def test_of_many_names_the_most_alike_are_listed() -> None:
    text = errors.did_you_mean("preset-1O", [f"preset-{n}" for n in range(60)])
    assert text.startswith("Did you mean 'preset-1") and text.endswith(" and 52 more.") and text.count("preset-") == 9
    assert "more" not in errors.did_you_mean("x", [f"preset-{n}" for n in range(errors.MOST_NAMED)])
