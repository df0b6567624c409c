"""Downloads that resume, are checked, and never leave a half-written file under the final name."""

import hashlib
import logging
import os
import time
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from ssl import SSLError
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

log = logging.getLogger(__name__)

CHUNK = 1 << 18
USER_AGENT = "lightning-apps"


class DownloadError(OSError):
    """A file that could not be fetched; the message says what to fetch by hand and where to put it."""


class ChecksumError(ValueError):
    """A file whose content is not the published one."""


@dataclass(frozen=True)
class RemoteFile:
    """A file that a publisher offers.

    Args:
        url: Where it is.
        md5: Published checksum, or None if there is none or it is not to be checked.
    """

    url: str
    md5: str | None


def fetch(remote: RemoteFile, target: Path, *, attempts: int = 5, wait: float = 1.0, timeout: float = 30.0) -> Path:
    """Return ``target``, downloading it first if it is not there.

    The bytes go to ``<target>.part``, which a later call continues; only a complete file with the right checksum gets
    the final name. A lock lets several processes ask at the same time. An existing file is checked, never overwritten.

    Args:
        remote: What to fetch.
        target: Where to put it; missing folders are made.
        attempts: How often to connect anew when the connection breaks or the server is busy.
        wait: Seconds before the second attempt, doubled for each further one.
        timeout: Seconds without a byte before the connection counts as broken.

    Returns:
        ``target``.

    Raises:
        DownloadError: If the server cannot be reached or refuses; says what to fetch where.
        ChecksumError: If the content is not the published one; names both sums.
    """
    from filelock import FileLock

    if target.exists():  # a lock file may not be wanted, or allowed, beside data that is complete
        verify(target, remote.md5)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            _download(remote, target, attempts, wait, timeout)
            return target
    verify(target, remote.md5)
    return target


def verify(path: Path, md5: str | None) -> None:
    """Compare a file with its published checksum.

    Args:
        path: The file.
        md5: The published sum; None checks nothing.

    Raises:
        ChecksumError: If they differ.
    """
    if md5 is None:
        return
    found = md5_of(path)
    if found != md5:
        raise ChecksumError(
            f"{path}: MD5 is {found}, the published file has {md5}; delete it to download it again, "
            "or set --data.verify_md5 false to use it as it is"
        )


def md5_of(path: Path) -> str:
    """Return the MD5 sum of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _download(remote: RemoteFile, target: Path, attempts: int, wait: float, timeout: float) -> None:
    part = target.with_name(target.name + ".part")
    resumed = part.exists() and part.stat().st_size > 0
    _receive(remote, target, part, attempts, wait, timeout)
    if resumed and remote.md5 is not None and md5_of(part) != remote.md5:
        # The beginning may be of an older version: once more from the start before calling the file wrong.
        part.unlink()
        _receive(remote, target, part, attempts, wait, timeout)
    if remote.md5 is not None and (found := md5_of(part)) != remote.md5:
        part.unlink()
        raise ChecksumError(
            f"{remote.url} sent a file with MD5 {found}, the published one has {remote.md5}; nothing was kept. "
            f"Fetch the right file by hand and put it at {target}, or set --data.verify_md5 false to accept this one"
        )
    os.replace(part, target)


def _receive(remote: RemoteFile, target: Path, part: Path, attempts: int, wait: float, timeout: float) -> None:
    for attempt in range(attempts):
        if attempt:
            time.sleep(wait * 2 ** (attempt - 1))
        try:
            _continue(remote.url, part, timeout)
            return
        except HTTPError as error:
            reason = f"the server answered {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (URLError, HTTPException, TimeoutError, ConnectionError, SSLError) as error:
            reason = str(getattr(error, "reason", error))
        except OSError as error:
            raise DownloadError(f"{part}: cannot be written ({error}); the bytes so far are kept") from error
        log.info("%s: %s; attempt %d of %d", remote.url, reason, attempt + 1, attempts)
    checksum = f" (MD5 {remote.md5})" if remote.md5 else ""
    raise DownloadError(
        f"cannot download {target.name}: {reason}. On a machine with a connection fetch {remote.url}{checksum} "
        f"and put it at {target}"
    )


def _continue(url: str, part: Path, timeout: float) -> None:
    """Fetch what ``part`` still lacks, or everything if the server cannot continue."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code == 416 and have:
            if _total(error.headers.get("Content-Range")) == have:
                return
            part.unlink()
            return _continue(url, part, timeout)
        raise
    with response:
        continues = response.status == 206 and _starts_at(response.headers.get("Content-Range"), have)
        if have and response.status == 206 and not continues:
            raise HTTPException("the server continued at another place than asked")
        _copy(response, part, "ab" if continues else "wb")


def _copy(response: HTTPResponse, part: Path, mode: str) -> None:
    from rich.progress import DownloadColumn, Progress, TimeRemainingColumn

    length = response.headers.get("Content-Length")
    expected = None if length is None else int(length)
    received = 0
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TimeRemainingColumn())
    with open(part, mode) as stream, Progress(*columns, transient=True) as progress:
        task = progress.add_task(f"downloading {part.stem}", total=expected)
        while chunk := response.read1(CHUNK):
            stream.write(chunk)
            received += len(chunk)
            progress.advance(task, len(chunk))
        stream.flush()
        os.fsync(stream.fileno())
    if expected is not None and received < expected:
        raise HTTPException(f"the connection broke after {received} of {expected} bytes")


def _starts_at(content_range: str | None, position: int) -> bool:
    return content_range is not None and content_range.removeprefix("bytes ").startswith(f"{position}-")


def _total(content_range: str | None) -> int | None:
    total = (content_range or "").rpartition("/")[2]
    return int(total) if total.isdigit() else None
