"""Which parameters the merge steps of a recipe leave as they are in the base, in words."""

from __future__ import annotations

from collections.abc import Iterable

from pave_lightning.errors import listed
from pave_lightning.merging import is_selected
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.weights.coverage import reason_lines


def excluded_sections(steps: Iterable[MergeStep], names: Iterable[str]) -> dict[str, list[str]]:
    """Lines by heading, one heading for all steps that leave out the same; none for steps that merge everything.

    Args:
        steps: merge steps.
        names: names of the parameters that base and experts share.
    """
    names = list(names)
    alike: dict[tuple[str, ...], list[str]] = {}
    for step in steps:
        chosen = step.parameters
        left = tuple(name for name in names if not is_selected(name, chosen.include, chosen.exclude))
        if left:
            alike.setdefault(left, []).append(step.name)
    return {
        f"weights that the merge of {listed(merged)} leaves as they are in the base": reason_lines(
            dict.fromkeys(left, "left out by the key parameters")
        )
        for left, merged in alike.items()
    }
