"""One evaluator for every model: base, experts, merged models of every form."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
