"""T5 as T5X stores it, read and written without T5X.

Two formats are read: the older, a msgpack file `checkpoint` that names zarr folders beside it, of which the published
checkpoints are, and Orbax's, which T5X has written since 2023 and which is written here. In both the parameters are
called `target/encoder/layers_0/attention/query/kernel` and so on, as here. Where T5X scans the layers (its
scalable_t5), they lie stacked along axis 1 in `target/encoder/encoder/attention/query/kernel`, with an axis for the
heads, and each has a relative bias, where T5, T5 1.1 and FLAN-T5 have one for all. Checked against T5X of 2026-04-21 by
tests/interop.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath
from flax import serialization
from flax.traverse_util import flatten_dict

from dro_jax.errors import UsageError
from dro_jax.interop import parameter_shapes, stored_arrays
from dro_jax.interop.huggingface import read_json
from dro_jax.interop.stored_arrays import StoredArray, same_bits
from dro_jax.networks import T5Config

MSGPACK = "checkpoint"
STATE = "state"
"""Names inside a checkpoint's folder."""

NETWORKS = {False: "t5", True: "scalable_t5"}
"""T5X's example networks, by whether they scan their layers."""

RELATIVE_DISTANCES = (32, 128)
"""Relative buckets and the greatest distance of every T5 in T5X, which does not store the latter."""

_STACKS = ("encoder", "decoder")
_BIAS = "relpos_bias/rel_embedding"
_MANIFEST, _METADATA = "manifest.ocdbt", "_METADATA"
_PLACEHOLDER = "PLACEHOLDER://"
_TYPES = ("float32", "bfloat16", "float16")

Arrays = Mapping[str, StoredArray]


@dataclasses.dataclass(frozen=True)
class Model:
    """A T5 of T5X, none of it read yet.

    Attributes:
      config: its shape.
      policy: the T5's parameters by our names.
      value: those of the value network beside it; {} where there is none.
    """

    config: T5Config
    policy: dict[str, StoredArray]
    value: dict[str, StoredArray]


def find(path: epath.PathLike) -> epath.Path | None:
    """The T5X checkpoint that a path names, None if there is none.

    Args:
      path: T5X's MODEL_DIR (the newest is meant), one `checkpoint_<step>` in it, or its msgpack file `checkpoint`.
    """
    path = epath.Path(path)
    if path.is_file():
        return path if path.name == MSGPACK else None
    if _content(path) is not None:
        return path
    steps = [re.fullmatch(r"checkpoint_(\d+)", child.name) for child in path.iterdir()]
    newest = max((int(step[1]) for step in steps if step), default=None)
    if newest is None or _content(path / f"checkpoint_{newest}") is None:
        return None
    return path / f"checkpoint_{newest}"


def open_model(path: epath.Path) -> Model:
    """The T5 in a T5X checkpoint, under our names and in our layout.

    The sizes follow from the parameters' shapes; a gated feed-forward layer is taken to be of GELU (`activations` may
    know better), and distances to be told apart up to 128, as in all of T5X's T5s. A reference beside the policy is
    left aside.

    Args:
      path: of `find`.

    Raises:
      UsageError: if files are missing or damaged, or hold another model than a T5.
    """
    content = path if path.is_file() else _content(path)
    assert content is not None
    found = dict(_read_msgpack(content) if content.is_file() else _read_orbax(content))
    if not found:
        raise UsageError(f"{path}: holds no parameters (target); give a checkpoint of T5X")
    beside = {k.removeprefix("value/"): v for k, v in found.items() if k.startswith("value/")}
    found = {k: v for k, v in found.items() if not k.startswith(("value/", "reference/"))}
    policy, value = _by_layer(path, found), _by_layer(path, beside)
    config = _config(path, {name: array.shape for name, array in policy.items()})
    for arrays, prefix in ((policy, ""), (value, "value/")):
        if arrays:
            needed = parameter_shapes.shapes(config, value=bool(prefix))
            parameter_shapes.refuse_differences(
                path,
                {prefix + name: array.shape for name, array in arrays.items()},
                {prefix + name: shape for name, shape in needed.items()},
                "one T5, by its table and first layer",
                "give a checkpoint of T5, T5 1.1, FLAN-T5 or mT5",
            )
    return Model(config, policy, value)


