"""Context-oriented decomposition of a weight, as an orthogonal projection."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Metric = Literal["covariance", "root", "identity"]
MomentKind = Literal["input", "cross"]


@dataclass(frozen=True)
class KnowledgeSpectrum:
    """How strongly a layer's own data excite each direction of its output, strongest first.

    The directions are kept as the product ``basis @ rotation``, so that only those that are removed need be formed.

    Attributes:
        values: singular values, shape ``(d,)``, float64, descending. All zeros when the layer has seen nothing.
        rotation: orthonormal columns, shape ``(d, d)``, float64.
        basis: orthonormal columns that span the weight's column space, shape ``(d_out, d)``, float64, or None when
            ``d_out <= d_in`` (the identity).
    """

    values: Tensor
    rotation: Tensor
    basis: Tensor | None = None

    @property
    def directions(self) -> Tensor:
        """All left singular directions as columns, shape ``(d_out, d)``, float64, strongest first."""
        return self.tail(0)

    def tail(self, rank: int) -> Tensor:
        """The directions behind the first ``rank`` ones as columns, shape ``(d_out, d - rank)``, float64."""
        columns = self.rotation[:, rank:]
        return columns if self.basis is None else self.basis @ columns


def knowledge_spectrum(
    weight: Tensor,
    moment: Tensor | None,
    kind: MomentKind = "input",
    *,
    metric: Metric = "covariance",
    damping: float = 0.0,
) -> KnowledgeSpectrum:
    r"""Singular values and left singular directions of a weight seen through its own data.

    With ``C~ = C + damping * I`` these are the ones of ``W C~`` (``metric="covariance"``, the context-oriented SVD of
    the paper), of ``W C~^(1/2)`` (``"root"``: the metric in which truncation minimises the layer's output error), or of
    ``W`` alone (``"identity"``, a plain SVD). The moment is either ``C`` itself or the cross moment ``A = W C``, the
    mean of ``y x^T`` over the data; both give the same result.

    Spectra are solved on the CPU in float64 through the smaller Gram matrix. For ``d_out > d_in`` everything happens
    inside the column space of ``W`` (a thin QR), so that the result is well defined even for a singular ``C`` and no
    damping. Singular values below about 1e-8 of the largest are rounding noise with ``"covariance"`` and
    ``"identity"``, whose Gram matrix squares them.

    Source: CO-SVD in An, Yang, Torr, Ghanem, "Purifying Task Vectors in Knowledge-Aware Subspace for Model Merging",
    arXiv 2510.14697.

    Args:
        weight: ``W``, shape ``(d_out, d_in)``, any float dtype.
        moment: ``C``, shape ``(d_in, d_in)``, or ``A``, shape ``(d_out, d_in)``, any float dtype. May be None with
            ``metric="identity"``, which does not look at it.
        kind: ``"input"`` when ``moment`` is ``C``, ``"cross"`` when it is ``A``.
        metric: what the singular values are taken of.
        damping: the multiple of the identity that is added to ``C``, at least 0.

    Returns:
        The spectrum, on the CPU, with ``d = min(d_out, d_in)`` components.

    Raises:
        ValueError: a shape, a dtype, ``kind``, ``metric`` or ``damping`` is not as described; ``weight`` or ``moment``
            holds NaN or infinite values.
    """
    _check_request(weight, moment, kind, metric, damping)
    # With W = Q R and d_out > d_in, Q^T W = R and Q^T A carry all there is to know in d_in dimensions.
    full = weight.detach().to("cpu", torch.float64)
    basis, core = torch.linalg.qr(full) if full.shape[0] > full.shape[1] else (None, full)
    image = None if moment is None or metric == "identity" else _image(core, basis, moment, kind)
    gram = _gram(core, image, metric, damping)
    eigenvalues, eigenvectors = torch.linalg.eigh((gram + gram.T) / 2)
    values = eigenvalues.flip(0).clamp_min(0).sqrt()
    return KnowledgeSpectrum(values, eigenvectors.flip(1), basis)


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
    """
    length = len(spectrum.values)
    rows = length if spectrum.basis is None else len(spectrum.basis)
    if weight.ndim != 2 or weight.shape[0] != rows or min(weight.shape) != length:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} does not fit a spectrum of {length} directions in {rows} dimensions"
        )
    if not 0 <= rank <= length:
        raise ValueError(f"rank must lie between 0 and {length}, found {rank}")
    if rank == length:
        return weight.detach().clone()
    tail = spectrum.tail(rank)
    full = weight.detach().to("cpu", torch.float64)
    return (full - tail @ (tail.T @ full)).to(weight.device, weight.dtype)


def _gram(core: Tensor, image: Tensor | None, metric: Metric, damping: float) -> Tensor:
    """The matrix whose eigenvalues are the squared singular values, shape ``(d, d)``."""
    if image is None:
        return core @ core.T
    damped = image + damping * core
    # W C~ W^T is the Gram matrix of W C~^(1/2): nothing is squared, and no root is taken.
    return damped @ core.T if metric == "root" else damped @ damped.T


def _image(core: Tensor, basis: Tensor | None, moment: Tensor, kind: MomentKind) -> Tensor:
    """``W C`` in the coordinates of ``core``, shape ``(d, d_in)``."""
    known = moment.detach().to("cpu", torch.float64)
    if kind == "input":
        return core @ known
    return known if basis is None else basis.T @ known


def _check_request(weight: Tensor, moment: Tensor | None, kind: str, metric: str, damping: float) -> None:
    if metric not in get_args(Metric):
        raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, found '{metric}'")
    if kind not in get_args(MomentKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(MomentKind))}, found '{kind}'")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be a finite number of at least 0, found {damping}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be a matrix (d_out, d_in), found shape {tuple(weight.shape)}")
    _check_values("weight", weight)
    if metric == "identity":
        return
    if moment is None:
        raise ValueError(f"metric '{metric}' needs a moment, found None")
    expected = (weight.shape[1] if kind == "input" else weight.shape[0], weight.shape[1])
    if tuple(moment.shape) != expected:
        raise ValueError(
            f"moment of kind '{kind}' must have shape {expected} for a weight of shape {tuple(weight.shape)}, "
            f"found {tuple(moment.shape)}"
        )
    _check_values("moment", moment)


def _check_values(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be of a floating-point dtype, found {tensor.dtype}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinite values")
