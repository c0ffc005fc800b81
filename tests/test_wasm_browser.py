"""The page of a WebAssembly bundle: trained in headless Chromium with threads, it computes what wasmtime does; and the
server it comes from hands out nothing but the bundle."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tinygpt as tg
from tests.chromium import page_result
from tinygpt.ir.errors import UserError
from tinygpt.runtime.bundle import Bundle
from tinygpt.runtime.data import Corpus
from tinygpt.runtime.training import train
from tinygpt.serve import ADDRESS, BundleServer

STEPS = 20


@pytest.fixture(scope="module", params=["wasm32", "wasm64"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    compiled: Bundle = tg.compile("tiny", target=request.param)
    return compiled


@pytest.fixture
def server(bundle: Bundle) -> Iterator[BundleServer]:
    with BundleServer(bundle) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()


def wasmtime_losses(bundle: Bundle, corpus: Corpus) -> list[float]:
    losses: list[float] = []
    with bundle.session(threads=2) as session:
        train(session, corpus, STEPS, eval_every=0, on_row=lambda row: losses.append(row["loss"]))
    return losses


def test_a_page_trains_with_threads_to_the_bits_of_wasmtime(bundle: Bundle, tmp_path: Path) -> None:
    found = page_result(bundle, f"steps={STEPS}&threads=2", tmp_path / "profile")
    assert found["error"] is None
    assert found["isolated"]
    assert found["threads"] == 2
    corpus = Corpus("text", "", np.array(found["corpus"], np.uint8))
    assert found["losses"] == wasmtime_losses(bundle, corpus)
    assert len(found["losses"]) == STEPS
    assert found["losses"][-1] < found["losses"][0]


def asked(server: BundleServer, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content; the path is sent as it stands."""
    connection = http.client.HTTPConnection(ADDRESS, server.server_port, timeout=10)
    connection.request(method, path)
    response = connection.getresponse()
    try:
        return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def test_every_file_of_the_bundle_is_served_isolated_and_typed(server: BundleServer) -> None:
    types = {".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json", ".html": "text/html"}
    for name in (*server.bundle.manifest.files, "manifest.json"):
        status, headers, content = asked(server, f"/{name}?query")
        assert (status, content) == (200, (server.bundle.folder / name).read_bytes())
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-embedder-policy"] == "require-corp"
        assert headers["content-type"].startswith(types.get(Path(name).suffix, "application/octet-stream"))
    assert asked(server, "/")[1]["location"] == "/host/index.html"
    assert asked(server, "/model.wasm", "HEAD")[2] == b""


def test_nothing_else_is_served(server: BundleServer) -> None:
    secret = server.bundle.folder / "secret.txt"
    secret.write_text("secret")
    folder = server.bundle.folder
    for path in (
        "/secret.txt", "/host", "/host/", "/host/../secret.txt", "/host/../model.wasm", "/%2e%2e/etc/passwd",
        "//etc/passwd", "/..%2f..%2fetc%2fpasswd", f"/../{folder.name}/model.wasm", "/host%5c..%5csecret.txt",
        "/model.wasm%00", "/MODEL.WASM",
    ):  # fmt: skip
        assert asked(server, path)[0] == 404, path
    assert asked(server, "/manifest.json", "POST")[0] == 501


def test_the_command_says_where_and_ends_with_ctrl_c(bundle: Bundle) -> None:
    command = [sys.executable, "-m", "tinygpt", "serve", str(bundle.folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        url = first.split()[-1]
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                assert b"TinyGPT" in response.read()
        finally:
            process.send_signal(signal.SIGINT)
            rest = process.communicate(timeout=30)[0]
    assert first == f"{bundle.folder} is at {url}\n"
    assert process.returncode == 0
    assert "Traceback" not in rest


def test_a_bundle_without_a_page_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    native = tg.compile("tiny", target="cpp", out=tmp_path / "native")
    with pytest.raises(UserError, match=r"has no host/index.html.*\n.*wasm32, wasm64"):
        BundleServer(native)
    with BundleServer(bundle) as first, pytest.raises(UserError, match=f"port {first.server_port}: "):
        BundleServer(bundle, first.server_port)
    with pytest.raises(UserError, match="port 99999: "):
        BundleServer(bundle, 99999)
