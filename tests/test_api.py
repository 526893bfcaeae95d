"""The five lines of the README, on a model that transformers wrote."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dro_jax import api
from dro_jax.cli import configuration, convert
from dro_jax.cli import train as train_command
from dro_jax.errors import UsageError

HERE = Path(__file__).parent
GOLDEN = HERE / "interop" / "golden" / "v1_1"
README = HERE.parent / "README.md"

REWARD = "def shorter(prompts, answers):\n    return [-len(answer) for answer in answers]\n"


def made_up_rows():
    """As TRL's KTO trainer takes them, with labels as `datasets` gives them."""
    rng = np.random.default_rng(0)
    return [
        {"prompt": f"p {k % 20}", "completion": "ab" * (k % 3), "label": np.bool_(rng.integers(2))}
        for k in range(40)
        if k % 3
    ]


def test_the_five_lines_of_the_readme(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(from dro_jax import api\n.*?)```", README.read_text(), re.S)
    for shown, used in {
        '"google/flan-t5-small"': repr(str(GOLDEN)),
        '"llm"': '"reward:rewards_of_api:shorter"',
        "TRAIN_STEPS=1000": "TRAIN_STEPS=2, BATCH_SIZE=8, TASK_FEATURE_LENGTHS=LENGTHS",
    }.items():
        assert block.count(shown) == 1
        block = block.replace(shown, used)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("rewards_of_api.py").write_text(REWARD)
    names = {
        "rows": made_up_rows(),
        "prompts": ["one", "two", "three"],
        "LENGTHS": {"inputs": 12, "targets": 7},
    }
    exec(block, names)
    assert (names["base"], names["aligned"]) == ("flan", "aligned")
    assert Path("aligned/checkpoint_2").is_dir()
    assert json.loads(Path("aligned_hf/config.json").read_text())["model_type"] == "t5"
    assert "win rate" in Path("side_by_side/report.md").read_text()
    report = json.loads(Path("side_by_side/report.json").read_text())
    assert str(report).count("aligned")
    # Nothing is done twice.
    assert api.load("nowhere", "flan") == "flan"
    assert (
        api.train(
            "aligned/feedback.jsonl",
            "flan",
            "aligned",
            TRAIN_STEPS=2,
            BATCH_SIZE=8,
            TASK_FEATURE_LENGTHS=names["LENGTHS"],
        )
        == "aligned"
    )
    greedy = api.generate("aligned", ["one", "two"], temperature=0.0, max_tokens=3)
    assert greedy == api.generate(
        "aligned", ["one", "two"], num_beams=1, temperature=0.0, max_tokens=3
    )


def test_rows_may_be_columns_and_labels_of_numpy(tmp_path):
    rows = made_up_rows()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for given in (rows, iter(rows), columns):
        place = api._write_rows(api.epath.Path(tmp_path / "rows.jsonl"), api._rows(given))
        written = [json.loads(line) for line in Path(place).read_text().splitlines()]
        assert written == [row | {"label": bool(row["label"])} for row in rows]


def test_columns_of_different_lengths():
    with pytest.raises(UsageError, match="different lengths"):
        api._rows({"prompt": ["a"], "completion": ["b", "c"]})


@pytest.fixture
def bound(tmp_path, monkeypatch):
    """What `train` binds the training to, which does not take place."""
    monkeypatch.setattr(configuration, "bound", lambda function: lambda: None)
    base = api.load(str(GOLDEN), str(tmp_path / "base"))

    def run(feedback, **settings):
        api.train(feedback, base, str(tmp_path / "run"), **settings)
        return configuration.arguments(train_command.train)

    return run


def test_a_deep_model_is_scanned_unless_the_caller_says_otherwise(bound, monkeypatch):
    shallow = bound("rows.jsonl")["model"]
    assert (shallow.scan_layers, shallow.remat) == (False, "none")
    monkeypatch.setattr(convert, "_LARGE", shallow.num_encoder_layers + shallow.num_decoder_layers)
    deep = bound("rows.jsonl")["model"]
    assert deep == dataclasses.replace(shallow, scan_layers=True, remat="dots")
    asked = bound("rows.jsonl", **{"t5.T5Config.remat": "full", "t5.T5Config.logits_chunk": 4})
    assert asked["model"] == dataclasses.replace(deep, remat="full", logits_chunk=4)
