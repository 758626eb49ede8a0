"""From a recipe to results: the stages, what they depend on, and how they are run."""
