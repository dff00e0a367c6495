"""The tokenised data of a run, on disk: made in one pass over the rows, mapped into memory, random access after.

    tokens.i32     all token ids, sequence after sequence
    weights.f32    beside each token its weight as a target
    sequences.npy  where each sequence begins, and the end        int64 [sequences + 1]
    examples.npy   where each example's sequences begin, and end  int64 [examples + 1]
    good.npy       for each sequence whether its answer is one to move towards (KTO)
    meta.json      what it was made from; written last, so a directory without it is not whole

An example is what one line gives: for SFT one sequence (or one per rewritten turn), else chosen and rejected.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data import Faults, parse_line, read_lines
from trainer.errors import DataError, RowError
from trainer.masks import TokenSequence

Tokenise = Callable[[dict[str, Any]], list[TokenSequence]]


@dataclass(frozen=True, slots=True)
class DatasetMeta:
    """Counts, and the hash of the lines they come from."""

    sha256: str
    examples: int
    tokens: int
    trained_tokens: int
    dropped: int  # longer than max_length
    truncated: int
    longest_tokens: int


class TokenDataset:
    """Examples by number. `weights` and `tokens` of a sequence are views into the mapped files."""

    def __init__(self, directory: Path) -> None:
        self.meta = DatasetMeta(**json.loads((directory / "meta.json").read_text()))
        self._tokens = np.memmap(directory / "tokens.i32", np.int32, "r")
        self._weights = np.memmap(directory / "weights.f32", np.float32, "r")
        self._sequences = np.load(directory / "sequences.npy")
        self._good = np.load(directory / "good.npy")
        self._examples = np.load(directory / "examples.npy")

    def __len__(self) -> int:
        return len(self._examples) - 1

    def sequences(self, example: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(token ids, weights) of each sequence of one example."""
        found = []
        for s in range(self._examples[example], self._examples[example + 1]):
            span = slice(self._sequences[s], self._sequences[s + 1])
            found.append((self._tokens[span], self._weights[span]))
        return found

    def prompt_ids(self, example: int) -> np.ndarray:
        """The ids before the first target of the example's first sequence."""
        token_ids, weights = self.sequences(example)[0]
        return token_ids[: int(np.flatnonzero(weights)[0])]

    def is_good(self, example: int) -> bool:
        """Whether the answer is one to move towards (KTO); always, where rows have no label."""
        return bool(self._good[self._examples[example]])

    def length_tokens(self, example: int) -> int:
        """Tokens fed to the model for one example: the last of each sequence is only a target."""
        first, end = self._examples[example], self._examples[example + 1]
        return int(self._sequences[end] - self._sequences[first] - (end - first))

    def weight(self, example: int) -> float:
        """Sum of the target weights of one example."""
        first, end = self._examples[example], self._examples[example + 1]
        return float(self._weights[self._sequences[first] : self._sequences[end]].sum(dtype=np.float64))


def prepare(
    origins: Sequence[str | Path],
    tokenise: Tokenise,
    directory: Path,
    *,
    max_length: int,
    overlong: str,
    on_progress: Callable[[int], None] = lambda examples: None,
) -> TokenDataset:
    """Tokenise the rows into `directory`, in bounded memory. Raises DataError that names every bad line."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    writer = _Writer(directory, max_length, overlong)
    digest, faults = hashlib.sha256(), Faults()
    try:
        for count, line in enumerate(read_lines(origins, digest), 1):
            try:
                writer.add(parse_line(line, tokenise))
            except RowError as error:
                faults.add(line, str(error))
            if count % 100 == 0:
                on_progress(count)
        faults.raise_if_any()
        meta = writer.close(digest.hexdigest())
    finally:
        writer.abandon()
    if not meta.examples:
        given = ", ".join(map(str, origins))
        raise DataError(
            f"no example of {given} fits into max_length {max_length} tokens: raise it, or set --overlong truncate"
            if meta.dropped
            else f"no examples in {given}"
        )
    (directory / "meta.json").write_text(json.dumps(asdict(meta)))
    return TokenDataset(directory)


class _Writer:
    """Appends sequences to the files of a dataset."""

    def __init__(self, directory: Path, max_length: int, overlong: str) -> None:
        self._directory, self._max_length, self._overlong = directory, max_length, overlong
        self._tokens = (directory / "tokens.i32").open("wb")
        self._weights = (directory / "weights.f32").open("wb")
        self._sequences, self._examples, self._good = array("q", [0]), array("q", [0]), array("b")
        self._trained = self._dropped = self._truncated = self._longest = 0

    def add(self, sequences: list[TokenSequence]) -> None:
        """One example; a too long one is dropped, cut or refused. Raises RowError."""
        longest = max(len(sequence.token_ids) for sequence in sequences)
        if longest > self._max_length:
            if self._overlong == "error":
                raise RowError(f"{longest} tokens, more than max_length {self._max_length}")
            if self._overlong == "truncate":
                self._truncated += 1
                sequences = [_cut(sequence, self._max_length) for sequence in sequences]
        if longest > self._max_length and self._overlong == "drop":
            self._dropped += 1
            return
        if any(not sequence.trained_tokens for sequence in sequences):
            raise RowError("no token is left to learn: the answer is empty, only thinking, or cut off by max_length")
        for sequence in sequences:
            self._tokens.write(np.asarray(sequence.token_ids, np.int32).tobytes())
            self._weights.write(np.asarray(sequence.weights, np.float32).tobytes())
            self._sequences.append(self._sequences[-1] + len(sequence.token_ids))
            self._good.append(sequence.good)
            self._trained += sequence.trained_tokens
            self._longest = max(self._longest, len(sequence.token_ids))
        self._examples.append(len(self._sequences) - 1)

    def close(self, sha256: str) -> DatasetMeta:
        """Write the tables; the counts."""
        self.abandon()
        np.save(self._directory / "sequences.npy", np.frombuffer(self._sequences, np.int64))
        np.save(self._directory / "good.npy", np.frombuffer(self._good, np.int8))
        np.save(self._directory / "examples.npy", np.frombuffer(self._examples, np.int64))
        return DatasetMeta(
            sha256=sha256,
            examples=len(self._examples) - 1,
            tokens=self._sequences[-1],
            trained_tokens=self._trained,
            dropped=self._dropped,
            truncated=self._truncated,
            longest_tokens=self._longest,
        )

    def abandon(self) -> None:
        """Close the files."""
        self._tokens.close()
        self._weights.close()


def _cut(sequence: TokenSequence, length: int) -> TokenSequence:
    return replace(sequence, token_ids=sequence.token_ids[:length], weights=sequence.weights[:length])
