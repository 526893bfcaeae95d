"""`dro_jax train` by the methods that want more of the data or the network than DRO-V does."""

import json

import numpy as np
import pytest

from dro_jax.cli import generate
from dro_jax.cli.run_data import check_pairs
from dro_jax.data.feedback import FeedbackFile, read_rows, split_of, summarise
from dro_jax.training import checkpoints
from dro_jax.training.algorithms import Kto

FRACTION = 0.3
ONE_DEVICE = {"partitioning__Partitioning__model": 8}


@pytest.fixture
def run(command, train_flags, feedback_file, sft_run, watching, tmp_path):
    """Trains a method for two steps from the SFT run; returns what it printed and its batches."""

    def call(name, **settings):
        defaults = {
            "FEEDBACK_FILE": str(feedback_file),
            "MODEL_DIR": str(tmp_path / "out"),
            "INIT_CHECKPOINT": str(sft_run.directory),
            "TRAIN_STEPS": 2,
        }
        if name.startswith("sft"):
            defaults["TAU"] = None
        run, *flags = train_flags("runs/dro_v_tiny.gin", **(defaults | settings))
        with watching() as batches:
            result = command(run, flags[0], f"--gin_file=algorithms/{name}.gin", *flags[1:])
        return result, batches

    return call


def rows_by_split(path):
    rows = {"train": [], "validation": []}
    for row in read_rows(str(path)):
        rows[split_of(row.prompt, FRACTION)].append(row)
    return rows


def texts(tokens):
    return [bytes(t - 3 for t in row if t > 1).decode() for row in tokens]


def test_kto_gets_each_completion_with_another_prompt(run, feedback_file):
    result, batches = run("kto")
    assert (result.code, result.err) == (0, "")
    assert "z0 0" in result.out
    offsets = {
        split: set(range(1, len(rows))) for split, rows in rows_by_split(feedback_file).items()
    }
    for number, batch in enumerate(batches):
        split = "train" if number < 2 else "validation"
        rows = rows_by_split(feedback_file)[split]
        places = {(row.prompt, row.completion): i for i, row in enumerate(rows)}
        real = batch["reward_weights"][:, 0] > 0
        names = ("encoder_input_tokens", "decoder_target_tokens")
        triplets = [texts(batch[name][real]) for name in (*names, f"mismatched_{names[1]}")]
        assert triplets[0]
        for prompt, answer, other in zip(*triplets, strict=True):
            place = places[prompt, answer]
            offsets[split] &= {
                (i - place) % len(rows) for i, row in enumerate(rows) if row.completion == other
            }
    # One offset explains every row of a split, and nobody is given an answer to the own prompt.
    for split, rows in rows_by_split(feedback_file).items():
        (offset,) = offsets[split]
        partners = [*rows[offset:], *rows[:offset]]
        assert all(a.prompt != b.prompt for a, b in zip(rows, partners, strict=True))


@pytest.mark.parametrize("name", ["dpo", "dro_two_sample"])
def test_pairs_are_two_completions_of_one_prompt(name, run):
    result, batches = run(name)
    assert (result.code, result.err) == (0, "")
    assert "held out, step 2" in result.out
    for batch in batches:
        assert "prompt_ids" not in batch
        prompts = texts(batch["encoder_input_tokens"])
        assert prompts[0::2] == prompts[1::2]
        weights = batch["reward_weights"].reshape(-1, 2)
        assert np.array_equal(weights[:, 0], weights[:, 1])
    assert len(set(texts(batches[0]["encoder_input_tokens"]))) == 4


def test_filtered_sft_trains_on_the_best_rows_and_evaluates_on_all(run, feedback_file):
    result, batches = run("sft_filtered", TRAIN_STEPS=6, TOP_FRACTION=0.2)
    assert (result.code, result.err) == (0, "")
    rows = rows_by_split(feedback_file)
    rewards = sorted((row.reward for row in rows["train"]), reverse=True)
    lowest = rewards[int(np.ceil(0.2 * len(rewards))) - 1]
    best = {row.completion for row in rows["train"] if row.reward >= lowest}
    assert len(best) < len(rows["train"]) / 2
    kept = sum(reward >= lowest for reward in rewards)
    assert f"trained on: the {kept} rows with a reward of at least {lowest:g}" in result.out
    trained = {text for batch in batches[:6] for text in texts(batch["decoder_target_tokens"])}
    assert trained == best
    assert sum(batch["reward_weights"].sum() for batch in batches[6:]) == len(rows["validation"])


