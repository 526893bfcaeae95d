"""Speed of decoding, ours beside Hugging Face `generate` on the same weights.

    pip install -e '.[bench]'
    python benchmarks/generate.py --output generate.json

Random weights of T5 1.0 small's shape (or of a trial size) are written as a Hugging Face model, which transformers
opens; both sides then complete the same batch of token ids, of lengths between a half and the whole of
`--prompt_tokens`, and no token ends a completion, so that both make the same number of tokens. Both are float32 and
have all cores. PyTorch runs in inference mode with transformers' own cache and attention; the sides take turns, after
one call each that is not timed among the others (ours compiles in it, and its seconds are a line).

- Greedy, a beam search of four, and drawing at temperature 1. Greedy and the search have to make the same tokens
  on both sides, as far as rounding lets them; how many they have in common is a line.
"""

import argparse
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
import transformers
from etils import epath
from flax.core import meta
from flax.traverse_util import flatten_dict
from measure import Result, in_turns, machine, report, result

from dro_jax.cli import host_memory
from dro_jax.evaluation.sampling import Decoding, Sampler, make_sampler
from dro_jax.interop import huggingface
from dro_jax.interop.stored_arrays import StoredArray
from dro_jax.networks import T5Config
from dro_jax.training.train_state import init_policy

SMALL = T5Config(
    vocab_size=32128,
    emb_dim=512,
    num_heads=8,
    head_dim=64,
    mlp_dim=2048,
    num_encoder_layers=6,
    num_decoder_layers=6,
    mlp_activations=("relu",),
    logits_via_embedding=True,
    dtype="float32",
)
TRIAL = T5Config(
    vocab_size=64,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_activations=("relu",),
    logits_via_embedding=True,
    dtype="float32",
)
SIZES = {"small": SMALL, "trial": TRIAL}
NO_TOKEN = -1


def main() -> None:
    """Measures, prints the results, and writes them where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--new_tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--output", help="a JSON file for the results")
    flags = parser.parse_args()
    # Both sides where both can be.
    jax.config.update("jax_platforms", "cpu")
    host_memory.keep_freed_memory()
    conditions = machine(["jax", "torch", "transformers", "numpy"])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = SIZES[flags.size]
    params = meta.unbox(jax.jit(lambda: init_policy(config, 0))())
    theirs = in_transformers(config, params)
    prompts = make_prompts(config, flags.batch_size, flags.prompt_tokens)
    ways = {
        "greedy": Decoding(flags.new_tokens, temperature=0.0),
        "4 beams": Decoding(flags.new_tokens, temperature=0.0, num_beams=4),
        "temperature 1": Decoding(flags.new_tokens, temperature=1.0),
    }
    results = itertools.chain.from_iterable(
        side_by_side(name, config, params, theirs, prompts, decoding, flags.repeats)
        for name, decoding in ways.items()
    )
    title = (
        f"decoding, T5 {flags.size}, batch {flags.batch_size}, {flags.prompt_tokens} prompt tokens, "
        f"{flags.new_tokens} new ones"
    )
    report(title, conditions, results, flags.output)


def in_transformers(config: T5Config, params: Any) -> transformers.T5ForConditionalGeneration:
    """Returns transformers' model of our parameters, for which no token is the end of a sequence."""
    with tempfile.TemporaryDirectory() as name:
        folder = epath.Path(name)
        described = huggingface.config_json(config, eos_id=1)
        huggingface.write_json(folder / huggingface.CONFIG, described)
        arrays = {
            path: StoredArray(array.shape, functools.partial(np.asarray, array))
            for path, array in flatten_dict(params, sep="/").items()
        }
        huggingface.write_model(folder, arrays, huggingface.parameter_names(config))
        model = transformers.T5ForConditionalGeneration.from_pretrained(name)
    model.generation_config.eos_token_id = None
    return model.eval()


def make_prompts(config: T5Config, rows: int, longest: int) -> np.ndarray:
    """Returns int32 [rows, longest]: random tokens, 0 behind the end of a prompt."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, config.vocab_size, (rows, longest), dtype=np.int32)
    lengths = np.linspace(max(1, longest // 2), longest, rows).astype(int)
    return np.where(np.arange(longest) < lengths[:, None], tokens, 0).astype(np.int32)


def side_by_side(
    name: str,
    config: T5Config,
    params: Any,
    model: transformers.T5ForConditionalGeneration,
    prompts: np.ndarray,
    decoding: Decoding,
    repeats: int,
) -> Iterator[Result]:
    """Measures one way of decoding on both sides, in turns."""
    sampler = make_sampler(config, decoding, NO_TOKEN)
    sides = {
        "dro_jax": functools.partial(ours, sampler, params, prompts),
        "Hugging Face": functools.partial(transformers_generate, model, prompts, decoding),
    }
    first = {side: timed(decode) for side, decode in sides.items()}
    for _, tokens in first.values():
        assert tokens.shape == (len(prompts), decoding.max_tokens), tokens.shape
    yield result(f"{name}: dro_jax, first call", "s", [first["dro_jax"][0]])
    if decoding.temperature == 0:
        same = first["dro_jax"][1] == first["Hugging Face"][1]
        yield result(f"{name}: tokens in common", "%", [100 * float(same.mean())])
    turns = in_turns(
        {side: functools.partial(timed, decode) for side, decode in sides.items()}, repeats
    )
    made = len(prompts) * decoding.max_tokens
    seconds = {side: [taken for taken, _ in of_side] for side, of_side in turns.items()}
    for side, taken in seconds.items():
        yield result(f"{name}: {side}", "tokens/s", [made / s for s in taken])
    ratios = [
        hugging_face / dro_jax
        for dro_jax, hugging_face in zip(seconds["dro_jax"], seconds["Hugging Face"], strict=True)
    ]
    yield result(f"{name}: dro_jax is faster by", "times", ratios)


def timed(decode: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Returns the seconds that a call takes, and what it returns."""
    begin = time.perf_counter()
    tokens = decode()
    return time.perf_counter() - begin, tokens


def ours(sampler: Sampler, params: Any, prompts: np.ndarray) -> np.ndarray:
    """Returns our completions, int32 [B, max_tokens]."""
    return np.asarray(sampler(params, prompts, 0, np.arange(len(prompts))))


def transformers_generate(
    model: transformers.T5ForConditionalGeneration, prompts: np.ndarray, decoding: Decoding
) -> np.ndarray:
    """Returns transformers' completions, int64 [B, max_tokens]."""
    tokens = torch.from_numpy(prompts).long()
    with torch.inference_mode():
        generated = model.generate(
            input_ids=tokens,
            attention_mask=(tokens > 0).long(),
            max_new_tokens=decoding.max_tokens,
            num_beams=decoding.num_beams,
            # Its own default draws among the 50 likeliest.
            **({"do_sample": True, "top_k": 0} if decoding.temperature > 0 else {}),
        )
    # The start token comes first.
    return generated[:, 1:].numpy()


if __name__ == "__main__":
    main()
