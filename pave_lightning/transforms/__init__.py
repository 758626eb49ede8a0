"""What is done to task vectors before they are merged: one file a transform, found without a list."""

from pave_lightning.transforms.base import (
    Transform,
    known_transforms,
    make_transform,
    transform_named,
    transformed,
    vector_transform,
)

__all__ = [
    "Transform",
    "known_transforms",
    "make_transform",
    "transform_named",
    "transformed",
    "vector_transform",
]
