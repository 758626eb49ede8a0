"""Columns of chat messages: what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pave_lightning.errors import nearest
from pave_lightning.tasks.kinds.prompts import ANSWERING, ROLES
from pave_lightning.tasks.lists import list_problems, unequal
from pave_lightning.tasks.rows import Rows


def message_problems(rows: Rows, roles: str, contents: str) -> Iterator[str]:
    """Chats that have no response, or one that is empty, and roles that nobody knows.

    Args:
        rows: all rows of a split.
        roles: the column of the messages' roles.
        contents: the column of what they say.
    """
    wrong = [found for name in (roles, contents) for found in list_problems(rows, name, texts=True)]
    wrong = wrong or list(unequal(rows, roles, contents))
    yield from wrong
    if wrong:
        return
    told = rows.columns[roles].to_pylist()
    known = {role for own in told for role in own}
    for role in sorted(known - set(ROLES)):
        flags = np.asarray([role in own for own in told], dtype=np.bool_)
        yield (
            f"column '{roles}' holds the role {role!r} in {rows.places(flags)}; expected one of {', '.join(ROLES)}; "
            f"{nearest(role, ROLES)}"
        )
    checks = (
        ([len(own) < 2 for own in told], f"column '{roles}' has a single message", "a prompt and a response"),
        ([own[-1] != ANSWERING for own in told], f"column '{roles}' ends with another role", f"the {ANSWERING}'s"),
    )
    for found, what, expected in checks:
        flags = np.asarray(found, dtype=np.bool_)
        if flags.any():
            yield f"{what} in {rows.places(flags)}; expected {expected}; correct or leave out these rows"
