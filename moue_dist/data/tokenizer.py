"""Text to tokens and back: bytes, or a tokenizer.json of the `tokenizers` library. Free of torch.

Every tokenizer has an end mark, the token that closes a document. Text never becomes that token: what looks like it
in a document is encoded as the characters that it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy

from moue_dist.config import ConfigError

BYTES = "bytes"
# What end marks are called, the first that a tokenizer has wins; `--eod` names another.
END_MARKS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|eos|>", "[EOS]")


class Tokenizer(Protocol):
    """vocab_size: largest id + 1. eod: the end mark's id. digest: of what decides about ids."""

    name: str
    digest: str
    vocab_size: int
    eod: int
    end_mark: str
    dtype: Any  # of numpy

    def encode(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        """The tokens of each text, without end marks."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of tokens; what is no whole character becomes U+FFFD."""


class ByteTokenizer:
    """A token is a byte of UTF-8; byte 0, which text does not need, is the end mark. 'hi' -> [104, 105]."""

    name = BYTES
    digest = BYTES
    vocab_size = 256
    eod = 0
    end_mark = "\\0"
    dtype: Any = numpy.uint8

    def encode(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        return [numpy.frombuffer(text.encode().replace(b"\0", b""), numpy.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 < i < 256).decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer.json."""

    def __init__(self, content: str, name: str, end_mark: str = "") -> None:
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises Exception itself
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{name} is no tokenizer.json that the library tokenizers reads ({reason}); give such a file, or bytes"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.name = name
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ConfigError(f"{name} has no tokens; give another tokenizer.json")
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_mark = end_mark or next((mark for mark in END_MARKS if mark in vocabulary), "")
        if self.end_mark not in vocabulary:
            asked = f"no token {end_mark!r}" if end_mark else f"none of the usual end marks ({' '.join(END_MARKS)})"
            raise ConfigError(f"{name} has {asked}: name the token that shall end a document with --eod TOKEN")
        self.eod = vocabulary[self.end_mark]
        self.dtype: Any = numpy.uint16 if self.vocab_size < 65500 else numpy.int32  # as megatron-core picks

    def encode(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [numpy.array(encoding.ids, dtype=self.dtype) for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


def open_tokenizer(which: str, end_mark: str = "", name: str = "") -> Tokenizer:
    """`bytes`, or the tokenizer.json at a path; `name` is what messages call it. Raises ConfigError."""
    if which == BYTES:
        if end_mark:
            raise ConfigError(f"--eod {end_mark}: the end mark of bytes is byte 0; leave it out")
        return ByteTokenizer()
    path = Path(which).expanduser()
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"cannot read the tokenizer {which}: {reason}; give a tokenizer.json, or bytes") from None
    return FileTokenizer(content, name or str(path), end_mark)


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE of `vocab_size` tokens, as the content of a tokenizer.json; its end mark is <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_MARKS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())
