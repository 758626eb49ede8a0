from .pave_callback import PaveCallback as PaveCallback
