"""Whole programs. A package, so that no other of this name (Haiku installs one) is found first."""
