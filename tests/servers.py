"""A server of `codec serve` in a thread of the tests."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from codec.models.interface import Codec
from codec.serving.config import ServeConfig
from codec.serving.server import CodecServer


@contextlib.contextmanager
def serving(codec: Codec, **config: Any) -> Iterator[CodecServer]:
    """A server in a thread of its own, drained in the end."""
    server = CodecServer(codec, ServeConfig(**{"port": 0, "drain_s": 0} | config))
    is_up = threading.Event()
    thread = threading.Thread(target=server.run, args=[is_up.set])
    thread.start()
    assert is_up.wait(20)
    try:
        yield server
    finally:
        server.drain()
        thread.join(20)
        assert not thread.is_alive()
