"""Feedback files: every bad line by its message, counts, statistics and the split by prompt."""

import gzip
import json
import math
import os
import random
import re

import numpy as np
import pytest

from dro_jax.data import feedback
from dro_jax.data.feedback import FeedbackFile, RewardStatistics, Triplet
from dro_jax.errors import UsageError

GOOD = '{"prompt": "p", "completion": "c", "reward": 1}'
OTHER = '{"prompt": "p", "completion": "d", "reward": 0}'
THUMBS = 'write true or false (or 1/0, "up"/"down"), or a number in field \'reward\''

BAD_LINES = [
    ("{", "is not JSON (Expecting property name enclosed in double quotes); write one JSON object"),
    ("good answer", "is not JSON (Expecting value); write one JSON object a line"),
    ('["p", "c", 1]', 'is ["p", "c", 1], not an object; write one JSON object a line'),
    ("null", "is null, not an object; write one JSON object a line"),
    ("[" * 200_000, "the JSON is nested too deeply; write one flat object a line"),
    ('{"prompt": "p", "completion": "c", "reward": ' + "9" * 5000 + "}", "is not JSON (a number"),
    (b'{"prompt": "\xff", "completion": "c", "reward": 1}', "byte 13 is not UTF-8; save the file"),
    ('{"completion": "c", "reward": 1}', "field 'prompt' is missing; give every row one"),
    ('{"prompt": null, "completion": "c", "reward": 1}', "field 'prompt' is null; give every row"),
    ('{"prompt": 3, "completion": "c", "reward": 1}', "field 'prompt' is 3, not text; write a str"),
    ('{"prompt": ["p"], "completion": "c", "reward": 1}', "field 'prompt' is [\"p\"], not text"),
    (r'{"prompt": "\ud83d", "completion": "c", "reward": 1}', "field 'prompt' holds half a surr"),
    ('{"prompt": "p", "reward": 1}', "field 'completion' (or 'response') is missing; give every"),
    ('{"prompt": "p", "response": {}, "reward": 1}', "field 'response' is {}, not text; write a"),
    (
        '{"prompt": "p", "completion": "c", "response": "c", "reward": 1}',
        "fields 'completion' and 'response' are both given; keep one of them",
    ),
    (
        '{"prompt": "p", "completion": "c"}',
        "field 'reward' (or 'label', 'score') is missing; give every row",
    ),
    (
        '{"prompt": "p", "completion": "c", "reward": null}',
        "field 'reward' (or 'label', 'score') is null",
    ),
    (
        '{"prompt": "p", "completion": "c", "reward": 1, "label": true}',
        "fields 'reward' and 'label' are both given; keep one of them",
    ),
    ('{"prompt": "p", "completion": "c", "reward": "1"}', "field 'reward' is \"1\", not a number;"),
    ('{"prompt": "p", "completion": "c", "reward": [1]}', "field 'reward' is [1], not a number"),
    (
        '{"prompt": "p", "completion": "c", "reward": true}',
        "field 'reward' is true, not a number; write it in field 'label'",
    ),
    ('{"prompt": "p", "completion": "c", "reward": NaN}', "field 'reward' is NaN, not a finite"),
    (
        '{"prompt": "p", "completion": "c", "reward": -Infinity}',
        "is -Infinity, not a finite number",
    ),
    ('{"prompt": "p", "completion": "c", "reward": 1e999}', "'reward' is Infinity, not a finite"),
    (
        '{"prompt": "p", "completion": "c", "reward": 1e39}',
        "'reward' is 1e+39, not a finite number",
    ),
    (
        '{"prompt": "p", "completion": "c", "reward": 1' + "0" * 400 + "}",
        "field 'reward' is 1" + "0" * 39 + "..., not a finite number of 32 bits; write a finite",
    ),
    ('{"prompt": "p", "completion": "c", "label": "meh"}', f"field 'label' is \"meh\"; {THUMBS}"),
    ('{"prompt": "p", "completion": "c", "label": 2}', f"field 'label' is 2; {THUMBS}"),
    ('{"prompt": "p", "completion": "c", "label": NaN}', f"field 'label' is NaN; {THUMBS}"),
    ('{"prompt": "p", "completion": "c", "label": [1]}', f"field 'label' is [1]; {THUMBS}"),
]


