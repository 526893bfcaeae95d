"""The SeqIO task: tokens as the encoders give them, normalised rewards, limits; the converter."""

import dataclasses
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

from dro_jax.data import feedback, tasks
from dro_jax.data.feature_converter import FeedbackFeatureConverter
from dro_jax.data.feedback import FeedbackFile, RewardStatistics
from dro_jax.data.packing import fill_rows
from dro_jax.data.vocabulary import encode_completion, encode_prompt, load_vocabulary
from dro_jax.errors import UsageError

TEXTS = [
    "the quick brown fox",
    "ünïcode 👍 日本",
    "a\x00b\x00",
    "  spaces  around ",
    "line\nbreak\tand tab",
    "</s> <pad> <unk> <extra_id_0>",
    "\u200b",
    "a",
    "dog " * 40,
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": prompt, "completion": completion, "reward": 1e9 + 0.25 * (i % 7)}
        for i, (prompt, completion) in enumerate((p, c) for p in TEXTS for c in TEXTS)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return FeedbackFile(str(path), validation_fraction=0.3)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_task_gives_what_the_encoders_give(file, kind, split, sentencepiece_path):
    vocabulary = load_vocabulary(sentencepiece_path if kind == "sentencepiece" else None)
    statistics = feedback.summarise(file).rewards
    task = tasks.feedback_task(file, vocabulary=vocabulary, statistics=statistics)
    lengths = {"inputs": 19, "targets": 12}
    triplets = list(feedback.read_feedback(file, split))
    examples = list(task.get_dataset(lengths, split, shuffle=False).as_numpy_iterator())
    assert len(examples) == len(triplets) > 0
    for example, triplet in zip(examples, triplets, strict=True):
        assert set(example) == {"inputs", "targets", "rewards"}
        assert example["inputs"].tolist() == encode_prompt(vocabulary, triplet.prompt, 19)
        assert example["targets"].tolist() == encode_completion(vocabulary, triplet.completion, 12)
        assert example["inputs"].dtype == example["targets"].dtype == np.int32
        expected = np.float32([(triplet.reward - statistics.mean) / statistics.std])
        np.testing.assert_array_equal(example["rewards"], expected, strict=True)


def test_task_without_limits_cuts_nothing(file):
    task = tasks.feedback_task(
        file, vocabulary=load_vocabulary(None), statistics=RewardStatistics(0.0, 1.0)
    )
    examples = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    assert max(len(example["targets"]) for example in examples) == 161
    assert all(example["targets"][-1] == 1 for example in examples)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_only_the_best_training_rows_and_all_validation_rows(file, split):
    file = dataclasses.replace(file, top_fraction=0.4)
    summary = feedback.summarise(file)
    task = tasks.feedback_task(
        file,
        vocabulary=load_vocabulary(None),
        statistics=summary.rewards,
        min_reward=summary.top_reward,
    )
    examples = list(task.get_dataset(None, split, shuffle=False).as_numpy_iterator())
    rewards = [row.reward for row in feedback.read_feedback(file, split)]
    if split == "train":
        assert min(rewards) < summary.top_reward in rewards
        rewards = [reward for reward in rewards if reward >= summary.top_reward]
    assert len(rewards) == summary.num_input_examples[split]
    expected = np.float32([summary.rewards.normalise(reward) for reward in rewards])
    np.testing.assert_array_equal(np.concatenate([e["rewards"] for e in examples]), expected)


def test_overlong_texts_are_counted_and_dropped_on_demand(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [("p" * n, "c" * m, m) for n in (3, 4, 5) for m in (1, 2, 3, 4)]
    path.write_text(
        "\n".join(json.dumps({"prompt": p, "completion": c, "reward": r}) for p, c, r in rows)
    )
    file = FeedbackFile(str(path), validation_fraction=0)
    vocabulary, lengths = load_vocabulary(None), {"inputs": 5, "targets": 3}
    counts = tasks.count_overlong(file, vocabulary=vocabulary, lengths=lengths)
    assert counts == tasks.OverlongCounts(rows=12, prompts=4, completions=6)
    assert counts.describe() == (
        "of 12 rows 4 prompts are cut to the length limit and 6 completions cut"
    )
    assert counts.describe(drop_overlong=True).endswith("6 completions dropped")

    def targets(drop_overlong):
        task = tasks.feedback_task(
            file,
            vocabulary=vocabulary,
            statistics=RewardStatistics(0.0, 1.0),
            drop_overlong=drop_overlong,
        )
        dataset = task.get_dataset(lengths, "train", shuffle=False)
        return [example["targets"].tolist() for example in dataset.as_numpy_iterator()]

    c = ord("c") + 3
    assert targets(False) == [[c, 1], [c, c, 1], [c, c, c], [c, c, c]] * 3
    assert targets(True) == [[c, 1], [c, c, 1]] * 3

    options = {"vocabulary": vocabulary, "lengths": {"inputs": 5, "targets": 1}}
    assert tasks.count_overlong(file, **options).completions == 12
    with pytest.raises(UsageError, match="no training row has a completion within 1 tokens; raise"):
        tasks.count_overlong(file, **options, drop_overlong=True)


def test_source_is_a_seqio_source(file):
    task = tasks.feedback_task(
        file,
        vocabulary=load_vocabulary(None),
        statistics=RewardStatistics(0.0, 1.0),
        num_input_examples={"train": 60, "validation": 21},
        name="named",
    )
    assert isinstance(task, seqio.Task)
    assert task.name == "named"
    assert tuple(task.splits) == ("train", "validation")
    assert task.num_input_examples("validation") == 21
    assert task.source.list_shards("train") == [file.path]
    assert task.supports_caching
    with pytest.raises(ValueError, match="one stream cannot be read as 2 shards"):
        task.source.get_dataset("train", shard_info=seqio.ShardInfo(0, 2))


def test_converter_by_hand():
    example = {
        "inputs": np.int32([7, 8, 1]),
        "targets": np.int32([3, 9, 1]),
        "rewards": np.float32([-0.75]),
    }
    cut = {
        "inputs": np.int32([7, 8, 5, 1]),
        "targets": np.int32([4, 4, 4, 4, 4]),
        "rewards": np.float32([0.0]),
    }
    dataset = tf.data.Dataset.from_generator(
        lambda: [example, cut],
        output_signature={
            name: tf.TensorSpec([1 if name == "rewards" else None], array.dtype)
            for name, array in example.items()
        },
    )
    lengths = {"inputs": 4, "targets": 5, "rewards": 1}
    first, second = FeedbackFeatureConverter()(dataset, lengths).as_numpy_iterator()
    expected = {
        "encoder_input_tokens": np.int32([7, 8, 1, 0]),
        "decoder_input_tokens": np.int32([0, 3, 9, 1, 0]),
        "decoder_target_tokens": np.int32([3, 9, 1, 0, 0]),
        "decoder_loss_weights": np.int32([1, 1, 1, 0, 0]),
        "rewards": np.float32([-0.75]),
        "reward_weights": np.float32([1]),
    }
    assert set(first) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(first[name], array, strict=True)
    expected = {
        "encoder_input_tokens": np.int32([7, 8, 5, 1]),
        "decoder_input_tokens": np.int32([0, 4, 4, 4, 4]),
        "decoder_target_tokens": np.int32([4, 4, 4, 4, 4]),
        "decoder_loss_weights": np.int32([1, 1, 1, 1, 1]),
        "rewards": np.float32([0]),
        "reward_weights": np.float32([1]),
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(second[name], array, strict=True)


CONVERTED = {
    "inputs": [[7, 8, 1], [6, 1], [5, 1]],
    "targets": [[3, 9, 1], [4, 1], [4, 4, 4, 1]],
    "mismatched_targets": [[4, 1], [4, 4, 4, 1], [3, 9, 1]],
    "rewards": [[-0.75], [0.0], [2.0]],
    "reference_log_probs": [[-1.5], [-2.5], [-3.5]],
    "mismatched_reference_log_probs": [[-4.0], [-5.0], [-6.0]],
}


@pytest.mark.parametrize("max_examples", [1, 2])
def test_converter_gives_the_rows_of_training(max_examples):
    """Packed or not, with another prompt's completions and cached log-probabilities."""
    examples = [
        {
            name: np.array(
                values[i], np.int32 if "targets" in name or name == "inputs" else np.float32
            )
            for name, values in CONVERTED.items()
        }
        for i in range(3)
    ]
    dataset = tf.data.Dataset.from_generator(
        lambda: examples,
        output_signature={
            name: tf.TensorSpec([None], array.dtype) for name, array in examples[0].items()
        },
    )
    lengths = {"inputs": 5, "targets": 6, "mismatched_targets": 6}
    per_example = dict.fromkeys(list(CONVERTED)[3:], max_examples)
    converter = FeedbackFeatureConverter(pack=max_examples > 1, mismatched=True, cached=True)
    got = list(converter(dataset, {**lengths, **per_example}).as_numpy_iterator())
    rows = [[0], [1], [2]] if max_examples == 1 else [[1, 0], [2]]
    expected = fill_rows(
        [[examples[i] for i in row] for row in rows],
        lengths={"inputs": 5, "targets": 6},
        max_examples=max_examples,
    )
    assert len(got) == len(rows)
    assert all(set(row) == set(expected) for row in got)
    for name, array in expected.items():
        np.testing.assert_array_equal(np.stack([row[name] for row in got]), array, strict=True)


def test_converter_has_one_example_a_row_where_it_does_not_pack():
    dataset = tf.data.Dataset.from_tensors({"inputs": [1], "targets": [1], "rewards": [0.5]})
    with pytest.raises(ValueError, match="rows that are not packed hold one example, not 3"):
        FeedbackFeatureConverter()(dataset, {"inputs": 4, "targets": 4, "rewards": 3})


def test_converter_tells_how_many_rows_there_are_where_it_does_not_pack(file):
    """T5X's inference asks for it, and writes the texts that the task may keep."""
    statistics = feedback.summarise(file).rewards
    vocabulary = load_vocabulary(None)
    task = tasks.feedback_task(file, vocabulary=vocabulary, statistics=statistics, keep_text=True)
    lengths = {"inputs": 19, "targets": 12}
    triplets = list(feedback.read_feedback(file, "validation"))
    examples = task.get_dataset(lengths, "validation", shuffle=False)
    texts = [example["inputs_pretokenized"].decode() for example in examples.as_numpy_iterator()]
    assert texts == [triplet.prompt for triplet in triplets]
    counted = examples.apply(tf.data.experimental.assert_cardinality(len(triplets)))
    for pack in (False, True):
        converter = FeedbackFeatureConverter(pack=pack)
        converted = converter(counted, {**lengths, "rewards": 1 + pack})
        assert (converted.cardinality().numpy() == len(triplets)) == (not pack)
        assert not [name for name in converted.element_spec if "pretokenized" in name]
        examples_in_rows = [row["reward_weights"].numpy().sum() for row in converted]
        assert sum(examples_in_rows) == len(triplets)
