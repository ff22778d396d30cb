"""Diagnostics and plots."""
