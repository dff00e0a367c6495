"""The deterministic "model": text is a pure function of the weights and of all text before it.

Like a real model at temperature 0 it is autoregressive: continuing from a text that it wrote itself goes on exactly
as it would have. It says nonsense in lower-case syllables; who asks the same of another adapter gets other nonsense.

A token is up to three bytes of UTF-8, and its id is those bytes, so any text can be told from its ids and back.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

EOS_ID = 2
_FULL_STOP = "."
_FIRST_ID = 256  # ids below are special
_BYTES_BITS = 24
_PRIME = (1 << 61) - 1
_MIX = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_PIECES = re.compile(rb"[\x00-\x7f]{1,3}|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\x00-\xff]")
_UNLIKELY = -9.0  # logprob, or somewhat less, of a token that the model would not have said


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the output. `text` is empty while a character's bytes are incomplete, and for the end token."""

    id: int
    text: str
    logprob: float = -0.1


def token_id(piece: bytes) -> int:
    """The id of a piece of one to three bytes."""
    return _FIRST_ID + ((len(piece) - 1) << _BYTES_BITS | int.from_bytes(piece))


def token_bytes(id: int) -> bytes:
    """The bytes of an id; empty for special ones. An id that no text has stands for some bytes all the same."""
    if id < _FIRST_ID:
        return b""
    length, value = divmod(id - _FIRST_ID, 1 << _BYTES_BITS)
    return (value % (1 << 8 * (length + 1))).to_bytes(length + 1)


def in_vocabulary(id: int) -> bool:
    """Whether an id is one of a token."""
    return 0 <= id < _FIRST_ID + (3 << _BYTES_BITS)


def tokenize(text: str) -> list[int]:
    """The ids of a text."""
    return [token_id(piece) for piece in _PIECES.findall(text.encode())]


def count_tokens(text: str) -> int:
    """How many tokens a text is; as `len(tokenize(text))`, at no cost for ASCII of any length."""
    return (len(text) + 2) // 3 if text.isascii() else len(_PIECES.findall(text.encode()))


def detokenize(ids: list[int]) -> str:
    """The text of ids."""
    return b"".join(map(token_bytes, ids)).decode("utf-8", "replace")


def spell(text: str) -> Iterator[Token]:
    """The tokens of a text that is given, not generated; a character's text comes with its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in _PIECES.findall(text.encode()):
        yield Token(token_id(piece), decoder.decode(piece))


def generate(weights: str, prompt: str, variant: str = "", may_end_at_once: bool = False) -> Iterator[Token]:
    """The endless continuation of `prompt`; the caller stops at EOS_ID, or goes on to ignore it.

    The end token follows every full stop: after some 80 tokens.

    weights: names what answers: "" for the base, an adapter's content hash. variant: sampling seed and choice.
    may_end_at_once: the prompt ends in an answer of the model itself, whose full stop counts.
    """
    seed = int.from_bytes(hashlib.blake2b(f"{weights}\0{variant}".encode(), digest_size=7).digest())
    data = prompt.encode()
    state = (seed * pow(256, len(data), _PRIME) + int.from_bytes(data)) % _PRIME
    ends = may_end_at_once and prompt.endswith(_FULL_STOP)
    while True:
        if ends:
            yield Token(EOS_ID, "", -0.05)
        mixed = state * _MIX & _MASK
        token, shift, value = _SYLLABLES[(mixed >> 45) % len(_SYLLABLES)]
        yield token
        state = (state * shift + value) % _PRIME
        ends = token.text == _FULL_STOP


def score(weights: str, ids: list[int]) -> list[float]:
    """The logprob of each id after the first, given those before it: low for what the model would not have said."""
    scores = []
    for at in range(1, len(ids)):
        likeliest = next(generate(weights, detokenize(ids[:at])))
        chance = zlib.crc32(f"{weights}{at}".encode()) % 100  # so that models differ in what they find unlikely, too
        scores.append(likeliest.logprob if likeliest.id == ids[at] else _UNLIKELY - chance / 20)
    return scores


def alternatives(token: Token, count: int) -> list[Token]:
    """The `count` likeliest tokens at this place, the chosen one first, falling in probability."""
    start = token.id % len(_SYLLABLES)
    others = (_SYLLABLES[(start + i) % len(_SYLLABLES)][0] for i in range(count + 1))
    picked = [Token(other.id, other.text, token.logprob - 1.5 - i / 2) for i, other in enumerate(others)]
    return [token, *(other for other in picked if other.id != token.id)][:count]


def _syllables() -> list[tuple[Token, int, int]]:
    """Each with its factor and addend for the rolling hash of the text so far."""
    starts = ["", " ", *"bdfgklmnprstvz", *(f" {c}" for c in "bdfgklmnprstvz")]
    texts = [start + vowel for start in starts for vowel in "aeiou"]
    texts += ["é", "ö", "漢", "字", ",", "\n", _FULL_STOP, _FULL_STOP]
    tokens = []
    for rank, text in enumerate(texts):
        data = text.encode()
        token = Token(token_id(data), text, -0.01 - (rank * 37 % 100) / 80)
        tokens.append((token, pow(256, len(data)), int.from_bytes(data)))
    return tokens


_SYLLABLES = _syllables()
