"""What the doctor finds."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the diagnosis. FAIL: the mesh will not run, or not serve; WARN: it may not."""

    level: Literal["OK", "WARN", "FAIL"]
    subject: str
    text: str
    remedy: str = ""


def ok(subject: str, text: str) -> Finding:
    return Finding(level="OK", subject=subject, text=text)


def warned(subject: str, text: str, remedy: str) -> Finding:
    return Finding(level="WARN", subject=subject, text=text, remedy=remedy)


def failed(subject: str, text: str, remedy: str) -> Finding:
    return Finding(level="FAIL", subject=subject, text=text, remedy=remedy)
