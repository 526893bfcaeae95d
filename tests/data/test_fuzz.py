"""Ten thousand damaged rows in one file: each is used or counted under its own line, and batches stay finite."""

import itertools
import json
import random

import numpy as np
import pytest

from dro_jax.data import feedback, tasks
from dro_jax.data.batches import evaluation_batches
from dro_jax.data.feedback import FeedbackFile, Triplet, UnusableRow
from dro_jax.data.vocabulary import load_vocabulary

LINES = 10_000
WRONG = [3, -1.5, True, ["a"], {"a": "b"}, [[]], [{"role": "user"}], 10**30, None]
NO_REWARDS = ["1", [1], {"a": 1}, float("nan"), float("-inf"), 1e39, -(10**400), True, None]


def cut(rng, line):
    return line[: rng.randrange(1, len(line) - 1)]


def broken_utf8(rng, line):
    middle = line.index(b"prompt") + rng.randrange(6)
    return line[:middle] + rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\x80"]) + line[middle:]


def raw_control_character(rng, line):
    middle = line.index(b"prompt") + rng.randrange(6)
    return line[:middle] + bytes([rng.choice([0, 1, 8, 9, 11, 13, 31])]) + line[middle:]


def with_field(name, values):
    def damage(rng, line):
        return json.dumps(json.loads(line) | {name: rng.choice(values)}).encode()

    return damage


def doubled(name, value):
    return lambda rng, line: line[:-1] + f', "{name}": {json.dumps(value)}}}'.encode()


def flipped(rng, line):
    places = [rng.randrange(len(line)) for _ in range(rng.randrange(1, 5))]
    return bytes(rng.randrange(256) if i in places else byte for i, byte in enumerate(line))


def spliced(rng, line):
    start, stop, other = (rng.randrange(len(line)) for _ in range(3))
    return line[:start] + line[other:stop] + line[stop:]


def ultrafeedback(rng, line):
    things = [*WRONG, "text", {"response": "r", "annotations": {"honesty": {"Rating": "5"}}}]
    things += [{"response": rng.choice(WRONG), "annotations": rng.choice(WRONG)}, "N/A", [], {}]
    things += [{"response": "r", "annotations": {"honesty": rng.choice([*WRONG, *NO_REWARDS])}}]
    completions = rng.choice([rng.choices(things, k=rng.randrange(5)), rng.choice(things)])
    return json.dumps({"instruction": rng.choice(["p", 3]), "completions": completions}).encode()


# What is done to a row, and whether it can be used then (None: that depends).
DAMAGES = [
    (lambda rng, line: line, True),
    (doubled("prompt", "the last one counts"), True),
    (with_field("prompt", ["\0\x01\x7f\x85\u2028\ufeff\U0010ffff", "\r\n\t\v", "</s><pad>"]), None),
    (with_field("other", [*WRONG, *NO_REWARDS, "\ud800"]), True),
    (with_field("reward", [3.4e38, -3.4e38, 1e-300, 0, 10**38, -0.0]), True),
    (lambda rng, line: line + rng.choice([b"\r", b" \t", b"\x00", b"}"]), None),
    (
        lambda rng, line: rng.choice([b"", b" ", b"\r", b"null", b"[]", b"NaN", b'"a"', b"\x00"]),
        None,
    ),
    (flipped, None),
    (spliced, None),
    (ultrafeedback, None),
    (cut, False),
    (broken_utf8, False),
    (raw_control_character, False),
    (doubled("completion", None), False),
    (with_field("prompt", WRONG), False),
    (with_field("completion", [*WRONG, "\udfff", "a\ud83d", "", " "]), False),
    (with_field("reward", NO_REWARDS), False),
    (lambda rng, line: b'{"prompt": ' + b"[" * rng.choice([900, 980, 10**5]), False),
    (
        lambda rng, line: line.replace(
            b'"reward": ', b'"reward": 1' + b"0" * rng.choice([99, 9999])
        ),
        False,
    ),
    (with_field("label", [True, "up"]), False),
]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The file, its lines, and for each line whether it can be used."""
    rng = random.Random(0)
    lines, usable = [], []
    for number in range(LINES):
        row = {
            "prompt": f"p{number} ü",
            "completion": "c" * rng.randrange(1, 40),
            "reward": rng.gauss(0, 1),
        }
        damage, verdict = rng.choice(DAMAGES)
        line = damage(rng, json.dumps(row, ensure_ascii=False).encode())
        lines.append(line.replace(b"\n", b" "))
        usable.append(verdict)
    for number, text in ((10, "a" * 3_000_000), (5000, "👍" * 500_000)):
        lines[number] = json.dumps({"prompt": text, "completion": text, "reward": 1}).encode()
        usable[number] = True
    lines[7000] = json.dumps({"prompt": "p", "completion": "c", "label": "a" * 2_000_000}).encode()
    usable[7000] = False
    path = tmp_path_factory.mktemp("fuzz") / "damaged.jsonl"
    path.write_bytes(b"\n".join(lines))
    return str(path), lines, usable


def test_every_line_is_used_or_counted(damaged):
    path, lines, usable = damaged
    rows = list(feedback.read_rows(path))
    assert {row.line for row in rows} == {n for n, line in enumerate(lines, 1) if line.strip()}
    for line, group in itertools.groupby(rows, key=lambda row: row.line):
        kinds = {type(row) for row in group}
        if usable[line - 1] is not None:
            assert kinds == {Triplet if usable[line - 1] else UnusableRow}, lines[line - 1][:200]
    for row in rows:
        if isinstance(row, UnusableRow):
            assert row.message.startswith(
                (f"{path}, line {row.line}: ", f"{path}, line {row.line}, c")
            )
            assert row.message.isascii()
            assert len(row.message.splitlines()) == 1
            assert len(row.message) < len(path) + 250
    used = [row for row in rows if isinstance(row, Triplet)]
    assert LINES / 4 < len(used) < len(rows) * 3 / 4

    summary = feedback.summarise(FeedbackFile(path, 0.3, True, 1.0))
    skipped = [
        summary.bad_rows,
        summary.empty_prompts,
        summary.empty_completions,
        summary.unrated,
    ]
    assert min(skipped) > 0
    assert (summary.rows, sum(skipped)) == (len(rows), len(rows) - len(used))
    assert summary.train_rows + summary.validation_rows == len(used)


@pytest.mark.parametrize(("split", "max_examples"), [("train", 1), ("validation", 4)])
def test_batches_are_finite(damaged, split, max_examples):
    path, _, _ = damaged
    file = FeedbackFile(path, 0.3, True, 1.0)
    summary = feedback.summarise(file)
    task = tasks.feedback_task(file, vocabulary=load_vocabulary(None), statistics=summary.rewards)
    examples = 0
    for batch in evaluation_batches(
        task,
        split=split,
        lengths={"inputs": 24, "targets": 16},
        batch_size=512,
        max_examples=max_examples,
    ):
        assert all(np.isfinite(array).all() for array in batch.values())
        assert batch["encoder_input_tokens"].shape == (512, 24)
        tokens = np.concatenate([batch["encoder_input_tokens"], batch["decoder_target_tokens"]], 1)
        assert 0 <= tokens.min() < tokens.max() < 259
        examples += batch["reward_weights"].sum()
    assert examples == summary.num_input_examples[split]
