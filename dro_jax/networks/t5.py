"""T5 in Flax linen: version 1.0 (ReLU, tied and scaled logits), 1.1 and FLAN (gated GELU, untied logits).

Parameter names, kernel shapes and logical axis names are those of T5X, so that a checkpoint of either reads
as the other's: `encoder/layers_0/attention/query/kernel [embed, heads * head_dim]` and so on. Every row may
hold several packed examples: attention stays inside a segment.

Letters in shapes: B rows, Ti encoder positions, To decoder positions, N examples a row, E embedding, H heads,
D head dimension, V vocabulary, L longest decoded sequence, K beams a prompt.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from dro_jax.errors import UsageError, check_choice, check_number
from dro_jax.networks.attention import (
    attend,
    attend_by_cudnn,
    relative_position_bucket,
    segment_mask,
    use_cudnn,
)
from dro_jax.networks.log_probs import (
    MASKED_LOGIT,
    mask_entries,
    token_log_probs,
    token_log_probs_in_chunks,
    vocabulary_logits,
)
from dro_jax.networks.sharding import constrain, gather

Array = jax.Array


BY_OUTPUT = "by_output"
"""Collection of the matrices that lie by output, [out, in]; see `decoding_variables`."""

_REMAT: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of a T5, in T5X's words.

    Attributes:
      vocab_size: rows of the embedding table, padding included.
      emb_dim: width of the residual stream.
      num_heads: attention heads.
      head_dim: width of one head.
      mlp_dim: hidden width of the feed-forward layers.
      num_encoder_layers: encoder depth.
      num_decoder_layers: decoder depth.
      mlp_activations: ("gelu", "linear") is the gated layer of 1.1 and FLAN, ("relu",) that of 1.0.
      logits_via_embedding: whether the logits reuse the embedding table, scaled by 1/sqrt(emb_dim), as in 1.0.
      relative_buckets: number of relative-position buckets.
      relative_max_distance: distance from which on all positions share the last bucket.
      dtype: compute type, "float32" or "bfloat16"; "auto" is float32 on CPU and bfloat16 elsewhere.
        Parameters, softmax and logits are float32 whatever it is.
      reserved_entry: whether the last vocabulary entry is no token: its logit is the value V(x) of a single
        net, and every softmax leaves it out.
      scan_layers: whether the layers of a stack are one loop for the compiler, whose time and memory then do
        not grow with the depth. Parameters, checkpoints and numbers stay the same.
      remat: what of a layer is computed again in the backward pass instead of kept: "none", all but the
        matrix products' results ("dots"), or all ("full").
      logits_chunk: positions whose logits a device has in memory at a time in training; padding is skipped, and
        the backward pass multiplies them out again. None makes and keeps the logits [B, To, V] of all.
      attention: "xla", or "cudnn", fused kernels for bfloat16 on NVIDIA GPUs; "auto" takes them on one GPU, where a
        trial of them gives what XLA's give.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    logits_via_embedding: bool = False
    relative_buckets: int = 32
    relative_max_distance: int = 128
    dtype: str = "auto"
    reserved_entry: bool = False
    scan_layers: bool = False
    remat: str = "none"
    logits_chunk: int | None = None
    attention: str = "auto"

    def __post_init__(self) -> None:
        """Raises UsageError for sizes that are none and names that are unknown."""
        # JSON and gin files may give a list, which has no hash.
        if isinstance(self.mlp_activations, list):
            object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for field in dataclasses.fields(self):
            if field.type is int:
                check_number(
                    f"T5Config.{field.name}", getattr(self, field.name), whole=True, at_least=1
                )
        check_choice(
            "T5Config.mlp_activations", self.mlp_activations, (("gelu", "linear"), ("relu",))
        )
        check_choice("T5Config.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        check_choice("T5Config.remat", self.remat, tuple(_REMAT))
        check_choice("T5Config.attention", self.attention, ("auto", "xla", "cudnn"))
        if not isinstance(self.scan_layers, bool):
            raise UsageError(f"T5Config.scan_layers is {self.scan_layers!r}: give True or False")
        if self.logits_chunk is not None:
            check_number("T5Config.logits_chunk", self.logits_chunk, whole=True, at_least=1)

    @property
    def compute_dtype(self) -> Any:
        """The type that `dtype` stands for on this machine."""
        if self.dtype == "auto":
            return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[self.dtype]

    def architecture(self) -> dict[str, Any]:
        """Everything that parameters depend on, JSON-ready: a checkpoint belongs to the model it agrees with."""
        fields = dataclasses.asdict(self)
        for name in (
            "dtype",
            "reserved_entry",
            "scan_layers",
            "remat",
            "logits_chunk",
            "attention",
        ):
            del fields[name]
        return fields | {"mlp_activations": list(self.mlp_activations)}


def parameter(
    module: nn.Module,
    name: str,
    init: Callable[..., Any],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> Array:
    """A float32 parameter of `module` that carries the logical names of its axes."""
    return cast(
        Array, module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    )


def times_by_output(x: Array, matrix: Array, **accumulation: Any) -> Array:
    """x [..., in] times a matrix [out, in] that lies by output, as a product of the matrix and few columns."""
    columns = jnp.einsum("oi,bi->ob", matrix, x.reshape(-1, x.shape[-1]), **accumulation)
    # Else the compiler makes it the product of x and the matrix again.
    return jax.lax.optimization_barrier(columns).T.reshape(*x.shape[:-1], -1)


class Dense(nn.Module):
    """Linear map without bias; the kernel is 2-D and named by two logical axes."""

    features: int
    axes: tuple[str, str]
    dtype: Any
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., in] to [..., features]."""
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
        kernel = parameter(self, "kernel", init, (x.shape[-1], self.features), self.axes)
        if self.has_variable(BY_OUTPUT, "kernel"):
            return times_by_output(x.astype(self.dtype), self.get_variable(BY_OUTPUT, "kernel"))
        # Of rows, the gradient of the kernel is a plain product; XLA copies a factor with more axes transposed.
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        rows = rows @ gather(kernel.astype(self.dtype), *self.axes)
        return rows.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias; computed in float32."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises [..., E] over its last axis."""
        scale = parameter(self, "scale", nn.initializers.ones_init(), (x.shape[-1],), ("embed",))
        scale = gather(scale, "embed")
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return (x * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


@jax.custom_vjp
def look_up(table: Array, tokens: Array) -> Array:
    """Rows [..., E] of a table [V, E] by token, whose gradient is added up in float32.

    In bfloat16 the sum over a token that comes a thousand times stops growing long before its end.
    """
    return jnp.take(constrain(table, "vocab", None), tokens, axis=0)


def _look_up_forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    # Of the table its length and type alone: whole it would be in memory until the backward pass.
    return look_up(table, tokens), (table[:, :0], tokens)


def _look_up_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    empty, tokens = saved
    zeros = jnp.zeros((len(empty), cotangent.shape[-1]), jnp.float32)
    # Added up whole too, or the compiler moves all activations to where the table lies.
    added = constrain(zeros.at[tokens].add(cotangent.astype(jnp.float32)), "vocab", None)
    return added.astype(empty.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class Embedding(nn.Module):
    """The token table, also the output layer where logits are tied."""

    config: T5Config

    def setup(self) -> None:
        """Declares the table."""
        shape = (self.config.vocab_size, self.config.emb_dim)
        init = nn.initializers.normal(1.0)
        self.embedding = parameter(self, "embedding", init, shape, ("vocab", "embed"))

    def __call__(self, tokens: Array) -> Array:
        """Looks up tokens [B, T]: [B, T, E]."""
        # A gather: the one-hot product costs a third of a small model's step on CPU.
        return constrain(look_up(self.weights(), tokens), "batch", None, None)

    def weights(self) -> Array:
        """The table as a layer uses it, [V, E]."""
        return gather(self.embedding.astype(self.config.compute_dtype), "vocab", "embed")

    def attend(self, x: Array) -> Array:
        """Logits [..., V] of states [..., E] against the table, float32."""
        if self.has_variable(BY_OUTPUT, "embedding"):
            return times_by_output(x, self.weights(), preferred_element_type=jnp.float32)
        return vocabulary_logits(x, self.weights(), "ve")


class RelativeBias(nn.Module):
    """Learnt attention bias by bucketed distance, one table for all layers of a stack."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query_positions: Array, key_positions: Array) -> Array:
        """Bias [1, H, T, S] for positions [T] and [S]."""
        config = self.config
        buckets = relative_position_bucket(
            key_positions[None, :] - query_positions[:, None],
            bidirectional=self.bidirectional,
            num_buckets=config.relative_buckets,
            max_distance=config.relative_max_distance,
        )
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        shape = (config.num_heads, config.relative_buckets)
        table = parameter(self, "rel_embedding", init, shape, ("heads", "relpos_buckets"))
        return jnp.take(table, buckets, axis=1)[None]


class Attention(nn.Module):
    """Multi-head attention without the 1/sqrt(head_dim), which T5 leaves to the initial query kernel."""

    config: T5Config

    def setup(self) -> None:
        """Declares the four projections."""
        config = self.config
        width = config.num_heads * config.head_dim
        dtype = config.compute_dtype
        self.query = Dense(width, ("embed", "joined_kv"), dtype, init_scale=1.0 / config.head_dim)
        self.key = Dense(width, ("embed", "joined_kv"), dtype)
        self.value = Dense(width, ("embed", "joined_kv"), dtype)
        self.out = Dense(config.emb_dim, ("joined_kv", "embed"), dtype)

    def keys_values(self, x: Array) -> tuple[Array, Array]:
        """Keys and values [B, S, H, D] of the attended states [B, S, E]."""
        return self._by_head(self.key(x)), self._by_head(self.value(x))

    def __call__(
        self, x: Array, keys: Array, values: Array, *, bias: Array | None, mask: Array
    ) -> Array:
        """Attends from [B, T, E]; bias [1, H, T, S] and mask [B, 1, T, S] (True: may look). [B, T, E]."""
        config = self.config
        # cuDNN wants even numbers: not those of a value network's only query.
        fused = (
            not self.is_initializing()
            and x.shape[1] % 2 == keys.shape[1] % 2 == 0
            and use_cudnn(config.attention, config.compute_dtype, config.head_dim)
        )
        function = attend_by_cudnn if fused else attend
        attended = function(self._by_head(self.query(x)), keys, values, bias, mask)
        return self.out(attended.reshape(*x.shape[:-1], -1))

    def cached(self, x: Array) -> tuple[Array, Array]:
        """Keys and values [B, H, S, D] of the attended states [B, S, E], as `attend_cached` reads them."""
        keys, values = (jnp.swapaxes(part, 1, 2) for part in self.keys_values(x))
        return (
            constrain(keys, "batch", "heads", None, None),
            constrain(values, "batch", "heads", None, None),
        )

    def attend_cached(self, x: Array, keys: Array, values: Array, bias: Array) -> Array:
        """Attends from [B, T, E] to cached keys and values [B, H, S, D]; bias [1 or B, 1 or H, 1, S]. [B, T, E]."""
        queries = self._by_head(self.query(x))
        logits = jnp.einsum("bthd,bhsd->bhts", queries, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias).astype(values.dtype)
        attended = jnp.einsum("bhts,bhsd->bthd", weights, values)
        return self.out(attended.reshape(*x.shape[:-1], -1))

    def _by_head(self, x: Array) -> Array:
        shape = (*x.shape[:-1], self.config.num_heads, self.config.head_dim)
        return constrain(x.reshape(shape), "batch", None, "heads", None)


class MLP(nn.Module):
    """Feed-forward layer, gated when `mlp_activations` names two functions."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, T, E] to itself."""
        config = self.config
        functions = {"gelu": nn.gelu, "relu": nn.relu, "linear": lambda y: y}
        branches = []
        for i, name in enumerate(config.mlp_activations):
            layer = "wi" if len(config.mlp_activations) == 1 else f"wi_{i}"
            dense = Dense(config.mlp_dim, ("embed", "mlp"), config.compute_dtype, name=layer)
            branches.append(functions[name](constrain(dense(x), "batch", None, "mlp")))
        hidden = branches[0] if len(branches) == 1 else branches[0] * branches[1]
        return Dense(config.emb_dim, ("mlp", "embed"), config.compute_dtype, name="wo")(hidden)


def apply_layers(stack: Any, layer: type[nn.Module], x: Array, *inputs: Array) -> Array:
    """Runs the layers of a stack, scanned and rematerialised as its configuration says.

    Args:
      stack: `Encoder` or `Decoder`, with `config` and `layers`.
      layer: class of the layers.
      x: float [B, T, E].
      inputs: what every layer reads beside it.

    Returns:
      float [B, T, E].
    """
    config: T5Config = stack.config
    if stack.is_initializing():
        for one in stack.layers:
            x = one(x, *inputs)
        return x

    def apply(x: Array, params: Any) -> Array:
        return cast(Array, layer(config, parent=None).apply({"params": params}, x, *inputs))

    if config.remat != "none":
        apply = jax.checkpoint(
            apply, policy=_REMAT[config.remat], prevent_cse=not config.scan_layers
        )
    params = [stack.variables["params"][f"layers_{i}"] for i in range(len(stack.layers))]
    if not config.scan_layers:
        for one in params:
            x = apply(x, one)
        return x
    # Matrices in the type they are used in: the stacked copy is half as large.
    params = jax.tree.map(lambda p: p.astype(config.compute_dtype) if p.ndim > 1 else p, params)
    stacked = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *params)
    return jax.lax.scan(lambda x, params: (apply(x, params), None), x, stacked)[0]


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each normalised before and added after."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, bias: Array, mask: Array) -> Array:
        """Maps [B, Ti, E] to itself."""
        dtype = self.config.compute_dtype
        y = RMSNorm(dtype, name="pre_attention_layer_norm")(x)
        attention = Attention(self.config, name="attention")
        x = x + attention(y, *attention.keys_values(y), bias=bias, mask=mask)
        y = RMSNorm(dtype, name="pre_mlp_layer_norm")(x)
        return constrain(x + MLP(self.config, name="mlp")(y), "batch", None, None)


class Encoder(nn.Module):
    """The encoder stack."""

    config: T5Config

    def setup(self) -> None:
        """Declares the layers, one relative bias for all of them and the last norm."""
        config = self.config
        self.relpos_bias = RelativeBias(config, bidirectional=True)
        self.layers = [EncoderLayer(config) for _ in range(config.num_encoder_layers)]
        self.encoder_norm = RMSNorm(config.compute_dtype)

    def __call__(self, x: Array, segment_ids: Array) -> Array:
        """Encodes embedded tokens [B, Ti, E] with segment ids [B, Ti], 0 for padding."""
        positions = jnp.arange(x.shape[1])
        bias = self.relpos_bias(positions, positions)
        mask = segment_mask(segment_ids, segment_ids)
        return self.encoder_norm(apply_layers(self, EncoderLayer, x, bias, mask))


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder, feed-forward."""

    config: T5Config

    def setup(self) -> None:
        """Declares the sublayers under T5X's names."""
        dtype = self.config.compute_dtype
        self.pre_self_attention_layer_norm = RMSNorm(dtype)
        self.self_attention = Attention(self.config)
        self.pre_cross_attention_layer_norm = RMSNorm(dtype)
        self.encoder_decoder_attention = Attention(self.config)
        self.pre_mlp_layer_norm = RMSNorm(dtype)
        self.mlp = MLP(self.config)

    def __call__(
        self, x: Array, encoded: Array, bias: Array, mask: Array, cross_mask: Array
    ) -> Array:
        """Maps [B, To, E] to itself, reading encoder states [B, Ti, E]."""
        y = self.pre_self_attention_layer_norm(x)
        x = x + self.self_attention(y, *self.self_attention.keys_values(y), bias=bias, mask=mask)
        y = self.pre_cross_attention_layer_norm(x)
        keys, values = self.encoder_decoder_attention.keys_values(encoded)
        x = x + self.encoder_decoder_attention(y, keys, values, bias=None, mask=cross_mask)
        x = x + self.mlp(self.pre_mlp_layer_norm(x))
        return constrain(x, "batch", None, None)

    def cross_cache(self, encoded: Array) -> tuple[Array, Array]:
        """Keys and values [B, H, Ti, D] of the encoder states, the same at every decoding step."""
        return self.encoder_decoder_attention.cached(encoded)

    def decode_step(
        self, x: Array, cache: dict[str, Array], index: Array, bias: Array, cross_bias: Array
    ) -> tuple[Array, dict[str, Array]]:
        """One position [B * K, 1, E] against the caches; returns it and the grown cache."""
        y = self.pre_self_attention_layer_norm(x)
        new_key, new_value = self.self_attention.cached(y)
        keys = jax.lax.dynamic_update_slice_in_dim(cache["key"], new_key, index, axis=2)
        values = jax.lax.dynamic_update_slice_in_dim(cache["value"], new_value, index, axis=2)
        x = x + self.self_attention.attend_cached(y, keys, values, bias)
        y = self.pre_cross_attention_layer_norm(x)
        cross = cache["cross_key"], cache["cross_value"]
        # The beams of a prompt read the same keys, as so many queries.
        y = y.reshape(cross[0].shape[0], -1, x.shape[-1])
        y = self.encoder_decoder_attention.attend_cached(y, *cross, cross_bias)
        x = x + y.reshape(x.shape)
        x = x + self.mlp(self.pre_mlp_layer_norm(x))
        return constrain(x, "batch", None, None), cache | {"key": keys, "value": values}


class OutputLayer(nn.Module):
    """Untied logits, accumulated in float32."""

    config: T5Config

    def setup(self) -> None:
        """Declares the kernel."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        shape = (self.config.emb_dim, self.config.vocab_size)
        self.kernel = parameter(self, "kernel", init, shape, ("embed", "vocab"))

    def weights(self) -> Array:
        """The kernel as a layer uses it, [E, V]."""
        return gather(self.kernel.astype(self.config.compute_dtype), "embed", "vocab")

    def __call__(self, states: Array) -> Array:
        """Maps [..., E] to float32 [..., V]."""
        if self.has_variable(BY_OUTPUT, "kernel"):
            by_output: Array = self.get_variable(BY_OUTPUT, "kernel")
            return times_by_output(states, by_output, preferred_element_type=jnp.float32)
        return vocabulary_logits(states, self.weights(), "ev")


class Decoder(nn.Module):
    """The decoder stack, over whole sequences or one position at a time with a cache."""

    config: T5Config

    def setup(self) -> None:
        """Declares the layers, one relative bias for all of them, the last norm and untied logits."""
        config = self.config
        self.relpos_bias = RelativeBias(config, bidirectional=False)
        self.layers = [DecoderLayer(config) for _ in range(config.num_decoder_layers)]
        self.decoder_norm = RMSNorm(config.compute_dtype)
        # Here because T5X has it under `decoder/`; where it is never called (the value network, tied
        # logits) it has no parameter.
        self.logits_dense = OutputLayer(config)

    def __call__(
        self, x: Array, encoded: Array, segment_ids: Array, encoder_segment_ids: Array
    ) -> Array:
        """States [B, To, E] of embedded decoder inputs [B, To, E]; each position sees its segment's past."""
        positions = jnp.arange(x.shape[1])
        bias = self.relpos_bias(positions, positions)
        causal = (positions[None, :] <= positions[:, None])[None, None]
        mask = segment_mask(segment_ids, segment_ids) & causal
        cross_mask = segment_mask(segment_ids, encoder_segment_ids)
        x = apply_layers(self, DecoderLayer, x, encoded, bias, mask, cross_mask)
        return self.decoder_norm(x)

    def logits(self, states: Array) -> Array:
        """Untied logits float32 [..., V] of states [..., E]."""
        return self.logits_dense(states)

    def output_weights(self) -> Array:
        """What untied logits are made with, [E, V]."""
        return self.logits_dense.weights()

    def init_cache(self, encoded: Array, max_length: int, beams: int) -> list[dict[str, Array]]:
        """Empty caches [B * K, H, L, D], one a layer, with the encoder's keys and values [B, H, Ti, D] beside them."""
        config = self.config
        shape = (encoded.shape[0] * beams, config.num_heads, max_length, config.head_dim)
        empty = constrain(jnp.zeros(shape, config.compute_dtype), "batch", "heads", None, None)
        caches = []
        for layer in self.layers:
            cross_key, cross_value = layer.cross_cache(encoded)
            caches.append(
                {"key": empty, "value": empty, "cross_key": cross_key, "cross_value": cross_value}
            )
        return caches

    def decode_step(
        self, x: Array, caches: list[dict[str, Array]], index: Array, encoder_segment_ids: Array
    ) -> tuple[Array, list[dict[str, Array]]]:
        """State [B * K, 1, E] of position `index` (a scalar) and the caches with it added."""
        key_positions = jnp.arange(caches[0]["key"].shape[2])
        bias = self.relpos_bias(index[None], key_positions)
        bias = jnp.where((key_positions <= index)[None, None, None, :], bias, MASKED_LOGIT)
        cross_bias = jnp.where(encoder_segment_ids > 0, 0.0, MASKED_LOGIT)[:, None, None, :]
        grown = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.decode_step(x, cache, index, bias, cross_bias)
            grown.append(cache)
        return self.decoder_norm(x), grown


class T5(nn.Module):
    """The policy (and the reference): an encoder-decoder language model."""

    config: T5Config

    def setup(self) -> None:
        """Declares the shared embedding and both stacks."""
        self.token_embedder = Embedding(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
    ) -> Array:
        """Logits of every decoder position.

        Args:
          encoder_input_tokens: int32 [B, Ti], 0 is padding.
          decoder_input_tokens: int32 [B, To], the targets shifted right behind the start token 0.
          encoder_segment_ids: int32 [B, Ti] when packed, the k-th example's tokens holding k + 1.
          decoder_segment_ids: int32 [B, To], likewise.

        Returns:
          float32 [B, To, V].
        """
        return self.logits_and_values(
            encoder_input_tokens, decoder_input_tokens, encoder_segment_ids, decoder_segment_ids
        )[0]

    def logits_and_values(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
    ) -> tuple[Array, Array]:
        """Logits [B, To, V] as of a call, and the raw logit [B, To] of the last vocabulary entry.

        With `reserved_entry` the latter is a single net's V: at an example's first position it has seen the
        prompt alone.
        """
        states = self.decode(
            encoder_input_tokens, decoder_input_tokens, encoder_segment_ids, decoder_segment_ids
        )
        raw = self._raw_logits(states)
        return self._mask_reserved(raw), raw[..., -1]

    def log_probs_and_values(
        self,
        decoder_target_tokens: Array,
        decoder_loss_weights: Array,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
    ) -> tuple[Array, Array]:
        """log pi of each target [B, To] in nats, float32, and the raw logits [B, To] of `logits_and_values`.

        log pi is 0 where the loss weight is. The same numbers with `logits_chunk` as without, but for rounding.
        """
        states = self.decode(
            encoder_input_tokens, decoder_input_tokens, encoder_segment_ids, decoder_segment_ids
        )
        return self.log_probs_and_values_of(states, decoder_target_tokens, decoder_loss_weights > 0)

    def log_probs_and_values_of(
        self, states: Array, targets: Array, counted: Array
    ) -> tuple[Array, Array]:
        """`log_probs_and_values` [B, To] of decoder states [B, To, E]; log pi is 0 where not counted."""
        config = self.config
        if config.logits_chunk is None:
            raw = self._raw_logits(states)
            log_probs = token_log_probs(self._mask_reserved(raw), targets)
            return jnp.where(counted, log_probs, 0), raw[..., -1]
        axes: Literal["ev", "ve"]
        if config.logits_via_embedding:
            states = states * config.emb_dim**-0.5
            weights, axes = self.token_embedder.weights(), "ve"
        else:
            weights, axes = self.decoder.output_weights(), "ev"
        of_last = jax.lax.index_in_dim(weights, -1, axes.index("v"), keepdims=False)
        last = jnp.einsum("bte,e->bt", states, of_last, preferred_element_type=jnp.float32)
        num_tokens = config.vocab_size - config.reserved_entry
        log_probs = token_log_probs_in_chunks(
            states, weights, targets, counted, axes, num_tokens, config.logits_chunk
        )
        return log_probs, last

    def decode(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
    ) -> Array:
        """Decoder states [B, To, E], of which the logits are made; arguments as of a call."""
        segments = encoder_segments(encoder_input_tokens, encoder_segment_ids)
        encoded = self.encode(encoder_input_tokens, segments)
        if decoder_segment_ids is None:
            decoder_segment_ids = jnp.ones_like(decoder_input_tokens)
        embedded = self.token_embedder(decoder_input_tokens)
        return self.decoder(embedded, encoded, decoder_segment_ids, segments)

    def encode(
        self, encoder_input_tokens: Array, encoder_segment_ids: Array | None = None
    ) -> Array:
        """Encoder states [B, Ti, E]."""
        segments = encoder_segments(encoder_input_tokens, encoder_segment_ids)
        return self.encoder(self.token_embedder(encoder_input_tokens), segments)

    def logits(self, states: Array) -> Array:
        """Logits float32 [..., V] of decoder states [..., E]."""
        return self._mask_reserved(self._raw_logits(states))

    def _mask_reserved(self, raw: Array) -> Array:
        return mask_entries(raw, self.config.vocab_size - self.config.reserved_entry)

    def _raw_logits(self, states: Array) -> Array:
        if self.config.logits_via_embedding:
            logits = self.token_embedder.attend(states * self.config.emb_dim**-0.5)
        else:
            logits = self.decoder.logits(states)
        return constrain(logits, "batch", None, "vocab")

    def init_cache(
        self, encoder_input_tokens: Array, max_length: int, beams: int = 1
    ) -> list[dict[str, Array]]:
        """Encodes the prompts [B, Ti] and makes room for `max_length` positions of K = `beams` beams each."""
        return self.decoder.init_cache(self.encode(encoder_input_tokens), max_length, beams)

    def decode_step(
        self,
        tokens: Array,
        caches: list[dict[str, Array]],
        index: Array,
        encoder_input_tokens: Array,
    ) -> tuple[Array, list[dict[str, Array]]]:
        """Logits [B * K, V] after the token [B * K] at position `index`, and the grown caches.

        A prompt's beams are neighbours.
        """
        segments = encoder_segments(encoder_input_tokens, None)
        embedded = self.token_embedder(tokens[:, None])
        states, caches = self.decoder.decode_step(embedded, caches, index, segments)
        return self.logits(states)[:, 0], caches


def weights_in_use(config: T5Config, params: Any) -> Any:
    """A policy's parameters as its layers use them: in the compute type, whole along the axes of the rows.

    The layers do the same to each weight. Ahead of a loop over tokens it is done once.

    Args:
      config: shape of the T5.
      params: its parameters.

    Returns:
      The tree of parameters.
    """
    tokens = jnp.ones((1, 1), jnp.int32)
    boxed = jax.eval_shape(T5(config).init, jax.random.key(0), tokens, tokens)["params"]

    def in_use(box: nn.LogicallyPartitioned, weight: Array) -> Array:
        # Norms and position biases are added up in float32.
        if weight.ndim > 1 and "relpos_buckets" not in box.names:
            weight = weight.astype(config.compute_dtype)
        return gather(weight, *box.names)

    return jax.tree.map(
        in_use, boxed, params, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def decoding_variables(config: T5Config, params: Any) -> Any:
    """What `T5.decode_step` is applied to. On CPU the decoder's matrices are there by output as well.

    A product with the few rows of a decoding step costs the time in which a matrix is read. XLA's library for CPUs
    comes near it with the matrix on the left, and takes up to twice as long with it on the right.

    Args:
      config: shape of the T5.
      params: of `weights_in_use`.

    Returns:
      Flax variables.
    """
    if jax.default_backend() != "cpu":
        return {"params": params}
    by_output: dict[tuple[str, ...], Array] = {
        ("decoder", *path): jax.lax.optimization_barrier(weight.T)
        for path, weight in flatten_dict(params["decoder"]).items()
        if path[-1] == "kernel"
    }
    if config.logits_via_embedding:
        # The table does already.
        by_output["token_embedder", "embedding"] = params["token_embedder"]["embedding"]
    return {"params": params, BY_OUTPUT: unflatten_dict(by_output)}


def encoder_segments(tokens: Array, segment_ids: Array | None) -> Array:
    """The given segment ids, or one segment of all tokens that are not padding. int32 [B, Ti]."""
    return (tokens > 0).astype(jnp.int32) if segment_ids is None else segment_ids
