"""Training code, run from a checkout (extra `train`)."""
