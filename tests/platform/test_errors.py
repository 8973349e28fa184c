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
