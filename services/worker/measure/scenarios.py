"""The steps worth timing, within an engine's bounds.

Prompts alone pin what depends on the number of tokens, on chunks and on pairs; ladders of decoding
requests, at several contexts, what depends on batch and context, and with a prompt added now and
then, that both sum. Contexts within a batch differ as they do in service, since an engine may take
longer for unlike ones. Two made-up traces look like service: one is fitted, one judges.
"""

import numpy as np

from services.worker.measure.ledger import SweepFailed
from services.worker.measure.sweep import OUTPUT_TOKENS_MAX, Bench, Scenario
from services.worker.measure.target import Target

CONTEXTS = (32, 128, 512, 2048, 8192, 32768)
RAMP_TOKENS_MAX = (2048, 16384)
"""Prompt tokens that a ladder may compute before its first decode: the dearer ones only run where
there is time."""
CHUNKS_MAX = (4, 16)
STEPS_PER_RUNG = 5
TRACE_STEPS = 48
PROMPT_TOKENS_MIN = 2  # one alone could as well be decoded

_GOLDEN = 0.6180339887  # multiples spread evenly (Weyl): ragged, yet the same each time


def scenarios(target: Target) -> list[Scenario]:
    """All that fit into the engine, those first that no fit can do without, then the cheap ones;
    raises SweepFailed if it holds too little to be measured."""
    context = _prompt_tokens_max(target)
    if context < CONTEXTS[0]:
        raise SweepFailed(
            f"a context of {target.context_tokens_max} tokens and a KV cache of "
            f"{target.kv_tokens} are too short to sweep: allow "
            f"{CONTEXTS[0] + 2 * OUTPUT_TOKENS_MAX} at least"
        )
    first = [_single_prompts(target), _trace(target, 0), _trace(target, 1), _many_prompts(target)]
    chunked = [_long_prompt(target, chunks_max) for chunks_max in CHUNKS_MAX]
    others = {scenario.name: scenario for scenario in chunked}
    for ramp in RAMP_TOKENS_MAX:
        for wished in CONTEXTS:
            length = min(wished, context)
            batch = min(ramp // length, _requests_max(target, length))
            if batch >= 1:
                ladder = _ladder(target, length, batch)
                others[ladder.name] = ladder
    return first + sorted(others.values(), key=lambda scenario: (scenario.tokens, scenario.name))


def _prompt_tokens_max(target: Target) -> int:
    return (
        min(target.context_tokens_max, target.kv_tokens - target.block_tokens) - OUTPUT_TOKENS_MAX
    )


def _requests_max(target: Target, prompt_tokens: int) -> int:
    """How many such requests run without pressing each other out of the cache, one row and the
    room for a prompt of one step left free."""
    each = prompt_tokens * 9 // 8 + OUTPUT_TOKENS_MAX + 2 * target.block_tokens  # ragged
    room = target.kv_tokens - 2 * target.batch_tokens_max - OUTPUT_TOKENS_MAX
    return max(0, min(target.running_max - 1, room // each))


def _powers(last: int) -> list[int]:
    """1, 2, 4, ... and ``last``."""
    return sorted({1 << bit for bit in range(last.bit_length())} | {last})


def _single_prompts(target: Target) -> Scenario:
    """Each length computed in one step."""
    longest = min(target.batch_tokens_max, _prompt_tokens_max(target))
    lengths = sorted({*_powers(longest), *(3 * n for n in _powers(longest // 3))} - {1})

    def run(bench: Bench) -> None:
        for length in lengths:
            key = bench.add(length)
            bench.step()
            bench.drop(key)

    return Scenario(name="prompts one by one", tokens=sum(lengths), run=run, needed=True)


def _many_prompts(target: Target) -> Scenario:
    """Several prompts in one step."""
    budget = target.batch_tokens_max
    splits: list[tuple[int, int]] = []
    for count in _powers(min(32, target.running_max))[1:]:
        for length in {8, 32, budget // count}:
            fits = count <= _requests_max(target, length) and count * length <= budget
            if PROMPT_TOKENS_MIN <= length <= _prompt_tokens_max(target) and fits:
                splits.append((count, length))
    splits.sort()

    def run(bench: Bench) -> None:
        for count, length in splits:
            for _ in range(count):
                bench.add(length)
            bench.step()
            _clear(bench)

    tokens = sum(count * length for count, length in splits)
    return Scenario(name="prompts together", tokens=tokens, run=run, needed=True)


def _long_prompt(target: Target, chunks_max: int) -> Scenario:
    """Chunks after more and more tokens in the cache."""
    longest = _prompt_tokens_max(target)
    budget = target.batch_tokens_max
    full = min(max(1, longest // budget), chunks_max)
    lengths = {min(full * budget, longest)}
    for chunks, rest in ((1, budget // 16), (full // 2, budget // 4)):
        if chunks and rest >= PROMPT_TOKENS_MIN and chunks * budget + rest <= longest:
            lengths.add(chunks * budget + rest)

    def run(bench: Bench) -> None:
        for length in sorted(lengths):
            bench.add(length)
            while bench.prefilling:
                bench.step()
            _clear(bench)

    return Scenario(name=f"prompts in {full} chunks", tokens=sum(lengths), run=run)


def _ladder(target: Target, length: int, batch: int) -> Scenario:
    """``batch`` requests of about ``length`` tokens decode; half of them leave at each rung."""
    budget = target.batch_tokens_max
    longest = _prompt_tokens_max(target)
    prompts = [
        max(PROMPT_TOKENS_MIN, min(longest, round(length * (0.5 + i * _GOLDEN % 1))))
        for i in range(1, batch + 1)
    ]

    def run(bench: Bench) -> None:
        for prompt in prompts:
            bench.add(prompt)
        while bench.prefilling:
            bench.step(note=False)
        rung = 0
        while bench.live:
            bench.decode(STEPS_PER_RUNG)
            for added in (budget // 16, budget // 4, budget + PROMPT_TOKENS_MIN if rung % 2 else 0):
                if PROMPT_TOKENS_MIN <= added <= longest:
                    _with_prompt(bench, added)
            for key in bench.live[len(bench.live) // 2 :]:
                bench.drop(key)
            rung += 1

    rungs = batch.bit_length()
    tokens = sum(prompts) + rungs * (batch // 2 + budget)
    return Scenario(name=f"decode {batch} x {length} tokens", tokens=tokens, run=run)


def _with_prompt(bench: Bench, tokens: int) -> None:
    """One step that also computes a prompt, or its first chunk."""
    key = bench.add(tokens)
    bench.step()
    bench.drop(key)


def _trace(target: Target, seed: int) -> Scenario:
    """Requests come at random while others run, and leave after some tokens."""
    random = np.random.default_rng(seed)
    longest = min(_prompt_tokens_max(target), target.batch_tokens_max, target.kv_tokens // 16)
    running_max = min(24, _requests_max(target, longest))
    arrivals: list[list[tuple[int, int]]] = []  # at each step: prompt and output tokens
    for _ in range(TRACE_STEPS):
        count = int(random.poisson(0.5))
        prompts = np.exp(random.uniform(np.log(8), np.log(max(9, longest)), count))
        outputs = random.integers(2, 60, count)
        arrivals.append([(int(p), int(o)) for p, o in zip(prompts, outputs, strict=True)])

    def run(bench: Bench) -> None:
        leaves: dict[str, int] = {}
        for step, arriving in enumerate(arrivals):
            for prompt, output in arriving:
                if len(bench.live) < running_max:
                    leaves[bench.add(prompt)] = step + output
            for key in [key for key, last in leaves.items() if last <= step]:
                bench.drop(key)
                del leaves[key]
            if bench.live:
                bench.step()

    tokens = sum(prompt for arriving in arrivals for prompt, _ in arriving)
    return Scenario(
        name=f"made-up trace {seed}", tokens=tokens, run=run, needed=True, held_out=bool(seed)
    )


def _clear(bench: Bench) -> None:
    for key in bench.live:
        bench.drop(key)
