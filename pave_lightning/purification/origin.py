"""Whether a task's statistics are those of its expert, from headers and digests alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from pave_lightning.errors import listed
from pave_lightning.statistics import TaskStatistics
from pave_lightning.statistics.gradients import EXPERT_DIGEST
from pave_lightning.statistics.storage import again
from pave_lightning.weights import (
    Checkpoint,
    Parameter,
    ParameterKind,
    TaskVectors,
    model_digest,
)


def origin_problems(
    source: TaskVectors, task: str, statistics: TaskStatistics, layers: Sequence[Parameter]
) -> Iterator[str]:
    """What shows that statistics were captured of another expert or another model, or of a part of it only.

    Args:
        source: the task vectors.
        task: whose statistics they are meant to be.
        statistics: what was captured.
        layers: the matrix weights that may be purified.
    """
    remedy = again(statistics.file, "the statistics of this very expert")
    expert = source.checkpoint(task)
    stranger = _other_expert(source, task, expert, statistics)
    if stranger:
        yield f"{stranger}: {remedy}"
    matrices = dict.fromkeys(matrix.layer for parameter in layers for matrix in parameter.matrices)
    if matrices.keys().isdisjoint(statistics):
        found = _listed(statistics.layers(), "layer") if len(statistics) else "no layer at all"
        yield (
            f"the statistics hold none of the model's linear layers: expected names such as {next(iter(matrices))}, "
            f"found {found}: {remedy}"
            if layers
            else f"the model has no linear layers, but the statistics hold {found}"
        )
        return
    foreign = _foreign(source, expert, statistics, matrices)
    if foreign:
        yield f"the statistics hold {_listed(foreign, 'layer')}, which the model has not: {remedy}"
    if statistics.unreached is not None:
        known = {*statistics, *statistics.unreached}
        always = (parameter for parameter in layers if parameter.kind is not ParameterKind.CONVOLUTION)
        linear = list(dict.fromkeys(matrix.layer for parameter in always for matrix in parameter.matrices))
        missing = [layer for layer in linear if layer not in known]
        if missing:
            yield (
                f"expected all {len(linear)} linear layers of the model, but the statistics lack "
                f"{_listed(missing, 'layer')}, and do not say that no example reached them: {remedy}"
            )


def _other_expert(source: TaskVectors, task: str, expert: Checkpoint | None, statistics: TaskStatistics) -> str | None:
    """What says that the statistics are another expert's; None where nothing does."""
    captured_of = statistics.metadata.get(EXPERT_DIGEST)
    if captured_of is not None and expert is not None:
        # Files are hashed once a process.
        digest = model_digest(expert.folder)
        if digest == captured_of:
            return None
        return (
            f"the statistics were captured of another expert than {expert.folder}: expected {EXPERT_DIGEST} {digest}, "
            f"found {captured_of}"
        )
    # Names of tasks tell less than digests: whoever uses the statistics may have given them other names.
    named = statistics.metadata.get("task", task)
    if named != task and named in source.tasks:
        return f"expected statistics of this task, but they say that they were captured of task '{named}'"
    return None


def _foreign(
    source: TaskVectors, expert: Checkpoint | None, statistics: TaskStatistics, matrices: Collection[str]
) -> list[str]:
    """Layers that lie neither in the backbone nor in a head."""
    # Modules of the backbone that not all experts share belong to the heads; their layers are captured too.
    shared = {parameter.name.partition(".")[0] for parameter in source.parameters}
    # Where modules and stored weights have different names, those of the heads are not known.
    renamed = any(parameter.module is not None for parameter in source.parameters)
    private = None
    # A head that is tied to an embedding multiplies with it, and is captured under its own name.
    tied = set() if expert is None else {name.rpartition(".")[0] for name in expert.tied}
    if expert is not None and not renamed:
        private = {name.partition(".")[0] for name in (*expert.backbone, *expert.head)}

    def is_foreign(layer: str) -> bool:
        first, _, rest = layer.partition(".")
        if layer in matrices or layer in tied:
            return False
        if first in shared:
            return True
        if private is not None:
            return first not in private
        # The name of a layer that is missing, with something before it.
        parts = rest.split(".")
        tails = {".".join(parts[start:]) for start in range(len(parts))}
        return any(tail in matrices and tail not in statistics for tail in tails)

    return [layer for layer in statistics.layers() if is_foreign(layer)]


def _listed(names: Sequence[str], noun: str) -> str:
    """Some names, as many as fit in a message."""
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({listed(names)})"
