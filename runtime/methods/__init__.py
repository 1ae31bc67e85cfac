"""Training methods: what is trained, and what is saved of it."""
