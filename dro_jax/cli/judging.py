"""Judges by name, as the command line takes them: a language model, a run's own reward, a Python function."""

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dro_jax.cli.generate import layout_of, load_policy
from dro_jax.cli.run_folder import REFERENCE, facts_of_reference, make_directory
from dro_jax.data.packing import Batch, Example, score_examples
from dro_jax.data.vocabulary import encode_completion, encode_prompt
from dro_jax.errors import UsageError
from dro_jax.evaluation.chat_completions import Endpoint
from dro_jax.evaluation.judges import Judge, Reward, judge_by_reward
from dro_jax.evaluation.llm_judge import TEMPLATE, LlmJudge, check_template
from dro_jax.networks.sharding import laid_over
from dro_jax.training import checkpoints, loop, partitioning
from dro_jax.training.algorithms import DroP, DroV
from dro_jax.training.step import example_arrays

logger = logging.getLogger(__name__)

NAMES = "llm, llm:TEMPLATE_FILE, implied_reward:RUN, value:RUN or reward:MODULE:FUNCTION"
"""Judges there are, for help and messages."""

ROWS, EXAMPLES_A_ROW = 32, 16
"""Of a batch of answers, at the most."""


def load_judge(name: str, *, cache: str | os.PathLike[str]) -> Judge:
    """The judge that a person named.

    Args:
      name: one of `NAMES`. "llm" asks the endpoint that OPENAI_BASE_URL, OPENAI_API_KEY and DRO_JAX_JUDGE_MODEL
        describe, and is an `LlmJudge`; see `learnt_reward` for the judges by a run's reward, and `function_reward`.
      cache: file for the replies of a language model, see `local_file`.

    Returns:
      The judge, checked as far as that is possible without a comparison.

    Raises:
      UsageError: for a name that is none, or what it names is missing or does not serve.
    """
    kind, _, rest = name.partition(":")
    if kind == "llm":
        template = read_template(rest) if rest else TEMPLATE
        return LlmJudge(endpoint_of_environment(), local_file(cache), template)
    if kind in ("implied_reward", "value") and rest:
        return judge_by_reward(learnt_reward(rest, with_value=kind == "value"))
    if kind == "reward" and rest:
        return judge_by_reward(function_reward(rest))
    raise UsageError(f"--judge={name}: there is no such judge; give {NAMES}")


def local_file(cache: str | os.PathLike[str]) -> str:
    """Where a file of replies lies: where it is said to, or for a place in a bucket in the person's own cache folder.

    SQLite cannot write to a bucket. Replies are kept by what was asked, so that all runs may share the one file.
    """
    path = os.fspath(cache)
    if "://" not in path:
        return path
    folder = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dro_jax"
    make_directory(folder)
    logger.warning("a bucket cannot hold the judge's replies: they are kept in %s", folder)
    return str(folder / epath.Path(path).name)


def endpoint_of_environment() -> Endpoint:
    """The endpoint that the environment describes. Raises UsageError naming the variable that is missing or wrong."""
    base_url, model = (
        os.environ.get(variable, "") for variable in ("OPENAI_BASE_URL", "DRO_JAX_JUDGE_MODEL")
    )
    if not base_url:
        raise UsageError(
            "OPENAI_BASE_URL is not set: give the address of an OpenAI-compatible server, such as https://host/v1"
        )
    if not model:
        raise UsageError("DRO_JAX_JUDGE_MODEL is not set: give the judge's name at OPENAI_BASE_URL")
    return Endpoint(base_url, model, os.environ.get("OPENAI_API_KEY", ""))


def read_template(path: str) -> str:
    """The template in a file. Raises UsageError if it cannot be read or is none."""
    try:
        template = epath.Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); give a UTF-8 text file") from error
    check_template(template, path)
    return template


def function_reward(name: str) -> Reward:
    """A Python function of prompts and answers, as `Reward`.

    Args:
      name: MODULE:FUNCTION; the module may be in the current folder.

    Raises:
      UsageError: if there is none; calling it, if it raises something.
    """
    judge = f"--judge=reward:{name}"
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise UsageError(f"{judge}: write reward:MODULE:FUNCTION, as in reward:my_rewards:length")
    # Python looks beside the command; the person's module is where the person is.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    # Whatever the person's own module raises.
    except Exception as error:
        raise UsageError(f"{judge}: cannot be imported ({_told(error)})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(
            f"{judge}: {module_name} has no function {function_name}; it takes a list of prompts and one of "
            "answers and returns a number for each"
        )

    def reward(prompts: Sequence[str], answers: Sequence[str]) -> Any:
        try:
            return function(prompts, answers)
        except Exception as error:
            raise UsageError(f"{judge}: raised {_told(error)}; put it right") from error

    reward.__name__ = name
    return reward


