"""`dro_jax convert`: from Hugging Face, through training, and back; what is refused leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.core import meta

from dro_jax.cli import configuration, convert, generate
from dro_jax.cli import train as train_module
from dro_jax.data.vocabulary import encode_prompt
from dro_jax.evaluation.sampling import Decoding, make_sampler
from dro_jax.interop import huggingface, safetensors_files
from dro_jax.networks import T5, T5Config, ValueNetwork
from dro_jax.training import checkpoints, train_state

INTEROP = Path(__file__).parents[1] / "interop"
GOLDEN = INTEROP / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
TOLERANCE = 1e-5
TEXTS = ["ann: d b a c", "name a colour", " two  words ", "Z\u00fcrich \u2603", "x" * 30]


@pytest.fixture
def converted(command, tmp_path):
    """Converts into a new folder and returns it."""

    def run(source, name):
        result = command("convert", f"--from={source}", f"--to={tmp_path / name}")
        assert (result.code, result.err) == (0, "")
        assert not (tmp_path / f"{name}{convert.PARTIAL}").exists()
        return tmp_path / name

    return run


def tensors(folder):
    """Every array of a folder by its name there, as float32."""
    found = {}
    for path in epath.Path(folder).glob("*.safetensors"):
        found |= safetensors_files.open_file(path)
    return {name: array.read() for name, array in found.items()}


def read_json(path):
    return json.loads(Path(path).read_text())


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_bit_for_bit(converted, name):
    run = converted(GOLDEN / name, "run")
    back = converted(run, "back")
    before, after = tensors(GOLDEN / name), tensors(back)
    if name == "v1_1_as_version_5_makes_them":
        # Where the logits share the embedding's table, older versions want it twice.
        assert np.array_equal(after.pop("lm_head.weight"), after["shared.weight"])
    assert before.keys() == after.keys()
    assert all(array.tobytes() == after[key].tobytes() for key, array in before.items())
    config = read_json(GOLDEN / name / "config.json")
    assert read_json(back / "config.json") == config | {"dtype": "float32"}
    spiece = GOLDEN / name / "spiece.model"
    assert spiece.exists() == (back / "spiece.model").exists() == (name != "byt5")
    if spiece.exists():
        assert spiece.read_bytes() == (back / "spiece.model").read_bytes()
    else:
        added = read_json(GOLDEN / name / "tokenizer_config.json")["added_tokens_decoder"]
        sentinels = [token for token in added.values() if "<extra_id_" in token["content"]]
        assert read_json(back / "tokenizer_config.json")["extra_ids"] == len(sentinels) == 125
    assert not (back / "value").exists()


@pytest.mark.parametrize("name", ["v1_0", "v1_1"])
def test_what_was_imported_answers_as_transformers_does(converted, name):
    policy = generate.load_policy(str(converted(GOLDEN / name, "run")))
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    steps = golden["greedy"].shape[1]
    sampler = make_sampler(policy.config, Decoding(steps, temperature=0.0), 1)
    tokens = golden["encoder_tokens"].astype(np.int32)
    sampled = np.asarray(sampler(policy.params, tokens, 0, np.arange(len(tokens))))
    ended = np.cumsum(golden["greedy"] == 1, axis=1) - (golden["greedy"] == 1) > 0
    assert np.array_equal(np.where(ended, 0, sampled), golden["greedy"])


def test_generate_on_what_was_imported(converted, command, tmp_path):
    run = converted(GOLDEN / "byt5", "run")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red fox\n")
    flags = (f"--checkpoint={run}", f"--prompts={prompts}", "--max_tokens=4", "--temperature=0")
    result = command("generate", *flags)
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["prompt"] == "red fox"


@pytest.fixture(scope="module")
def aligned(command, feedback_file, tmp_path_factory):
    """Three steps of DRO-V from an imported model: the imported folder, and the run's."""
    return align(command, feedback_file, tmp_path_factory.mktemp("aligned"), "v1_1")


