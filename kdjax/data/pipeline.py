"""The stream of batches: sources, split, shards and packing put together, resumable to the batch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from kdjax.data import packing
from kdjax.data.config import DataConfig
from kdjax.data.examples import to_example
from kdjax.data.holdout import Rows, split_documents
from kdjax.data.packing import Row, to_batch
from kdjax.data.prefetch import ahead
from kdjax.data.shards import Layout, lay_out, local_rows
from kdjax.data.shared import shared_tokens
from kdjax.data.sources import Source, open_source
from kdjax.data.tasks import TASKS, Facts
from kdjax.data.tokenizers import Tokenizer
from kdjax.data.views import load_views
from kdjax.errors import UserError
from kdjax.shapes import Batch

log = logging.getLogger(__name__)

State = dict[str, Any]
"""Where a stream stands, as JSON: `step`, `data` (what it is a stream of) and `shards` (the place in each)."""

Place = tuple[int, int]
"""Which source, and which row of it."""

Encode = Callable[[Place, np.random.Generator], dict[str, np.ndarray] | None]
"""The tokens, weights and targets of the example at a place; None where it is skipped."""


@dataclass(frozen=True)
class Places:
    """Rows as grain wants a source: random access to each `Place`."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Place:
        return int(self.rows[index, 0]), int(self.rows[index, 1])


@dataclass(frozen=True)
class Data:
    """A stream of training batches, and the held-out ones.

    Attributes:
        layout: which shards are this process's.
        shard: the endless rows of a shard.
        held_out: the rows of an evaluation.
        identity: what a saved state must agree with.
        train_documents: how many documents an epoch has.
        held_out_documents: how many are kept from training.
        held_out_dropped: how many of those overlap with the training text, so that nothing reads them.
        held_out_hash: SHA-256 of the rows of an evaluation; empty without any.
        shared: the tokens that the teacher's views of all rows begin with, and that rows leave out; maybe none.
    """

    layout: Layout
    shard: Callable[[int], grain.IterDataset]
    held_out: Sequence[Row]
    identity: dict[str, Any]
    train_documents: int
    held_out_documents: int
    held_out_dropped: int
    held_out_hash: str
    shared: tuple[int, ...] = ()

    def train(self, state: State | None = None, *, prefetch: int = 2) -> Iterator[tuple[Batch, State]]:
        """Return the endless (batch, state after it); a state given back here goes on with the batch that follows.

        Each batch has this process's rows. Batches are made up to `prefetch` ahead in a thread; 0 makes them on call.

        Raises:
            UserError: the state is of other data, or lacks shards of this process.
        """
        batches = ((to_batch(rows), after) for rows, after in self.rows(state))
        return ahead(batches, prefetch) if prefetch else batches

    def rows(self, state: State | None = None) -> Generator[tuple[list[Row], State], None, None]:
        """Return the same as (rows of a batch, state after it), made on call.

        Raises:
            UserError: as `train` does.
        """
        return self._turns(*self._restored(state))

    def evaluation(self, batch_size: int) -> list[Batch]:
        """Return this process's rows of the held-out batches; the last one is filled up with rows of weight 0.

        Raises:
            UserError: the batch size does not split over the processes.
        """
        return [to_batch(rows) for rows in self.evaluation_rows(batch_size)]

    def evaluation_rows(self, batch_size: int) -> list[list[Row]]:
        """Return the same as rows, a list a batch.

        Raises:
            UserError: as `evaluation` does.
        """
        mine = local_rows(batch_size, self.layout.process_index, self.layout.process_count)
        rows = list(self.held_out)
        if rows:
            rows += [packing.empty_row(rows[0])] * (-len(rows) % batch_size)
        return [[rows[start + row] for row in mine] for start in range(0, len(rows), batch_size)]

    def _restored(self, state: State | None) -> tuple[int, dict[int, grain.DatasetIterator]]:
        iterators = {number: iter(self.shard(number)) for number in self.layout.own}
        if not state:
            return 0, iterators
        for name, value in self.identity.items():
            if (saved := state["data"].get(name)) != value:
                raise UserError(
                    f"the saved position is of data with {name} {saved}, this run's is {value}; "
                    "change it back, or start a new run directory"
                )
        if missing := [number for number in iterators if str(number) not in state["shards"]]:
            raise UserError(f"the saved position lacks data shards {missing}; merge the states of all processes")
        for number, iterator in iterators.items():
            packing.set_state(iterator, state["shards"][str(number)])
        return state["step"], iterators

    def _turns(
        self, step: int, iterators: dict[int, grain.DatasetIterator]
    ) -> Generator[tuple[list[Row], State], None, None]:
        places = {str(number): packing.get_state(iterator) for number, iterator in iterators.items()}

        def take(turn: tuple[int, int]) -> tuple[list[Row], dict[str, Any]]:
            number, count = turn
            return [next(iterators[number]) for _ in range(count)], packing.get_state(iterators[number])

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for done in itertools.count(step):
                turn = self.layout.turn(done)
                taken = list(pool.map(take, turn.items()))
                places = places | {str(number): place for number, (_, place) in zip(turn, taken, strict=True)}
                after = {"step": done + 1, "data": self.identity, "shards": places}
                yield [row for rows, _ in taken for row in rows], after