def _told(error: Exception) -> str:
    """An exception of a person's own code in one line, with the place where it was raised."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    ours = (__file__, importlib.__file__, "<frozen importlib._bootstrap>")
    places = [p for p in traceback.extract_tb(error.__traceback__) if p.filename not in ours]
    return f"{text}, {places[-1].filename}, line {places[-1].lineno}" if places else text


def learnt_reward(checkpoint: str, *, with_value: bool) -> Reward:
    """The reward that a run has learnt, by eq. 3: r(x, y) = V + tau log pi(y|x)/pi_ref(y|x).

    Between answers to one prompt a V(x) that has seen the prompt alone cancels, and the reward is tau log pi/pi_ref but
    for a constant. A run with a value a token (`DroV.values = "per_token"`) has a V that is fitted to r - tau log
    pi/pi_ref at every position of the response; at the last one it has seen the response as well, and adding it gives
    the run's estimate of the reward.

    Args:
      checkpoint: MODEL_DIR of a run with a reference, or one checkpoint in it.
      with_value: whether to add V of the response's last position.

    Returns:
      From prompts and answers to rewards, normalised as in training. Over-long texts are cut as in training.

    Raises:
      UsageError: if the run has no reference, or no such V.
    """
    # Found once: a run that is still training has another newest checkpoint a moment later.
    directory, at = checkpoints.find(checkpoint)
    policy = load_policy(str(checkpoints.path_of(directory, at)))
    config, vocabulary, lengths = policy.config, policy.vocabulary, policy.lengths
    meta = checkpoints.read_meta(directory, at)
    settings = meta.get("settings", {})
    if "TAU" not in settings or not checkpoints.steps(directory / REFERENCE):
        raise UsageError(
            f"{checkpoint}: has no reference, and so no reward of its own (a run of {meta.get('algorithm')}); "
            "give the MODEL_DIR of a run that was aligned"
        )
    per_token = settings.get("VALUES") == "per_token"
    if with_value and not per_token:
        raise UsageError(
            f"{checkpoint}: its V is none or has seen the prompt alone, and cannot tell two answers apart; give "
            f"implied_reward:{checkpoint}, or a run with DroV.values = 'per_token'"
        )
    tau = settings["TAU"]
    of_log_ratio = DroP(tau, log_probs=settings.get("LOG_PROBS", "sum"))
    method = DroV(tau, values="per_token", networks=settings.get("NETWORKS", "double"))
    own_value = with_value and method.networks == "double"
    layout = layout_of(config, has_value=own_value)
    abstract = layout.abstract()
    source, step = checkpoints.find(directory / REFERENCE)
    reference = checkpoints.restore_policy(source, step, abstract.policy, facts_of_reference(meta))
    params = {"policy": policy.params}
    if own_value:
        params["value"] = checkpoints.restore_value(directory, at, abstract.value)

    def reward_of(params: Any, reference: Any, batch: dict[str, jax.Array]) -> jax.Array:
        with laid_over(layout.mesh, layout.rules):
            of_pair = example_arrays(config, of_log_ratio, params, reference, batch)
            assert of_pair.reference_log_prob is not None
            reward = tau * (of_pair.policy_log_prob - of_pair.reference_log_prob)
            if with_value:
                at_last = batch | {"decoder_loss_weights": _is_last(batch)}
                reward += example_arrays(config, method, params, reference, at_last).value
        return reward

    compiled = jax.jit(reward_of, out_shardings=partitioning.replicated(layout.mesh))
    sharding = partitioning.batch_sharding(layout.mesh, layout.rules)
    shards = layout.mesh.size
    warned = False

    def reward_of_rows(batch: Batch) -> np.ndarray:
        # Few answers do not fill a batch: as many rows as are needed, in steps of twice as many.
        kept, needed = shards, np.count_nonzero(batch["reward_weights"].any(axis=1))
        while kept < needed:
            kept *= 2
        some = {name: array[:kept] for name, array in batch.items()}
        return np.asarray(compiled(params, reference, loop.to_devices(some, sharding)))

    def reward(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        nonlocal warned
        examples: list[Example] = [
            {
                "inputs": np.array(encode_prompt(vocabulary, prompt, lengths["inputs"])),
                "targets": np.array(encode_completion(vocabulary, answer, lengths["targets"])),
                "rewards": np.zeros(1, np.float32),
            }
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        cut = sum(example["targets"][-1] != vocabulary.eos_id for example in examples)
        if cut and not warned:
            warned = True
            logger.warning(
                "answers are judged by their first %d tokens: %d of %d are longer",
                lengths["targets"],
                cut,
                len(examples),
            )
        return score_examples(
            reward_of_rows,
            examples,
            lengths=lengths,
            max_examples=EXAMPLES_A_ROW,
            batch_size=-(-ROWS // shards) * shards,
        )

    return reward


def _is_last(batch: dict[str, jax.Array]) -> jax.Array:
    """1 at the last position of each response in packed rows, 0 elsewhere: int32 [B, To]."""
    segments = batch["decoder_segment_ids"]
    after = jnp.pad(segments, ((0, 0), (0, 1)))[:, 1:]
    return ((segments > 0) & (segments != after)).astype(jnp.int32)
