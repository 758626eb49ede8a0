"""All families, in the order of the page."""

from families import language, vision

FAMILIES = [*language.FAMILIES, *vision.FAMILIES]