def activations(path: epath.Path) -> tuple[str, ...] | None:
    """T5X's mlp_activations by the config.gin of the run that a checkpoint lies in; None where that does not tell.

    Args:
      path: of `find`.
    """
    described = (path.parent if path.is_file() else path).parent / "config.gin"
    text = described.read_bytes().decode(errors="replace") if described.exists() else ""
    found = re.search(r"mlp_activations = \((.*)\)", text)
    return tuple(re.findall(r"\w+", found[1])) if found else None


def write_model(path: epath.Path, step: int, policy: Arrays, value: Arrays, *, scan: bool) -> None:
    """Writes a checkpoint that T5X restores, in Orbax's format: the parameters and the step, no optimiser state.

    Args:
      path: folder to make, called `checkpoint_<step>`.
      step: what T5X counts on from.
      policy: by our names; T5X's `target`.
      value: of the value network, {} for none; `target/value`, which an ordinary T5 of T5X passes over.
      scan: whether the policy's layers lie stacked, for scalable_t5.

    Raises:
      SaveError: if the checkpoint cannot be written.
    """
    target = _stacked(policy) if scan else dict(policy)
    target |= {f"value/{name}": array for name, array in value.items()}
    arrays = {f"target/{name}": array for name, array in target.items()}
    arrays["state/step"] = StoredArray((), lambda: np.array(step, np.int32))
    stored_arrays.write(path, {STATE: arrays})


def gin_file(config: T5Config, checkpoint: str, vocabulary_file: str | None, *, scan: bool) -> str:
    """A gin file for T5X that binds a model's shape, vocabulary and weights.

    Args:
      config: the model; relative distances have to be T5X's.
      checkpoint: where its `checkpoint_<step>` is.
      vocabulary_file: a SentencePiece model, None for bytes.
      scan: as of `write_model`.
    """
    network = NETWORKS[scan]
    names = [field.name for field in dataclasses.fields(config)]
    names = names[: names.index("relative_buckets")]
    vocabulary = ["VOCABULARY = @seqio.ByteVocabulary()"]
    if vocabulary_file is not None:
        vocabulary = [
            "VOCABULARY = @seqio.SentencePieceVocabulary()",
            f"seqio.SentencePieceVocabulary.sentencepiece_model_file = {vocabulary_file!r}",
            "seqio.SentencePieceVocabulary.extra_ids = 100",
        ]
    return "\n".join(
        (
            f"# Made by `dro_jax convert`: a model for T5X. Comes after t5x/examples/{network}/t5_1_1/base.gin.",
            "from __gin__ import dynamic_registration",
            "",
            "import seqio",
            f"from t5x.examples.{network} import network",
            "",
            f"INITIAL_CHECKPOINT_PATH = {checkpoint!r}",
            *vocabulary,
            "",
            "network.T5Config:",
            *(f"  {name} = {getattr(config, name)!r}" for name in names),
            "",
        )
    )


def _content(path: epath.Path) -> epath.Path | None:
    """The msgpack file, or Orbax's folder, of one checkpoint."""
    for folder in (path / STATE, path):
        if (folder / _MANIFEST).exists():
            return folder
        if (folder / MSGPACK).is_file():
            return folder / MSGPACK
        if (folder / _METADATA).exists():
            return folder
    return None


def _read_msgpack(path: epath.Path) -> Iterator[tuple[str, Any]]:
    content = path.read_bytes()
    if content.startswith(b"model_checkpoint_path"):
        raise UsageError(
            f"{path}: belongs to a TensorFlow checkpoint of Mesh TensorFlow's; restore it in T5X and save it there"
        )
    try:
        tree = serialization.msgpack_restore(content)
        tree = tree.get("optimizer", tree.get("_optimizer", tree))
        target = flatten_dict(tree["target"], is_leaf=lambda _, node: "kvstore" in node, sep="/")
    # Whatever a file of another kind makes the reader below raise, it means one thing here.
    except Exception as error:
        raise UsageError(
            f"{path}: is not a whole checkpoint of T5X ({type(error).__name__}); get it again"
        ) from error
    for name, leaf in target.items():
        if isinstance(leaf, np.ndarray):
            yield name, leaf
            continue
        try:
            if isinstance(leaf, str):
                folder = leaf.removeprefix(_PLACEHOLDER)
            else:
                # Where it lies on the machine that wrote it does not matter; TensorStore before 0.1.14 had the
                # path outside.
                folder = (leaf["kvstore"].get("path") or leaf["path"]).strip("/")
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: does not say where {name} is; get it again") from error
        yield name, _open(path.parent, name, _kvstore(path.parent / folder))