def write(path, *lines):
    path.write_bytes(b"\n".join(n if isinstance(n, bytes) else n.encode() for n in lines) + b"\n")
    return str(path)


def row(prompt, reward, completion="c"):
    return json.dumps({"prompt": prompt, "completion": completion, "reward": reward})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
def test_bad_row_is_refused_by_file_line_and_field(path, line, problem):
    name = write(path, GOOD, OTHER, line)
    for reader in (feedback.summarise, lambda file: list(feedback.read_feedback(file))):
        with pytest.raises(UsageError) as refusal:
            reader(FeedbackFile(name))
        message = str(refusal.value)
        assert message.startswith(f"{name}, line 3: ")
        assert problem in message
        assert message.endswith("; or set skip_bad_rows = True to count and skip bad rows")
        assert "\n" not in message
        assert message.isascii()


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
def test_bad_row_is_counted_when_told_to_skip(path, line, problem):
    name = write(path, GOOD, line, OTHER)
    file = FeedbackFile(name, 0, skip_bad_rows=True, max_unusable_fraction=0.5)
    summary = feedback.summarise(file)
    assert (summary.rows, summary.bad_rows, summary.train_rows) == (3, 1, 2)
    assert summary.bad_row_messages[0].startswith(f"{name}, line 2: ")
    assert problem in summary.bad_row_messages[0]
    assert summary.bad_row_messages[0] in summary.describe()
    assert [triplet.line for triplet in feedback.read_feedback(file)] == [1, 3]


def test_fields_and_labels_that_are_accepted(path):
    labels = ["true", "false", "1", "0", "1.0", '"up"', '"Down"', '"👍\ufe0f"', '"👎"']
    labels += ['"thumbs_up"', '"Thumbs down"']
    lines = [f'{{"prompt": "p", "response": "r", "label": {label}}}' for label in labels]
    lines += ['{"prompt": "p", "completion": "c", "reward": -2.5, "label": null, "model": NaN}']
    rows = list(feedback.read_feedback(FeedbackFile(write(path, *lines))))
    assert [r.reward for r in rows] == [1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, -2.5]
    assert rows[0] == Triplet("p", "r", 1.0, 1)
    assert rows[-1] == Triplet("p", "c", -2.5, 12)


def test_byte_order_mark_blank_lines_and_carriage_returns(path):
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n  \n" + OTHER.encode())
    rows = list(feedback.read_feedback(FeedbackFile(str(path))))
    assert rows == [Triplet("p", "c", 1.0, 1), Triplet("p", "d", 0.0, 4)]
    assert feedback.summarise(FeedbackFile(str(path), 0)).rows == 2


def test_empty_texts_are_skipped_and_counted(path):
    lines = [row(f"p{i}", i) for i in range(60)]
    lines += [row("", 1), row("p", 1, " \t"), row(" \\n", 1, "")]
    summary = feedback.summarise(FeedbackFile(write(path, *lines), max_unusable_fraction=0.05))
    assert (summary.rows, summary.empty_prompts, summary.empty_completions) == (63, 1, 2)
    assert summary.train_rows + summary.validation_rows == 60
    assert "1 with an empty prompt, 2 with an empty completion" in summary.describe()


def test_too_many_unusable_rows(path):
    lines = [row(f"p{i}", i) for i in range(18)] + [row("p", 1, ""), "{"]
    name = write(path, *lines)
    message = (
        r"2 of 20 rows are unusable \(1 bad, 0 with an empty prompt, 1 with an empty completion, "
        r"0 that nobody rated\), "
        r"more than max_unusable_fraction = 0.05 allows; correct the file or raise "
        r"max_unusable_fraction; the first: .*rows.jsonl, line 19: field 'completion' is empty$"
    )
    with pytest.raises(UsageError, match=message):
        feedback.summarise(FeedbackFile(name, skip_bad_rows=True))
    assert feedback.summarise(FeedbackFile(name, 0, True, 0.1)).train_rows == 18


