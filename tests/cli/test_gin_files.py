"""Every shipped gin file, and what the command says about mistakes in gin files and flags."""

import dataclasses
import re
from pathlib import Path

import gin
import jax
import numpy as np
import pytest

from dro_jax.cli import configuration, demo
from dro_jax.cli import train as train_module
from dro_jax.errors import UsageError
from dro_jax.networks import T5Config
from dro_jax.training import train_state
from dro_jax.training.algorithms import DroP, DroV, Kto, Needs, Pairwise, Sft, TwoSampleDro
from dro_jax.training.loop import Periods
from dro_jax.training.optimizers import Adafactor
from dro_jax.training.partitioning import Partitioning

ROOT = configuration.shipped_configs()
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.gin"))
MODELS = [name for name in FILES if name.startswith("models/")]
ALGORITHMS = [name for name in FILES if name.startswith("algorithms/")]
BASE = "runs/train.gin"
WITHOUT_A_METHOD = "runs/demo_align.gin"
BASES = [BASE, WITHOUT_A_METHOD, *(name for name in FILES if name.endswith("/base.gin"))]
# Read by T5X itself, in tests/interop/test_t5x_training.py.
OF_T5X = [name for name in FILES if name.startswith("t5x/")]
RUNS = [name for name in FILES if name not in (*MODELS, *ALGORITHMS, *BASES, *OF_T5X)]

METHODS = {
    "dro_v": DroV(),
    "dro_v_single_value": DroV(values="single"),
    "dro_v_single_net": DroV(networks="single"),
    "dro_v_single_net_single_value": DroV(values="single", networks="single"),
    "dro_v_per_token": DroV(values="per_token"),
    "dro_p": DroP(),
    "dro_two_sample": TwoSampleDro(),
    "kto": Kto(tau=5.0),
    "kto_labels": Kto(tau=0.1, desirable="above_dataset_mean"),
    "dpo": Pairwise(kind="dpo"),
    "ipo": Pairwise(kind="ipo"),
    "slic": Pairwise(kind="slic"),
    "sft": Sft(),
    "sft_filtered": Sft(),
}

REQUIRED = ["FEEDBACK_FILE = 'feedback.jsonl'", "MODEL_DIR = 'out'"]


def check_run():
    """Builds everything that a loaded run names; nothing is trained."""
    arguments = gin.get_bindings(train_module.train)
    types = {
        "model": T5Config,
        "optimizer": Adafactor,
        "periods": Periods,
        "rules": Partitioning,
        "num_steps": int,
        "batch_size": int,
        "seed": int,
    }
    for name, kind in types.items():
        assert isinstance(arguments[name], kind), name
    assert (arguments["feedback"].path, arguments["model_dir"]) == ("feedback.jsonl", "out")
    assert {"inputs", "targets"} <= set(arguments["lengths"])
    assert set(arguments["optimizer"].transforms()) == {"policy", "value"}
    assert isinstance(arguments["algorithm"].needs, Needs)
    return arguments


def test_the_files_are_found():
    assert len(MODELS) >= 12
    assert {name.removeprefix("algorithms/") for name in ALGORITHMS} == {
        f"{name}.gin" for name in METHODS
    }
    assert {name for name in METHODS if name != "sft"} == set(demo.ALGORITHMS)
    assert {"runs/dro_v_tiny.gin", "runs/sft_tiny.gin", "runs/demo_sft.gin"} <= set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_every_run_builds_its_parts(name):
    configuration.load([name], REQUIRED)
    check_run()


def test_the_rules_in_the_base_file_are_the_library_s():
    configuration.load([BASE, "models/tiny.gin", "algorithms/dro_v.gin"], REQUIRED)
    assert check_run()["rules"] == Partitioning()


