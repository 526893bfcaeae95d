"""T5 as Hugging Face transformers stores it: config.json, and safetensors with its names.

Covers model type "t5": T5 1.0, T5 1.1, FLAN-T5 and ByT5. Weights of torch's linear layers are [out, in], kernels
here are [in, out]. Checked against transformers 5.23 by tests/interop.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from dro_jax.errors import UsageError
from dro_jax.interop import parameter_shapes, safetensors_files
from dro_jax.interop.stored_arrays import StoredArray, same_bits
from dro_jax.networks import T5Config

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names inside a model's folder."""

SHARD_BYTES = 5_000_000_000
"""The most that one file of an exported model holds, as transformers had it until version 5."""

PICKLE = (
    "is a pickle, which may run anything when it is read, so it is not; where you trust it, load it with transformers "
    "and save_pretrained() it, which writes safetensors"
)
"""What is said of torch's files."""

Json = dict[str, Any]

_SIZES = {
    "vocab_size": "vocab_size",
    "emb_dim": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "relative_buckets": "relative_attention_num_buckets",
    "relative_max_distance": "relative_attention_max_distance",
}
_EARLY_DEFAULTS = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
"""What the first files do not name."""

_ACTIVATIONS = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}
_EMBEDDING, _LOGITS = "shared.weight", "lm_head.weight"
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_NEVER_USED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

_SUBLAYERS = {
    "encoder": (
        ("pre_attention_layer_norm", "attention", "SelfAttention"),
        ("pre_mlp_layer_norm", "mlp", "DenseReluDense"),
    ),
    "decoder": (
        ("pre_self_attention_layer_norm", "self_attention", "SelfAttention"),
        ("pre_cross_attention_layer_norm", "encoder_decoder_attention", "EncDecAttention"),
        ("pre_mlp_layer_norm", "mlp", "DenseReluDense"),
    ),
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def parameter_names(config: T5Config, *, value: bool = False) -> dict[str, str]:
    """transformers' name of every parameter, by ours.

    Args:
      config: architecture.
      value: the value network's instead of the policy's: no logits, but a head that has no counterpart there
        and is called value_head.

    Returns:
      Names such as {"encoder/layers_0/mlp/wo/kernel": "encoder.block.0.layer.1.DenseReluDense.wo.weight"}.
    """
    gated = len(config.mlp_activations) > 1
    dense = {name: name for name in (("wi_0", "wi_1", "wo") if gated else ("wi", "wo"))}
    depths = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    names = {"token_embedder/embedding": _EMBEDDING}
    for stack, sublayers in _SUBLAYERS.items():
        names[f"{stack}/relpos_bias/rel_embedding"] = (
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        )
        for layer in range(depths[stack]):
            for number, (norm, ours, theirs) in enumerate(sublayers):
                here, there = f"{stack}/layers_{layer}", f"{stack}.block.{layer}.layer.{number}"
                names[f"{here}/{norm}/scale"] = f"{there}.layer_norm.weight"
                for our, their in (dense if ours == "mlp" else _PROJECTIONS).items():
                    names[f"{here}/{ours}/{our}/kernel"] = f"{there}.{theirs}.{their}.weight"
        names[f"{stack}/{stack}_norm/scale"] = f"{stack}.final_layer_norm.weight"
    if value:
        names["value_head/kernel"] = "value_head.weight"
        names["value_head/bias"] = "value_head.bias"
    elif not config.logits_via_embedding:
        names["decoder/logits_dense/kernel"] = _LOGITS
    return names


def is_transposed(name: str) -> bool:
    """Whether the parameter that is called so here lies in transformers with its axes the other way round."""
    return name.endswith(("/kernel", "/rel_embedding"))


def read_config(folder: epath.Path) -> Json:
    """What a model's config.json says.

    Raises:
      UsageError: if it cannot be read or is not a T5's.
    """
    path = folder / CONFIG
    config = read_json(path)
    kind = config.get("model_type")
    if kind == "t5" and config.get("is_encoder_decoder", True):
        return config
    classes = str(config.get("architectures") or "")
    what = f"model_type {kind!r}" + (f" ({classes.strip('[]')})" if classes else "")
    if "ForCausalLM" in classes or "LMHeadModel" in classes:
        what += ", a decoder without an encoder"
    raise UsageError(
        f"{path}: is of {what}; what converts is an encoder-decoder of model_type 't5', such as T5, FLAN-T5, ByT5"
    )


def model_config(theirs: Mapping[str, Any], path: epath.PathLike = CONFIG) -> T5Config:
    """The shape that a config.json describes.

    Args:
      theirs: of `read_config`.
      path: the file's name for messages.

    Raises:
      UsageError: if it lacks a size or asks for what our T5 does not compute.
    """
    theirs = _EARLY_DEFAULTS | dict(theirs)
    if theirs.get("num_decoder_layers") is None:
        theirs["num_decoder_layers"] = theirs.get("num_layers")
    missing = [name for name in _SIZES.values() if theirs.get(name) is None]
    if missing:
        raise UsageError(f"{path}: lacks {', '.join(missing)}; give the config.json of the weights")
    activation = theirs.get("feed_forward_proj", "relu")
    gated = activation == "gated-gelu"
    computed = {
        "feed_forward_proj": (activation, tuple(_ACTIVATIONS)),
        # What stands in these two is what transformers computes, whatever the first says.
        "dense_act_fn": (theirs.get("dense_act_fn"), (None, "gelu_new" if gated else "relu")),
        "is_gated_act": (theirs.get("is_gated_act"), (None, gated)),
        "layer_norm_epsilon": (theirs.get("layer_norm_epsilon", 1e-6), (1e-6,)),
    }
    for name, (value, known) in computed.items():
        if value not in known:
            raise UsageError(
                f"{path}: {name} is {value!r}; a T5 of dro_jax has "
                + " or ".join(repr(k) for k in known if k is not None)
            )
    # Version 5 writes tie_word_embeddings as true for all of them, and says in a field of its own which are scaled.
    scaled = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings") is not False)
    try:
        return T5Config(
            **{ours: theirs[name] for ours, name in _SIZES.items()},
            mlp_activations=_ACTIVATIONS[activation],
            logits_via_embedding=scaled,
        )
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def config_json(config: T5Config, *, eos_id: int) -> Json:
    """The config.json of a model.

    Args:
      config: its shape.
      eos_id: token of the end of sequence.

    Returns:
      What both transformers 4 (tried: 4.57) and 5 read as this model.
    """
    activation = next(k for k, v in _ACTIVATIONS.items() if v == tuple(config.mlp_activations))
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        **{name: getattr(config, ours) for ours, name in _SIZES.items()},
        "feed_forward_proj": activation,
        "tie_word_embeddings": config.logits_via_embedding,
        "pad_token_id": 0,
        "eos_token_id": eos_id,
        "decoder_start_token_id": 0,
        "dtype": "float32",
    }


