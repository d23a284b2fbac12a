"""`moue data prepare`: what is written, whoever writes it, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moue_dist.cli.main import main
from moue_dist.data.prepare.reading import documents
from moue_dist.data.prepare.run import Request, prepare
from moue_dist.data.prepare.shard import cut_text
from moue_dist.data.prepare.sources import cut, find_sources
from moue_dist.data.tokenizer import open_tokenizer

ROOT = Path(__file__).resolve().parents[3]


def sentence(seed: int) -> str:
    """30 to 100 words, no two seeds alike, with characters of one to four bytes."""
    generator = numpy.random.default_rng(seed)
    words = ["the", "cat", "naïve", "sat", "日本", "🙂", "running", "<|endoftext|>", "don't", "1234", "\n\n", "  "]
    return f"{seed}: " + " ".join(generator.choice(words, generator.integers(30, 100)))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file, 10 documents each; names say which sentences they hold."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "sub").mkdir()
    for i in range(10):
        (folder / "sub" / f"text{i}.txt").write_text(sentence(i))
    lines = {
        start: "".join(json.dumps({"text": sentence(i), "n": i}) + "\n" for i in range(start, start + 10))
        for start in (10, 20, 30)
    }
    (folder / "plain.jsonl").write_text(lines[10])
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines[20].encode()))
    (folder / "packed.jsonl.zst").write_bytes(pyarrow.compress(lines[30].encode(), "zstd", asbytes=True))
    table = pyarrow.table({"text": [sentence(i) for i in range(40, 50)], "n": range(10)})
    pyarrow.parquet.write_table(table, folder / "table.parquet", row_group_size=3)
    (folder / "book.txt.gz").write_bytes(gzip.compress(sentence(50).encode()))
    (folder / "picture.png").write_bytes(b"no text")
    return folder


def in_order(folder: Path) -> list[str]:
    """The sentences of `sources`: files by the digest of their names, documents as in the file."""
    held = {f"0/sub/text{i}.txt": [i] for i in range(10)}
    held |= {"0/plain.jsonl": range(10, 20), "0/packed.jsonl.gz": range(20, 30), "0/packed.jsonl.zst": range(30, 40)}  # type: ignore[dict-item]
    held |= {"0/table.parquet": range(40, 50), "0/book.txt.gz": [50]}  # type: ignore[dict-item]
    names = sorted(held, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [sentence(i) for name in names for i in held[name]]


def written(prefix: Path) -> list[list[int]]:
    """The documents as megatron-core's own reader finds them."""
    dataset = IndexedDataset(str(prefix))
    borders = dataset.document_indices
    return [[int(t) for i in range(a, b) for t in dataset[i]] for a, b in pairwise(map(int, borders))]


def files_of(prefix: Path) -> dict[str, bytes]:
    return {
        path.name[len(prefix.name) :]: path.read_bytes()
        for path in sorted(prefix.parent.glob(f"{prefix.name}.*"))
        if path.is_file()
    }


