"""All families, in the order of the page."""

from families import audio, language, vision

FAMILIES = [*language.FAMILIES, *vision.FAMILIES, *audio.FAMILIES]
