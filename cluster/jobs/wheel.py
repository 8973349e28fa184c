"""The code of this installation as a wheel, named after its content: what a cluster has it need not be sent again.

It is written here rather than by a build tool, so that the same files give the same bytes, a checkout needs no build, and
nothing is fetched: the wheel names no dependencies, which the cluster's own Oneira or its image brings.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("platform", "generative", "agents", "multimodal", "cluster")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip can name


def build_wheel(folder: Path) -> Path:
    """Writes the wheel into `folder`, unless it is there, and returns its path: oneira-VERSION+DIGEST-py3-none-any.whl."""
    files = code_files()
    listed = "".join(f"{name}\0{hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(files.items()))
    version = f"{metadata.version('oneira').partition('+')[0]}+{hashlib.sha256(listed.encode()).hexdigest()[:20]}"
    path = folder / f"oneira-{version}-py3-none-any.whl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        writing = folder / f".{path.name}"
        writing.write_bytes(_zipped(_with_metadata(files, version)))
        writing.rename(path)
    return path


def code_files() -> dict[str, bytes]:
    """{path in the wheel: bytes} of all that is imported or read of the packages, and the entry points."""
    files: dict[str, bytes] = {}
    for package in PACKAGES:
        spec = find_spec(f"oneira.{package}")
        places = list(spec.submodule_search_locations or []) if spec else []
        for place in map(Path, places[:1]):
            for path in place.rglob("*"):
                inner = path.relative_to(place)
                if path.is_file() and not any(part.startswith(("__pycache__", ".")) for part in inner.parts):
                    files[f"oneira/{package}/{inner.as_posix()}"] = path.read_bytes()
    points = metadata.distribution("oneira").read_text("entry_points.txt") or ""
    files["entry_points.txt"] = points.encode()
    return files


def _with_metadata(files: Mapping[str, bytes], version: str) -> dict[str, bytes]:
    info = f"oneira-{version}.dist-info"
    whole = {f"{info}/{name}" if name == "entry_points.txt" else name: data for name, data in files.items()}
    whole[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: oneira\nVersion: {version}\n".encode()
    whole[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: oneira\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    lines = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in sorted(whole.items())]
    whole[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"]).encode()
    return whole


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
