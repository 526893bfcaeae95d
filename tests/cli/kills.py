"""Kills a real training at random moments, over and over, and compares what it ends with.

`python tests/cli/kills.py --kills 100 --seed 0` for as many as one likes; the suite does four. A kill comes while
the program starts, at a step, or in the middle of a save; the same command then goes on. After the last kill
the run is left to finish, and its last checkpoint has to be that of a run that nobody killed, bit for bit.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dro_jax.training import checkpoints

STEPS, SAVED_EVERY = 60, 5
MODEL = {
    "t5.T5Config.vocab_size": 264,
    "t5.T5Config.emb_dim": 16,
    "t5.T5Config.num_heads": 2,
    "t5.T5Config.head_dim": 8,
    "t5.T5Config.mlp_dim": 16,
    "t5.T5Config.num_encoder_layers": 1,
    "t5.T5Config.num_decoder_layers": 1,
    "feedback.FeedbackFile.validation_fraction": 0.2,
    "loop.Periods.log": 1,
    "loop.Periods.checkpoint": SAVED_EVERY,
    "BATCH_SIZE": 4,
    "MAX_EXAMPLES": 2,
    "TRAIN_STEPS": STEPS,
    "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 16},
}


def command(folder: Path, feedback_file: Path) -> list[str]:
    settings = MODEL | {"FEEDBACK_FILE": str(feedback_file), "MODEL_DIR": str(folder)}
    flags = [f"--gin.{name}={value!r}" for name, value in settings.items()]
    program = [sys.executable, "-m", "dro_jax.cli.main", "train", "--gin_file=runs/dro_v_tiny.gin"]
    return program + flags


def environment(work: Path) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        # The same program is compiled again after every kill.
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def write_feedback(path: Path, rows: int = 80) -> None:
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(rows):
            answer = "".join(rng.choice(list("abcd"), rng.integers(1, 7)))
            row = {"prompt": f"{number % 40}: ", "completion": answer, "reward": answer.count("a")}
            file.write(json.dumps(row) + "\n")


def run_and_kill(arguments: list[str], folder: Path, work: Path, rng: np.random.Generator) -> str:
    """Starts the command and kills it; says when it was."""
    with (work / "log").open("wb") as log:
        started = time.monotonic()
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment(work))

        def wait_for(condition) -> bool:
            while process.poll() is None:
                if condition():
                    return True
                time.sleep(0.001)
            return False

        def steps_done() -> int:
            return (work / "log").read_bytes().count(b"\nstep ")

        moment = rng.choice(["start", "step", "save"], p=[0.2, 0.3, 0.5])
        if moment == "start":
            seconds = rng.uniform(0, 12)
            wait_for(lambda: time.monotonic() - started > seconds)
        else:
            wanted = rng.integers(1, 20)
            wait_for(lambda: steps_done() >= wanted)
            if moment == "save":
                wait_for(lambda: any(folder.glob("*tmp*")))
                time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = sorted(path.name for path in folder.glob("*tmp*"))
    return f"{moment}: at step {checkpoints.steps(folder)[-1:] or 0}, left {left or 'nothing'}"


def finish(arguments: list[str], work: Path) -> None:
    done = subprocess.run(arguments, env=environment(work), capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"the command failed: {done.stderr.decode()[-2000:]}")


def kill_repeatedly(work: Path, kills: int, seed: int) -> tuple[dict, dict]:
    """What the last checkpoints of an undisturbed run and of one killed so often hold."""
    rng = np.random.default_rng(seed)
    feedback_file = work / "feedback.jsonl"
    write_feedback(feedback_file)
    undisturbed, killed = work / "undisturbed", work / "killed"
    finish(command(undisturbed, feedback_file), work)
    arguments = command(killed, feedback_file)
    for number in range(kills):
        if checkpoints.steps(killed)[-1:] == [STEPS]:
            # Killed in its last moments: the next kills need something to kill.
            compare(undisturbed, killed)
            killed = work / f"killed-{number}"
            arguments = command(killed, feedback_file)
        print(f"kill {number + 1}: {run_and_kill(arguments, killed, work, rng)}", flush=True)
    finish(arguments, work)
    return compare(undisturbed, killed)


def compare(undisturbed: Path, killed: Path) -> tuple[dict, dict]:
    metas = [checkpoints.read_meta(folder, STEPS) for folder in (undisturbed, killed)]
    facts = [{name: meta[name] for name in ("step", "checksums", "data")} for meta in metas]
    if facts[0] != facts[1]:
        raise SystemExit(f"{killed}: the killed run ended otherwise than the undisturbed one")
    return facts[0], facts[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        kill_repeatedly(Path(work), options.kills, options.seed)
    print(f"{options.kills} kills: the run ended bit for bit as one that nobody killed")


if __name__ == "__main__":
    main()
