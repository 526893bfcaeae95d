"""`dro_jax train` from a feedback file to an aligned policy, on a model of a few thousand parameters."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gin
import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

import dro_jax
from dro_jax.cli import configuration, demo, generate
from dro_jax.cli import train as train_module
from dro_jax.data import demonstration
from dro_jax.data.feedback import read_rows, split_of
from dro_jax.evaluation.enumeration import distance_to_optimum
from dro_jax.networks import T5, ValueNetwork
from dro_jax.training import checkpoints, optimizers, partitioning, processes, train_state
from dro_jax.training.algorithms import DroP, DroV

VALIDATION_FRACTION, TAU, NUM_STEPS = 0.3, 0.5, 6


def scalars(folder):
    """{tag: {step: value}} of a folder of TensorBoard events."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {e.step: float(tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
    }


def whole_state(directory):
    """Every array of a run's newest checkpoint."""
    policy = generate.load_policy(str(directory))
    rules = partitioning.Partitioning()
    layout = train_state.make_layout(
        policy.config,
        optimizers.Adafactor(warmup_steps=2).transforms(),
        has_value=True,
        mesh=rules.mesh(),
        rules=rules,
    )
    return jax.device_get(checkpoints.restore_latest(directory, layout.abstract(), {}))


def values_of(directory, policy, inputs):
    """V of prompts int32 [P, Ti], from a run's newest checkpoint."""
    params = demo.restore_value(directory, DroV(), policy)["value"]
    return np.asarray(ValueNetwork(policy.config).apply({"params": params}, inputs))[:, 0]


def rows_by_split(path):
    rows = {"train": [], "validation": []}
    for row in read_rows(str(path)):
        rows[split_of(row.prompt, VALIDATION_FRACTION)].append(row)
    return rows


def test_sft_leaves_what_it_promises(sft_run):
    names = {path.name for path in sft_run.directory.iterdir()}
    expected = {"checkpoint_4", "checkpoint_6", "config.gin", "reward_statistics.json"}
    assert names == expected | {"train", "training_eval"}
    assert set(scalars(sft_run.directory / "train")["loss/sft"]) == {1, 2, 4, 6}
    assert sft_run.result.err == ""


def test_dro_v_leaves_what_it_promises(dro_v_run):
    directory = dro_v_run.directory
    names = {path.name for path in directory.iterdir()}
    expected = {"checkpoint_4", "checkpoint_6", "reference", "config.gin", "train"}
    assert names == expected | {"training_eval", "reward_statistics.json"}
    assert (directory / "reference" / "checkpoint_0" / "policy").is_dir()
    train = scalars(directory / "train")
    assert set(train["loss/dro"]) == {1, 2, 4, 6}
    promised = """loss loss/dro loss/policy loss/value kl/log_ratio_mean kl/log_ratio_std
        value/explained_variance reward/log_ratio_correlation grad_norm/policy grad_norm/value
        learning_rate/policy learning_rate/value speed/examples_per_second speed/tokens_per_second
        data/padding_fraction"""
    assert set(promised.split()) <= set(train)
    held_out = scalars(directory / "training_eval")
    assert set(held_out["loss/dro"]) == set(held_out["loss/constant"]) == {NUM_STEPS}
    assert "log-ratio at step 0: standard deviation" in dro_v_run.result.out
    assert "held out, step 6" in dro_v_run.result.out
    assert dro_v_run.result.err == ""


def test_the_log_ratio_is_zero_before_the_first_update(dro_v_run):
    train = scalars(dro_v_run.directory / "train")
    assert train["kl/log_ratio_mean"][1] == pytest.approx(0, abs=1e-5)
    assert train["kl/log_ratio_std"][1] == pytest.approx(0, abs=1e-5)


def test_the_reference_is_the_sft_policy_and_the_policy_left_it(sft_run, dro_v_run):
    sft, reference, policy = (
        generate.load_policy(str(directory)).params
        for directory in (
            sft_run.directory,
            dro_v_run.directory / "reference",
            dro_v_run.directory,
        )
    )
    jax.tree.map(np.testing.assert_array_equal, sft, reference)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), reference, policy)
    assert sum(jax.tree.leaves(moved)) > 0.9 * len(jax.tree.leaves(moved))


