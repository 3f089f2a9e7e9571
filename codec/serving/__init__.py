"""Sessions over WebSockets: `codec serve`, the page that comes with it, and a Python client.

`codec.serving.protocol` says what goes over a socket, `codec.serving.client` speaks it from Python. Nothing here is
loaded by `import codec`; the extra `serving` has what the server needs, and the client needs its `websockets` only.
"""