def test_a_single_net_trains_generates_and_is_no_reference_of_others(run, command, tmp_path):
    result, _ = run("dro_v_single_net")
    assert (result.code, result.err) == (0, "")
    directory = tmp_path / "out"
    assert "value" not in checkpoints.read_meta(directory, 2)["checksums"]
    assert generate.load_policy(str(directory)).config.reserved_entry
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ann: d b a c\n")
    output = tmp_path / "completions.jsonl"
    flags = [f"--checkpoint={directory}", f"--prompts={prompts}", f"--output={output}"]
    assert command("generate", *flags).code == 0
    assert json.loads(output.read_text())["prompt"] == "ann: d b a c"

    again, _ = run("dro_v_single_net")
    assert (again.code, again.err) == (0, "")
    other = {"MODEL_DIR": str(tmp_path / "other"), "INIT_CHECKPOINT": str(directory)}
    refused, _ = run("dro_v", **other)
    assert refused.code == 2
    assert "this checkpoint has another reserved_entry (True there, False here)" in refused.err
    assert not (tmp_path / "other").exists()
    resumed, _ = run("dro_v")
    assert resumed.code == 2
    assert "another reserved_entry (True there, False here)" in resumed.err
    # From one single net to the next.
    assert run("dro_v_single_net", **other)[0].code == 0


def test_a_vocabulary_that_leaves_no_entry_for_the_value_is_refused(run, tmp_path):
    result, _ = run("dro_v_single_net", INIT_CHECKPOINT=None, t5__T5Config__vocab_size=259)
    assert result.code == 2
    assert "vocab_size is 259, the last of which is the value; give" in result.err
    assert not (tmp_path / "out").exists()


def test_pairs_want_even_batches_and_prompts_with_two_completions(run, tmp_path):
    odd, _ = run("ipo", BATCH_SIZE=7, **ONE_DEVICE)
    assert odd.code == 2
    assert "of pairs: choose a multiple of 2" in odd.err
    halves, _ = run("ipo", BATCH_SIZE=6, MICROBATCHES=2, **ONE_DEVICE)
    assert halves.code == 2
    assert (
        "1 data shards (mesh axes data x fsdp) of pairs in 2 microbatches: choose a multiple of 4"
        in halves.err
    )
    packed, _ = run("ipo", MAX_EXAMPLES=4)
    assert packed.code == 2
    assert "MAX_EXAMPLES is 4: this method takes completions two by two, which" in packed.err
    lonely = tmp_path / "lonely.jsonl"
    lonely.write_text(
        "".join(
            json.dumps({"prompt": f"p{i}", "completion": "c", "reward": i}) + "\n" for i in range(9)
        )
    )
    alone, _ = run("slic", FEEDBACK_FILE=str(lonely))
    assert alone.code == 2
    assert f"{lonely}: no training prompt has two completions, which this method" in alone.err
    assert not (tmp_path / "out").exists()


def test_kto_says_that_batches_of_one_have_no_partner(caplog, feedback_file):
    summary = summarise(FeedbackFile(str(feedback_file)))
    check_pairs(Kto().needs, 2, 1, summary)
    assert not caplog.messages
    check_pairs(Kto().needs, 1, 1, summary)
    (message,) = caplog.messages
    assert message == "batches of one have no mismatched response: KTO's z0 is 0 throughout"


@pytest.mark.parametrize("name", ["dro_v", "kto"])
def test_packed_rows_train_and_evaluate(name, run, feedback_file):
    lengths = {"inputs": 40, "targets": 24}
    result, batches = run(name, MAX_EXAMPLES=3, TASK_FEATURE_LENGTHS=lengths)
    assert (result.code, result.err) == (0, "")
    assert batches[0]["rewards"].shape == (8, 3)
    assert batches[0]["reward_weights"].sum() > 16
    assert "held out, step 2" in result.out
    held_out = sum(batch["reward_weights"].sum() for batch in batches[2:])
    assert held_out == len(rows_by_split(feedback_file)["validation"])
