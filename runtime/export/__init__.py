"""What becomes of a run: its weights under other names, merged into the base, or in one file."""
