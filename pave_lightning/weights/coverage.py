"""Which stored tensors are not merged, which weights are not captured and purified, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.backbones import lies_in
from pave_lightning.weights.buffers import BufferKind
from pave_lightning.weights.checkpoint import FLOATING, Checkpoint
from pave_lightning.weights.parameters import Parameter, ParameterKind

# Patterns of names that are shown for one reason; a family of models has few.
SHOWN_PATTERNS = 12

BUFFER_REASONS = {
    BufferKind.STATISTICS: "running statistics, averaged over the experts",
    BufferKind.CONSTANT: "buffers, which are the base's",
    BufferKind.DERIVED: "buffers that the model computes itself",
}
# What a base was trained with before: predictions of masked words, a discriminator, the decoder of an autoencoder.
BASE_HEAD = "the base's own head, which the models of the tasks lack; merged models are written without it"


@dataclass(frozen=True)
class Coverage:
    """What merging and purification leave out of a model.

    Attributes:
        not_merged: name of each tensor of the base, or of the experts' backbone, that is not merged -> the reason.
        not_purified: name of each weight with two axes or more that is merged, but not captured and purified -> the
            reason.
    """

    not_merged: Mapping[str, str]
    not_purified: Mapping[str, str]

    @classmethod
    def of(cls, base: Checkpoint, architecture: Architecture, *, convolutions: bool = False) -> Coverage:
        """What is left out of a base and its experts, from the base's headers alone.

        Args:
            base: the base's checkpoint.
            architecture: the experts' architecture.
            convolutions: whether convolutions without groups are captured.
        """
        not_merged = dict(_not_merged(base, architecture))
        reasons = purification_reasons(architecture.parameters.values(), convolutions=convolutions)
        kept = {name: reason for name, reason in reasons if name not in not_merged}
        return cls(not_merged, kept)

    def sections(self, *, merges: bool = True, captures: bool = True) -> dict[str, list[str]]:
        """Lines by heading, those that have any.

        Args:
            merges: whether anything is merged.
            captures: whether anything is captured.
        """
        found = {
            "weights that are not merged": reason_lines(self.not_merged) if merges else [],
            "weights that are not captured and purified": reason_lines(self.not_purified) if captures else [],
        }
        return {heading: lines for heading, lines in found.items() if lines}


def _not_merged(base: Checkpoint, architecture: Architecture) -> Iterator[tuple[str, str]]:
    for name, own in base.tied.items():
        if name in base.copies:
            yield name, f"tied to {own}, with which it is merged"
    for name, stored in base.backbone.items():
        if lies_in(name, architecture.frozen):
            yield name, "of the text side, which no task changes, so that it stays as it is in the base"
        elif name in architecture.buffers:
            yield name, BUFFER_REASONS[architecture.buffers[name]]
        elif not architecture.knows(name):
            yield name, "not in the model of the experts, so that it stays as it is in the base"
        elif not stored.is_floating:
            yield name, f"stored as {stored.dtype}"
    heads = architecture.head | {stored for stored, name in architecture.renamed.items() if name in architecture.head}
    for name in base.head:
        if not architecture.ignores(name):
            yield name, "heads, of which each task keeps its own" if name in heads else BASE_HEAD
    for name in architecture.parameters:
        if name not in base.backbone and not any(one in base.backbone for one in architecture.stored_for(name)):
            yield name, "not in the base, so that each task keeps its own"


def purification_reasons(parameters: Iterable[Parameter], *, convolutions: bool = True) -> Iterator[tuple[str, str]]:
    """Name of each weight with two axes or more that is not captured and purified, and why.

    Args:
        parameters: the parameters.
        convolutions: whether convolutions without groups are captured.
    """
    for parameter in parameters:
        name = parameter.name
        if len(parameter.shape) < 2 or parameter.kind in (ParameterKind.LINEAR, ParameterKind.EXPERTS):
            continue
        if parameter.kind is ParameterKind.EMBEDDING:
            yield name, "embedding tables"
        elif parameter.kind is not ParameterKind.CONVOLUTION:
            yield name, "no linear layer multiplies with them as one matrix"
        elif not parameter.is_matrix:
            yield name, "grouped, depthwise or transposed convolutions"
        elif not convolutions:
            yield name, "convolutions, which capture.convolutions leaves out"


def unmergeable(checkpoint: Checkpoint, architecture: Architecture) -> Iterator[str]:
    """Weights that are stored in a format that cannot be merged, such as 8-bit ones, a line for each format."""
    found: dict[str, list[str]] = {}
    for name, stored in checkpoint.backbone.items():
        if not stored.is_floating and architecture.knows(name):
            found.setdefault(stored.dtype, []).append(name)
    for dtype, names in found.items():
        yield (
            f"{checkpoint.folder}: {len(names)} weights are stored as {dtype}, such as {names[0]}; only "
            f"{', '.join(FLOATING)} can be merged, so load the model in bfloat16 and save it again"
        )


def reason_lines(reasons: Mapping[str, str]) -> list[str]:
    """One line a reason, with the names it holds for; layers that differ in their number alone stand together.

    Example:
        >>> reason_lines({"layer.0.q": "no matrix", "layer.1.q": "no matrix"})
        ['no matrix: layer.*.q (2)']
    """
    patterns: dict[str, dict[str, int]] = {}
    for name, reason in reasons.items():
        counts = patterns.setdefault(reason, {})
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    lines = []
    for reason, counts in patterns.items():
        shown = [pattern if "*" not in pattern else f"{pattern} ({count})" for pattern, count in counts.items()]
        rest = [f"and {len(shown) - SHOWN_PATTERNS} more"] if len(shown) > SHOWN_PATTERNS else []
        lines.append(f"{reason}: {', '.join(shown[:SHOWN_PATTERNS] + rest)}")
    return lines
