"""Streams: one of any chunk size (`StreamingEncoder`, `StreamingDecoder`), or many in one batch (`StreamPool`)."""

from codec.streaming.single import StreamingDecoder, StreamingEncoder

__all__ = ["StreamingDecoder", "StreamingEncoder"]
