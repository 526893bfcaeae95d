"""Judges by name: the reward that a run has learnt, a Python function, and what a person can get wrong."""

import sys
import textwrap

import jax
import numpy as np
import pytest

from dro_jax.cli import judging
from dro_jax.cli.generate import layout_of, load_policy
from dro_jax.cli.judging import learnt_reward, load_judge
from dro_jax.errors import UsageError
from dro_jax.evaluation.judges import Comparison
from dro_jax.evaluation.llm_judge import TEMPLATE, LlmJudge
from dro_jax.networks import T5, ValueNetwork
from dro_jax.training import checkpoints

TAU = 0.5
PROMPTS = ["ann: d b a c", "b:", "", "a prompt that is too long"]
ANSWERS = ["a b c d", "d b", "", "longer than what it is cut to", "abcdefg", "abcdefgh"]


@pytest.fixture(scope="module")
def per_token_run(tmp_path_factory, train):
    """A value network with a value a token, moved well away from where it starts."""
    return _trained(tmp_path_factory, train)


@pytest.fixture(scope="module")
def single_net_run(tmp_path_factory, train):
    """The same in one network, with means over tokens."""
    own = {"algorithms__DroV__networks": "single", "algorithms__DroV__log_probs": "mean"}
    return _trained(tmp_path_factory, train, **own)


def _trained(tmp_path_factory, train, **settings):
    directory = tmp_path_factory.mktemp("runs") / "run"
    defaults = {
        "MODEL_DIR": str(directory),
        "algorithms__DroV__values": "per_token",
        "POLICY_LEARNING_RATE": 0.02,
        "VALUE_LEARNING_RATE": 0.05,
    }
    result = train(**(defaults | settings))
    assert result.code == 0, result.err
    return directory


@pytest.fixture(scope="module")
def implied_reward(per_token_run):
    return learnt_reward(str(per_token_run), with_value=False)


def tokens_of(text, limit, *, cut_keeps_end):
    ids = [byte + 3 for byte in text.encode()]
    return [*ids[: limit - 1], 1] if cut_keeps_end else [*ids, 1][:limit]


def expected_rewards(run, prompts, answers, *, single_net=False, mean=False, with_value=False):
    """Eq. 3 with an answer a row, from logits in float64."""
    policy, reference = load_policy(str(run)), load_policy(str(run / "reference"))
    inputs, targets = np.zeros((len(prompts), 13), np.int32), np.zeros((len(prompts), 8), np.int32)
    lengths = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = tokens_of(prompt, 13, cut_keeps_end=True)
        inputs[row, : len(ids)] = ids
        ids = tokens_of(answer, 8, cut_keeps_end=False)
        targets[row, : len(ids)] = ids
        lengths.append(len(ids))
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]

    def network(module, params, method):
        apply = jax.jit(
            lambda params: module.apply({"params": params}, inputs, shifted, method=method)
        )
        return jax.tree.map(lambda x: np.asarray(x, np.float64), apply(params))

    log_probs, values = [], None
    for params in (reference.params, policy.params):
        logits, values = network(T5(policy.config), params, "logits_and_values")
        log_softmax = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        chosen = np.take_along_axis(log_softmax, targets[:, :, None], axis=2)[:, :, 0]
        sums = [row[:length].sum() for row, length in zip(chosen, lengths, strict=True)]
        log_probs.append(np.array(sums) / (lengths if mean else 1))
    rewards = TAU * (log_probs[1] - log_probs[0])
    if with_value and not single_net:
        abstract = layout_of(policy.config, has_value=True).abstract().value
        value = checkpoints.restore_value(*checkpoints.find(run), abstract)
        values = network(ValueNetwork(policy.config), value, "per_token")
    if with_value:
        rewards += [row[length - 1] for row, length in zip(values, lengths, strict=True)]
    return rewards