def build(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    start_token: int = 0,
    labels: int = 0,
    room: int = 0,
    gist: int = 0,
    tells_source: bool = False,
    teacher_tokenizer: Tokenizer | None = None,
) -> Data:
    """Return the data of a run: the held-out rows are read and tokenised now, the rest as it is needed.

    Args:
        config: its task is to be known; auto is taken for a causal language model's.
        tokenizer: the model's.
        batch_size: the rows of all processes.
        process_index: which of them this is.
        process_count: how many there are.
        start_token: that a decoder beside an encoder begins with.
        labels: how many classes a classifier tells apart.
        room: tokens that each answer to a view has room for at least, so that it can be given anew.
        gist: places of the student's gist.
        tells_source: whether batches say which source each example is of.
        teacher_tokenizer: of a teacher that has another one than the student.

    Raises:
        UserError: bad settings, unreadable or empty data, or a batch that does not split.
    """
    config = dataclasses.replace(config, task="causal_lm") if config.task == "auto" else config
    facts = Facts(
        tokenizer,
        mask_fraction=config.mask_fraction,
        inputs=config.sequence_length if config.packing == "first_fit" else sys.maxsize,
        targets=config.lengths["tokens"],
        start_token=start_token,
        labels=labels,
        views=load_views(config, gist),
        room=room,
        teacher_tokenizer=teacher_tokenizer,
        teacher_inputs=config.lengths.get("teacher_tokens", 0),
    )
    sources = [open_source(name) for name in config.sources]
    split = split_documents(sources, config)
    if config.packing == "concat" and (cut := split.kinds - {"text"}):
        raise UserError(
            f"packing 'concat' would cut a prompt from its answer (the data has {', '.join(sorted(cut))}); "
            "set data.packing to first_fit"
        )
    groups = list(split.train) if config.weights else [np.concatenate(split.train)]
    layout = lay_out(batch_size, min(config.max_shards, *map(len, groups)), process_index, process_count)
    documents = sum(map(len, groups))
    if facts.views is not None and config.share_prefix and teacher_tokenizer is None:
        shared = shared_tokens(sources, [*split.train, split.held_out], config, tokenizer, facts.views)
        facts = dataclasses.replace(facts, shared=shared)
    encode = _encoder(sources, config, facts, documents)
    lengths = config.lengths
    if tells_source:
        encode, lengths = _telling_source(encode), lengths | {"source": lengths["tokens"]}
    held_out = _evaluation_rows(split.held_out, encode, config, lengths)
    identity = {
        **{name: getattr(config, name) for name in ("task", "packing", "sequence_length", "seed", "split_seed")},
        **{name: getattr(config, name) for name in ("mask_fraction", "target_length")},
        **{"weights": list(config.weights), "batch_size": batch_size, "shards": layout.shards},
        **{"train_documents": documents, "documents": split.sha256[:16]},
        "views": None if facts.views is None else _digest(repr(facts.views)),
        "shared": _digest(repr(facts.shared)) if facts.shared else None,
        **{
            name: None if one is None else _digest(one.sha256 + one.chat_template)
            for name, one in (("tokenizer", tokenizer), ("teacher_tokenizer", teacher_tokenizer))
        },
    }
    return Data(
        layout=layout,
        shard=functools.partial(_shard, groups, layout.shards, encode, config, lengths),
        held_out=held_out,
        identity=identity,
        train_documents=documents,
        held_out_documents=split.held_out_documents,
        held_out_dropped=split.held_out_dropped,
        held_out_hash=_hash(held_out),
        shared=facts.shared,
    )


