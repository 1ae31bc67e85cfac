"""The command line of tuner and what a person sees; no training logic."""

__version__ = "0.1.0"
