"""The text of tokens that come one by one, as soon as its characters are whole."""

from collections.abc import Sequence

from data_pipeline.tokenizer import Tokenizer

UNDECODED = "\ufffd"  # in place of bytes that are no character, or not yet


class TextStream:
    """What is written after a prompt, up to the first of the `stop` strings.

    A character may be spelled in bytes over several tokens, and some tokenizers treat the first token of a text in
    their own way. So tokens are decoded after those before them, and what may be half a character waits for the next.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string has been written."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._before, self._new = list(prompt_ids), list[int]()  # tokens whose text is settled, and those after them
        self._settled, self._text, self._given = "", "", 0

    @property
    def text(self) -> str:
        """All that has been written, without a half character at its end, and without a stop string."""
        return self._text

    def add(self, ids: Sequence[int]) -> str:
        """Take the next tokens; returns the text that is certain now, and was not before."""
        assert not self.stopped
        self._new += ids
        written = self._decoded()
        whole = written.rstrip(UNDECODED)
        self._take(self._settled + whole)
        if whole and whole == written:
            self._settled += whole
            self._before, self._new = self._new, []
        return self._give(len(self._text) - (0 if self.stopped else self._may_become_a_stop()))

    def finish(self) -> str:
        """No more tokens come: returns the rest of the text."""
        if not self.stopped:
            self._take(self._settled + self._decoded())
        return self._give(len(self._text))

    def _decoded(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *self._new])[len(before) :]

    def _take(self, text: str) -> None:
        # A stop string that was not there before ends in what is new.
        start = max(0, len(self._text) - max(map(len, self._stop), default=0))
        found = [at for at in (text.find(stop, start) for stop in self._stop) if at >= 0]
        self.stopped = bool(found)
        self._text = text[: min(found)] if found else text

    def _may_become_a_stop(self) -> int:
        """How many characters at the end are the beginning of a stop string."""
        longest = max(map(len, self._stop), default=0)
        for count in range(min(longest - 1, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-count:]) for stop in self._stop):
                return count
        return 0

    def _give(self, end: int) -> str:
        start, self._given = self._given, max(self._given, end)
        return self._text[start : self._given]
