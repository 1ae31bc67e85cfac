"""Weights and activations that wait in host memory until the device needs them."""
