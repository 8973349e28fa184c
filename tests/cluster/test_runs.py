"""A whole run over Ray gives what it gives without."""

import subprocess


def test_a_run_over_ray_has_the_same_bytes_as_one_without(undisturbed, command, weights, tmp_path):
    words = ["ray" if word == "serial" else word for word in command(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run") == weights(undisturbed[0])
