"""`dro_jax compare`: from runs and prompts to a report; what is reused, and what is refused."""

import dataclasses
import functools
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from clu import metric_writers
from etils import epath
from flax.core import meta

from dro_jax.cli import answers, compare, generate
from dro_jax.cli.generate import Completion
from dro_jax.data import demonstration
from dro_jax.evaluation.sampling import Decoding
from dro_jax.networks import T5

PROMPTS = demonstration.prompts("abcd")[::7]

REWARDS = '''
def length(prompts, answers):
    """Longer answers are better."""
    return [len(answer) for answer in answers]

def nothing(prompts, answers):
    return [float("nan")] * len(answers)
'''


LENGTH = "reward:rewards_of_test_compare:length"


def work_in(folder, patch):
    """Makes a folder, with prompts and rewards, the current one."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "rewards_of_test_compare.py").write_text(REWARDS)
    patch.chdir(folder)
    patch.setattr(sys, "path", [*sys.path, str(folder)])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with prompts and rewards."""
    work_in(tmp_path, monkeypatch)
    yield tmp_path
    sys.modules.pop("rewards_of_test_compare", None)


@pytest.fixture
def compared(place, command):
    """Runs `compare` on some policies, longer answers winning; returns the result and the report's numbers."""

    def run(*arguments, judge=LENGTH, output="out"):
        result = command(*flags(judge, output), *map(str, arguments))
        path = place / output / "report.json"
        return result, json.loads(path.read_text()) if path.exists() else None

    return run


def flags(judge=LENGTH, output="out"):
    return [
        "compare",
        "--prompts=prompts.txt",
        f"--judge={judge}",
        f"--output={output}",
        "--folds=2",
        "--batch_size=8",
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command, sft_run, dro_v_run):
    """The folder in which DRO-V was compared with SFT, and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        work_in(folder, patch)
        result = command(*flags(), str(dro_v_run.directory), str(sft_run.directory))
    sys.modules.pop("rewards_of_test_compare", None)
    assert (result.code, result.err) == (0, "")
    return folder / "out", result


@pytest.fixture
def again(finished, place):
    """That comparison's output folder once more, in the current folder."""
    shutil.copytree(finished[0], place / "out")
    return place / "out"


def completions_in(folder):
    """Rows of each file of completions, by the policy's name."""
    return {
        path.name.rpartition("-")[0]: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((folder / "completions").iterdir())
    }


def test_a_comparison_of_two_runs(finished):
    folder, result = finished
    report = json.loads((folder / "report.json").read_text())
    names = ["dro_v", "sft"]
    assert [policy["name"] for policy in report["policies"]] == names
    rows = completions_in(folder)
    lengths = np.array([[len(row["completion"]) for row in rows[name]] for name in names])
    assert lengths.shape == (2, len(PROMPTS))
    assert len({row["completion"] for row in rows["sft"]}) > 3
    scores = (np.sign(lengths[0] - lengths[1]) + 1) / 2
    (pair,) = report["pairs"]
    assert pair["win_rate"] == scores.mean()
    assert (pair["wins"], pair["losses"]) == ((scores == 1).sum(), (scores == 0).sum())
    assert len(pair["fold_rates"]) == 2
    assert [policy["mean_length"] for policy in report["policies"]] == lengths.mean(axis=1).tolist()
    verdicts = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    winners = {1.0: "dro_v", 0.5: "tie", 0.0: "sft"}
    assert [verdict["winner"] for verdict in verdicts] == [winners[score] for score in scores]
    assert [verdict["prompt"] for verdict in verdicts] == PROMPTS
    assert report["headline"] in " ".join(result.out.split())
    assert report["headline"] in (folder / "report.md").read_text()
    page = (folder / "report.html").read_text()
    assert "dro_v over sft" in page
    # Curves of both runs, and what all have in common.
    assert {"dro_v: loss/dro", "sft: loss/sft"} <= set(compare_captions(page))
    assert "train loss/dro" in report["policies"][0]["curves"]


