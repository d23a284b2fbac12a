"""One Slurm cluster of two nodes for all tests here, or a skip that says what it needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(f"a Slurm cluster {reason}")
    with Cluster() as made:
        made.environment["MOUE_PYTHON"] = sys.executable
        yield made
