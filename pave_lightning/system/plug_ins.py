"""Finding what is registered by decorators: in the files of a folder of this package, and in other packages."""

from __future__ import annotations

import logging
import pkgutil
from importlib import import_module
from importlib.metadata import EntryPoint

from pave_lightning.errors import reason, visible

log = logging.getLogger("pave_lightning")


def import_files(package: str) -> None:
    """Import every file of a package, by its dotted name, so that what they register is known."""
    for module in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
        import_module(module.name)


def load_plug_in(entry: EntryPoint, registry: dict[str, type], what: str) -> None:
    """Load what another package adds; where it cannot be used, say so and go on without it.

    Args:
        entry: the entry point.
        registry: what is registered, by name; what a broken plug-in added is taken out again.
        what: what is registered there, in messages.
    """
    before = dict(registry)
    package = entry.dist.name if entry.dist is not None else entry.value
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as error:  # code of others, which may fail in any way
        for name in set(registry) - set(before):
            del registry[name]
        log.warning(
            "the %s '%s' of the package %s is left out, since it cannot be loaded (%s); update the package, or tell "
            "its authors",
            what,
            *(visible(text) for text in (entry.name, package, reason(error))),
        )
        return
    module = entry.value.partition(":")[0].strip()
    its_own = [found for found in registry.values() if found.__module__.startswith(module)]
    if not its_own and loaded not in registry.values() and registry == before:
        log.warning(
            "the entry point '%s' of the package %s registers no %s and is left out",
            *(visible(text) for text in (entry.name, package)),
            what,
        )
