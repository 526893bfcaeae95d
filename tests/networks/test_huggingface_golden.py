"""Our T5 computes what Hugging Face transformers' does, on the golden files that make_golden.py wrote."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from flax.traverse_util import unflatten_dict

from dro_jax.evaluation.sampling import Decoding, make_sampler
from dro_jax.interop import huggingface
from dro_jax.networks import T5, T5Config, token_log_probs
from dro_jax.networks.attention import relative_position_bucket

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
TOLERANCE = 1e-5


def our_params(golden: Any, config: T5Config) -> Any:
    """The weights of a golden file in our tree."""
    params = {}
    for ours, theirs in huggingface.parameter_names(config).items():
        array = golden[f"weight/{theirs}"]
        params[ours] = jnp.asarray(array.T if huggingface.is_transposed(ours) else array)
    return unflatten_dict(params, sep="/")


def assert_close(ours: Any, theirs: Any) -> None:
    """Bounds the largest difference, and the mean one, which a one-sided shift would move."""
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    assert np.abs(difference).max() <= TOLERANCE
    assert abs(difference.mean()) <= TOLERANCE / 10


class Case:
    """One golden file, its weights in our tree, and our network compiled once for it."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.golden = dict(file)
        theirs = json.loads(str(self.golden["about"]))["config"]
        config = dataclasses.replace(huggingface.model_config(theirs), dtype="float32")
        self.module = T5(config)
        self.params = our_params(self.golden, config)
        self.prompts = jnp.asarray(self.golden["encoder_tokens"], jnp.int32)
        self.decoder_tokens = jnp.asarray(self.golden["decoder_tokens"], jnp.int32)
        self.steps = max(self.golden["greedy"].shape[1], min(self.decoder_tokens.shape[1], 30))
        self._run_steps = jax.jit(self._steps)

    def decode(self, forced: np.ndarray) -> np.ndarray:
        """Logits [B, steps, V] of cached decoding; where forced [B, k] has no token, the best one is fed."""
        given = np.full((len(self.prompts), self.steps), -1)
        given[:, : forced.shape[1]] = forced[:, : self.steps]
        return np.asarray(self._run_steps(self.params, jnp.asarray(given, jnp.int32)))

    def _steps(self, params: Any, given: jax.Array) -> jax.Array:
        variables = {"params": params}
        # Room for more than is decoded: the empty places must not be looked at.
        cache = self.module.apply(variables, self.prompts, self.steps + 3, method="init_cache")

        def step(carry: Any, index: jax.Array) -> Any:
            cache, best = carry
            tokens = jnp.where(given[:, index] >= 0, given[:, index], best)
            logits, cache = self.module.apply(
                variables, tokens, cache, index, self.prompts, method="decode_step"
            )
            return (cache, jnp.argmax(logits, axis=-1)), logits

        start = jnp.zeros(len(self.prompts), jnp.int32)
        return jax.lax.scan(step, (cache, start), jnp.arange(self.steps))[1].swapaxes(0, 1)


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_the_files_cover_both_versions_unequal_depths_wide_heads_padding_and_long_rows():
    covered = set()
    for path in GOLDEN:
        with np.load(path) as golden:
            about = json.loads(str(golden["about"]))
            tokens = golden["encoder_tokens"]
            assert int(about["transformers"].split(".")[0]) >= 5
        theirs = about["config"]
        covered.add(theirs["feed_forward_proj"])
        covered |= {"padding"} if (tokens == 0).any() else set()
        if theirs["num_layers"] != theirs["num_decoder_layers"]:
            covered.add("unequal depths")
        if theirs["d_kv"] * theirs["num_heads"] != theirs["d_model"]:
            covered.add("wide heads")
        if tokens.shape[1] > theirs["relative_attention_max_distance"]:
            covered.add("long rows")
    everything = {"gated-gelu", "relu", "padding", "unequal depths", "wide heads", "long rows"}
    assert covered == everything
    assert sum(path.stat().st_size for path in GOLDEN) < 500_000


def test_every_weight_has_one_place_in_our_tree(case):
    inputs = (case.prompts, case.decoder_tokens)
    expected = jax.eval_shape(case.module.init, jax.random.key(0), *inputs)["params"]
    assert jax.tree.map(jnp.shape, case.params) == jax.tree.map(jnp.shape, meta.unbox(expected))
    names = huggingface.parameter_names(case.module.config).values()
    assert {f"weight/{name}" for name in names} == {k for k in case.golden if "weight/" in k}


def test_encoder_states_logits_and_label_log_probs_agree(case):
    @jax.jit
    def ours(params: Any) -> Any:
        variables = {"params": params}
        states = case.module.apply(variables, case.prompts, method="encode")
        logits = case.module.apply(variables, case.prompts, case.decoder_tokens)
        return states, logits, token_log_probs(logits, jnp.asarray(case.golden["targets"]))

    states, logits, log_probs = ours(case.params)
    real = case.golden["encoder_tokens"] > 0  # what a padded position holds is nobody's business
    assert_close(np.asarray(states)[real], case.golden["encoder_states"][real])
    assert_close(logits, case.golden["logits"])
    assert_close(log_probs, case.golden["label_log_probs"])


def test_step_by_step_decoding_gives_the_same_logits(case):
    forced = case.golden["decoder_tokens"]
    compared = min(forced.shape[1], case.steps)
    logits = case.decode(forced)
    assert_close(logits[:, :compared], case.golden["logits"][:, :compared])


def test_greedy_decoding_gives_the_tokens_of_generate(case):
    expected = case.golden["greedy"]
    start = np.zeros((len(expected), 1), np.int32)
    ours = np.argmax(case.decode(start), axis=-1)[:, : expected.shape[1]]
    ended = np.cumsum(expected == 1, axis=1) - (expected == 1) > 0  # after end-of-sequence
    assert np.array_equal(np.where(ended, 0, ours), expected)


def test_beam_search_gives_the_tokens_of_generate(case):
    expected, about = case.golden["beams"], json.loads(str(case.golden["about"]))
    beams = {name: about[name] for name in ("num_beams", "length_penalty")}
    decoding = Decoding(expected.shape[1], temperature=0.0, **beams)
    sampler = make_sampler(case.module.config, decoding, eos_id=1)
    ours = np.asarray(sampler(case.params, case.prompts, 0, np.arange(len(expected))))
    ended = np.cumsum(expected == 1, axis=1) - (expected == 1) > 0
    assert np.array_equal(ours, np.where(ended, 0, expected))


def test_relative_position_buckets_agree(case):
    for part, bidirectional in (("encoder", True), ("decoder", False)):
        buckets = relative_position_bucket(
            jnp.asarray(case.golden["distances"], jnp.int32),
            bidirectional=bidirectional,
            num_buckets=case.module.config.relative_buckets,
            max_distance=case.module.config.relative_max_distance,
        )
        assert np.array_equal(buckets, case.golden[f"{part}_buckets"])