PAIRS = [(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]


@pytest.mark.parametrize("with_value", [False, True], ids=["implied", "with value"])
@pytest.mark.parametrize("single_net", [False, True], ids=["double net", "single net"])
def test_the_reward_of_a_run_is_eq_3(request, single_net, with_value):
    run = request.getfixturevalue("single_net_run" if single_net else "per_token_run")
    prompts, answers = (list(texts) for texts in zip(*PAIRS, strict=True))
    got = learnt_reward(str(run), with_value=with_value)(prompts, answers)
    expected = expected_rewards(
        run, prompts, answers, single_net=single_net, mean=single_net, with_value=with_value
    )
    assert got.shape == expected.shape
    # What rounding is to be told from.
    assert expected.std() > 0.01
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_reward_does_not_depend_on_what_it_is_computed_with(implied_reward, monkeypatch):
    batches = []
    original = judging.loop.to_devices

    def watched(batch, sharding):
        batches.append(batch["encoder_input_tokens"].shape)
        return original(batch, sharding)

    monkeypatch.setattr(judging.loop, "to_devices", watched)
    rng = np.random.default_rng(0)
    answers = ["".join(rng.choice(list("abcd "), 6)) for _ in range(75)]
    together = implied_reward([PROMPTS[0]] * 75, answers)
    # One such prompt fills a row.
    assert batches == [(32, 13), (32, 13), (16, 13)]
    batches.clear()
    # With another prompt that fits into a row with itself.
    few = implied_reward([PROMPTS[0], "", PROMPTS[0], ""] * 3, ["a", "b", *answers[:2]] * 3)
    assert batches == [(8, 13)]
    np.testing.assert_allclose(few[2], together[0], atol=1e-5)


def test_the_judge_prefers_what_the_run_does(per_token_run, implied_reward, tmp_path, caplog):
    a, b = implied_reward([PROMPTS[0]] * 2, ["a b c d", "d b"])
    judge = load_judge(f"implied_reward:{per_token_run}", cache=tmp_path / "c")
    comparisons = [
        Comparison(PROMPTS[0], "a b c d", "d b"),
        Comparison(PROMPTS[0], "d b", "a b c d"),
        Comparison(PROMPTS[0], "abcdefgh and so on", "abcdefgh, but not so"),
    ]
    verdicts = list(judge(comparisons))
    better, worse = ("A", "B") if a > b else ("B", "A")
    assert [v.winner for v in verdicts] == [better, worse, "tie"]
    assert verdicts[0].reason == f"reward {a:.6g} against {b:.6g}"
    assert caplog.messages == ["answers are judged by their first 8 tokens: 2 of 4 are longer"]


def test_value_judges_with_the_value(per_token_run, implied_reward, tmp_path):
    texts = [PROMPTS[0]] * 2, ["a b c d", "d b"]
    a, b = expected_rewards(per_token_run, *texts, with_value=True)
    judge = load_judge(f"value:{per_token_run}", cache=tmp_path / "c")
    (verdict,) = judge([Comparison(PROMPTS[0], "a b c d", "d b")])
    _, of_a, _, of_b = verdict.reason.split()
    np.testing.assert_allclose([float(of_a), float(of_b)], [a, b], atol=1e-4)
    assert np.abs(implied_reward(*texts) - [a, b]).max() > 1e-3


def test_one_checkpoint_of_a_run_can_judge(per_token_run, implied_reward):
    older = learnt_reward(str(per_token_run / "checkpoint_4"), with_value=False)
    texts = [PROMPTS[0]], ["a b"]
    assert abs(older(*texts) - implied_reward(*texts)) > 1e-4


def test_what_has_no_reference_has_no_reward(per_token_run, tmp_path):
    with pytest.raises(UsageError, match=r"has no reference, and so no reward of its own"):
        load_judge(f"implied_reward:{per_token_run / 'reference'}", cache=tmp_path / "c")


def test_a_value_of_the_prompt_alone_does_not_judge(per_token_run, tmp_path, monkeypatch):
    read = checkpoints.read_meta

    def of_another_method(*arguments):
        meta = read(*arguments)
        return meta | {"settings": meta["settings"] | {"VALUES": "multiple"}}

    monkeypatch.setattr(checkpoints, "read_meta", of_another_method)
    with pytest.raises(UsageError) as raised:
        load_judge(f"value:{per_token_run}", cache=tmp_path / "c")
    assert f"give implied_reward:{per_token_run}, or" in str(raised.value)


# A Python function.


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module where the command is called from; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def write(code, name="rewards_of_mine"):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def test_a_function_of_one_s_own(module, tmp_path):
    name = module("def longest(prompts, answers): return [len(a) for a in answers]")
    judge = load_judge(f"reward:{name}:longest", cache=tmp_path / "c")
    verdicts = judge([Comparison("p", "aa", "a"), Comparison("p", "a", "aa")])
    assert [v.winner for v in verdicts] == ["A", "B"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "has no function score"),
        ("score = 3", "has no function score"),
        (
            "import not_there_at_all",
            "ModuleNotFoundError: No module named 'not_there_at_all', {}, line 1",
        ),
        ("x = (", "SyntaxError: '(' was never closed (rewards_of_mine.py, line 1)"),
        ("\n1 / 0", "ZeroDivisionError: division by zero, {}, line 2"),
    ],
)
def test_a_module_that_does_not_serve(module, tmp_path, code, message):
    name = module(code)
    with pytest.raises(UsageError) as raised:
        load_judge(f"reward:{name}:score", cache=tmp_path / "c")
    text = str(raised.value)
    assert text.startswith(f"--judge=reward:{name}:score: ")
    assert message.format(tmp_path / f"{name}.py") in text
    assert len(text.splitlines()) == 1


