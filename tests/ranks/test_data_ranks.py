"""build_datasets as a collective: rank 0 builds the indices, the others wait and read the same samples."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from moue_dist.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig
from moue_dist.data.batches import Batches
from moue_dist.data.corpus import prepare_corpus
from moue_dist.data.datasets import build_datasets
from moue_dist.data.prepare.run import Request, prepare


def build(folder: str, config: Config, private: bool = False) -> list[list[int]] | str:
    """This rank's rows of step 3, or the refusal. private: ranks keep folders of their own, as on unshared disks."""
    mine = Path(folder) / (f"rank{dist.get_rank()}" if private else "shared")
    if not config.data.blend and (private or dist.get_rank() == 0):
        prepare_corpus(config.data, mine, show_progress=False)
    dist.barrier()
    if private and dist.get_rank() == 0:
        shutil.move(mine, f"{mine}-moved")  # rank 1 still sees its own corpus, and nobody rank 0's
    dist.barrier()
    try:
        train, valid = build_datasets(config, mine, 64, 16)
    except ConfigError as error:
        return str(error)
    batches = Batches(train, valid, config)
    rows = [row for batch in batches.microbatches(3, dist.get_rank(), 2) for row in batch["tokens"].tolist()]
    batches.close()
    return rows


def test_two_ranks_split_one_global_batch(ranks, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("\n".join(f"line {i}" for i in range(2000)))
    config = Config(
        model=ModelConfig(sequence_length=16),
        train=TrainConfig(global_batch_size=8, micro_batch_size=2),
        data=DataConfig(source=str(source), valid_percent=10.0),
    )
    first, second = ranks(2).run(build, str(tmp_path / "out"), config)
    alone = Batches(*build_datasets(config, tmp_path / "out" / "shared", 64, 16), config)
    expected = [row for batch in alone.microbatches(3, 0, 1) for row in batch["tokens"].tolist()]
    alone.close()
    assert len(expected) == 8
    assert [*first[:2], *second[:2], *first[2:], *second[2:]] == expected


def test_both_ranks_refuse_a_corpus_that_rank_0_cannot_find(ranks, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("word " * 1000)
    config = Config(data=DataConfig(source=str(tmp_path / "text.txt")))
    config = replace(config, train=TrainConfig(global_batch_size=4))
    for message in ranks(2).run(build, str(tmp_path / "out"), config, private=True):
        assert "prepare it first" in message


def test_ranks_share_one_blend(ranks, tmp_path: Path) -> None:
    """The blend's index is built by rank 0 and read by the others; alone it is built in memory."""
    for name, size in (("a", 3000), ("b", 1000)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name}{i} " * 9}) + "\n" for i in range(size // 20))
        )
        prepare(Request((str(tmp_path / f"{name}.jsonl"),), str(tmp_path / name), "bytes"), show_progress=False)
    config = Config(
        model=ModelConfig(sequence_length=16),
        train=TrainConfig(global_batch_size=8, micro_batch_size=2),
        data=DataConfig(blend=("0.75", str(tmp_path / "a"), "0.25", str(tmp_path / "b")), valid_percent=10.0),
    )
    first, second = ranks(2).run(build, str(tmp_path / "out"), config)
    alone = Batches(*build_datasets(config, tmp_path / "alone", 64, 16), config)
    expected = [row for batch in alone.microbatches(3, 0, 1) for row in batch["tokens"].tolist()]
    alone.close()
    assert [*first[:2], *second[:2], *first[2:], *second[2:]] == expected
    # A file that another rank sees otherwise, or not at all, is refused by all.
    (tmp_path / "b.bin").write_bytes(b"cut")
    for message in ranks(2).run(build, str(tmp_path / "out"), config):
        assert "b.bin has 3 bytes, its index says" in message
