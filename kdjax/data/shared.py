"""What the teacher's views of all rows begin with: rows leave it out, and the teacher reads it once."""

from __future__ import annotations

import logging
import os.path
from collections.abc import Iterable, Iterator, Sequence

from kdjax.data.config import DataConfig
from kdjax.data.examples import Example, to_example
from kdjax.data.holdout import Rows
from kdjax.data.sources import Source
from kdjax.data.tokenizers import Tokenizer
from kdjax.data.views import Views, Written, teacher_prompts
from kdjax.errors import UserError

log = logging.getLogger(__name__)

LEAST = 32
"""A shorter beginning stays in each row, where it costs less than attention to something apart."""

_HEAD = 8
"""So many characters behind a shared text decide how its last ones are cut into tokens: of each such head that occurs
one row is tokenised."""

_MOST = 512
"""Heads that are looked at, the first ones."""


def shared_tokens(
    sources: Sequence[Source], groups: Iterable[Rows], config: DataConfig, tokenizer: Tokenizer, views: Views
) -> tuple[int, ...]:
    """Return the tokens that the teacher's views of all these rows begin with; none without a teacher's view.

    All rows are read and rendered. One that cannot be is left out here, and refused or counted where it is encoded.
    """
    if not views.teacher:
        return ()

    def examples() -> Iterator[Example]:
        for number, row in (place for group in groups for place in group.tolist()):
            try:
                yield to_example(sources[number].record(row), config, "")
            except UserError:
                continue

    shared = shared_beginning(teacher_prompts(examples(), tokenizer, views), tokenizer)
    if shared:
        log.info("the teacher's views all begin with the same %d tokens, which it reads once", len(shared))
    return shared


def shared_beginning(prompts: Iterable[Written], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that all prompts begin with, at least one of each left over; none where that are too few.

    A prompt whose head is not among those looked at may still begin otherwise: `encode_views` checks each one.
    """
    common, rests = None, {}
    for prompt in prompts:
        common = prompt.text if common is None else common
        if not prompt.text.startswith(common):
            size = len(os.path.commonprefix([common, prompt.text]))
            common, cut = common[:size], common[size:]
            rests = {((cut + head)[:_HEAD], end): cut + rest for (head, end), rest in rests.items()}
        if not common:
            return ()
        rest = prompt.text[len(common) :]
        if len(rests) < _MOST:
            rests.setdefault((rest[:_HEAD], prompt.spoken is None), rest)
    if common is None:
        return ()
    tokens = [Written(common + rest, None if end else "").tokens(tokenizer) for (_, end), rest in rests.items()]
    size = min(len(os.path.commonprefix(tokens)), min(map(len, tokens)) - 1)
    return tuple(tokens[0][:size]) if size >= LEAST else ()