def compare_captions(page):
    return [part.split("<")[0] for part in page.split("<figcaption>")[1:]]


def test_completions_are_those_of_generate(finished, sft_run, dro_v_run, place, command):
    rows = completions_in(finished[0])
    # Another policy, another seed: what follows from a place in the file is not the same luck.
    for seed, (name, run) in enumerate([("dro_v", dro_v_run), ("sft", sft_run)]):
        result = command(
            "generate",
            f"--checkpoint={run.directory}",
            "--prompts=prompts.txt",
            f"--seed={seed}",
            "--batch_size=8",
        )
        expected = [json.loads(line)["completion"] for line in result.out.splitlines()]
        assert [row["completion"] for row in rows[name]] == expected


def test_kl_is_the_mean_log_ratio_of_the_tokens_drawn(finished, sft_run, dro_v_run):
    report = json.loads((finished[0] / "report.json").read_text())
    assert report["reference"] == str(dro_v_run.directory / "reference")
    assert report["samples_policy"] is True
    rows = completions_in(finished[0])["dro_v"]
    ratios = np.array([row["log_ratio"] for row in rows])
    of_policy, of_sft = report["policies"]
    assert of_policy["log_ratio"]["mean"] == pytest.approx(ratios.mean())
    assert of_policy["log_ratio"]["standard_error"] == pytest.approx(
        ratios.std(ddof=1) / math.sqrt(len(ratios))
    )
    assert np.abs(ratios).max() > 1e-4
    # The reference itself, by its weights.
    assert of_sft["is_reference"]
    assert not of_policy["is_reference"]
    assert of_sft["log_ratio"] == {"mean": 0.0, "standard_error": 0.0}
    # The tokens that were drawn, by the plain forward.
    policy = generate.load_policy(str(dro_v_run.directory))
    reference = generate.load_policy(str(sft_run.directory))
    drawn = list(generate.complete(policy, PROMPTS, Decoding(8), seed=0, batch_size=8))
    assert of_policy["cut"] == sum(completion.tokens[-1] != 1 for completion in drawn) > 0
    expected = [
        log_prob(policy, prompt, completion.tokens) - log_prob(reference, prompt, completion.tokens)
        for prompt, completion in zip(PROMPTS, drawn, strict=True)
    ]
    np.testing.assert_allclose(ratios, expected, atol=2e-5)


@functools.cache
def forward(config):
    return jax.jit(T5(config).apply)


def log_prob(policy, prompt, target):
    """log pi(y|x) by the definition, with nothing packed or padded."""
    # One length for all: padding has no say, nor has what comes after a token.
    encoder = np.zeros((1, 13), np.int32)
    encoder[0, : len(prompt) + 1] = [byte + 3 for byte in prompt.encode()] + [1]
    decoder = np.zeros((1, 8), np.int32)
    decoder[0, 1 : len(target)] = target[:-1]
    variables = {"params": policy.params}
    logits = np.asarray(forward(policy.config)(variables, encoder, decoder), np.float64)[0]
    normal = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return normal[np.arange(len(target)), target].sum()


def test_log_ratios_by_hand(dro_v_run, sft_run):
    policy = generate.load_policy(str(dro_v_run.directory))
    reference = generate.load_policy(str(sft_run.directory))
    prompts = ["ann: d b a c", "bob: a"]
    tokens = [np.array([100, 35, 101, 1], np.int32), np.array([100, 200], np.int32)]
    completions = [Completion("", t) for t in tokens]
    got = answers.log_ratios(policy, reference, prompts, completions, 8)
    expected = [
        log_prob(policy, prompt, t) - log_prob(reference, prompt, t)
        for prompt, t in zip(prompts, tokens, strict=True)
    ]
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert np.abs(expected).min() > 1e-4


