"""Where merge methods and transforms get from what they need besides the weights: one file a need."""

from pave_lightning.pipeline.providers.base import (
    Asking,
    MergeRequest,
    Provider,
    evidence,
    known_providers,
    providers_of,
    provides,
)

__all__ = ["Asking", "MergeRequest", "Provider", "evidence", "known_providers", "providers_of", "provides"]
