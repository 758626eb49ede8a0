"""What every text format has in common: UTF-8, lines that are counted, and files that are something else."""

from __future__ import annotations

import codecs
import io
import re

from pave_lightning.tasks.rows import UnreadableError

GIT_POINTER = b"version https://git-lfs"
STARTS = {
    b"\x1f\x8b": "is compressed with gzip; unpack it",
    b"BZh91AY&SY": "is compressed with bzip2; unpack it",
    b"\xfd7zXZ\x00": "is compressed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it",
    b"PK\x03\x04": "is a zip archive or a spreadsheet; unpack it, or export the sheet as .csv",
    b"\xd0\xcf\x11\xe0": "is a spreadsheet or document; export it as .csv",
    b"PAR1": "is a parquet file; name it .parquet",
    b"ARROW1": "is an Arrow file; convert it to .parquet",
    GIT_POINTER: "is a pointer of Git LFS and not the data; run: git lfs pull",
}
WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SHOWN_CHARACTERS = 60  # of what a file holds, in a message


def check_bytes(content: bytes) -> None:
    """Refuse content that is no UTF-8 text.

    Raises:
        UnreadableError: it is something else, or text in another encoding; the message names the line.
    """
    for mark, told in STARTS.items():
        if content.startswith(mark):
            raise UnreadableError(f"the file {told}")
    if content.startswith(WIDE):
        raise UnreadableError("the file is encoded in UTF-16 or UTF-32; save it as UTF-8")
    zero = content.find(b"\0")
    if zero >= 0:
        raise UnreadableError(
            f"line {line_at(content, zero)} holds a NUL character, so the file is damaged or encoded in UTF-16; "
            "repair it or save it as UTF-8"
        )
    try:
        # By parts, so that a large file need not stand in memory as text too.
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(content), _PART):
            decoder.decode(content[start : start + _PART], final=start + _PART >= len(content))
    except UnicodeDecodeError:
        _refuse_encoding(content)


_PART = 1 << 20


def _refuse_encoding(content: bytes) -> None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"line {line_at(content, error.start)} is not UTF-8 (byte 0x{content[error.start]:02x}); save the file as "
            "UTF-8 (for instance: iconv -f latin1 -t utf-8 OLD > NEW)"
        ) from error


def line_at(content: bytes, place: int) -> int:
    """The line, counted from 1, of a place in a text; lines end with LF, CR LF or CR."""
    return len(re.findall(rb"\r\n|\r|\n", content[:place])) + 1


def opened(content: bytes) -> io.TextIOWrapper:
    """The text, without a byte order mark, as lines that keep their ends."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
