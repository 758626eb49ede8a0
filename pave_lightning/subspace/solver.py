"""Eigenvalues of a symmetric matrix now, eigenvectors of the smallest ones when they are asked for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

DENSE_SIZE = 32
_GROUP = 8
_TAIL_SHARE = 0.3


class SymmetricEigen(Protocol):
    """Eigenpairs of a symmetric matrix of order ``d``.

    Attributes:
        values: all eigenvalues, shape ``(d,)``, float64, ascending, on the CPU.
    """

    values: Tensor

    def smallest(self, count: int) -> Tensor:
        """Orthonormal eigenvectors of the ``count`` smallest eigenvalues, shape ``(d, count)``, float64, ascending."""
        ...


class DenseEigen:
    """All eigenpairs at once, on the matrix's own device.

    Args:
        matrix: symmetric, shape ``(d, d)``, float64.
    """

    def __init__(self, matrix: Tensor) -> None:
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        self.values, self._vectors = values.cpu(), vectors

    def smallest(self, count: int) -> Tensor:
        """Orthonormal eigenvectors of the ``count`` smallest eigenvalues, shape ``(d, count)``, float64, ascending."""
        columns: Tensor = self._vectors[:, :count]
        return columns


class SingularPairs:
    """Singular values and left singular vectors of a matrix, by a full SVD.

    Args:
        matrix: shape ``(d, m)`` with ``d <= m``, float64.

    Attributes:
        values: all singular values, shape ``(d,)``, float64, ascending, on the CPU.
    """

    def __init__(self, matrix: Tensor) -> None:
        vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        self.values, self._vectors = values.flip(0).cpu(), vectors.flip(1)

    def smallest(self, count: int) -> Tensor:
        """Left singular vectors of the ``count`` smallest values, shape ``(d, count)``, float64, ascending."""
        columns: Tensor = self._vectors[:, :count]
        return columns


class TridiagonalEigen:
    """Eigenvalues through one reduction to tridiagonal form; eigenvectors only of the part that is asked for.

    The reduction (LAPACK ``sytrd``) is backward stable whatever the spectrum. A small tail of eigenvectors of the
    tridiagonal matrix comes from inverse iteration in groups and is orthonormalised as a whole, so that what counts is
    the space it spans. Where that is not trustworthy (the matrix splits, iteration does not converge, or vectors of
    clustered eigenvalues come out nearly dependent) or a large part is wanted, all of them are solved by divide and
    conquer. What was solved is kept for the next call.

    Args:
        matrix: symmetric, shape ``(d, d)``, float64, row by row in memory. Its upper triangle is read and overwritten.

    Raises:
        ValueError: the matrix holds NaN or infinite values.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._reflectors: Array = matrix.numpy()
        size = len(self._reflectors)
        self._diagonal, self._beside, self._scales = np.empty(size), np.empty(size - 1), np.empty(size - 1)
        work = np.empty(64 * size)
        # Column by column, as LAPACK reads it, the upper triangle is the lower one.
        lapack("dsytrd")(
            b"L", size, self._reflectors, size, self._diagonal, self._beside, self._scales, work, len(work)
        )
        if not (np.isfinite(self._diagonal).all() and np.isfinite(self._beside).all()):
            raise ValueError("products of weight and moment overflow float64")
        values: Array = self._diagonal.copy()
        rest = self._beside.copy()
        if lapack("dsterf")(size, values, rest):
            values[:] = np.linalg.eigvalsh(np.diag(self._diagonal) + np.diag(self._beside, -1))
        self.values = torch.from_numpy(values)
        self._solved: Array = np.empty((0, size))

    def smallest(self, count: int) -> Tensor:
        """Orthonormal eigenvectors of the ``count`` smallest eigenvalues, shape ``(d, count)``, float64, ascending."""
        solved = self._solved
        if len(solved) < count:
            vectors = self._by_inverse_iteration(count) if count <= _TAIL_SHARE * len(self.values) else None
            solved = self._solved = self._rotated(vectors if vectors is not None else self._by_divide_and_conquer())
        return torch.from_numpy(solved[:count]).T

    def _by_inverse_iteration(self, count: int) -> Array | None:
        """Rows that span the eigenvectors of the tridiagonal matrix; None where they cannot be trusted."""
        size = len(self._diagonal)
        scale = np.sqrt(np.abs(self._diagonal[1:] * self._diagonal[:-1]))
        if (np.abs(self._beside) <= np.finfo(np.float64).eps * scale).any():
            return None
        values: Array = self.values.numpy()
        rows = np.empty((count, size))
        one_block, end = np.ones(count, np.intc), np.full(1, size, np.intc)
        work, integers, failed = np.empty(5 * size), np.empty(size, np.intc), np.empty(_GROUP, np.intc)
        # LAPACK orthogonalises within a call one vector after the other: short calls leave that to one fast QR below.
        for start in range(0, count, _GROUP):
            some = min(_GROUP, count - start)
            if lapack("dstein")(
                size, self._diagonal, self._beside, some, values[start:], one_block, end, rows[start:], size, work,
                integers, failed,
            ):  # fmt: skip
                return None
        basis, triangle = torch.linalg.qr(torch.from_numpy(rows).T)
        if not float(triangle.diagonal().abs().min()) > 0.1:
            return None
        return np.ascontiguousarray(basis.T.numpy())

    def _by_divide_and_conquer(self) -> Array:
        size = len(self._diagonal)
        rows = np.empty((size, size))
        work, integers = np.empty(1 + 4 * size + size * size), np.empty(3 + 5 * size, np.intc)
        diagonal, beside = self._diagonal.copy(), self._beside.copy()
        failed = lapack("dstevd")(b"V", size, diagonal, beside, rows, size, work, len(work), integers, len(integers))
        if not failed:
            return rows
        full = np.diag(self._diagonal) + np.diag(self._beside, -1)
        rows[:] = np.linalg.eigh(full)[1].T
        return rows

    def _rotated(self, rows: Array) -> Array:
        """From tridiagonal coordinates back to those of the matrix, in place."""
        size, count = len(self._diagonal), len(rows)
        work = np.empty(64 * max(size, count))
        lapack("dormtr")(
            b"L", b"L", b"N", size, count, self._reflectors, size, self._scales, rows, size, work, len(work)
        )
        return rows


