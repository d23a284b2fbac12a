"""`moue generate` and `moue eval`, as a user calls them, on a run that `moue train` left behind."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from moue_dist.cli.main import main
from moue_dist.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
from moue_dist.config.load import dump_config
from moue_dist.data.corpus import EOD
from moue_dist.interchange.outgoing import vocabulary
from moue_dist.interchange.outgoing.look import tasks
from moue_dist.interchange.outgoing.look.ask import Folder
from moue_dist.interchange.outgoing.look.writing import Writing
from tests.cpu.interchange.trained import in_transformers, needs_transformers
from tests.ranks.spawn import ROOT

TEXT = "Der Fluß trägt 8 Boote; the river carries 8 boats.\n" * 40
SIZE = 32  # tokens of a sequence


def moue(*words: str | Path, good: bool = True) -> str:
    """What `moue` says: on standard output, or in its one line of refusal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, words)))
    assert code == (0 if good else 2), (code, out.getvalue(), err.getvalue())
    return out.getvalue() if good else err.getvalue().strip().splitlines()[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("run")
    (home / "text.txt").write_text(TEXT * 4)
    config = Config(
        name="small",
        output=str(home),
        model=ModelConfig(layers=2, hidden_size=32, heads=4, sequence_length=SIZE),
        moe=MoEConfig(
            pool=6, expert_width=16, topology="rotational", window=4, stride=2, router="universal", state_width=8
        ),
        train=TrainConfig(steps=4, global_batch_size=8, micro_batch_size=4, eval_batches=2, device="cpu"),
        data=DataConfig(source=str(home / "text.txt"), valid_percent=20.0),
    )
    (home / "small.yaml").write_text(dump_config(config))
    words = [sys.executable, "-m", "moue_dist", "train", str(home / "small.yaml")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return home / "small"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    assert "in fp32" in moue("export", run, run.with_name("hf"))
    return run.with_name("hf")


def numbers(said: str) -> list[float]:
    words = said.replace(",", "").replace("(", "").split()
    return [float(word) for word in words if word.replace(".", "").isdigit()]


@needs_transformers
def test_the_loss_of_a_run_is_the_loss_that_it_was_trained_to(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in lines if line["kind"] == "valid"][-1]
    loss, perplexity, bits, tokens, size = numbers(moue("eval", run))
    assert loss == pytest.approx(expected, abs=2e-6)
    assert perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert tokens == 2 * 8 * SIZE and 0.9 * tokens < size <= tokens
    assert bits == pytest.approx(expected * tokens / size / math.log(2), rel=1e-4)


def log_chances(answer: Tensor, ids: list[int]) -> list[float]:
    """Of every token but the first, from logits [1, s, v]."""
    chances = answer[0, :-1].double().log_softmax(-1)
    return [float(chances[i, token]) for i, token in enumerate(ids[1:])]


@needs_transformers
def test_texts_files_and_choices_are_scored_as_transformers_scores_them(exported: Path, tmp_path: Path) -> None:
    text = TEXT[:45]  # more than one sequence
    ids = [EOD, *text.encode()]
    question, choices = "8 boats", ["on a river.", "Fluß"]
    asked = [[EOD, *f"{question} {choice}".encode()] for choice in choices]
    sequences = {"first": ids[: SIZE + 1], "second": ids[SIZE:], "one": asked[0], "other": asked[1]}
    tensors = {name: (exported, torch.tensor([s, s])) for name, s in sequences.items()}
    said = {name: answer["logits"] for name, answer in in_transformers(tensors, tmp_path).items()}
    nats = -sum(log_chances(said["first"], sequences["first"]) + log_chances(said["second"], sequences["second"]))

    (tmp_path / "a.txt").write_text(text)
    loss, _, bits, tokens, size = numbers(moue("eval", exported, "--data", tmp_path / "a.txt"))
    assert (tokens, size) == (len(text.encode()), len(text.encode()))
    assert loss == pytest.approx(nats / tokens, abs=2e-6)
    assert bits == pytest.approx(nats / tokens / math.log(2), abs=1e-4)
    found = numbers(moue("eval", exported, "--data", tmp_path / "a.txt", "--sequences", "1"))
    assert found[3] == SIZE

    sums = [sum(log_chances(said[n], s)[len(question) :]) for n, s in (("one", asked[0]), ("other", asked[1]))]
    by_bytes = [total / len(choice.encode()) for total, choice in zip(sums, choices, strict=True)]
    right, right_by_bytes = sums.index(max(sums)), by_bytes.index(max(by_bytes))
    lines = [json.dumps({"question": question, "choices": choices, "answer": a}) for a in (right, right, 1 - right)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    said_by_bytes = 2 / 3 if right == right_by_bytes else 1 / 3
    expected = f"t: accuracy {2 / 3:.4f}, by bytes {said_by_bytes:.4f}  (3 items)"
    assert moue("eval", exported, "--tasks", tmp_path / "t.jsonl").strip() == expected


@needs_transformers
def test_tokenized_files_are_read_as_they_are(run: Path, exported: Path) -> None:
    (prefix,) = (run / "data").glob("corpus-*.bin")
    loss, *_, tokens, size = numbers(moue("eval", exported, "--data", prefix.with_suffix("")))
    text = (run.parent / "text.txt").read_bytes()
    ends = prefix.stat().st_size - len(text)
    assert tokens == prefix.stat().st_size - 1 and size == tokens - ends
    assert 1 < loss < 6


@needs_transformers
def test_generation_goes_on_from_the_prompt(run: Path, exported: Path, tmp_path: Path) -> None:
    prompt = "Der Fl"
    said = moue("generate", exported, "--prompt", prompt, "--max-tokens", "9")
    ids = torch.tensor([list(prompt.encode()[:5])] * 2)
    answer = in_transformers({"x": (exported, ids)}, tmp_path)["x"]["cached"][0].tolist()
    short = moue("generate", exported, "--prompt", prompt[:5], "--max-tokens", "9")
    assert short == bytes(b for b in answer if b).decode(errors="replace") + "\n"
    assert said.startswith(prompt) and said.endswith("\n") and len(said) > len(prompt) + 1
    assert moue("generate", run, "--prompt", prompt, "--max-tokens", "9") == said
    hot = ("generate", exported, "--prompt", prompt, "--max-tokens", "9", "--temperature", "3", "--seed", "1")
    drawn = [moue(*hot) for _ in range(2)]
    assert drawn[0] == drawn[1] != said


def test_bad_input_is_one_line(run: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "t.jsonl").write_text('{"question": "a", "choices": ["b"], "answer": 0}\n{"question": "a"}\n')
    assert "no such folder" in moue("generate", tmp_path / "gone", "--prompt", "x", good=False)
    assert "no checkpoint in" in moue("eval", tmp_path, good=False)
    assert "give --data or --tasks" in moue("eval", exported, good=False)
    assert "too few" in moue("eval", exported, "--data", tmp_path / "short.txt", good=False)
    assert "cannot read" in moue("eval", exported, "--data", tmp_path / "bad.txt", good=False)
    assert "no text file" in moue("eval", exported, "--data", tmp_path / "gone", good=False)
    assert "line 2 of" in moue("eval", exported, "--tasks", tmp_path / "t.jsonl", good=False)
    assert "is there already" in moue("export", run, exported, good=False)
    assert "unexpected" in moue("export", run, tmp_path / "x", "--train.steps", "3", good=False)


# parts


@pytest.mark.parametrize("text", ["", "plain", "Grüße, 漢字 😀\n\t\r", "<|endoftext|> is text here", "a\0b Ā"])
def test_bytes_are_a_tokenizer(text: str, tmp_path: Path) -> None:
    words = vocabulary.of_bytes()
    expected = list(text.replace("\0", "").encode())  # as corpora are written
    assert words.encode(text) == expected and words.end == EOD and words.size == 256
    assert words.decode(expected) == text.replace("\0", "")
    assert words.decode([EOD, *expected, EOD, 300]) == text.replace("\0", "")
    assert words.count_bytes([EOD, *expected, EOD, 300]) == len(expected)
    vocabulary.save(words, tmp_path, 99)
    again = vocabulary.of_folder(tmp_path)
    assert again.encode(text) == expected and again.end == EOD


def bpe() -> vocabulary.Vocabulary:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return vocabulary.Vocabulary(tokenizer, tokenizer.token_to_id("</s>"))


def test_bytes_of_tokens_are_counted() -> None:
    words, text = bpe(), "Boote tragen 😀 </s> Fluß"
    ids = words.encode(text)
    assert words.end not in ids and len(ids) < len(text.encode())
    assert words.count_bytes([*ids, words.end]) == len(text.encode())
    assert sum(words.count_bytes([i]) for i in ids) == len(text.encode())


def test_text_appears_character_by_character() -> None:
    words = vocabulary.of_bytes()
    ids = "aé😀".encode()
    writing = Writing(words, ids[:1])
    assert [writing.add(b) for b in ids[1:]] == ["", "é", "", "", "", "😀"]
    assert [writing.add(b) for b in (0xFF, 0xFF, 0xFF, 0xFF)][:3] == ["", "", ""]
    assert writing.rest() == ""
    writing = Writing(words, [])
    assert (writing.add(0xC3), writing.rest()) == ("", "\ufffd")


def test_a_choice_begins_where_it_parts_from_its_question() -> None:
    words = vocabulary.of_bytes()
    folder = Folder(Path(), words, 256, 8)
    item = tasks.Item("ab", ("c", "longer than all"), 0)
    one, other = tasks.sequences_of(folder, [item])
    assert (one.ids, one.first) == ([EOD, *b"ab c"], 3)
    assert (other.ids, other.first) == (list(b"b longer than all"), 1)  # of a choice nothing is left out
    spaced = tasks.sequences_of(folder, [tasks.Item("ab ", ("c",), 0)])
    assert (spaced[0].ids, spaced[0].first) == ([EOD, *b"ab c"], 4)
    merged = bpe()
    question, choice = "carries 8 ", "boats"
    whole, asked = merged.encode(question + choice), merged.encode(question)
    assert whole[: len(asked)] != asked and whole[: len(asked) - 1] == asked[:-1]  # the blank has joined the choice
    (found,) = tasks.sequences_of(replace(folder, words=merged, longest=99), [tasks.Item(question, (choice,), 0)])
    assert (found.ids, found.first) == ([merged.end, *whole], len(asked))


def test_choices_are_judged_by_sums_and_by_bytes() -> None:
    items = [tasks.Item("q", ("aa", "bbbbbbbb"), 0), tasks.Item("q", ("c", "d", "e"), 2)]
    result = tasks.judge("name", items, [-2.0, -4.0, -1.0, -3.0, -0.5])
    assert (result.items, result.accuracy, result.accuracy_by_bytes) == (2, 1.0, 0.5)
