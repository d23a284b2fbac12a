"""The job scripts as texts: they parse, refuse clearly, and delete nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moue_dist.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOBS = [script for script in SCRIPTS if script.name != "common.sh"]


def name(script: Path) -> str:
    return script.name


def run(script: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(["bash", script, "--train.steps", "1"], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        found = subprocess.run(
            ["shellcheck", "-s", "bash", "-x", "-P", ROOT, script], cwd=ROOT, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", JOBS, ids=name)
def test_job_script_is_safe(script: Path) -> None:
    text = script.read_text()
    assert "set -euo pipefail" in text and "#SBATCH --requeue" in text and re.search(r"#SBATCH --output=.*%j", text)
    code = "\n".join(line for line in (text + (ROOT / "slurm/common.sh").read_text()).splitlines() if line[:1] != "#")
    assert not re.search(r"\b(rm|rmdir|mv|git)\s", code)
    assert '"$@"' in code
    (config,) = re.findall(r"MOUE_CONFIG:-([\w./]+)", text)
    assert load_config(config)


@pytest.mark.parametrize("script", JOBS, ids=name)
def test_job_script_refuses_with_a_reason(script: Path, tmp_path: Path) -> None:
    for environment, reason in [
        ({}, "run this with sbatch"),
        ({"SLURM_SUBMIT_DIR": str(tmp_path)}, "submit from the folder that holds slurm/"),
        ({"SLURM_SUBMIT_DIR": str(ROOT), "MOUE_PYTHON": "/nowhere/python"}, "run 'make setup'"),
    ]:
        done = run(script, **environment)
        assert done.returncode != 0 and reason in done.stderr, (reason, done.stderr)