def _telling_source(encode: Encode) -> Encode:
    """Return the map with the number of its source at each token."""

    def told(place: Place, random: np.random.Generator) -> dict[str, np.ndarray] | None:
        encoded = encode(place, random)
        return encoded and encoded | {"source": np.full(len(encoded["tokens"]), place[0], np.int32)}

    return told


def _shard(
    groups: Sequence[Rows],
    shards: int,
    encode: Encode,
    config: DataConfig,
    lengths: Mapping[str, int],
    number: int,
) -> grain.IterDataset:
    """Return the endless packed rows of one shard. Each epoch deals all documents anew, each to one shard."""
    parts = [
        grain.MapDataset.source(Places(group)).shuffle(seed=_seed(config.seed, stream))[number::shards].repeat()
        for stream, group in enumerate(groups)
    ]
    mixed = grain.MapDataset.mix(parts, config.weights) if config.weights else parts[0]
    drawn = mixed.seed(_seed(config.seed, -1 - number)).random_map(encode)
    return packing.pack(drawn, config.packing, lengths, _seed(config.seed, len(groups) + number))


def merge_states(states: Sequence[State]) -> State:
    """Return the state of a run from those of its processes, which any number of processes can go on from.

    Raises:
        UserError: they are of different steps or different data.
    """
    first = states[0]
    for state in states[1:]:
        if (state["step"], state["data"]) != (first["step"], first["data"]):
            raise UserError(f"the processes' saved positions differ: step {first['step']} and {state['step']}")
    return {**first, "shards": {name: place for state in states for name, place in state["shards"].items()}}


def _encoder(sources: Sequence[Source], config: DataConfig, facts: Facts, documents: int) -> Encode:
    """Return the map from (source, row) to tokens and weights; None skips a bad row, while they are few enough."""
    bad: set[tuple[int, int]] = set()

    def encode(place: Place, random: np.random.Generator) -> dict[str, np.ndarray] | None:
        number, row = place
        source = sources[number]
        where = source.where(row)
        try:
            encoded = TASKS[config.task](to_example(source.record(row), config, where), facts, random)
            if config.packing == "first_fit":
                _check_lengths(encoded, config)
            return encoded
        except UserError as error:
            if place not in bad:
                log.warning("skipped %s: %s", where, error)
            bad.add(place)
            if len(bad) > config.max_bad_rows or len(bad) >= documents:
                raise UserError(f"{where}: {error}; data.max_bad_rows lets such rows be skipped") from None
            return None

    return encode


def _check_lengths(encoded: Mapping[str, np.ndarray], config: DataConfig) -> None:
    """Check that an example that may not be cut fits into a row."""
    settings = {"tokens": "target_length", "teacher_tokens": "teacher_length"}
    for name in ("inputs", "tokens", "teacher_tokens"):
        length = config.lengths.get(name, 0)
        own = settings.get(name, "sequence_length")
        setting = own if getattr(config, own) else "sequence_length"
        if name in encoded and len(encoded[name]) > length:
            raise UserError(
                f"it has {len(encoded[name])} tokens, more than data.{setting} {length}; raise that, or shorten the row"
            )


def _evaluation_rows(held_out: Rows, encode: Encode, config: DataConfig, lengths: Mapping[str, int]) -> list[Row]:
    if not len(held_out):
        return []
    drawn = grain.MapDataset.source(Places(held_out)).seed(_seed(config.split_seed, 0)).random_map(encode)
    rows = packing.pack(drawn, config.packing, lengths)
    wanted = max(1, config.eval_tokens // config.sequence_length)
    if not (found := list(itertools.islice(rows, wanted))):
        raise UserError("every held-out row is too long to evaluate on; raise data.sequence_length")
    return found


def _seed(seed: int, stream: int) -> int:
    """Return a seed of 32 bits for one stream of a run; grain counts up from it, so neighbours must lie far apart."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=4).digest(), "big")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _hash(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for name in ("tokens", "tokens_segment_ids", "weight", "targets", "inputs", "teacher_tokens"):
            if name not in row:
                continue
            digest.update(np.ascontiguousarray(row[name], "<f4" if name == "weight" else "<i4").tobytes())
    return digest.hexdigest() if rows else ""
