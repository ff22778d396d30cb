"""Sharpness-aware training for JAX."""
