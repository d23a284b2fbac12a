"""The wheel stands alone: built from the tracked files, installed in a fresh environment, used in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.ranks.spawn import ROOT

PARTS = ("pyproject.toml", "README.md", "LICENSE", "moue_dist", "parallel", "kernels", "launchers", "configs", "slurm")


def run(*words: str | Path, cwd: Path) -> str:
    """In an environment without PYTHONPATH: pip would take the checkout that it names for the package installed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, where no earlier build has left anything."""
    tree = tmp_path_factory.mktemp("tree")
    for name in PARTS:
        at = ROOT / name
        if at.is_dir():
            shutil.copytree(at, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(at, tree)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--wheel-dir", tree / "dist", ".", cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and, by a path file, the packages of this one, but not this one's moue-dist."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    made = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", made)
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel, cwd=folder)
    packages = Path(run(made, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "others.pth").write_text("\n".join(sorted(others)))
    return made


def test_everything_is_in_it_as_a_real_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        kept = {info.filename: info for info in archive.infolist()}
    inside = {
        **{f"moue_dist/{room}": f"{room}" for room in ("parallel", "kernels", "launchers", "configs", "slurm")},
        "moue_dist": "moue_dist",
    }
    for place, folder in inside.items():
        files = [f for f in (ROOT / folder).rglob("*") if f.is_file() and f.suffix in (".py", ".yaml", ".sh", ".typed")]
        wanted = {f"{place}/{f.relative_to(ROOT / folder)}" for f in files}
        assert wanted and wanted <= set(kept), wanted - set(kept)
    assert not any(info.external_attr >> 28 == 0o12 for info in kept.values()), "a symlink"
    assert not any(name.startswith(("tests/", "parallel/", "configs/", "benchmarks/")) for name in kept)
    assert kept["moue_dist/slurm/moue_7b.sh"].external_attr >> 16 & 0o100, "job scripts can be run"


def test_it_works_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    moue = python.with_name("moue")
    assert run(moue, "--version", cwd=tmp_path).strip() == "0.1.0"
    assert "tiny: rank grid" in run(moue, "plan", "tiny", cwd=tmp_path)
    code = (
        "from importlib.util import find_spec\n"
        "import moue_dist.config.load, moue_dist.parallel.mesh, moue_dist.launchers.env\n"
        "for name in ('moue_dist', 'moue_dist.parallel.mesh', 'moue_dist.kernels.backend', 'moue_dist.launchers.env',\n"
        "             'megatron.core'):\n"
        "    print(find_spec(name).origin)\n"
    )
    *ours, megatron = map(Path, run(python, "-c", code, cwd=tmp_path).split())
    assert all(path.is_relative_to(python.parents[1]) and path.resolve() == path for path in ours), ours
    assert not megatron.is_relative_to(python.parents[1]), "installed packages are found, not installed again"
    assert list(tmp_path.iterdir()) == []


def test_its_job_scripts_can_be_copied_out(python: Path, tmp_path: Path) -> None:
    """They then run from any folder: up to the call of srun, which is the test's own and tells what it was given."""
    where = "import moue_dist, pathlib; print(pathlib.Path(moue_dist.__file__).with_name('slurm'))"
    shutil.copytree(run(python, "-c", where, cwd=tmp_path).strip(), tmp_path / "slurm")
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    environment = {
        "PATH": f"{srun.parent}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "a", "MOUE_PYTHON": str(python),
    }  # fmt: skip
    words = ["bash", tmp_path / "slurm" / "moue_7b.sh", "--train.steps", "3"]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1].split()
    assert said[said.index("-m") + 1 :] == ["moue_dist.launchers.slurm", "train", "moue_7b", "--train.steps", "3"]
    assert "moue_7b: rank grid" in run(python.with_name("moue"), "plan", *said[said.index("train") + 1 :], cwd=tmp_path)
