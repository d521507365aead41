"""A model behind a server that speaks OpenAI's protocol (vLLM, llama.cpp, Ollama, …): it answers prompts.

The key is read from the environment for each request's header, and is nowhere else: not in a config, file or message.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from itertools import count, repeat
from typing import Any

from kdjax.errors import UserError
from kdjax.prompts.config import SpeakerConfig
from kdjax.prompts.speaker import How, Said, Weighed

MAX_REPLY = 8_000_000
"""Bytes of a reply that are read."""

LONGEST_WAIT = 60.0
"""Seconds between two tries at most, whatever the server asks for."""

AGAIN = (408, 409, 425, 429)
"""Statuses, besides those from 500 on, after which a request is tried again."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the key along to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        """Return no request, so that the redirect is an error like others."""


@dataclass(frozen=True)
class Server:
    """A model behind a server."""

    config: SpeakerConfig

    def __post_init__(self) -> None:
        if self.config.key_variable and not re.fullmatch(r"[!-~]+", self._key):
            raise UserError(
                f"the environment's {self.config.key_variable} is to hold the key of {self.config.source}; wanted "
                "letters, digits and signs without space"
            )

    @property
    def name(self) -> str:
        """What a user calls it."""
        return f"{self.config.model} at {self.config.source}"

    @property
    def _key(self) -> str:
        return os.environ.get(self.config.key_variable, "").strip()

    def say(self, prompts: Sequence[str], how: How) -> list[Said]:
        """Return what it says to each prompt, several requests under way at once.

        Raises:
            UserError: the server refuses, or cannot be reached after all tries.
        """
        with ThreadPoolExecutor(self.config.batch_size) as pool:
            return list(pool.map(self._answer, count(), prompts, repeat(how)))

    def weigh(self, pairs: Sequence[tuple[str, str]]) -> list[Weighed]:
        """Refuse: the protocol's chat gives no log-probabilities of a given answer.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{self.name} is a server, which cannot weigh given answers; take a task and measure of written answers "
            "(generation, question_answering, summarising), or a local model"
        )

    def _answer(self, number: int, prompt: str, how: How) -> Said:
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": how.max_new_tokens,
            "temperature": how.sampling.temperature,
            "top_p": how.sampling.top_p,
            "seed": (how.seed + number) % 2**31,
        }
        reply = self._post("chat/completions", body | ({"stop": list(how.stop)} if how.stop else {}))
        try:
            text = reply["choices"][0]["message"]["content"] or ""
            tokens = int((reply.get("usage") or {}).get("total_tokens") or 0)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise UserError(f"{self.name} replied {json.dumps(reply)[:100]}; wanted a chat completion") from None
        text = str(text).lstrip()
        return Said(text[: min([text.find(end) for end in how.stop if end in text], default=len(text))], tokens)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the reply to a request, tried again with growing waits where that may help."""
        wrong = ""
        for number in range(self.config.retries + 1):
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                wrong, asked = f"status {error.code}: {_said(error)}", error.headers.get("Retry-After", "")
                if error.code < 500 and error.code not in AGAIN:
                    raise UserError(f"{self.name} refuses ({wrong})") from None
            except (OSError, HTTPException, ValueError) as error:  # no connection, a broken one, no JSON
                wrong, asked = str(error) or type(error).__name__, ""
            if number < self.config.retries:
                time.sleep(min(float(asked) if asked.isdecimal() else 2.0**number, LONGEST_WAIT))
        raise UserError(f"{self.name} gave no answer in {self.config.retries + 1} tries (the last: {wrong})") from None

    def _once(self, path: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.config.key_variable:
            headers["Authorization"] = f"Bearer {self._key}"
        url, data = f"{self.config.source.rstrip('/')}/{path}", json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method="POST")
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=self.config.timeout) as reply:
            return json.loads(reply.read(MAX_REPLY))


def _said(error: urllib.error.HTTPError) -> str:
    """Return the first words of what came with an error."""
    try:
        return " ".join(error.read(2000).decode(errors="replace").split())[:200] or error.reason
    except OSError:
        return str(error.reason)
