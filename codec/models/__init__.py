"""Codec families, one file each."""
