"""The load test of many streams: `python -m tools.benchmark streams`."""
