"""All that ``oserve plan`` answers with: the plan, and what was asked beside it."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loadgen.planning.advice import Ask, Brought, better_link, more_gpus, start_words
from loadgen.planning.answer import Answer, Rate
from loadgen.planning.demand import Expected
from loadgen.planning.machine import Site
from loadgen.planning.planner import NOTHING, MakePolicy, ask, production, rates_of
from loadgen.planning.what_if import WhatIf
from shared.messages.plans import DeploymentPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """``topology``: what it is called. ``in_force``: what stands, if anything does."""

    site: Site
    expected: Expected
    topology: str
    in_force: DeploymentPlan = NOTHING
    what_ifs: tuple[WhatIf, ...] = ()
    explain: bool = False


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one ``--what-if``."""

    what_if: str
    answer: Answer


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """``fresh``: the plan as if nothing stood yet, where something does: what changes of hardware
    are compared with. ``brought`` and ``starts`` are of ``--explain``."""

    answer: Answer
    rates: tuple[Rate, ...]
    fresh: Answer | None = None
    what_ifs: tuple[Changed, ...] = ()
    brought: tuple[Brought, ...] = ()
    starts: tuple[str, ...] = ()


def report(question: Question, make: MakePolicy = production) -> Report:
    """Ask for the plan, and for what ``what_ifs`` and ``explain`` want to know; ``make`` gives the
    policy, a new one for each question, since it remembers. Raises OServeError."""
    site, expected, in_force = question.site, question.expected, question.in_force

    def new(site: Site, expected: Expected) -> Answer:
        return ask(site, expected, topology=question.topology, make=make)

    answer = ask(site, expected, in_force=in_force, topology=question.topology, make=make)
    fresh: Answer | None = None
    if in_force.replicas and (question.what_ifs or question.explain):
        fresh = new(site, expected)
    with tempfile.TemporaryDirectory(prefix="oserve-plan-") as name:
        folder = Path(name)
        changed = tuple(
            _changed(question, what_if, new, folder / str(number))
            for number, what_if in enumerate(question.what_ifs)
        )
        brought = _explained(question, fresh or answer, new, folder) if question.explain else ()
    return Report(
        answer=answer,
        rates=rates_of(site, expected),
        fresh=fresh,
        what_ifs=changed,
        brought=brought,
        starts=start_words(site, answer.plan) if question.explain and answer.plan else (),
    )


def _explained(question: Question, base: Answer, new: Ask, folder: Path) -> tuple[Brought, ...]:
    more = more_gpus(question.site, question.expected, base, new)
    link = better_link(question.site, question.expected, base, new, folder / "link")
    return (*more, link) if link is not None else more


def _changed(question: Question, what_if: WhatIf, new: Ask, folder: Path) -> Changed:
    site = what_if.of(question.site, folder)
    return Changed(what_if=what_if.text, answer=new(site, question.expected.scaled(what_if.scale)))
