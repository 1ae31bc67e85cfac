"""Frozen weights in fewer bits: their codes, the layers that hold them, and loading them."""
