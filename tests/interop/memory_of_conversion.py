"""Converts a made-up model there and back and prints how much memory that took.

    python tests/interop/memory_of_conversion.py FOLDER --megabytes 1000

With --format t5x or t5x_scanned it goes to T5X and back instead of to Hugging Face. FOLDER holds up to three times the
model. Prints as JSON the model's size, its largest array, and for each direction the seconds and the memory that was
in use at most above what was in use when a model of a few kilobytes had been converted (Linux: RssAnon, which
counts what the process allocated and not the libraries and files that are mapped into it).
"""

import argparse
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from etils import epath

from dro_jax.cli import convert
from dro_jax.interop import huggingface, parameter_shapes
from dro_jax.interop.stored_arrays import StoredArray
from dro_jax.networks import T5Config


def allocated() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("RssAnon")))


def measured(work: Callable[[], None]) -> dict[str, float]:
    """Seconds and the most memory in use, looked at every five milliseconds."""
    most, over = [allocated()], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            most[0] = max(most[0], allocated())

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.monotonic()
    work()
    over.set()
    thread.join()
    return {"seconds": time.monotonic() - begin, "most": most[0]}


def make(folder: Path, config: T5Config, shard_bytes: int) -> int:
    """A folder of random weights over bytes; returns its parameters' bytes."""
    folder.mkdir(parents=True)
    huggingface.write_json(
        epath.Path(folder / "config.json"), huggingface.config_json(config, eos_id=1)
    )
    tokenizer = {"tokenizer_class": "ByT5Tokenizer"}
    huggingface.write_json(epath.Path(folder / "tokenizer_config.json"), tokenizer)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes.shapes(config)
    arrays = {
        name: StoredArray(shape, lambda shape=shape: rng.random(shape, np.float32))
        for name, shape in shapes.items()
    }
    huggingface.write_model(
        epath.Path(folder),
        arrays,
        huggingface.parameter_names(config),
        shard_bytes=shard_bytes,
    )
    return sum(4 * math.prod(shape) for shape in shapes.values())


def config_of(width: int, layers: int, vocab_size: int = 384) -> T5Config:
    return T5Config(
        vocab_size=vocab_size,
        emb_dim=width,
        num_heads=4,
        head_dim=width // 4,
        mlp_dim=2 * width,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
    )


def run(
    folder: Path, megabytes: int, vocab_size: int = 384, other: str = "huggingface"
) -> dict[str, float]:
    width = 1024
    in_layers = megabytes * 1e6 - 4 * 2 * vocab_size * width  # beside the table and the logits
    one_layer = 4 * 24 * width**2  # an encoder's and a decoder's
    config = config_of(width, max(1, round(in_layers / one_layer)), vocab_size)
    make(folder / "small", config_of(8, 1), 10**6)
    total = make(folder / "there", config, max(largest_array(config), 10**8))
    convert.run(str(folder / "small"), str(folder / "small_run"))
    convert.run(str(folder / "small_run"), str(folder / "small_back"), other)
    if other != "huggingface":
        convert.run(str(folder / "there"), str(folder / "start"))
        shutil.rmtree(folder / "there")
        convert.run(str(folder / "start"), str(folder / "there"), other)
        shutil.rmtree(folder / "start")
    before = allocated()
    imported = measured(lambda: convert.run(str(folder / "there"), str(folder / "run")))
    shutil.rmtree(folder / "there")
    exported = measured(lambda: convert.run(str(folder / "run"), str(folder / "back"), other))
    return {
        "model_bytes": total,
        "largest_array_bytes": largest_array(config),
        "before_bytes": before,
        "import_seconds": round(imported["seconds"], 1),
        "import_bytes": imported["most"] - before,
        "export_seconds": round(exported["seconds"], 1),
        "export_bytes": exported["most"] - before,
    }


def largest_array(config: T5Config) -> int:
    return max(4 * math.prod(shape) for shape in parameter_shapes.shapes(config).values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="where the models are written for a while")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--format", default="huggingface", choices=convert.FORMATS)
    parser.add_argument("--vocab_size", type=int, default=384, help="128512: a table as XXL's")
    parsed = parser.parse_args()
    parsed.folder.mkdir(parents=True)
    try:
        print(json.dumps(run(parsed.folder, parsed.megabytes, parsed.vocab_size, parsed.format)))
    finally:
        shutil.rmtree(parsed.folder)
