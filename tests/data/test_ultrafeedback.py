"""UltraFeedback's own schema: four triplets a record, rewarded by their ratings; broken ones named, never used."""

import json
import statistics

import pyarrow as pa
import pytest
from pyarrow import parquet

from dro_jax.data import feedback
from dro_jax.data.feedback import FeedbackFile, Triplet, read_rows
from dro_jax.data.ultrafeedback import ASPECTS

RATINGS = [("5", "4", "4", "2"), ("1", "N/A", "3", "n/a "), ("N/A",) * 4, ("2", "2", "N/A", "2")]


def completion(number, ratings, **changes):
    notes = {
        aspect: {"Rating": rating, "Rationale": "because"}
        for aspect, rating in zip(ASPECTS, ratings, strict=True)
    }
    return {
        "model": f"model {number}",
        "principle": "honesty",
        "response": f"answer {number}",
        "critique": "fine",
        "overall_score": 10 - 2.5 * number,
        "fine-grained_score": -1.0,
        "annotations": notes,
    } | changes


FOUR = [completion(number, ratings) for number, ratings in enumerate(RATINGS)]


def record(prompt, completions=FOUR):
    return {
        "source": "made up",
        "instruction": prompt,
        "models": ["a", "b"],
        "correct_answers": ["None"],
        "completions": completions,
    }


@pytest.fixture(params=[".jsonl", ".parquet"])
def save(request, tmp_path):
    path = tmp_path / f"ultrafeedback{request.param}"

    def write(*records):
        if request.param == ".parquet":
            parquet.write_table(pa.Table.from_pylist(list(records)), path)
        else:
            path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return str(path)

    return write


def test_four_rows_a_record(save):
    name = save(record("p"), record("q"))
    rows = list(read_rows(name))
    assert [row.line for row in rows] == [1] * 4 + [2] * 4
    expected = [statistics.fmean((5, 4, 4, 2)), 2.0, None, 2.0]
    for number, (row, reward) in enumerate(zip(rows[:4], expected, strict=True)):
        if reward is not None:
            assert row == Triplet("p", f"answer {number}", reward, 1)
    unit = "row" if name.endswith("parquet") else "line"
    assert rows[6].kind == "unrated"
    assert rows[6].message == f"{name}, {unit} 2, completion 3: nobody rated it"
    summary = feedback.summarise(FeedbackFile(name, 0, max_unusable_fraction=0.25))
    assert (summary.rows, summary.unrated, summary.bad_rows, summary.train_rows) == (8, 2, 0, 6)
    assert "2 that nobody rated" in summary.describe()


def test_overall_score_as_number_or_text(save):
    rows = read_rows(save(record("p")), "overall")
    assert [row.reward for row in rows] == [10, 7.5, 5, 2.5]
    texts = [completion(i, RATINGS[2], overall_score=s) for i, s in enumerate((" 8.5", "3", "N/A"))]
    first, second, third = read_rows(save(record("p", texts)), "overall")
    assert (first.reward, second.reward, third.kind) == (8.5, 3.0, "unrated")


@pytest.mark.parametrize("none", [{}, None, {aspect: None for aspect in ASPECTS}])
def test_fine_grained_score_where_there_are_no_annotations(save, none):
    scores = {"fine-grained_score": 3.75}
    without = [completion(i, RATINGS[0], annotations=none, **scores) for i in range(2)]
    del without[1]["fine-grained_score"]
    # Beside annotated ones Parquet fills the gaps with nulls.
    rows = list(read_rows(save(record("p", [completion(0, RATINGS[0]), *without]))))
    assert [getattr(row, "reward", row) for row in rows[:2]] == [3.75, 3.75]
    assert rows[2].kind == "unrated"


NO_RATINGS = ["five", True, [5], {"a": 1}, "nan", "inf", 10**400, 1e308, -1e39]
NO_RESPONSES = [None, 3, ["a"], {"text": "a"}, "\ud800"]
NO_COMPLETIONS = ["text", None, 7, [], [{"content": "a"}]]
NO_LISTS = ["text", None, 7, True, [], {}, {"response": "a", "overall_score": 5}, {"content": "a"}]


@pytest.mark.parametrize(
    ("completions", "number", "field"),
    [
        *(
            ([FOUR[0], completion(1, ("1", r, "N/A", "2")), FOUR[1]], 2, "'reward'")
            for r in NO_RATINGS
        ),
        *(([FOUR[0], FOUR[1] | {"response": r}], 2, "'completion'") for r in NO_RESPONSES),
        *(([FOUR[0], thing, FOUR[1]], 2, "'completion'") for thing in NO_COMPLETIONS),
        *((things, 1, "'completion'") for things in NO_LISTS),
    ],
)
def test_broken_shapes_are_named_and_nothing_else_suffers(tmp_path, completions, number, field):
    path = tmp_path / "rows.jsonl"
    records = [record("before"), record("p", completions), record("after")]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    rows = list(read_rows(str(path)))
    assert [row.line for row in rows if row.line != 2] == [1] * 4 + [3] * 4
    rows = [row for row in rows if row.line == 2]
    bad = rows.pop(number - 1)
    assert all(isinstance(row, Triplet) for row in rows)
    assert len(rows) == (0 if number == 1 else len(completions) - 1)
    assert bad.kind == "bad"
    assert bad.message.startswith(f"{path}, line 2, completion {number}: field {field} ")


def test_the_split_keeps_a_record_together(save):
    rated = [completion(i, RATINGS[i % 2]) for i in range(4)]
    file = FeedbackFile(save(*[record(f"prompt {i}", rated) for i in range(200)]), 0.3)
    sides = [list(feedback.read_feedback(file, split)) for split in ("train", "validation")]
    prompts = [[row.prompt for row in side] for side in sides]
    assert not set(prompts[0]) & set(prompts[1])
    assert all(side.count(prompt) == 4 for side in prompts for prompt in side)
    assert len(sides[0]) + len(sides[1]) == 800
    assert 30 <= len(set(prompts[1])) <= 90
