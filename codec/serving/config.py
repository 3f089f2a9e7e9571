"""What a server is told: limits, and who may use it."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from codec.serving.protocol import DEFAULT_PORT, Close, SessionError


@dataclass(frozen=True)
class ServeConfig:
    """Limits are for a session where nothing else is said. ValueError for impossible values."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT  # 0: any free one
    max_sessions: int = 64
    max_message_bytes: int = 2**20
    idle_timeout_s: float = 30.0
    max_duration_s: float | None = None
    slow_reader_timeout_s: float = 30.0  # how long a piece of output may wait for the client to read it
    drain_s: float = 30.0
    token: str | None = field(default=None, repr=False)
    allowed_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port={self.port} is not in 0..65535")
        for name in ("max_sessions", "max_message_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("idle_timeout_s", "max_duration_s", "slow_reader_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not self.drain_s >= 0:
            raise ValueError(f"drain_s must not be negative, got {self.drain_s}")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise ValueError("the token must be one line of printable ASCII")
        for origin in self.allowed_origins:
            parts = urlsplit(origin)
            if not (parts.scheme and parts.netloc) or parts.path or parts.query:
                raise ValueError(f"origin {origin!r} is none; https://example.org is one")

    def check_access(self, headers: Mapping[str, str], query: Mapping[str, str]) -> None:
        """SessionError where whoever asks may not use the server.

        With a token, all who know it may. Without one, a web page of another origin may not: its visitor does not know
        that it talks to the visitor's machine. Neither may a page whose host name was made to point here.
        """
        if self.token is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given = given.strip() if scheme.lower() == "bearer" else query.get("token", "")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                raise SessionError(
                    "the token is wrong" if given else "this server wants a token: ?token=TOKEN, or a Bearer header",
                    Close.NO_TOKEN,
                )
            return
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin in self.allowed_origins:
            return
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise SessionError(f"pages of {origin} may not use this server", Close.FORBIDDEN)
        if is_loopback(self.host) and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            raise SessionError(f"this server is for the machine it runs on, not for {host!r}", Close.FORBIDDEN)


def is_loopback(host: str) -> bool:
    """Whether a name or an address can only be this machine.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("example.org")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
