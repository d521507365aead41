"""A teacher behind a server: its likeliest entries at each token of a row, and its answers, asked over HTTP.

A server tells log-probabilities at temperature 1, of the whole vocabulary: of the entries that it does not name only
the mass is known, 1 − Σ p. Its tokenizer has to be the student's, since it is given tokens and not text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np

from kdjax.data.packing import Row
from kdjax.errors import UserError
from kdjax.sampling import AnswersConfig
from kdjax.server import Client, ServerConfig

PICKS = 20
"""How many entries are kept of a token unless a config says otherwise: as many as vLLM gives unless told otherwise."""

LEAST_TAIL = 2.0**-23
"""Of the mass of all other entries, where there are any: float32's rounding of 1, below which 1 − Σ p tells nothing."""

MOST_MASS = 1.05
"""Of the entries together: what is above 1 by more than a bfloat16's rounding is no probability."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class TeacherServerConfig(ServerConfig):
    """A server that speaks in the teacher's place: into a cache (`kdjax label`), or as text (`kdjax answers`)."""

    protocol: Literal["vllm", "sglang"] = "vllm"
    """How it gives log-probabilities of a prompt: vllm: by /v1/completions; sglang: by its own /generate."""

    def check(self, name: str) -> None:
        """Check the ranges.

        Raises:
            UserError: a value outside its range, naming the field of the part `name`.
        """
        if not self.is_server:
            raise UserError(f"{name}.source is {self.source!r}; wanted where a server is: http://host:port/v1")
        super().check(name)


class Protocol(NamedTuple):
    """A row of `PROTOCOLS`.

    Attributes:
        url: of the config's source -> where it is asked.
        body: of (the model, tokens, entries of each) -> the request.
        read: of a reply -> of each token what was likely in its place, entry -> log-probability; of the first nothing.
        more: how the server is had to give more of them.
    """

    url: Callable[[str], str]
    body: Callable[[str, Sequence[int], int], dict[str, Any]]
    read: Callable[[Any], list[dict[int, float]]]
    more: str


def _vllm_url(source: str) -> str:
    return f"{source.rstrip('/')}/completions"


def _vllm_body(model: str, tokens: Sequence[int], picks: int) -> dict[str, Any]:
    asked = {"model": model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0}
    return asked | {"prompt_logprobs": picks}


def _vllm_read(reply: Any) -> list[dict[int, float]]:
    found = reply["choices"][0]["prompt_logprobs"]
    return [{int(entry): float(told["logprob"]) for entry, told in (at or {}).items()} for at in found]


def _sglang_url(source: str) -> str:
    return f"{source.rstrip('/').removesuffix('/v1')}/generate"


def _sglang_body(model: str, tokens: Sequence[int], picks: int) -> dict[str, Any]:
    how = {"max_new_tokens": 1, "temperature": 0}
    asked = {"input_ids": list(tokens), "sampling_params": how, "return_logprob": True, "logprob_start_len": 0}
    return asked | {"top_logprobs_num": picks}


def _sglang_read(reply: Any) -> list[dict[int, float]]:
    found = reply["meta_info"]["input_top_logprobs"]
    return [{int(entry): float(log_prob) for log_prob, entry, *_ in at or ()} for at in found]


PROTOCOLS: dict[str, Protocol] = {
    "vllm": Protocol(
        _vllm_url,
        _vllm_body,
        _vllm_read,
        "start vLLM with --max-logprobs {picks} and --no-enable-prefix-caching, or set label.picks to at most {got}",
    ),
    "sglang": Protocol(
        _sglang_url,
        _sglang_body,
        _sglang_read,
        "set label.picks to at most {got}, or look at what SGLang is started with",
    ),
}
"""Name -> how a server of the kind gives log-probabilities of a prompt."""


class Asked(NamedTuple):
    """An example as a request.

    Attributes:
        tokens: as the teacher sees them.
        at: the places among them, rising, of those whose predictions are compared.
    """

    tokens: list[int]
    at: list[int]


def requests_of(row: Row, shared: Sequence[int]) -> list[Asked]:
    """Return what is to be asked of a packed row: its examples of which something is compared, in their order.

    Args:
        row: packed; of its views the teacher's is taken, where it has one.
        shared: the tokens that rows leave out before each of the teacher's views.
    """
    prefix = "teacher_" if "teacher_tokens" in row else ""
    before = list(shared) if prefix else []
    segment_T, found = row[f"{prefix}tokens_segment_ids"], []
    for number in range(1, int(segment_T.max(initial=0)) + 1):
        is_here_T = segment_T == number
        weighs = row[f"{prefix}weight"][is_here_T] != 0
        at = [len(before) + place for place in np.flatnonzero(weighs).tolist() if place]
        if at:
            found.append(Asked(before + row[f"{prefix}tokens"][is_here_T].tolist(), at))
    return found


class Wanted(NamedTuple):
    """What is wanted of each token.

    Attributes:
        picks: entries, P.
        vocab_size: of the student.
    """

    picks: int
    vocab_size: int


