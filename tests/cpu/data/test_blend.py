"""Tokenized files in training: blends and their order, files of other tools, and what does not fit."""

from __future__ import annotations

import itertools
import json
import random
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from moue_dist.cli.main import main
from moue_dist.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig
from moue_dist.config.blend import parse_blend
from moue_dist.data.batches import Batches
from moue_dist.data.datasets import build_datasets
from moue_dist.data.indexed import read_index
from moue_dist.data.prepare.run import Request, prepare
from moue_dist.data.sample_index import blend, blend_all

S, G, STEPS = 16, 8, 200
SPAN = 10_000  # file k holds the tokens k * SPAN up to (k + 1) * SPAN, each once: a token says where it comes from


def foreign(prefix: Path, documents: list[list[int]], dtype: type = numpy.int32, pieces: int = 1) -> Path:
    """Files as Megatron-LM's tool writes them, without a note; a document is `pieces` sequences."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        cut = len(document) // pieces
        builder.add_document(numpy.array(document), [*[cut] * (pieces - 1), len(document) - cut * (pieces - 1)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pairs of files of 4,000, 2,500 and 1,000 tokens in documents of 5 to 60."""
    folder, generator, made = tmp_path_factory.mktemp("files"), random.Random(1), []
    for k, size in enumerate((4000, 2500, 1000)):
        documents, at = [], k * SPAN
        while at < k * SPAN + size:
            documents.append(list(range(at, at + generator.randint(5, 60))))
            at += len(documents[-1])
        made.append(foreign(folder / f"part{k}", documents))
    return made


def config_of(*blend: object, micro: int = 2, seed: int = 7, vocab: int = 3 * SPAN, **data: object) -> Config:
    options = {"blend": tuple(map(str, blend)), "valid_percent": 0.0} | data
    return Config(
        model=ModelConfig(sequence_length=S, vocab_size=vocab),
        train=TrainConfig(global_batch_size=G, micro_batch_size=micro, seed=seed),
        data=DataConfig(**options),  # type: ignore[arg-type]
    )


def batches_of(config: Config, folder: Path, steps: int = STEPS, valid: int = 16) -> Batches:
    return Batches(*build_datasets(config, folder, steps * G, valid), config)


def read(batches: Batches, steps: range, dp_size: int = 1) -> list[list[tuple[int, ...]]]:
    """The global batch of each step: its rows in the order of their sample numbers."""
    out = []
    for step in steps:
        ranks = [batches.microbatches(step, rank, dp_size) for rank in range(dp_size)]
        out.append(
            [tuple(row) for group in zip(*ranks, strict=True) for batch in group for row in batch["tokens"].tolist()]
        )
    batches.close()
    return out


