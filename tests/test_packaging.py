"""The package as others get it: the wheel, an import from it, an import from a bare checkout, `python -m`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("ultraep_compile", "passes", "codegen")
SAY_WHERE = (
    "import ultraep_compile, ultraep_compile.errors, ultraep_compile.passes, ultraep_compile.codegen;"
    "print(ultraep_compile.__file__, ultraep_compile.passes.__file__, ultraep_compile.codegen.__file__)"
)


def run(*arguments: str, folder: Path, path: Path | None = None) -> str:
    """Standard output of Python with these arguments in `folder`; only `path` is added to the imports."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of_the_package() -> set[str]:
    """What the wheel must hold: every file below the three source folders, as it is called once installed."""
    found = set()
    for source in SOURCES:
        inside = "ultraep_compile" if source == "ultraep_compile" else f"ultraep_compile/{source}"
        for folder, folders, files in os.walk(ROOT / source):  # follows no link
            folders[:] = [f for f in folders if f != "__pycache__" and not (Path(folder) / f).is_symlink()]
            below = Path(folder).relative_to(ROOT / source).as_posix()
            found |= {f"{inside}/{below}/{name}".replace("/./", "/") for name in files if name != ".DS_Store"}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked folders: a build writes into its source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run("-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(source), folder=out)
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_is_pure_and_holds_every_file_once(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = next(archive.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    package = [n for n in names if ".dist-info/" not in n]
    assert len(package) == len(set(package))
    assert set(package) == files_of_the_package()
    assert "ultraep = ultraep_compile.backend:ultraep" in entry_points
    assert "ultraep-compile = ultraep_compile.cli:main" in entry_points


def test_it_imports_from_an_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    (tmp_path / "elsewhere").mkdir()
    # -S leaves out site-packages, so that no editable install answers; these modules need nothing else.
    where = run("-S", "-c", SAY_WHERE, folder=tmp_path / "elsewhere", path=tmp_path / "unpacked").split()
    assert all(place.startswith(str(tmp_path / "unpacked" / "ultraep_compile")) for place in where), where


def test_it_imports_from_a_bare_checkout(tmp_path: Path) -> None:
    where = run("-S", "-c", SAY_WHERE, folder=tmp_path, path=ROOT).split()
    assert all(place.startswith(str(ROOT / "ultraep_compile")) for place in where), where


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, ultraep_compile; print('torch' in sys.modules)"
    assert run("-c", code, folder=ROOT).strip() == "False"


def test_doctor_runs_as_a_module(tmp_path: Path) -> None:
    facts = json.loads(run("-m", "ultraep_compile", "doctor", "--json", folder=tmp_path, path=ROOT))
    assert facts["versions"]["torch"] and facts["verdicts"]


def test_untested_versions_are_said_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ultraep_compile import versions

    for version, known in {"2.11.0": True, "2.15.1+cpu": True, "2.10.9": False, "3.0.0a0+git1": False}.items():
        monkeypatch.setattr(versions, "installed", lambda package, v=version: v if package == "torch" else None)
        said = versions.untested.__wrapped__()
        assert bool(said) is not known, version
        assert known or (version in said[0] and "verify" in said[0])
