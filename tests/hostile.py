"""Broken files: what bit rot, half a download, another program or an attacker may make of a file."""

import json
import struct

VALUES = (None, True, -1, 0, 3, 2**31, 10**30, 1e400, -1e400, float("nan"), 0.5, "", "x", "../../etc/passwd", [], {}, [[]])
VALUES += ([None], {"": None}, "\x1b[31m", "\ud800", [1, "x"], 1e39)


def broken(content, random):
    """Bytes that were made from a file's by one to three faults; structured where they are JSON or safetensors."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = random.choice((_bytes, _structure, _structure, _structure))(content, random)
    return content


def _bytes(content, random):
    kind = random.randrange(5)
    if kind == 0 or not content:
        return random.choice((b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b"{" + b'"a":{' * 50_000))
    place = random.randrange(len(content))
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + random.randbytes(random.randrange(1, 9)) + content[place + 4 :]
    if kind == 3:
        return content + content[:place]
    flipped = bytearray(content)
    flipped[place] ^= 1 << random.randrange(8)
    return bytes(flipped)


def _structure(content, random):
    try:
        return _text(mutated(json.loads(content), random))
    except (ValueError, RecursionError):
        pass
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
    except (ValueError, struct.error, RecursionError, OverflowError):
        return _bytes(content, random)
    inner = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(inner, dict) and inner and random.random() < 0.6:  # JSON inside of JSON
        key = random.choice(sorted(inner))
        try:
            inner[key] = _text(mutated(json.loads(inner[key]), random)).decode()
        except (ValueError, TypeError, RecursionError):
            inner[key] = random.choice(("", "x", "nan", "1e999", "{}", "[]"))
    else:
        header = mutated(header, random)
    text = _text(header)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _text(value):
    return json.dumps(value).encode()


def mutated(value, random):
    """JSON values with one place changed: another value, a key less, a key more, a copy elsewhere."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.08:
        return random.choice(VALUES)
    keys = sorted(value) if isinstance(value, dict) else range(len(value))
    key = random.choice(keys)
    kind = random.randrange(8)
    if kind == 0:
        del value[key]
    elif kind == 1:
        value[key] = random.choice(VALUES)
    elif kind == 2 and isinstance(value, dict):
        value[random.choice(("x", "", key + "x"))] = value[key]
    elif kind == 3:
        value[key] = value[random.choice(keys)]
    else:
        value[key] = mutated(value[key], random)
    return value
