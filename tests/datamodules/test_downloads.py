import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from datamodules.downloads import ChecksumError, DownloadError, RemoteFile, fetch, md5_of, verify

CONTENT = np.random.RandomState(0).bytes(700_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server:
    """An HTTP server on this machine whose bad habits are set by the test."""

    def __init__(self) -> None:
        self.content, self.cut_after, self.resumes, self.statuses = CONTENT, [], True, []
        self.requests: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/data.npz"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.requests.append(asked)
        status = self.statuses.pop(0) if self.statuses else None
        if status is not None:
            request.send_error(status)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.resumes else 0
        total = len(self.content)
        if start >= total and asked and self.resumes:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{total}")
            request.end_headers()
            return
        request.send_response(206 if asked and self.resumes else 200)
        request.send_header("Content-Length", str(total - start))
        if asked and self.resumes:
            request.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        request.end_headers()
        length = self.cut_after.pop(0) if self.cut_after else total
        request.wfile.write(self.content[start : start + length])


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def remote(server: Server, md5: str | None = MD5) -> RemoteFile:
    return RemoteFile(server.url, md5)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_file_is_fetched_into_a_new_folder(server, tmp_path):
    target = tmp_path / "new" / "folder" / "data.npz"
    assert fetch(remote(server), target) == target
    assert target.read_bytes() == CONTENT
    assert files_in(target.parent) == {"data.npz"}


def test_a_file_that_is_there_is_not_fetched_again(server, tmp_path):
    (tmp_path / "data.npz").write_bytes(CONTENT)
    fetch(remote(server), tmp_path / "data.npz")
    assert server.requests == []


def test_a_broken_connection_is_continued_where_it_broke(server, tmp_path):
    server.cut_after = [100_000, 250_000]
    fetch(remote(server), tmp_path / "data.npz", wait=0)
    assert (tmp_path / "data.npz").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=100000-", "bytes=350000-"]


def test_a_later_run_continues_what_an_earlier_one_left(server, tmp_path):
    server.cut_after = [300_000] * 2
    with pytest.raises(DownloadError):
        fetch(remote(server), tmp_path / "data.npz", attempts=2, wait=0)
    assert files_in(tmp_path) == {"data.npz.part"}
    fetch(remote(server), tmp_path / "data.npz")
    assert server.requests[-1] == "bytes=600000-"
    assert (tmp_path / "data.npz").read_bytes() == CONTENT


def test_a_server_that_cannot_continue_is_asked_for_everything(server, tmp_path):
    server.resumes, server.cut_after = False, [100_000]
    fetch(remote(server), tmp_path / "data.npz", wait=0)
    assert (tmp_path / "data.npz").read_bytes() == CONTENT


def test_an_old_beginning_is_thrown_away(server, tmp_path):
    (tmp_path / "data.npz.part").write_bytes(b"of last year" * 1000)
    fetch(remote(server), tmp_path / "data.npz", wait=0)
    assert (tmp_path / "data.npz").read_bytes() == CONTENT
    assert server.requests == ["bytes=12000-", None]


def test_a_part_that_is_complete_is_taken(server, tmp_path):
    (tmp_path / "data.npz.part").write_bytes(CONTENT)
    fetch(remote(server), tmp_path / "data.npz")
    assert (tmp_path / "data.npz").read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_thrown_away(server, tmp_path):
    (tmp_path / "data.npz.part").write_bytes(CONTENT + b"more")
    fetch(remote(server), tmp_path / "data.npz", wait=0)
    assert (tmp_path / "data.npz").read_bytes() == CONTENT


def test_a_wrong_file_never_gets_the_final_name(server, tmp_path):
    server.content = b"<html>maintenance</html>"
    wrong = hashlib.md5(server.content).hexdigest()
    with pytest.raises(ChecksumError) as caught:
        fetch(remote(server), tmp_path / "data.npz", wait=0)
    for part in (server.url, wrong, MD5, str(tmp_path / "data.npz"), "--data.verify_md5 false"):
        assert part in str(caught.value)
    assert files_in(tmp_path) == set()


def test_a_wrong_file_is_taken_without_a_checksum(server, tmp_path):
    server.content = b"altered"
    fetch(remote(server, md5=None), tmp_path / "data.npz")
    assert (tmp_path / "data.npz").read_bytes() == b"altered"


def test_an_existing_wrong_file_is_named_and_kept(server, tmp_path):
    path = tmp_path / "data.npz"
    path.write_bytes(b"mine")
    with pytest.raises(ChecksumError) as caught:
        fetch(remote(server), path)
    mine = hashlib.md5(b"mine").hexdigest()
    assert f"{path}: MD5 is {mine}, the published file has {MD5}" in str(caught.value)
    assert "--data.verify_md5 false" in str(caught.value)
    assert path.read_bytes() == b"mine"
    assert server.requests == []


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.statuses = [503, 429]
    fetch(remote(server), tmp_path / "data.npz", wait=0)
    assert (tmp_path / "data.npz").read_bytes() == CONTENT


def test_a_missing_file_is_not_asked_for_again(server, tmp_path):
    server.statuses = [404] * 5
    with pytest.raises(DownloadError, match=r"cannot download data\.npz: the server answered 404"):
        fetch(remote(server), tmp_path / "data.npz", wait=0)
    assert len(server.requests) == 1


def test_without_a_connection_the_message_says_what_to_fetch_where(tmp_path):
    unreachable = RemoteFile("http://127.0.0.1:9/data.npz", MD5)
    with pytest.raises(DownloadError) as caught:
        fetch(unreachable, tmp_path / "data.npz", attempts=2, wait=0)
    target = tmp_path / "data.npz"
    expected = f"On a machine with a connection fetch {unreachable.url} (MD5 {MD5}) and put it at {target}"
    assert expected in str(caught.value)
    assert files_in(tmp_path) == set()


def test_several_processes_fetch_once(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch(remote(server), tmp_path / "data.npz"), range(4)))
    assert len(server.requests) == 1


def test_a_full_disk_is_named_and_what_arrived_is_kept(server, tmp_path, monkeypatch):
    import datamodules.downloads as module

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(DownloadError, match=r"data\.npz\.part: cannot be written .*No space left on device"):
        fetch(remote(server), tmp_path / "data.npz")
    assert files_in(tmp_path) == {"data.npz.part"}


def test_verify_is_silent_about_the_right_file_and_no_sum(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(CONTENT)
    verify(path, MD5)
    verify(path, None)
    assert md5_of(path) == MD5


def test_data_that_is_there_is_used_where_nothing_may_be_written(tmp_path, monkeypatch):
    import filelock

    target = tmp_path / "data.npz"
    target.write_bytes(b"complete")
    monkeypatch.setattr(filelock, "FileLock", None)
    remote = RemoteFile("http://127.0.0.1:9/data.npz", hashlib.md5(b"complete").hexdigest())
    assert fetch(remote, target) == target
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]
