"""The README of the ingress says what the code does."""

import re
import tomllib
from pathlib import Path
from typing import get_args

import msgspec

from services.ingress.config import IngressConfig
from services.ingress.core import INPUTS
from services.ingress.journey import Phase
from services.ingress.keys import KeySpec
from services.ingress.openai_errors import from_failure
from shared.messages.requests import FailureCode

TEXT = (Path(__file__).resolve().parents[2] / "services/ingress/README.md").read_text("utf-8")


def test_knobs_are_those_of_the_config() -> None:
    """An operator would set a knob that does not exist, or trust a default that changed."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", TEXT.partition("## Knobs")[2], re.MULTILINE)
    fields = msgspec.structs.fields(IngressConfig)
    assert dict(rows) == {f.name: str(f.default) or "(empty)" for f in fields}


def test_subjects_are_those_of_the_core() -> None:
    """Someone who writes to a subject of the table would not be heard."""
    rows = re.findall(r"^\| in \| `([^`]+)`[^|]*\| `(\w+)`", TEXT, re.MULTILINE)
    assert dict(rows) == {s.pattern: s.message.__name__ for s in INPUTS}


def test_states_are_those_of_a_journey() -> None:
    """Someone who debugs a stuck request would look for a state that does not exist."""
    drawn = set(re.findall(r"^    (\w+) --> (\w+):", TEXT, re.MULTILINE))
    assert {state for pair in drawn for state in pair} == set(get_args(Phase))


def test_the_keys_example_is_a_keys_file() -> None:
    """Whoever copies the example would be refused at start, or a field would stay unknown."""
    example = re.search(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert example is not None
    (entry,) = tomllib.loads(example[1])["keys"]
    msgspec.convert(entry, KeySpec)
    assert set(entry) == set(KeySpec.__struct_fields__)


def test_errors_of_the_mesh_are_in_the_table() -> None:
    """A client's author would meet a code that is nowhere explained."""
    rows = re.findall(r"^\| (\d{3}) \| (.+?) \|", TEXT, re.MULTILINE)
    listed = {
        (int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)
    }
    for failure in get_args(FailureCode):
        error = from_failure(failure, "detail")
        assert (error.status, error.code or "null") in listed, failure
