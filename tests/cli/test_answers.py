"""Answers to compare: what a file of them belongs to, which reference they are held against, other systems' files."""

import dataclasses
import json

import pytest
from etils import epath

from dro_jax.cli import answers
from dro_jax.cli.generate import Sampling
from dro_jax.errors import UsageError

PROMPTS = ["ann: d b a c", "bob: a", "cy: c b"]

SAMPLING = Sampling(batch_size=8)


def test_a_file_is_of_one_policy_prompts_seed_reference_and_decoding(
    sft_run, dro_v_run, tmp_path, monkeypatch
):
    paths = []

    def keep(_policy, _reference, prompts, rows, _decoding, _sampling, path, _name):
        paths.append(path)
        rows += [
            {"prompt": prompt, "completion": "", "ended": True, "log_ratio": 0.0}
            for prompt in prompts
        ]

    monkeypatch.setattr(answers, "sample_rest", keep)
    monkeypatch.setattr(answers, "load_policy", lambda *_: None)
    run = answers.find(str(dro_v_run.directory), "run", PROMPTS)
    older = answers.find(str(dro_v_run.directory / "checkpoint_4"), "run", PROMPTS)
    sft = answers.find(str(sft_run.directory), "sft", PROMPTS)
    folder = epath.Path(tmp_path)
    answers.sample(run, sft, PROMPTS, SAMPLING, folder)
    answers.sample(run, sft, PROMPTS, dataclasses.replace(SAMPLING, batch_size=2), folder)
    assert len(set(paths)) == 1
    changes = [
        (older, sft, PROMPTS, {}),
        (run, None, PROMPTS, {}),
        (run, older, PROMPTS, {}),
        (run, sft, PROMPTS[1:], {}),
        (run, sft, PROMPTS[::-1], {}),
        (run, sft, PROMPTS, {"seed": 1}),
        (run, sft, PROMPTS, {"temperature": 0.5}),
        (run, sft, PROMPTS, {"top_k": 3}),
        (run, sft, PROMPTS, {"top_p": 0.5}),
        (run, sft, PROMPTS, {"max_tokens": 5}),
        (run, sft, PROMPTS, {"num_beams": 2}),
    ]
    for source, base, prompts, settings in changes:
        answers.sample(source, base, prompts, dataclasses.replace(SAMPLING, **settings), folder)
    assert len(set(paths)) == 1 + len(changes)


def test_runs_of_different_references_or_vocabularies_have_none_in_common(dro_v_run):
    run = answers.find(str(dro_v_run.directory), "run", PROMPTS)

    def like(**facts):
        return dataclasses.replace(run, meta=run.meta | facts)

    assert (
        answers.find_reference(None, [run, like(reference=None)])[0].weights()
        == run.meta["reference"]
    )
    for other in (like(reference="another"), like(vocabulary="another")):
        reference, why = answers.find_reference(None, [run, other])
        assert reference is None
        assert why.startswith("the runs have different references or vocabularies")
    gone = dataclasses.replace(run, directory=run.directory / "nowhere")
    assert answers.find_reference(None, [gone])[1].startswith(
        "the runs' reference is not there any more"
    )
    with pytest.raises(UsageError, match="has another vocabulary than"):
        answers.find_reference(str(dro_v_run.directory), [like(vocabulary="another")])


def test_repeated_prompts_take_completions_in_turn(tmp_path):
    rows = [("a", "1"), ("b", "2"), ("a", "3")]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    assert answers.read_completions(str(path), ["a", "a", "b"]) == ["1", "3", "2"]
