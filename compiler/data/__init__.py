"""Which pictures a run is trained on: found, measured, placed, captioned and counted."""
