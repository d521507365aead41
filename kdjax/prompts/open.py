"""From what a config names to a model that can be asked."""

from __future__ import annotations

from kdjax.prompts.config import SpeakerConfig
from kdjax.prompts.local import open_local
from kdjax.prompts.server import Server
from kdjax.prompts.speaker import Speaker


def open_speaker(config: SpeakerConfig) -> Speaker:
    """Return the speaker that a config names, its weights loaded.

    Raises:
        UserError: no such model, or one that answers nothing.
    """
    return Server(config) if config.is_server else open_local(config)
