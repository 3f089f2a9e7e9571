"""Checkpoints and token files of other projects: a file per project, and `detect` for any of them."""
