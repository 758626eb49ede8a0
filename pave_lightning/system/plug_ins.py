"""What is registered by decorators and found by name: in the files of a folder of this package, in other packages."""

from __future__ import annotations

import logging
import pkgutil
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Generic, TypeVar

from pave_lightning.errors import PaveError, nearest, reason, visible

log = logging.getLogger("pave_lightning")

KindT = TypeVar("KindT")


class Registry(Generic[KindT]):
    """Classes by name, registered by a decorator in their own files.

    Files are imported when something is asked for: all of a folder, and what other packages name as entry points, for
    the list of all; of a single name the file that is called like it comes first, so that the others need not be
    loaded.

    Args:
        what: what is registered, in messages.
        folder: dotted name of the package whose files register something.
        group: group of the entry points of other packages; none where empty.
        several: the plural of ``what``; with an s where empty.
        command: lists what there is, for messages; none where empty.
    """

    def __init__(self, what: str, folder: str, group: str = "", *, several: str = "", command: str = "") -> None:
        self.what, self.folder, self.group, self.command = what, folder, group, command
        self.several = several or f"{what}s"
        self._kinds: dict[str, type[KindT]] = {}
        self._is_complete = False

    def add(self, name: str, kind: type[KindT]) -> None:
        """Register a class under a name; the same one may come again.

        Raises:
            ValueError: another one has the name already.
        """
        other = self._kinds.setdefault(name, kind)
        if other is not kind:
            raise ValueError(f"two {self.several} are named '{name}': {other.__name__} and {kind.__name__}")

    def known(self) -> dict[str, type[KindT]]:
        """All that are registered, by name, in the order of the names.

        What another package adds and cannot be loaded is told, once, and left out.
        """
        if not self._is_complete:
            self._is_complete = True
            try:
                import_files(self.folder)
            except BaseException:
                self._is_complete = False
                raise
            for entry in entry_points(group=self.group) if self.group else ():
                self._load(entry)
        return dict(sorted(self._kinds.items()))

    def named(self, name: str) -> type[KindT]:
        """The one of a name.

        Raises:
            PaveError: there is none; the nearest one is told.
        """
        if name not in self._kinds and not self._is_complete:
            self._import_file(name)
        if name in self._kinds:
            return self._kinds[name]
        known = self.known()
        if name not in known:
            see = f" (see: {self.command})" if self.command else ""
            raise PaveError(f"unknown {self.what} '{name}'; {nearest(name, list(known))}{see}")
        return known[name]

    def copy(self) -> Registry[KindT]:
        """Another one with what this package registers, which asks other packages anew; for tests that add to it."""
        self.known()
        copied = Registry[KindT](self.what, self.folder, self.group, several=self.several, command=self.command)
        copied._kinds = dict(self._kinds)
        return copied

    def _import_file(self, name: str) -> None:
        """Import the file of the folder that is called like a name, where there is one."""
        module = f"{self.folder}.{name}"
        if name.isidentifier() and not name.startswith("_") and find_spec(module) is not None:
            import_module(module)

    def _load(self, entry: EntryPoint) -> None:
        """Load what another package adds; where it cannot be used, say so and go on without it."""
        before = dict(self._kinds)
        package = entry.dist.name if entry.dist is not None else entry.value
        try:
            loaded = entry.load()
        except (Exception, SystemExit) as error:  # code of others, which may fail in any way
            self._kinds = before
            log.warning(
                "the %s '%s' of the package %s is left out, since it cannot be loaded (%s); update the package, or "
                "tell its authors",
                self.what,
                *(visible(text) for text in (entry.name, package, reason(error))),
            )
            return
        module = entry.value.partition(":")[0].strip()
        its_own = [found for found in self._kinds.values() if found.__module__.startswith(module)]
        if not its_own and loaded not in self._kinds.values() and self._kinds == before:
            log.warning(
                "the entry point '%s' of the package %s registers no %s and is left out",
                *(visible(text) for text in (entry.name, package)),
                self.what,
            )


def import_files(package: str) -> None:
    """Import every file of a package, by its dotted name, so that what they register is known."""
    for module in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
        import_module(module.name)
