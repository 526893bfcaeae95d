"""Chromium without a window: a page in a frame of a given width, asked questions in JavaScript, and photographed."""

import contextlib
import dataclasses
import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
]

FRAME = """<!doctype html><link rel="icon" href="data:,"><style>body { margin: 0 } iframe { border: 0; display: block }
</style><iframe src="page.html" width="WIDTH" height="HEIGHT"></iframe><pre id="answer"></pre><script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", async () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  let answer;
  try { answer = await (async () => { QUESTION })(); } catch (error) { answer = { error: String(error) }; }
  document.getElementById("answer").textContent = JSON.stringify(answer);
});
</script>"""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the browser saw: the question's answer, the frame's picture, and the paths it asked the server for."""

    answer: Any
    picture: Image.Image
    requests: list[str]


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves a folder; yields its address and the paths that are asked for."""
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_: Any) -> None:
            requests.append(self.path)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def look(page: str, question: str, *, width: int, height: int = 3000, dark: bool = False) -> Seen:
    """Opens a page in Chromium.

    Args:
      page: its HTML.
      question: body of an async JavaScript function of `page` (the document), `view` (its window) and `wait(ms)`; what
        it returns is the answer. The picture is taken afterwards.
      width: of the frame, pixels.
      height: of the frame.
      dark: whether the reader prefers dark.

    Returns:
      What was seen.
    """
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as profile:
        place = Path(folder)
        (place / "page.html").write_text(page, encoding="utf-8")
        frame = FRAME.replace("WIDTH", str(width)).replace("HEIGHT", str(height))
        (place / "frame.html").write_text(frame.replace("QUESTION", question), encoding="utf-8")
        shot = place / "shot.png"
        with serving(place) as (address, requests):
            done = subprocess.run(
                [
                    CHROMIUM,
                    *FLAGS,
                    f"--user-data-dir={profile}",
                    f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                    f"--window-size={max(width, 800)},{height + 40}",
                    "--virtual-time-budget=20000",
                    f"--screenshot={shot}",
                    "--dump-dom",
                    f"{address}/frame.html",
                ],
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            )
        found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stderr[-2000:]
        with Image.open(shot) as image:
            picture = image.convert("RGB").crop((0, 0, width, height))
        return Seen(json.loads(html.unescape(found[1])), picture, requests)
