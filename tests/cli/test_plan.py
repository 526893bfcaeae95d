"""`dro_jax plan`: the real TPU compiler on a tiny model, GPUs by arithmetic, and one line for every mistake."""

import dataclasses
import importlib.util
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from dro_jax.cli import configuration, plan
from dro_jax.data import batches, tasks
from dro_jax.data.feedback import FeedbackFile, RewardStatistics
from dro_jax.data.vocabulary import load_vocabulary
from dro_jax.training import chips
from dro_jax.training.collectives import KINDS

SPREAD = {"Partitioning.data": 1, "Partitioning.fsdp": -1}
STATE = ["policy", "value", "optimizer", "reference"]


@pytest.fixture(scope="module")
def planned(command, train_flags):
    """Plans the tiny DRO-V run; settings as of `train`."""

    def run(*machine, gin_file="runs/dro_v_tiny.gin", **settings):
        _, *flags = train_flags(gin_file, **(SPREAD | settings))
        return command("plan", *machine, *flags)

    return run


def test_a_step_is_compiled_for_tpus_that_are_not_here(planned):
    # Layers in a loop, so that what the compiler does with loops is read too.
    result = planned(
        "--topology=v5e:2x2",
        "--json",
        T5Config__scan_layers=True,
        T5Config__remat="dots",
        T5Config__num_encoder_layers=2,
    )
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert list(found) == [field.name for field in dataclasses.fields(plan.Plan)]
    assert (found["machine"], found["chips"]) == ("v5e:2x2", 4)
    assert found["mesh"] == {"data": 1, "fsdp": 4, "model": 1}
    assert re.fullmatch(r"libtpu [\d.]+", found["compiler"])
    assert found["compile_seconds"] > 0
    assert list(found["memory"]) == [*STATE, "temporaries"]
    assert all(size > 0 for size in found["memory"].values())
    assert sum(found["memory"].values()) < 0.1 * found["usable"]
    assert (found["first_over"], found["change"]) == (None, None)
    sent = {one["kind"]: one for one in found["collectives"]}
    assert set(sent) <= set(KINDS)
    # The seven matrices of a layer of the policy's encoder, forward and backward.
    assert sent["all-gather"]["runs"] > 2 * 2 * 7
    assert sent["all-gather"]["sent"] > 0
    assert found["flops"]["recomputed"] > 0
    assert set(found["seconds"]) == {"arithmetic", "memory", "interconnect"}
    assert all(0 < seconds < 1e-3 for seconds in found["seconds"].values())
    # A TPU that is here would be locked by this.
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert "/tmp/libtpu_lockfile" not in opened


@pytest.mark.parametrize(
    ("topology", "count"),
    [("v4:2x2x1", 4), ("v5p:2x2x2", 8), ("v6e:2x4", 8), ("v5e:1x1", 1), ("v5e:16x16", 256)],
)
def test_the_compiler_knows_the_slices(topology, count):
    os.environ.update(plan._NO_TPU_HERE)
    devices = plan._tpu_devices(chips.tpu_slice(topology))
    assert len(devices) == count
    assert {device.platform for device in devices} == {"tpu"}


def test_gpus_are_planned_by_arithmetic(planned):
    result = planned("--gpus=8xH100", "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert list(found) == [field.name for field in dataclasses.fields(plan.Plan)]
    assert (found["compiler"], found["compile_seconds"], found["first_over"]) == (None, None, None)
    assert list(found["memory"])[:4] == STATE
    assert [one["kind"] for one in found["collectives"]] == [
        "all-gather",
        "reduce-scatter",
        "all-reduce",
    ]


def test_text(planned):
    result = planned("--gpus=1xA100-40", FEEDBACK_FILE=None)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "1xA100-40, mesh data 1 x fsdp 1 x model 1"
    assert lines[1] == "dro_v: 8 rows, 13 + 8 tokens"
    assert lines[2] == "bfloat16, layers unrolled, remat none; reference in memory"
    assert lines[-1].startswith("fits, with ")
    assert max(map(len, lines)) <= 80


@pytest.fixture
def wide(command):
    """Plans DRO-V of a network as wide as XXL, and quicker to lay out."""
    depth = [f"--gin.T5Config.num_{stack}_layers=2" for stack in ("encoder", "decoder")]
    return lambda *flags: command("plan", "--gin_file=runs/dro_v_xxl.gin", *depth, *flags)


@pytest.mark.parametrize(
    "given",
    [
        ["--gpus=1xA100-40"],
        ["--gpus=2xA100-40", "--gin.Partitioning.data=2", "--gin.Partitioning.fsdp=1"],
        ["--gpus=1xH100", "--gin.TASK_FEATURE_LENGTHS={'inputs':512,'targets':2048}"],
        ["--gpus=1xH100", "--gin.T5Config.remat='none'", "--gin.BATCH_SIZE=128"],
    ],
)
def test_what_does_not_fit_is_said_with_the_bindings_to_change(wide, given):
    result = wide(*given)
    assert (result.code, result.err) == (1, "")
    assert result.out.count("does not fit") == 2
    last = result.out.splitlines()[-1]
    found = re.fullmatch(r"does not fit: (.+); should fit: (--gin\..+) \(about (.+)\)", last)
    # It fits, and comes to what was said.
    result = wide(*given, *found[2].replace('"', "").split())
    assert result.code == 0
    assert re.search(rf"memory in all +│ +{found[3]} │", result.out)


def test_where_only_more_chips_help(wide):
    result = wide("--gpus=1xA100-40", "--gin.T5Config.mlp_dim=100000")
    assert result.code == 1
    assert re.search(r"does not fit: .+; should fit: \d+ chips", result.out.splitlines()[-1])


def test_a_program_that_the_compiler_finds_too_large(planned, monkeypatch):
    """The compiler's own words, from a step of 2 GiB more than a v5e has: compiling one takes minutes."""

    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.75G) "
            "exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    result = planned("--topology=v5e:2x2", "--json")
    assert result.code == 1
    found = json.loads(result.out)
    assert sum(found["memory"].values()) == 17.75 * 2**30
    assert (found["first_over"], found["compile_seconds"]) == ("temporaries", None)
    assert found["change"].startswith("--gin.")
    assert found["collectives"][0]["runs"] is None