def test_only_the_first_bad_rows_are_kept_as_messages(path):
    lines = [GOOD, OTHER] + ["{"] * 9
    file = FeedbackFile(write(path, *lines), 0, skip_bad_rows=True, max_unusable_fraction=1.0)
    summary = feedback.summarise(file)
    assert summary.bad_rows == 9
    assert [m.split(": ")[0][-1] for m in summary.bad_row_messages] == ["3", "4", "5", "6", "7"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such file; check the path of the feedback file"),
        (b"", "the file has no rows; write one JSON object a line"),
        (b"\n \n", "the file has no rows; write one JSON object a line"),
        (gzip.compress(GOOD.encode(), mtime=0), "is gzip; give its name the ending .gz"),
    ],
)
def test_files_that_cannot_be_used(path, content, problem):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        feedback.summarise(FeedbackFile(str(path)))
    assert str(refusal.value) == f"{path}: {problem}"


def test_directory(tmp_path):
    with pytest.raises(
        UsageError, match=r": is a directory; name a file in it, or all as .*\*.jsonl$"
    ):
        feedback.summarise(FeedbackFile(str(tmp_path)))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux's /proc")
def test_file_that_fails_while_it_is_read():
    with pytest.raises(
        UsageError, match=r"^/proc/self/mem: cannot be read \(Input/output error\);"
    ):
        feedback.summarise(FeedbackFile("/proc/self/mem"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_file_without_permission(path):
    write(path, GOOD)
    path.chmod(0)
    with pytest.raises(UsageError, match=r": cannot be read \(Permission denied\); check the path"):
        feedback.summarise(FeedbackFile(str(path)))


def test_gzip_reads_as_plain(tmp_path):
    lines = [row(f"p{i}", i, f"ü{i}") for i in range(300)]
    plain = write(tmp_path / "rows.jsonl", *lines)
    zipped = tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    rows = list(feedback.read_feedback(FeedbackFile(plain)))
    assert len(rows) == 300
    assert list(feedback.read_feedback(FeedbackFile(str(zipped)))) == rows


def test_gzip_that_is_none_or_damaged(tmp_path):
    zipped = tmp_path / "rows.jsonl.gz"
    write(zipped, GOOD)
    with pytest.raises(
        UsageError, match=r"\.gz: is not a gzip file, though its name ends in \.gz;"
    ):
        feedback.summarise(FeedbackFile(str(zipped)))
    generator = random.Random(0)
    lines = "\n".join(row(f"p{i}", generator.random()) for i in range(9000)).encode()
    whole = gzip.compress(lines, mtime=0)
    damaged = bytearray(whole)
    damaged[len(whole) // 2 :] = b"\xff" * 2000
    for content in (whole[: len(whole) // 2], bytes(damaged)):
        zipped.write_bytes(content)
        with pytest.raises(
            UsageError, match=r"the gzip file is cut off or damaged after line \d+;"
        ):
            feedback.summarise(FeedbackFile(str(zipped)))


def test_equal_rewards(path):
    name = write(path, row("a", 0.1), row("b", 0.1), row("c", 0.1))
    problem = (
        r": field 'reward' is the same \(0\.1\) in all 3 rows of the training split \(variance"
    )
    with pytest.raises(UsageError, match=problem):
        feedback.summarise(FeedbackFile(name, 0))


def test_rewards_too_far_apart_for_float32(path):
    held_out = next(p for p in map(str, range(999)) if feedback.split_of(p, 0.05) != "train")
    lines = [row("a", 0), row("b", 1e-20)]
    assert {feedback.split_of(p, 0.05) for p in "ab"} == {"train"}
    with pytest.raises(UsageError, match="too far apart for a standard deviation of 5e-21"):
        feedback.summarise(FeedbackFile(write(path, *lines, row(held_out, 3e38))))


def test_statistics_are_those_of_the_training_split(path):
    generator = np.random.default_rng(0)
    rewards = 1e6 + generator.normal(size=500)
    name = write(path, *[row(f"p{i % 70}", r) for i, r in enumerate(rewards)])
    file = FeedbackFile(name, validation_fraction=0.3)
    train = [r.reward for r in feedback.read_feedback(file, "train")]
    validation = [r.reward for r in feedback.read_feedback(file, "validation")]
    assert sorted(train + validation) == sorted(rewards)
    summary = feedback.summarise(file)
    assert summary.num_input_examples == {"train": len(train), "validation": len(validation)}
    assert summary.train_prompts + summary.validation_prompts == 70
    assert math.isclose(summary.rewards.mean, np.mean(train), rel_tol=1e-14)
    assert math.isclose(summary.rewards.std, np.std(train), rel_tol=1e-9)
    assert (summary.min_reward, summary.max_reward) == (min(rewards), max(rewards))
    normalised = [summary.rewards.normalise(r) for r in train]
    assert math.isclose(np.var(normalised), 1, rel_tol=1e-9)


def test_split_is_by_prompt_and_stays_when_the_file_grows(path):
    lines = [row(f"prompt {i % 400}", i) for i in range(1200)]
    before = set(feedback.read_feedback(FeedbackFile(write(path, *lines[:600])), "validation"))
    file = FeedbackFile(write(path, *lines))
    train = {r.prompt for r in feedback.read_feedback(file, "train")}
    validation = {r.prompt for r in feedback.read_feedback(file, "validation")}
    assert not train & validation
    assert len(train | validation) == 400
    assert before <= set(feedback.read_feedback(file, "validation"))
    assert 22 <= len(validation) <= 58  # 40 expected, 6 the standard deviation


def test_split_is_the_same_in_every_process():
    # Written down, so that no later version silently mixes old training and validation prompts.
    splits = "".join(feedback.split_of(f"prompt {i}", 0.3)[0] for i in range(20))
    assert splits == "vtttvttttvtttttttttt"
    assert feedback.split_of("anything", 0.0) == "train"


def test_one_split_may_not_and_the_other_may_be_empty(path):
    name = write(path, GOOD, OTHER)
    summary = feedback.summarise(FeedbackFile(name, 0))
    assert summary.validation_rows == 0
    assert "the validation split is empty: nothing will be evaluated" in summary.describe()
    with pytest.raises(UsageError, match=r"training split is empty \(2 usable rows, all held out"):
        feedback.summarise(FeedbackFile(name, 0.999))


@pytest.mark.parametrize(
    ("fractions", "interval"),
    [
        ({"validation_fraction": 1.0}, "[0, 1)"),
        ({"max_unusable_fraction": -0.1}, "[0, 1]"),
        ({"top_fraction": 0}, "(0, 1]"),
        ({"top_fraction": 1.01}, "(0, 1]"),
        ({"top_fraction": math.nan}, "(0, 1]"),
        ({"top_fraction": "0.5"}, "(0, 1]"),
    ],
)
def test_fractions_out_of_range(fractions, interval):
    (name,) = fractions
    with pytest.raises(UsageError, match=rf"^{name} is .*; set it in {re.escape(interval)}$"):
        FeedbackFile("rows.jsonl", **fractions)


@pytest.mark.parametrize(
    ("fraction", "rows", "reward"),
    [
        (1.0, 6, -math.inf),
        (0.99, 6, 1),
        (5 / 6, 5, 2),
        (0.5, 5, 2),
        (0.34, 5, 2),
        (2 / 6, 2, 3),
        (0.01, 1, 5),
    ],
)
def test_top_rows_are_the_best_of_the_training_split_with_their_ties(path, fraction, rows, reward):
    prompts = {feedback.split_of(p, 0.3): p for p in map(str, range(99))}
    lines = [row(prompts["train"], r) for r in (3, 1, 2, 2, 5, 2)]
    lines += [row(prompts["validation"], r) for r in (9, -9)]
    summary = feedback.summarise(FeedbackFile(write(path, *lines), 0.3, top_fraction=fraction))
    assert (summary.top_rows, summary.top_reward) == (rows, reward)
    assert summary.num_input_examples == {"train": rows, "validation": 2}
    assert summary.train_rows == 6
    assert math.isclose(summary.rewards.mean, 2.5)
    assert math.isclose(summary.rewards.std, np.std([3, 1, 2, 2, 5, 2]))
    line = f"trained on: the {rows} rows with a reward of at least {reward}"
    assert (line in summary.describe().split("\n")) == (rows < 6)


def test_statistics_survive_the_round_trip(tmp_path):
    statistics = RewardStatistics(mean=1 / 3, std=0.1)
    statistics.save_json(tmp_path / "rewards.json")
    assert RewardStatistics.load_json(tmp_path / "rewards.json") == statistics


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        ("{", "holds no reward statistics"),
        ("[]", "holds no reward statistics"),
        ('{"mean": 1}', "holds no reward statistics"),
        ('{"mean": NaN, "std": 1}', "mean nan and std 1.0 cannot normalise"),
        ('{"mean": 0, "std": 0}', "mean 0.0 and std 0.0 cannot normalise"),
    ],
)
def test_statistics_that_cannot_be_loaded(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "rewards.json").write_text(content)
    with pytest.raises(UsageError, match=rf"rewards\.json: .*{problem}"):
        RewardStatistics.load_json(tmp_path / "rewards.json")


def damaged(line: bytes, generator: random.Random) -> bytes:
    """Damages a row: cuts, flipped bytes, swapped-in values of every kind."""
    values = [
        b"NaN",
        b"1e400",
        b"-1e308",
        b"null",
        b"[]",
        b"{}",
        b'""',
        b'"\\udfff"',
        b"\x00",
        b"7",
    ]
    for _ in range(generator.randint(1, 3)):
        position = generator.randrange(len(line))
        match generator.randrange(4):
            case 0:
                line = line[:position] or b"x"
            case 1:
                line = line[:position] + bytes([generator.randrange(256)]) + line[position + 1 :]
            case 2:
                fields = line.split(b": ")
                field = generator.randrange(len(fields))
                fields[field] = generator.choice(values) + fields[field][-12:]
                line = b": ".join(fields)
            case 3:
                line = line[:position] + line[generator.randrange(len(line)) :] or b"x"
    return line.replace(b"\n", b" ")


def test_damaged_rows_are_used_or_counted_with_their_line(path):
    generator = random.Random(0)
    lines = [row(f"prompt {i}", generator.gauss(0, 1)).encode() for i in range(800)]
    lines = [damaged(line, generator) if i % 2 else line for i, line in enumerate(lines)]
    name = write(path, *lines)
    blank = sum(not line.strip() for line in lines)
    rows = list(feedback.read_rows(name))
    assert len(rows) == 800 - blank
    assert len({r.line for r in rows}) == len(rows)
    unusable = [r for r in rows if isinstance(r, feedback.UnusableRow)]
    assert len(unusable) > 200
    assert all(r.message.startswith(f"{name}, line {r.line}: ") for r in unusable)
    assert not any("\n" in r.message for r in unusable)
    usable = [r for r in rows if isinstance(r, Triplet)]
    assert {r.line for r in usable} >= set(range(1, 800, 2))
    assert all(math.isfinite(np.float32(r.reward)) and r.prompt.strip() for r in usable)
    with pytest.raises(UsageError):
        feedback.summarise(FeedbackFile(name))
    summary = feedback.summarise(FeedbackFile(name, 0.05, True, 1.0))
    assert summary.train_rows + summary.validation_rows == len(usable)


@pytest.mark.skipif(
    "DRO_JAX_FEEDBACK_FILE" not in os.environ,
    reason="DRO_JAX_FEEDBACK_FILE does not name a real feedback file",
)
def test_real_file_is_split_by_prompt():
    file = FeedbackFile(os.environ["DRO_JAX_FEEDBACK_FILE"])
    summary = feedback.summarise(file)
    prompts = {"train": set(), "validation": set()}
    rewards = []
    for triplet in feedback.read_feedback(file):
        split = feedback.split_of(triplet.prompt, file.validation_fraction)
        prompts[split].add(triplet.prompt)
        if split == "train":
            rewards.append(triplet.reward)
    assert not prompts["train"] & prompts["validation"]
    assert (summary.train_prompts, summary.validation_prompts) == tuple(map(len, prompts.values()))
    assert summary.validation_rows > 0
    assert math.isclose(summary.rewards.mean, np.mean(rewards), rel_tol=1e-9)
    assert math.isclose(summary.rewards.std, np.std(rewards), rel_tol=1e-9)
    used = summary.train_rows + summary.validation_rows
    assert used + summary.empty_prompts + summary.empty_completions == summary.rows
