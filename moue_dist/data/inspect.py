"""What tokenized files hold, as lines of text. Free of torch."""

from __future__ import annotations

import numpy

from moue_dist.config import ConfigError
from moue_dist.data.indexed import Index, Note, check_digests, read_index, read_note, tokenizer_path
from moue_dist.data.tokenizer import BYTES, Tokenizer, open_tokenizer

SHOWN = 96  # tokens of a sample


def inspect(prefix: str, tokenizer: str = "", samples: int = 2, verify: bool = False) -> list[str]:
    """Facts about `<prefix>.bin` and `<prefix>.idx`; raises ConfigError where they are broken or do not fit."""
    index, note = read_index(prefix), read_note(prefix)
    lines = [
        f"{prefix}: {index.documents:,} documents, {index.tokens:,} tokens ({index.dtype})",
        f"lengths in tokens: {_spread(index.document_lengths())}",
    ]
    if len(index.lengths) != index.documents:
        lines.append(f"sequences: {len(index.lengths):,}, in tokens: {_spread(index.lengths)}")
    lines += _of_note(note) if note else ["no note of `moue data prepare` beside it"]
    if verify:
        lines.append(_verify(index, note))
    known = tokenizer_of(prefix, note, tokenizer)
    if known is not None:
        lines.append(_end_marks(index, known))
    lines += _samples(index, known, samples)
    return lines


def tokenizer_of(prefix: str, note: Note | None, given: str = "") -> Tokenizer | None:
    """What made the tokens: what is given, or what the note says; None where nobody says."""
    if given:
        return open_tokenizer(given)
    if note is None:
        return None
    if note.tokenizer == BYTES:
        return open_tokenizer(BYTES)
    return open_tokenizer(str(tokenizer_path(prefix)), note.end_mark, note.tokenizer)


def _spread(lengths: numpy.ndarray) -> str:
    if not len(lengths):
        return "none"
    low, *middle, high = numpy.percentile(lengths, [0, 10, 50, 90, 99, 100], method="lower").tolist()
    return (
        f"least {low:,}, "
        + "".join(f"{name} {value:,}, " for name, value in zip(("10%", "median", "90%", "99%"), middle, strict=True))
        + f"most {high:,}, mean {float(lengths.mean()):,.1f}"
    )


def _of_note(note: Note) -> list[str]:
    left = ", ".join(f"{n:,} {reason}" for reason, n in note.left_out.items()) or "nothing"
    return [
        f"tokenizer: {note.tokenizer}, {note.vocab_size:,} tokens, largest used {note.largest_token:,}, "
        f"end mark {note.end_mark} ({note.eod})",
        f"made of {note.text_bytes:,} bytes of text; left out: {left}",
    ]


def _verify(index: Index, note: Note | None) -> str:
    tokens = index.all_tokens()
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0:
        raise ConfigError(f"{index.prefix}.bin holds token {least}: make the tokenized files again")
    if note is None:
        return f"verified: tokens are {least:,} to {most:,}; without a note there is no digest to compare"
    check_digests(index.prefix, note.bin_digest, note.idx_digest)
    return f"verified: digests agree, tokens are {least:,} to {most:,}"


def _end_marks(index: Index, tokenizer: Tokenizer) -> str:
    """How many documents end with the end mark, of up to 10,000 spread over the file."""
    edges = numpy.unique(numpy.linspace(0, index.documents - 1, min(index.documents, 10_000)).astype(numpy.int64))
    ends = numpy.cumsum(index.lengths, dtype=numpy.int64)[index.borders[1:][edges] - 1]
    marked = int((index.all_tokens()[ends - 1] == tokenizer.eod).sum())
    return f"end mark at the end of {marked:,} of {len(edges):,} documents looked at"


def _samples(index: Index, tokenizer: Tokenizer | None, samples: int) -> list[str]:
    """The beginnings of documents spread over the file."""
    lines = []
    ends = numpy.concatenate([[0], numpy.cumsum(index.lengths, dtype=numpy.int64)])
    tokens = index.all_tokens()
    for i in range(min(samples, index.documents)):
        document = i * index.documents // samples
        begin, end = ends[index.borders[document]], ends[index.borders[document + 1]]
        ids = tokens[begin : min(end, begin + SHOWN)].tolist()
        rest = f" ... {end - begin - SHOWN:,} more" if end - begin > SHOWN else ""
        shown = repr(tokenizer.decode(ids)) if tokenizer else " ".join(map(str, ids))
        lines.append(f"document {document:,}, {end - begin:,} tokens: {shown}{rest}")
    return lines