def test_log_ratios_to_a_reference_of_another_shape(dro_v_run):
    policy = generate.load_policy(str(dro_v_run.directory))
    config = dataclasses.replace(policy.config, num_encoder_layers=2, mlp_dim=8)
    tokens = np.ones((1, 2), np.int32)
    params = meta.unbox(T5(config).init(jax.random.key(1), tokens, tokens)["params"])
    reference = dataclasses.replace(policy, config=config, params=params)
    target = np.array([100, 35, 101, 1], np.int32)
    (got,) = answers.log_ratios(policy, reference, ["bob: a"], [Completion("", target)], 8)
    expected = log_prob(policy, "bob: a", target) - log_prob(reference, "bob: a", target)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert abs(expected) > 1e-2


def test_three_policies_one_of_them_a_file_and_one_a_reference(compared, dro_v_run, place):
    rows = [{"prompt": p, "completion": "a rather long answer"} for p in reversed(PROMPTS)]
    (place / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, report = compared(dro_v_run.directory, dro_v_run.directory / "reference", "other.jsonl")
    assert (result.code, result.err) == (0, "")
    assert report["win_rates"]["policies"] == ["dro_v", "dro_v/reference", "other.jsonl"]
    assert report["win_rates"]["matrix"][2][:2] == [1.0, 1.0]
    assert report["policies"][1]["is_reference"]
    assert report["policies"][2]["log_ratio"] is None
    assert report["headline"].startswith(
        "other.jsonl wins most often, 100.0% on average over the others; "
    )
    assert set(completions_in(place / "out")) == {"dro_v", "dro_v_reference"}


def test_the_same_command_samples_nothing_again(compared, sft_run, dro_v_run, again, monkeypatch):
    before = completions_in(again)
    first = json.loads((again / "report.json").read_text())

    def never(*_, **__):
        raise AssertionError("was sampled again")

    monkeypatch.setattr(answers, "complete", never)
    monkeypatch.setattr(answers, "load_policy", never)
    result, second = compared(dro_v_run.directory, sft_run.directory)
    assert result.code == 0
    assert completions_in(again) == before
    assert second | {"date": ""} == first | {"date": ""}


def test_what_an_interruption_left_is_kept(
    compared, sft_run, dro_v_run, place, finished, monkeypatch
):
    monkeypatch.setattr(answers, "SAVE_SECONDS", 0.0)
    whole = completions_in(finished[0])
    original, asked, sizes = answers.complete, [], []
    write_rows = answers.write_rows

    def interrupted(policy, prompts, *arguments, **options):
        asked.append(len(prompts))
        for number, completion in enumerate(original(policy, prompts, *arguments, **options)):
            if len(asked) == 1 and number == 10:
                raise KeyboardInterrupt
            yield completion

    def watched(path, rows):
        write_rows(path, rows)
        sizes.append(len(path.read_text().splitlines()))

    monkeypatch.setattr(answers, "complete", interrupted)
    monkeypatch.setattr(answers, "write_rows", watched)
    result, report = compared(dro_v_run.directory, sft_run.directory)
    assert (result.code, result.err, report) == (130, "dro_jax: interrupted\n", None)
    assert completions_in(place / "out")["dro_v"] == whole["dro_v"][:8]
    result, _ = compared(dro_v_run.directory, sft_run.directory)
    assert result.code == 0
    assert asked == [len(PROMPTS), len(PROMPTS) - 8, len(PROMPTS)]
    # Kept as it goes, and once more at the end.
    assert sizes == [8, 8, 16, 21, 21, 8, 16, 21, 21]
    assert not list(place.rglob("*.partial"))
    for name, rows in completions_in(place / "out").items():
        assert [row["completion"] for row in rows] == [row["completion"] for row in whole[name]]
        for row, expected in zip(rows, whole[name], strict=True):
            assert row["log_ratio"] == pytest.approx(expected["log_ratio"], abs=1e-5)


def test_a_language_model_judges_files_and_is_paid_once(compared, place, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "evaluation"))
    import judge_server

    # Twice the answer on the left; else the longer one.
    left_handed = PROMPTS[3], PROMPTS[11]

    def respond(request):
        if any(f"\n{prompt}\n" in request.question for prompt in left_handed):
            request.say("The first is better.\nVerdict: A")
        else:
            judge_server.prefer_longer(request)

    for name, answer in (("short", "b a"), ("long", "a b c d")):
        rows = [{"prompt": prompt, "completion": f"{answer} {prompt[:3]}"} for prompt in PROMPTS]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-this-test")
    monkeypatch.setenv("DRO_JAX_JUDGE_MODEL", "oracle")
    with judge_server.serving(respond) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        result, report = compared("short.jsonl", "long.jsonl", judge="llm")
        assert (result.code, result.err) == (0, "")
        assert len(server.requests) == 2 * len(PROMPTS)
        assert compared("short.jsonl", "long.jsonl", judge="llm")[1]["pairs"] == report["pairs"]
        assert len(server.requests) == 2 * len(PROMPTS)
    (pair,) = report["pairs"]
    counts = (pair["wins"], pair["ties"], pair["losses"], pair["flips"])
    assert counts == (0, 2, len(PROMPTS) - 2, 2)
    assert report["judge"] == "llm (oracle)"
    assert report["sampling"] == "as in the files"
    assert report["no_reference"] == "there are only completions, and no policies"
    verdicts = [
        json.loads(line) for line in (place / "out" / "verdicts.jsonl").read_text().splitlines()
    ]
    assert [v["prompt"] for v in verdicts if v["flipped"]] == list(left_handed)
    for path in (place / "out").rglob("*"):
        assert path.is_dir() or b"secret-of-this-test" not in path.read_bytes()


