"""Requests taken over from another replica, by numbers alone: held first, then let go on.

A request that comes with the KV of its first ``computed`` tokens gets blocks for it at once, and
goes on where it was: it decodes, or its prefill does. One that comes without, or for which there
is no room, waits before those that wait here already, and is computed anew. Held requests never
stand in the way of those that run: when blocks are short they lose theirs first.

Blocks that were copied are their owner's alone: the prefix cache neither finds nor keeps them.
They came without the hashes of their contents, and hashing whole prompts in a pause would prolong
it.
"""

from collections import OrderedDict

from services.worker.engine.batching_state import BatchState
from services.worker.engine.batching_types import HELD, PREFILL, WAITING, Sequence
from shared.errors import Rejected


class TakeoverState(BatchState):
    """``held`` do not run. ``entering`` are let go on, and join when the plan under way is done."""

    def hold(
        self,
        key: str,
        *,
        prompt_tokens: int,
        output_tokens: int,
        earlier_tokens: int = 0,
        computed_tokens: int = 0,
    ) -> Sequence:
        """Take a request over, as ``Batch.add`` would, and hold it until ``release``. The KV of
        its first ``computed_tokens`` comes with it if there is room: then ``computed`` of what is
        returned is as much, else 0. The waiting queue is never too full for it.

        Raises Rejected with code ``too_long`` or ``invalid`` (the key is live here already)."""
        if key in self.sequences or key in self.entering:
            raise Rejected("invalid", f"request {key} is live already")
        self.unhold(key)
        self.check_length(prompt_tokens + output_tokens)
        sequence = Sequence(
            key,
            number=0,  # it takes its place in the order when it joins
            prompt=prompt_tokens,
            known=prompt_tokens + earlier_tokens,
            tokens_max=prompt_tokens + output_tokens,
        )
        sequence.started = earlier_tokens > 0
        sequence.phase = HELD
        sequence.computed = min(computed_tokens, sequence.known - 1)
        if sequence.computed and not self._reserve(sequence):
            sequence.computed = 0
        self.held[key] = sequence
        return sequence

    def unhold(self, key: str) -> bool:
        """Forget a held request, or one that is about to join; False if there is none."""
        sequence = self.held.pop(key, None) or self.entering.pop(key, None)
        if sequence is not None:
            self._give_back(sequence)
        return sequence is not None

    def release(self, *, keep: bool, key: str | None = None) -> None:
        """Let those that are held go on from the next plan on, or forget them; one, or all."""
        for one in list(self.held) if key is None else [key]:
            if keep:
                self.entering[one] = self.held.pop(one)
                self.taken_total += 1
            else:
                self.unhold(one)

    def _enter(self) -> None:
        """Those that decode join behind those that run and before those in prefill, then those in
        prefill; the others wait first. No plan is under way."""
        entering, self.entering = list(self.entering.values()), {}
        prefilling = [self.running.pop(sequence.key) for sequence in self.partials]
        self.partials = []
        again: list[Sequence] = []
        for sequence in entering:
            self.sequences[sequence.key] = sequence
            self._pending += sequence.tokens_max - sequence.computed
            if not sequence.computed:
                sequence.phase = WAITING
                again.append(sequence)
            elif self._decodes_next(sequence):
                self.running[sequence.key] = sequence
                self._pending -= 1
                self._decode(sequence)
            else:
                sequence.phase = PREFILL
                prefilling.append(sequence)
        for sequence in prefilling:
            self.running[sequence.key] = sequence
            self.partials.append(sequence)
        self.waiting = OrderedDict(
            [(sequence.key, sequence) for sequence in again] + list(self.waiting.items())
        )
        for number, sequence in enumerate((*self.running.values(), *self.waiting.values())):
            sequence.number = number
        self._arrivals = max(self._arrivals, len(self.sequences))

    def _reserve(self, sequence: Sequence) -> bool:
        """Blocks for it, if as many are free, and one for each that runs or is held with blocks."""
        kv = self.kv
        others = len(self.running) + self._places()
        if others >= self.limits.running_max:
            return False
        blocks = kv.blocks_of(self._reserved(sequence))
        if blocks > kv.free - kv.due(self.steps_total) - others:
            return False
        kv.take(blocks)
        self._admissions += 1
        sequence.admission = self._admissions
        return True

    def _make_room(self, blocks: int) -> None:
        """Take blocks from those held, the newest first, until ``blocks`` are free or none holds
        any: they will be computed anew."""
        for sequence in reversed(list(self.held.values())):
            if self.kv.free >= blocks:
                return
            self._give_back(sequence)

    def _has_place(self) -> bool:
        """Whether one more may run. Where nobody does, those that are held give way."""
        if len(self.running) + self._places() < self.limits.running_max:
            return True
        if self.running:
            return False
        newest = next(held for held in reversed(list(self.held.values())) if held.computed)
        self._give_back(newest)
        return True

    def _places(self) -> int:
        """How many will join with their KV."""
        if not self.held and not self.entering:
            return 0
        return sum(sequence.computed > 0 for sequence in self._standing())

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.computed:
            self.kv.give(self.kv.blocks_of(self._reserved(sequence)))
            sequence.computed = 0
