"""A model behind a server that speaks OpenAI's protocol (vLLM, llama.cpp, Ollama, …): it answers prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, repeat

from kdjax.errors import UserError
from kdjax.prompts.config import SpeakerConfig
from kdjax.prompts.speaker import How, Said, Weighed
from kdjax.server import Client


@dataclass(frozen=True)
class Server(Client):
    """A model behind a server."""

    config: SpeakerConfig

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
        reply = self.post(self.under("chat/completions"), body | ({"stop": list(how.stop)} if how.stop else {}))
        try:
            text = reply["choices"][0]["message"]["content"] or ""
            tokens = int((reply.get("usage") or {}).get("total_tokens") or 0)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise UserError(f"{self.name} replied {json.dumps(reply)[:100]}; wanted a chat completion") from None
        text = str(text).lstrip()
        return Said(text[: min([text.find(end) for end in how.stop if end in text], default=len(text))], tokens)
