"""Whether a command's answer has standard output to itself."""

import os

import pytest

from loadgen.stdout import reserved_stdout


def test_what_libraries_print_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    """A line that a solver prints from C++ would make the JSON unreadable."""
    os.write(1, b"before\n")
    with reserved_stdout():
        os.write(1, b"noise\n")
    os.write(1, b"answer\n")
    seen = capfd.readouterr()
    assert (seen.out, seen.err) == ("before\nanswer\n", "noise\n")


def test_standard_output_is_given_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    """The message that says what went wrong would be lost."""
    with pytest.raises(RuntimeError), reserved_stdout():
        raise RuntimeError
    os.write(1, b"said\n")
    assert capfd.readouterr().out == "said\n"