def test_everything_but_the_replies_goes_into_a_bucket(compared, place, monkeypatch):
    class Bucket:
        """Files of gs://bucket, in a folder."""

        def __getattr__(self, name):
            def call(*paths, **options):
                local = (os.fspath(p).replace("gs://bucket", f"{place}/bucket") for p in paths)
                return getattr(epath.backend.os_backend, name)(*local, **options)

            return call

    def backend(self):
        return Bucket() if os.fspath(self).startswith("gs://") else epath.backend.os_backend

    monkeypatch.setattr(epath.gpath._GPath, "_backend", property(backend))
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-this-test")
    monkeypatch.setenv("DRO_JAX_JUDGE_MODEL", "oracle")
    for name in ("one", "two"):
        rows = [{"prompt": prompt, "completion": name * len(prompt)} for prompt in PROMPTS]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "evaluation"))
    import judge_server

    with judge_server.serving(judge_server.prefer_longer) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        for _ in range(2):
            result, _ = compared("one.jsonl", "two.jsonl", judge="llm", output="gs://bucket/out")
            assert (result.code, result.err) == (0, "")
            assert len(server.requests) == 2 * len(PROMPTS)
    assert json.loads((place / "bucket/out/report.json").read_text())["pairs"][0]["ties"] == 21
    assert {path.name for path in (place / "bucket/out").iterdir()} == {
        "completions",
        "report.html",
        "report.json",
        "report.md",
        "verdicts.jsonl",
    }
    (replies,) = (place / "cache").rglob("*.sqlite")
    assert f"they are kept in {replies.parent}" in " ".join(result.out.split())


