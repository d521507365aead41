"""A server that is asked over HTTP: at most so many requests a minute, tried again where that may help.

The key is read from the environment for each request's header, and is nowhere else: not in a config, file or message.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from typing import Any

from kdjax.errors import UserError

MAX_REPLY = 2**28
"""Bytes of a reply that are read."""

LONGEST_WAIT = 60.0
"""Seconds between two tries at most, whatever the server asks for."""

AGAIN = (408, 409, 425, 429)
"""Statuses, besides those from 500 on, after which a request is tried again."""


@dataclass(frozen=True)
class ServerConfig:
    """A model behind a server."""

    source: str = ""
    """Where the server is: http://host:port/v1. Empty: none."""
    model: str = ""
    """What the server calls its model."""
    key_variable: str = ""
    """The environment variable that holds the server's key, which is never saved or shown; empty: no key."""
    batch_size: int = 16
    """Requests under way at once."""
    requests_per_minute: int = 0
    """Of a server: so many at most, those that are tried again among them; 0 is no limit."""
    timeout: float = 60.0
    """Seconds after which a request to a server has failed."""
    retries: int = 4
    """How often a failed request is tried again, after 1, 2, 4, … seconds, or those that the server asks for."""

    @property
    def is_server(self) -> bool:
        """Whether it is asked over the network."""
        return self.source.startswith(("http://", "https://"))

    @property
    def name(self) -> str:
        """What a user calls it."""
        return f"{self.model} at {self.source}"

    def check(self, name: str) -> None:
        """Check the ranges.

        Raises:
            UserError: a value outside its range, naming the field of the part `name`.
        """
        for field, least in (("batch_size", 1), ("requests_per_minute", 0), ("retries", 0)):
            if getattr(self, field) < least:
                raise UserError(f"{name}.{field} is {getattr(self, field)}; wanted at least {least}")
        if not self.timeout > 0:
            raise UserError(f"{name}.timeout is {self.timeout}; wanted more than 0 seconds")
        if self.is_server and not self.model:
            raise UserError(f"{name}.source is a server; name its model in {name}.model")
        if self.is_server and any(sign in self.source for sign in "@?#"):
            raise UserError(
                f"{name}.source holds more than where the server is, a password or key perhaps; wanted "
                f"http://host:port/v1, and the key in an environment variable that {name}.key_variable names"
            )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would take the key along to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        """Return no request, so that the redirect is an error like others."""


class _Pace:
    """Turns of equal distance in time, for any number of threads."""

    def __init__(self, per_minute: int) -> None:
        self._distance = 60 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self) -> None:
        """Return when it is the caller's turn."""
        if not self._distance:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._distance
        if turn > now:
            time.sleep(turn - now)


@dataclass(frozen=True)
class Client:
    """A server to which requests are posted, from any number of threads."""

    config: ServerConfig

    def __post_init__(self) -> None:
        if self.config.key_variable and not re.fullmatch(r"[!-~]+", self._key):
            raise UserError(
                f"the environment's {self.config.key_variable} is to hold the key of {self.config.source}; wanted "
                "letters, digits and signs without space"
            )
        _ = self._pace  # one for all threads, so made before there are any

    @property
    def name(self) -> str:
        """What a user calls it."""
        return self.config.name

    def post(self, url: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON that the server replies to a request, tried again with growing waits where that may help.

        Raises:
            UserError: the server refuses, or cannot be reached after all tries.
        """
        wrong = ""
        for number in range(self.config.retries + 1):
            self._pace.wait()
            try:
                return self._once(url, body)
            except urllib.error.HTTPError as error:
                wrong, asked = f"status {error.code}: {self._said(error)}", error.headers.get("Retry-After", "")
                if error.code < 500 and error.code not in AGAIN:
                    raise UserError(f"{self.name} refuses ({wrong})") from None
            except (OSError, HTTPException, ValueError) as error:  # no connection, a broken one, no JSON
                wrong, asked = str(error) or type(error).__name__, ""
            if number < self.config.retries:
                time.sleep(min(float(asked) if asked.isdecimal() else 2.0**number, LONGEST_WAIT))
        raise UserError(f"{self.name} gave no answer in {self.config.retries + 1} tries (the last: {wrong})") from None

    def under(self, path: str) -> str:
        """Return the address of a path at the server."""
        return f"{self.config.source.rstrip('/')}/{path}"

    @property
    def _key(self) -> str:
        return os.environ.get(self.config.key_variable, "").strip() if self.config.key_variable else ""

    @cached_property
    def _pace(self) -> _Pace:
        return _Pace(self.config.requests_per_minute)

    def _once(self, url: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.config.key_variable:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=self.config.timeout) as reply:
            return json.loads(reply.read(MAX_REPLY))

    def _said(self, error: urllib.error.HTTPError) -> str:
        """Return the first words of what came with an error, without the key, which some servers repeat."""
        try:
            said = " ".join(error.read(2000).decode(errors="replace").split()) or error.reason
        except OSError:
            said = str(error.reason)
        return (said.replace(self._key, "***") if self._key else said)[:200]
