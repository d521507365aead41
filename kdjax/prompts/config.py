"""What is configured of a prompt search."""

from __future__ import annotations

from dataclasses import dataclass

from kdjax.errors import UserError
from kdjax.models.config import DType


@dataclass(frozen=True)
class SpeakerConfig:
    """A model that is asked: a local one, or one behind a server that speaks OpenAI's protocol."""

    source: str = ""
    """A directory, run, .gguf file, known name or hub id; or where a server is: http://host:port/v1. Empty: none."""
    model: str = ""
    """What the server calls its model."""
    key_variable: str = ""
    """The environment variable that holds the server's key, which is never saved or shown; empty: no key."""
    chat: bool = True
    """A prompt is a user's turn in the model's own template, not plain text to go on with. A server is always asked
    so."""
    dtype: DType = "float32"
    """Of a local model's weights and arithmetic."""
    batch_size: int = 16
    """Answers written at once; of a server: requests under way at once."""
    batch_tokens: int = 2048
    """Tokens read at once, over all devices, where answers are weighed and not written."""
    timeout: float = 60.0
    """Seconds after which a request to a server has failed."""
    retries: int = 4
    """How often a failed request is tried again, after 1, 2, 4, … seconds."""

    @property
    def is_server(self) -> bool:
        """Whether it is asked over the network."""
        return self.source.startswith(("http://", "https://"))

    def check(self, name: str) -> None:
        """Check the ranges.

        Raises:
            UserError: a value outside its range, naming the field of the part `name`.
        """
        for field, least in (("batch_size", 1), ("batch_tokens", 1), ("retries", 0)):
            if getattr(self, field) < least:
                raise UserError(f"{name}.{field} is {getattr(self, field)}; wanted at least {least}")
        if not self.timeout > 0:
            raise UserError(f"{name}.timeout is {self.timeout}; wanted more than 0 seconds")
        if self.is_server and not self.model:
            raise UserError(f"{name}.source is a server; name its model in {name}.model")
