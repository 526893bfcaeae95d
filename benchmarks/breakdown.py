"""Where the time of a DRO-V step goes, and how much of the machine's arithmetic it uses.

    python benchmarks/breakdown.py --output breakdown.json
    python benchmarks/breakdown.py --model large --batch 32 --lengths 512/512    # a GPU

The parts are programs of their own, so they need not add up to the step, in which the compiler may overlap and fuse
them; the difference is a line. Networks are timed forward and backward (the reference forward) on one packed batch of
`--batch` rows, each in the gradients of its own weights; the optimiser with the norms that the step reports. Data is
the filling of rows and their way to the device, which in training happens while the step before runs. Operations are
those of `dro_jax.training.cost`: the matrix products of what a part has to do, nothing twice. They count all positions
(or real tokens alone, where a line says so); with `logits_chunk` the vocabulary's program leaves padding out.
The ceiling is what large products, one after the other, reach on the same device in the same type.

- Model FLOPs utilisation: operations of policy, value network and reference (where the step runs it) in a second, over
  the ceiling; and again with the operations that the real tokens alone need.
"""

import argparse
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ours
import workloads
from flax.traverse_util import flatten_dict, unflatten_dict
from measure import Result, in_turns, machine, report, result

from dro_jax.data.packing import WINDOW, Batch, Example, fill_rows
from dro_jax.networks import T5, T5Config, ValueNetwork
from dro_jax.training import cost, loop, step

Array = jax.Array


def main() -> None:
    """Measures, prints the results, and writes them where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    workloads.add_flags(parser)
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument(
        "--product", type=int, help="width of the large product (default: 8192, 2048 on CPU)"
    )
    flags = parser.parse_args()
    conditions = machine(["jax", "jaxlib", "flax", "optax", "numpy"])
    config, cut = workloads.configure(flags), workloads.limits(flags)
    rows = max(WINDOW, flags.batch * workloads.MAX_EXAMPLES)
    examples = workloads.make_examples(rows, cut, config.vocab_size, seed=0)
    packed = workloads.packed_rows(examples, cut)[: flags.batch]
    on_cpu = jax.default_backend() == "cpu"
    conditions |= workloads.conditions(config)
    width = flags.product or (2048 if on_cpu else 8192)
    title = f"the parts of a step, T5 {flags.model}, {flags.batch} packed rows of {flags.lengths}"
    report(title, conditions, measure(config, packed, cut, width, flags.repeats), flags.output)


def measure(
    config: T5Config,
    rows: Sequence[Sequence[Example]],
    lengths: dict[str, int],
    width: int,
    repeats: int,
) -> Iterator[Result]:
    """Times steps on packed rows, their parts and the large products in turns."""
    trainer = ours.make_trainer(config)
    fill = functools.partial(fill_rows, rows, lengths=lengths, max_examples=workloads.MAX_EXAMPLES)
    batch = fill()
    calls = parts(trainer, fill)
    names = list(calls)
    for name, of_step in (
        ("step", workloads.without_reference(batch)),
        ("step, cached reference", batch),
    ):
        calls[name] = functools.partial(timed_steps, trainer, of_step)
    calls["product"] = product(config, width)
    in_turns(calls, 1)
    seconds = in_turns(calls, repeats)
    ceilings = [PRODUCTS * 2 * width**3 / s for s in seconds["product"]]
    needed, needed_by_tokens = operations(config, batch), operations_of_real_tokens(config, batch)

    def of_the_ceiling(name: str, flops: float) -> list[float]:
        """Percent, each turn by its own ceiling."""
        turns = zip(seconds[name], ceilings, strict=True)
        return [100 * flops / s / ceiling for s, ceiling in turns]

    examples, tokens, positions = workloads.count(batch)
    yield result("examples", "in the batch", [examples])
    yield result("real tokens", "%", [100 * tokens / positions])
    yield result("ceiling: a large product", "TFLOP/s", [c / 1e12 for c in ceilings])
    for name in names:
        yield result(name, "ms", [1e3 * s for s in seconds[name]])
        if name not in WITHOUT_PRODUCTS:
            yield result(f"{name}: of the ceiling", "%", of_the_ceiling(name, needed[name]))
    for name, left_out in (("step", ()), ("step, cached reference", ("reference",))):
        counted = [part for part in names if part not in (*WITHOUT_PRODUCTS, *left_out)]
        whole = sum(needed[part] for part in counted)
        real = sum(needed_by_tokens[part] for part in counted)
        yield result(name, "ms", [1e3 * s for s in seconds[name]])
        apart = [
            s - sum(seconds[part][turn] for part in (*counted, *WITHOUT_PRODUCTS))
            for turn, s in enumerate(seconds[name])
        ]
        yield result(f"{name}: more than its parts", "ms", [1e3 * s for s in apart])
        for what, flops in (("all positions", whole), ("real tokens", real)):
            used = of_the_ceiling(name, flops)
            yield result(f"{name}: model FLOPs utilisation, {what}", "%", used)


PRODUCTS = 10
"""One after the other, so that the call costs nothing beside them."""

WITHOUT_PRODUCTS = ("optimizer", "data")
"""Parts that have none."""


def parts(trainer: ours.Trainer, fill: Callable[[], Batch]) -> dict[str, Callable[[], float]]:
    """Returns what runs each part of a step once and returns its seconds."""

    def data() -> dict[str, Array]:
        return loop.to_devices(fill(), trainer.sharding)

    config, batch = trainer.config, data()
    tokens, targets = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    segments, own = batch["encoder_segment_ids"], batch["decoder_segment_ids"]
    policy = trainer.reference
    # Copies: the step, which is timed in turns with its parts, donates its state.
    value, opt_state = jax.tree.map(jnp.copy, (trainer.state.value, trainer.state.opt_state))
    network = T5(config)

    def encode(params: Any) -> Array:
        return network.apply({"params": params}, tokens, segments, method="encode")

    def decode(params: Any, encoded: Array) -> Array:
        def run(module: T5, encoded: Array) -> Array:
            return module.decoder(module.token_embedder(targets), encoded, own, segments)

        return network.apply({"params": params}, encoded, method=run)

    def log_probs(params: Any, states: Array) -> Array:
        return network.apply(
            {"params": params},
            states,
            batch["decoder_target_tokens"],
            batch["decoder_loss_weights"] > 0,
            method="log_probs_and_values_of",
        )[0]

    def values(params: Any) -> Array:
        slots = batch["rewards"].shape[1]
        return ValueNetwork(config).apply({"params": params}, tokens, segments, slots)

    def gradients(function: Callable[..., Array], own: str) -> Callable[..., Any]:
        """The gradients of a sum in the weights whose names begin so, and in the function's other arguments."""

        def run(params: Any, *inputs: Any) -> Any:
            flat = flatten_dict(params, sep="/")
            weights = {name: weight for name, weight in flat.items() if re.match(own, name)}

            def of_weights(weights: Any, *inputs: Any) -> Array:
                return function(unflatten_dict(flat | weights, sep="/"), *inputs)

            found, pull = jax.vjp(of_weights, weights, *inputs)
            return pull(jnp.ones_like(found))

        return jax.jit(run)

    @jax.jit
    def update(params: Any, grads: Any, state: Any) -> Any:
        updated, norms = {}, {}
        for part, transform in ours.OPTIMIZER.transforms().items():
            updates, state[part] = transform.update(grads[part], state[part], params[part])
            updated[part] = optax.apply_updates(params[part], updates)
            norms[part] = optax.tree.norm(updated[part]), optax.tree.norm(grads[part])
        return updated, state, norms

    encoded = jax.jit(encode)(policy)
    states = jax.jit(decode)(policy, encoded)
    reference = jax.jit(functools.partial(step.sequence_log_prob, config))
    params = {"policy": policy, "value": value}
    grads = jax.tree.map(lambda x: 1e-3 * x, params)
    of_encoder = gradients(encode, "token_embedder|encoder")
    of_decoder = gradients(decode, "token_embedder|decoder/(?!logits_dense)")
    of_logits = gradients(log_probs, "decoder/logits_dense")
    return {
        "encoder": functools.partial(timed, of_encoder, policy),
        "decoder": functools.partial(timed, of_decoder, policy, encoded),
        "vocabulary": functools.partial(timed, of_logits, policy, states),
        "value": functools.partial(timed, gradients(values, ""), value),
        "reference": functools.partial(timed, reference, policy, batch),
        "optimizer": functools.partial(timed, update, params, grads, opt_state),
        "data": functools.partial(timed, data),
    }


