"""Which documents are held out: chosen by a hash of their text, and free of overlap with the training text."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kdjax.data.config import DataConfig
from kdjax.data.examples import Example, group_of, to_example
from kdjax.data.sources import Source
from kdjax.errors import UserError

_LETTERS_PER_TOKEN = 16
"""So many letters of held-out text are looked at for each token of evaluation; far more than it takes."""

log = logging.getLogger(__name__)

Rows = np.ndarray
"""Rows of sources, [n, 2]: which source, which row of it."""


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to evaluate on.

    Attributes:
        train: the rows of each source, in order.
        held_out: rows of any source, in the order of their hashes.
        held_out_documents: how many documents are kept from training.
        held_out_dropped: how many of those overlap with the training text, so that nothing reads them.
        kinds: the kinds of example that were seen.
        sha256: of all documents, in order.
    """

    train: tuple[Rows, ...]
    held_out: Rows
    held_out_documents: int
    held_out_dropped: int
    kinds: frozenset[str]
    sha256: str


def split_documents(sources: Sequence[Source], config: DataConfig) -> Split:
    """Return the split of all sources' documents, the same on every machine.

    Raises:
        UserError: nothing to train on, nothing to evaluate on, or more bad rows than allowed.
    """
    counts, kinds, train, held, digest = Counter[str](), set(), [], [], hashlib.sha256()
    for number, source in enumerate(sources):
        rows = []
        for row, example in _examples(source, config, counts):
            kinds.add(example.kind)
            place = _hash(example.document, config.split_seed)
            digest.update(place)
            chosen = place
            if config.group_field:
                chosen = _hash(group_of(source.record(row), config, source.where(row)), config.split_seed)
                digest.update(chosen)
            if int.from_bytes(chosen, "big") < config.eval_fraction * 2**64:
                held.append((place, number, row, len(example.document)))
            else:
                rows.append((number, row))
        if not rows:
            raise UserError(f"data source {source.name!r} has no document left to train on; give it more text")
        train.append(np.array(rows, np.int64))
    candidates = _first(sorted(held), _LETTERS_PER_TOKEN * config.eval_tokens)
    kept = candidates[_without_overlap(sources, candidates, train, config)]
    dropped = len(candidates) - len(kept)
    if config.eval_fraction and not len(kept):
        raise UserError(
            f"no document is left to evaluate on ({len(held)} held out, {dropped} of them dropped for overlap with the "
            "training text); raise data.eval_fraction, give more text, or set data.eval_fraction to 0"
        )
    log.info("%s, of which %d held out (%d dropped for overlap)", dict(counts), len(held), dropped)
    return Split(tuple(train), kept, len(held), dropped, frozenset(kinds), digest.hexdigest())


def _examples(source: Source, config: DataConfig, counts: Counter[str]) -> Iterator[tuple[int, Example]]:
    """Yield each readable row that has any text; count the others."""
    for row in range(source.count):
        counts["documents"] += 1
        try:
            example = to_example(source.record(row), config, source.where(row))
        except UserError as error:
            counts["bad_rows"] += 1
            if counts["bad_rows"] > config.max_bad_rows:
                more = f" (after {config.max_bad_rows} bad rows before it)" if config.max_bad_rows else ""
                raise UserError(f"{error}{more}; data.max_bad_rows lets such rows be skipped") from None
            continue
        if example.document.strip():
            yield row, example
        else:
            counts["empty_rows"] += 1


def _hash(text: str, seed: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8, salt=str(seed).encode()[-16:]).digest()


def _first(held: list[tuple[bytes, int, int, int]], letters: int) -> Rows:
    """Return the rows from the front that have so many letters together."""
    total = np.cumsum([length for *_, length in held])
    enough = held[: int(np.searchsorted(total, letters)) + 1]
    return np.array([(number, row) for _, number, row, _ in enough], np.int64).reshape(-1, 2)


def _without_overlap(sources: Sequence[Source], held: Rows, train: Sequence[Rows], config: DataConfig) -> list[int]:
    """Return which of the held-out rows share no n words in a row with any training row; all of them for n = 0."""
    if not config.dedupe_ngram:
        return list(range(len(held)))

    def grams(place: np.ndarray) -> set[tuple[str, ...]]:
        source, row = sources[place[0]], int(place[1])
        return ngrams(to_example(source.record(row), config, source.where(row)).document, config.dedupe_ngram)

    of_held = [grams(place) for place in held]
    wanted: set[tuple[str, ...]] = set().union(*of_held)
    seen: set[tuple[str, ...]] = set()
    for place in (place for rows in train for place in rows if wanted):
        seen |= wanted.intersection(grams(place))
    return [i for i, own in enumerate(of_held) if own.isdisjoint(seen)]


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """Return all runs of n words, without regard to case and punctuation; a shorter text is one run."""
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words)} if len(words) < n else set(zip(*(words[i:] for i in range(n)), strict=False))
