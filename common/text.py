"""Token ids to text as they come: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """Decodes a growing list of ids. `text` is what is certain so far; `stopped` is set by a stop string, which
    ends the text and is not part of it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = [stop for stop in stop_strings if stop]
        self._ids: list[int] = []
        self._start = self._read = 0  # ids[start:read] is context: some decoders treat the first token differently
        self._held = ""  # decoded, but maybe the beginning of a stop string
        self.text = ""
        self.stopped = False
        self.stop_string: str | None = None  # the one that ended the text: of several, the one that begins first

    def push(self, token: int) -> str:
        """Takes a token; returns the text that became certain."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""  # a character's bytes are not all there yet
        self._start, self._read = self._read, len(self._ids)
        return self._release(now[len(before) :], final=False)

    def finish(self) -> str:
        """No more tokens: returns what was held back."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._start : self._read])
        return self._release(self._decode(self._ids[self._start :])[len(before) :], final=True)

    def _release(self, new: str, final: bool) -> str:
        pending = self._held + new
        found = [(at, stop) for stop in self._stops if (at := pending.find(stop)) >= 0]
        if found:
            first, self.stop_string = min(found)
            self.stopped, pending, keep = True, pending[:first], 0
        else:
            keep = 0 if final else self._possible_stop(pending)
        certain = pending[: len(pending) - keep]
        self._held = pending[len(pending) - keep :]
        self.text += certain
        return certain

    def _possible_stop(self, pending: str) -> int:
        """Length of the longest end of `pending` with which a stop string begins."""
        lengths = (
            n for stop in self._stops for n in range(1, min(len(stop), len(pending) + 1)) if pending.endswith(stop[:n])
        )
        return max(lengths, default=0)
