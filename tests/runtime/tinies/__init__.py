"""Tiny pipelines, one module per family: `pipeline(overrides)` makes one of random weights."""