@pytest.mark.parametrize("name", METHODS)
def test_every_algorithm_is_the_method_its_name_says(name):
    configuration.load([BASE, "models/tiny.gin", f"algorithms/{name}.gin"], REQUIRED)
    arguments = check_run()
    assert arguments["model"].vocab_size == 384
    assert arguments["algorithm"] == METHODS[name]
    top_fraction = 0.25 if name == "sft_filtered" else 1.0
    assert arguments["feedback"].top_fraction == top_fraction


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("sft")])
def test_tau_and_the_rest_are_one_binding_away(name):
    method = type(METHODS[name]).__name__
    bindings = ["TAU = 0.3", f"algorithms.{method}.log_probs = 'mean'"]
    configuration.load([WITHOUT_A_METHOD, f"algorithms/{name}.gin"], [*REQUIRED, *bindings])
    algorithm = check_run()["algorithm"]
    assert (algorithm.tau, algorithm.log_probs) == (0.3, "mean")


@pytest.mark.parametrize("name", RUNS)
def test_every_run_names_what_it_needs(name):
    with pytest.raises(UsageError, match=r"^FEEDBACK_FILE, MODEL_DIR must be given: add --gin\."):
        configuration.load([name])
    header = (ROOT / name).read_text().split("from __gin__")[0]
    assert header.startswith("# ")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_the_parameters_its_header_states(name):
    configuration.load([BASE, name, "algorithms/dro_v.gin"], REQUIRED)
    model = check_run()["model"]
    shapes = jax.eval_shape(lambda: train_state.init_policy(model, 0))
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    header = (ROOT / name).read_text().split("from __gin__")[0]
    stated = re.search(r"(\d+)(\.\d+)? (million|billion) parameters", header)
    assert stated, f"{name}: the header states no number of parameters"
    digits = len(stated[2] or ".") - 1
    in_units = count / {"million": 1e6, "billion": 1e9}[stated[3]]
    assert f"{in_units:.{digits}f}" == stated[1] + (stated[2] or "")


@pytest.mark.parametrize(
    ("name", "count"),
    # Of the published checkpoints (t5-*, google/t5-v1_1-*), with one embedding table for both stacks.
    [
        ("models/t5_1_0_small.gin", 60_506_624),
        ("models/t5_1_0_base.gin", 222_903_552),
        ("models/t5_1_1_small.gin", 76_961_152),
        ("models/t5_1_1_base.gin", 247_577_856),
        ("models/t5_1_1_xl.gin", 2_849_757_184),
    ],
)
def test_sizes_of_published_checkpoints(name, count):
    configuration.load([BASE, name, "algorithms/sft.gin"], REQUIRED)
    model = gin.get_bindings(train_module.train)["model"]
    shapes = jax.eval_shape(lambda: train_state.init_policy(model, 0))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == count


PAPER_RATES = {"tenth": 1e-5, "half": 5e-5, "fivefold": 5e-4}


@pytest.mark.parametrize(("size", "steps"), [("t5_large", 40000), ("t5_xl", 20000)])
def test_full_size_experiments_are_the_paper_s(size, steps):
    """The paper's set-up, and each arm differs from dro_v.gin or kto.gin in what it is named after only."""
    names = [name for name in RUNS if name.startswith(f"experiments/{size}/")]
    assert len(names) == (16 if size == "t5_large" else 2)
    for name in names:
        configuration.load([name], REQUIRED)
        arguments = check_run()
        arm = Path(name).stem
        optimizer, algorithm = arguments["optimizer"], arguments["algorithm"]
        joint, value = (re.search(rf"_{kind}_(\w+)", arm) for kind in ("rates", "value_rate"))
        rate = PAPER_RATES[joint[1]] if joint else 1e-4
        assert optimizer.policy_learning_rate == rate
        assert optimizer.value_learning_rate == (PAPER_RATES[value[1]] if value else rate)
        assert (optimizer.warmup_steps, optimizer.decay_rate) == (150, 0.8)
        sharing = "single" in arm
        assert arguments["num_steps"] == (10000 if sharing else steps)
        assert (arguments["batch_size"], arguments["max_examples"]) == (32, 1)
        assert arguments["lengths"] == {"inputs": 512, "targets": 512}
        assert (arguments["periods"].checkpoint, arguments["keep_every"]) == (2000, 2000)
        assert arguments["model"].emb_dim == (1024 if size == "t5_large" else 2048)
        method = arm if sharing else re.match("dro_v|dro_p|kto", arm)[0]
        tau = re.search(r"_tau_([\d.]+)", arm)
        expected = METHODS[method]
        assert algorithm == (dataclasses.replace(expected, tau=float(tau[1])) if tau else expected)


