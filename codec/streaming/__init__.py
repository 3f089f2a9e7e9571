"""Streams: one of any chunk size (`StreamingEncoder`, `StreamingDecoder`), or many in one batch (`StreamPool`)."""

from codec.streaming.pool import StreamPool
from codec.streaming.queued import PoolFull, StreamClosed
from codec.streaming.single import StreamingDecoder, StreamingEncoder

__all__ = ["PoolFull", "StreamClosed", "StreamPool", "StreamingDecoder", "StreamingEncoder"]