def product(config: T5Config, width: int) -> Callable[[], float]:
    """Returns what times products of square matrices in the compute type, each with the one before."""
    first, factor = jax.random.normal(jax.random.key(0), (2, width, width), config.compute_dtype)
    # So that products stay of size 1.
    factor = factor / width**0.5

    @jax.jit
    def chain(product: Array, factor: Array) -> Array:
        # A loop of the compiler's would copy the product on its way round.
        for _ in range(PRODUCTS):
            product = product @ factor
        return product

    return functools.partial(timed, chain, first, factor)


def timed(function: Callable[..., Any], *inputs: Any) -> float:
    """Returns the seconds of a call, its results included."""
    begin = time.perf_counter()
    results = None
    for _ in range(calls_at_once()):
        results = function(*inputs)
    jax.block_until_ready(results)
    return (time.perf_counter() - begin) / calls_at_once()


def timed_steps(trainer: ours.Trainer, batch: Batch) -> float:
    """Returns the seconds of a step."""
    return trainer.run([batch] * calls_at_once()) / calls_at_once()


def calls_at_once() -> int:
    """Returns how many calls are timed together: an accelerator is given one while it works on another."""
    return 1 if jax.default_backend() == "cpu" else 5


def operations(config: T5Config, batch: Batch) -> dict[str, float]:
    """Returns the operations of each part over all positions of a batch."""
    rows, inputs = batch["encoder_input_tokens"].shape
    targets, slots = batch["decoder_target_tokens"].shape[1], batch["rewards"].shape[1]
    work = cost.Workload(config, ours.ALGORITHM.needs, rows, inputs, targets, slots)
    return vars(cost.flops(work, parameters=0))


def operations_of_real_tokens(config: T5Config, batch: Batch) -> dict[str, float]:
    """Returns the operations of each part if every example were computed alone, without padding."""
    total = dict.fromkeys(operations(config, batch), 0.0)
    for row in range(len(batch["rewards"])):
        prompts, completions = (
            np.bincount(batch[f"{side}_segment_ids"][row], minlength=workloads.MAX_EXAMPLES + 1)
            for side in ("encoder", "decoder")
        )
        for slot in np.flatnonzero(batch["reward_weights"][row]) + 1:
            work = cost.Workload(
                config, ours.ALGORITHM.needs, 1, int(prompts[slot]), int(completions[slot])
            )
            for part, flops in vars(cost.flops(work, parameters=0)).items():
                total[part] += flops
    return total


if __name__ == "__main__":
    main()