@pytest.mark.parametrize(
    ("settings", "cached"),
    [
        ({"gin_file": "algorithms/kto.gin", "MAX_EXAMPLES": 3}, False),
        ({"gin_file": "algorithms/kto.gin"}, True),
        ({"gin_file": "algorithms/dro_v.gin", "MAX_EXAMPLES": 4}, True),
        ({"gin_file": "algorithms/dpo.gin"}, False),
    ],
)
def test_batches_are_those_of_training(settings, cached, tmp_path):
    lengths = {"inputs": 7, "targets": 6}
    bindings = [f"MAX_EXAMPLES = {settings.get('MAX_EXAMPLES', 1)}", "BATCH_SIZE = 4"]
    bindings += [f"TASK_FEATURE_LENGTHS = {lengths}", *plan.PLACEHOLDERS]
    bindings += ["CACHE_DIR = 'cache'"] * cached
    files = ["runs/train.gin", "models/tiny.gin", settings["gin_file"]]
    configuration.load(files, bindings)
    work = plan.read_run().work
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{i % 5}", "completion": f"c{i}", "reward": i} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tasks.feedback_task(
        FeedbackFile(str(path), 0.0),
        vocabulary=load_vocabulary(None),
        statistics=RewardStatistics(0.0, 1.0),
        num_input_examples={"train": 20, "validation": 0},
        mismatched=work.needs.mismatched,
        prompt_ids=work.needs.pairs,
    )
    real, _ = next(
        batches.train_batches(task, lengths=lengths, batch_size=4, seed=0, max_examples=work.slots)
    )
    expected = {name: (array.shape, array.dtype) for name, array in real.items()}
    if cached:
        scores = ["reference_log_probs"]
        scores += ["mismatched_reference_log_probs"] if work.needs.mismatched else []
        expected |= {name: ((4, work.slots), np.dtype(np.float32)) for name in scores}
    planned_for = plan.some_batch(work)
    assert {n: (array.shape, array.dtype) for n, array in planned_for.items()} == expected


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (
            "--topology=v5e:3x3",
            "--topology=v5e:3x3: there is no such slice; there are v5e and v6e with 1x1, 2x2",
        ),
        ("--topology=v7:2x2", "--topology=v7:2x2: there is no such slice"),
        ("--topology=v5e", "--topology=v5e: there is no such slice"),
        ("--topology=v4:4x2x2", "--topology=v4:4x2x2: there is no such slice"),
        ("--topology=v5p:0x4x4", "--topology=v5p:0x4x4: there is no such slice"),
        (
            "--gpus=8xB52",
            "--gpus=8xB52: write a number and one of A100-40, A100-80, H100, H200, as in",
        ),
        ("--gpus=H100", "--gpus=H100: write a number"),
        ("--gpus=0xH100", "--gpus=0xH100: write a number"),
        ("--gpus=3xH100", "BATCH_SIZE 8 does not divide into 3 data shards"),
    ],
)
def test_mistakes_are_one_line(planned, machine, message):
    for form in ([], ["--json"]):
        result = planned(machine, *form)
        assert (result.code, result.out) == (2, "")
        (line,) = result.err.splitlines()
        assert line.startswith(f"dro_jax: {message}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"Partitioning.fsdp": 3},
            "mesh {'data': 1, 'fsdp': 3, 'model': 1} does not fit 8 devices",
        ),
        ({"MICROBATCHES": 3}, "BATCH_SIZE 8 does not divide into 8 data shards"),
        ({"MAX_EXAMPLES": 0}, "MAX_EXAMPLES is 0: give a whole number of at least 1"),
        ({"TASK_FEATURE_LENGTHS": {"inputs": 5}}, "TASK_FEATURE_LENGTHS is {'inputs': 5}: write"),
        ({"TRAIN_STEP": 5}, "TRAIN_STEP: nothing in this configuration uses it"),
        ({"T5Config.remat": "some"}, "T5Config.remat is 'some': give one of"),
    ],
)
def test_settings_are_refused_as_in_training(planned, settings, message):
    result = planned("--gpus=8xH100", **settings)
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith(f"dro_jax: {message}")


def test_without_the_compiler(planned, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    result = planned("--topology=v5e:2x2")
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line == (
        "dro_jax: --topology needs the TPU compiler, which runs anywhere: pip install 'dro_jax[tpu]'"
    )


@pytest.mark.parametrize("machine", [[], ["--topology=v5e:2x2", "--gpus=8xH100"]])
def test_one_machine_at_a_time(planned, machine):
    assert planned(*machine).code == 2


@pytest.mark.parametrize(
    ("topology", "links"),
    [
        ("v5e:1x1", 0),
        ("v5e:2x4", 2),
        ("v5e:8x16", 3),
        ("v5e:16x16", 4),
        ("v4:2x2x1", 2),
        ("v4:2x4x4", 3),
        ("v5p:4x4x8", 6),
    ],
)
def test_the_chip_with_the_fewest_neighbours(topology, links):
    machine = chips.tpu_slice(topology)
    assert machine.sends == links * machine.chip.link
