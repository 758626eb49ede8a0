"""How a model is named: a folder, a GGUF file, a part of an installed package, or a repository of the hub."""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias
from urllib.parse import quote, unquote

from pydantic import AfterValidator, Field

from pave_lightning.config import Section
from pave_lightning.errors import PaveError

HUB_SCHEME = "hf://"
GGUF_ENDING = ".gguf"
LONGEST_HUB_ID = 96
# One or two parts of letters, digits, '-', '_' and '.', as the hub takes them.
_HUB_ID = r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?"


def _repository(name: str) -> str:
    if not re.fullmatch(_HUB_ID, name) or len(name) > LONGEST_HUB_ID:
        raise ValueError("must be the name of a repository, OWNER/NAME")
    return name


def _inside(path: str) -> str:
    """A path that stays inside of a repository."""
    parts = path.split("/")
    if not path.isprintable() or "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError("must be a path inside of the repository, such as checkpoints/last")
    return path


def _gguf(name: str) -> str:
    if not name.lower().endswith(GGUF_ENDING):
        raise ValueError(f"must be the name of a {GGUF_ENDING} file; other files are found by themselves")
    return name


class HubModel(Section):
    """A model on the Hugging Face hub: a repository, or a folder, a GGUF file or a revision of one."""

    hub: Annotated[str, AfterValidator(_repository)]
    """Name of the repository, such as FacebookAI/roberta-base."""
    folder: Annotated[str, AfterValidator(_inside)] | None = None
    """Folder of the model inside of the repository. Default: its root."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit, tag or branch. Default: the branch main."""
    file: Annotated[str, AfterValidator(_inside), AfterValidator(_gguf)] | None = None
    """Name of a GGUF file in that folder, where the model is kept in one."""

    def __str__(self) -> str:
        """The same as one text, ``hf://OWNER/NAME@REVISION/FOLDER``, as huggingface_hub writes paths.

        Example:
            >>> str(HubModel(hub="owner/name", folder="last", revision="refs/pr/1"))
            'hf://owner/name@refs%2Fpr%2F1/last'
            >>> str(HubModel(hub="owner/name"))
            'owner/name'
        """
        if self == HubModel(hub=self.hub):
            return self.hub
        revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return "/".join([f"{HUB_SCHEME}{self.hub}{revision}", *filter(None, (self.folder, self.file))])

    @property
    def flags(self) -> str:
        """The same as arguments of a command line."""
        given = [("--revision", self.revision), ("--folder", self.folder)]
        return " ".join([self.hub, *(f"{flag} {value}" for flag, value in given if value is not None)])


ModelReference: TypeAlias = str | HubModel


def hub_model(text: str) -> HubModel:
    """The model that a text ``hf://OWNER/NAME@REVISION/FOLDER`` names; a last part that ends in .gguf is a file.

    Raises:
        PaveError: the text is none of that form.

    Example:
        >>> hub_model("hf://owner/name@v1/last/small.Q4_0.gguf").model_dump()
        {'hub': 'owner/name', 'folder': 'last', 'revision': 'v1', 'file': 'small.Q4_0.gguf'}
    """
    found = re.fullmatch(rf"{HUB_SCHEME}(?P<hub>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<inside>.+?))?/?", text)
    if found is None:
        raise PaveError(f"'{text}' names no model of the hub; expected {HUB_SCHEME}OWNER/NAME@REVISION/FOLDER")
    folder, file = found["inside"], None
    if folder is not None and folder.lower().endswith(GGUF_ENDING):
        before, _, file = folder.rpartition("/")
        folder = before or None
    revision = None if found["revision"] is None else unquote(found["revision"])
    try:
        return HubModel(hub=found["hub"], folder=folder, revision=revision, file=file)
    except ValueError as error:
        raise PaveError(
            f"'{text}' names no model of the hub; expected {HUB_SCHEME}OWNER/NAME@REVISION/FOLDER"
        ) from error
