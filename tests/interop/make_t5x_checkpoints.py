"""Writes golden_t5x/<case>.zip, small random T5s as T5X saves them, and golden_t5x/<case>.npz.

Run it where T5X can be imported (requirements-t5x.txt says how), which the tests never need, and commit what changed:

    python tests/interop/make_t5x_checkpoints.py

Networks, logits and files are all T5X's own. Cases ending in "msgpack" are of its older format (a `checkpoint` file
and zarr folders), the others of Orbax. Keys of an .npz file:

    encoder_tokens     int32 [B, Ti], 0 is padding
    decoder_tokens     int32 [B, To], the start token 0 first
    logits             float32 [B, To, V]
    parameters/<path>  a few parameters as they were, under T5X's names
    about              JSON: versions
"""

import dataclasses
import importlib.metadata
import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import seqio
from flax.traverse_util import flatten_dict, unflatten_dict
from t5x import adafactor, checkpoints, models, optimizers, partitioning, utils
from t5x.examples.scalable_t5 import network as scalable_network
from t5x.examples.t5 import network

T5X_COMMIT = "cc342d419ec3e3e9c4bf1df33c82330cafdc1e16"  # of 2026-04-21

SIZES: dict[str, Any] = {
    "vocab_size": 136,  # of golden/v1_1/spiece.model
    "emb_dim": 4,
    "num_heads": 2,
    "head_dim": 3,
    "mlp_dim": 6,
    "dropout_rate": 0.0,
    "dtype": "float32",
}
GATED = SIZES | {
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "mlp_activations": ("gelu", "linear"),
}
RELU = SIZES | {
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "mlp_activations": ("relu",),
    "logits_via_embedding": True,
}
SCANNED = GATED | {"num_encoder_layers": 2, "num_decoder_layers": 3}
PROMPTS, DECODER_LENGTH = (7, 4), 6


@dataclasses.dataclass(frozen=True)
class Case:
    """What is made."""

    config: dict[str, Any]
    network: Any = network
    dtype: str = "float32"
    own_biases: bool = False
    adafactor: bool = False


CASES = {
    "v1_1_msgpack": Case(GATED, adafactor=True),
    "v1_0_bfloat16_msgpack": Case(RELU, dtype="bfloat16"),
    "v1_1": Case(GATED),
    "v1_1_scanned": Case(SCANNED, scalable_network),
    "v1_1_scanned_msgpack": Case(SCANNED, scalable_network),
    "scanned_with_own_biases": Case(SCANNED, scalable_network, own_biases=True),
}


def random_parameters(params: Any, case: Case, rng: np.random.Generator) -> Any:
    """Parameters of the same shapes, none of them equal, at which logits are of order 1."""
    made = {}
    for name, leaf in flatten_dict(flax.core.unfreeze(params), sep="/").items():
        noise = rng.standard_normal(leaf.shape)
        if name.endswith("/scale"):
            array = 1 + 0.2 * noise
        elif name.endswith("/kernel"):
            array = noise * (leaf.shape[0] ** -0.5)
        else:
            array = noise
        if array.ndim == 3 and name.endswith("rel_embedding") and not case.own_biases:
            array[...] = array[:, :1]  # as where a T5 1.1 has been stacked
        made[name] = array.astype(case.dtype).astype(np.float32)
    return unflatten_dict(made, sep="/")


def save(name: str, case: Case, folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Writes one checkpoint of step 5; returns what goes into its .npz."""
    rng = np.random.default_rng(seed)
    module = case.network.Transformer(case.network.T5Config(**case.config))
    vocabulary = seqio.ByteVocabulary()
    optimizer = optimizers.sgd(0.1)
    if case.adafactor:
        rules = adafactor.standard_logical_factor_rules()
        optimizer = adafactor.Adafactor(decay_rate=0.8, logical_factor_rules=rules)
    model = models.EncoderDecoderModel(module, vocabulary, vocabulary, optimizer)
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    shapes = {"encoder_input_tokens": (2, max(PROMPTS)), "decoder_input_tokens": (2, 6)}
    initializer = utils.TrainStateInitializer(
        optimizer, model.get_initial_variables, shapes, partitioner
    )
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    params = random_parameters(state.params, case, rng)
    state = state.replace_params(flax.core.freeze(params)).replace_step(np.int32(5))
    if name.endswith("msgpack"):
        writer = checkpoints.Checkpointer(
            state, partitioner, str(folder), save_dtype=np.dtype(case.dtype)
        )
        writer.save(state)
    else:
        manager = checkpoints.OrbaxCheckpointManagerInterface(str(folder), state, partitioner)
        manager.save(state)
        manager.wait_until_finished()

    encoder_tokens = rng.integers(2, SIZES["vocab_size"], (2, max(PROMPTS)))
    for row, length in enumerate(PROMPTS):
        encoder_tokens[row, length:] = 0
    decoder_tokens = rng.integers(1, SIZES["vocab_size"], (2, DECODER_LENGTH))
    decoder_tokens[:, 0] = 0
    batch = {
        "encoder_input_tokens": encoder_tokens,
        "decoder_input_tokens": decoder_tokens,
        "decoder_target_tokens": np.ones_like(decoder_tokens),
    }
    batch = {name: array.astype(np.int32) for name, array in batch.items()}
    logits = np.asarray(model._compute_logits(params, batch))
    assert 0.3 < logits.std() < 3.0, (name, logits.std())
    flat = flatten_dict(params, sep="/")
    kept = [key for key in flat if key.endswith(("/scale", "rel_embedding", "query/kernel"))]
    libraries = ("jax", "flax", "orbax-checkpoint", "tensorstore")
    about = {library: importlib.metadata.version(library) for library in libraries}
    return {
        "encoder_tokens": batch["encoder_input_tokens"],
        "decoder_tokens": batch["decoder_input_tokens"],
        "logits": logits,
        "about": np.array(json.dumps({"t5x": T5X_COMMIT, **about})),
        **{f"parameters/{key}": flat[key] for key in kept},
    }


def pack(folder: Path, path: Path) -> None:
    """Writes the folder's files into a .zip, the same bytes for the same files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for source in sorted(folder.rglob("*")):
            if source.is_file():
                info = zipfile.ZipInfo(str(source.relative_to(folder)))
                file.writestr(info, source.read_bytes(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    place = Path(__file__).parent / "golden_t5x"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for number, (name, case) in enumerate(CASES.items()):
        with tempfile.TemporaryDirectory() as folder:
            content = save(name, case, Path(folder), number)
            pack(Path(folder), place / f"{name}.zip")
            files = sum(path.is_file() for path in Path(folder).rglob("*"))
        np.savez_compressed(place / f"{name}.npz", **content)
        print(name, files, "files", (place / f"{name}.zip").stat().st_size)
