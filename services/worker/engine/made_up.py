"""Tokens made up from numbers: the same for the same seed, prompt and position, anywhere.

Mixed numbers come from murmur3's finaliser (Appleby, 2011); their low bits choose a letter, the
others whether the text ends there.
"""

from array import array
from zlib import crc32

from shared.messages.requests import TokenLogprobs
from shared.text import Tokenizer

# Roughly as often as in English, so that made-up text has words.
_LETTERS = (
    " " * 22 + "e" * 13 + "t" * 9 + "a" * 8 + "o" * 8 + "i" * 7 + "n" * 7 + "s" * 7 + "h" * 6
    + "r" * 6 + "d" * 5 + "l" * 4 + "u" * 3 + "c" * 3 + "m" * 3 + "w" * 3 + "f" * 2 + "g" * 2
    + "y" * 2 + "p" * 2 + "b" * 2 + "vk" + ".,"
)  # fmt: skip
LETTER_BITS = 7
LETTER_MASK = (1 << LETTER_BITS) - 1
EOS_BITS = 32 - LETTER_BITS
_MASK = 0xFFFFFFFF
assert len(_LETTERS) == LETTER_MASK + 1


def letter_tokens(tokenizer: Tokenizer) -> list[int]:
    """The token of each letter, as often as the letter is to come."""
    tokens = {c: tokenizer.encode(c, add_special_tokens=False)[-1] for c in set(_LETTERS)}
    return [tokens[c] for c in _LETTERS]


def root_of(prompt_tokens: list[int], *, seed: int) -> int:
    """What all tokens of a request depend on."""
    return crc32(array("q", prompt_tokens).tobytes(), seed & _MASK)


def mix(root: int, position: int) -> int:
    """32 bits that look random and depend on nothing else."""
    mixed = (root + position * 0x9E3779B1) & _MASK
    mixed = ((mixed ^ mixed >> 16) * 0x85EBCA6B) & _MASK
    mixed = ((mixed ^ mixed >> 13) * 0xC2B2AE35) & _MASK
    return mixed ^ mixed >> 16


def made_up_logprobs(token: int, mixed: int, *, count: int, vocabulary: int) -> TokenLogprobs:
    """A distribution with the chosen token at its head; each next one is half as likely."""
    first = -((mixed >> LETTER_BITS & 255) + 177) / 256  # below ln(1/2): all sum to less than 1
    return TokenLogprobs(
        logprob=first,
        top_tokens=[(token + rank) % vocabulary for rank in range(count)],
        top_logprobs=[first - rank * 0.6931471805599453 for rank in range(count)],
    )