def test_reward_statistics_are_those_of_the_training_split(dro_v_run, feedback_file):
    statistics = json.loads((dro_v_run.directory / "reward_statistics.json").read_text())
    rows = rows_by_split(feedback_file)
    rewards = np.array([row.reward for row in rows["train"]])
    assert rows["validation"]
    assert statistics["mean"] == pytest.approx(rewards.mean(), rel=1e-12)
    assert statistics["std"] == pytest.approx(rewards.std(), rel=1e-12)
    everything = [row.reward for split in rows.values() for row in split]
    assert statistics["mean"] != pytest.approx(np.mean(everything), rel=1e-6)


def test_no_prompt_is_both_trained_and_evaluated_on(dro_v_run, feedback_file):
    prompts = [
        {
            row.tobytes()
            for batch in batches
            for row, weight in zip(
                batch["encoder_input_tokens"], batch["reward_weights"][:, 0], strict=True
            )
            if weight
        }
        for batches in (dro_v_run.batches[:NUM_STEPS], dro_v_run.batches[NUM_STEPS:])
    ]
    trained, evaluated = prompts
    assert trained
    assert not trained & evaluated
    held_out = rows_by_split(feedback_file)["validation"]
    assert len(evaluated) == len({row.prompt for row in held_out})
    weights = [batch["reward_weights"].sum() for batch in dro_v_run.batches[NUM_STEPS:]]
    assert sum(weights) == len(held_out)


def test_saved_config_is_a_gin_file_that_says_the_same(dro_v_run, sft_run, feedback_file):
    configuration.load([str(dro_v_run.directory / "config.gin")])
    bindings = gin.get_bindings(train_module.train)
    assert bindings["model_dir"] == str(dro_v_run.directory)
    assert bindings["init_checkpoint"] == str(sft_run.directory)
    assert bindings["num_steps"] == NUM_STEPS
    assert bindings["feedback"].path == str(feedback_file)
    assert bindings["feedback"].validation_fraction == VALIDATION_FRACTION
    assert bindings["algorithm"].tau == TAU
    assert bindings["optimizer"].warmup_steps == 2
    assert bindings["periods"].checkpoint == 4
    assert bindings["model"] == generate.load_policy(str(dro_v_run.directory)).config


def test_the_saved_config_is_accepted_in_place_of_the_flags(dro_v_run, command):
    result = command("train", f"--gin_file={dro_v_run.directory / 'config.gin'}")
    assert (result.code, result.err) == (0, "")
    assert "already at step 6 of 6" in result.out


def test_a_finished_command_says_so(dro_v_run, sft_run, train):
    before = sorted(path.name for path in dro_v_run.directory.rglob("*"))
    result = train(MODEL_DIR=str(dro_v_run.directory), INIT_CHECKPOINT=str(sft_run.directory))
    assert (result.code, result.err) == (0, "")
    assert f"{dro_v_run.directory}: already at step 6 of 6" in result.out
    assert sorted(path.name for path in dro_v_run.directory.rglob("*")) == before