def align(command, feedback_file, folder, name):
    source = f"--from={GOLDEN / name}"
    assert command("convert", source, f"--to={folder / 'imported'}").code == 0
    bindings = {
        "FEEDBACK_FILE": str(feedback_file),
        "MODEL_DIR": str(folder / "run"),
        "TASK_FEATURE_LENGTHS": {"inputs": 12, "targets": 7},
        "BATCH_SIZE": 8,
        "TRAIN_STEPS": 3,
        "loop.Periods.checkpoint": 1,
        "POLICY_LEARNING_RATE": 1e-2,
        "VALUE_LEARNING_RATE": 1e-2,
        "optimizers.Adafactor.warmup_steps": 1,
        "optimizers.Adafactor.value_head_learning_rate": 0.5,
    }
    result = command(
        "train",
        "--gin_file=runs/dro_v_tiny.gin",
        f"--gin_file={folder / 'imported' / 'model.gin'}",
        *(f"--gin.{name}={value!r}" for name, value in bindings.items()),
    )
    assert result.code == 0, result.err
    return folder


def test_the_reference_is_what_was_imported(aligned):
    sums = [
        checkpoints.read_meta(place, 0)["checksums"]["policy"]
        for place in (aligned / "imported", aligned / "run" / "reference")
    ]
    assert sums[0] == sums[1]
    # What was learnt, and neither file nor flag of the run, is another.
    assert checkpoints.read_meta(aligned / "run", 3)["checksums"]["policy"] != sums[0]
    digest = checkpoints.read_meta(aligned / "imported", 0)["vocabulary"]
    assert digest.startswith("sentencepiece:")


def test_the_gin_file_binds_all_of_the_model(aligned):
    text = (aligned / "imported" / "model.gin").read_text()
    assert f"INIT_CHECKPOINT = '{aligned / 'imported'}'" in text
    assert f"VOCABULARY_FILE = '{aligned / 'imported' / 'vocabulary.model'}'" in text
    config = huggingface.model_config(read_json(GOLDEN / "v1_1" / "config.json"))
    for name, value in config.architecture().items():
        value = tuple(value) if isinstance(value, list) else value
        assert f"\n  {name} = {value!r}\n" in text
    assert "scan_layers = False" in text
    deep = convert.gin_file(
        huggingface.model_config(
            read_json(GOLDEN / "v1_1" / "config.json")
            | {"num_layers": 24, "num_decoder_layers": 24}
        ),
        epath.Path("gs://bucket/model"),
        has_vocabulary=False,
    )
    assert "scan_layers = True" in deep
    assert "remat = 'dots'" in deep
    assert "INIT_CHECKPOINT = 'gs://bucket/model'\nVOCABULARY_FILE = None\n" in deep


def test_the_line_that_import_recommends_is_a_configuration(aligned):
    files = ["runs/train.gin", str(aligned / "imported" / "model.gin"), "algorithms/dro_v.gin"]
    configuration.load(files, ["FEEDBACK_FILE = 'rows.jsonl'", "MODEL_DIR = 'out'"])
    bound = configuration.arguments(train_module.train)
    assert bound["init_checkpoint"] == str(aligned / "imported")
    assert bound["model"].emb_dim == 8


def test_a_run_comes_back_with_its_value_network(aligned, converted):
    back = converted(aligned / "run", "back")
    policy, value, _ = parameters(aligned / "run")
    names = huggingface.parameter_names(policy.config)
    stored = tensors(back)
    assert stored.keys() == set(names.values())
    assert np.array_equal(
        stored["lm_head.weight"], np.asarray(policy.params["decoder"]["logits_dense"]["kernel"]).T
    )
    stored = tensors(back / "value")
    assert stored["value_head.weight"].shape == (1, 8)
    assert np.array_equal(stored["value_head.weight"], np.asarray(value["value_head"]["kernel"]).T)
    assert np.array_equal(stored["value_head.bias"], value["value_head"]["bias"])
    assert "lm_head.weight" not in stored
    about = (back / "value" / "README.md").read_text()
    statistics = read_json(aligned / "run" / "reward_statistics.json")
    assert f"reward = {statistics['mean']!r} + {statistics['std']!r} * V" in about
    assert read_json(back / "generation_config.json") == {
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "max_new_tokens": 7,
    }
    # And in again: the same weights, ready to start from.
    again = converted(back, "again")
    sums = [
        checkpoints.read_meta(folder, step)["checksums"]["policy"]
        for folder, step in ((aligned / "run", 3), (again, 0))
    ]
    assert sums[0] == sums[1]


