"""Turn separately fine-tuned models into one model that does all their tasks.

The names stand in ``__init__.pyi``. They are loaded when they are first used, so that importing the package is fast.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
