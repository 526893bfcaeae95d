"""gpu_host.sh and slurm.sbatch with stand-ins for dro_jax, uv and Slurm's commands."""

import re
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"


class Machine:
    """A GPU host: its home folder, and gpu_host.sh run in it."""

    def __init__(self, cloud):
        self.cloud = cloud
        self.home = cloud.world / "host0"
        self.home.mkdir()
        self.out = self.home / "out"
        self.environment = cloud.environment | {
            "HOME": str(self.home),
            "PATH": f"{cloud.world / 'host_bin'}:{cloud.environment['PATH']}",
        }

    def start(self, behaviour, *arguments):
        (self.home / "behaviour").write_text(behaviour)
        # A test run in the background of a script has SIGINT ignored, and so would bash.
        script = ["env", "--default-signal=INT", SCRIPTS / "gpu_host.sh"]
        command = [*script, *(arguments or (self.home / "run", "--gin_file=a.gin"))]
        with self.out.open("w") as out:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.home, stdout=out, stderr=out
            )
        self.cloud.started.append(process)
        return process

    def run(self, *arguments, expect):
        assert self.start(*arguments).wait(timeout=120) == expect, self.out.read_text()
        return self.out.read_text()

    def starts(self):
        return (self.home / "commands").read_text().splitlines()


@pytest.fixture
def machine(cloud):
    return Machine(cloud)


def test_a_gpu_host_installs_and_trains(machine):
    machine.run("exit 0", expect=0)
    assert machine.starts() == [f"train --gin_file=a.gin --gin.MODEL_DIR='{machine.home}/run'"]
    assert (
        f"pip install --quiet {SCRIPTS.parent}[cuda]\n" in (machine.home / "installed").read_text()
    )


@pytest.mark.parametrize("code", [2, 75, 130])
def test_a_gpu_host_ends_where_trying_again_is_wrong(machine, code):
    machine.run(f"exit {code}", expect=code)
    assert len(machine.starts()) == 1


def test_a_gpu_host_starts_again_after_crashes(machine):
    # More often than five times, since each start but the last makes a checkpoint.
    behaviour = """
    done=$(ls run | wc -l)
    mkdir -p "run/checkpoint_$((done * 10))"
    ((done == 7)) || exit 1
    """
    (machine.home / "run").mkdir()
    out = machine.run(behaviour, expect=0)
    assert len(machine.starts()) == 8
    assert "exit code 1; restart 1, from step 60" in out


def test_a_gpu_host_gives_up_without_a_new_checkpoint(machine):
    out = machine.run("exit 1", expect=1)
    assert len(machine.starts()) == 6
    assert (
        "gpu_host.sh: exit code 1; giving up: 5 restarts in a row without a new checkpoint" in out
    )


def test_a_gpu_host_sees_checkpoints_in_a_bucket(machine):
    machine.run(
        "checkpoint 10; exit 1", "gs://my-bucket/runs/aligned", "--gin_file=a.gin", expect=1
    )
    assert "from step 10" in machine.out.read_text()
    assert ["storage", "ls", "gs://my-bucket/runs/aligned/"] in machine.cloud.calls()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_a_gpu_host(machine, number):
    process = machine.start("echo step 1; forever")
    machine.cloud.await_text(machine.out, "step 1")
    process.send_signal(number)
    assert process.wait(timeout=20) == 75
    assert machine.out.read_text().endswith("step 1\nsaved\n")
    assert len(machine.starts()) == 1


@pytest.mark.parametrize(
    "arguments", [("--gin_file=a.gin", "x"), ("run",), ("'run'", "--gin_file=a.gin")]
)
def test_gpu_host_without_its_arguments(machine, arguments):
    assert machine.run("exit 0", *arguments, expect=2).startswith(
        "gpu_host.sh: give MODEL_DIR and then"
    )
    assert not (machine.home / "installed").exists()


@pytest.fixture
def slurm(cloud):
    """Runs slurm.sbatch as Slurm would; returns the process, when its task runs if that lasts."""
    commands = {
        "srun": '[[ $1 == --cpus-per-task=8 ]] || exit 9; shift; exec "$@"',
        "squeue": 'echo "$*" >>"$WORLD/asked"; cat "$WORLD/job_state"',
        "scontrol": 'echo "$*" >>"$WORLD/asked"',
        "dro_jax": 'echo "$*" >>"$WORLD/asked"; source "$WORLD/behaviour"',
    }
    for name, text in commands.items():
        path = cloud.world / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    def start(behaviour, state="RUNNING"):
        (cloud.world / "behaviour").write_text(behaviour)
        (cloud.world / "job_state").write_text(state + "\n")
        process = subprocess.Popen(
            [SCRIPTS / "slurm.sbatch", "--gin_file=a.gin"],
            env=cloud.environment | {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8"},
        )
        cloud.started.append(process)
        cloud.await_text(cloud.world / "asked", "train")
        return process

    start.asked = cloud.world / "asked"
    return start


TRAIN = "train --multihost --gin_file=a.gin"
ASK = "--noheader --format=%T --jobs=42"


@pytest.mark.parametrize(
    ("code", "state", "asked"),
    [
        (0, "RUNNING", [TRAIN]),
        (1, "RUNNING", [TRAIN]),
        (2, "RUNNING", [TRAIN]),
        (75, "RUNNING", [TRAIN, ASK, "requeue 42"]),
        (75, "COMPLETING", [TRAIN, ASK]),
    ],
)
def test_slurm_requeues_what_stopped_early_and_was_not_cancelled(slurm, code, state, asked):
    assert slurm(f"exit {code}", state).wait(timeout=20) == code
    assert slurm.asked.read_text().splitlines() == asked


def test_slurm_waits_for_the_tasks_when_it_is_signalled_as_well(slurm):
    process = slurm("sleep 0.5; exit 75")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert "requeue 42" in slurm.asked.read_text()


def test_slurm_reads_its_options(cloud):
    script = (SCRIPTS / "slurm.sbatch").read_text()
    # Slurm stops reading at the first command.
    head, _, rest = script.partition("set -euo pipefail")
    assert "#SBATCH" not in rest
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", head, re.MULTILINE))
    # JAX gives task i of a node its GPU i.
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@300"
    assert "requeue" in options
