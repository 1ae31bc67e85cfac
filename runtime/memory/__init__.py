"""What a training step allocates: simulated on meta tensors, measured on real ones."""
