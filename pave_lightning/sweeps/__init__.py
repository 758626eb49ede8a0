"""Sweeps: recipes run over a grid of settings and seeds."""
