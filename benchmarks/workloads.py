"""What the training benchmarks train on: models of T5 1.1's shapes, and batches of real lengths.

Texts are made up, in the lengths of a real feedback file: those of DRO_JAX_FEEDBACK_FILE, a .jsonl file, or else of
lengths.json, four bytes a token. Nothing is needed but jax, flax, optax and numpy.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from dro_jax.cli import host_memory
from dro_jax.data.packing import WINDOW, Batch, Example, fill_rows, pack, text_lengths
from dro_jax.networks import T5Config
from dro_jax.networks.attention import use_cudnn

BYTES_A_TOKEN = 4
MAX_EXAMPLES = 16
"""Slots of a packed row."""


def t5(emb_dim: int, num_heads: int, mlp_dim: int, depth: int, *, large: bool) -> T5Config:
    """Returns a T5 1.1 of this size, as gin_configs/models has it."""
    return T5Config(
        vocab_size=32128,
        emb_dim=emb_dim,
        num_heads=num_heads,
        head_dim=64,
        mlp_dim=mlp_dim,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
        scan_layers=large,
        remat="dots" if large else "none",
        logits_chunk=None if large else 256,
    )


SHAPES = {
    # To see that a benchmark runs.
    "trial": T5Config(
        vocab_size=64,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
    ),
    "small": t5(512, 6, 1024, 8, large=False),
    "base": t5(768, 12, 2048, 12, large=False),
    "large": t5(1024, 16, 2816, 24, large=True),
    "xl": t5(2048, 32, 5120, 24, large=True),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of model, batch and device."""
    parser.add_argument("--model", choices=SHAPES, default="small", help="default: %(default)s")
    parser.add_argument(
        "--batch", type=int, default=8, help="examples, or rows (default: %(default)s)"
    )
    parser.add_argument(
        "--lengths",
        default="256/512",
        help="tokens at which prompts and completions are cut (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the computation: auto is bfloat16 on a GPU and float32 on CPU",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--remat", choices=("none", "dots", "full"), help="T5Config.remat, if not the model's"
    )
    parser.add_argument("--scan_layers", choices=("True", "False"), help="likewise")
    parser.add_argument("--logits_chunk", type=int, help="likewise; 0 is None")
    parser.add_argument("--attention", choices=("auto", "xla", "cudnn"), help="likewise")
    parser.add_argument("--output", help="a JSON file for the results")


def configure(flags: argparse.Namespace, *, gpu_share: float = 0.95) -> T5Config:
    """Chooses JAX's device, keeps freed memory as `dro_jax` does, and returns the model.

    Args:
      flags: of `add_flags`.
      gpu_share: how much of a GPU's memory JAX takes, at once, where XLA_PYTHON_CLIENT_MEM_FRACTION is not set.
    """
    host_memory.keep_freed_memory()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{gpu_share}")
    if flags.device != "auto":
        jax.config.update("jax_platforms", flags.device)
    changes = {"dtype": flags.dtype}
    if flags.remat is not None:
        changes["remat"] = flags.remat
    if flags.scan_layers is not None:
        changes["scan_layers"] = flags.scan_layers == "True"
    if flags.logits_chunk is not None:
        changes["logits_chunk"] = flags.logits_chunk or None
    if flags.attention is not None:
        changes["attention"] = flags.attention
    return dataclasses.replace(SHAPES[flags.model], **changes)


def conditions(config: T5Config) -> dict[str, str]:
    """Returns what a step's numbers depend on beside the machine."""
    return {
        "device": jax.devices()[0].device_kind,
        "dtype": str(jax.numpy.dtype(config.compute_dtype)),
        "layers": f"{'scanned' if config.scan_layers else 'unrolled'}, remat {config.remat}, "
        f"logits_chunk {config.logits_chunk}",
        "attention": "cudnn"
        if use_cudnn(config.attention, config.compute_dtype, config.head_dim)
        else "xla",
    }


def limits(flags: argparse.Namespace) -> dict[str, int]:
    """Returns what `--lengths` says, by feature."""
    inputs, targets = (int(length) for length in flags.lengths.split("/"))
    return {"inputs": inputs, "targets": targets}


