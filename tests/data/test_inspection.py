"""What `dro_jax check` counts, against a plain recount, and the lengths it recommends, against real batches."""

import collections
import json
import os
import statistics

import numpy as np
import pytest

from dro_jax.data import feedback, tasks
from dro_jax.data.batches import train_batches
from dro_jax.data.feedback import FeedbackFile
from dro_jax.data.inspection import inspect
from dro_jax.data.vocabulary import load_vocabulary
from dro_jax.errors import UsageError

CONFIGURED = {"lengths": {"inputs": 150, "targets": 400}, "max_examples": 3}
REAL_FILE = os.environ.get("DRO_JAX_FEEDBACK_FILE")


def look(*patterns, **changes):
    settings = CONFIGURED | {"vocabulary": load_vocabulary(None)} | changes
    return inspect([str(pattern) for pattern in patterns], **settings)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def log_normal_rows(count, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(np.log([60, 200]), [0.5, 0.8], (count, 2)).astype(int) + 1
    rewards = rng.integers(0, 8, count) / 4
    return [
        {
            "prompt": f"{i % (count // 3)} ".ljust(p, "p"),
            "completion": "ü" + "c" * c,
            "reward": float(r),
        }
        for i, ((p, c), r) in enumerate(zip(sizes, rewards, strict=True))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files with every kind of row, 300 of them sound."""
    folder = tmp_path_factory.mktemp("inspected")
    rows = log_normal_rows(300)
    extra = [
        {"prompt": "p", "completion": "c", "reward": "good"},
        {"prompt": " ", "completion": "c", "reward": 1},
        {"prompt": "p", "completion": "", "reward": 1},
        {"instruction": "p", "completions": [{"response": "r"}, {"response": "r"}, "r"]},
    ]
    write(folder / "a.jsonl", rows[:150] + extra)
    again = [rows[0], rows[150] | {"reward": 99.0}, rows[0]]
    write(folder / "b.jsonl", [rows[0], *rows[150:], *again])
    return folder


def quantile(numbers, share):
    numbers = sorted(numbers)
    place = share * (len(numbers) - 1)
    low = int(place)
    return numbers[low] + (place - low) * (numbers[min(low + 1, len(numbers) - 1)] - numbers[low])


def test_counts_against_a_recount(folder):
    found = look(folder / "?.jsonl")
    assert found.files == (f"{folder}/?.jsonl",)
    assert (found.rows, found.usable, found.bad, found.unrated) == (310, 304, 2, 2)
    assert (found.empty_prompts, found.empty_completions) == (1, 1)
    assert [m.split(": ")[0] for m in found.bad_messages] == [
        f"{folder}/a.jsonl, line 151",
        f"{folder}/a.jsonl, line 154, completion 3",
    ]
    # The first row of both files is the same: a line 1 each.
    assert (found.duplicates, found.contradictions) == (4, 1)
    assert found.duplicate_lines == tuple(
        f"{folder}/b.jsonl, line {second} repeats {folder}/{first}"
        for second, first in (
            (1, "a.jsonl, line 1"),
            (152, "a.jsonl, line 1"),
            (153, "b.jsonl, line 2"),
            (154, "a.jsonl, line 1"),
        )
    )
    usable = [row for name in "ab" for row in feedback.read_rows(f"{folder}/{name}.jsonl")]
    usable = [row for row in usable if isinstance(row, feedback.Triplet)]
    per_prompt = collections.Counter(collections.Counter(row.prompt for row in usable).values())
    assert found.completions_per_prompt == per_prompt
    assert found.prompts == sum(per_prompt.values())

    rewards = [row.reward for row in usable]
    assert found.reward_mean == pytest.approx(statistics.fmean(rewards))
    assert found.reward_std == pytest.approx(statistics.pstdev(rewards))
    assert (min(rewards), max(rewards)) == (0, 99)
    assert found.reward_histogram == (303, *[0] * 8, 1)
    sizes = [[len(row.prompt.encode()) + 1, len(row.completion.encode()) + 1] for row in usable]
    prompts, completions = np.transpose(sizes)
    for numbers, quantiles in (
        (rewards, found.reward_quantiles),
        (prompts, found.prompt_tokens),
        (completions, found.completion_tokens),
    ):
        assert {"0", "0.5", "1"} < set(quantiles)
        for share, value in quantiles.items():
            assert value == pytest.approx(quantile(numbers, float(share)))

    planned = found.configured
    assert (planned.inputs, planned.targets, planned.max_examples) == (150, 400, 3)
    assert planned.prompts_cut == pytest.approx(np.mean(prompts > 150))
    assert planned.completions_cut == pytest.approx(np.mean(completions > 400))
    kept, rows = np.minimum(sizes, [150, 400]).sum(axis=0), 304 / planned.examples
    assert rows == pytest.approx(round(rows))
    assert rows < 200
    assert planned.unpacked == pytest.approx(sum(kept) / (304 * 550))
    assert planned.all == pytest.approx(sum(kept) / (rows * 550))
    assert planned.decoder == pytest.approx(kept[1] / (rows * 400))
    alone = look(folder / "?.jsonl", max_examples=1).configured
    assert (alone.examples, alone.all, alone.unpacked) == (1, planned.unpacked, planned.unpacked)


def test_overall_scores(tmp_path):
    completions = [
        {"response": "r", "overall_score": i, "fine-grained_score": 9.0} for i in range(4)
    ]
    path = write(tmp_path / "rows.jsonl", [{"instruction": "p", "completions": completions}])
    assert look(path).reward_mean == 9
    found = look(path, ultrafeedback_score="overall")
    assert (found.reward_mean, found.duplicates, found.contradictions) == (1.5, 3, 3)


@pytest.mark.parametrize(
    ("rewards", "std", "histogram"),
    [
        ([0.1] * 7, 0, (7, *[0] * 9)),
        ([0.3, 0.1 + 0.2, 0.3], statistics.pstdev([0, 0, 2**-54]), (2, *[0] * 8, 1)),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], np.sqrt(10), (*[1] * 9, 2)),
        ([-3e38, 3e38], 3e38, (1, *[0] * 8, 1)),
    ],
)
def test_rewards_that_are_equal_nearly_so_and_far_apart(tmp_path, rewards, std, histogram):
    rows = [{"prompt": "p", "completion": f"c{i}", "reward": r} for i, r in enumerate(rewards)]
    found = look(write(tmp_path / "rows.jsonl", rows))
    assert found.reward_std == pytest.approx(std, abs=0)
    assert found.reward_histogram == histogram


def test_files_that_cannot_be_inspected(tmp_path):
    path = write(tmp_path / "rows.jsonl", [])
    with pytest.raises(UsageError, match=r"rows\.jsonl: no row is usable$"):
        look(path)
    write(path, [3, {"prompt": "p"}])
    with pytest.raises(
        UsageError, match=r"no row is usable; the first: .*rows\.jsonl, line 1: is 3"
    ):
        look(path)
    with pytest.raises(UsageError, match=r"other\.jsonl: no such file"):
        look(path, tmp_path / "other.jsonl")


def packed_fill(path, best):
    """Share of positions with a token in one epoch of training batches."""
    file = FeedbackFile(str(path), 0.0)
    task = tasks.feedback_task(
        file, vocabulary=load_vocabulary(None), statistics=feedback.summarise(file).rewards
    )
    lengths = {"inputs": best.inputs, "targets": best.targets}
    tokens = positions = 0
    for batch, position in train_batches(
        task, lengths=lengths, batch_size=1, seed=0, max_examples=best.max_examples
    ):
        tokens += (
            np.count_nonzero(batch["encoder_input_tokens"]) + batch["decoder_loss_weights"].sum()
        )
        positions += sum(lengths.values())
        if position.epoch:
            return tokens / positions


@pytest.mark.parametrize("kind", ["log-normal", "real"])
def test_recommended_lengths_cut_little_and_are_as_full_as_real_batches(tmp_path, kind):
    if kind == "real" and not REAL_FILE:
        pytest.skip("DRO_JAX_FEEDBACK_FILE does not name a real feedback file")
    made_up = write(tmp_path / "rows.jsonl", log_normal_rows(2500, seed=1))
    path = REAL_FILE if kind == "real" else made_up
    found = look(path)
    best = found.recommended
    assert best.all >= 0.85
    assert packed_fill(path, best) == pytest.approx(best.all, abs=0.03)
    smaller = [f for f in found.fills if f.inputs + f.targets < best.inputs + best.targets]
    gentle = [f for f in smaller if f.prompts_cut <= 0.01 and f.completions_cut <= 0.05]
    assert not [f for f in gentle if f.all >= 0.85]


@pytest.mark.parametrize("longest", [9, 300, 3000, 9000])
def test_recommendation_is_the_best_that_can_be_had(tmp_path, longest):
    rng = np.random.default_rng(longest)
    rows = [
        {"prompt": "p" * int(p), "completion": f"{i}".ljust(int(c), "c"), "reward": i}
        for i, (p, c) in enumerate(rng.integers(longest // 2, longest + 1, (60, 2)))
    ]
    found = look(write(tmp_path / "rows.jsonl", rows))
    best = found.recommended
    least = [min(f.prompts_cut for f in found.fills), min(f.completions_cut for f in found.fills)]
    gentle = [
        f
        for f in found.fills
        if f.prompts_cut <= max(0.01, least[0]) and f.completions_cut <= max(0.05, least[1])
    ]
    assert (best.inputs, best.targets) in {(f.inputs, f.targets) for f in gentle}
    assert best.all >= min(0.85, 0.99 * max(f.all for f in gentle))
    assert found == look(tmp_path / "rows.jsonl")
