"""UltraFeedback as a TFDS dataset: prepared from made-up files, read back as a feedback file."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet

import dro_jax
from dro_jax.data.feedback import read_rows
from dro_jax.data.records import read_records
from dro_jax.data.ultrafeedback_builder import UltraFeedback
from dro_jax.errors import UsageError


def made_up(first, last):
    """Records of three completions, the last of which nobody rated."""
    return [
        {
            "instruction": f"question {i}",
            "completions": [
                {
                    "model": f"model {j}",
                    "response": f"answer {i} {j}",
                    "overall_score": overall,
                    "annotations": {
                        "honesty": {"Rating": honesty},
                        "truthfulness": {"Rating": "N/A"},
                    },
                }
                for j, (overall, honesty) in enumerate(
                    [(str(i), str(1 + i % 5)), (str(i + 0.5), "2.1"), ("N/A", "N/A")]
                )
            ],
        }
        for i in range(first, last)
    ]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


EXPECTED = {
    (f"question {i}", f"answer {i} {j}", float(reward), f"model {j}")
    for i in range(9)
    for j, reward in enumerate([1 + i % 5, 2.1])
}


@pytest.fixture(scope="module")
def dummy_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dummy")
    write_jsonl(folder / "first.jsonl", made_up(0, 4))
    write_jsonl(folder / "second.jsonl", made_up(4, 9))
    return folder


class UltraFeedbackTest(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = UltraFeedback
    SPLITS = {"train": 18}  # noqa: RUF012

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def example_dir(cls, dummy_data):
        cls.EXAMPLE_DIR = str(dummy_data)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_it_reads_back_as_a_feedback_file(tmp_path, monkeypatch, dummy_data, kind):
    manual = dummy_data
    if kind == "parquet":
        manual = tmp_path / "manual"
        manual.mkdir()
        parquet.write_table(pa.Table.from_pylist(made_up(0, 9)), manual / "train.parquet")
    download = tfds.download.DownloadConfig(manual_dir=manual)
    for config in (None, "overall"):
        builder = UltraFeedback(data_dir=tmp_path / "data", config=config)
        builder.download_and_prepare(download_config=download)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    names = ("prompt", "completion", "reward", "model")
    found = [tuple(r.fields[n] for n in names) for r in read_records("tfds:ultra_feedback")]
    assert set(found) == EXPECTED
    assert len(found) == len(EXPECTED)
    rows = read_rows("tfds:ultra_feedback")
    assert [(row.prompt, row.completion, row.reward) for row in rows] == [row[:3] for row in found]
    overall = {row.completion: row.reward for row in read_rows("tfds:ultra_feedback/overall")}
    assert overall == {f"answer {i} {j}": i + j / 2 for i in range(9) for j in range(2)}


def test_keys_are_unique_and_stable(tmp_path, dummy_data):
    builder = UltraFeedback(data_dir=tmp_path)
    keys = [key for key, _ in builder._generate_examples(dummy_data)]
    assert keys == [key for key, _ in builder._generate_examples(dummy_data)]
    assert len(set(keys)) == len(keys) == 18
    assert keys[:3] == ["first.jsonl:1:1", "first.jsonl:1:2", "first.jsonl:2:1"]


def broken(completion):
    return json.dumps({"instruction": "p", "completions": [completion]})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "{}: put all *.jsonl or all *.parquet into it"),
        ({"a.jsonl": 1, "b.parquet": 1}, "{}: put all *.jsonl or all *.parquet into it"),
        ({"a.jsonl": "{"}, "{}/a.jsonl, line 1: is not JSON"),
        ({"a.jsonl": '{"prompt": "p"}'}, "{}/a.jsonl, line 1: has no fields 'instruction' and"),
        ({"a.jsonl": broken({"overall_score": 1})}, "{}/a.jsonl, line 1, completion 1: prompt or"),
        (
            {"a.jsonl": broken({"response": "r", "overall_score": "ten"})},
            "{}/a.jsonl, line 1, compl",
        ),
    ],
)
def test_files_it_refuses(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(
            content if isinstance(content, str) else json.dumps(made_up(0, 1)[0])
        )
    builder = UltraFeedback(data_dir=tmp_path / "data", config="overall")
    with pytest.raises(UsageError) as refusal:
        list(builder._generate_examples(tmp_path))
    assert str(refusal.value).startswith(message.format(tmp_path))


def test_nothing_else_imports_it():
    sources = list(Path(dro_jax.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    assert not [source for source in sources if "ultrafeedback_builder" in source.read_text()]
