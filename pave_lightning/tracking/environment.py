"""What a result also depends on: versions of packages, and the commit of the checkout that the program runs in."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess

RECORDED_PACKAGES = ("pave-lightning", "torch", "lightning", "transformers", "peft", "datasets", "mlflow")

GIT_SECONDS = 10
# A checkout may name programs of its own for many things; none of them is run.
NO_PROGRAMS = (
    *("-c", "core.fsmonitor=", "-c", "core.hooksPath=/dev/null", "-c", "safe.bareRepository=explicit"),
    *("-c", "protocol.allow=never", "-c", "core.sshCommand=false", "-c", "credential.helper="),
)
GIT_ENVIRONMENT = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "none",
}
FILTER = re.compile(r"filter\..*\.(clean|smudge|process|required)", re.IGNORECASE)


def environment_tags() -> dict[str, str]:
    """Versions of the packages that decide a result, and the git commit of the current folder if it is a checkout."""
    tags = {"version.python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "--verify", "HEAD")
    if commit:
        tags["git.commit"] = f"{commit}-dirty" if _is_changed() else commit
    return tags


def _is_changed() -> bool:
    """Whether tracked files differ from the commit; submodules count by their commit alone."""
    settings = _git("config", "--show-scope", "--name-only", "--list")
    if not settings:  # a git that cannot say where a setting comes from
        return False
    # Filters that the checkout itself names are programs, too, through which changed files would be piped
    lines = (line.partition("\t") for line in settings.splitlines())
    filters = [name for scope, _, name in lines if scope in ("local", "worktree") and FILTER.fullmatch(name)]
    unset = {"GIT_CONFIG_COUNT": str(len(filters))}
    for number, name in enumerate(filters):
        unset |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": ""}
    changes = ("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty")
    return bool(_git(*changes, **unset if filters else {}))


def _git(*arguments: str, **environment: str) -> str:
    command = ["git", "--no-pager", "--no-optional-locks", *NO_PROGRAMS, *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_SECONDS,
            check=False,
            env={**os.environ, **GIT_ENVIRONMENT, **environment},
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
