"""Text that appears token by token: a character comes when its last token has come."""

from __future__ import annotations

from collections.abc import Sequence

from moue_dist.interchange.outgoing.vocabulary import Vocabulary

_HALF = "\ufffd"  # what bytes that are no whole character are decoded to
_LONGEST = 4  # bytes of a character: behind more halves than that, they are no beginning of one


class Writing:
    """What is new of a text after each token. Behind a prompt, whose last tokens may belong to the first character."""

    def __init__(self, words: Vocabulary, prompt: Sequence[int]) -> None:
        self._words, self._ids = words, list(prompt)
        self._told = len(words.decode(self._ids))

    def add(self, token: int) -> str:
        """The characters that this token completes."""
        self._ids.append(token)
        text = self._words.decode(self._ids)
        whole = text.rstrip(_HALF)
        if len(text) - len(whole) < _LONGEST:
            text = whole
        return self._new(text)

    def rest(self) -> str:
        """What was held back."""
        return self._new(self._words.decode(self._ids))

    def _new(self, text: str) -> str:
        new, self._told = text[self._told :], max(self._told, len(text))
        return new