def test_a_function_that_fails_names_its_line(module, tmp_path):
    name = module("def score(prompts, answers):\n    raise KeyError('one\\ntwo')")
    judge = load_judge(f"reward:{name}:score", cache=tmp_path / "c")
    with pytest.raises(UsageError) as raised:
        list(judge([Comparison("p", "a", "b")]))
    assert f"raised KeyError: 'one\\ntwo', {tmp_path / name}.py, line 2; put it right" in str(
        raised.value
    )


# The language model.


@pytest.fixture
def endpoint(monkeypatch):
    for name, value in {
        "OPENAI_BASE_URL": "http://127.0.0.1:1/v1",
        "OPENAI_API_KEY": "sk-planted-1234",
        "DRO_JAX_JUDGE_MODEL": "judge-1",
    }.items():
        monkeypatch.setenv(name, value)


def test_the_language_model_of_the_environment(endpoint, tmp_path):
    judge = load_judge("llm", cache=tmp_path / "c")
    assert isinstance(judge, LlmJudge)
    assert judge.template == TEMPLATE
    assert judge.endpoint.url == "http://127.0.0.1:1/v1/chat/completions"
    assert (judge.endpoint.model, judge.endpoint.key) == ("judge-1", "sk-planted-1234")
    assert "sk-planted" not in repr(judge)


def test_a_key_is_not_needed(endpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    judge = load_judge("llm", cache=tmp_path / "c")
    assert judge.endpoint.key == ""


def test_a_template_of_one_s_own(endpoint, tmp_path):
    path = tmp_path / "template.txt"
    template = "\u00e9 {instruction} {response_a} {response_b} Verdict:"
    path.write_text(template, encoding="utf-8")
    assert load_judge(f"llm:{path}", cache=tmp_path / "c").template == template


@pytest.mark.parametrize("variable", ["OPENAI_BASE_URL", "DRO_JAX_JUDGE_MODEL"])
def test_a_variable_that_is_not_set(endpoint, tmp_path, monkeypatch, variable):
    for unset in (lambda: monkeypatch.setenv(variable, ""), lambda: monkeypatch.delenv(variable)):
        unset()
        with pytest.raises(UsageError, match=f"^{variable} is not set: give "):
            load_judge("llm", cache=tmp_path / "c")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, ": cannot be read ("),
        (b"\xff", ": cannot be read ("),
        (b"{instruction} {response_a}", ": lacks {response_b}; a template needs"),
    ],
)
def test_a_template_file_that_does_not_serve(endpoint, tmp_path, content, message):
    path = tmp_path / "template.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        load_judge(f"llm:{path}", cache=tmp_path / "c")
    assert str(raised.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    "name", ["", "gpt", "value", "value:", "implied_reward", "reward", "reward:", "LLM", ":llm"]
)
def test_a_name_that_is_no_judge(name, tmp_path):
    with pytest.raises(UsageError) as raised:
        load_judge(name, cache=tmp_path / "c")
    assert str(raised.value) == (
        f"--judge={name}: there is no such judge; give llm, llm:TEMPLATE_FILE, implied_reward:RUN, value:RUN or "
        "reward:MODULE:FUNCTION"
    )


@pytest.mark.parametrize("name", ["reward:one", "reward:one:"])
def test_a_function_has_a_module_and_a_name(name, tmp_path):
    with pytest.raises(UsageError, match="write reward:MODULE:FUNCTION"):
        load_judge(name, cache=tmp_path / "c")


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere: no checkpoint here"):
        load_judge(f"implied_reward:{tmp_path / 'nowhere'}", cache=tmp_path / "c")
