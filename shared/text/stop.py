"""Finds stop strings in a stream of text, however the stream is cut.

Text that might be the start of a stop string is held back until it is known not to be one, so a
client never sees part of a stop string. The match that ends first wins (of those, the longest):
any other rule would make the answer depend on where the chunks happen to end.
"""


class StopMatcher:
    """Give it each piece of text; it answers with what may be shown."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        """``stop`` holds no empty string: that would match before the first token."""
        assert all(stop), "a stop string is empty"
        self._stop = stop
        self._held = ""
        self._stopped = False

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is now final, and whether a stop string ended it: nothing follows then."""
        if not self._stop:
            return text, False
        if self._stopped:
            return "", True
        text = self._held + text
        start = self._match(text)
        if start is not None:
            self._held, self._stopped = "", True
            return text[:start], True
        keep = self._start_of_possible_stop(text)
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """What was held back, once no more text can follow."""
        held, self._held = self._held, ""
        return held

    def _match(self, text: str) -> int | None:
        """Where the stop string that ends first begins."""
        found = [
            (start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0
        ]
        return min(found)[1] if found else None

    def _start_of_possible_stop(self, text: str) -> int:
        """Index of the longest suffix that is a proper prefix of a stop string."""
        best = len(text)
        for stop in self._stop:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= at < best:
                if stop.startswith(text[at:]):
                    best = at
                    break
                at = text.find(stop[0], at + 1)
        return best