def draw_bytes(rows: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the bytes of prompts and completions in the proportions of lengths.json: int [rows, 2]."""
    histogram = json.loads(Path(__file__).with_name("lengths.json").read_text())
    counts, width = np.array(histogram["counts"]), histogram["bucket"]
    drawn = counts[rng.choice(len(counts), rows, p=counts[:, 2] / counts[:, 2].sum()), :2]
    return drawn * width + rng.integers(0, width, (rows, 2))


def make_examples(rows: int, cut: dict[str, int], vocab_size: int, seed: int) -> list[Example]:
    """Returns made-up examples in the lengths of real ones, which are cut at `cut`.

    The reference's log-probability in them is made up too.
    """
    rng = np.random.default_rng(seed)
    path = os.environ.get("DRO_JAX_FEEDBACK_FILE")
    if path is None:
        sizes = draw_bytes(rows, rng)
    else:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        texts = [[len(line[name].encode()) for name in ("prompt", "completion")] for line in lines]
        sizes = np.array(texts)[rng.integers(0, len(texts), rows)]
    # One more, the end of the sequence.
    sizes = np.minimum(1 + np.maximum(1, sizes // BYTES_A_TOKEN), list(cut.values()))

    def text(length: int) -> np.ndarray:
        # The last entry is no token for a single net.
        return np.append(rng.integers(3, vocab_size - 1, length - 1), 1).astype(np.int32)

    return [
        {
            "inputs": text(prompt),
            "targets": text(completion),
            "rewards": np.float32([rng.normal()]),
            "reference_log_probs": np.float32([-2.0 * completion]),
        }
        for prompt, completion in sizes
    ]


def padded(
    examples: Sequence[Example], batch: int, cut: dict[str, int], *, multiple: int
) -> Iterator[Batch]:
    """Yields batches of one example a row, as long as their longest, rounded up to a multiple or `cut`."""
    for first in range(0, len(examples) - batch + 1, batch):
        some = examples[first : first + batch]
        longest = -(-text_lengths(some).max(axis=0) // multiple) * multiple
        lengths = {name: min(int(n), cut[name]) for name, n in zip(cut, longest, strict=True)}
        yield fill_rows([[example] for example in some], lengths=lengths, max_examples=1)


def padded_to(examples: Sequence[Example], batch: int, lengths: dict[str, int]) -> Iterator[Batch]:
    """Yields batches of one example a row, all of the same lengths."""
    for first in range(0, len(examples) - batch + 1, batch):
        rows = [[example] for example in examples[first : first + batch]]
        yield fill_rows(rows, lengths=lengths, max_examples=1)


def packed_rows(examples: Sequence[Example], lengths: dict[str, int]) -> list[list[Example]]:
    """Returns the examples in rows that hold so many tokens, packed and drawn as `dro_jax train` does."""
    order, rows = np.random.default_rng(0), []
    for start in range(0, len(examples), WINDOW):
        window = examples[start : start + WINDOW]
        found = pack(text_lengths(window), list(lengths.values()), MAX_EXAMPLES)
        rows += [[window[i] for i in found[row]] for row in order.permutation(len(found))]
    return rows


def packed(
    examples: Sequence[Example], lengths: dict[str, int], *, batch: int, multiple: int
) -> Iterator[Batch]:
    """Yields batches of so many examples, in as many packed rows as they need, rounded up to a multiple."""
    for first in range(0, len(examples) - batch + 1, batch):
        some = examples[first : first + batch]
        found = pack(text_lengths(some), list(lengths.values()), MAX_EXAMPLES)
        rows = [[some[i] for i in row] for row in found]
        rows += [[]] * (-len(rows) % multiple)
        yield fill_rows(rows, lengths=lengths, max_examples=MAX_EXAMPLES)


def without_reference(batch: Batch) -> Batch:
    """Returns the batch for a step that runs the reference itself."""
    return {name: array for name, array in batch.items() if name != "reference_log_probs"}


def count(batch: Batch) -> tuple[int, int, int]:
    """Returns a batch's examples, real tokens and positions, of encoder and decoder together."""
    tokens = np.count_nonzero(batch["encoder_input_tokens"]) + batch["decoder_loss_weights"].sum()
    positions = batch["encoder_input_tokens"].size + batch["decoder_target_tokens"].size
    return int(batch["reward_weights"].sum()), int(tokens), positions
