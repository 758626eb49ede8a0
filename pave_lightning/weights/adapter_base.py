"""Whether an adapter was trained on the base that it is put on, by what peft has noted."""

from __future__ import annotations

import re
from pathlib import Path

from pave_lightning.errors import PaveError
from pave_lightning.system.files import SCHEME, file_sha256, local_path, read_json
from pave_lightning.weights.adapters import adapter_settings
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.checkpoint import Checkpoint, weight_files

# Where the hub's cache keeps a model: models--ORGANISATION--NAME/snapshots/COMMIT.
_SNAPSHOT = re.compile(r"(?:^|.*/)models--(?P<id>[^/]+)/snapshots/(?P<commit>[^/]+)/?")


def other_base(folder: Path, reference: str, base: Path) -> str | None:
    """Why an adapter is taken to be of another base; None where it is of this one, or does not say of which.

    The base that peft has noted counts as this one where it is the same folder or hub id, where both are on this
    machine and hold the same weights, or, where it cannot be looked at, where both have the same name.

    Args:
        folder: folder of the adapter.
        reference: how the base is named.
        base: folder of the base.
    """
    settings = adapter_settings(folder)
    noted, revision = str(settings.get("base_model_name_or_path") or ""), settings.get("revision")
    revision = None if revision in (None, "", "main") else str(revision)
    if not noted:
        return None
    said = f"the adapter {folder} was trained on '{noted}'" + (f" at revision '{revision}'" if revision else "")
    where = _local(noted, revision)
    if where is not None:
        if _same_weights(where, base):
            return None
        return f"{said}, whose weights are not those of the base '{reference}'"
    if noted.startswith(SCHEME) and noted == reference:
        return None
    names = {reference, str(base), _named_in(base)} - {""}
    if any(_same_name(noted, name) for name in names) and _same_revision(noted, revision, base):
        return None
    return f"{said}, which is not on this machine, and the base is '{reference}'"


def _local(noted: str, revision: str | None) -> Path | None:
    """The folder of a noted base, if it is on this machine; the hub is not asked."""
    try:
        folder = local_path(noted)
        if folder.is_dir():
            return folder
    except PaveError:  # of a package that is not installed
        return None
    if noted.count("/") > 1 or noted.startswith((".", "/", "~", SCHEME)):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = Path(snapshot_download(noted, revision=revision, local_files_only=True))
    except (HFValidationError, OSError, ValueError):
        return None
    return found if (found / "config.json").is_file() else None


def _same_weights(noted: Path, base: Path) -> bool:
    """Whether two folders hold the same backbone; reads no further than the first weight that differs."""
    if noted.resolve() == base.resolve():
        return True
    try:
        files = [sorted(file_sha256(file) for file in weight_files(folder)) for folder in (noted, base)]
        if files[0] == files[1]:
            return True
        first, second = (Checkpoint(folder, Architecture.of_folder(folder).prefix) for folder in (noted, base))
    except PaveError:
        return False
    told = [{name: (found.shape, found.dtype) for name, found in one.backbone.items()} for one in (first, second)]
    return told[0] == told[1] and first.has_backbone_of(second)


def _named_in(base: Path) -> str:
    """The name that a base's own configuration gives it."""
    try:
        name = read_json(base / "config.json").get("_name_or_path")
    except PaveError:
        return ""
    return name if isinstance(name, str) else ""


def _same_name(noted: str, other: str) -> bool:
    """Whether two references may mean one model: the same last part, and no two organisations."""
    first, second = (_parts(name) for name in (noted, other))
    if first[1] != second[1]:
        return False
    return not first[0] or not second[0] or first[0] == second[0]


def _parts(reference: str) -> tuple[str, str]:
    """Organisation, where it is a hub id with one, and name; in small letters."""
    snapshot = _SNAPSHOT.fullmatch(reference)
    plain = snapshot["id"].replace("--", "/") if snapshot else reference.rstrip("/").replace("\\", "/")
    before, _, name = plain.lower().rpartition("/")
    is_id = plain.count("/") <= 1 and not plain.startswith((".", "/", "~", SCHEME))
    return (before if is_id else "", name)


def _same_revision(noted: str, revision: str | None, base: Path) -> bool:
    snapshot, own = _SNAPSHOT.fullmatch(noted), _SNAPSHOT.fullmatch(str(base))
    commit = snapshot["commit"] if snapshot else revision
    return commit is None or (own is not None and own["commit"].startswith(commit))