def _read_orbax(folder: epath.Path) -> Iterator[tuple[str, Any]]:
    base = _kvstore(folder)
    if (folder / _MANIFEST).exists():
        base = {"driver": "ocdbt", "base": base}
    try:
        keys = ts.KvStore.open(base).result().list().result()
    except (ValueError, OSError) as error:
        raise _damaged(folder, "the list of its arrays", error) from error
    stored = set()
    for key in sorted(key.decode() for key in keys):
        name = key.removeprefix("target.").removesuffix("/.zarray")
        if key == f"target.{name}/.zarray":
            kvstore = {**base, "path": base.get("path", "") + f"target.{name}/"}
            stored.add(name)
            yield name.replace(".", "/"), _open(folder, name, kvstore)
    if not (folder / _METADATA).exists():
        return
    try:
        for node in read_json(folder / _METADATA)["tree_metadata"].values():
            item, *path = (key["key"] for key in node["key_metadata"])
            name = ".".join(path)
            empty = node["value_metadata"]["skip_deserialize"]
            if item == "target" and name not in stored and not empty:
                raise _damaged(folder, name, FileNotFoundError(f"{_METADATA} lists it"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(folder, _METADATA, error) from error


def _kvstore(folder: epath.Path) -> dict[str, Any]:
    scheme, found, rest = str(folder).partition("://")
    if not found:
        return {"driver": "file", "path": f"{folder.absolute()}/"}
    bucket, _, path = rest.partition("/")
    return {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": f"{path}/"}


def _open(where: epath.Path, name: str, kvstore: dict[str, Any]) -> ts.TensorStore:
    # A chunk that is not there is damage: unless told so, TensorStore reads zeros.
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    try:
        return ts.open(spec, open=True, read=True).result()
    except (ValueError, OSError) as error:
        raise _damaged(where, name, error) from error


def _damaged(where: epath.Path, name: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split())[:150]
    return UsageError(f"{where}: {name} is missing or damaged ({reason}); get the checkpoint again")


def _by_layer(where: epath.Path, found: Mapping[str, Any]) -> dict[str, StoredArray]:
    """Arrays under our names: stacked layers apart, and one relative bias for all of them."""
    arrays: dict[str, StoredArray] = {}
    for name, array in found.items():
        stack, _, rest = name.partition("/")
        if stack not in _STACKS or not rest.startswith(f"{stack}/"):
            arrays[name] = _stored(where, name, array)
            continue
        if len(array.shape) < 2:
            raise UsageError(
                f"{where}: {name} has shape {list(array.shape)}, without an axis of layers; "
                "give a checkpoint of T5X's scalable_t5 as it writes them"
            )
        for layer in range(array.shape[1]):
            inside = rest.removeprefix(f"{stack}/")
            arrays[f"{stack}/layers_{layer}/{inside}"] = _stored(where, name, array, layer)
    for stack in _STACKS:
        own = re.compile(rf"{stack}/layers_\d+/{_BIAS}")
        biases = [arrays.pop(name) for name in sorted(arrays) if own.fullmatch(name)]
        if not biases:
            continue
        if not all(same_bits(bias, biases[0]) for bias in biases[1:]):
            raise UsageError(
                f"{where}: every layer of the {stack} has a relative bias of its own, as in umT5; what converts has "
                "one for all, such as T5, T5 1.1, FLAN-T5 and mT5"
            )
        arrays[f"{stack}/{_BIAS}"] = biases[0]
    return arrays


def _stored(where: epath.Path, name: str, array: Any, layer: int | None = None) -> StoredArray:
    """An array, or one layer of it where layers lie along axis 1; the axes of heads in one, as in T5X's t5."""
    kind = getattr(array.dtype, "name", str(array.dtype))
    if kind not in _TYPES:
        raise UsageError(f"{where}: {name} has type {kind}; {', '.join(_TYPES)} can be read")
    shape = tuple(array.shape if layer is None else (*array.shape[:1], *array.shape[2:]))
    if len(shape) == 3 and name.endswith("/out/kernel"):
        shape = (shape[0] * shape[1], shape[2])
    elif len(shape) == 3 and name.endswith("/kernel"):
        shape = (shape[0], shape[1] * shape[2])

    def read() -> np.ndarray:
        part = array if layer is None else array[:, layer]
        try:
            content = part.read().result() if isinstance(part, ts.TensorStore) else part
        except (ValueError, OSError) as error:
            raise _damaged(where, name, error) from error
        return np.ascontiguousarray(content, np.float32).reshape(shape)

    return StoredArray(shape, read)


def _stacked(arrays: Arrays) -> dict[str, StoredArray]:
    """The same parameters as scalable_t5 has them: `_by_layer`, backwards."""
    stacked: dict[str, StoredArray] = {}
    layers: dict[str, dict[int, StoredArray]] = {}
    for name, array in arrays.items():
        if found := re.fullmatch(r"(encoder|decoder)/layers_(\d+)/(.*)", name):
            layers.setdefault(f"{found[1]}/{found[1]}/{found[3]}", {})[int(found[2])] = array
        else:
            stacked[name] = array
    for stack in _STACKS:
        bias = stacked.pop(f"{stack}/{_BIAS}")
        depth = len(layers[f"{stack}/{stack}/mlp/wo/kernel"])
        layers[f"{stack}/{stack}/{_BIAS}"] = dict.fromkeys(range(depth), bias)
    heads = arrays[f"encoder/{_BIAS}"].shape[0]
    return stacked | {
        name: _stack(name, [of[layer] for layer in range(len(of))], heads)
        for name, of in layers.items()
    }


def _stack(name: str, layers: Sequence[StoredArray], heads: int) -> StoredArray:
    shape = layers[0].shape
    if name.endswith("/out/kernel"):
        shape = (heads, shape[0] // heads, shape[1])
    elif re.search(r"/(query|key|value)/kernel$", name):
        shape = (shape[0], heads, shape[1] // heads)
    return StoredArray(
        (*shape[:1], len(layers), *shape[1:]),
        lambda: np.stack([layer.read().reshape(shape) for layer in layers], axis=1),
    )


def _config(where: epath.Path, shapes: Mapping[str, tuple[int, ...]]) -> T5Config:
    """The shape of a T5 by its table, biases and first layers."""
    if not any(name.startswith("encoder/") for name in shapes) and "decoder" in " ".join(shapes):
        raise UsageError(
            f"{where}: is a decoder without an encoder; what converts is an encoder-decoder such as T5, FLAN-T5, mT5"
        )
    first = "encoder/layers_0"
    gated = f"{first}/mlp/wi_0/kernel" in shapes
    needed = {
        "token_embedder/embedding": 2,
        f"encoder/{_BIAS}": 2,
        f"{first}/attention/query/kernel": 2,
        f"{first}/mlp/wo/kernel": 2,
    }
    missing = [name for name, rank in needed.items() if len(shapes.get(name, ())) != rank]
    if missing:
        held = ", ".join(f"{name} {list(shapes[name])}" for name in sorted(shapes)[:3])
        raise UsageError(
            f"{where}: is of no T5: its parameters begin with {held}, and there is no matrix {missing[0]}; give a "
            "checkpoint of T5, T5 1.1, FLAN-T5 or mT5"
        )
    vocab_size, emb_dim = shapes["token_embedder/embedding"]
    num_heads, relative_buckets = shapes[f"encoder/{_BIAS}"]
    depths = {
        stack: len({name.split("/")[1] for name in shapes if name.startswith(f"{stack}/layers_")})
        for stack in _STACKS
    }
    try:
        return T5Config(
            vocab_size=vocab_size,
            emb_dim=emb_dim,
            num_heads=num_heads,
            # No heads at all are refused by T5Config.
            head_dim=shapes[f"{first}/attention/query/kernel"][1] // max(num_heads, 1),
            mlp_dim=shapes[f"{first}/mlp/wo/kernel"][0],
            num_encoder_layers=depths["encoder"],
            num_decoder_layers=depths["decoder"],
            mlp_activations=("gelu", "linear") if gated else ("relu",),
            logits_via_embedding="decoder/logits_dense/kernel" not in shapes,
            relative_buckets=relative_buckets,
            relative_max_distance=RELATIVE_DISTANCES[1],
        )
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
