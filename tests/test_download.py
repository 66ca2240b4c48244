"""Downloads from servers that fail, cut off, stall or send something else; nothing incomplete enters the cache."""

import hashlib
import http.server
import threading
import time

import pytest
import torch
from test_convnext import randomize

from convnext_min import download, weights
from convnext_min.convnext import ConvNeXt

BODY = bytes(range(256)) * 40
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Answer the requests in turn as `plan` says: an HTTP status, a number of bytes sent before closing, or "stall"."""

    plan: list
    body: bytes
    requests: list
    resumes = True

    def do_GET(self):
        step = self.plan.pop(0) if self.plan else None
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.resumes else 0
        self.requests.append(start)
        if isinstance(step, str) and step.isdigit():
            return self.send_error(int(step))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(self.body[start:][: step if isinstance(step, int) else None if step is None else 10])
        self.wfile.flush()
        if step == "stall":
            time.sleep(1.0)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Return a function that starts a server with a plan and returns its address and the starts of its requests."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(*plan, body=BODY, resumes=True):
        requests = []
        members = {"plan": list(plan), "body": body, "requests": requests, "resumes": resumes}
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Planned", (Server,), members))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def cached():
    folder = download.cache_folder()
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def test_a_file_is_downloaded_once(serve):
    address, requests = serve()
    path = download.download(f"{address}/weights/file.pth")
    assert path.read_bytes() == BODY and path.is_relative_to(download.cache_folder())
    assert download.download(f"{address}/weights/file.pth", sha256=DIGEST[:8]) == path
    assert requests == [0] and cached() == [path]


def test_addresses_have_files_of_their_own_in_the_cache(serve):
    one, two = serve()[0], serve(body=b"other")[0]
    paths = [download.download(url) for url in (f"{one}/a/model.bin", f"{one}/b/model.bin", f"{two}/a/model.bin")]
    assert len(set(paths)) == 3 and paths[2].read_bytes() == b"other"


@pytest.mark.parametrize("query", ["download=true", "signature=" + "0123456789abcdef" * 40])
def test_a_query_stays_out_of_the_files_name(serve, query):
    address, requests = serve()
    path = download.download(f"{address}/a/model.safetensors?{query}")
    assert path.name == "model.safetensors" and path.read_bytes() == BODY
    assert download.download(f"{address}/a/model.safetensors?{query}") == path
    assert len({path, *(download.download(f"{address}/a/model.safetensors{other}") for other in ("", "?b"))}) == 3
    assert requests == [0, 0, 0]


def test_a_date_in_a_files_name_is_no_digest(serve):
    address, _ = serve()
    path = download.download(f"{address}/convnext_atto-20240131.pth")
    assert path.read_bytes() == BODY and download.download(f"{address}/convnext_atto-20240131.pth") == path


@pytest.mark.parametrize("resumes", [True, False])
def test_a_transfer_that_is_cut_off_is_resumed_or_restarted(serve, resumes):
    address, requests = serve(3000, 2000, resumes=resumes)
    assert download.download(f"{address}/file.pth", DIGEST).read_bytes() == BODY
    assert requests == ([0, 3000, 5000] if resumes else [0, 0, 0])


@pytest.mark.parametrize("plan", [["503"], ["stall"], [100]], ids=["error", "stall", "cut off"])
def test_one_failure_is_tried_again(serve, plan):
    address, requests = serve(*plan)
    assert download.download(f"{address}/file.pth", timeout=0.2).read_bytes() == BODY
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("plan", "reason", "requests"),
    [
        (["503"] * 9, "HTTP Error 503", 3),
        (["404"] * 9, "HTTP Error 404", 1),
        ([100] * 9, r"the connection closed after 300 of 10,240 bytes", 3),
        (["stall"] * 9, "timed out", 3),
    ],
    ids=["error", "not found", "cut off", "stall"],
)
def test_lasting_failures_are_reported_and_leave_nothing_behind(serve, plan, reason, requests):
    address, made = serve(*plan)
    with pytest.raises(
        ConnectionError, match=rf"cannot download {address}/file\.pth: .*{reason}.*path of a downloaded"
    ):
        download.download(f"{address}/file.pth", timeout=0.2)
    assert len(made) == requests and cached() == []


def test_no_server_at_all(serve):
    with pytest.raises(ConnectionError, match=r"cannot download http://127\.0\.0\.1:9/file\.pth"):
        download.download("http://127.0.0.1:9/file.pth", attempts=1)


def test_wrong_bytes_are_refused_by_their_digest(serve):
    address, _ = serve(body=b"<html>captive portal</html>")
    for name, digest in (("file.pth", DIGEST), (f"model-{DIGEST[:8]}.pth", None)):
        with pytest.raises(ValueError, match=f"has the SHA-256 digest [0-9a-f]{{64}}, expected {DIGEST[:8]}"):
            download.download(f"{address}/{name}", digest)
    assert cached() == []


def test_wrong_bytes_in_the_cache_are_replaced(serve):
    address, _ = serve()
    path = download.download(f"{address}/file.pth")
    path.write_bytes(b"something else")
    assert download.download(f"{address}/file.pth", DIGEST).read_bytes() == BODY


def test_wrong_bytes_without_a_digest_leave_the_cache_when_they_cannot_be_read(serve):
    address, requests = serve(body=b"<html>captive portal</html>")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"file\.pth is damaged, or not a file of weights alone"):
            weights.load(f"{address}/file.pth")
    assert cached() == [] and requests == [0, 0]


@pytest.mark.compatibility(
    library="official", way="URL: http, file", direction="in", what="resumed download", models="small ConvNeXt"
)
def test_weights_from_a_server_and_from_a_file_address(serve, tmp_path):
    model = randomize(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=2))
    torch.save({"model": model.state_dict()}, tmp_path / "file.pth")
    address, _ = serve(5000, body=(tmp_path / "file.pth").read_bytes())
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        for url in (f"{address}/file.pth", (tmp_path / "file.pth").as_uri()):
            assert torch.equal(weights.load(url).eval()(images), model(images))
    with pytest.raises(ValueError, match="no averaged weights"):
        weights.load(f"{address}/file.pth", averaged=True)
    assert len(cached()) == 1, "a file that can be read stays"
    with pytest.raises(ValueError, match="SHA-256"):
        download.download((tmp_path / "file.pth").as_uri(), DIGEST)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        weights.load((tmp_path / "none.pth").as_uri())
    (tmp_path / "bad.pth").write_bytes(b"bad")
    with pytest.raises(ValueError, match="damaged"):
        weights.load((tmp_path / "bad.pth").as_uri())
    assert (tmp_path / "bad.pth").exists(), "a file that was not downloaded is never deleted"


def test_progress_is_shown_and_can_be_silenced(serve, capfd):
    address, _ = serve()
    download.download(f"{address}/loud.pth")
    assert "loud.pth" in capfd.readouterr().err
    download.download(f"{address}/quiet.pth", progress=False)
    assert capfd.readouterr().err == ""
