"""Downloads of published data sets: they go on, say why they fail, and unpack to their places."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading

import pytest
import support.needs_command_line  # noqa: F401
from support.archives import packed

from afa_model.data.prepare import downloads
from afa_model.data.prepare.downloads import Archive, obtain, unpack
from afa_model.errors import DataError

CONTENT = bytes(range(256)) * 40


class Server(http.server.BaseHTTPRequestHandler):
    """Sends at most 4,000 bytes of what is asked for, then hangs up."""

    asked: list[str | None] = []

    def do_GET(self):
        if self.path != "/file":
            self.send_error(404, "gone for good")
            return
        said = self.headers.get("Range")
        self.asked.append(said)
        start = int(re.findall(r"\d+", said)[0]) if said else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if said else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : start + 4000])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    Server.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def test_a_download_goes_on_where_the_connection_ended(server, tmp_path):
    archive = Archive("file", f"{server}/file", hashlib.md5(CONTENT).hexdigest())
    (path,) = obtain([archive], tmp_path, offline=False)
    assert path == tmp_path / "downloads" / "file" and path.read_bytes() == CONTENT
    assert Server.asked == [None, "bytes=4000-", "bytes=8000-"]
    assert [item.name for item in path.parent.iterdir()] == ["file"]
    path.rename(tmp_path / "downloads" / "file.part")  # what another run left
    assert obtain([archive], tmp_path, offline=False) == [path] and Server.asked[3:] == [f"bytes={len(CONTENT)}-"]
    assert obtain([archive], tmp_path, offline=False) == [path] and len(Server.asked) == 4


def test_a_download_that_fails_says_why_and_how_to_do_without(server, tmp_path, monkeypatch):
    target = tmp_path / "downloads" / "file"
    with pytest.raises(DataError, match=f"the server answers 404 gone for good; get it from {server}/x and put it at"):
        obtain([Archive("file", f"{server}/x", "0" * 32)], tmp_path, offline=False)
    with pytest.raises(DataError, match="what was downloaded has the MD5"):
        obtain([Archive("file", f"{server}/file", "0" * 32)], tmp_path, offline=False)
    assert not target.exists() and not list(target.parent.iterdir())
    monkeypatch.setattr(downloads, "_append", lambda archive, part, start: part.write_bytes(b"some") < 0)
    with pytest.raises(DataError, match=r"the connection ends before the file does \(4 bytes of it are kept"):
        obtain([Archive("file", f"{server}/file", "0" * 32)], tmp_path, offline=False)
    monkeypatch.undo()
    with pytest.raises(DataError, match=f"cannot be downloaded: .*put it at {target}"):
        obtain([Archive("file", "http://127.0.0.1:9/file", "0" * 32)], tmp_path, offline=False)


@pytest.mark.parametrize("ending", ["tar", "tgz", "zip"])
def test_unpacking_keeps_to_its_places_and_goes_on(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    packed(path, {"top/in/a": b"aa", "top/in/deep/b": b"bb", "top/out/c": b"cc", "top/one": b"dd"})
    places = {"top/in": "here", "top/one": "there/one"}
    unpack(path, tmp_path / "root", places)
    found = {item.relative_to(tmp_path / "root").as_posix(): item for item in (tmp_path / "root").rglob("*")}
    assert {name for name, item in found.items() if item.is_file()} == {"here/a", "here/deep/b", "there/one"}
    found["here/a"].write_bytes(b"a")  # cut off
    found["here/deep/b"].write_bytes(b"BB")
    unpack(path, tmp_path / "root", places)
    assert (found["here/a"].read_bytes(), found["here/deep/b"].read_bytes()) == (b"aa", b"BB")
    packed(path, {"top/in/../../../evil": b"x"})
    with pytest.raises(DataError, match="would lie outside the root"):
        unpack(path, tmp_path / "root", places)
    assert not list(tmp_path.parent.rglob("evil"))
