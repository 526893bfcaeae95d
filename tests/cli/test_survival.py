"""Nothing is lost: kills, full disks, and processes that come, go and hang."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from kills import STEPS, command, environment, kill_repeatedly, write_feedback

from dro_jax.cli import generate
from dro_jax.training import checkpoints


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    write_feedback(work / "feedback.jsonl")
    return work


def test_four_kills_leave_the_run_that_nobody_killed(tmp_path):
    undisturbed, killed = kill_repeatedly(tmp_path, kills=4, seed=3)
    assert undisturbed == killed
    assert killed["step"] == STEPS
    assert set(killed["checksums"]) == {"policy", "value", "optimizer"}


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own takes root to mount")
def test_a_read_only_or_full_disk_is_one_line_and_the_older_checkpoint_goes_on(tmp_path, work):
    disk, script = tmp_path / "disk", tmp_path / "script.sh"
    disk.mkdir()
    program = command(disk / "run", work / "feedback.jsonl")
    # Room for a few checkpoints, of which twelve are kept; then for all.
    script.write_text(
        f'mount -t tmpfs -o size=4M,ro tmpfs "{disk}"\n'
        '"$@" 2> "$0.read_only"; echo $? > "$0.codes"\n'
        f'mount -o remount,rw "{disk}"\n'
        '"$@" --gin.train.train.keep_last=12 2> "$0.stderr"; echo $? >> "$0.codes"\n'
        f'mount -o remount,size=100M "{disk}"; "$@" && echo $? >> "$0.codes"; cp -r "{disk}" "{tmp_path}/kept"\n'
    )
    subprocess.run(
        ["unshare", "-m", "sh", str(script), *program], env=environment(work), check=True
    )
    assert Path(f"{script}.codes").read_text().split() == ["2", "1", "0"]
    message = "cannot be written (Read-only file system); choose another folder"
    assert Path(f"{script}.read_only").read_text().splitlines()[-1].endswith(message)
    (line,) = [
        text for text in Path(f"{script}.stderr").read_text().splitlines() if "dro_jax" in text
    ]
    assert "a checkpoint cannot be written (No space left on device); the checkpoint of " in line
    assert "Traceback" not in Path(f"{script}.stderr").read_text()
    assert checkpoints.read_meta(tmp_path / "kept/run", STEPS)["step"] == STEPS


class Pair:
    """Two processes of two devices each that train together."""

    def __init__(self, work: Path, folder: Path, *extra: str, others: tuple[str, ...] = ()) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.outputs = [work / f"{folder.name}.{number}.log" for number in range(2)]
        self.processes = []
        for number in range(2):
            joined = f"--coordinator_address=localhost:{port}", "--num_processes=2"
            arguments = [*extra, *(others if number else ()), *joined, f"--process_id={number}"]
            with self.outputs[number].open("wb") as log:
                process = subprocess.Popen(
                    recorded(work, folder, *arguments),
                    stdout=log,
                    stderr=log,
                    env=environment(work)
                    | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
                )
            self.processes.append(process)

    def wait(self) -> list[int]:
        return [process.wait(240) for process in self.processes]

    def text(self, number: int = 0) -> str:
        return self.outputs[number].read_text()

    def wait_for(self, text: str) -> None:
        while text not in self.text():
            assert self.processes[0].poll() is None, self.text()
            time.sleep(0.05)


JUDGE = """
import json, os, pathlib

def judge(prompts, answers):
    folder = pathlib.Path(__file__).parent
    with open(folder / "asked", "a") as file:
        file.write(f"{os.getpid()}\\n")
    answered = {path.name.split("_")[1]: path for path in folder.glob("judged/side_by_side/step_*")}
    if sorted(answered) == ["2", "4"]:
        raise ValueError("out of order")
    # Step 2 wins.
    rows = answered["2"].read_text().splitlines() if list(answered) == ["2"] else []
    liked = {json.loads(row)["completion"] for row in rows}
    return [sum(map(ord, answer)) % 7 + 10 * (answer in liked) for answer in answers]
