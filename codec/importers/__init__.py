"""Checkpoints of other projects, each as one of our codecs: a file per project."""