def test_proportions_are_exact(files: list[Path], tmp_path: Path) -> None:
    weights = (5, 3, 2)
    config = config_of(*itertools.chain(*zip(weights, files, strict=True)))
    taken: Counter[int] = Counter()
    for step, rows in enumerate(read(batches_of(config, tmp_path), range(STEPS)), start=1):
        taken.update(row[0] // SPAN for row in rows)
        for part, weight in enumerate(weights):
            assert abs(taken[part] - weight / 10 * step * G) < 1, (step, part)
    assert [taken[part] for part in range(3)] == [800, 480, 320]


def test_order_depends_on_seed_and_global_batch_alone(files: list[Path], tmp_path: Path) -> None:
    config = config_of(0.7, files[0], 0.3, files[1])
    truth = read(batches_of(config, tmp_path / "a"), range(STEPS))
    for dp_size, micro in itertools.product((1, 2, 4), (1, 2)):
        layout = config_of(0.7, files[0], 0.3, files[1], micro=micro)
        assert read(batches_of(layout, tmp_path / f"{dp_size}{micro}"), range(STEPS), dp_size) == truth
    for begin in (*range(1, 20), 57, 123, 199):  # resumed there, and made longer
        longer = batches_of(config, tmp_path / "a", steps=STEPS + 1000)
        assert read(longer, range(begin, min(begin + 3, STEPS))) == truth[begin : begin + 3]
    assert read(batches_of(replace(config, train=replace(config.train, seed=8)), tmp_path / "a"), range(2)) != truth[:2]


def test_no_sample_is_missing_and_none_comes_twice(files: list[Path], tmp_path: Path) -> None:
    """A sample is known by its first token. Of a part, n samples a pass: after k samples each came k // n times or
    once more."""
    config = config_of(0.7, files[0], 0.3, files[1])
    n = {part: (int(read_index(str(files[part])).tokens) - 1) // S for part in (0, 1)}
    seen: Counter[int] = Counter()
    for rank in range(4):
        batches = batches_of(config, tmp_path)
        for step in range(STEPS):
            for batch in batches.microbatches(step, rank, 4):
                seen.update(batch["tokens"][:, 0].tolist())
        batches.close()
    assert seen.total() == STEPS * G
    for part, share in ((0, 1120), (1, 480)):
        times = [count for token, count in seen.items() if token // SPAN == part]
        assert sum(times) == share
        assert len(times) == n[part], "every sample was read"
        assert set(times) <= {share // n[part], share // n[part] + 1}


def test_one_prefix_is_no_blend_and_shares_are_cut(files: list[Path], tmp_path: Path) -> None:
    config = config_of(f"{files[0]}.bin", split=(80.0, 15.0, 5.0), valid_percent=5.0)
    train, valid = build_datasets(config, tmp_path, 1000, 1000)
    assert valid is not None
    trained = {int(t) for i in range(1000) for t in train[i]["tokens"]}
    validated = {int(t) for i in range(1000) for t in valid[i]["tokens"]}
    total = read_index(str(files[0])).tokens
    assert not trained & validated
    assert len(trained) == pytest.approx(0.80 * total, rel=0.06)
    assert len(validated) == pytest.approx(0.15 * total, rel=0.15)
    test_part = total - len(trained) - len(validated)
    assert 0.02 * total < test_part < 0.08 * total


def test_validation_of_a_blend_is_one_too(files: list[Path], tmp_path: Path) -> None:
    config = config_of(3, files[0], 1, files[1], split=(90.0, 10.0), valid_percent=5.0)
    batches = batches_of(config, tmp_path, valid=4 * G)
    rows = [row for i in range(4) for b in batches.validation(i, 0, 1) for row in b["tokens"].tolist()]
    assert Counter(row[0] // SPAN for row in rows) == {0: 24, 1: 8}
    again = batches.validation(0, 1, 2)
    assert [r for b in again for r in b["tokens"].tolist()] == rows[2:4] + rows[6:8]
    batches.close()


@pytest.mark.parametrize("seed", range(4))
def test_numpy_blends_equal_the_compiled_ones(seed: int) -> None:
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    generator = numpy.random.default_rng(seed)
    n, size = int(generator.integers(2, 6)), 500
    weights = generator.dirichlet(numpy.ones(n)).tolist()
    sizes = generator.integers(1, 60, n).tolist()
    for ours, theirs, given, count in (
        (blend, helpers.build_blending_indices, (weights, n, size, False), size),
        (blend_all, helpers.build_exhaustive_blending_indices, (sizes, n), sum(sizes)),
    ):
        made = []
        for build in (ours, theirs):
            made.append((numpy.zeros(count, numpy.int16), numpy.zeros(count, numpy.int64)))
            build(*made[-1], *given)
        assert numpy.array_equal(made[0][0], made[1][0]) and numpy.array_equal(made[0][1], made[1][1])


# Documents


@pytest.mark.parametrize("pieces", [1, 3])
def test_masks_follow_the_documents(tmp_path: Path, pieces: int) -> None:
    """Files without an end mark: each token names its document and its place, so the truth can be read off."""
    generator = random.Random(2)
    documents = [[d * 100 + i for i in range(generator.randint(3, 40))] for d in range(200)]
    prefix = foreign(tmp_path / "a", documents, pieces=pieces)
    config = config_of(prefix, document_mask=True, eod_mask_loss=True)
    batches, crossed = batches_of(config, tmp_path / "out"), 0
    for step in range(5):
        for batch in batches.microbatches(step, 0, 1):
            for tokens, labels, mask, counts in zip(
                *(batch[name] for name in ("tokens", "labels", "attention_mask", "loss_mask")), strict=True
            ):
                assert mask.shape == (1, S, S) and mask.dtype == torch.bool
                text = [*tokens.tolist(), int(labels[-1])]
                origin = [_sequence(documents, token, pieces) for token in text]
                begins = [
                    b != a + 1 or here != there
                    for (a, here), (b, there) in itertools.pairwise(zip(text, origin, strict=True))
                ]
                number = list(itertools.accumulate([0, *begins]))
                for i, j in itertools.product(range(S), range(S)):
                    assert bool(mask[0, i, j]) == (j > i or number[i] != number[j])
                assert counts.tolist() == [a == b for a, b in itertools.pairwise(number)]
                crossed += number[-1]
    assert crossed > 20
    batches.close()


def _sequence(documents: list[list[int]], token: int, pieces: int) -> tuple[int, int]:
    """Which sequence of which document holds a token."""
    length = len(documents[token // 100])
    return token // 100, min(token % 100 // (length // pieces), pieces - 1)


def test_an_end_mark_inside_a_sequence_begins_a_document(tmp_path: Path) -> None:
    """Tools that pack several documents into one sequence leave only the marks between them."""
    foreign(tmp_path / "a", [[5, 6, 7, 0, 8, 9, 0, *range(10, 200)]], dtype=numpy.uint8)
    config = config_of(tmp_path / "a", vocab=256, tokenizer="bytes", document_mask=True)
    config = replace(config, train=replace(config.train, global_batch_size=1, micro_batch_size=1))
    train, _ = build_datasets(config, tmp_path / "out", 12, 1)
    first = next(item for item in (train[i] for i in range(12)) if item["tokens"][0] == 5)
    assert first["documents"].tolist() == [0, 0, 0, 0, 1, 1, 1, *[2] * 10]


# What does not fit


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    """Files of `moue data prepare`, with a note; and some of a BPE."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(60)))
    prepare(Request((str(tmp_path / "a.jsonl"),), str(tmp_path / "bytes"), "bytes"), show_progress=False)
    prepare(Request((str(tmp_path / "a.jsonl"),), str(tmp_path / "bpe"), train_bpe=300), show_progress=False)
    return tmp_path


def refusal(config: Config, folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        build_datasets(config, folder / "out", 2 * G, 0)
    return str(error.value)


def test_vocabularies_that_do_not_fit_are_refused(noted: Path) -> None:
    a, b = noted / "bytes", noted / "bpe"
    build_datasets(config_of(b, vocab=300), noted / "out", G, 0)
    assert f"model.vocab_size=299 cannot hold the 300 tokens of bpe.tokenizer.json, which {b} was made with" in refusal(
        config_of(b, vocab=299), noted
    )
    assert "tokens of different tokenizers" in refusal(config_of(1, a, 1, b), noted)
    assert "was made with the tokenizer bytes, not with" in refusal(
        config_of(a, tokenizer=f"{b}.tokenizer.json"), noted
    )
    other = foreign(noted / "other", [[1, 2, 3, 555] * 100])
    assert "holds token 555, beyond model.vocab_size=500; set at least 556" in refusal(
        config_of(other, vocab=500), noted
    )
    assert "holds token 555, beyond the 300 of" in refusal(config_of(other, tokenizer=f"{b}.tokenizer.json"), noted)
    minus = foreign(noted / "minus", [[1, 2, 3, -1] * 100])
    assert "holds token -1" in refusal(config_of(minus), noted)


def _damages(whole: bytes, generator: random.Random) -> bytes:
    kind = generator.randrange(4)
    if kind == 0:
        return whole[: generator.randrange(len(whole))]
    if kind == 1:
        return whole + generator.randbytes(generator.randint(1, 20))
    at = generator.randrange(34 if kind == 2 else len(whole))
    return whole[:at] + bytes([whole[at] ^ (1 << generator.randrange(8))]) + whole[at + 1 :]


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_no_damage_passes(noted: Path, suffix: str) -> None:
    """60 of a kind, at random: truncated, longer, one bit flipped in the head, one anywhere."""
    prefix, generator = noted / "bytes", random.Random(3)
    path = Path(f"{prefix}{suffix}")
    whole = path.read_bytes()
    for _ in range(60):
        path.write_bytes(_damages(whole, generator))
        assert str(prefix) in refusal(config_of(prefix), noted)
    path.write_bytes(whole)
    build_datasets(config_of(prefix), noted / "out", G, 0)


def test_a_damaged_index_without_a_note_is_no_traceback(files: list[Path], tmp_path: Path) -> None:
    whole, generator = Path(f"{files[2]}.idx").read_bytes(), random.Random(4)
    Path(tmp_path / "a.bin").write_bytes(Path(f"{files[2]}.bin").read_bytes())
    refused = 0
    for _ in range(200):
        (tmp_path / "a.idx").write_bytes(_damages(whole, generator))
        try:
            index = read_index(str(tmp_path / "a"))
        except ConfigError as error:
            assert f"{tmp_path / 'a'}." in str(error)
            refused += 1
        else:  # a border that moved between two sequences, or another type of the same width, cannot be known
            assert index.tokens * index.dtype.itemsize == (tmp_path / "a.bin").stat().st_size
    assert refused > 150


INDEX = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1, 2)
BROKEN = {
    "nothing": (b"", "is no index of tokenized files, or cut short"),
    "other": (b"PAR1" * 20, "is no index of tokenized files"),
    "version": (INDEX[:9] + struct.pack("<Q", 2) + INDEX[17:], "has version 2 and token type 8"),
    "huge": (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2**63, 2**62), "its head asks for"),
    "empty": (b"MMIDIDX\x00\x00" + struct.pack("<QBQQq", 1, 8, 0, 1, 0), "holds no documents"),
    "floats": (b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 7, 1, 2), "says that tokens are float32"),
    "negative": (INDEX + struct.pack("<iqqq", -4, 0, 0, 1), "has a negative length"),
    "places": (INDEX + struct.pack("<iqqq", 4, 8, 0, 1), "do not lead from one place to the next"),
    "borders": (INDEX + struct.pack("<iqqq", 4, 0, 0, 7), "has document borders that do not cover"),
    "data": (INDEX + struct.pack("<iqqq", 400, 0, 0, 1), "a.bin has 8 bytes, its index says 800"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_index_is_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = BROKEN[case]
    (tmp_path / "a.idx").write_bytes(content)
    (tmp_path / "a.bin").write_bytes(b"\1\0\2\0\3\0\4\0")
    assert main(["data", "inspect", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert message in refusal(config_of(tmp_path / "a"), tmp_path)


def test_notes_that_do_not_belong_are_named(noted: Path) -> None:
    note = noted / "bytes.moue.json"
    said = note.read_text()
    note.write_text(said[:40])
    assert "bytes.moue.json is broken" in refusal(config_of(noted / "bytes"), noted)
    note.write_text((noted / "bpe.moue.json").read_text())
    assert "bytes.moue.json speaks of" in refusal(config_of(noted / "bytes"), noted)
    note.unlink()
    build_datasets(config_of(noted / "bytes"), noted / "out", G, 0)
    (noted / "bpe.tokenizer.json").unlink()
    assert "cannot read the tokenizer" in refusal(config_of(noted / "bpe"), noted)
    assert "there is no" in refusal(config_of(noted / "nowhere"), noted)


def test_too_little_text_says_whose(files: list[Path], tmp_path: Path) -> None:
    config = config_of(0.5, files[0], 0.5, foreign(tmp_path / "short", [list(range(50))]))
    assert f"the training part of {tmp_path / 'short'} has 50 tokens, 15 fewer than its share" in refusal(
        config, tmp_path
    )


def test_a_token_that_turned_up_in_training_is_named(files: list[Path], tmp_path: Path) -> None:
    config = config_of(files[0])
    train, _ = build_datasets(config, tmp_path, 8, 0)
    narrow = replace(config, model=replace(config.model, vocab_size=300))
    batches = Batches(train, None, narrow)
    with pytest.raises(ConfigError, match=r"global batch 0 holds token \d+, beyond model\.vocab_size=300"):
        batches.microbatches(0, 0, 1)
    batches.close()


@pytest.mark.parametrize("words", ["a b", "0.5 a 0.5", "0 a 1 b", "-1 a", "nan a 1 b", "1 a 1 a.bin", "0.5"])
def test_bad_blends_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.blend"):
        parse_blend(words.split())
