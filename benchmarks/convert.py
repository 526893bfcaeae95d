"""Seconds and memory of `dro_jax convert`, beside transformers opening a model and saving it again.

    pip install -e '.[bench]'
    python benchmarks/convert.py --output convert.json

A model of T5 1.1's shape with random weights over bytes is written as a Hugging Face folder. It becomes a run
(import), the run becomes a Hugging Face folder again (export) and a checkpoint of T5X's, and that a run. Each of these
reads the model once and writes it once, as transformers does by `from_pretrained` and `save_pretrained`.

Every conversion is in a process of its own, and they take turns. Memory is the most that the process had above what it
had when its libraries were there; a file that is mapped counts as far as it was read.
"""

import argparse
import functools
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import workloads
from etils import epath
from measure import Result, in_turns, machine, peak_memory, report, result

from dro_jax.cli import console
from dro_jax.interop import huggingface, parameter_shapes
from dro_jax.interop.stored_arrays import StoredArray
from dro_jax.networks import T5Config

BYTES = 384
"""Vocabulary of ByT5, which needs no file."""

OTHER = "transformers: open and save"


def main() -> None:
    """Measures, prints the results, and writes them where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", choices=workloads.SHAPES, default="base", help="default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--output", help="a JSON file for the results")
    flags = parser.parse_args()
    conditions = machine(["jax", "orbax-checkpoint", "safetensors", "torch", "transformers"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make(folder / "model", workloads.SHAPES[flags.model])
        title = f"conversion, T5 {flags.model} over bytes, {size / 1e6:.0f} MB"
        report(title, conditions, measure(folder, flags.repeats), flags.output)


def make(folder: Path, shape: T5Config) -> int:
    """Writes a Hugging Face model of this shape over bytes, and returns the bytes of its weights."""
    config = T5Config(**{**vars(shape), "vocab_size": BYTES})
    at, rng = epath.Path(folder), np.random.default_rng(0)
    at.mkdir()
    huggingface.write_json(at / huggingface.CONFIG, huggingface.config_json(config, eos_id=1))
    huggingface.write_json(at / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    arrays = {
        name: StoredArray(shape, functools.partial(rng.random, shape, np.float32))
        for name, shape in parameter_shapes.shapes(config).items()
    }
    huggingface.write_model(at, arrays, huggingface.parameter_names(config))
    return sum(4 * int(np.prod(array.shape)) for array in arrays.values())


def measure(folder: Path, repeats: int) -> Iterator[Result]:
    """Measures the conversions of the folder's model in turns, and compares them with transformers'."""
    # What is converted, to what, and how it is called there.
    steps = {
        "import": ("model", "run", None),
        "export": ("run", "exported", "huggingface"),
        "export to T5X": ("run", "t5x", "t5x"),
        "import from T5X": ("t5x", "from_t5x", None),
        OTHER: ("model", "saved", None),
    }
    cases = {
        name: functools.partial(alone, name, folder / source, folder / target, output_format)
        for name, (source, target, output_format) in steps.items()
    }
    # What a later step reads is there from here on, whatever the order of a turn.
    for name, convert in cases.items():
        convert(keep=True)
        assert (folder / steps[name][1]).is_dir(), name
    taken = in_turns(cases, repeats)
    for name, of_step in taken.items():
        yield result(name, "s", [seconds for seconds, _ in of_step])
        yield result(f"{name}: memory", "MB", [memory for _, memory in of_step])
    for name in steps:
        if name != OTHER:
            turns = zip(taken[name], taken[OTHER], strict=True)
            yield result(
                f"{name} / {OTHER}", "times", [theirs[0] / mine[0] for mine, theirs in turns]
            )


def alone(
    name: str, source: Path, target: Path, output_format: str | None, *, keep: bool = False
) -> tuple[float, float]:
    """Converts in a process of its own, and returns the seconds and the megabytes that it took."""
    goal = target if keep else target.with_name(f"{target.name}_again")
    work = resaved if name == OTHER else converted
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        taken = process.submit(work, str(source), str(goal), output_format).result()
    if not keep:
        shutil.rmtree(goal)
    return taken


def converted(source: str, target: str, output_format: str | None) -> tuple[float, float]:
    """Returns the seconds and the megabytes of our conversion."""
    # As the command does, so that it is no part of the conversion.
    console.start_tensorflow()
    from dro_jax.cli import convert

    before, begin = peak_memory(), time.perf_counter()
    convert.run(source, target, output_format)
    return time.perf_counter() - begin, peak_memory() - before


def resaved(source: str, target: str, output_format: None) -> tuple[float, float]:
    """Returns the seconds and the megabytes of transformers' reading and writing."""
    # Its classes are imported when they are first asked for.
    from transformers import T5ForConditionalGeneration

    before, begin = peak_memory(), time.perf_counter()
    T5ForConditionalGeneration.from_pretrained(source).save_pretrained(target)
    return time.perf_counter() - begin, peak_memory() - before


if __name__ == "__main__":
    main()
