"""The value network V(x) of DRO-V."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dro_jax.networks.sharding import gather
from dro_jax.networks.t5 import Decoder, Embedding, Encoder, T5Config, encoder_segments, parameter

Array = jax.Array


class ValueNetwork(nn.Module):
    """V(x): a T5 of its own whose decoder reads the start token and whose head reads that one state.

    The stacks carry the policy's parameter names, so that they start from the reference's weights; the head
    (kernel [E, 1] and bias [1]) starts at zero, so V starts at 0, the mean of normalised rewards.
    """

    config: T5Config

    def setup(self) -> None:
        """Declares embedding, both stacks and the scalar head."""
        self.token_embedder = Embedding(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.value_head = ValueHead()

    def __call__(
        self,
        encoder_input_tokens: Array,
        encoder_segment_ids: Array | None = None,
        num_examples: int = 1,
    ) -> Array:
        """Values of the examples of each row.

        Args:
          encoder_input_tokens: int32 [B, Ti].
          encoder_segment_ids: int32 [B, Ti] when packed.
          num_examples: N, the most examples a row holds.

        Returns:
          float32 [B, N] in units of normalised reward; slots without an example are finite.
        """
        segments = encoder_segments(encoder_input_tokens, encoder_segment_ids)
        encoded = self.encoder(self.token_embedder(encoder_input_tokens), segments)
        start = jnp.zeros((encoder_input_tokens.shape[0], num_examples), jnp.int32)
        # One start token an example, each a segment of its own: k-th example, segment k + 1.
        start_segments = jnp.broadcast_to(jnp.arange(1, num_examples + 1)[None], start.shape)
        states = self.decoder(self.token_embedder(start), encoded, start_segments, segments)
        return self.value_head(states)

    def per_token(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
    ) -> Array:
        """Values of every decoder position, float32 [B, To]; arguments as of `T5`.

        The paper's other wording, "a value per token": such a V has seen the response so far.
        """
        segments = encoder_segments(encoder_input_tokens, encoder_segment_ids)
        encoded = self.encoder(self.token_embedder(encoder_input_tokens), segments)
        if decoder_segment_ids is None:
            decoder_segment_ids = jnp.ones_like(decoder_input_tokens)
        embedded = self.token_embedder(decoder_input_tokens)
        return self.value_head(self.decoder(embedded, encoded, decoder_segment_ids, segments))


class ValueHead(nn.Module):
    """Scalar read-out, zero at the start, float32."""

    @nn.compact
    def __call__(self, states: Array) -> Array:
        """Maps [B, N, E] to [B, N]."""
        zeros = nn.initializers.zeros_init()
        kernel = parameter(self, "kernel", zeros, (states.shape[-1], 1), ("embed", None))
        kernel = gather(kernel, "embed", None)
        bias = parameter(self, "bias", zeros, (1,), (None,))
        # "highest": accelerators round the factors of float32 products otherwise.
        values = jnp.matmul(states.astype(jnp.float32), kernel, precision="highest")
        return (values + bias.reshape(1, 1, 1))[..., 0]
