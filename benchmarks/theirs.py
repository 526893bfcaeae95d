"""The other side of the step benchmark: DRO-V as it would be written in PyTorch with transformers' T5.

Policy and frozen reference are `T5ForConditionalGeneration`, the value network a `T5EncoderModel` with a linear head
on the mean of its states (so it has no decoder, which ours has). One pass of each network a step, none of the reference
where batches carry its log-probabilities, and one backward pass for both losses; transformers' own attention (SDPA with
the position bias in its mask, or eager); AdamW, fused, whose update costs less time and more memory than our Adafactor;
bfloat16 by autocast with float32 weights, the frozen reference in bfloat16 altogether, which is faster than to run it
as the policy is run and lets the log-ratio begin near 0 and not at it. Logits are of all positions, as trainers of
preference data have them by default, or of real targets only. Nothing waits for the device within a step, but for the
choice of those. A batch whose activations do not fit into a GPU's memory is worked through in two parts, or four, and
so on, whose gradients add up to the batch's; batches of other lengths are not.
"""

import copy
import dataclasses
import functools
import gc
import os
import time
from collections.abc import Callable, Sequence

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
        mask = (input_ids > 0)[..., None].to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1)).squeeze(-1).float()


def log_prob(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Returns log pi(y|x) [B], the sum over the target tokens, in nats."""
    logits = model(
        input_ids=batch["inputs"],
        attention_mask=batch["attention_mask"],
        # Padding is behind the end, where the causal mask hides it.
        decoder_input_ids=batch["shifted"],
        use_cache=False,
    ).logits
    targets = batch["targets"]
    per_token = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=0
    )
    return -per_token.view(targets.shape).sum(1).float()


def log_prob_of_targets(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """`log_prob` without the logits of padding."""
    states = model.decoder(
        input_ids=batch["shifted"],
        encoder_hidden_states=model.encoder(
            input_ids=batch["inputs"], attention_mask=batch["attention_mask"]
        ).last_hidden_state,
        encoder_attention_mask=batch["attention_mask"],
        use_cache=False,
    ).last_hidden_state
    targets = batch["targets"]
    rows, at = torch.nonzero(targets, as_tuple=True)
    per_token = -F.cross_entropy(
        model.lm_head(states[rows, at]), targets[rows, at], reduction="none"
    )
    return per_token.new_zeros(len(targets)).index_add(0, rows, per_token).float()


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
      log_prob: the function of that name, the same compiled, or `log_prob_of_targets`.
      at_once: the most rows that fit into memory, where those of a batch did not, by the batch's lengths.
    """

    policy: nn.Module
    value: nn.Module
    reference: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    bfloat16: bool
    log_prob: Callable[[nn.Module, dict[str, Tensor]], Tensor] = log_prob
    at_once: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)

    def step(self, host: Batch) -> Tensor:
        """Takes a step on a batch of one example a row and returns its loss."""
        batch = self.to_device(host)
        lengths = lengths_of(host)
        loss = None
        while loss is None:
            some = self.at_once.get(lengths, len(batch["rewards"]))
            try:
                loss = self.accumulate_gradients(batch, some)
            except torch.OutOfMemoryError:
                if some == 1:
                    raise
                self.at_once[lengths] = -(-some // 2)
            if loss is None:
                # Only here the tensors of the failure are gone.
                self.optimizer.zero_grad(set_to_none=True)
                gc.collect()
                torch.cuda.empty_cache()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def parts(self, host: Batch) -> int:
        """Returns in how many parts a batch is worked through."""
        rows = len(host["rewards"])
        return -(-rows // self.at_once.get(lengths_of(host), rows))

    def accumulate_gradients(self, batch: dict[str, Tensor], at_once: int) -> Tensor:
        """Adds the gradients of a batch, so many rows at once, and returns its loss."""
        rows = len(batch["rewards"])
        losses = []
        for first in range(0, rows, at_once):
            part = {name: x[first : first + at_once] for name, x in batch.items()}
            loss = self.loss(part) * (len(part["rewards"]) / rows)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the loss whose gradients are the two of the paper's eq. 4."""
        rewards, reference_log_prob = batch["rewards"], batch.get("reference_log_probs")
        # The same names with and without a cached reference, for which nothing is compiled anew.
        texts = {name: batch[name] for name in ("inputs", "attention_mask", "shifted", "targets")}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            if reference_log_prob is None:
                with torch.no_grad():
                    reference_log_prob = self.log_prob(self.reference, texts)
            policy_log_prob = self.log_prob(self.policy, texts)
            value = self.value(texts["inputs"], texts["attention_mask"])
        log_ratio = policy_log_prob - reference_log_prob
        of_policy = (rewards - value.detach() - TAU * log_ratio).square().mean() / (2 * TAU)
        of_value = (rewards - value - TAU * log_ratio.detach()).square().mean() / 2
        return of_policy + of_value

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

        def moved(array: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(array)
            # Only from pinned memory a copy does not wait.
            tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
            return tensor.to(self.device, non_blocking=True)

        inputs = moved(host["encoder_input_tokens"].astype(np.int64))
        # In the shape of the scores: of a mask [B, T] transformers asks the device whether it is all ones.
        mask = (inputs > 0)[:, None, None, :]
        if self.policy.config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        batch = {
            "inputs": inputs,
            "attention_mask": mask,
            "shifted": moved(host["decoder_input_tokens"].astype(np.int64)),
            "targets": moved(host["decoder_target_tokens"].astype(np.int64)),
            "rewards": moved(host["rewards"][:, 0]),
        }
        if "reference_log_probs" in host:
            batch["reference_log_probs"] = moved(host["reference_log_probs"][:, 0])
        return batch


def lengths_of(batch: Batch) -> tuple[int, int]:
    """Returns the lengths of a batch's rows, encoder's and decoder's."""
    return batch["encoder_input_tokens"].shape[1], batch["decoder_input_tokens"].shape[1]


def make_trainer(config: T5Config, device: str, *, bfloat16: bool, attention: str) -> Trainer:
    """Returns a training from random weights of our model's shape.

    Args:
      config: the shape.
      device: "cpu" or "cuda".
      bfloat16: whether products are in bfloat16.
      attention: "sdpa" or "eager".
    """
    # As XLA has it.
    torch.set_flush_denormal(True)
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
        # "gated-gelu" means the same function in more kernels.
        "feed_forward_proj": "gated-gelu_pytorch_tanh",
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
        "num_layers": config.num_encoder_layers,
        "attn_implementation": attention,
    }
    on = torch.device(device)
    torch.manual_seed(0)
    with on:
        policy = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**shape, num_decoder_layers=config.num_decoder_layers)
        )
        # Version 5 ties what 1.1 does not. Logits of about 1, as ours are.
        policy.lm_head.weight = nn.Parameter(torch.empty_like(policy.lm_head.weight))
        nn.init.normal_(policy.lm_head.weight, std=config.emb_dim**-0.5)
        value = Value(transformers.T5Config(**shape))
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    if bfloat16:
        reference = reference.to(torch.bfloat16)
    for model in (policy, value, reference):
        lay_out_bias(model)
    trained = [*policy.parameters(), *value.parameters()]
    return Trainer(
        policy=policy.train(),
        value=value.train(),
        reference=reference,
        optimizer=torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        device=on,
        bfloat16=bfloat16,
    )


def lay_out_bias(model: nn.Module) -> None:
    """Has position biases [1, H, T, S] lie in memory as SDPA's fused kernels want them, keys side by side.

    transformers 5.17 gives its own, whose heads are side by side, to SDPA as it is, which takes a slow kernel then.
    """

    def laid_out(compute: Callable[..., Tensor], *inputs: object, **options: object) -> Tensor:
        return compute(*inputs, **options).contiguous()

    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False):
            module.compute_bias = functools.partial(laid_out, module.compute_bias)


def compiled(trainer: Trainer, *, dynamic: bool) -> Trainer:
    """Returns the same training with its networks and their losses compiled, for any lengths or for one."""
    # Beyond the limit it would go on without a compiler and say nothing; the default, 8, is near with two trainings.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64
    # Lengths that happen to be equal at first are not taken to be one.
    torch.fx.experimental._config.use_duck_shape = False
    return dataclasses.replace(
        trainer,
        value=torch.compile(trainer.value, dynamic=dynamic, fullgraph=True),
        log_prob=torch.compile(log_prob, dynamic=dynamic, fullgraph=True),
        at_once={},
    )