def test_stopped_and_resumed_equals_uninterrupted(dro_v_run, sft_run, train, watching, tmp_path):
    settings = {"MODEL_DIR": str(tmp_path / "out"), "INIT_CHECKPOINT": str(sft_run.directory)}
    with watching(interrupt_at=3) as before:
        stopped = train(**settings)
    assert stopped.code == 75
    assert stopped.err.splitlines() == [
        "dro_jax: SIGINT at step 3: saved; the same command goes on from there"
    ]
    assert checkpoints.steps(tmp_path / "out") == [3]
    with watching() as after:
        resumed = train(**settings)
    assert (resumed.code, resumed.err) == (0, "")
    assert "goes on from step 3" in resumed.out

    batches = [*before, *after]
    assert len(batches) == len(dro_v_run.batches)
    for ours, theirs in zip(batches, dro_v_run.batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    state, uninterrupted = whole_state(tmp_path / "out"), whole_state(dro_v_run.directory)
    assert int(state.step) == NUM_STEPS
    assert jax.tree.leaves(state.value)
    jax.tree.map(np.testing.assert_array_equal, state, uninterrupted)
    sums = [
        checkpoints.read_meta(d, 6)["checksums"] for d in (tmp_path / "out", dro_v_run.directory)
    ]
    assert sums[0] == sums[1]
    ours, theirs = (scalars(d / "training_eval") for d in (tmp_path / "out", dro_v_run.directory))
    assert ours == theirs


def test_held_out_metrics_against_numpy(dro_v_run, feedback_file):
    directory = dro_v_run.directory
    statistics = json.loads((directory / "reward_statistics.json").read_text())
    policy = generate.load_policy(str(directory))
    reference = generate.load_policy(str(directory / "reference"))
    rows = rows_by_split(feedback_file)["validation"]
    inputs = np.zeros((len(rows), 13), np.int32)
    targets = np.zeros((len(rows), 8), np.int32)
    for i, row in enumerate(rows):
        for tokens, text in ((inputs, row.prompt), (targets, row.completion)):
            ids = [byte + 3 for byte in text.encode()] + [1]
            tokens[i, : len(ids)] = ids

    def log_probs(params):
        shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        logits = T5(policy.config).apply({"params": params}, inputs, shifted)
        logits = np.asarray(logits, np.float64)
        log_z = np.log(np.exp(logits).sum(axis=-1))
        return np.array(
            [
                sum(logits[i, t, y] - log_z[i, t] for t, y in enumerate(row) if y)
                for i, row in enumerate(targets)
            ]
        )

    log_ratio = log_probs(policy.params) - log_probs(reference.params)
    reward = np.array([(r.reward - statistics["mean"]) / statistics["std"] for r in rows])
    value = values_of(directory, policy, inputs).astype(np.float64)
    residual = reward - value - TAU * log_ratio
    target = reward - TAU * log_ratio
    expected = {
        "loss/dro": (residual**2).mean() / 2,
        "loss/policy": (residual**2).mean() / (2 * TAU),
        "loss/value": (residual**2).mean() / 2,
        "loss/constant": ((reward - reward.mean()) ** 2).mean() / 2,
        "kl/log_ratio_mean": log_ratio.mean(),
        "kl/log_ratio_std": log_ratio.std(),
        "reward/mean": reward.mean(),
        "reward/log_ratio_correlation": np.corrcoef(reward, log_ratio)[0, 1],
        "value/mean": value.mean(),
        "value/explained_variance": 1 - (target - value).var() / target.var(),
    }
    written = scalars(directory / "training_eval")
    assert np.abs(value).max() > 1e-3
    assert log_ratio.std() > 1e-4
    for name, number in expected.items():
        assert written[name][NUM_STEPS] == pytest.approx(number, rel=2e-3, abs=2e-5), name


def test_the_demo_s_measures_against_loops(dro_v_run, sft_run):
    """J, KL, mass and value error of the tiny run, from logits, a prompt at a time."""
    reference, policy = (generate.load_policy(str(r.directory)) for r in (sft_run, dro_v_run))
    prompts = ["ann: d b a c", "cat: a b c d", "fay: c a d b"]
    scores = demo.score_answers(dro_v_run.directory, DroV(tau=0.5), reference, policy, prompts)
    distance = distance_to_optimum(scores, 0.5)

    statistics = json.loads((dro_v_run.directory / "reward_statistics.json").read_text())
    batch = demo.answer_batch(policy, prompts, [demonstration.answers(p) for p in prompts])
    forward = jax.jit(T5(policy.config).apply)
    arguments = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    log_probs = []
    for of in (reference, policy):
        logits = np.asarray(forward({"params": of.params}, *arguments), np.float64)
        tokens = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        targets = batch["decoder_target_tokens"]
        log_probs.append(
            [sum(row[np.arange(8), y]) for row, y in zip(tokens, targets, strict=True)]
        )
    inputs = batch["encoder_input_tokens"][::24]
    values = values_of(dro_v_run.directory, policy, inputs)
    assert values.shape == (3,)

    j = {"start": 0.0, "reached": 0.0, "possible": 0.0}
    masses, errors, kl = [0.0, 0.0], 0.0, 0.0
    for x, prompt in enumerate(prompts):
        raw = [demonstration.reward(prompt, a) for a in demonstration.answers(prompt)]
        reward = [(r - statistics["mean"]) / statistics["std"] for r in raw]
        ref, pol = ([math.exp(v) for v in lp[24 * x : 24 * x + 24]] for lp in log_probs)
        tilted = [p * math.exp(r / 0.5) for p, r in zip(ref, reward, strict=True)]
        v_star = 0.5 * math.log(sum(tilted))
        masses = [masses[0] + sum(ref) / 3, masses[1] + sum(pol) / 3]
        errors += abs(values[x] + 0.5 * math.log(sum(pol)) - v_star) / 3
        ref, pol, best = ([v / sum(p) for v in p] for p in (ref, pol, tilted))
        for name, p in (("start", ref), ("reached", pol), ("possible", best)):
            for a in range(24):
                j[name] += p[a] * (reward[a] - 0.5 * math.log(p[a] / ref[a]))
        kl += sum(p * math.log(p / q) for p, q in zip(pol, best, strict=True)) / 3
    assert distance.reference_mass == pytest.approx(masses[0], rel=1e-3)
    assert distance.policy_mass == pytest.approx(masses[1], rel=1e-3)
    assert distance.value_error == pytest.approx(errors, rel=1e-4)
    assert distance.kl_to_optimum == pytest.approx(kl, rel=1e-4)
    fraction = (j["reached"] - j["start"]) / (j["possible"] - j["start"])
    assert distance.improvement_fraction == pytest.approx(fraction, rel=1e-2, abs=1e-5)


def test_the_value_as_each_algorithm_uses_it(dro_v_run, sft_run):
    reference, policy = (generate.load_policy(str(r.directory)) for r in (sft_run, dro_v_run))
    prompts = ["ann: d b a c", "fay: c a d b"]
    inputs = demo.answer_batch(policy, prompts, [["a"], ["a"]])["encoder_input_tokens"]
    expected = values_of(dro_v_run.directory, policy, inputs)
    assert expected[0] != expected[1]
    multiple, single, per_token, none = (
        demo.score_answers(dro_v_run.directory, algorithm, reference, policy, prompts).value
        for algorithm in (DroV(), DroV(values="single"), DroV(values="per_token"), DroP())
    )
    np.testing.assert_allclose(multiple, expected, rtol=1e-5)
    np.testing.assert_allclose(single, [expected.mean()] * 2, rtol=1e-5)
    # At other positions V has seen letters.
    assert np.all(np.abs(per_token - expected) > 1e-7)
    assert np.all(np.abs(per_token - expected) < 1)
    assert none is None


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(
    train, sft_run, tmp_path, monkeypatch
):
    from dro_jax.training import loop

    original, calls = loop.to_devices, []

    def third_batch_is_broken(batch, sharding):
        calls.append(None)
        if len(calls) == 3:
            batch = batch | {"rewards": np.full_like(batch["rewards"], np.nan)}
        return original(batch, sharding)

    monkeypatch.setattr(loop, "to_devices", third_batch_is_broken)
    result = train(
        MODEL_DIR=str(tmp_path / "out"),
        INIT_CHECKPOINT=str(sft_run.directory),
        loop__Periods__checkpoint=1,
    )
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert re.match(
        r"dro_jax: (loss|grad_norm)\S* is nan at step 3: stopped, .*learning rate", line
    )
    assert checkpoints.steps(tmp_path / "out") == [1, 2]
    # Whole, or this raises.
    state = whole_state(tmp_path / "out")
    assert int(state.step) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert [p.name for p in (tmp_path / "out").iterdir() if "tmp" in p.name] == []


@pytest.mark.usefixtures("damaged_reads")
def test_a_damaged_newest_checkpoint_is_passed_over(dro_v_run, sft_run, train, tmp_path):
    directory = tmp_path / "out"
    shutil.copytree(dro_v_run.directory, directory)
    damage(directory / "checkpoint_6")
    result = train(MODEL_DIR=str(directory), INIT_CHECKPOINT=str(sft_run.directory))
    assert (result.code, result.err) == (0, "")
    assert "warning:" in result.out
    assert "goes on from step 4" in result.out
    assert (directory / "checkpoint_6.damaged").is_dir()
    sums = [checkpoints.read_meta(d, 6)["checksums"] for d in (directory, dro_v_run.directory)]
    assert sums[0] == sums[1]


@pytest.mark.usefixtures("damaged_reads")
@pytest.mark.parametrize("lost", ["damaged", "gone", "another"])
def test_a_reference_that_was_lost_is_made_again(dro_v_run, sft_run, train, tmp_path, lost):
    directory = tmp_path / "out"
    shutil.copytree(dro_v_run.directory, directory)
    shutil.rmtree(directory / "checkpoint_6")
    if lost == "damaged":
        damage(directory / "reference" / "checkpoint_0")
    else:
        shutil.rmtree(directory / "reference")
    if lost == "another":
        shutil.copytree(
            sft_run.directory / "checkpoint_4", directory / "reference" / "checkpoint_0"
        )
    result = train(MODEL_DIR=str(directory), INIT_CHECKPOINT=str(sft_run.directory))
    assert (result.code, result.err) == (0, "")
    said = " ".join(result.out.split())
    assert f"{directory}/reference: was lost, and is copied again from {sft_run.directory}" in said
    assert (directory / "reference" / "checkpoint_0.damaged").is_dir() == (lost != "gone")
    for place, step in (("", 6), ("reference", 0)):
        metas = [checkpoints.read_meta(d / place, step) for d in (directory, dro_v_run.directory)]
        assert metas[0] == metas[1]


def test_an_evaluation_is_in_microbatches_gives_signs_of_life_and_ends_when_asked_to(
    train, sft_run, tmp_path, watching, monkeypatch
):
    alive = []

    @contextlib.contextmanager
    def recorded(seconds):
        yield lambda: alive.append(len(seen))

    monkeypatch.setattr(processes, "ended_when_stalled", recorded)
    settings = {
        "MODEL_DIR": str(tmp_path / "out"),
        "INIT_CHECKPOINT": str(sft_run.directory),
        "BATCH_SIZE": 16,
        "MICROBATCHES": 2,
        "loop__Periods__evaluate": 3,
        "loop__Periods__checkpoint": 100,
    }
    with watching(interrupt_at=4) as seen:
        result = train(**settings)
    assert result.code == 75
    assert "step 3 is not evaluated: asked to stop" in result.out
    assert "held out, step 3" not in result.out
    assert checkpoints.steps(tmp_path / "out") == [3]
    alive.clear()
    with watching() as seen:
        result = train(**settings)
    assert result.code == 0
    assert "held out, step 6" in result.out
    rows = [len(batch["rewards"]) for batch in seen]
    assert rows[:3] == [16] * 3
    assert set(rows[3:]) == {8}
    assert len(rows) > 4
    # After each step, before each batch held out, and before the save.
    assert alive == [1, 2, 3, *range(3, len(rows)), len(rows)]


def test_what_an_earlier_start_left_of_another_vocabulary_is_replaced(train, command, tmp_path):
    pieces = Path(__file__).parents[1] / "interop" / "golden" / "v1_1" / "spiece.model"
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "vocabulary.model").write_bytes(b"of an earlier start")
    settings = {"VOCABULARY_FILE": str(pieces), "t5__T5Config__vocab_size": 512, "TRAIN_STEPS": 1}
    assert train("runs/sft_tiny.gin", MODEL_DIR=str(directory), **settings).code == 0
    assert (directory / "vocabulary.model").read_bytes() == pieces.read_bytes()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    result = command("generate", f"--checkpoint={directory}", f"--prompts={prompts}")
    assert result.code == 0, result.err


