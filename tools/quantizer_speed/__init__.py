"""How long quantizers take: `python -m tools.benchmark quantizer`. `command` says what is measured, and how."""
