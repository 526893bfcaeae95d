"""The other side of the step benchmark: DRO-V as it would be written in PyTorch with transformers' T5.

Policy and frozen reference are `T5ForConditionalGeneration`, the value network a `T5EncoderModel` with a linear head
on the mean of its states (so it has no decoder, which ours has). One pass of each network a step and one backward pass
for both losses; transformers' own attention (SDPA where its T5 has it); AdamW, fused; bfloat16 by autocast with float32
weights, the frozen reference in bfloat16 altogether. Nothing waits for the device within a step.
"""

import copy
import dataclasses
import os
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from dro_jax.data.packing import Batch
from dro_jax.networks import T5Config

TAU = 1.0
LEARNING_RATE = 1e-4


class Value(nn.Module):
    """V(x): a T5 encoder and a linear head on the mean of its states."""

    def __init__(self, config: transformers.T5Config) -> None:
        """Random weights."""
        super().__init__()
        self.t5 = transformers.T5EncoderModel(config)
        self.head = nn.Linear(config.d_model, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values [B] of prompts [B, T]."""
        states = self.t5(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1)).squeeze(-1).float()


def log_prob(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Returns log pi(y|x) [B], the sum over the target tokens, in nats."""
    logits = model(
        input_ids=batch["inputs"],
        attention_mask=batch["mask"],
        # Padding is behind the end, where the causal mask hides it.
        decoder_input_ids=batch["shifted"],
        use_cache=False,
    ).logits
    targets = batch["targets"]
    per_token = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=0
    )
    return -per_token.view(targets.shape).sum(1).float()


@dataclasses.dataclass
class Trainer:
    """A training on one device.

    Attributes:
      policy: trained.
      value: trained.
      reference: frozen.
      optimizer: of policy and value.
      device: where they are.
      bfloat16: whether products are in bfloat16.
    """

    policy: nn.Module
    value: nn.Module
    reference: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    bfloat16: bool

    def step(self, host: Batch) -> Tensor:
        """Takes a step on a batch of one example a row and returns its loss."""
        batch = self.to_device(host)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            with torch.inference_mode():
                reference_log_prob = log_prob(self.reference, batch)
            policy_log_prob = log_prob(self.policy, batch)
            value = self.value(batch["inputs"], batch["mask"])
        rewards = batch["rewards"]
        log_ratio = policy_log_prob - reference_log_prob
        # The two gradients of the paper's eq. 4, as one sum.
        of_policy = (rewards - value.detach() - TAU * log_ratio).square().mean() / (2 * TAU)
        of_value = (rewards - value - TAU * log_ratio.detach()).square().mean() / 2
        loss = of_policy + of_value
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def run(self, batches: Sequence[Batch]) -> float:
        """Takes a step on each of these batches and returns the seconds that all of them took."""
        begin = time.perf_counter()
        for batch in batches:
            self.step(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def to_device(self, host: Batch) -> dict[str, Tensor]:
        """Returns a batch as transformers takes it."""

        def tokens(name: str) -> Tensor:
            return torch.from_numpy(host[name].astype(np.int64)).to(self.device, non_blocking=True)

        inputs = tokens("encoder_input_tokens")
        return {
            "inputs": inputs,
            "mask": (inputs > 0).long(),
            "shifted": tokens("decoder_input_tokens"),
            "targets": tokens("decoder_target_tokens"),
            "rewards": torch.from_numpy(host["rewards"][:, 0]).to(self.device),
        }


def make_trainer(config: T5Config, device: str, *, bfloat16: bool) -> Trainer:
    """Returns a training from random weights of our model's shape, on "cpu" or "cuda"."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")
    shape = {
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
        "num_layers": config.num_encoder_layers,
    }
    on = torch.device(device)
    torch.manual_seed(0)
    with on:
        policy = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**shape, num_decoder_layers=config.num_decoder_layers)
        )
        # Version 5 ties what 1.1 does not.
        if policy.lm_head.weight is policy.shared.weight:
            policy.lm_head.weight = nn.Parameter(policy.lm_head.weight.detach().clone())
        value = Value(transformers.T5Config(**shape))
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    if bfloat16:
        reference = reference.to(torch.bfloat16)
    trained = [*policy.parameters(), *value.parameters()]
    return Trainer(
        policy=policy.train(),
        value=value.train(),
        reference=reference,
        optimizer=torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        device=on,
        bfloat16=bfloat16,
    )


def compiled(trainer: Trainer, *, dynamic: bool) -> Trainer:
    """Returns the same training with its networks compiled, for any lengths or for one."""
    return dataclasses.replace(
        trainer,
        policy=torch.compile(trainer.policy, dynamic=dynamic),
        value=torch.compile(trainer.value, dynamic=dynamic),
        reference=torch.compile(trainer.reference, dynamic=dynamic),
    )