@pytest.mark.parametrize("name", [name for name in RUNS if "/miniature/" in name])
def test_the_miniature_varies_what_the_full_size_does(name):
    configuration.load([name], REQUIRED)
    arguments = check_run()
    arm = Path(name).stem.removeprefix("larger_")
    larger = Path(name).stem.startswith("larger_")
    assert arguments["model"].emb_dim == (128 if larger else 64)
    if arm == "sft":
        assert arguments["algorithm"] == Sft()
        return
    small = arguments["optimizer"]
    configuration.load([f"experiments/t5_large/{arm}.gin"], REQUIRED)
    full = check_run()
    assert arguments["algorithm"] == full["algorithm"]
    bases = ((5e-4, 1e-4), (1e-3, 1e-4), (1e-2, 1e-2))
    kinds = ("policy_learning_rate", "value_learning_rate", "value_head_learning_rate")
    for kind, (ours, paper) in zip(kinds, bases, strict=True):
        assert getattr(small, kind) / ours == pytest.approx(
            getattr(full["optimizer"], kind) / paper
        )


@pytest.mark.parametrize(
    "names", [["runs/demo_sft.gin"], [WITHOUT_A_METHOD, "algorithms/dro_v.gin"]]
)
def test_the_demo_and_its_gin_files_agree(names):
    configuration.load(names, REQUIRED)
    arguments = check_run()
    assert arguments["feedback"].validation_fraction == demo.VALIDATION_FRACTION
    assert getattr(arguments["algorithm"], "tau", demo.TAU) == demo.TAU


@pytest.mark.parametrize("name", ["feedback", "optimizer", "periods", "rules", "win_rate"])
def test_defaults_are_the_same_in_gin_and_in_python(name):
    configuration.load([BASE, "models/tiny.gin", "algorithms/dro_v.gin"], REQUIRED)
    bound = gin.get_bindings(train_module.train)[name]
    for field in dataclasses.fields(bound):
        if field.default is not dataclasses.MISSING:
            assert getattr(bound, field.name) == field.default, field.name


def test_a_later_binding_wins():
    configuration.load(["runs/sft_tiny.gin"], [*REQUIRED, "TRAIN_STEPS = 7", "TRAIN_STEPS = 8"])
    assert check_run()["num_steps"] == 8


