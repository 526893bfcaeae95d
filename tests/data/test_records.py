"""Records of files in every format that is read: the same rows, and one clear line where there are none."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from pyarrow import parquet

from dro_jax.data import records
from dro_jax.data.feedback import Triplet, UnusableRow, read_rows
from dro_jax.data.records import read_records
from dro_jax.errors import UsageError

ROWS = [
    {"prompt": f"prompt {i}", "completion": f"ü{i}", "reward": i / 7, "model": None}
    for i in range(3000)
]


def save(path, rows):
    """Writes rows in the format that the name asks for."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def judged(pattern):
    return list(read_rows(str(pattern)))


def refusal(pattern):
    with pytest.raises(UsageError) as error:
        list(read_records(str(pattern)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows[1].parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    found = list(read_records(save(tmp_path / name, ROWS)))
    assert [record.fields for record in found] == ROWS
    assert [record.line for record in found] == list(range(1, 3001))
    unit = "row" if "parquet" in name else "line"
    assert found[1500].where == f"{tmp_path / name}, {unit} 1501"


def test_a_glob_chains_its_files_in_order(tmp_path, monkeypatch):
    for name in ("b/2.jsonl", "a/9.jsonl.gz", "b/10.jsonl", "a/1.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, [{"name": f"{name} {i}"} for i in range(2)])
    (tmp_path / "a" / "folder.jsonl").mkdir()
    found = list(read_records(f"{tmp_path}/*/[0-9]*"))
    names = [name for name in ("a/1.parquet", "a/9.jsonl.gz", "b/10.jsonl", "b/2.jsonl")]
    assert [r.fields["name"] for r in found] == [f"{name} {i}" for name in names for i in range(2)]
    assert [r.line for r in found] == [1, 2] * 4
    assert found[-1].path == str(tmp_path / "b/2.jsonl")
    monkeypatch.chdir(tmp_path)
    assert records.paths("b/*.jsonl") == ["b/10.jsonl", "b/2.jsonl"]
    assert refusal("**/1.*") == "**/1.*: ** is not supported; write a * for each folder"
    assert refusal("a/*.jsonl") == "a/*.jsonl: no file matches; check the pattern"
    assert refusal("c/*.jsonl") == "c/*.jsonl: no file matches; check the pattern"


def test_parquet_nulls_and_columns_of_other_kinds(tmp_path):
    table = pa.table(
        {
            "prompt": ["p", None, "p", "p", "p"],
            "completion": ["c", "c", None, "c", None],
            "reward": pa.array([1.5, 1, 1, None, None], pa.float32()),
            "label": [None, None, None, True, None],
            "response": [None, None, None, None, b"\xff"],
            # These have no Python object.
            "when": pa.array([1] * 5, pa.timestamp("ns")),
            "date": pa.array([2**30] * 5, pa.date32()),
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    rows = judged(tmp_path / "rows.parquet")
    assert (rows[0], rows[3]) == (Triplet("p", "c", 1.5, 1), Triplet("p", "c", 1.0, 4))
    assert [row.kind for row in (rows[1], rows[2], rows[4])] == ["bad"] * 3
    assert rows[2].message.startswith(f"{tmp_path}/rows.parquet, row 3: field 'completion'")
    assert "field 'response' is \"b'\\\\xff'\", not text" in rows[4].message


def test_damaged_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    save(path, ROWS)
    whole = path.read_bytes()
    for cut in (0, 3, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert refusal(path) == f"{path}: is no Parquet file, or is damaged; write it anew"
    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1024)
    file = parquet.ParquetFile(path)
    second_prompts = file.metadata.row_group(1).column(0).dictionary_page_offset
    file.close()
    damaged = bytearray(path.read_bytes())
    damaged[second_prompts + 40 : second_prompts + 100] = b"\xa5" * 60
    path.write_bytes(damaged)
    assert refusal(path).endswith("or is damaged after row 1024; write it anew")
    not_utf8 = pa.array([b"\xff"]).view(pa.string())
    parquet.write_table(pa.table({"prompt": not_utf8}), path)
    assert "is damaged" in refusal(path)


def test_files_that_are_not_what_their_name_says(tmp_path):
    whole = Path(save(tmp_path / "p.parquet", ROWS[:9])).read_bytes()
    for name, content, problem in (
        ("a.jsonl", whole, "is Parquet; give its name the ending .parquet"),
        (
            "b.jsonl.gz",
            whole,
            "is not a gzip file, though its name ends in .gz; rename or compress it",
        ),
        ("c.parquet", b"{}", "is no Parquet file, or is damaged; write it anew"),
    ):
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name) == f"{tmp_path / name}: {problem}"
    for path in (tmp_path / "d.jsonl", tmp_path / "d.parquet"):
        assert refusal(path) == f"{path}: no such file; check the path of the feedback file"
        path.mkdir()
        assert (
            refusal(path) == f"{path}: is a directory; name a file in it, or all as {path}/*.jsonl"
        )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_trl_unpaired_rows(tmp_path, suffix):
    def said(*contents):
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]

    plain = [{"prompt": "p", "completion": c, "label": c == "good"} for c in ("good", "bad")]
    assert judged(save(tmp_path / f"plain{suffix}", plain)) == [
        Triplet("p", "good", 1.0, 1),
        Triplet("p", "bad", 0.0, 2),
    ]
    talks = [
        {"prompt": said("a", "b", "c"), "completion": said("d"), "label": True},
        {"prompt": said(""), "completion": said("d"), "label": False},
        {"prompt": [], "completion": said("d"), "label": False},
    ]
    first, *others = judged(save(tmp_path / f"talks{suffix}", talks))
    assert first == Triplet("a\n\nb\n\nc", "d", 1.0, 1)
    assert [row.kind for row in others] == ["empty prompt", "bad"]


def test_score_in_place_of_reward(tmp_path):
    row = {"prompt": "p", "completion": "c"}
    rows = [row | {"score": 0.25}, row | {"score": "7"}, row | {"score": 1, "reward": 1}]
    used, text, both = judged(save(tmp_path / "rows.jsonl", rows))
    assert used == Triplet("p", "c", 0.25, 1)
    assert "field 'score' is \"7\", not a number" in text.message
    assert "fields 'reward' and 'score' are both given; keep one of them" in both.message


def test_a_value_just_shallow_enough_to_be_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    # The last is too deep for Python 3.12 too, whose limit is its own.
    depths = [*range(700, 1001), 100_000]
    path.write_text("".join("[" * depth + "]" * depth + "\n" for depth in depths))
    rows = judged(path)
    assert all(isinstance(row, UnusableRow) for row in rows)
    assert [row.line for row in rows] == list(range(1, len(depths) + 1))
    assert "is [[[[" in rows[0].message
    assert "nested too deeply" in rows[-1].message


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A TFDS dataset of 5 and 2 examples, whose code nobody has registered."""
    examples = [{"prompt": f"p{i}", "completion": f"ü{i}", "reward": i / 4} for i in range(7)]
    examples[3]["prompt"] = b"\xff"

    class MadeUp(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = tmp_path / "made_up.py"

        def _info(self):
            kinds = {"prompt": tf.string, "completion": tf.string, "reward": tf.float32}
            features = tfds.features.FeaturesDict(kinds)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": enumerate(examples[:5]), "later": enumerate(examples[5:])}

        def _generate_examples(self):
            raise AssertionError("the splits are given whole")

    MadeUp(data_dir=tmp_path).download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path / "made_up" / "1.0.0"


def test_tfds(dataset):
    rows = judged("tfds:made_up")
    assert [rows[i] for i in (0, 1, 4)] == [
        Triplet(f"p{i}", f"ü{i}", i / 4, i + 1) for i in (0, 1, 4)
    ]
    assert rows[3].message.startswith("tfds:made_up, example 4: field 'prompt' holds half a surr")
    assert judged("tfds:made_up:1.0.0#later[1:]") == [Triplet("p6", "ü6", 1.5, 1)]


def test_what_is_there(dataset, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    for there in ("tfds:made_up", f"{tmp_path}/a.jsonl", f"{tmp_path}/*.jsonl"):
        assert records.exist(there)
    for gone in ("tfds:nowhere", f"{tmp_path}/b.jsonl", f"{tmp_path}/*.parquet"):
        assert not records.exist(gone)


def test_tfds_that_cannot_be_read(dataset):
    for name in ("made_up#none", "nowhere", "", "made_up:9.9.9"):
        message = refusal(f"tfds:{name}")
        assert message.startswith(f"tfds:{name}: cannot be opened by TFDS (")
        assert message.endswith("; prepare it first, with TFDS_DATA_DIR set")
    (file,) = dataset.glob("*train*")
    file.write_bytes(file.read_bytes()[:-20])
    message = refusal("tfds:made_up")
    assert message.startswith("tfds:made_up: cannot be read after example 4 by TFDS (")
    assert message.endswith("; prepare it anew")
