"""`dro_jax check`: the inspection as JSON and as text, and one line where there is nothing to inspect."""

import dataclasses
import json

import pytest

from dro_jax.data.inspection import inspect
from dro_jax.data.vocabulary import load_vocabulary


@pytest.fixture
def file(tmp_path):
    """30 sound rows, one of them twice, and 22 bad ones."""
    rows = [{"prompt": f"p{i % 9}", "completion": f"c{i}", "reward": i / 3} for i in range(30)]
    bad = [{"prompt": "p", "completion": "[bold]", "reward": "\u001b[1m"}] * 22
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bad, rows[4]]))
    return path


def test_json_is_the_inspection(command, file):
    result = command("check", str(file), "--json", "--inputs=3", "--targets=9", "--max_examples=5")
    assert (result.code, result.err) == (0, "")
    expected = inspect(
        [str(file)],
        vocabulary=load_vocabulary(None),
        lengths={"inputs": 3, "targets": 9},
        max_examples=5,
    )
    assert json.loads(result.out) == json.loads(json.dumps(dataclasses.asdict(expected)))
    assert expected.usable == 31


def test_the_score_reaches_the_inspection(command, tmp_path):
    scores = [{"overall_score": i, "fine-grained_score": 3.0 - i} for i in (0, 4)]
    completions = [{"response": "r"} | score for score in scores]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "p", "completions": completions}))

    def mean(*flags):
        return json.loads(command("check", str(path), "--json", *flags).out)["reward_mean"]

    assert (mean(), mean("--ultrafeedback_score=overall")) == (1, 2)


def test_text(command, file):
    result = command("check", str(file))
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == str(file)
    assert lines[1].startswith("53 rows, 31 usable; not usable: 22 bad, 0 with an empty prompt")
    for number in range(20):
        line = f"  {file}, line {31 + number}: field 'reward' is \"\\u001b[1m\", not a number"
        assert lines[2 + number].startswith(line)
    assert lines[22] == "  and 2 more"
    assert lines[23] == "9 prompts, by number of completions: 5 with 3, 4 with 4"
    assert lines[24].startswith("1 rows repeat the prompt and completion of another, 0 of them")
    assert lines[25] == f"  {file}, line 53 repeats {file}, line 5"
    assert "all rewards are equal" not in result.out
    assert "…" not in result.out
    best = inspect(
        [str(file)],
        vocabulary=load_vocabulary(None),
        lengths={"inputs": 512, "targets": 512},
        max_examples=16,
    ).recommended
    lengths = f"{{'inputs':{best.inputs},'targets':{best.targets}}}"
    assert lines[-1] == (
        f'--gin.TASK_FEATURE_LENGTHS="{lengths}" --gin.MAX_EXAMPLES={best.max_examples}'
    )


def test_equal_rewards_are_said(command, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "p", "completion": "c", "reward": 0.1}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    result = command("check", str(path))
    assert result.code == 0
    assert "  all rewards are equal: there is nothing to learn" in result.out.splitlines()


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "{}: no such file; check the path of the feedback file"),
        ("", [], "{}: no row is usable"),
        ("3\n", [], "{}: no row is usable; the first: {}, line 1: is 3, not an object"),
        ("PAR1", [], "{}: is Parquet; give its name the ending .parquet"),
        ("3\n", ["none/*.jsonl"], "none/*.jsonl: no file matches"),
        ("3\n", ["--inputs=1"], "--inputs is 1: give a whole number of at least 2"),
        ("3\n", ["--targets=0"], "--targets is 0: give a whole number of at least 2"),
        ("3\n", ["--max_examples=0"], "--max_examples is 0: give a whole number of at least 1"),
        ("3\n", ["--ultrafeedback_score=best"], "--ultrafeedback_score is 'best': give one of"),
        ("3\n", ["--vocabulary_file=none"], "none: no such file; give a SentencePiece model"),
    ],
)
def test_what_cannot_be_checked(command, tmp_path, content, flags, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    for form in ([], ["--json"]):
        result = command("check", str(path), *flags, *form)
        assert (result.code, result.out) == (2, "")
        (line,) = result.err.splitlines()
        assert line.startswith("dro_jax: " + message.format(path, path))
