"""What must hold of the source as a whole."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
FOLDERS = [name for name in ("platform", "generative", "agents", "multimodal", "cluster") if (TOP / name).is_dir()]
SOURCES = sorted(path for folder in FOLDERS for path in (TOP / folder).rglob("*.py"))
MODULES = {
    path: f"oneira.{'.'.join(path.relative_to(TOP).with_suffix('').parts)}".removesuffix(".__init__")
    for path in SOURCES
}

BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "np.save", "numpy.save"}
BANNED_IMPORTS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNFINISHED = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.Module) -> set[str]:
    """Names of all modules that a file imports, inside functions as well."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def problems(tree: ast.Module) -> list[str]:
    found = [f"imports {name}" for name in imported(tree) if name.partition(".")[0] in BANNED_IMPORTS]
    found += [f"imports {name}" for name in imported(tree) & (BANNED_CALLS - {"eval", "exec"})]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in BANNED_CALLS:
            found.append(f"line {node.lineno} calls {name}")
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg == "shell" and value is not False) or (
                keyword.arg == "allow_pickle" and value is not False
            ):
                found.append(f"line {node.lineno} gives {keyword.arg}={ast.unparse(keyword.value)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(TOP)))
def test_nothing_banned(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not problems(ast.parse(text))
    assert not [word for word in UNFINISHED if word in text]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from torch import load", "torch.load(x)", "def f():\n    eval('1')", "yaml.load(x)",
        "subprocess.run('ls', shell=True)", "np.load(x, allow_pickle=True)", "import cloudpickle as c",
    ],
)  # fmt: skip
def test_the_ban_finds_what_it_must(text: str) -> None:
    assert problems(ast.parse(text))


@pytest.mark.parametrize(
    "text", ["model.eval()", "safetensors.torch.load(x)", "np.load(x)", "run(['ls'], shell=False)"]
)
def test_the_ban_lets_pass_what_it_may(text: str) -> None:
    assert not problems(ast.parse(text))


def test_only_cluster_imports_ray() -> None:
    importers = {path for path in SOURCES if any(name.partition(".")[0] == "ray" for name in imported(parse(path)))}
    assert all(path.is_relative_to(TOP / "cluster") for path in importers), importers


def test_platform_stays_a_namespace_and_the_standard_library_wins() -> None:
    assert not (TOP / "platform/__init__.py").exists() and not (TOP / "tests/platform/__init__.py").exists()
    script = (
        "import platform, sys, oneira\nassert platform.python_implementation() and not hasattr(oneira, '__file__') "
        "or oneira.__file__ is None\nimport oneira.platform.errors\nprint(platform.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).is_relative_to(TOP / "platform")
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/platform/test_errors.py"],
        cwd=TOP, capture_output=True, text=True,
    )  # fmt: skip
    assert collected.returncode == 0, collected.stdout + collected.stderr


def test_everything_but_cluster_works_without_ray() -> None:
    """Ray is blocked, then every module outside of cluster is imported, in one process."""
    names = [name for path, name in MODULES.items() if not path.is_relative_to(TOP / "cluster")]
    script = (
        "import importlib, sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'ray':\n"
        "            raise ModuleNotFoundError(f'{name} is blocked', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "for name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *names], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layers() -> None:
    """The rules of pyproject.toml's [tool.importlinter]: who may import whom."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache"], cwd=TOP, env={**os.environ, "PYTHONPATH": ".typing"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checkers_see_every_folder() -> None:
    for folder in FOLDERS:
        link = TOP / ".typing/oneira" / folder
        assert link.is_symlink() and link.resolve() == TOP / folder


def test_every_entry_point_leads_somewhere() -> None:
    import importlib
    import tomllib

    groups = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["entry-points"]
    for group in groups.values():
        for value in group.values():
            module, _, name = value.partition(":")
            if module.startswith("oneira.cluster"):
                pytest.importorskip("ray")
            assert callable(getattr(importlib.import_module(module), name)), value