def test_a_run_that_goes_on_training_is_sampled_at_the_step_that_was_found(
    compared, sft_run, dro_v_run, place, monkeypatch
):
    shutil.copytree(dro_v_run.directory, place / "run")
    (place / "run/checkpoint_6").rename(place / "later")
    load_policy, asked = answers.load_policy, []

    def load_later(path, partitioning):
        # Between finding and loading, the training saves once more.
        if not (place / "run/checkpoint_6").exists():
            (place / "later").rename(place / "run/checkpoint_6")
        asked.append(path)
        return load_policy(path, partitioning)

    monkeypatch.setattr(answers, "load_policy", load_later)
    assert compared("run", sft_run.directory)[0].code == 0
    assert asked[0] == str(place / "run/checkpoint_4")
    rows = completions_in(place / "out")["run"]
    policy = generate.load_policy(str(dro_v_run.directory / "checkpoint_4"))
    expected = generate.complete(policy, PROMPTS, Decoding(8), seed=0, batch_size=8)
    assert [row["completion"] for row in rows] == [c.text for c in expected]


def test_another_checkpoint_in_the_same_place_is_sampled_anew(compared, sft_run, dro_v_run, again):
    before = set((again / "completions").iterdir())
    assert len(before) == 2
    older = dro_v_run.directory / "checkpoint_4"
    assert compared(older, sft_run.directory)[0].code == 0
    (new,) = set((again / "completions").iterdir()) - before
    assert new.name.startswith("dro_v_checkpoint_4-")


def test_curves_of_a_run_that_was_resumed(tmp_path):
    for first, value in ((1, 1.0), (3, 2.0)):
        for folder in ("train", "training_eval"):
            writer = metric_writers.SummaryWriter(str(tmp_path / folder))
            for step in range(first, first + 4):
                writer.write_scalars(step, {"loss/dro": value * step, "other": 0.0})
            writer.close()
        # TensorBoard names a file by the second.
        time.sleep(1.1)
    run = answers.Run("run", epath.Path(tmp_path), 6, {}, "run")
    again = dataclasses.replace(run, name="run/checkpoint_3", step=3)
    curves = compare.read_curves([run, again])
    assert set(curves) == {"run"}
    assert set(curves["run"]) == {"train loss/dro", "held out loss/dro"}
    curve = curves["run"]["train loss/dro"]
    assert curve.steps == [1, 2, 3, 4, 5, 6]
    assert curve.values == [1.0, 2.0, 6.0, 8.0, 10.0, 12.0]


def test_decoding_that_draws_otherwise_has_no_kl(compared, sft_run, dro_v_run, place):
    result, report = compared(dro_v_run.directory, sft_run.directory, "--temperature=0")
    assert result.code == 0
    assert report["samples_policy"] is False
    assert report["sampling"].startswith("greedy, at most 8 tokens")
    assert "| log-ratio to the reference (not KL) |" in (place / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("settings", "draws", "words"),
    [
        ({}, True, "sampled at temperature 1, at most 9 tokens, seeds from 3"),
        ({"temperature": 0.5}, False, "sampled at temperature 0.5, at most"),
        ({"top_k": 4}, False, "sampled at temperature 1, top-k 4, at most"),
        ({"top_p": 0.9}, False, "sampled at temperature 1, top-p 0.9, at most"),
        ({"temperature": 0.0}, False, "greedy, at most"),
        (
            {"temperature": 0.0, "num_beams": 4},
            False,
            "by a search of 4 beams, length penalty 1, at most",
        ),
    ],
    ids=str,
)
def test_how_answers_were_drawn(settings, draws, words):
    decoding = Decoding(9, **settings)
    assert compare.draws_from_policy(decoding) == draws
    assert compare.describe([decoding], 3).startswith(words)


def test_no_reference_is_said(compared, sft_run):
    older = sft_run.directory / "checkpoint_4"
    result, report = compared(sft_run.directory, older)
    assert result.code == 0
    assert report["reference"] is None
    assert report["no_reference"].startswith("no run has a reference of its own")
    assert all(policy["log_ratio"] is None for policy in report["policies"])
    assert list(report["policies"][1]["curves"]) == []
    result, report = compared(sft_run.directory, older, f"--reference={sft_run.directory}")
    assert result.code == 0
    assert report["policies"][0]["is_reference"]
    assert report["policies"][1]["log_ratio"]["mean"] != 0


