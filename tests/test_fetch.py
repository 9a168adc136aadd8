"""Fetching published files: from a server on this machine that cuts, redirects and lies; and the check without one."""

import hashlib
import json
import subprocess
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from evaluations import inception
from models import autoencoder, encoder, published
from models.hub import COMMITS, HUB
from scripts import fetch
from scripts.fetch import File, main, parse, request, url_of

CONTENT = {name: hashlib.sha256(name.encode()).digest() * 1000 for name in ("/a.bin", "/b.bin", "/c.bin", "/hub/d.bin")}
HASH = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT with byte ranges; `/hub/` answers by a redirect that states the hash, as the model hub does."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        address, requests = self.path, self.server.requests
        requests.append((address, self.headers.get("Range")))
        if address in self.server.errors:
            return self.answer(self.server.errors.pop(address), {})
        if address.startswith("/hub/"):
            etag = f'"{self.server.stated.get(address, HASH[address])}"'
            return self.answer(302, {"Location": f"/store{address}", "X-Linked-Etag": etag})
        if address == "/page.bin":
            return self.answer(200, {"Content-Type": "text/html"}, b"<html>please log in</html>")
        content = self.server.changed.get(address) or CONTENT.get(address.removeprefix("/store"))
        if content is None:
            return self.answer(404, {})
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if self.server.ranges else 0
        if begin >= len(content):
            return self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
        status = 206 if begin else 200
        part = content[begin:]
        cut = self.server.cuts.pop(address, None)
        self.answer(status, {}, part, len(part) if cut is None else cut)

    def answer(self, status, headers, content=b"", sent=None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])
        self.close_connection = sent is not None and sent < len(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The server, and a table of files that point to it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.requests, server.cuts, server.errors, server.changed, server.stated = [], {}, {}, {}, {}
    server.ranges = True
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    base = server.base = f"http://127.0.0.1:{server.server_port}"
    files = (
        File("a", "a.bin", f"{base}/a.bin", "one"),
        File("b", "sub/b.bin", f"{base}/b.bin", "two", sha256=HASH["/b.bin"][:8]),
        File("c", "c.bin", f"{base}/c.bin", "three", optional=True),
        File("d", "d.bin", f"{base}/hub/d.bin", "four"),
    )
    monkeypatch.setattr(fetch, "FILES", files)
    monkeypatch.setattr(fetch, "PAUSE", 0)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def fails(*words):
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    return exit_.value.code


def run(*words):
    main([str(word) for word in words])


def test_files_arrive_with_sizes_and_hashes_and_only_once(server, tmp_path, capsys):
    run("--folder", tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT["/a.bin"]
    assert (tmp_path / "sub/b.bin").read_bytes() == CONTENT["/b.bin"]
    assert (tmp_path / "d.bin").read_bytes() == CONTENT["/hub/d.bin"]
    assert not (tmp_path / "c.bin").exists()  # optional
    record = manifest(tmp_path)["sub/b.bin"]
    assert record.pop("date")
    assert record == {"bytes": 32000, "sha256": HASH["/b.bin"], "url": f"{server.base}/b.bin"}
    run("--folder", tmp_path, "c")
    assert set(manifest(tmp_path)) == {"a.bin", "sub/b.bin", "c.bin", "d.bin"}
    before = len(server.requests)
    run("--folder", tmp_path, "all")
    assert len(server.requests) == before
    capsys.readouterr()
    run("--folder", tmp_path, "--check")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "a.bin",
        "sub/b.bin",
        "c.bin",
        "d.bin",
    ]


def test_a_cut_connection_continues_where_it_stopped(server, tmp_path):
    server.cuts = {"/a.bin": 12345}
    run("--folder", tmp_path, "a")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT["/a.bin"]
    assert server.requests == [("/a.bin", None), ("/a.bin", "bytes=12345-")]
    assert not list(tmp_path.glob("*.part"))


def test_a_killed_download_continues_and_one_that_was_only_not_renamed_is_taken(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT["/a.bin"][:500])
    (tmp_path / "d.bin.part").write_bytes(CONTENT["/hub/d.bin"])
    run("--folder", tmp_path, "a", "d")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT["/a.bin"]
    assert (tmp_path / "d.bin").read_bytes() == CONTENT["/hub/d.bin"]
    assert ("/a.bin", "bytes=500-") in server.requests
    (tmp_path / "c.bin.part").write_bytes(bytes(40000))  # longer than the file
    run("--folder", tmp_path, "c")
    assert (tmp_path / "c.bin").read_bytes() == CONTENT["/c.bin"]


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "a.bin.part").write_bytes(b"x" * 500)
    run("--folder", tmp_path, "a")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT["/a.bin"]


