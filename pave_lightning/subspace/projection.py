"""Context-oriented decomposition of a weight, as an orthogonal projection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from pave_lightning.subspace.finiteness import is_finite
from pave_lightning.subspace.frames import Frame, frame_of, gram_of
from pave_lightning.subspace.solver import DenseEigen, SingularPairs, SymmetricEigen, symmetric_eigen

Metric = Literal["covariance", "root", "identity"]
MomentKind = Literal["input", "cross", "rows", "output"]


class KnowledgeSpectrum:
    """How strongly a layer's own data excite each direction of its output, strongest first.

    All values are known at once. Directions are solved when they are asked for, as a method only the few that are
    removed; those that were solved are kept. For ``d_out > d_in`` forming them uses the weight again, so it must not be
    changed in place before that.

    Attributes:
        values: singular values, shape ``(d,)``, float64, descending, on the CPU. All zeros when the layer has seen
            nothing.
        shape: ``(d_out, d_in)`` of the weight.
    """

    def __init__(
        self, lift: Callable[[Tensor], Tensor], pairs: SymmetricEigen | SingularPairs, shape: tuple[int, int]
    ) -> None:
        self.shape = shape
        self.values = pairs.values if isinstance(pairs, SingularPairs) else pairs.values.clamp_min(0).sqrt()
        self.values = self.values.flip(0)
        self._lift, self._pairs = lift, pairs

    @property
    def directions(self) -> Tensor:
        """All left singular directions as columns, shape ``(d_out, d)``, float64, strongest first."""
        return self.tail(0)

    def tail(self, rank: int) -> Tensor:
        """The directions behind the first ``rank`` ones as columns, shape ``(d_out, d - rank)``, float64.

        They are orthonormal, lie in the column space of the weight and are on the device that solved them.

        Raises:
            ValueError: ``rank`` is not between 0 and ``d``.
        """
        if not 0 <= rank <= len(self.values):
            raise ValueError(f"rank must lie between 0 and {len(self.values)}, found {rank}")
        return self._lift(self._pairs.smallest(len(self.values) - rank).flip(1))


def knowledge_spectrum(
    weight: Tensor,
    moment: Tensor | None,
    kind: MomentKind = "input",
    *,
    metric: Metric = "covariance",
    damping: float = 0.0,
    exact: bool = False,
    device: torch.device | str | None = None,
) -> KnowledgeSpectrum:
    r"""Singular values and left singular directions of a weight seen through its own data.

    With ``C~ = C + damping * I`` these are the ones of ``W C~`` (``metric="covariance"``, the context-oriented SVD of
    the paper), of ``W C~^(1/2)`` (``"root"``: the metric in which truncation minimises the layer's output error), or of
    ``W`` alone (``"identity"``, a plain SVD). What is known of the data may come in four kinds, with the same result:

    ========== ================================================ ==================
    kind       moment                                           shape
    ========== ================================================ ==================
    ``input``  ``C``, the mean of ``x x^T``                     ``(d_in, d_in)``
    ``cross``  ``A = W C``, the mean of ``y x^T``               ``(d_out, d_in)``
    ``rows``   ``M = X / sqrt(n)``, so ``C = M^T M``            ``(n, d_in)``
    ``output`` ``O = W C W^T``, the mean of ``y y^T``           ``(d_out, d_out)``
    ========== ================================================ ==================

    ``y`` is the layer's output without its bias. ``output`` serves the metric ``root`` only; ``rows`` saves time and
    memory when there are fewer rows than ``d_in``, because ``C`` is never formed.

    The smaller Gram matrix is reduced to tridiagonal form once, in float64; directions are solved later, and only those
    that are asked for. For ``d_out > d_in`` everything happens inside the column space of ``W``, so that the result is
    well defined even for a singular ``C`` and no damping.

    Args:
        weight: ``W``, shape ``(d_out, d_in)``, any float dtype.
        moment: what the data did, see above, any float dtype. May be None with ``metric="identity"``, which does not
            look at it.
        kind: which of the four ``moment`` is.
        metric: what the singular values are taken of.
        damping: the multiple of the identity that is added to ``C``, at least 0.
        exact: take a full float64 SVD of ``W C~`` itself, many times slower, to compare with. The metric ``root``
            multiplies by the symmetric root of ``C~`` where ``C`` is known, and takes all eigenvectors of
            ``W C~ W^T`` where it is not (``cross``, ``output``).
        device: where to solve; by default the CPU. Any other device solves all eigenvectors of the Gram matrix.

    Returns:
        The spectrum, with ``d = min(d_out, d_in)`` components.

    Raises:
        ValueError: a shape, a dtype, ``kind``, ``metric`` or ``damping`` is not as described; ``weight`` or ``moment``
            holds NaN or infinite values; their products overflow float64.

    Note:
        The Gram matrix of ``"covariance"`` and ``"identity"`` holds squares, so values below about 1e-8 of the largest
        are rounding noise, and so are the directions they belong to. Measured on sides of 256 and 1024, an eighth of
        the rank removed, against a float64 SVD, as relative error of the projected weight: at most 7e-10 for weights
        of condition up to 100 and covariances of condition 1e6 or 1e12, damped by 1e-3 of their largest eigenvalue
        (6e-9 for a square weight of condition 1e3, 2e-7 of condition 1e5; a float32 SVD: 1e-6 to 1e-3); 2e-7 to 3e-6
        undamped at condition 1e6, but 1e-5 to 2e-4 for square weights of condition 1e3 to 1e5 (a float32 SVD: 3e-4 to
        4e-2); undamped at condition 1e12 nothing that a float32 SVD would
        not get wrong as well (errors of 1e-3 to 0.4). ``exact=True`` stays below 1e-6 in all of these.

    Source: CO-SVD in An, Yang, Torr, Ghanem, "Purifying Task Vectors in Knowledge-Aware Subspace for Model Merging",
    arXiv 2510.14697.

    Example:
        >>> weight, inputs = torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> knowledge_spectrum(weight, inputs.T @ inputs / 2).values
        tensor([2., 1.], dtype=torch.float64)
    """
    _check_request(weight, moment, kind, metric, damping)
    where = torch.device("cpu" if device is None else device)
    frame = frame_of(weight.detach(), where, stable=exact)
    known = None
    if metric != "identity" and moment is not None:
        known = moment.detach().to(where, torch.float64)
    pairs = (_exact_pairs if exact else _fast_pairs)(frame, known, kind, metric, damping)
    # Only the way back: most frames need not keep the weight for it.
    return KnowledgeSpectrum(frame.lift, pairs, (weight.shape[0], weight.shape[1]))


def project(weight: Tensor, spectrum: KnowledgeSpectrum, rank: int) -> Tensor:
    r"""Keep of a weight what reaches the ``rank`` strongest directions of its spectrum.

    Returns ``U_r U_r^T W``, formed as ``W - U_tail (U_tail^T W)`` in float64. For the covariance metric this equals the
    published ``SVD_r(W C~) C~^-1`` with no inverse to take, since ``S V^T = U^T W C~``
    (An, Yang, Torr, Ghanem, arXiv 2510.14697).

    Args:
        weight: ``W``, shape ``(d_out, d_in)``, any float dtype: the weight that ``spectrum`` was computed from.
        spectrum: result of `knowledge_spectrum`.
        rank: number of directions to keep, from 0 to ``d = min(d_out, d_in)``.

    Returns:
        A new tensor of the weight's shape, dtype and device. With ``rank == d`` it holds the very same values, bit for
        bit.

    Raises:
        ValueError: ``rank`` is out of range, or ``weight`` does not fit ``spectrum``.

    Example:
        >>> weight, inputs = torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> project(weight, knowledge_spectrum(weight, inputs.T @ inputs / 2), rank=1)
        tensor([[1., 0.],
                [0., 0.]])
    """
    return remove_tail(weight, spectrum, rank)


def remove_tail(matrix: Tensor, spectrum: KnowledgeSpectrum, rank: int) -> Tensor:
    r"""Take the directions behind the first ``rank`` of a spectrum out of any matrix of the weight's shape.

    Returns ``M - U_tail (U_tail^T M)``, formed in float64. For the weight itself this is `project`. For a task vector
    ``M = W - W_B`` it removes the directions that are weak for the expert. For ``d_out > d_in``, what lies outside the
    column space of the expert's weight stays.

    Args:
        matrix: ``M``, shape ``(d_out, d_in)``, any float dtype.
        spectrum: result of `knowledge_spectrum` for a weight of that shape.
        rank: number of directions not to touch, from 0 to ``d = min(d_out, d_in)``.

    Returns:
        A new tensor of the matrix's shape, dtype and device. With ``rank == d`` it holds the very same values, bit for
        bit.

    Raises:
        ValueError: ``rank`` is out of range, or ``matrix`` does not fit ``spectrum``.

    Example:
        >>> spectrum = knowledge_spectrum(torch.diag(torch.tensor([1.0, 2.0])), None, metric="identity")
        >>> remove_tail(torch.ones(2, 2), spectrum, rank=1)
        tensor([[0., 0.],
                [1., 1.]])
    """
    if tuple(matrix.shape) != spectrum.shape:
        raise ValueError(
            f"weight of shape {tuple(matrix.shape)} does not fit a spectrum of a weight of shape {spectrum.shape}"
        )
    length = len(spectrum.values)
    if not 0 <= rank <= length:
        raise ValueError(f"rank must lie between 0 and {length}, found {rank}")
    if rank == length:
        return matrix.detach().clone()
    tail = spectrum.tail(rank)
    full = matrix.detach().to(tail.device, torch.float64)
    return torch.addmm(full, tail, tail.T @ full, alpha=-1).to(matrix.device, matrix.dtype)


def _fast_pairs(
    frame: Frame, known: Tensor | None, kind: MomentKind, metric: Metric, damping: float
) -> SymmetricEigen | SingularPairs:
    return symmetric_eigen(_gram(frame, known, kind, metric, damping))


def _exact_pairs(
    frame: Frame, known: Tensor | None, kind: MomentKind, metric: Metric, damping: float
) -> SymmetricEigen | SingularPairs:
    core = frame.core
    if known is None:
        return SingularPairs(core)
    if metric == "covariance":
        return SingularPairs(_image(frame, known, kind, damping))
    if kind in ("cross", "output"):
        return DenseEigen(_gram(frame, known, kind, metric, damping))
    values, vectors = torch.linalg.eigh(known if kind == "input" else known.T @ known)
    return SingularPairs(core @ (vectors * (values.clamp_min(0) + damping).sqrt()) @ vectors.T)


def _gram(frame: Frame, known: Tensor | None, kind: MomentKind, metric: Metric, damping: float) -> Tensor:
    """The matrix whose eigenvalues are the squared singular values, shape ``(d, d)``; one triangle may be rounded."""
    core = frame.core
    if known is None:
        return gram_of(core)
    if metric == "covariance":
        return gram_of(_image(frame, known, kind, damping))
    # W C~ W^T is the Gram matrix of W C~^(1/2): nothing is squared, and no root is taken.
    if kind == "rows":
        gram = gram_of(core @ known.T)
    elif kind == "output":
        gram = frame.enter(frame.enter(known).T).clone()
    else:
        return _image(frame, known, kind, damping) @ core.T
    return gram.add_(gram_of(core), alpha=damping) if damping else gram


def _image(frame: Frame, known: Tensor, kind: MomentKind, damping: float) -> Tensor:
    """``W C~`` in the coordinates of the frame, shape ``(d, d_in)``."""
    core = frame.core
    if kind == "input":
        return torch.addmm(core, core, known, beta=damping)
    if kind == "rows":
        return torch.addmm(core, core @ known.T, known, beta=damping)
    image = frame.enter(known)
    return image.add(core, alpha=damping) if damping else image


def _check_request(weight: Tensor, moment: Tensor | None, kind: MomentKind, metric: str, damping: float) -> None:
    if metric not in get_args(Metric):
        raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, found '{metric}'")
    if kind not in get_args(MomentKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(MomentKind))}, found '{kind}'")
    if kind == "output" and metric != "root":
        raise ValueError(f"a moment of kind 'output' serves the metric 'root' only, found metric '{metric}'")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be a finite number of at least 0, found {damping}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be a matrix (d_out, d_in), found shape {tuple(weight.shape)}")
    _check_values("weight", weight)
    if metric == "identity":
        return
    if moment is None:
        raise ValueError(f"metric '{metric}' needs a moment, found None")
    _check_shape((weight.shape[0], weight.shape[1]), tuple(moment.shape), kind)
    _check_values("moment", moment)


def moment_shape(kind: MomentKind, weight: tuple[int, int], rows: int) -> tuple[int, int]:
    """Shape of a moment.

    Args:
        kind: which moment.
        weight: ``(d_out, d_in)``.
        rows: how many rows there are, which counts for the kind ``"rows"`` alone.

    Example:
        >>> moment_shape("cross", (32, 64), rows=500)
        (32, 64)
    """
    width_out, width_in = weight
    heights = {"input": width_in, "cross": width_out, "rows": rows, "output": width_out}
    return heights[kind], width_out if kind == "output" else width_in


def _check_shape(weight: tuple[int, int], moment: tuple[int, ...], kind: MomentKind) -> None:
    if moment != moment_shape(kind, weight, rows=moment[0] if moment else 0):
        expected: tuple[object, object] = moment_shape(kind, weight, rows=0)
        if kind == "rows":
            expected = ("any number of rows", expected[1])
        raise ValueError(
            f"moment of kind '{kind}' must have shape {expected} for a weight of shape {weight}, found {moment}"
        )


def _check_values(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be of a floating-point dtype, found {tensor.dtype}")
    if not is_finite(tensor):
        raise ValueError(f"{name} holds NaN or infinite values")
