"""Maps the folder recipes into the package that is built. Everything else about the project is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

SHIPPED_RECIPES = "pave_lightning.recipe.files"

setup(
    packages=[*find_namespace_packages(include=["pave_lightning*"]), SHIPPED_RECIPES],
    package_dir={SHIPPED_RECIPES: "recipes"},
)