def test_one_checkpoint_or_the_reference_of_a_run(aligned, converted):
    run = aligned / "run"
    newest, third, second, reference = (
        tensors(converted(source, f"of {number}"))
        for number, source in enumerate(
            (run, run / "checkpoint_3", run / "checkpoint_2", run / "reference")
        )
    )
    original = tensors(GOLDEN / "v1_1")
    assert all(reference[name].tobytes() == original[name].tobytes() for name in original)
    assert all(newest[name].tobytes() == third[name].tobytes() for name in original)
    tables = [found["shared.weight"].tobytes() for found in (reference, second, third)]
    assert len(set(tables)) == 3


@pytest.fixture(scope="module")
def single_net_run(tmp_path_factory):
    """A single net over bytes, of random weights, with more decoder than encoder: its last entry is the value."""
    folder = tmp_path_factory.mktemp("single") / "run"
    config = T5Config(
        vocab_size=264,
        emb_dim=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=12,
        num_encoder_layers=1,
        num_decoder_layers=2,
        reserved_entry=True,
    )
    facts = {
        "model": config.architecture(),
        "reserved_entry": True,
        "vocabulary": "bytes",
        "algorithm": "dro_v_single_net",
        "dtype": "auto",
        "lengths": {"inputs": 16, "targets": 6},
    }
    policy = jax.jit(lambda: meta.unbox(train_state.init_policy(config, 3)))()
    checkpoints.save_policy(folder, policy, facts)
    return folder


def test_a_single_net_s_entry_is_suppressed(single_net_run, converted):
    back = converted(single_net_run, "back")
    generation = read_json(back / "generation_config.json")
    assert generation["suppress_tokens"] == [263]
    assert generation["use_cache"] is False
    described = read_json(back / "tokenizer_config.json")
    assert described == {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 5}


def parameters(run):
    """The policy of a run, its value network's parameters, and its facts."""
    policy = generate.load_policy(str(run))
    directory, step = checkpoints.find(run)
    facts = checkpoints.read_meta(directory, step)
    value = None
    if "value" in facts["checksums"]:
        abstract = generate.layout_of(policy.config, has_value=True).abstract().value
        value = checkpoints.restore_value(directory, step, abstract)
    return policy, value, facts