def test_files_are_read_in_order_and_search_paths_are_searched(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        folder.mkdir()
        (folder / f"mine_{i}.gin").write_text(
            f"TRAIN_STEPS = {i + 1}\nBATCH_SIZE = {8 * (i + 1)}\n"
        )
    files = ["runs/sft_tiny.gin", "mine_0.gin", "mine_1.gin"]
    configuration.load(files, [*REQUIRED, "BATCH_SIZE = 40"], [str(f) for f in folders])
    arguments = check_run()
    assert (arguments["num_steps"], arguments["batch_size"]) == (2, 40)


@pytest.fixture
def refused(command, tmp_path, monkeypatch):
    """Runs `train` on the tiny SFT run with other flags; returns the one line on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, gin_file="runs/sft_tiny.gin", required=True):
        given = ["--gin.FEEDBACK_FILE='f.jsonl'", "--gin.MODEL_DIR='out'"] if required else []
        result = command("train", f"--gin_file={gin_file}", *given, *flags)
        assert result.code == 2
        assert result.out == ""
        (line,) = result.err.splitlines()
        assert not Path("out").exists()
        return line

    return run


def test_misspelt_macro(refused):
    line = refused("--gin.TRAIN_STEP=3")
    assert line == (
        "dro_jax: TRAIN_STEP: nothing in this configuration uses it; did you mean TRAIN_STEPS?"
    )


def test_macro_unlike_any_other(refused):
    line = refused("--gin.XYZZY=3")
    assert "XYZZY: nothing in this configuration uses it; known here: ALGORITHM, BATCH_SIZE" in line


def test_macro_of_another_method(refused):
    assert "TAU: nothing in this configuration uses it" in refused("--gin.TAU=3")


def test_unknown_parameter_of_a_known_class(refused):
    line = refused("--gin.optimizers.Adafactor.policy_rate=3")
    assert line.startswith("dro_jax: --gin.optimizers.Adafactor.policy_rate=3: ")
    assert "policy_rate" in line.split(": ", 2)[2]


def test_unknown_class(refused):
    line = refused("--gin.optimizers.Adam.policy_learning_rate=3")
    assert line.startswith("dro_jax: --gin.optimizers.Adam.policy_learning_rate=3: ")
    assert "Adam" in line.split(": ", 2)[2]


def test_unknown_module(refused):
    line = refused("--gin.optimisers.Adafactor.decay_rate=3")
    assert line.startswith("dro_jax: --gin.optimisers.Adafactor.decay_rate=3: ")


def test_missing_gin_file(refused):
    line = refused(gin_file="runs/nowhere.gin")
    assert line.startswith("dro_jax: runs/nowhere.gin: ")
    assert "a name below gin_configs such as runs/dro_v_tiny.gin" in line


def test_missing_included_file(refused, tmp_path):
    (tmp_path / "mine.gin").write_text('include "models/none.gin"\n')
    line = refused(gin_file=str(tmp_path / "mine.gin"))
    assert line.startswith(f"dro_jax: {tmp_path}/mine.gin: ")
    assert "models/none.gin" in line


def test_syntax_error_in_a_file(refused, tmp_path):
    (tmp_path / "mine.gin").write_text("TRAIN_STEPS = (3\n")
    line = refused(gin_file=str(tmp_path / "mine.gin"))
    assert line.startswith(f"dro_jax: {tmp_path}/mine.gin, line ")
    assert re.search(r", line \d+: not a gin value; strings need quotes", line)


def test_required_macros_are_listed_together(refused):
    line = refused(required=False)
    assert line.startswith("dro_jax: FEEDBACK_FILE, MODEL_DIR must be given: add ")
    assert "--gin.FEEDBACK_FILE=\"'…'\" --gin.MODEL_DIR=\"'…'\"" in line


def test_string_without_quotes(refused):
    line = refused("--gin.INIT_CHECKPOINT=out/sft")
    assert line.startswith("dro_jax: --gin.INIT_CHECKPOINT=out/sft: ")
    assert "strings need quotes of their own, as in --gin.MODEL_DIR=\"'out'\"" in line


def test_binding_without_a_value(refused):
    assert refused("--gin.TRAIN_STEPS") == "dro_jax: --gin.TRAIN_STEPS: write --gin.NAME=VALUE"


def test_gin_flags_belong_to_train(command):
    result = command("demo", "--gin.TRAIN_STEPS=3")
    assert result.code == 2
    assert result.err.splitlines() == [
        "dro_jax: --gin.TRAIN_STEPS = 3: only `dro_jax train`, `cache`, `plan` and `paper` take gin flags"
    ]


def test_repeated_flags_through_the_command(refused, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.gin").write_text(f"BATCH_SIZE = {ord(name)}\n")
    search = [f"--gin_search_paths={tmp_path / name}" for name in ("a", "b")]
    line = refused("--gin_file=a.gin", "--gin_file=b.gin", *search)
    assert line.startswith("dro_jax: BATCH_SIZE 98 does not divide")
    line = refused("--gin_file=b.gin", "--gin_file=a.gin", *search, "--gin.BATCH_SIZE=9")
    assert line.startswith("dro_jax: BATCH_SIZE 9 does not divide")


@pytest.mark.parametrize("arguments", [[], ["train"], ["fly"], ["generate"]])
def test_argparse_mistakes_exit_with_2(command, arguments):
    assert command(*arguments).code == 2


def test_version(command):
    result = command("--version")
    assert result.code == 0
    assert result.out.startswith("dro_jax ")
