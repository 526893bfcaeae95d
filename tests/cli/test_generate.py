"""`dro_jax generate`: prompts in, completions out."""

import io
import json
import logging
import sys

import numpy as np
import pytest

from dro_jax.cli import generate
from dro_jax.evaluation.sampling import Decoding, make_sampler

PROMPTS = ["ann: d b a c", "bob: a b c d", "fay: c b a d", "cat: b a d c", "eve: d c b a"]


@pytest.fixture
def completions(command, sft_run, tmp_path):
    """Runs `generate` on a file of prompts; returns the rows on stdout."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n")

    def run(*flags, prompts=path):
        checkpoint = f"--checkpoint={sft_run.directory}"
        result = command("generate", checkpoint, f"--prompts={prompts}", *flags)
        assert (result.code, result.err) == (0, "")
        return [json.loads(line) for line in result.out.splitlines()]

    return run


def test_a_row_a_prompt_and_nothing_else_on_stdout(completions):
    rows = completions()
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(set(row) == {"prompt", "completion"} for row in rows)
    assert all(isinstance(row["completion"], str) for row in rows)
    assert len({row["completion"] for row in rows}) > 1


def test_the_completions_are_the_sampler_s(completions, sft_run):
    policy = generate.load_policy(str(sft_run.directory))
    assert policy.lengths == {"inputs": 13, "targets": 8}
    tokens = np.zeros((len(PROMPTS), 13), np.int32)
    for row, prompt in enumerate(PROMPTS):
        ids = [byte + 3 for byte in prompt.encode()] + [1]
        tokens[row, : len(ids)] = ids
    sampler = make_sampler(policy.config, Decoding(8, temperature=0.7, top_k=9), eos_id=1)
    sampled = np.asarray(sampler(policy.params, tokens, 4, np.arange(len(PROMPTS))))
    expected = []
    for row in sampled:
        row = row[: list(row).index(1)] if 1 in row else row
        expected.append(bytes(t - 3 for t in row if 3 <= t < 259).decode("utf-8", "ignore"))
    rows = completions("--temperature=0.7", "--top_k=9", "--seed=4")
    assert [row["completion"] for row in rows] == expected


def test_greedy_is_deterministic(completions):
    greedy = completions("--temperature=0")
    assert greedy == completions("--temperature=0", "--seed=8")
    assert greedy == completions("--top_k=1", "--seed=3")


def test_the_seed_fixes_the_text_whatever_the_batch_size_and_the_mesh(completions):
    rows = completions("--seed=1")
    assert rows == completions("--seed=1")
    assert rows == completions("--seed=1", "--batch_size=2")
    assert rows == completions("--seed=1", "--fsdp=4", "--model=2")
    assert rows != completions("--seed=2")


def test_a_beam_search_is_the_sampler_s(completions, sft_run):
    policy = generate.load_policy(str(sft_run.directory))
    decoding = Decoding(6, temperature=0.0, num_beams=3, length_penalty=0.5)
    expected = generate.complete(policy, PROMPTS, decoding, seed=0, batch_size=5)
    rows = completions("--num_beams=3", "--length_penalty=0.5", "--max_tokens=6", "--seed=3")
    assert [row["completion"] for row in rows] == [completion.text for completion in expected]


def test_tokens_end_with_the_end_of_sequence(sft_run, monkeypatch):
    policy = generate.load_policy(str(sft_run.directory))
    sampled = np.array([[100, 101, 1, 0, 0], [1, 0, 0, 0, 0], [0, 100, 101, 102, 103]], np.int32)

    def make_sampler(config, decoding, eos_id, mesh, rules):
        assert (config, decoding, eos_id) == (policy.config, Decoding(5), 1)
        return lambda params, tokens, seed, places: sampled[places]

    monkeypatch.setattr(generate, "make_sampler", make_sampler)
    completions = list(generate.complete(policy, PROMPTS[:3], Decoding(5), seed=0, batch_size=2))
    assert [completion.text for completion in completions] == ["ab", "", "abcd"]
    tokens = [completion.tokens.tolist() for completion in completions]
    assert tokens == [[100, 101, 1], [1], [0, 100, 101, 102, 103]]
    assert all(completion.tokens.dtype == np.int32 for completion in completions)


def test_a_jsonl_file_of_prompts(completions, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "other": 1}) + "\n" for p in PROMPTS))
    assert completions("--seed=1", prompts=path) == completions("--seed=1")


def test_stdin(completions, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(PROMPTS)))
    from_stdin = completions("--seed=1", prompts="-")
    assert from_stdin == completions("--seed=1")


def test_max_tokens(completions):
    assert all(len(row["completion"]) <= 2 for row in completions("--max_tokens=2"))


def test_one_checkpoint_of_a_run(command, sft_run, completions):
    def at(step):
        checkpoint = f"--checkpoint={sft_run.directory / f'checkpoint_{step}'}"
        return generate.load_policy(checkpoint.removeprefix("--checkpoint="))

    newest = generate.load_policy(str(sft_run.directory))
    kernels = [p.params["decoder"]["logits_dense"]["kernel"] for p in (at(4), at(6), newest)]
    np.testing.assert_array_equal(kernels[1], kernels[2])
    assert (kernels[0] != kernels[1]).any()


def test_the_output_file_appears_whole(command, completions, sft_run, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    output.write_text("before\n")
    arguments = [
        "generate",
        f"--checkpoint={sft_run.directory}",
        f"--prompts={tmp_path / 'prompts.txt'}",
        f"--output={output}",
    ]
    expected = completions("--seed=0")

    def broken(*_, **__):
        yield generate.Completion("one", np.array([1], np.int32))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generate, "complete", broken)
        interrupted = command(*arguments)
    assert (interrupted.code, interrupted.err) == (130, "dro_jax: interrupted\n")
    assert output.read_text() == "before\n"

    result = command(*arguments)
    assert (result.code, result.out, result.err) == (0, "", "")
    assert [json.loads(line) for line in output.read_text().splitlines()] == expected
    assert not output.with_name("out.jsonl.partial").exists()


def test_warnings_do_not_mix_with_the_completions(completions, command, sft_run, monkeypatch):
    original = generate.load_policy

    def warning(*arguments):
        logging.getLogger("dro_jax").warning("something odd")
        return original(*arguments)

    monkeypatch.setattr(generate, "load_policy", warning)
    monkeypatch.setattr(sys, "stdin", io.StringIO("ann: d b a c\n"))
    result = command("generate", f"--checkpoint={sft_run.directory}")
    assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == ["ann: d b a c"]
    assert result.err == "warning: something odd\n"


def test_prompts_keep_characters_that_are_not_line_ends(tmp_path):
    prompt = "one\u2028two\x85three\x0bfour"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\r\n")
    assert generate.read_prompts(str(tmp_path / "p.jsonl")) == [prompt]
    (tmp_path / "p.txt").write_bytes(f"\ufeff{prompt}\r\nsecond\r\n".encode())
    assert generate.read_prompts(str(tmp_path / "p.txt")) == [prompt, "second"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", ": no prompts; write one a line"),
        ("p.txt", b"\xff\xfe\x00", ": cannot be read ("),
        ("p.jsonl", '{"prompt": "a"}\n\nnot JSON\n', ", line 3: no field 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', ", line 2: no field 'prompt'"),
        ("p.jsonl", '["a"]\n', ", line 1: no field 'prompt'"),
        ("p.jsonl", '{"prompt": 3}\n', ", line 1: field 'prompt' is not text"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', ", line 1: field 'prompt' is not text"),
        ("p.txt", None, ": cannot be read ("),
    ],
)
def test_bad_prompts(command, sft_run, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    output = tmp_path / "out.jsonl"
    checkpoint = f"--checkpoint={sft_run.directory}"
    result = command("generate", checkpoint, f"--prompts={path}", f"--output={output}")
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith(f"dro_jax: {path}{message}")
    assert not output.exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--top_p=1.5", "top_p is 1.5; expected more than 0 and at most 1"),
        ("--top_p=0", "top_p is 0.0; expected more than 0 and at most 1"),
        ("--top_k=-1", "top_k is -1; expected 0"),
        ("--temperature=-1", "temperature is -1.0; expected 0"),
        ("--max_tokens=0", "max_tokens is 0; expected 1 or more"),
        ("--num_beams=0", "num_beams is 0; expected 1 (no beam search) or more"),
        (
            "--num_beams=2 --temperature=1",
            "num_beams is 2 and temperature 1.0; a beam search",
        ),
        ("--length_penalty=nan", "length_penalty is nan; expected a finite number"),
        ("--fsdp=3", "--fsdp 3 --model 1: 3 devices at a time do not divide the 8 that are here"),
        ("--model=0", "--model is 0: give a whole number of at least 1"),
        ("--batch_size=0", "--batch_size is 0: give a whole number of at least 1"),
        ("--output=/proc/nowhere/out.jsonl", "/proc/nowhere/out.jsonl: cannot be written ("),
    ],
)
def test_bad_flags(command, sft_run, tmp_path, flag, message):
    (tmp_path / "p.txt").write_text("ann: d b a c\n")
    checkpoint, prompts = f"--checkpoint={sft_run.directory}", f"--prompts={tmp_path / 'p.txt'}"
    result = command("generate", checkpoint, prompts, *flag.split())
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith(f"dro_jax: {message}")


def test_no_checkpoint(command, tmp_path):
    (tmp_path / "p.txt").write_text("ann: d b a c\n")
    prompts = f"--prompts={tmp_path / 'p.txt'}"
    result = command("generate", f"--checkpoint={tmp_path}", prompts)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith(f"dro_jax: {tmp_path}: no checkpoint here")
