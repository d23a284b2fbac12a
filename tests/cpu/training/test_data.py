"""Text into megatron-core's datasets: what is written, what is read back, in which order."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moue_dist.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig
from moue_dist.data.batches import Batches
from moue_dist.data.corpus import data_folder, find_corpus, prepare_corpus
from moue_dist.data.datasets import build_datasets, describe
from moue_dist.data.sample_index import sample_index

S = 16  # sequence length


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """60 files of 100 to 400 bytes, all different, some in a sub-folder, one with non-ASCII."""
    folder = tmp_path / "text"
    generator = numpy.random.default_rng(0)
    for i in range(60):
        path = folder / ("sub" if i % 3 == 0 else ".") / f"file{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = " ".join(f"{n}" for n in generator.integers(0, 1000, generator.integers(30, 100)))
        path.write_text(f"file {i} é\n{words}\n")
    return folder


def config_of(source: Path | str, *, batch: int = 8, micro: int = 2, **data: float) -> Config:
    return Config(
        model=ModelConfig(sequence_length=S),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=micro, seed=7),
        data=DataConfig(source=str(source), **{"valid_percent": 10.0, **data}),
    )


def ready(config: Config, folder: Path, samples: int = 64, samples_valid: int = 16) -> Batches:
    prepare_corpus(config.data, folder, show_progress=False)
    return Batches(*build_datasets(config, folder, samples, samples_valid), config)


def test_documents_are_bytes_with_one_end_mark(text: Path, tmp_path: Path) -> None:
    (text / "latin.txt").write_bytes(b"caf\xe9")
    (text / "zeros.md").write_bytes(b"a\0b")
    (text / "lines.jsonl").write_text('{"text": "first"}\n\n{"text": "zweites \\u00fc", "other": 1}\n')
    (text / "picture.png").write_bytes(b"no text")
    data = config_of(text).data
    prefix = prepare_corpus(data, tmp_path / "out", show_progress=False)
    dataset = IndexedDataset(prefix)
    assert dataset.index.dtype == numpy.uint8
    marks = dataset.document_indices
    found = {b"".join(dataset[int(i)].tobytes() for i in range(begin, end)) for begin, end in pairwise(marks)}
    expected = {path.read_bytes() + b"\0" for path in text.rglob("file*.txt")}
    assert found == expected | {b"ab\0", b"first\0", "zweites ü".encode() + b"\0"}
    corpus = find_corpus(data, tmp_path / "out")
    assert corpus is not None
    assert (corpus.documents, corpus.skipped, corpus.tokens) == (63, 1, os.path.getsize(f"{prefix}.bin"))
    train, _ = build_datasets(config_of(text), tmp_path / "out", 64, 16)
    (told,) = describe(config_of(text), tmp_path / "out", train)
    assert f"data: {text}: 63 documents, {corpus.tokens:,} tokens" in told
    assert told.endswith("; left out: 1 files that are not UTF-8")


def test_same_text_gives_the_same_files_and_is_written_once(text: Path, tmp_path: Path) -> None:
    data = config_of(text).data
    first = prepare_corpus(data, tmp_path / "one", show_progress=False)
    second = prepare_corpus(data, tmp_path / "two", show_progress=False)
    for suffix in (".bin", ".idx"):
        assert Path(first + suffix).read_bytes() == Path(second + suffix).read_bytes()
    inode = os.stat(f"{first}.bin").st_ino
    assert prepare_corpus(data, tmp_path / "one", show_progress=False) == first
    assert os.stat(f"{first}.bin").st_ino == inode  # not written again
    (text / "file01.txt").write_text("changed")
    changed = prepare_corpus(data, tmp_path / "one", show_progress=False)
    assert changed != first  # another name: an index of the old text cannot be taken for the new one's
    assert b"changed\0" in Path(f"{changed}.bin").read_bytes()


def test_half_written_corpus_is_not_used(text: Path, tmp_path: Path) -> None:
    data, out = config_of(text).data, tmp_path / "out"
    prefix = prepare_corpus(data, out, show_progress=False)
    whole = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(whole[:-5])
    assert find_corpus(data, out) is None
    assert prepare_corpus(data, out, show_progress=False) == prefix
    assert Path(f"{prefix}.bin").read_bytes() == whole
    index = Path(f"{prefix}.idx").read_bytes()
    for suffix, damaged in (
        (".bin", bytes([whole[0] ^ 1]) + whole[1:]),  # a flipped bit
        (".idx", index[:40]),
        (".idx", b""),
        (".idx", index[:50] + bytes([index[50] ^ 1]) + index[51:]),
    ):
        Path(prefix + suffix).write_bytes(damaged)
        assert find_corpus(data, out) is None
        assert prepare_corpus(data, out, show_progress=False) == prefix
        assert (Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()) == (whole, index)
    assert not list(out.glob(".*"))  # no temporary files


def test_failed_run_leaves_no_files(text: Path, tmp_path: Path) -> None:
    (text / "bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    with pytest.raises(ConfigError, match=r"line 2 of .*bad\.jsonl"):
        prepare_corpus(config_of(text).data, tmp_path / "out", show_progress=False)
    assert not list((tmp_path / "out").iterdir())


def test_megabytes_limit_the_text(text: Path, tmp_path: Path) -> None:
    data = config_of(text, max_megabytes=0.005).data
    prepare_corpus(data, tmp_path, show_progress=False)
    corpus = find_corpus(data, tmp_path)
    assert corpus is not None
    assert corpus.tokens - corpus.documents == 5000
    assert corpus.beyond == sum(path.stat().st_size for path in text.rglob("*.txt")) - 5000


def test_one_long_file_still_has_a_validation_part(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n".join(f"line {i}" for i in range(3000)))
    config = config_of(book)
    train, valid = _built(config, tmp_path / "out")
    assert valid is not None
    part = len(valid.dataset) / (len(valid.dataset) + len(train.dataset))
    assert 0.07 < part < 0.13  # asked for: 10%


def _built(config: Config, folder: Path):
    prepare_corpus(config.data, folder, show_progress=False)
    return build_datasets(config, folder, 64, 16)


def test_standard_library_is_read(tmp_path: Path) -> None:
    data = DataConfig(source="stdlib", max_megabytes=1.0)
    prefix = prepare_corpus(data, tmp_path, show_progress=False)
    tokens = Path(f"{prefix}.bin").read_bytes()
    assert 1_000_000 < len(tokens) < 1_010_000
    assert b"\nimport " in tokens
    tokens.replace(b"\0", b"").decode("utf-8", errors="ignore")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "/no/such/folder"}, "no such file or folder"),
        ({"max_megabytes": 0.0}, "max_megabytes"),
        ({"valid_percent": 100.0}, "valid_percent"),
    ],
)
def test_bad_options_are_named(text: Path, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_corpus(replace(config_of(text).data, **change), tmp_path / "out", show_progress=False)


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match="no text found"):
        prepare_corpus(config_of(tmp_path).data, tmp_path / "out", show_progress=False)


def test_small_vocabulary_and_missing_corpus_are_refused(text: Path, tmp_path: Path) -> None:
    config = config_of(text)
    with pytest.raises(ConfigError, match="prepare it first"):
        build_datasets(config, tmp_path / "out", 8, 8)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=255"):
        build_datasets(replace(config, model=replace(config.model, vocab_size=255)), tmp_path / "out", 8, 8)


def test_short_text_says_by_how_much(tmp_path: Path) -> None:
    source = tmp_path / "short.txt"
    source.write_text("x" * 200)
    config = config_of(source, batch=100, valid_percent=0.0)
    prepare_corpus(config.data, tmp_path / "out", show_progress=False)
    # 100 sequences of 16 and one byte more are 1601; the text and its end mark are 201.
    with pytest.raises(ConfigError, match=r"training part .* has 201 bytes, 1400 fewer"):
        build_datasets(config, tmp_path / "out", 8, 8)


def test_labels_are_the_next_bytes_of_the_text(text: Path, tmp_path: Path) -> None:
    config = config_of(text)
    batches = ready(config, tmp_path / "out")
    tokens = Path(prepare_corpus(config.data, tmp_path / "out", show_progress=False) + ".bin").read_bytes()
    inside = 0
    for batch in batches.microbatches(0, 0, 1):
        assert batch["tokens"].shape == batch["labels"].shape == batch["position_ids"].shape == (2, S)
        assert {value.dtype for value in batch.values()} == {torch.int64}
        assert torch.equal(batch["position_ids"], torch.arange(S).expand(2, S))
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        for row, last in zip(batch["tokens"].tolist(), batch["labels"][:, -1].tolist(), strict=True):
            inside += bytes([*row, last]) in tokens  # a sample within one document is found as it stands
    assert inside >= 4
    batches.close()


def _rows(batches: Batches, step: int, dp_size: int) -> list[list[int]]:
    """The global batch of a step, its rows in the order of their sample numbers."""
    ranks = [batches.microbatches(step, rank, dp_size) for rank in range(dp_size)]
    return [row for group in zip(*ranks, strict=True) for batch in group for row in batch["tokens"].tolist()]


def test_layouts_share_the_same_global_batch(text: Path, tmp_path: Path) -> None:
    batches = ready(config_of(text), tmp_path / "out")
    for step in (0, 1, 5, 2):  # also out of order, as after a resume
        alone = _rows(batches, step, 1)
        assert len(alone) == 8
        assert _rows(batches, step, 2) == alone
        assert _rows(batches, step, 4) == alone
    assert _rows(batches, 0, 1) != _rows(batches, 1, 1)
    batches.close()


def test_resumed_and_longer_runs_read_the_same_samples(text: Path, tmp_path: Path) -> None:
    config = config_of(text)
    batches = ready(config, tmp_path / "a", samples=8 * 250)
    (told,) = describe(config, tmp_path / "a", batches._samples["train"])
    assert float(re.search(r"read ([\d.]+) times", told)[1]) > 2  # type: ignore[index]
    steps = [_rows(batches, step, 2) for step in range(250)]
    batches.close()
    longer = ready(config, tmp_path / "b", samples=8 * 1000)
    assert [_rows(longer, step, 1) for step in range(240, 250)] == steps[240:]
    longer.close()
    other_seed = ready(replace(config, train=replace(config.train, seed=8)), tmp_path / "b")
    assert _rows(other_seed, 0, 1) != steps[0]
    other_seed.close()


def test_every_epoch_reads_each_sample_once(text: Path, tmp_path: Path) -> None:
    config = config_of(text)
    prepare_corpus(config.data, tmp_path, show_progress=False)
    train, _ = build_datasets(config, tmp_path, 10_000, 8)
    n = len(train.dataset)
    epochs = [[tuple(train[epoch * n + i]["tokens"].tolist()) for i in range(n)] for epoch in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    with pytest.raises(IndexError):
        train[10_000]


def test_validation_reads_other_text_and_starts_again(text: Path, tmp_path: Path) -> None:
    batches = ready(config_of(text), tmp_path / "out", samples_valid=800)
    first = batches.validation(0, 0, 1)
    seen = {tuple(row) for i in range(100) for b in batches.validation(i, 0, 1) for row in b["tokens"].tolist()}
    assert len(seen) < 800  # more than the validation part holds: it is read again
    trained = {tuple(row) for step in range(8) for row in _rows(batches, step, 1)}
    assert not seen & trained
    again = batches.validation(0, 0, 1)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(first, again, strict=True))
    batches.close()


def test_batch_that_does_not_divide_is_refused(text: Path, tmp_path: Path) -> None:
    batches = ready(config_of(text), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=8 .* 3 data-parallel"):
        batches.microbatches(0, 0, 3)
    batches.close()


def test_no_validation_part(text: Path, tmp_path: Path) -> None:
    batches = ready(config_of(text, valid_percent=0.0), tmp_path / "out")
    assert len(batches.microbatches(0, 0, 1)) == 4
    with pytest.raises(ConfigError, match=r"data\.valid_percent"):
        batches.validation(0, 0, 1)
    batches.close()


def test_cache_folder_may_be_shared(text: Path, tmp_path: Path) -> None:
    config = config_of(text)
    assert data_folder(config, tmp_path / "run") == tmp_path / "run" / "data"
    small = replace(config.data, max_megabytes=0.005)
    prefixes = {prepare_corpus(data, tmp_path, show_progress=False) for data in (config.data, small, config.data)}
    assert len(prefixes) == 2
    assert {json.loads(path.read_text())["prefix"] for path in tmp_path.glob("*.json")} == {
        Path(p).name for p in prefixes
    }


@pytest.mark.parametrize("seed", range(5))
def test_numpy_index_equals_the_compiled_one(seed: int) -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    generator = numpy.random.default_rng(seed)
    sizes = generator.integers(1, 50, 40).astype(numpy.int32)
    documents = generator.permutation(40).astype(numpy.int32)
    # 13 puts sample borders inside documents; 1-token documents put several into one sample
    arguments = (sizes, documents, 13, 1, int(sizes.sum()), True, 1)
    ours, theirs = sample_index(*arguments), helpers.build_sample_idx_int32(*arguments)
    assert ours.dtype == theirs.dtype
    assert numpy.array_equal(ours, theirs)


def test_datasets_build_without_the_compiled_helpers(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled module is hidden as if the wheel had none; other folder, so that no index is re-used."""
    config = config_of(text)
    batches = ready(config, tmp_path / "with")
    expected = _rows(batches, 2, 1)
    batches.close()
    import megatron.core.datasets as package

    for name in ("helpers", "helpers_cpp"):
        monkeypatch.delitem(sys.modules, f"megatron.core.datasets.{name}", raising=False)
        monkeypatch.delattr(package, name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    batches = ready(config, tmp_path / "without")
    assert _rows(batches, 2, 1) == expected
    batches.close()
    assert sys.modules["megatron.core.datasets.helpers_cpp"].build_sample_idx_int32 is sample_index
    for name in ("helpers", "helpers_cpp"):  # the next test gets the compiled ones again
        del sys.modules[f"megatron.core.datasets.{name}"]
