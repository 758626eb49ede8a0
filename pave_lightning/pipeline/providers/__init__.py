"""Where merge methods get from what they need besides the weights: one file a need, found without a list."""

from pave_lightning.pipeline.providers.base import (
    MergeRequest,
    Provider,
    evidence,
    known_providers,
    providers_of,
    provides,
)

__all__ = ["MergeRequest", "Provider", "evidence", "known_providers", "providers_of", "provides"]
