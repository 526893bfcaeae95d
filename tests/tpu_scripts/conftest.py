"""A stand-in for Google Cloud: a `gcloud` on the PATH that plays scripted states and runs ssh commands for real."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
GCLOUD = Path(__file__).with_name("fake_gcloud.py")

SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "NAME": "my-tpu",
    "ACCELERATOR": "v5litepod-16",
    "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
    "PROVISIONING": "spot",
    "WAIT_HOURS": "1",
    "MODEL_DIR": "gs://my-bucket/runs/aligned",
    "TRAIN_FLAGS": """--gin_file=runs/dro_v_tiny.gin --gin.FEEDBACK_FILE="'gs://my-bucket/f.jsonl'" """.strip(),
}

# What stands on a host's PATH, before the system's own commands.
HOST_COMMANDS = {
    "hostname": 'echo "t1v-n-0a1b2c3d-w-${HOME##*host}"',
    "curl": 'echo "mkdir -p ~/.local/bin; cp $WORLD/uv ~/.local/bin/uv"',
}

UV = """
echo "uv $*" >>~/installed
mkdir -p "${!#}/bin"
cp "$WORLD/pip" "${!#}/bin/pip"
"""

PIP = """
echo "pip $*" >>~/installed
if [[ $1 == install ]]; then
  if [[ -e ~/pip_fails ]]; then rm ~/pip_fails; echo "no matching distribution" >&2; exit 1; fi
  cp "$WORLD/dro_jax" "$(dirname "$0")/dro_jax"
fi
"""

# Behaves as the lines in ~/behaviour say.
DRO_JAX = """
if [[ $1 == --version ]]; then echo "dro_jax 0.1.0"; exit; fi
trap 'echo saved; exit 75' TERM
checkpoint() { mkdir -p "$WORLD/bucket/my-bucket/runs/aligned/checkpoint_$1"; }
forever() { while :; do sleep 0.05; done; }
printf '%s\\n' "$*" >>~/commands
source ~/behaviour
"""


def write_command(path: Path, text: str, interpreter: str = "/usr/bin/env bash") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{text}")
    path.chmod(0o755)


class Cloud:
    """The stand-in's world, and the scripts run in it."""

    def __init__(self, world: Path) -> None:
        self.world = world
        write_command(world / "bin" / "gcloud", GCLOUD.read_text(), f"{sys.executable} -IS")
        for name, text in HOST_COMMANDS.items():
            write_command(world / "host_bin" / name, text)
        for name, text in {"uv": UV, "pip": PIP, "dro_jax": DRO_JAX}.items():
            write_command(world / name, text)
        checkout = world / "checkout"
        for name in (
            *["setup.py", "pyproject.toml", "README.md", "dro_jax/__init__.py"],
            *["dro_jax/__pycache__/stale.pyc", "gin_configs/runs/train.gin", "tests/big.json"],
        ):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_text(name)
        (world / "laptop").mkdir()
        self.started: list[subprocess.Popen[bytes]] = []
        self.environment = {
            "HOME": str(world / "laptop"),
            "PATH": f"{world / 'bin'}:/usr/bin:/bin",
            "WORLD": str(world),
            "DRO_JAX_POLL_SECONDS": "0.02",
            "LC_ALL": "C.UTF-8",
        }
        self.settings: dict[str, str | None] = {**SETTINGS, "SOURCE": str(checkout)}
        self.play()

    def play(self, *lives: dict[str, Any], **faults: int) -> None:
        """Says what each TPU that is created will do, one after the other; the last again and again.

        Args:
          lives: `queue`, states of its request, and `node`, states of the TPU; `behaviour`, lines of bash that dro_jax
            runs; `taken_after`, how many looks at the log it lives.
          faults: how often a verb of gcloud fails before it works.
        """
        (self.world / "plan.json").write_text(json.dumps({"lives": lives or ({},)}))
        self.fail(**faults)

    def fail(self, **faults: int) -> None:
        """Has verbs of gcloud fail so many times from now on."""
        for verb, times in faults.items():
            (self.world / f"fails_{verb}").write_text(str(times))

    def make_ready(self, behaviour: str, **faults: int) -> "Cloud":
        """As after create.sh and setup.sh."""
        self.play({"behaviour": behaviour})
        flags = "--project=my-project --zone=us-west4-a --node-id=my-tpu --runtime-version=x"
        create = f"compute tpus queued-resources create my-tpu {flags}".split()
        gcloud = self.world / "bin" / "gcloud"
        subprocess.run([gcloud, *create], env=self.environment, check=True)
        for number in (0, 1):
            folder = self.host(number) / "dro_jax_run"
            write_command(folder / "venv" / "bin" / "dro_jax", DRO_JAX)
            shutil.copy(SCRIPTS / "host.sh", folder)
        self.forget_calls()
        self.fail(**faults)
        return self

    def write_settings(self, **changes: str | None) -> Path:
        """A settings file; None leaves a setting out."""
        self.settings |= changes
        path = self.world / "my.env"
        path.write_text("".join(f"{k}={v}\n" for k, v in self.settings.items() if v is not None))
        return path

    def start(self, script: str, *flags: str) -> subprocess.Popen[bytes]:
        """Starts a script; what it prints goes to files, since a test may read them while it runs."""
        command = [SCRIPTS / f"{script}.sh", f"--settings={self.write_settings()}", *flags]
        with self.printed(script).open("w") as out, self.printed(script, "err").open("w") as err:
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        self.started.append(process)
        return process

    def printed(self, script: str, stream: str = "out") -> Path:
        return self.world / f"{script}.{stream}"

    def finish(
        self, process: subprocess.Popen[bytes], script: str, expect: int
    ) -> subprocess.CompletedProcess[str]:
        """Waits for a script to end, with this exit code."""
        code = process.wait(timeout=120)
        out, err = (self.printed(script, stream).read_text() for stream in ("out", "err"))
        assert code == expect, (out, err)
        return subprocess.CompletedProcess(process.args, code, out, err)

    def run(self, script: str, *flags: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        return self.finish(self.start(script, *flags), script, expect)

    def calls(self) -> list[list[str]]:
        """The arguments of every gcloud call."""
        log = self.world / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def verbs(self) -> list[str]:
        """What was called, in short, and each once where it was repeated."""
        short: list[str] = []
        for call in self.calls():
            command = next((a for a in call if a.startswith("--command=")), "")
            verb = " ".join(call[2:4] if call[0] == "compute" else call[:2])
            verb += f": {command.split()[2]}" if "host.sh" in command else ""
            if short[-1:] != [verb]:
                short.append(verb)
        return short

    def forget_calls(self) -> None:
        (self.world / "calls.jsonl").unlink()

    def host(self, number: int) -> Path:
        return self.world / f"host{number}"

    def await_text(self, path: Path, text: str = "") -> None:
        for _ in range(3000):
            if path.exists() and text in path.read_text():
                return
            time.sleep(0.02)
        raise AssertionError(f"{path} did not come to hold {text!r}")

    def end(self) -> None:
        """Kills what is still running, here and on the hosts, where each run is a session of its own."""
        for process in self.started:
            process.kill()
            process.wait()
        for started in self.world.glob("host*/dro_jax_run/started"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(started.read_text().split()[0]), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end()