def test_busy_servers_are_asked_again_and_absent_files_are_named(server, tmp_path, monkeypatch, capsys):
    server.errors = {"/a.bin": 503}
    run("--folder", tmp_path, "a")
    monkeypatch.setattr(fetch, "FILES", (File("gone", "gone.bin", f"{server.base}/gone.bin", ""), *fetch.FILES))
    assert fails("--folder", tmp_path, "gone", "b") == 1
    output = capsys.readouterr()
    assert f"gone.bin: {server.base}/gone.bin answers 404 Not Found\n" in output.err
    assert "1 of 2 files are missing or wrong" in output.out
    assert (tmp_path / "sub/b.bin").is_file()  # the others are fetched all the same


def test_a_file_that_left_its_branch_may_be_in_an_earlier_commit(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "FILES", (File("g", "g.pth", f"{server.base}/some/where/resolve/main/g.pth", ""),))
    assert fails("--folder", tmp_path) == 1
    told = f"look through {server.base}/some/where/commits/main, and give hf:some/where/g.pth@COMMIT as CHECKPOINT"
    assert told in capsys.readouterr().err


def test_a_login_page_is_no_file(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "FILES", (File("page", "page.bin", f"{server.base}/page.bin", ""),))
    assert fails("--folder", tmp_path) == 1
    assert "is a web page, not the file" in capsys.readouterr().err
    assert not list(tmp_path.glob("page*"))


def test_no_server_is_given_up(server, tmp_path, monkeypatch, capsys):
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    assert fails("--folder", tmp_path, "a") == 1
    assert "cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize("known", ["its name", "the hub", "the manifest"])
def test_another_content_than_known_is_refused(server, tmp_path, capsys, known):
    name, path = {"its name": ("b", "sub/b.bin"), "the hub": ("d", "d.bin"), "the manifest": ("a", "a.bin")}[known]
    if known == "the manifest":
        run("--folder", tmp_path, "a")
        (tmp_path / "a.bin").unlink()
    server.changed = {f"/{name}.bin": b"other" * 50}
    server.stated = {"/hub/d.bin": HASH["/a.bin"]}
    assert fails("--folder", tmp_path, name) == 1
    word = {"its name": "published is", "the hub": "stated by the hub is", "the manifest": "recorded is"}[known]
    assert f"{word} {HASH['/a.bin' if known != 'its name' else '/b.bin'][:8]}" in capsys.readouterr().err
    assert not (tmp_path / path).exists()
    assert not (tmp_path / f"{path}.part").exists()
    server.changed, server.stated = {}, {}
    run("--folder", tmp_path, name)


def test_a_file_put_there_by_hand_is_compared_with_the_published_size(server, tmp_path, capsys):
    (tmp_path / "a.bin").write_bytes(CONTENT["/a.bin"])
    (tmp_path / "c.bin").write_bytes(CONTENT["/c.bin"][:-1])
    run("--folder", tmp_path, "a")
    assert manifest(tmp_path)["a.bin"]["sha256"] == HASH["/a.bin"]
    fails("--folder", tmp_path, "c")
    assert "has 31,999 bytes, the published one 32,000: remove it" in capsys.readouterr().err
    assert (tmp_path / "c.bin").is_file()  # it is not ours to remove


