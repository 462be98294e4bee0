"""Programs that a test needs, from Debian's packages."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

LOCK = Path(tempfile.gettempdir()) / "rmoe_tests_packages.lock"
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def missing(programs: Iterable[str], *packages: str) -> str:
    """Why there cannot be all of `programs` here, or nothing. Installs `packages` where one is missing."""
    if os.geteuid():
        return f"{' and '.join(packages)} need root here"
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side, and apt-get does not wait for itself
        if not all(shutil.which(name, path=PATH) for name in programs):
            return _install(packages)
    return ""


def _install(packages: tuple[str, ...]) -> str:
    if not shutil.which("apt-get"):
        return f"no {' and '.join(packages)} here, and no apt-get to install it"
    for words in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(["apt-get", "-q", *words], env=env, capture_output=True, text=True)
        if done.returncode:
            return f"apt-get {words[0]} failed: {done.stderr.strip()[-200:]}"
    return ""