@contextmanager
def asking(
    config: TeacherServerConfig, wanted: Wanted, shared: Sequence[int] = ()
) -> Iterator[Callable[[Sequence[Row]], Callable[[], list[Arrays]]]]:
    """Give what asks a server about rows: at once, and what comes back waits for the replies.

    That is, of each row, what a top-k keeps of its N compared tokens, in their order: `ids` [N, P], likeliest first,
    `log_probs` of these and `log_tail` [N], the log of the mass of all others. Nothing is renormalised, and log Z is
    not told.

    Args:
        config: the server.
        wanted: of each token.
        shared: as `requests_of` takes it.

    Raises:
        UserError: in the end, of a server that refuses, does not answer, or answers with something else.
    """
    client, pool = Client(config), ThreadPoolExecutor(config.batch_size)
    empty = _arrays([], [], wanted)

    def ask(rows: Sequence[Row]) -> Callable[[], list[Arrays]]:
        begun = [
            [pool.submit(_likely, client, config, one, wanted) for one in requests_of(row, shared)] for row in rows
        ]

        def replies() -> list[Arrays]:
            said = [[empty, *(future.result() for future in of_row)] for of_row in begun]
            return [{name: np.concatenate([one[name] for one in of_row]) for name in empty} for of_row in said]

        return replies

    try:
        yield ask
    finally:
        pool.shutdown(cancel_futures=True)


def _likely(client: Client, config: TeacherServerConfig, asked: Asked, wanted: Wanted) -> Arrays:
    """Return what is likely in the compared places of an example."""
    protocol = PROTOCOLS[config.protocol]
    reply = client.post(protocol.url(config.source), protocol.body(config.model, asked.tokens, wanted.picks))
    try:
        found = protocol.read(reply)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{client.name} replied {json.dumps(reply)[:100]}; wanted the log-probabilities of a prompt's tokens, as "
            f"{config.protocol} gives them: mend teacher_server.protocol, or ask another server"
        ) from None
    if len(found) != len(asked.tokens):
        raise UserError(
            f"{client.name} replied with log-probabilities of {len(found)} tokens; wanted {len(asked.tokens)}, all "
            "of the prompt: ask a server that gives them"
        )
    ids, log_probs = zip(*(_best(client.name, found[place], wanted, protocol.more) for place in asked.at), strict=True)
    return _arrays(ids, log_probs, wanted)


def _best(name: str, told: Mapping[int, float], wanted: Wanted, more: str) -> tuple[list[int], list[float]]:
    """Return the likeliest of the entries that a server told of a token, and their log-probabilities.

    Raises:
        UserError: they are too few, of another vocabulary, or no log-probabilities.
    """
    if len(told) < wanted.picks:
        raise UserError(
            f"{name} gave {len(told)} log-probabilities of a token; wanted {wanted.picks}: "
            + more.format(picks=wanted.picks, got=len(told))
        )
    if strange := [entry for entry in told if not 0 <= entry < wanted.vocab_size]:
        raise UserError(
            f"{name} named the entry {strange[0]}, but the student's vocabulary has {wanted.vocab_size}; wanted a "
            "teacher of the same tokenizer"
        )
    best = sorted(told.items(), key=lambda pair: (-pair[1], pair[0]))[: wanted.picks]
    ids, log_probs = zip(*best, strict=True)
    if not np.exp(np.array(log_probs, np.float64)).sum() <= MOST_MASS:  # nor NaN
        raise UserError(
            f"{name} gave {', '.join(f'{value:.3g}' for value in log_probs[:3])}, … for a token, which are no "
            "log-probabilities: their mass is above 1; ask a server that gives them at temperature 1"
        )
    return list(ids), list(log_probs)


def _arrays(ids: Sequence[Sequence[int]], log_probs: Sequence[Sequence[float]], wanted: Wanted) -> Arrays:
    """Return entries and log-probabilities of N tokens with the log of the mass that is left."""
    log_probs_NP = np.array(log_probs, np.float64).reshape(-1, wanted.picks)
    left_N = np.maximum(1 - np.exp(log_probs_NP).sum(1), LEAST_TAIL)
    with np.errstate(divide="ignore"):
        log_tail_N = np.log(left_N if wanted.picks < wanted.vocab_size else 0 * left_N)
    return {
        "ids": np.array(ids, np.int32).reshape(-1, wanted.picks),
        "log_probs": log_probs_NP.astype(np.float32),
        "log_tail": log_tail_N.astype(np.float32),
    }


def written(
    config: TeacherServerConfig, answers: AnswersConfig, prompts: Sequence[Sequence[int]], first: int
) -> list[str]:
    """Return what a server writes behind each prompt, several requests under way at once.

    A draw goes by the seed and the prompt's number, as far as the server holds to it.

    Args:
        config: the server.
        answers: how it writes; it ends before a `stop` itself only where no scratchpad stands before the answer.
        prompts: tokens of each.
        first: the number of the first of them.

    Raises:
        UserError: as `asking` does.
    """
    client, how = Client(config), answers.sampling
    body = {"model": config.model, "max_tokens": answers.tokens, "temperature": how.temperature, "top_p": how.top_p}
    body |= {name: value for name in ("top_k", "min_p") if (value := getattr(how, name))}
    body |= {"stop": list(answers.stop)} if answers.stop and not answers.scratchpad else {}

    def write(number: int, prompt: Sequence[int]) -> str:
        own = {"prompt": list(prompt), "seed": (answers.seed + number) % 2**31}
        reply = client.post(client.under("completions"), body | own)
        try:
            text = reply["choices"][0]["text"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f"{client.name} replied {json.dumps(reply)[:100]}; wanted a completion")
        return text

    with ThreadPoolExecutor(config.batch_size) as pool:
        return list(pool.map(write, count(first), prompts))
