"""The recipe: everything that a run does, in one file."""