def damage(checkpoint):
    """Flips a byte in the middle of every data file of the policy: some files have parts that nobody reads."""
    for path in (checkpoint / "policy").glob("**/d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(bytes(content))


def test_sigint_of_a_real_process(train_flags, feedback_file, command, watching, tmp_path):
    arguments = train_flags(
        "runs/sft_tiny.gin",
        FEEDBACK_FILE=str(feedback_file),
        MODEL_DIR=str(tmp_path / "out"),
        TRAIN_STEPS=1_000_000,
        loop__Periods__checkpoint=1_000_000,
        loop__Periods__log=5,
    )
    root = str(Path(dro_jax.__file__).parent.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "dro_jax.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    try:
        assert process.stdout is not None
        deadline = time.monotonic() + 120
        for line in process.stdout:
            assert time.monotonic() < deadline
            if line.startswith("step 5/"):
                process.send_signal(signal.SIGINT)
                break
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 75, err
    (line,) = err.splitlines()
    assert line.startswith("dro_jax: SIGINT at step ")
    step = int(line.split("at step ")[1].split(":")[0])
    assert step >= 5
    assert checkpoints.steps(tmp_path / "out") == [step]

    with watching(interrupt_at=1):
        again = command(*arguments)
    assert again.code == 75
    assert f"goes on from step {step}" in again.out
    assert checkpoints.steps(tmp_path / "out") == [step, step + 1]


def test_a_real_feedback_file(command, train_flags, tmp_path):
    path = os.environ.get("DRO_JAX_FEEDBACK_FILE")
    if not path:
        pytest.skip("DRO_JAX_FEEDBACK_FILE names no feedback file")
    result = command(
        *train_flags(
            "runs/dro_v_tiny.gin",
            FEEDBACK_FILE=path,
            MODEL_DIR=str(tmp_path / "out"),
            TRAIN_STEPS=2,
            feedback__FeedbackFile__validation_fraction=0.02,
        )
    )
    assert (result.code, result.err) == (0, "")
    assert checkpoints.steps(tmp_path / "out") == [2]
    held_out = scalars(tmp_path / "out" / "training_eval")
    for name in ("loss/dro", "loss/constant"):
        assert np.isfinite(held_out[name][2])