def expectations(run):
    """What dro_jax computes with a run, for check_with_transformers.py."""
    policy, value, facts = parameters(run)
    steps, length = min(facts["lengths"]["targets"], 12), 40
    encoded = [encode_prompt(policy.vocabulary, text, length) for text in TEXTS]
    tokens = np.zeros((len(TEXTS), length), np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    sampler = make_sampler(
        policy.config, Decoding(steps, temperature=0.0), policy.vocabulary.eos_id
    )
    greedy = np.asarray(sampler(policy.params, tokens, 0, np.arange(len(tokens))))
    ended = np.cumsum(greedy == 1, axis=1) - (greedy == 1) > 0
    greedy = np.where(ended, 0, greedy)
    decoder_tokens = np.pad(greedy[:, :-1], ((0, 0), (1, 0)))
    inputs = (jnp.asarray(tokens), jnp.asarray(decoder_tokens))
    expected = {
        "encoder_tokens": tokens,
        "decoder_tokens": decoder_tokens,
        "logits": jax.jit(T5(policy.config).apply)({"params": policy.params}, *inputs),
        "greedy": greedy,
        "texts": np.array(TEXTS),
        "token_ids": tokens,
    }
    if value is not None:
        network = jax.jit(ValueNetwork(policy.config).apply)
        expected["values"] = network({"params": value}, inputs[0])[:, 0]
        assert np.ptp(expected["values"]) > 1e-3
    return {name: np.asarray(array) for name, array in expected.items()}


TRANSFORMERS = os.environ.get("DRO_JAX_TRANSFORMERS_PYTHON", sys.executable)
"""A Python with torch, transformers and sentencepiece."""


@pytest.fixture
def compared(converted, tmp_path):
    """Exports a run and compares it in the real transformers."""
    probe = subprocess.run(
        [TRANSFORMERS, "-c", "import torch, transformers, sentencepiece"],
        capture_output=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip("torch, transformers or sentencepiece cannot be imported")

    def run(source):
        expected = expectations(source)
        np.savez(tmp_path / "expected.npz", **expected)
        script = str(INTEROP / "check_with_transformers.py")
        arguments = [str(converted(source, "back")), str(tmp_path / "expected.npz")]
        result = subprocess.run(
            [TRANSFORMERS, script, *arguments], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


def test_transformers_computes_the_same_with_an_aligned_run(aligned, compared):
    found = compared(aligned / "run")
    assert found["logits"] <= TOLERANCE
    assert found["values"] <= TOLERANCE
    assert found["greedy"]
    assert found["token_ids"]
    assert found["undecodable"] == []
    assert not found["tied"]
    assert found["dtype"] == "torch.float32"
    assert (found["max_new_tokens"], found["suppressed"]) == (7, None)
    assert found["logits_bfloat16"] < 0.2  # of logits of order 1, measured: README


def test_transformers_computes_the_same_with_a_single_net(single_net_run, compared):
    found = compared(single_net_run)
    assert found["logits"] <= TOLERANCE
    assert found["greedy"]
    assert found["token_ids"]
    assert found["suppressed"] == [263]
    assert found["undecodable"] == []


def test_transformers_decodes_every_entry_of_byt5_s_table(converted, compared):
    found = compared(converted(GOLDEN / "byt5", "run"))
    assert (found["undecodable"], found["token_ids"]) == ([], True)
    assert found["logits"] <= TOLERANCE


def test_transformers_computes_the_same_with_tied_logits(
    compared, command, feedback_file, tmp_path
):
    run = align(command, feedback_file, tmp_path, "v1_0") / "run"
    before = tensors(GOLDEN / "v1_0")["shared.weight"]
    found = compared(run)
    assert not np.array_equal(tensors(tmp_path / "back")["shared.weight"], before)
    assert found["logits"] <= TOLERANCE
    assert found["values"] <= TOLERANCE
    assert found["tied"]
    assert found["greedy"]


@pytest.fixture
def refused(command, tmp_path):
    """Converts what must be refused; returns the one line, after nothing is left at the target or beside it."""

    def run(source, target="target", code=2):
        before = sorted(tmp_path.rglob("*"))
        result = command("convert", f"--from={source}", f"--to={tmp_path / target}")
        assert result.code == code, result
        (line,) = result.err.splitlines()
        assert line.startswith("dro_jax: ")
        assert result.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return line.removeprefix("dro_jax: ")

    return run


@pytest.fixture
def copied(tmp_path):
    """A golden folder that a test may damage."""
    return lambda name="v1_1": Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def edit(path, **entries):
    path.write_text(json.dumps(read_json(path) | entries))


def test_source_that_is_nothing(refused, tmp_path):
    absent = tmp_path / "absent"
    assert refused(absent).startswith(f"{absent}: no such folder; give a Hugging Face model, its")
    (tmp_path / "empty").mkdir()
    line = refused(tmp_path / "empty")
    assert line.endswith("nor a run (checkpoint_<step>); found nothing")
    (tmp_path / "empty" / "saved_model.pb").write_text("")
    line = refused(tmp_path / "empty")
    assert "neither a Hugging Face model (config.json with model.safetensors) nor a T5X" in line
    assert line.endswith("found saved_model.pb")


def test_target_that_is_taken(refused, copied, tmp_path, monkeypatch):
    folder = copied()
    assert refused(folder, "v1_1") == (
        f"{folder}: is there already; give a folder that is empty or does not exist"
    )
    (tmp_path / "file").write_text("")
    assert "is there already" in refused(folder, "file")
    assert refused(folder, "file/below").startswith(f"{tmp_path / 'file/below'}: cannot be written")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert refused(folder, "here").endswith("here: is the folder you are in; give another one")


def test_only_what_a_conversion_left_is_removed(converted, tmp_path):
    (tmp_path / f"run{convert.PARTIAL}").mkdir()
    (tmp_path / f"run{convert.PARTIAL}" / "half").write_text("")
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "mine").write_text("")
    run = converted(GOLDEN / "byt5", "run")
    assert not (run / "half").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.partial"]
    assert (tmp_path / "run.partial" / "mine").exists()


def test_empty_target(converted, tmp_path):
    (tmp_path / "run").mkdir()
    converted(GOLDEN / "byt5", "run")
    assert (tmp_path / "run" / "checkpoint_0").is_dir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "pytorch_model.bin is a pickle, which may run anything when it is read, so it is not",
        ),
        (
            lambda f: os.truncate(f / "model.safetensors", 20000),
            "is not a whole safetensors file (",
        ),
        (lambda f: edit(f / "config.json", d_model=16), " there and [136, 16] in such a model, "),
        (lambda f: edit(f / "config.json", model_type="llama"), "is of model_type 'llama'"),
        (lambda f: (f / "spiece.model").unlink(), "has no spiece.model (tokenizer.json alone"),
        (lambda f: (f / "spiece.model").write_text("x"), "is not a SentencePiece model"),
        (lambda f: edit(f / "config.json", eos_token_id=2), "eos_token_id is 2, but the toke"),
    ],
)
def test_damaged_model(refused, copied, damage, message):
    folder = copied()
    damage(folder)
    line = refused(folder)
    assert line.startswith(str(folder))
    assert message in line


