"""The Chromium that tests of pages use, driven by nothing: the page reports its own result to the server it came from.
WebGPU runs there on Chromium's own software driver.

CHROMIUM names the program, else it is looked for on the PATH. A missing one fails a test where CI is set, and skips it,
with the reason, on a laptop."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from tinygpt.runtime.bundle import Bundle
from tinygpt.serve import ADDRESS, PAGE, BundleServer, Handler

# Without Chromium's own stores of 0 to workgroup memory: kernels promise to read nothing they did not write, and its driver
# compiles five times as fast (tiny's step, 56 kernels: 5 s instead of 27).
FLAGS = (
    "--headless", "--no-sandbox", "--enable-unsafe-webgpu", "--enable-dawn-features=disable_workgroup_init", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
DRIVERS = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")  # meant for other tests: one that Chromium cannot load leaves it without WebGPU
CHECK = "host/check.html"
WATCH = """
<script>
  const report = (body) => fetch("/result", { method: "POST", body: JSON.stringify(body) });
  const watch = () => {
    const result = globalThis.tinygpt;
    if (result?.done) report({ ...result, corpus: [...(result.corpus ?? [])] });
    else setTimeout(watch, 20);
  };
  onerror = (message) => report({ error: message });
  onunhandledrejection = (event) => report({ error: String(event.reason) });
  watch();
</script>
"""


def _program() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found:
        return found
    problem = "chromium is not installed: apt-get install chromium, or set CHROMIUM to one"
    if os.environ.get("CI"):
        pytest.fail(problem)
    pytest.skip(problem)


class _Reporting(Handler):
    def do_POST(self) -> None:
        result = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert isinstance(self.server, _WatchedServer)
        self.server.results.put(result)
        self.answer(HTTPStatus.OK, b"", "text/plain")


class _WatchedServer(BundleServer):
    """Serves the bundle's page, and one more, with a script in it that sends its result back."""

    def __init__(self, bundle: Bundle, script: str) -> None:
        super().__init__(bundle)
        self.RequestHandlerClass = _Reporting
        self.results: queue.Queue[dict[str, Any]] = queue.Queue()
        self.check = f"<!doctype html><script type=module>{script}</script>"

    def content(self, name: str) -> bytes | None:
        content = self.check.encode() if name == CHECK else super().content(name)
        return content + WATCH.encode() if content is not None and name in (PAGE, CHECK) else content


def page_result(bundle: Bundle, query: str, profile: Path, timeout: float = 120) -> dict[str, Any]:
    """Open a bundle's page in headless Chromium; its result once it is done. `profile` is a folder for the browser."""
    return _result(bundle, f"{PAGE}?{query}", profile, "", timeout)


def script_result(bundle: Bundle, script: str, profile: Path) -> Any:
    """Run the body of an asynchronous function, a script beside the bundle's host, in headless Chromium; what it returns."""
    wrapped = f"globalThis.tinygpt = {{ value: await (async () => {{ {script} }})(), done: true }};"
    found = _result(bundle, CHECK, profile, wrapped)
    assert "error" not in found, found["error"]
    return found["value"]


def _result(bundle: Bundle, page: str, profile: Path, script: str, timeout: float = 120) -> dict[str, Any]:
    program = _program()
    with _WatchedServer(bundle, script) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with _browser(program, f"http://{ADDRESS}:{server.server_port}/{page}", profile) as log:
                try:
                    return server.results.get(timeout=timeout)
                except queue.Empty:
                    pytest.fail(f"the page reported nothing in {timeout} s\n{log.read_text(errors='replace')[-4000:]}")
        finally:
            server.shutdown()


@contextlib.contextmanager
def _browser(program: str, url: str, profile: Path) -> Iterator[Path]:
    """A browser on a page, ended with all its processes; what it prints goes to the file that is given."""
    profile.mkdir()
    log = profile / "log.txt"
    with log.open("wb") as output:
        command = [program, *FLAGS, f"--user-data-dir={profile}", url]
        environment = {key: value for key, value in os.environ.items() if key not in DRIVERS}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        try:
            yield log
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
