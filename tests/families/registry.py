"""All families, in the order of the page."""

from families import audio, language, plain, vision

FAMILIES = [*language.FAMILIES, *vision.FAMILIES, *audio.FAMILIES, *plain.FAMILIES]
