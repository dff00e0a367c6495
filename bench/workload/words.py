"""Text of a wanted length in tokens, made of common English words that most vocabularies hold as one token each."""

from __future__ import annotations

import msgspec
import numpy as np

_COMMON = """
time people year way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house
service friend father power hour game line end member law car city community name president team minute idea
body information back parent face others level office door health person art war history party result change
morning reason research girl guy moment air teacher force education foot boy age policy music market sense
nation plan college interest death experience effect use class control field development role effort rate
heart drug show leader light voice wife police mind price report decision son view relationship town road arm
difference value building action season society tax director position player record paper space ground form
event official matter center couple site project activity star table need court oil situation cost industry
figure street image phone data picture practice piece land product doctor wall patient worker news test movie
north love step open close long short high low small large early young old new good great little own other big
different important public bad same able human local late hard major better economic strong possible whole
free military true federal international full special easy clear recent certain personal red difficult
available likely single medical current wrong private past foreign fine common poor natural significant
similar hot dead central happy serious ready simple left physical general environmental financial blue
democratic dark various entire legal religious cold final main green nice huge popular traditional cultural be
have do say get make go know take see come think look want give find tell ask work seem feel try leave call
"""


class Tokenization(msgspec.Struct, frozen=True):
    """How words become tokens on the server under test."""

    words: tuple[str, ...]
    tokens_per_word: float = 1.0
    overhead_tokens: int = 0  # what the server adds to one message: its template and special tokens
    source: str = "assumed"  # tokenize | usage | assumed

    def words_for(self, tokens: int) -> int:
        """How many words make a prompt of so many tokens, the server's additions included; at least one."""
        return max(1, round((tokens - self.overhead_tokens) / self.tokens_per_word))

    def tokens_for(self, words: int) -> int:
        """How many tokens a prompt of so many words has, the server's additions included."""
        return round(words * self.tokens_per_word) + self.overhead_tokens


def common_words() -> tuple[str, ...]:
    """The words that texts are made of, each once."""
    return tuple(dict.fromkeys(_COMMON.split()))


def text(words: tuple[str, ...], count: int, *seed: int) -> str:
    """`count` words drawn by a seed."""
    picks = np.random.default_rng(seed).integers(0, len(words), count)
    return " ".join([words[pick] for pick in picks.tolist()])