def open_model(folder: epath.Path, config: T5Config) -> dict[str, StoredArray]:
    """The parameters of a model's folder under our names and in our layout, none of them read yet.

    Args:
      folder: with `WEIGHTS`, or `INDEX` and the files that it names.
      config: the shape they must have.

    Raises:
      UsageError: if files are missing, cut short or pickled, or hold another model than `config`.
    """
    found = _stored(folder)
    found.pop(_NEVER_USED, None)
    copies = [name for name in _EMBEDDING_COPIES if name in found]
    if config.logits_via_embedding and _LOGITS in found:
        copies.append(_LOGITS)
    if copies:
        table = found.setdefault(_EMBEDDING, found[copies[0]])
        for name in copies:
            if not same_bits(found.pop(name), table):
                raise UsageError(
                    f"{folder}: {name} is another table than {_EMBEDDING}; T5 has one for all of its tokens"
                )
    names = parameter_names(config)
    if _LOGITS in names.values() and _LOGITS not in found and _EMBEDDING in found:
        # transformers 5 ties the two in models that it makes, and then stores one of them.
        tied = read_config(folder).get("tie_word_embeddings") is not False
        found |= {_LOGITS: found[_EMBEDDING]} if tied else {}
    ours_by_name = parameter_shapes.shapes(config)
    needed = {
        name: ours_by_name[ours][::-1] if is_transposed(ours) else ours_by_name[ours]
        for ours, name in names.items()
    }
    parameter_shapes.refuse_differences(
        folder,
        {name: array.shape for name, array in found.items()},
        needed,
        f"the T5 in {CONFIG}",
        "give weights and config.json of one model",
    )
    return {
        ours: found[name].transposed() if is_transposed(ours) else found[name]
        for ours, name in names.items()
    }


def write_model(
    folder: epath.Path,
    arrays: Mapping[str, StoredArray],
    names: Mapping[str, str],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes parameters as safetensors: one file, or several and an index where one would be too large.

    Args:
      folder: where to.
      arrays: by our names.
      names: of `parameter_names`.
      shard_bytes: the most that a file holds, unless one array alone is larger.
    """
    renamed = {
        name: arrays[ours].transposed() if is_transposed(ours) else arrays[ours]
        for ours, name in names.items()
    }
    sizes = {name: 4 * math.prod(array.shape) for name, array in renamed.items()}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        safetensors_files.write_file(folder / WEIGHTS, renamed)
        return
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        safetensors_files.write_file(folder / file, {name: renamed[name] for name in shard})
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        },
    }
    write_json(folder / INDEX, index)


def write_json(path: epath.Path, content: Json) -> None:
    """Writes a JSON file as transformers does: indented, a line end at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: epath.Path) -> Json:
    """Reads a JSON object. Raises UsageError if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: is JSON but no object; get it again")
    return content


def _stored(folder: epath.Path) -> dict[str, StoredArray]:
    if (folder / WEIGHTS).exists():
        return safetensors_files.open_file(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise UsageError(_no_weights(folder))
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UsageError(f"{folder / INDEX}: names no files (weight_map); get it again")
    files = sorted({str(file) for file in places.values()})
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise UsageError(
            f"{folder}: {len(missing)} of {len(files)} files of {INDEX} are missing, {missing[0]} the first; get them"
        )
    found: dict[str, StoredArray] = {}
    for file in files:
        found |= safetensors_files.open_file(folder / file)
    return found


def _no_weights(folder: epath.Path) -> str:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if not pickled:
        return f"{folder}: has no {WEIGHTS} (nor {INDEX}); only safetensors are read"
    return f"{folder}: {pickled[0]} {PICKLE}"
