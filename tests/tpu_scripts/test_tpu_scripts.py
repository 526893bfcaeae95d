"""The TPU scripts against a stand-in gcloud: commands, waiting, retries, and going on after the TPU is taken away."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
ALL = ("create", "setup", "launch", "follow", "stop", "delete", "run_until_finished")
WHERE = ["--project=my-project", "--zone=us-west4-a"]
SSH = [
    *["compute", "tpus", "tpu-vm", "ssh", "my-tpu", *WHERE, "--worker=all", "--quiet"],
    "--ssh-flag=-oServerAliveInterval=30",
]
TRAIN = (
    "dro_jax train --multihost --gin_file=runs/dro_v_tiny.gin --gin.FEEDBACK_FILE=\"'gs://my-bucket/f.jsonl'\" "
    "--gin.MODEL_DIR=\"'gs://my-bucket/runs/aligned'\""
)


# The linter.


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert shellcheck, "shellcheck is missing: pip install '.[test]'"
    files = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])
    assert len(files) == 11
    checked = subprocess.run(
        [shellcheck, "-x", *files], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")
    for file in files:
        assert "shellcheck disable" not in file.read_text()
        assert os.access(file, os.X_OK) or file.name == "lib.sh"


# Flags and settings.


@pytest.mark.parametrize("script", ALL)
def test_help_is_the_scripts_own_header(cloud, script):
    shown = cloud.run(script, "--help").stdout
    assert f"Usage: {script}.sh" in shown
    assert "set -euo" not in shown
    assert not cloud.calls()


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize("flag", ["--dryrun", "--worker=x"])
def test_unknown_flags_are_refused_before_anything_is_called(cloud, script, flag):
    shown = cloud.run(script, flag, expect=2).stderr
    assert shown.startswith(f"{script}.sh: {flag}: ")
    assert len(shown.splitlines()) == 1
    assert not cloud.calls()


@pytest.mark.parametrize("script", ALL)
def test_a_missing_settings_file(cloud, script):
    shown = cloud.run(script, "--settings=nowhere.env", expect=2).stderr
    assert shown == f"{script}.sh: nowhere.env: no such file\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PROJECT": None}, "PROJECT is not set"),
        ({"MODEL_DIR": ""}, "MODEL_DIR is not set"),
        ({"MODEL_DIR": "out"}, "MODEL_DIR is out: give gs://bucket/folder"),
        ({"MODEL_DIR": "gs://"}, "MODEL_DIR is gs://: give gs://bucket/folder"),
        ({"ZONES": "us-west4-a"}, "ZONES is not a setting"),
        ({"NAME": '"my-tpu"'}, 'NAME is "my-tpu": give lower-case letters'),
        (
            {"PROVISIONING": "preemptible"},
            "PROVISIONING is preemptible: give queued, spot or on-demand",
        ),
        ({"WAIT_HOURS": "1.5"}, "WAIT_HOURS is 1.5: give a whole number"),
        ({"TRAIN_FLAGS": "dro_jax train --gin_file=a.gin"}, "TRAIN_FLAGS is dro_jax train"),
        (
            {"TRAIN_FLAGS": "--gin_file=a.gin --gin.FEEDBACK_FILE=\"'f"},
            "TRAIN_FLAGS is --gin_file=a.gin",
        ),
        (
            {"TRAIN_FLAGS": "--gin_file=a.gin --gin.MODEL_DIR=\"'x'\""},
            "TRAIN_FLAGS is --gin_file=a.gin",
        ),
    ],
)
def test_mistakes_in_the_settings_are_one_line(cloud, changes, message):
    cloud.environment |= {"PROJECT": "from-the-environment"}
    file = cloud.write_settings(**changes)
    shown = cloud.run("run_until_finished", expect=2).stderr
    assert shown.startswith(f"run_until_finished.sh: {file}: {message}")
    assert len(shown.splitlines()) == 1
    assert not cloud.calls()


@pytest.mark.parametrize("source", ["nowhere", str(SCRIPTS), "dro-jax"])
@pytest.mark.parametrize("script", ["setup", "run_until_finished"])
def test_a_source_that_is_none(cloud, script, source):
    cloud.write_settings(SOURCE=source)
    shown = cloud.run(script, expect=2).stderr
    assert f"SOURCE is {source}: give a folder with setup.py" in shown
    assert not cloud.calls()


def test_a_setting_over_several_lines_and_comments(cloud):
    cloud.write_settings(
        TRAIN_FLAGS="--gin_file=a.gin \\\n  --gin.TRAIN_STEPS=7\n\n  # a comment\r"
    )
    printed = cloud.run("launch", "--detach", "--dry_run").stdout
    assert (
        "dro_jax train --multihost --gin_file=a.gin   --gin.TRAIN_STEPS=7 --gin.MODEL_DIR="
        in shlex.split(printed)[-1]
    )


def test_the_shipped_settings_lack_only_what_nobody_else_can_know(cloud):
    shipped = (SCRIPTS / "settings.env").read_text()
    for name in ("PROJECT", "MODEL_DIR", "TRAIN_FLAGS"):
        assert f"\n{name}=\n" in shipped
        shipped = shipped.replace(f"\n{name}=\n", f"\n{name}={cloud.settings[name]}\n")
    filled = cloud.world / "filled.env"
    filled.write_text(shipped)
    assert "v5litepod-16" in cloud.run("create", f"--settings={filled}", "--dry_run").stdout


# create


@pytest.mark.parametrize("accelerator", ["v5litepod-16", "v5litepod-32"])
@pytest.mark.parametrize(
    ("provisioning", "kind", "flags"),
    [
        ("queued", "queued-resources", "--runtime-version=v2-alpha-tpuv5-lite --node-id=my-tpu"),
        (
            "spot",
            "queued-resources",
            "--runtime-version=v2-alpha-tpuv5-lite --node-id=my-tpu --spot",
        ),
        ("on-demand", "tpu-vm", "--version=v2-alpha-tpuv5-lite"),
    ],
)
def test_create(cloud, accelerator, provisioning, kind, flags):
    cloud.write_settings(ACCELERATOR=accelerator, PROVISIONING=provisioning)
    cloud.run("create")
    created = [call for call in cloud.calls() if call[3] == "create"]
    image = [f"--accelerator-type={accelerator}", *flags.split(), "--quiet"]
    assert created == [["compute", "tpus", kind, "create", "my-tpu", *WHERE, *image]]


def test_create_waits_and_says_what_it_waits_for(cloud):
    cloud.play(
        {
            "queue": ["WAITING_FOR_RESOURCES"] * 3 + ["PROVISIONING", "ACTIVE"],
            "node": ["CREATING", "READY"],
        }
    )
    shown = cloud.run("create").stdout
    states = [line.split()[-1] for line in shown.splitlines()[1:]]
    assert states == ["WAITING_FOR_RESOURCES", "PROVISIONING", "CREATING", "READY"]
    again = cloud.run("create").stdout
    assert "my-tpu exists already" in again
    assert sum(call[3] == "create" for call in cloud.calls()) == 1


def test_create_goes_on_waiting_when_gcloud_fails_in_between(cloud):
    cloud.play({"queue": ["WAITING_FOR_RESOURCES"]})
    creating = cloud.start("create")
    cloud.await_text(cloud.printed("create"), "WAITING_FOR_RESOURCES")
    cloud.fail(describe=2)
    cloud.await_text(cloud.printed("create"), "UNKNOWN")
    state = json.loads((cloud.world / "state.json").read_text())
    (cloud.world / "state.json").write_text(json.dumps(state | {"request": ["ACTIVE"]}))
    assert "READY" in cloud.finish(creating, "create", 0).stdout


def test_create_asks_for_nothing_where_gcloud_does_not_answer(cloud):
    cloud.fail(describe=1)
    shown = cloud.run("create", expect=1).stderr
    assert "UNAVAILABLE" in shown
    assert "gcloud does not say whether my-tpu exists" in shown
    assert cloud.verbs() == ["queued-resources describe"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_ends_when_the_request_will_not_be_met(cloud, state):
    cloud.play({"queue": ["ACCEPTED", state]})
    assert (
        f"my-tpu is {state} and will not become ready: run delete.sh"
        in cloud.run("create", expect=1).stderr
    )


def test_create_waits_within_its_bound(cloud):
    cloud.write_settings(WAIT_HOURS="0")
    cloud.play({"queue": ["WAITING_FOR_RESOURCES"]})
    assert "still WAITING_FOR_RESOURCES after 0 hours" in cloud.run("create", expect=3).stderr


def test_create_shows_why_gcloud_refused(cloud):
    cloud.play(create=1)
    shown = cloud.run("create", expect=1).stderr
    assert "UNAVAILABLE" in shown
    assert "my-tpu could not be created" in shown


def test_a_request_whose_tpu_was_deleted_is_not_taken_for_ready(cloud):
    cloud.play({"node": []})
    assert "my-tpu is ACTIVE_WITHOUT_TPU" in cloud.run("create", expect=1).stderr


# setup


def test_setup_installs_the_checkout_on_every_host(cloud):
    cloud.run("create")
    cloud.forget_calls()
    shown = cloud.run("setup").stdout
    folder = f"{cloud.environment['HOME']}/.cache/dro_jax/my-tpu"
    scp = f"compute tpus tpu-vm scp {SCRIPTS}/host.sh {folder}/source.tar.gz my-tpu:dro_jax_run/"
    install = "bash dro_jax_run/host.sh install ./source[tpu] source.tar.gz"
    assert cloud.calls() == [
        [*SSH, "--command=mkdir -p dro_jax_run"],
        [*scp.split(), *WHERE, "--worker=all", "--quiet"],
        [*SSH, f"--command={install}"],
    ]
    assert "w-0| dro_jax 0.1.0\nw-1| dro_jax 0.1.0\n" in shown
    for number in (0, 1):
        home = cloud.host(number)
        assert (home / "installed").read_text().splitlines() == [
            "uv venv --quiet --seed --python 3.12 venv",
            "pip uninstall --quiet --yes dro_jax",
            "pip install --quiet ./source[tpu]",
        ]
        unpacked = home / "dro_jax_run" / "source"
        assert (unpacked / "setup.py").exists()
        assert (unpacked / "gin_configs" / "runs" / "train.gin").exists()
        assert not list(unpacked.rglob("__pycache__"))
        assert not (unpacked / "tests").exists()


def test_what_setup_packs_is_there():
    packed = re.search(r"-czf .*\n +(.*)\n", (SCRIPTS / "setup.sh").read_text())[1].split()
    assert "setup.py" in packed
    for name in packed:
        assert (SCRIPTS.parent / name).exists()


def test_setup_again_takes_new_code_and_keeps_the_environment(cloud):
    cloud.run("create")
    cloud.run("setup")
    stale = cloud.host(0) / "dro_jax_run" / "source" / "stale.py"
    stale.touch()
    cloud.run("setup")
    assert not stale.exists()
    installed = (cloud.host(0) / "installed").read_text()
    assert (installed.count("uv venv"), installed.count("pip install")) == (1, 2)


def test_setup_of_a_pip_requirement(cloud):
    requirement = "dro_jax[tpu] @ git+https://example.com/dro_jax@main"
    cloud.write_settings(SOURCE=requirement)
    cloud.run("create")
    cloud.run("setup")
    assert f"pip install --quiet {requirement}\n" in (cloud.host(1) / "installed").read_text()
    assert not any("source.tar.gz" in word for call in cloud.calls() for word in call)


def test_setup_tries_again_when_ssh_fails(cloud):
    cloud.make_ready("exit 0", ssh=2)
    shown = cloud.run("setup").stderr
    assert "attempt 1 of 5 failed" in shown
    assert "attempt 2 of 5 failed" in shown
    assert cloud.calls()[0] == cloud.calls()[1] == cloud.calls()[2]
    assert len(cloud.calls()) == 5


def test_setup_gives_up_after_five_attempts(cloud):
    cloud.make_ready("exit 0", ssh=100)
    assert "no host of my-tpu answers" in cloud.run("setup", expect=1).stderr
    assert len(cloud.calls()) == 5


def test_setup_shows_what_pip_says_and_tries_again(cloud):
    cloud.make_ready("exit 0")
    (cloud.host(1) / "pip_fails").touch()
    process = cloud.run("setup")
    assert "no matching distribution" in process.stderr
    assert "every host of my-tpu is set up" in process.stdout
    assert (cloud.host(0) / "installed").read_text().count("pip install") == 2


def test_setup_leaves_a_run_alone(cloud):
    cloud.make_ready("echo step 1; forever")
    cloud.run("launch", "--detach")
    assert "w-0: a run is going: stop.sh first" in cloud.run("setup", expect=1).stderr
    assert not (cloud.host(0) / "installed").exists()


# launch, follow, stop


def test_launch_runs_the_command_on_every_host_and_follows_it(cloud):
    cloud.make_ready("echo step 1; sleep 0.2; echo step 2; exit 0")
    shown = cloud.run("launch").stdout
    assert sorted(shown.splitlines()) == [
        "The run is complete: gs://my-bucket/runs/aligned",
        *["w-0| step 1", "w-0| step 2", "w-1| step 1", "w-1| step 2"],
    ]
    starts = [call for call in cloud.calls() if "host.sh start" in call[-1]]
    assert len(starts) == 1
    assert starts[0][:-1] == SSH
    assert starts[0][-1].split(maxsplit=4)[4] == TRAIN
    given = (
        "train --multihost --gin_file=runs/dro_v_tiny.gin --gin.FEEDBACK_FILE='gs://my-bucket/f.jsonl' "
        "--gin.MODEL_DIR='gs://my-bucket/runs/aligned'\n"
    )
    assert [(cloud.host(n) / "commands").read_text() for n in (0, 1)] == [given, given]


@pytest.mark.parametrize(
    ("behaviour", "code", "said"),
    [
        ("exit 0", 0, ""),
        ("echo 'dro_jax: f.jsonl: line 3' >&2; exit 2", 2, "bad input: the line above"),
        ("[[ $HOME == *host0 ]] || exit 1", 1, "The run ended with exit code 1."),
        ("[[ $HOME == *host0 ]] && exit 1; exit 2", 2, "bad input"),
        ("kill -KILL $$", 137, "The run ended with exit code 137."),
        ("kill -KILL $PPID", 1, "The run ended with exit code 1."),
    ],
)
def test_the_runs_exit_code_comes_back(cloud, behaviour, code, said):
    cloud.make_ready(behaviour)
    assert said in cloud.run("launch", expect=code).stderr
    assert said in cloud.run("follow", expect=code).stderr


def test_launch_needs_a_setup(cloud):
    cloud.run("create")
    assert "are not set up: run setup.sh" in cloud.run("launch", expect=1).stderr
    assert "Nothing has been launched" not in cloud.run("follow", "--dry_run").stderr


def test_launch_refuses_a_second_run(cloud):
    cloud.make_ready("forever")
    cloud.run("launch", "--detach")
    shown = cloud.run("launch", expect=2).stderr
    assert "launch.sh: a run is going on my-tpu: follow.sh shows it, stop.sh stops it\n" in shown
    assert (cloud.host(0) / "commands").read_text().count("train") == 1


def test_launch_tried_again_starts_only_the_hosts_that_have_not_started(cloud):
    cloud.make_ready("forever", second_host=1)
    cloud.run("launch", "--detach")
    assert sum("host.sh start" in call[-1] for call in cloud.calls()) == 2
    for number in (0, 1):
        cloud.await_text(cloud.host(number) / "commands")
        assert (cloud.host(number) / "commands").read_text().count("train") == 1


def test_a_run_outlives_the_connection(cloud):
    cloud.make_ready("echo step 1; forever")
    launching = cloud.start("launch")
    cloud.await_text(cloud.printed("launch"), "w-1| step 1")
    launching.kill()
    launching.wait()
    following = cloud.start("follow", "--worker=1")
    cloud.await_text(cloud.printed("follow"), "step 1")
    cloud.run("stop")
    process = cloud.finish(following, "follow", 75)
    assert process.stdout == "step 1\nsaved\n"
    assert "stopped (exit code 75)" in process.stderr


def test_follow_starts_near_the_end_and_loses_and_repeats_no_line(cloud):
    cloud.make_ready("seq 1 60; while [[ ! -e ~/go ]]; do sleep 0.02; done; seq 61 120; exit 0")
    cloud.run("launch", "--detach")
    cloud.await_text(cloud.host(0) / "dro_jax_run" / "log", "60\n")
    following = cloud.start("follow", "--worker=0")
    cloud.await_text(cloud.printed("follow"), "60\n")
    cloud.fail(ssh=2)
    (cloud.host(0) / "go").touch()
    (cloud.host(1) / "go").touch()
    process = cloud.finish(following, "follow", 0)
    *numbers, last = process.stdout.splitlines()
    assert numbers == [str(n) for n in range(11, 121)]
    assert last == "The run is complete: gs://my-bucket/runs/aligned"
    assert "no answer from the hosts; my-tpu is READY" in process.stderr


def test_follow_one_host_that_does_not_exist(cloud):
    cloud.make_ready("forever")
    cloud.run("launch", "--detach")
    assert "my-tpu has no worker 9" in cloud.run("follow", "--worker=9", expect=2).stderr


def test_follow_before_launch(cloud):
    assert (
        "Nothing has been launched on my-tpu"
        in cloud.make_ready("exit 0").run("follow", expect=1).stderr
    )


def test_follow_of_a_tpu_that_is_taken_away(cloud):
    cloud.make_ready("forever")
    cloud.play({"taken_after": 4})
    assert "my-tpu is gone" in cloud.run("launch", expect=69).stderr


def test_follow_waits_while_gcloud_itself_does_not_answer(cloud):
    cloud.make_ready("exit 0")
    cloud.run("launch", "--detach")
    cloud.fail(ssh=12, describe=12)
    assert cloud.run("follow").stderr.count("my-tpu is UNKNOWN") == 12


def test_follow_gives_up_on_hosts_that_never_answer(cloud):
    cloud.make_ready("forever", ssh=1000)
    assert cloud.run("follow", expect=69).stderr.count("my-tpu is READY") == 10


def test_stop_saves_on_every_host(cloud):
    cloud.make_ready("echo step 1; forever")
    cloud.run("launch", "--detach")
    cloud.await_text(cloud.host(1) / "commands")
    assert "stopped (exit code 75); launch.sh goes on" in cloud.run("stop").stderr
    for number in (0, 1):
        folder = cloud.host(number) / "dro_jax_run"
        assert (folder / "exit_code").read_text() == "75\n"
        assert (folder / "log").read_text() == "step 1\nsaved\n"
    # And the next launch is a run of its own.
    cloud.run("launch", "--detach")
    cloud.run("launch", expect=2)


def test_stop_waits_within_its_bound(cloud):
    cloud.make_ready("trap : TERM; forever")
    cloud.run("launch", "--detach")
    cloud.await_text(cloud.host(1) / "commands")
    assert "the run has not stopped; delete.sh ends it" in cloud.run("stop", expect=1).stderr


# delete


def test_delete_takes_the_request_with_its_tpu(cloud):
    cloud.run("create")
    cloud.forget_calls()
    cloud.run("delete", "--yes")
    assert [
        "compute",
        "tpus",
        "queued-resources",
        "delete",
        "my-tpu",
        *WHERE,
        "--force",
        "--quiet",
    ] in cloud.calls()
    assert cloud.verbs() == [
        "queued-resources describe",
        "queued-resources delete",
        "tpu-vm describe",
    ]
    assert "my-tpu is deleted" in cloud.run("delete", "--yes").stdout


def test_delete_finds_a_tpu_of_another_provisioning(cloud):
    cloud.write_settings(PROVISIONING="on-demand")
    cloud.run("create")
    cloud.write_settings(PROVISIONING="spot")
    cloud.run("delete", "--yes")
    assert ["compute", "tpus", "tpu-vm", "delete", "my-tpu", *WHERE, "--quiet"] in cloud.calls()


def test_delete_asks(cloud):
    cloud.run("create")
    cloud.forget_calls()
    assert "my-tpu was not deleted" in cloud.run("delete", expect=1).stderr
    assert not cloud.calls()
    command = [SCRIPTS / "delete.sh", f"--settings={cloud.write_settings()}"]
    subprocess.run(
        command, env=cloud.environment, input="y\n", text=True, check=True, capture_output=True
    )
    assert cloud.verbs()[1] == "queued-resources delete"


def test_delete_tries_again_and_says_what_it_costs_to_fail(cloud):
    cloud.make_ready("forever", delete=2)
    cloud.run("delete", "--yes")
    cloud.make_ready("forever", delete=5)
    assert "may still be there and cost money" in cloud.run("delete", "--yes", expect=1).stderr


# run_until_finished

BEGIN = [
    *["queued-resources create", "queued-resources describe", "tpu-vm describe"],
    *[
        "tpu-vm ssh",
        "tpu-vm scp",
        "tpu-vm ssh: install",
        "tpu-vm ssh: report",
        "tpu-vm ssh: start",
        "tpu-vm ssh: report",
    ],
]
DELETE = ["queued-resources describe", "queued-resources delete", "tpu-vm describe"]


def test_a_run_that_finishes_at_once(cloud):
    cloud.play({"behaviour": "echo step 1; exit 0"})
    shown = cloud.run("run_until_finished").stdout
    assert cloud.verbs() == ["storage ls", "queued-resources describe", *BEGIN, *DELETE]
    assert "w-0| step 1" in shown
    assert "The run is complete: gs://my-bucket/runs/aligned" in shown
    assert json.loads((cloud.world / "state.json").read_text())["request"] is None


def test_a_tpu_taken_away_twice_is_created_again_and_the_run_goes_on(cloud):
    cloud.play(
        {
            "queue": ["WAITING_FOR_RESOURCES", "ACTIVE"],
            "behaviour": "echo one; forever",
            "taken_after": 4,
        },
        {"behaviour": "echo two; checkpoint 10; forever", "taken_after": 4},
        {"behaviour": "echo three; checkpoint 20; exit 0"},
    )
    shown = cloud.run("run_until_finished").stdout
    lines = [line for line in shown.splitlines() if re.match(r"w-\d\| [ot]|restart|The run", line)]
    assert sorted(lines) == [
        *[
            "The run is complete: gs://my-bucket/runs/aligned",
            "restart 1, from step 0",
            "restart 1, from step 10",
        ],
        *["w-0| one", "w-0| three", "w-0| two", "w-1| one", "w-1| three", "w-1| two"],
    ]
    starts = [call[-1].split(maxsplit=4) for call in cloud.calls() if "host.sh start" in call[-1]]
    assert [start[4] for start in starts] == [TRAIN] * 3
    assert len({start[3] for start in starts}) == 3
    lost = ["queued-resources describe", "storage ls", "queued-resources describe"]
    # The taken TPU may be deleted while it is being taken away, or after.
    again = [*lost, "queued-resources delete", "tpu-vm describe", "queued-resources describe"]
    assert cloud.verbs() == [
        "storage ls",
        "queued-resources describe",
        *BEGIN,
        *(again + BEGIN) * 2,
        *DELETE,
    ]


@pytest.mark.parametrize("code", [1, 75])
def test_a_crash_starts_again(cloud, code):
    cloud.play({"behaviour": f"exit {code}"}, {"behaviour": "exit 0"})
    process = cloud.run("run_until_finished")
    assert f"The run ended with exit code {code}." in process.stderr
    assert "restart 1, from step 0" in process.stdout


def test_bad_input_ends_it_at_once_with_the_line_shown(cloud):
    cloud.play({"behaviour": "echo 'dro_jax: f.jsonl: line 3 has no reward' >&2; exit 2"})
    process = cloud.run("run_until_finished", expect=2)
    assert "w-1| dro_jax: f.jsonl: line 3 has no reward" in process.stdout
    assert "bad input: the line above" in process.stderr
    assert cloud.verbs().count("queued-resources create") == 1
    assert cloud.verbs()[-3:] == DELETE


def test_keep_leaves_the_tpu(cloud):
    cloud.play({"behaviour": "exit 2"})
    cloud.run("run_until_finished", "--keep", expect=2)
    assert "queued-resources delete" not in cloud.verbs()


def test_giving_up_without_a_new_checkpoint(cloud):
    cloud.play({"queue": ["FAILED"]})
    process = cloud.run("run_until_finished", expect=1)
    assert cloud.verbs().count("queued-resources create") == 6
    assert (
        "giving up: 5 restarts in a row without a new checkpoint in gs://my-bucket/runs/aligned"
        in process.stderr
    )
    assert "my-tpu is deleted" in process.stdout


@pytest.mark.parametrize("fault", [{"create": 1}, {"ssh": 5}])
def test_a_tpu_that_cannot_be_had_or_set_up_is_tried_again(cloud, fault):
    cloud.play({"behaviour": "exit 0"}, **fault)
    process = cloud.run("run_until_finished")
    assert "restart 1, from step 0" in process.stdout
    assert "The run ended" not in process.stderr


def test_waiting_in_vain_withdraws_the_request(cloud):
    cloud.write_settings(WAIT_HOURS="0")
    cloud.play({"queue": ["WAITING_FOR_RESOURCES"]})
    assert "still WAITING_FOR_RESOURCES" in cloud.run("run_until_finished", expect=1).stderr
    assert cloud.verbs().count("queued-resources create") == 1
    assert json.loads((cloud.world / "state.json").read_text())["request"] is None


def test_stop_ends_it_and_nothing_starts_again(cloud):
    cloud.play({"behaviour": "echo step 1; forever"})
    running = cloud.start("run_until_finished")
    cloud.await_text(cloud.host(1) / "commands")
    cloud.run("stop")
    assert "The run was stopped" in cloud.finish(running, "run_until_finished", 75).stderr
    assert cloud.verbs().count("queued-resources create") == 1


def test_interrupted_it_leaves_the_run_and_takes_it_up_again(cloud):
    cloud.play({"behaviour": "echo step 1; while [[ ! -e ~/go ]]; do sleep 0.05; done; exit 0"})
    running = cloud.start("run_until_finished")
    cloud.await_text(cloud.host(1) / "commands")
    running.send_signal(signal.SIGTERM)
    assert "left as they are" in cloud.finish(running, "run_until_finished", 130).stderr
    assert not (cloud.host(0) / "dro_jax_run" / "exit_code").exists()
    again = cloud.start("run_until_finished")
    cloud.await_text(
        cloud.printed("run_until_finished"), "taking up the run that is going on my-tpu\n"
    )
    (cloud.host(0) / "go").touch()
    (cloud.host(1) / "go").touch()
    cloud.finish(again, "run_until_finished", 0)
    assert cloud.verbs().count("queued-resources create") == 1
    assert sum("host.sh start" in call[-1] for call in cloud.calls()) == 1


# --dry_run


def without_launch_id(call):
    words = call[-1].split(" ")
    if "start" in words:
        words[words.index("start") + 1] = "ID"
    # What has been seen is known only in a real run.
    return [*call[:-1], " ".join(words).partition(" w-0=")[0].strip()]


@pytest.mark.parametrize("provisioning", ["spot", "on-demand"])
def test_dry_run_prints_the_commands_of_the_real_run_and_calls_none(cloud, provisioning):
    cloud.write_settings(PROVISIONING=provisioning)
    cloud.play({"behaviour": "exit 0"})
    printed = {}
    for script in ALL:
        shown = cloud.run(script, "--dry_run").stdout.splitlines()
        printed[script] = [shlex.split(line) for line in shown if line.startswith("gcloud ")]
    assert not cloud.calls()
    assert not (cloud.world / "laptop" / ".cache").exists()
    for script in ALL:
        if script == "run_until_finished":
            cloud.run("delete", "--yes")
            cloud.forget_calls()
        cloud.run(script, *(["--yes"] if script == "delete" else []))
        called = {tuple(without_launch_id(call)) for call in cloud.calls()}
        expected = {tuple(without_launch_id(call[1:])) for call in printed[script]}
        # Of a request that was deleted with its TPU nothing is left to delete.
        spare = {call for call in expected - called if call[3] in ("describe", "delete", "create")}
        assert called <= expected, script
        assert expected - called == spare, script
        cloud.forget_calls()


def test_dry_run_of_everything_is_in_order(cloud):
    shown = cloud.run("run_until_finished", "--dry_run").stdout
    commands = [
        shlex.split(line)
        for line in shown.splitlines()
        if line.startswith(("gcloud", "tar", "mkdir"))
    ]
    short = [
        " ".join(c[3:5]) if c[0] == "gcloud" else c[0] for c in commands if "describe" not in c
    ]
    assert short == [
        *[
            "gs://my-bucket/runs/aligned/",
            "tpu-vm ssh",
            "queued-resources create",
            "mkdir",
            "tar",
            "tpu-vm ssh",
            "tpu-vm scp",
            "tpu-vm ssh",
        ],
        *["tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh", "queued-resources delete", "tpu-vm delete"],
    ]
    assert "complete" not in shown
