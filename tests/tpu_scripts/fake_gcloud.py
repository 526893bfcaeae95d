"""Stands in for `gcloud`: notes its arguments, plays the plan of its $WORLD, and runs ssh commands in local folders.

It refuses what the real one refuses: to create what exists, to look at or delete what does not, to delete a request
that still has its TPU without --force, to ssh to a TPU that is not READY, and arguments it does not know.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

WORLD = Path(os.environ["WORLD"])
HOSTS = 2
FLAGS = {
    "create": {
        "project",
        "zone",
        "accelerator-type",
        "runtime-version",
        "version",
        "node-id",
        "spot",
        "quiet",
    },
    "describe": {"project", "zone", "format"},
    "delete": {"project", "zone", "force", "quiet"},
    "ssh": {"project", "zone", "worker", "command", "ssh-flag", "quiet"},
    "scp": {"project", "zone", "worker", "quiet"},
}


def leave(message: str, code: int = 1) -> None:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(code)


def main(arguments: list[str]) -> None:
    with (WORLD / "calls.jsonl").open("a") as log:
        log.write(json.dumps(arguments) + "\n")
    if arguments[:2] == ["storage", "ls"]:
        return list_bucket(arguments[2])
    assert arguments[:2] == ["compute", "tpus"], arguments
    kind, verb, *rest = arguments[2:]
    flags = dict((a[2:].partition("=")[::2]) for a in rest if a.startswith("--"))
    names = [a for a in rest if not a.startswith("--")]
    if set(flags) - FLAGS[verb]:
        leave(f"unrecognized arguments: {set(flags) - FLAGS[verb]}", 2)
    if not flags.get("project") or not flags.get("zone"):
        leave("project and zone are needed", 2)

    plan = json.loads((WORLD / "plan.json").read_text())
    state_file = WORLD / "state.json"
    state = {"life": -1, "request": None, "tpu": None, "looks": 0}
    if state_file.exists():
        state = json.loads(state_file.read_text())
    if fails(verb):
        leave("UNAVAILABLE: the network is down", 255 if verb == "ssh" else 1)
    try:
        {"create": create, "describe": describe, "delete": delete, "ssh": ssh, "scp": scp}[verb](
            kind, names, flags, plan, state
        )
    finally:
        state_file.write_text(json.dumps(state))


def fails(what: str) -> bool:
    left = WORLD / f"fails_{what}"
    times = int(left.read_text()) if left.exists() else 0
    left.write_text(str(times - 1))
    return times > 0


def life_of(plan, state):
    return plan["lives"][min(state["life"], len(plan["lives"]) - 1)]


def create(kind, names, flags, plan, state):
    if state["request"] or state["tpu"]:
        leave("ALREADY_EXISTS")
    state["life"] += 1
    state["looks"] = 0
    life = life_of(plan, state)
    if kind == "queued-resources":
        assert flags["node-id"] == names[0]
        assert "runtime-version" in flags
        state["request"] = life.get("queue", ["ACTIVE"])
    else:
        assert "version" in flags
        assert "runtime-version" not in flags
    state["tpu"] = life.get("node", ["READY"])
    for number in range(HOSTS):
        home = WORLD / f"host{number}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        (home / "behaviour").write_text(life.get("behaviour", "echo step 1; exit 0"))


def describe(kind, names, flags, plan, state):
    request = kind == "queued-resources"
    states = state["request" if request else "tpu"]
    if not states or (not request and state["request"] and state["request"][0] != "ACTIVE"):
        leave(f"NOT_FOUND: Resource 'projects/my-project/{names[0]}' was not found")
    assert flags["format"] == ("value(state.state)" if request else "value(state)"), flags
    print(states[0])
    if len(states) > 1:
        states.pop(0)


def delete(kind, names, flags, plan, state):
    if kind == "queued-resources":
        if not state["request"]:
            leave("NOT_FOUND")
        if state["tpu"] and state["tpu"][0] == "READY" and "force" not in flags:
            leave("FAILED_PRECONDITION: the request has a TPU")
        state["request"] = None
    elif not state["tpu"]:
        leave("NOT_FOUND")
    state["tpu"] = None
    end_hosts()


def ssh(kind, names, flags, plan, state):
    assert flags["worker"] == "all", flags
    if not state["tpu"] or state["tpu"][0] != "READY":
        leave("the TPU is not ready")
    if "host.sh report" in flags["command"]:
        state["looks"] += 1
        if state["looks"] > life_of(plan, state).get("taken_after", 10**9):
            end_hosts()
            state["tpu"] = ["PREEMPTED"]
            if state["request"]:
                state["request"] = ["SUSPENDING", "SUSPENDED"]
            leave("Connection closed by remote host", 255)
    codes = []
    for number in range(HOSTS):
        home = WORLD / f"host{number}"
        print(f"SSH: Attempting to connect to worker {number}...", file=sys.stderr)
        environment = {
            "HOME": str(home),
            "PATH": f"{WORLD / 'host_bin'}:/usr/bin:/bin",
            "WORLD": str(WORLD),
        }
        # The pipes stand for the connection: like ssh's it lasts as long as anything on the host holds it.
        ended = subprocess.run(
            ["bash", "-c", flags["command"]],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
        )
        sys.stdout.write(ended.stdout)
        sys.stderr.write(ended.stderr)
        codes.append(ended.returncode)
        # A connection that is lost between two hosts.
        if number == 0 and "host.sh start" in flags["command"] and fails("second_host"):
            codes.append(255)
            break
    sys.exit(next((code for code in codes if code), 0))


def scp(kind, names, flags, plan, state):
    assert flags["worker"] == "all", flags
    *sources, target = names
    for number in range(HOSTS):
        folder = WORLD / f"host{number}" / target.partition(":")[2]
        if not folder.is_dir():
            leave(f"scp: {folder}: no such folder")
        for source in sources:
            shutil.copy(source, folder)


def list_bucket(address: str) -> None:
    folder = WORLD / "bucket" / address.removeprefix("gs://")
    if not folder.is_dir():
        leave("One or more URLs matched no objects.")
    for entry in sorted(folder.iterdir()):
        print(f"{address}{entry.name}/")


def end_hosts() -> None:
    for started in WORLD.glob("host*/dro_jax_run/started"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(started.read_text().split()[0]), signal.SIGKILL)


with (WORLD / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    main(sys.argv[1:])
