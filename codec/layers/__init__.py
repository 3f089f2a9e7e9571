"""Causal layers."""
