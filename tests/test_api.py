"""The five lines of the README, on a model that transformers wrote."""

import dataclasses
import datetime
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dro_jax import api
from dro_jax.cli import configuration, convert
from dro_jax.cli import train as train_command
from dro_jax.data.feedback import Triplet, read_rows
from dro_jax.errors import UsageError
from dro_jax.training import checkpoints

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
    assert [policy["name"] for policy in report["policies"]] == ["aligned", "flan"]
    # The same lines again: load, train and compare go through, and nothing is trained twice.
    before = checkpoints.read_meta("aligned", 2)
    with pytest.raises(UsageError, match="aligned_hf: is there already"):
        exec(block, names)
    assert checkpoints.read_meta("aligned", 2) == before
    with pytest.raises(UsageError, match=f"flan: holds a model from {GOLDEN}, not from nowhere"):
        api.load("nowhere", "flan")
    with pytest.raises(UsageError, match="aligned: holds a model from elsewhere, not from"):
        api.load(str(GOLDEN), "aligned")


def test_texts_are_those_of_the_command_in_the_order_of_the_prompts(tmp_path):
    base = api.load(GOLDEN, tmp_path / "base")
    prompts = ["name a colour", "the quick brown fox", "red", "what is blue?", "red"]
    asked = {"temperature": 0.0, "max_tokens": 6, "batch_size": 2}
    texts = api.generate(Path(base), prompts, **asked)
    assert len(set(texts)) > 2
    assert texts[2] == texts[4]
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in prompts))
    flags = (f"--{name}={value}" for name, value in asked.items())
    arguments = ["generate", f"--checkpoint={base}", f"--prompts={file}", *flags]
    out = subprocess.check_output([sys.executable, "-m", "dro_jax.cli.main", *arguments], text=True)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["prompt"], row["completion"]) for row in rows] == list(
        zip(prompts, texts, strict=True)
    )
    # Alone, and backwards.
    assert [api.generate(base, [prompt], **asked)[0] for prompt in prompts[:2]] == texts[:2]
    assert api.generate(base, prompts[::-1], **asked) == texts[::-1]


def test_paths_and_numbers_of_numpy(bound, tmp_path):
    given = bound(
        Path("rows.jsonl"),
        TRAIN_STEPS=np.int64(5),
        POLICY_LEARNING_RATE=np.float32(0.5),
        TASK_FEATURE_LENGTHS={"inputs": np.int32(7), "targets": 6},
        CACHE_DIR=tmp_path / "cache",
    )
    assert given["feedback"].path == "rows.jsonl"
    assert (given["num_steps"], given["lengths"]) == (5, {"inputs": 7, "targets": 6})
    assert given["optimizer"].policy_learning_rate == 0.5
    places = (given["init_checkpoint"], given["model_dir"], given["cache_dir"])
    assert places == tuple(str(tmp_path / name) for name in ("base", "run", "cache"))


def test_a_t5x_checkpoint_over_pieces(tmp_path):
    with zipfile.ZipFile(HERE / "interop" / "golden_t5x" / "v1_1.zip") as file:
        file.extractall(tmp_path / "v1_1")
    with pytest.raises(UsageError, match="vocab_size is 136"):
        api.load(tmp_path / "v1_1", tmp_path / "base")
    pieces = GOLDEN / "spiece.model"
    base = api.load(tmp_path / "v1_1", tmp_path / "base", vocabulary_file=pieces)
    shutil.rmtree(tmp_path / "v1_1")
    assert api.load(tmp_path / "v1_1", tmp_path / "base") == base
    assert api.generate(base, ["red"], max_tokens=2)
    exported = Path(api.export(base, tmp_path / "exported", "t5x"))
    assert (exported / "checkpoint_0").is_dir()


def test_fields_that_training_ignores_may_be_anything(tmp_path):
    rows = [
        row | {"when": datetime.date(2026, 11, 21), "tokens": np.arange(3), "score": None}
        for row in made_up_rows()
    ]
    rows[0]["prompt"] = np.array([{"role": "user", "content": "as a conversation"}])
    place = api._write_rows(api.epath.Path(tmp_path / "rows.jsonl"), rows)
    triplets = list(read_rows(place))
    assert [type(triplet) for triplet in triplets] == [Triplet] * len(rows)
    assert triplets[0].prompt == "as a conversation"
    rows[1]["label"] = datetime.date(2026, 11, 21)
    with pytest.raises(
        UsageError, match=r"datetime.date\(2026, 11, 21\) is neither text nor a num"
    ):
        api._write_rows(api.epath.Path(tmp_path / "rows.jsonl"), rows)


def test_all_fields_that_are_read_are_kept(tmp_path):
    rated = {"response": "b", "annotations": {"helpfulness": {"Rating": "3"}}}
    rows = [
        {"prompt": "a", "response": "b", "score": 0.5},
        {"prompt": "a", "completion": "b", "reward": 0.5},
        {"prompt": "a", "completion": "b", "label": "down"},
        {"instruction": "a", "completions": [rated, rated]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = api._write_rows(api.epath.Path(tmp_path / "again.jsonl"), rows)
    triplets = list(read_rows(place))
    assert triplets == list(read_rows(str(tmp_path / "rows.jsonl")))
    assert [type(triplet) for triplet in triplets] == [Triplet] * 5


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
    base = api.load(GOLDEN, tmp_path / "base")

    def run(feedback, **settings):
        api.train(feedback, Path(base), tmp_path / "run", **settings)
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
