"""Models by their names, from a stand-in for the hub that speaks as much of its protocol as a download takes."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dro_jax.errors import UsageError
from dro_jax.interop import hub

FOLDER = Path(__file__).parent / "golden" / "v1_1_sharded"
COMMIT = "a" * 40
DANGEROUS = ("pytorch_model.bin", "code.py")


class Hub(http.server.BaseHTTPRequestHandler):
    """Has org/name, whose folder holds a pickle and a program too, and org/pickled without safetensors."""

    asked: tuple[str, ...] = ()

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        Hub.asked += (self.path.partition("?")[0],)
        files = [*(path.name for path in FOLDER.iterdir()), *DANGEROUS]
        head, _, name = self.path.rpartition("/")
        model = "pickled" if "/org/pickled/" in self.path else "name"
        if model == "pickled":
            files = [file for file in files if "safetensors" not in file]
        if head == f"/org/{model}/resolve/{COMMIT}":
            content = (FOLDER / name).read_bytes()
        elif head == f"/api/models/org/{model}/revision":
            siblings = [{"rfilename": name} for name in files]
            content = json.dumps({"id": model, "sha": COMMIT, "siblings": siblings}).encode()
        elif head == f"/api/models/org/{model}/tree":
            content = json.dumps(
                [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in files]
            ).encode()
        else:
            self.send_error(404)
            return b""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name}"')
        self.end_headers()
        return content

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def download(name, endpoint, cache):
    code = """
import sys
from dro_jax.errors import UsageError
from dro_jax.interop import hub
try:
    print(hub.download(sys.argv[1]))
except UsageError as error:
    print(error)
    sys.exit(2)
"""
    # The library reads these when it is imported.
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, name],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_model_by_its_name(endpoint, tmp_path):
    result = download("org/name", endpoint, tmp_path)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    wanted = {path.name for path in FOLDER.iterdir()} - {"generation_config.json"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert all((folder / name).read_bytes() == (FOLDER / name).read_bytes() for name in wanted)
    assert not any(path.endswith(DANGEROUS) for path in Hub.asked)


def test_a_model_of_pickles_alone(endpoint, tmp_path):
    result = download("org/pickled", endpoint, tmp_path)
    assert result.returncode == 2, result.stderr
    (line,) = result.stdout.splitlines()
    assert line.startswith(
        "org/pickled: has no safetensors on the hub; pytorch_model.bin is a pickle, which may run"
    )
    assert not any(path.endswith(DANGEROUS) for path in Hub.asked)


@pytest.mark.parametrize(("name", "network"), [("org/other", True), ("org/name", False)])
def test_no_such_model_and_no_network(endpoint, tmp_path, name, network):
    result = download(name, endpoint if network else "http://127.0.0.1:9", tmp_path)
    assert result.returncode == 2
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"{name}: no such folder, and the hub does not give a model of that")
    assert ("404" if network else "refused") in line
    assert line.endswith("check the name and the network")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"^org/name: no such folder; .*pip install 'dro_jax\[hf"):
        hub.download("org/name")