def symmetric_eigen(matrix: Tensor) -> SymmetricEigen:
    """Eigenpairs of a symmetric matrix, by the way that suits its size and device.

    Args:
        matrix: shape ``(d, d)``, float64. May be overwritten.

    Returns:
        Its eigenvalues, with eigenvectors on demand.

    Raises:
        ValueError: the matrix holds NaN or infinite values.
    """
    if matrix.device.type != "cpu" or len(matrix) <= DENSE_SIZE or not has_lapack():
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("products of weight and moment overflow float64")
        return DenseEigen(matrix)
    return TridiagonalEigen(matrix.contiguous())


@cache
def has_lapack() -> bool:
    """Whether SciPy's LAPACK takes 32-bit integers, as the calls here pass them."""
    return all(
        _signature(name) is not None for name in ("dsytrd", "dsterf", "dstein", "dstevd", "dormtr", "dpotrf", "dtrcon")
    )


@cache
def lapack(name: str) -> Callable[..., int]:
    """A LAPACK routine of SciPy's, called without holding the interpreter's lock.

    SciPy's own wrappers of these routines hold the lock, so that threads would wait for each other.

    Args:
        name: of the routine, such as ``dsytrd``.

    Returns:
        A function of the routine's arguments but the last, ``info``, which it returns. Arrays are passed as they are
        in memory, so they must be contiguous and of the type that the routine expects.
    """
    signature = _signature(name)
    if signature is None:
        raise RuntimeError(f"SciPy's LAPACK routine {name} does not take 32-bit integers")
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = get_pointer(_capsules()[name], signature)
    routine = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (signature.count(b",") + 1))(address)

    def call(*arguments: Any) -> int:
        info = ctypes.c_int(0)
        # The list keeps what is pointed to alive during the call.
        held = [ctypes.c_int(a) if isinstance(a, int) else a for a in arguments]
        routine(*(_pointer(argument) for argument in held), ctypes.addressof(info))
        return info.value

    return call


def _pointer(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return argument.ctypes.data
    return argument if isinstance(argument, bytes) else ctypes.addressof(argument)


def _capsules() -> dict[str, Any]:
    """SciPy's LAPACK routines by name; imported here, since it takes long and a plan seldom solves anything."""
    from scipy.linalg import cython_lapack

    return getattr(cython_lapack, "__pyx_capi__", {})


def _signature(name: str) -> bytes | None:
    """The C signature of a routine; None where its integers are not plain ints."""
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    capsule = _capsules().get(name)
    signature: bytes | None = None if capsule is None else get_name(capsule)
    return signature if signature is not None and b"int *" in signature and b"int64" not in signature else None
