"""URIs of tracking stores: what is accepted, and how a path is written so that all read the same one."""

from __future__ import annotations

import os
import re
import urllib.parse
from functools import cache
from pathlib import Path

from pave_lightning.credentials import MASK, masked, split_uri
from pave_lightning.errors import PaveError

# Where the full tracking URI is looked for when a recipe holds a mask in place of the secret.
URI_VARIABLE = "PAVE_TRACKING_URI"
MLFLOW_URI_VARIABLE = "MLFLOW_TRACKING_URI"
PASSWORD_VARIABLE = "MLFLOW_TRACKING_PASSWORD"  # which MLflow reads for itself


def resolve_uri(uri: str) -> str:
    """Make an sqlite URI absolute, fill in secrets from the environment and refuse what MLflow cannot open.

    Args:
        uri: MLflow tracking URI. As in every URI, %25 stands for a percent sign and %3F for a question mark.

    Returns:
        The URI; the parent folder of its database is not made yet.

    Raises:
        PaveError: If it is a folder, an sqlite URI without a file, or the environment lacks a secret that is masked.
    """
    uri = uri.strip()
    scheme = urllib.parse.urlsplit(uri).scheme
    if len(scheme) < 2 or scheme == "file":  # one letter is a Windows drive
        folder = urllib.parse.unquote(urllib.parse.urlsplit(uri).path) if scheme == "file" else uri
        folder = folder.rstrip("/") or "mlruns"
        raise PaveError(
            f"tracking.uri is the folder '{uri}', but MLflow no longer opens folders as tracking stores. "
            f"Write sqlite:///{_quoted(folder)}/mlflow.db instead (`mlflow migrate-filestore` moves old records)."
        )
    if scheme.split("+")[0] != "sqlite":
        return with_secrets(uri)
    _, _, rest = uri.partition(":///")
    written, question_mark, query = rest.partition("?")
    path = _decoded(written)
    if not path or path == ":memory:":
        raise PaveError(
            f"tracking.uri '{masked(uri)}' names no database file. Write sqlite:///FOLDER/mlflow.db (relative), "
            "or sqlite:////FOLDER/mlflow.db (absolute)."
        )
    if path.startswith("file:"):
        raise PaveError(
            f"tracking.uri '{masked(uri)}' is one of SQLite's own URIs. Write the path: sqlite:///FOLDER/mlflow.db"
        )
    there = Path(path).expanduser()
    if written != path and Path(written).parent.is_dir() and not there.parent.is_dir():
        raise PaveError(
            f"tracking.uri '{masked(uri)}' means the file {path}, because a URI writes a percent sign as %25. "
            f"For the file {written} write {sqlite_uri(Path(written))}"
        )
    there = there.absolute()
    if ".." in there.parts:  # which the system and SQLAlchemy read differently after a link
        there = there.parent.resolve() / there.name
    return f"{sqlite_uri(there)}{question_mark}{query}"


def sqlite_uri(path: Path) -> str:
    """The URI of an sqlite database from which SQLAlchemy and MLflow read this very path.

    Raises:
        PaveError: The installed SQLAlchemy has no way to write the path.
    """
    text = str(path)
    quoted = _quoted(text)
    if quoted == text:
        return f"sqlite:///{text}"
    if not _sqlalchemy_decodes():
        if "?" in text:
            raise PaveError(f"MLflow cannot open {path}: its folder holds a question mark; update SQLAlchemy to 2.1")
        quoted = text
    # With the driver named, since MLflow makes the folder of any other sqlite URI without decoding it
    return f"sqlite+pysqlite:///{quoted}"


def sqlite_path(uri: str) -> Path | None:
    """The file of an sqlite URI; None for any other URI."""
    return Path(_decoded(uri.partition(":///")[2].partition("?")[0])) if uri.startswith("sqlite") else None


def is_database(uri: str) -> bool:
    """Whether MLflow opens the URI as a database."""
    return re.split(r"[:+]", uri, maxsplit=1)[0] in ("sqlite", "postgresql", "mysql", "mssql")


def sibling(uri: str, otherwise: str) -> str:
    """An sqlite database beside another one."""
    path = sqlite_path(uri)
    return sqlite_uri(path.with_name(f"{path.stem}-fallback.db")) if path else otherwise


def with_secrets(uri: str) -> str:
    """A tracking URI with the secrets that its masks stand for, from the environment.

    Args:
        uri: A URI; one without ``***`` is given back as it is.

    Raises:
        PaveError: The environment does not hold them; the message says where they are looked for.
    """
    if MASK not in uri:
        return uri
    variables = (URI_VARIABLE, MLFLOW_URI_VARIABLE)
    for variable in variables:
        full = os.environ.get(variable, "").strip()
        if full and masked(full) == masked(uri):
            return full
    head, rest, userinfo = split_uri(uri)
    user, _, password = userinfo.partition(":")
    known = os.environ.get(PASSWORD_VARIABLE)
    if known and head.lower() in ("http://", "https://") and password == MASK and MASK not in rest:
        return f"{head}{user}:{urllib.parse.quote(known, safe='')}@{rest}"
    set_to = [f"{name} is {masked(os.environ[name])}" for name in variables if os.environ.get(name)]
    other = f" ({' and '.join(set_to)}, which is another URI)" if set_to else ""
    raise PaveError(
        f"tracking.uri is '{masked(uri)}': *** stands for a password or token, which is never written to a file. "
        f"Set the environment variable {URI_VARIABLE} to the full URI and run the same command again{other}"
    )


def _quoted(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3F")


def _decoded(path: str) -> str:
    return urllib.parse.unquote(path) if "%" in path and _sqlalchemy_decodes() else path


@cache
def _sqlalchemy_decodes() -> bool:
    """Whether SQLAlchemy decodes the path of a database, as it does from 2.1 on."""
    from sqlalchemy.engine import make_url

    return make_url("sqlite:///%25").database == "%"