"""


def test_two_processes_keep_the_checkpoint_that_wins_most(work, monkeypatch):
    folder = work / "judged"
    (work / "judge_of_two.py").write_text(JUDGE)
    monkeypatch.setenv("PYTHONPATH", str(work), prepend=os.pathsep)
    pair = Pair(
        work,
        folder,
        "--gin.JUDGE='reward:judge_of_two:judge'",
        "--gin.win_rates.WinRate.prompts=5",
        "--gin.loop.Periods.evaluate=2",
        "--gin.loop.Periods.checkpoint=2",
        "--gin.feedback.FeedbackFile.validation_fraction=0.2",
        "--gin.TRAIN_STEPS=6",
        "--gin.train.train.keep_last=1",
    )
    assert pair.wait() == [0, 0], pair.text() + pair.text(1)
    # The others are told.
    assert set((work / "asked").read_text().split()) == {str(pair.processes[0].pid)}
    assert "no win rate of step 4, and training goes on" in " ".join(pair.text().split())
    assert "raised ValueError: out of order" in pair.text()
    assert checkpoints.steps(folder) == [2, 6]
    assert checkpoints.find(folder / "best") == (folder, 2)
    # All of them sample what one would.
    policy = generate.load_policy(str(folder / "best"))
    (path,) = (folder / "side_by_side").glob("step_2_*")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    decoding = generate.Decoding(policy.lengths["targets"])
    prompts = [row["prompt"] for row in rows]
    expected = generate.complete(policy, prompts, decoding, seed=1, batch_size=32)
    assert [row["completion"] for row in rows] == [completion.text for completion in expected]


def recorded(work: Path, folder: Path, *extra: str) -> list[str]:
    """The command, writing what every step is given to `<folder>.rows`."""
    program = command(folder, work / "feedback.jsonl")
    script = str(Path(__file__).with_name("recorded.py"))
    everything = "--gin.feedback.FeedbackFile.validation_fraction=0.0"
    return [program[0], script, f"{folder}.rows", *program[3:], everything, *extra]


def rows(folder: Path) -> list[str]:
    """Each row that a step was given, with its step."""
    return [
        row
        for path in folder.parent.glob(f"{folder.name}.rows.*")
        for row in path.read_text().splitlines()
    ]


def test_one_then_two_then_one_process_are_given_what_one_alone_is(work):
    folder, alone = work / "changing", work / "alone"
    subprocess.run(recorded(work, alone), env=environment(work), check=True)
    subprocess.run(
        recorded(work, folder, "--gin.TRAIN_STEPS=17"), env=environment(work), check=True
    )
    pair = Pair(work, folder)
    pair.wait_for("step 29/")
    # A notice to one of them is heard by both.
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [75, 75], pair.text() + pair.text(1)
    assert "saved; the same command goes on from there" in pair.text()
    assert pair.text(1).count("step") <= 1
    stopped = checkpoints.steps(folder)[-1]
    assert 29 <= stopped < STEPS
    subprocess.run(recorded(work, folder), env=environment(work), check=True)
    # Rows of a packed epoch are others than the file's, so that the whole stream is compared, in order.
    assert len(rows(alone)) == 4 * STEPS
    assert sorted(rows(folder)) == sorted(rows(alone))


@pytest.mark.parametrize(
    ("blow", "codes", "line"),
    [
        (signal.SIGSTOP, (70,), "dro_jax: nothing has happened for 45 seconds: ended; the same"),
        (signal.SIGKILL, (1, 70, -signal.SIGABRT), "dro_jax: "),
    ],
)
def test_a_process_that_hangs_or_dies_ends_the_others_soon(blow, codes, line, work):
    folder = work / f"hit-{int(blow)}"
    pair = Pair(work, folder, "--gin.train.train.stall_seconds=45", "--gin.TRAIN_STEPS=100000")
    pair.wait_for("step 12/")
    pair.processes[1].send_signal(blow)
    began = time.monotonic()
    assert pair.processes[0].wait(100) in codes, pair.text()
    assert time.monotonic() - began < 90
    assert line in pair.text()
    pair.processes[1].kill()
    pair.processes[1].wait()
    assert checkpoints.steps(folder)


@pytest.mark.parametrize(
    ("difference", "line"),
    [
        ("--gin.BATCH_SIZE=8", "process 1 was started with another configuration than process 0"),
        ("--gin.BATCH_SIZ=8", "dro_jax: BATCH_SIZ: nothing in this configuration uses it"),
    ],
)
def test_processes_of_different_configurations_say_so_all_alike(difference, line, work):
    folder = work / f"differing-{len(difference)}"
    pair = Pair(work, folder, others=(difference,))
    assert pair.wait() == [2, 2]
    lines = [
        [line for line in pair.text(number).splitlines() if line.startswith("dro_jax:")]
        for number in range(2)
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1
    assert line in lines[0][0]
    assert not folder.exists()


def test_two_processes_make_the_cache_that_one_makes(work):
    """Their scores differ in the last digits at most, as the reference's rows are cut otherwise."""
    made = {}
    settings = "--gin.MAX_EXAMPLES=1", "--gin.BATCH_SIZE=4"
    sft = work / "sft"
    arguments = command(sft, work / "feedback.jsonl")
    arguments = [text.replace("dro_v_tiny", "sft_tiny") for text in arguments]
    subprocess.run([*arguments, "--gin.TRAIN_STEPS=3"], env=environment(work), check=True)
    for count in (1, 2):
        folder = work / f"cache-{count}"
        cached = *settings, f"--gin.CACHE_DIR='{folder}'", f"--gin.INIT_CHECKPOINT='{sft}'"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        joined = f"--coordinator_address=localhost:{port}", f"--num_processes={count}"
        program = command(work / "unused", work / "feedback.jsonl")
        program[3] = "cache"
        started = [
            subprocess.Popen(
                [*program, *cached, *joined, f"--process_id={number}"], env=environment(work)
            )
            for number in range(count)
        ]
        assert [process.wait(240) for process in started] == [0] * count
        made[count] = read_scores(folder)
    assert len(made[1]) > 50
    np.testing.assert_allclose(made[2], made[1], rtol=1e-5)
    assert np.ptp(made[1]) > 1


def read_scores(folder: Path) -> list[float]:
    records = tf.data.TFRecordDataset(str(folder / "feedback/train.tfrecord-00000-of-00001"))
    return [
        tf.train.Example.FromString(record.numpy())
        .features.feature["reference_log_probs"]
        .float_list.value[0]
        for record in records
    ]
