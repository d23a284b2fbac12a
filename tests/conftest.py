"""What every test shares: the environment, the ranks, and honest skips."""

from __future__ import annotations

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # read by torch at import
os.environ.setdefault("MPLBACKEND", "Agg")
for _name in [n for n in os.environ if n.startswith(("SLURM_", "OMPI_", "PMI", "TORCHELASTIC_"))]:
    del os.environ[_name]  # a test run inside a job is not a rank of that job
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are shared with the other workers

from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from tests.ranks.spawn import RankPool  # noqa: E402


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(4).run(fn, ...)`: pools that the whole session shares, one for each number of ranks.

    A single rank and the world used last stay up. Others are closed: gloo's threads poll, and idle ranks would take
    the cores from those at work. Starting again costs a fifth of a second.
    """
    pools: dict[int, RankPool] = {}

    def of(world: int) -> RankPool:
        for other in [w for w in pools if w not in (1, world)]:
            if world != 1:
                pools.pop(other).close()
        return pools.setdefault(world, RankPool(world))

    yield of
    for pool in pools.values():
        pool.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", action="store_true", help="every placement x pipeline x expert ranks x microbatches x recompute"
    )
    parser.addoption("--random", type=int, default=0, metavar="N", help="N layouts of home and hybrid at random")


# What one worker runs alone, one after the other, where `make test` has several; other files are groups of their own.
GROUPS = {
    "tests/gpu": "gpu",  # they share the device's memory
    "tests/cpu/parallel/test_host_adam.py": "host_adam",  # one breaks off a build that the other would wait for
    "tests/ranks/test_host_adam_ranks.py": "host_adam",
}
# Workers take files in this order, so that the long ones are not the last: those that start whole programs and wait,
# then those that start ranks, then the rest.
LONG = (
    "test_jobs.py",
    "test_faults.py",
    "test_host_adam.py",
    "test_host_adam_ranks.py",
    "test_resume.py",
    "test_bench.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests in tests/gpu and tests/slurm carry their marker by their folder; GPU tests skip without a device."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _place_in_line(item.path.relative_to(config.rootpath)))
    for item in items:
        path = item.path.relative_to(config.rootpath).as_posix()
        group = next((name for start, name in GROUPS.items() if path.startswith(start)), path)
        item.add_marker(pytest.mark.xdist_group(group))
        for marker in ("gpu", "slurm"):
            if marker in item.path.parent.parts:
                item.add_marker(marker)
    if on_gpu := [item for item in items if item.get_closest_marker("gpu")]:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _place_in_line(path: Path) -> int:
    if path.name in LONG:
        return LONG.index(path.name)
    return len(LONG) + ("ranks" not in path.parts)
