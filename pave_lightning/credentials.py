"""Passwords and tokens in URIs: found, left out of all that is written or shown."""

from __future__ import annotations

import re
import urllib.parse

__all__ = ["MASK", "has_secrets", "mask_values", "masked", "secrets_of", "split_uri", "without_secrets"]

MASK = "***"
# Names of query parameters whose values are secret.
_SECRET_NAME = (
    r"(?:[\w.\-]*(?:password|passwd|pwd|passphrase|token|secret|signature|credential|api[_\-]?key|access[_\-]?key)[\w.\-]*"
    r"|x-amz-[\w\-]+|sig|pass|auth|authorization|key|odbc_connect)"
)
_SECRET_PARAMETER = re.compile(rf"(?<=[?&;#])({_SECRET_NAME}=)([^&;#\s]*)", re.IGNORECASE)
_URI_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s\"<>`]+")


def without_secrets(text: str, *uris: str) -> str:
    """A text in which every URI has its secrets replaced by ``***``.

    Args:
        text: Any text, such as a library's message.
        uris: URIs that are in use: they, and the secrets that they hold, are replaced wherever the text quotes them.
    """
    for uri in uris:
        text = text.replace(uri, masked(uri)) if uri else text
    secrets = {form for uri in uris for secret in secrets_of(uri) for form in (secret, urllib.parse.unquote(secret))}
    text = _URI_IN_TEXT.sub(lambda found: masked(found[0]), text)
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) > 2:  # shorter ones would be found in many a word
            text = text.replace(secret, MASK)
    return text


def masked(uri: str) -> str:
    """One URI with its secrets replaced: the password before the host, and parameters such as ``token``."""
    head, rest, userinfo = split_uri(uri)
    if userinfo:
        user, colon, password = userinfo.partition(":")
        if colon:
            hidden = f"{user}:{MASK}" if password else userinfo
        else:  # what stands alone before the host of a website is a token
            hidden = MASK if head.lower() in ("http://", "https://") else user
        rest = f"{hidden}@{rest}"
    return _SECRET_PARAMETER.sub(rf"\1{MASK}", head + rest)


def secrets_of(uri: str) -> list[str]:
    """The secrets in a URI, as they are written there."""
    head, rest, userinfo = split_uri(uri)
    _, colon, password = userinfo.partition(":")
    alone = userinfo if not colon and head.lower() in ("http://", "https://") else ""
    found = [password or alone, *(match[2] for match in _SECRET_PARAMETER.finditer(rest))]
    return [secret for secret in found if secret and secret != MASK]


def has_secrets(text: str) -> bool:
    """Whether a text holds a URI with a secret in it."""
    return any(secrets_of(found[0]) for found in _URI_IN_TEXT.finditer(text))


def mask_values(value: object) -> object:
    """Plain values (mappings, lists, texts) with the secrets of all URIs replaced, those in names as well."""
    if isinstance(value, dict):
        return {mask_values(key): mask_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [mask_values(item) for item in value]
    if isinstance(value, str):
        alone = value.count("://") == 1 and _URI_IN_TEXT.match(value)
        return masked(value) if alone else without_secrets(value)  # alone, it may hold spaces
    return value


def split_uri(uri: str) -> tuple[str, str, str]:
    """A URI in three parts: scheme with slashes, what follows the user information, and that (or nothing).

    A password may hold characters that it should not: an @ always, and / ? # where what stands before them cannot be a
    host with its port.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return "", uri, ""
    end = min((rest.find(mark) for mark in "/?#" if mark in rest), default=len(rest))
    host = rest[:end]
    name, colon, port = host.rpartition(":")
    is_port = port.isdecimal() and int(port) < 65536
    if "@" in host:
        query = rest.find("?")
        at = rest.rfind("@", 0, query if query >= 0 else len(rest))
        further = rest.rfind("@")
        at = further if "=" not in rest[at:further] else at
    elif name and colon and not is_port and not host.endswith("]"):
        at = rest.rfind("@")
    else:
        at = -1
    return f"{scheme}://", rest[at + 1 :], rest[: max(at, 0)]