def test_a_judge_without_a_verdict(compared, sft_run, dro_v_run, again):
    judge = "reward:rewards_of_test_compare:nothing"
    result, report = compared(dro_v_run.directory, sft_run.directory, judge=judge)
    assert result.code == 0
    assert report["pairs"][0]["unjudged"] == len(PROMPTS)
    assert report["pairs"][0]["win_rate"] is None
    assert report["headline"] == "The judge gave no verdict, so nothing can be said."
    verdicts = (again / "verdicts.jsonl").read_text().splitlines()
    assert {json.loads(line)["winner"] for line in verdicts} == {None}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x", "b/y"], ["x", "y"]),
        (["a/x", "b/x"], ["a/x", "b/x"]),
        (["r/checkpoint_3", "r/checkpoint_4", "s"], ["r/checkpoint_3", "r/checkpoint_4", "s"]),
        (["r/best", "s"], ["r/best", "s"]),
        (["p/r/reference", "q/r/reference"], ["p/r/reference", "q/r/reference"]),
        (["a/x.jsonl", "b/y.jsonl"], ["x.jsonl", "y.jsonl"]),
        (["a/v1.5", "a/v1.6"], ["v1.5", "v1.6"]),
        (["x", "x.jsonl", "d/x"], None),
    ],
    ids=str,
)
def test_names(paths, names):
    got = compare.names_of(paths)
    assert len(set(got)) == len(got)
    assert names is None or got == names


def refused(result, message):
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith(f"dro_jax: {message}")


def test_mistakes_are_told_before_anything_is_written(compared, sft_run, dro_v_run, place):
    a, b = dro_v_run.directory, sft_run.directory
    refused(compared(a)[0], f"{a}: give two policies or more to compare")
    refused(compared(a, a)[0], f"{a}: is given twice")
    refused(compared(a, os.path.relpath(a))[0], f"{os.path.relpath(a)}: is given twice")
    refused(compared(a, place)[0], f"{place}: no checkpoint here")
    refused(compared(a, b, "--folds=0")[0], "--folds is 0: give a whole number of at least 1")
    refused(compared(a, b, "--fold_size=0")[0], "--fold_size is 0: give a whole number")
    refused(compared(a, b, "--top_p=2")[0], "top_p is 2.0; expected")
    refused(compared(a, b, "--seed=-1")[0], "--seed -1: give a number")
    refused(compared(a, b, f"--reference={place}")[0], f"{place}: no checkpoint here")
    refused(compared(a, b, judge="nobody")[0], "--judge=nobody: there is no such judge")
    assert not (place / "out").exists()
    (place / "file").write_text("")
    refused(compared(a, b, output="file/out")[0], "file/out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n', ", line 1: no fields 'prompt' and 'completion'"),
        ('{"prompt": "a", "completion": 3}\n', ", line 1: field 'completion' is not text"),
        ('\n["a"]\n', ", line 2: no fields"),
        ('{"prompt": "a", "completion": "\\ud800"}\n', ", line 1: field 'completion' is not text"),
        ("", ": no completion of prompt 1 ('"),
        (b"\xff", ": cannot be read ("),
        (None, ": cannot be read ("),
    ],
    ids=str,
)
def test_bad_files_of_completions(compared, sft_run, place, content, message):
    path = place / "theirs.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(compared(sft_run.directory, "theirs.jsonl")[0], f"theirs.jsonl{message}")
    assert not (place / "out").exists()


def test_a_file_that_was_changed_is_refused(compared, sft_run, dro_v_run, again, place):
    path = next((again / "completions").glob("sft-*"))
    path.write_text(path.read_text()[:-30] + "\n")
    result, _ = compared(dro_v_run.directory, sft_run.directory)
    assert result.code == 2
    shown = path.relative_to(place)
    expected = f"dro_jax: {shown}, line {len(PROMPTS)}: is not what was written; delete"
    assert result.err.startswith(expected)