def test_check_tells_missing_short_and_altered_files_without_a_network(server, tmp_path, monkeypatch, capsys):
    run("--folder", tmp_path)
    monkeypatch.setattr(urllib.request, "build_opener", lambda *_: pytest.fail("asked the network"))
    run("--folder", tmp_path, "--check", "--hash")
    assert capsys.readouterr().out.count("32,000 bytes, content compared") == 3
    (tmp_path / "a.bin").write_bytes(CONTENT["/a.bin"][:-1])
    (tmp_path / "sub/b.bin").write_bytes(CONTENT["/a.bin"])
    (tmp_path / "d.bin").rename(tmp_path / "d.bin.part")
    assert fails("--folder", tmp_path, "--check") == 1
    out = capsys.readouterr().out
    assert "WRONG SIZE: 31,999 bytes, expected 32,000" in out
    assert "missing, 32,000 bytes of it are there" in out
    assert "2 of 3 files are missing or wrong" in out
    assert "`bash scripts/fetch.sh a d`" in out
    assert fails("--folder", tmp_path, "--check", "--hash") == 1
    out = capsys.readouterr().out
    assert f"ALTERED: SHA-256 {HASH['/a.bin']}, expected {HASH['/b.bin']}" in out
    assert "3 of 3 files" in out


def test_check_of_files_copied_without_the_manifest(server, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"short")
    (tmp_path / "sub/b.bin").write_bytes(CONTENT["/b.bin"])
    run("--folder", tmp_path, "--check", "a", "b")
    assert capsys.readouterr().out.count("not in manifest.json, so nobody knows whether it is whole") == 2
    (tmp_path / "sub/b.bin").write_bytes(b"short")
    assert fails("--folder", tmp_path, "--check", "--hash", "a", "b") == 1  # the hash in its name is known


def test_a_mirror_of_the_hub(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "HUB", "http://hub.invalid")
    monkeypatch.setattr(fetch, "FILES", (File("d", "d.bin", "http://hub.invalid/hub/d.bin", ""),))
    monkeypatch.setenv("HF_ENDPOINT", f"{server.base}/")
    run("--folder", tmp_path)
    assert (tmp_path / "d.bin").read_bytes() == CONTENT["/hub/d.bin"]


def test_a_full_disk_is_noticed_before(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10})())
    assert fails("--folder", tmp_path, "a") == 1
    assert "GB more" in capsys.readouterr().err


def test_bad_words_are_refused(capsys):
    for words, message in ((["vae"], "vae: expected sd-vae-ft-mse"), (["--hash"], "--hash belongs to --check")):
        with pytest.raises(SystemExit):
            parse(words)
        assert message in capsys.readouterr().err
    assert request("http://x/y", 7).get_header("Range") == "bytes=7-"


def test_the_table_has_what_commands_look_for():
    paths = {file.path for file in fetch.FILES}
    for name in ("sd-vae-ft-mse", "sd-vae-ft-ema"):
        assert {f"{name}/{autoencoder.CONFIG}", f"{name}/{autoencoder.WEIGHTS}"} <= paths
    assert encoder.weights_file(encoder.encoders["dinov2-vitb14"]).name in paths
    assert inception.WEIGHTS in paths
    assert url_of(inception.WEIGHTS) == inception.URL
    assert all(file.url.startswith("https://") for file in fetch.FILES)
    hub = [file.url for file in fetch.FILES if file.url.startswith(HUB) and not file.optional]
    assert all(any(f"{name}/resolve/{commit}/" in url for name, commit in COMMITS.items()) for url in hub)
    assert len(hub) == 5
    assert len(paths) == len(fetch.FILES)


def test_names_of_the_hub_are_looked_for_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GMEM_WEIGHTS", str(tmp_path))
    (tmp_path / "last.pt").touch()
    (tmp_path / inception.WEIGHTS).touch()
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    assert published.hub_file(f"hf:some/where/sub/last.pt@{'0' * 40}") == tmp_path / "last.pt"
    assert inception.find_weights() == tmp_path / inception.WEIGHTS


def test_the_script_needs_python_alone(root, tmp_path):
    """Without site packages: a machine with a network may have none."""
    words = ["bash", "scripts/fetch.sh", "--folder", str(tmp_path), "--check"]
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\nexec python3 -S "$@"\n')
    interpreter.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(interpreter)}
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "8 of 8 files are missing" in done.stdout
