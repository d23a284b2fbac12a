"""The tokenizer of a run or of an exported folder: a file of the `tokenizers` library, also where tokens are bytes.

Text is only ever text here: an end mark that stands written in it is not taken for one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moue_dist.config import Config, ConfigError
from moue_dist.config.blend import parse_blend
from moue_dist.data.indexed import read_note, tokenizer_path
from moue_dist.data.tokenizer import BYTES, END_MARKS

FILE, ABOUT = "tokenizer.json", "tokenizer_config.json"
EOD = 0  # the end mark where tokens are bytes, as moue_dist/data/corpus.py writes it
END = "<|endoftext|>"  # how the end mark of bytes is spelt
_ENDS = (*END_MARKS, "<|im_end|>")


class Vocabulary:
    """Text to tokens and back. `end` is the end mark's token, None where there is none."""

    def __init__(self, tokenizer: Tokenizer, end: int | None) -> None:
        self.tokenizer, self.end = tokenizer, end
        tokenizer.encode_special_tokens = True  # text is text
        model = json.loads(tokenizer.to_str())
        self._by_bytes = (model.get("decoder") or {}).get("type") == "ByteLevel"
        added = tokenizer.get_added_tokens_decoder().items()
        self._added = {i: 0 if token.special else len(token.content.encode()) for i, token in added}

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without end marks."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text; end marks and tokens that the tokenizer does not know leave nothing."""
        return self.tokenizer.decode([i for i in ids if i < self.size], skip_special_tokens=True)

    def count_bytes(self, ids: Sequence[int]) -> int:
        """Bytes of the text that tokens stand for: of each token where it is made of bytes, else of all of them."""
        if not self._by_bytes:
            return len(self.decode(ids).encode())
        return sum(self._added[i] if i in self._added else len(self.tokenizer.id_to_token(i) or "") for i in ids)


def of_bytes() -> Vocabulary:
    """Token i is byte i; byte 0, which text never holds, is the end mark."""
    letters = _letters()
    vocabulary = {END: EOD} | {letters[b]: b for b in range(256) if b != EOD}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return Vocabulary(tokenizer, EOD)


def _letters() -> dict[int, str]:
    """The letter that stands for each byte in GPT-2's byte-level vocabularies."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def of_run(config: Config) -> Vocabulary:
    """What made the run's tokens: what data.tokenizer names, or what is noted beside the first files of its blend;
    bytes where it reads text itself. Raises ConfigError where nobody says.
    """
    if not config.data.blend:
        return of_bytes()
    prefix = str(Path(parse_blend(config.data.blend)[0].prefix).expanduser())
    named, end = config.data.tokenizer, ""
    if not named:
        note = read_note(prefix)
        if note is None:
            raise ConfigError(f"nothing beside {prefix}.bin says what made its tokens; name it in data.tokenizer")
        named, end = (BYTES if note.tokenizer == BYTES else str(tokenizer_path(prefix))), note.end_mark
    if named == BYTES:
        return of_bytes()
    found = of_file(Path(named).expanduser())
    return Vocabulary(found.tokenizer, found.tokenizer.token_to_id(end)) if end else found


def of_folder(folder: Path) -> Vocabulary:
    """The tokenizer in an exported folder."""
    return of_file(folder / FILE)


def of_file(path: Path) -> Vocabulary:
    """A tokenizer.json, or the one in the folder `path`; its end mark is named by a tokenizer_config.json beside it."""
    path = path / FILE if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare ones
        raise ConfigError(f"{path} is no tokenizer of the `tokenizers` library ({error})") from None
    return Vocabulary(tokenizer, _end_of(tokenizer, path.with_name(ABOUT)))


def _end_of(tokenizer: Tokenizer, about: Path) -> int | None:
    names: tuple[str, ...] = _ENDS
    if about.is_file():
        try:
            named = json.loads(about.read_text()).get("eos_token")
        except (ValueError, AttributeError):
            raise ConfigError(f"{about} is no JSON object") from None
        named = named.get("content") if isinstance(named, dict) else named
        names = (named,) if named else ()
    found = (tokenizer.token_to_id(name) for name in names)
    return next((token for token in found if token is not None), None)


def save(vocabulary: Vocabulary, folder: Path, longest: int) -> None:
    """Write the tokenizer into a folder, in the form that transformers reads. `longest`: tokens of a sequence."""
    vocabulary.tokenizer.encode_special_tokens = False  # in a folder it behaves as tokenizers do
    vocabulary.tokenizer.save(str(folder / FILE))
    vocabulary.tokenizer.encode_special_tokens = True
    end = None if vocabulary.end is None else vocabulary.tokenizer.id_to_token(vocabulary.end)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
