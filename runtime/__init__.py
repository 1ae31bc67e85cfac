"""Plan -> trained weights. The only room where torch, diffusers and peft are imported."""