def test_missing_shard(refused, copied):
    folder = copied("v1_1_sharded")
    (folder / "model-00003-of-00003.safetensors").unlink()
    assert "1 of 3 files of model.safetensors.index.json are missing" in refused(folder)


def test_damaged_run(refused, converted, damaged_reads):
    run = converted(GOLDEN / "v1_1", "run")
    vocabulary = (run / "vocabulary.model").read_bytes()
    (run / "vocabulary.model").write_bytes(vocabulary + b"\0")
    assert "this checkpoint has another vocabulary" in refused(run)
    (run / "vocabulary.model").write_bytes(vocabulary)
    for path in (run / "checkpoint_0" / "policy").rglob("d/*"):
        path.write_bytes(b"")
    assert "damaged, cannot be read" in refused(run)


def test_full_disk_leaves_nothing(refused, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "gin_file", full)
    assert "No space left on device" in refused(GOLDEN / "v1_1", code=1)


def test_interruption_leaves_nothing(refused, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "gin_file", interrupt)
    assert refused(GOLDEN / "v1_1", code=130) == "interrupted"


def test_what_an_earlier_attempt_left_is_written_over(converted, tmp_path):
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "rest").write_text("")
    assert not (converted(GOLDEN / "byt5", "run") / "rest").exists()


def test_an_imported_folder_is_not_a_run_to_go_on_with(aligned, command, feedback_file):
    result = command(
        "train",
        "--gin_file=runs/dro_v_tiny.gin",
        f"--gin_file={aligned / 'imported' / 'model.gin'}",
        f"--gin.FEEDBACK_FILE={str(feedback_file)!r}",
        f"--gin.MODEL_DIR={str(aligned / 'imported')!r}",
    )
    assert result.code == 2
    assert "this checkpoint has another algorithm ('imported' there, 'dro_v' here)" in result.err


def test_a_model_of_another_size_is_no_reference(aligned, train, tmp_path):
    result = train(
        MODEL_DIR=str(tmp_path / "run"), INIT_CHECKPOINT=str(aligned / "imported"), TRAIN_STEPS=1
    )
    assert result.code == 2
    assert "this checkpoint has another model (vocab_size 136 there, 264 here" in result.err