def request(sources: Path, out: Path, **changes: object) -> Request:
    given = {"tokenizer": "bytes", "unit_bytes": 1000} | changes
    return Request(sources=(str(sources),), out=str(out), **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bpe(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json trained on the sources."""
    out = tmp_path_factory.mktemp("bpe") / "own"
    prepare(request(sources, out, tokenizer="", train_bpe=300), show_progress=False)
    return Path(f"{out}.tokenizer.json")


def test_bytes_are_what_the_files_hold(sources: Path, tmp_path: Path) -> None:
    done = prepare(request(sources, tmp_path / "a"), show_progress=False)
    expected = [[*text.encode(), 0] for text in in_order(sources)]
    assert written(tmp_path / "a") == expected
    assert (done.note.documents, done.note.tokens) == (51, sum(map(len, expected)))
    assert done.note.text_bytes == done.note.tokens - 51
    assert done.passed_over == {".png": 1}
    assert sorted(files_of(tmp_path / "a")) == [".bin", ".idx", ".moue.json"]


def test_a_trained_bpe_gives_the_text_back(sources: Path, bpe: Path) -> None:
    tokenizer = open_tokenizer(str(bpe))
    found = written(bpe.parent / "own")
    assert tokenizer.vocab_size == 300
    assert [tokenizer.decode(document[:-1]) for document in found] == in_order(sources)
    assert {document[-1] for document in found} == {tokenizer.eod}
    # Text that looks like the end mark is text.
    assert not any(tokenizer.eod in document[:-1] for document in found)
    assert any("<|endoftext|>" in text for text in in_order(sources))


@pytest.mark.parametrize("unit_bytes", [1000, 1 << 24])
def test_the_number_of_workers_changes_no_byte(sources: Path, bpe: Path, tmp_path: Path, unit_bytes: int) -> None:
    results = {}
    for workers in (1, 2, 4):
        out = tmp_path / f"by{workers}"
        prepare(request(sources, out, tokenizer=str(bpe), workers=workers, unit_bytes=unit_bytes), show_progress=False)
        results[workers] = files_of(out)
    assert results[1] == results[2] == results[4]
    known = files_of(bpe.parent / "own")
    assert all(results[1][suffix] == known[suffix] for suffix in (".bin", ".idx", ".tokenizer.json"))


def test_training_a_bpe_is_the_same_with_any_number_of_threads(sources: Path, bpe: Path, tmp_path: Path) -> None:
    command = ["data", "prepare", str(sources), "--train-bpe", "300", "--out", str(tmp_path / "a"), "--workers", "1"]
    environment = {**os.environ, "RAYON_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-m", "moue_dist", *command], check=True, env=environment, cwd=ROOT)
    assert Path(f"{tmp_path / 'a'}.tokenizer.json").read_bytes() == bpe.read_bytes()


SLOW = """
import sys, time
from moue_dist.data.prepare import run, shard
from moue_dist.data.prepare.sources import cut, find_sources
from moue_dist.data.tokenizer import FileTokenizer
plain = run.shards
def slowly(*arguments):
    for i, done in enumerate(plain(*arguments)):
        if i == 2:
            print("three are there", flush=True)
            time.sleep(60)
        yield done
run.shards = slowly
run.prepare(run.Request(sources=(sys.argv[1],), out=sys.argv[2], tokenizer=sys.argv[3], unit_bytes=1000, workers=2))
"""


def test_a_killed_run_goes_on_and_writes_the_same(sources: Path, bpe: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "a", tmp_path / "a.parts"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(sources), str(out), str(bpe)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and "three" in process.stdout.readline()
    workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not any(Path(f"/proc/{pid}").exists() for pid in workers), "workers outlived their run"
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("*.bin")}
    assert len(finished) >= 3 and not Path(f"{out}.bin").exists()

    torn = sorted(finished)[0]  # as after a power failure: a shard that is not all there is made again
    torn.write_bytes(torn.read_bytes()[:-2])
    seen: dict[Path, int] = {}
    plain_join = sys.modules["moue_dist.data.prepare.run"]._join

    def join(*arguments: object) -> object:
        seen.update({path: path.stat().st_mtime_ns for path in finished})
        return plain_join(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moue_dist.data.prepare.run._join", join)
        prepare(request(sources, out, tokenizer=str(bpe), workers=1), show_progress=False)
    assert {path for path in finished if seen[path] != finished[path]} == {torn}
    known = files_of(bpe.parent / "own")
    assert all(files_of(out)[suffix] == known[suffix] for suffix in (".bin", ".idx", ".tokenizer.json"))
    assert not parts.exists()


def test_called_again_it_says_so_and_never_overwrites(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    prepare(request(sources, out), show_progress=False)
    before = files_of(out)
    assert prepare(request(sources, out), show_progress=False).already
    with pytest.raises(ValueError, match=r"a\.bin is there, from other text or options.*--overwrite"):
        prepare(request(sources / "sub", out), show_progress=False)
    assert files_of(out) == before
    done = prepare(request(sources / "sub", out, overwrite=True), show_progress=False)
    assert done.note.documents == 10 == len(written(out))


def test_two_at_once_do_not_meet(sources: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "a.parts").mkdir()
    with (tmp_path / "a.parts" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process prepares"):
            prepare(request(sources, tmp_path / "a"), show_progress=False)


def test_long_documents_are_cut_where_the_tokens_do_not_change(bpe: Path) -> None:
    text = "".join(sentence(i) + "\n" for i in range(40))
    tokenizer = open_tokenizer(str(bpe))
    parts = list(cut_text(text, 2000))
    assert "".join(parts) == text and len(parts) > 5 and max(map(len, parts)) <= 2000
    assert numpy.concatenate(tokenizer.encode(parts)).tolist() == tokenizer.encode([text])[0].tolist()
    assert list(cut_text("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]  # no line to cut at
    assert list(cut_text("ab\ncd\n\n\nef", 7)) == ["ab\n", "cd\n\n\nef"]  # not where blanks go on
    assert list(cut_text("ab\n\n\ncd", 4)) == ["ab\n\n", "\ncd"]  # no other place


def test_a_long_document_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: Path) -> None:
    monkeypatch.setattr("moue_dist.data.prepare.shard.LONGEST_PART", 500)
    text = "".join(sentence(i) + "\n" for i in range(10))
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("short", text)))
    prepare(request(tmp_path, tmp_path / "out" / "a", tokenizer=str(bpe)), show_progress=False)
    decoded = [open_tokenizer(str(bpe)).decode(document[:-1]) for document in written(tmp_path / "out" / "a")]
    assert sorted(decoded) == sorted(["short", text, text])


def test_lines_are_cut_at_every_place(tmp_path: Path) -> None:
    texts = [f"{i:0{n}}" for i, n in enumerate((1, 3, 1, 9, 2, 30, 1, 1))]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))  # no last line end
    for unit_bytes in (*range(1, 60), 10_000):
        units = cut(find_sources([str(tmp_path / "a.jsonl")]), unit_bytes)
        found = [text for unit in units for piece in unit.pieces for text in documents(piece, "text", 1 << 20)]
        assert found == texts, unit_bytes


def _bad_tokenizer(folder: Path, bpe: Path) -> str:
    said = json.loads(bpe.read_text())
    said["added_tokens"] = []
    said["model"]["vocab"] = {("end" if t == "<|endoftext|>" else t): i for t, i in said["model"]["vocab"].items()}
    path = folder / "endless.json"
    path.write_text(json.dumps(said))
    return str(path)


def _files(folder: Path) -> dict[str, bytes]:
    good = b'{"text": "good"}\n'
    parquet = folder / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "text": [None], "n": [1]}), parquet)
    return {
        "field.jsonl": good * 3 + b'{"txt": "b"}\n' + good + b'{"text": 7}\n',
        "broken.jsonl": good + b"\n" + b'{"text": "c\n' + good + b"[]\n",
        "latin.jsonl": b'{"text": "caf\xe9"}\n' + good,
        "surrogate.jsonl": b'{"text": "\\ud800"}\n' + good,
        "empty.jsonl": good * 2 + b'{"text": ""}\n',
        "long.jsonl": good + b'{"text": "' + b"x" * 1_100_000 + b'"}\n',
        "longer.jsonl": good + b'{"other": "' + b"x" * 9_000_000 + b'", "text": "a"}\n' + good,
        "latin.txt": b"caf\xe9",
        "empty.txt": b"",
        "cut.jsonl.gz": gzip.compress(good * 1000)[:-20],
        "no.jsonl.gz": good,
        "cut.jsonl.zst": pyarrow.compress(good * 1000, "zstd", asbytes=True)[:-20],
        "cut.parquet": parquet.read_bytes()[:-30],
        "null.parquet": parquet.read_bytes(),
        "spoilt.parquet": parquet.read_bytes()[:4] + b"\xff" * 40 + parquet.read_bytes()[44:],
    }


BAD: list[tuple[str, str, str]] = [  # file, options, what is said
    ("field.jsonl", "", r"2 documents cannot be used: 2 without the field \(first: .*field\.jsonl:4\)"),
    ("broken.jsonl", "", r"2 broken JSON line \(first: .*broken\.jsonl:3\)"),
    ("latin.jsonl", "", r"1 not UTF-8 \(first: .*latin\.jsonl:1\)"),
    ("surrogate.jsonl", "", r"1 not UTF-8 \(first: .*surrogate\.jsonl:1\)"),
    ("empty.jsonl", "", r"1 empty \(first: .*empty\.jsonl:3\)"),
    ("long.jsonl", "--max-document-mb 1", r"1 longer than --max-document-mb \(first: .*long\.jsonl:2\)"),
    ("longer.jsonl", "--max-document-mb 1", r"1 longer than --max-document-mb \(first: .*longer\.jsonl:2\)"),
    ("latin.txt", "", r"1 not UTF-8 \(first: .*latin\.txt\)"),
    ("empty.txt", "", r"no text found"),
    ("cut.jsonl.gz", "", r"cut\.jsonl\.gz cannot be read"),
    ("no.jsonl.gz", "", r"no\.jsonl\.gz cannot be read"),
    ("cut.jsonl.zst", "", r"cut\.jsonl\.zst cannot be read"),
    ("cut.parquet", "", r"cut\.parquet is no readable Parquet file"),
    ("null.parquet", "--field missing", r"no column 'missing': its columns are body, text, n"),
    ("null.parquet", "--field n", r"column 'n' holds int64, not text"),
    ("null.parquet", "--field text", r"column 'text' holds null, not text"),
    ("spoilt.parquet", "--field body", r"spoilt\.parquet cannot be read"),
    ("nowhere.txt", "", r"nowhere\.txt: no such file or folder"),
    ("field.jsonl", "--tokenizer nowhere.json", r"cannot read the tokenizer nowhere\.json"),
    ("field.jsonl", "--tokenizer {folder}/latin.txt", r"cannot read the tokenizer .*not UTF-8"),
    ("field.jsonl", "--tokenizer {folder}/field.jsonl", r"is no tokenizer\.json"),
    ("field.jsonl", "--tokenizer {endless}", r"none of the usual end marks.*--eod TOKEN"),
    ("field.jsonl", "--tokenizer {endless} --eod <end>", r"no token '<end>'"),
    ("field.jsonl", "--eod <end>", r"end mark of bytes is byte 0"),
    ("field.jsonl", "--train-bpe 400", r"give --tokenizer FILE or bytes, or train one"),
    ("field.jsonl", "--tokenizer= --train-bpe 100", r"--train-bpe 100 must be at least 257"),
    ("field.jsonl", "--out {folder}/", r"is a folder"),
    ("field.jsonl", "--out {folder}/latin.txt/a", r"cannot write .*latin\.txt/a"),
    ("field.jsonl", "--feld text", r"unexpected '--feld'"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_input_is_one_line(
    name: str, options: str, message: str, tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, content in _files(tmp_path).items():
        (tmp_path / file).write_bytes(content)
    words = options.format(folder=tmp_path, endless=_bad_tokenizer(tmp_path, bpe)).split()
    command = ["data", "prepare", str(tmp_path / name), "--tokenizer", "bytes", "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "out" / "a"), *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message, said), said
    assert not list(tmp_path.glob("out/a.*in"))


def test_bad_documents_are_left_out_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, content in _files(tmp_path).items():
        (tmp_path / file).write_bytes(content)
    names = ("field.jsonl", "broken.jsonl", "latin.jsonl", "empty.jsonl", "latin.txt")
    command = ["data", "prepare", *(str(tmp_path / name) for name in names), "--tokenizer", "bytes"]
    command += ["--out", str(tmp_path / "out" / "a"), "--workers", "2"]
    assert main(command) == 2
    assert main([*command, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert "left out: " in said
    for part in ("2 without the field (first: ", "2 broken JSON line (first: ", "2 not UTF-8 (", "1 empty ("):
        assert part in said, said
    assert written(tmp_path / "out" / "a") == [[*b"good", 0]] * 9
    assert main(command) == 2  # what leaves something out is not what was asked for
    assert main([*command, "--skip-bad"]) == 0


def test_inspect_shows_what_is_there(bpe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = bpe.parent / "own"
    assert main(["data", "inspect", f"{prefix}.bin", "--verify", "--samples", "1"]) == 0
    said = capsys.readouterr().out
    lengths = sorted(len(document) for document in written(prefix))
    assert f"51 documents, {sum(lengths):,} tokens (uint16)" in said
    assert f"least {lengths[0]}, " in said and f"median {lengths[25]}, " in said and f"most {lengths[-1]}, " in said
    assert "end mark at the end of 51 of 51" in said and "digests agree" in said
    shown = open_tokenizer(str(bpe)).decode(written(prefix)[0][:90])
    assert repr(shown)[1:60] in said


DYING = """
import os, sys
from moue_dist.cli.main import main
from moue_dist.data.prepare import workers
def die(unit):
    os.kill(os.getpid(), 9)
workers._shard = die
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def test_a_worker_that_dies_is_one_line(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "two.txt").write_bytes(b"x" * (17 << 20))
    command = [sys.executable, str(tmp_path / "dying.py"), "data", "prepare", str(sources), str(tmp_path / "two.txt")]
    command += ["--tokenizer", "bytes", "--out", str(tmp_path / "a"), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert "one of 2 workers was ended" in done.stderr and "Traceback" not in done.stderr, done.stderr
