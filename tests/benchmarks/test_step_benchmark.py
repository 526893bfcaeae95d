"""The step's benchmark measures both sides on the same examples, and ours from arrays alone."""

import importlib.util
import types

import numpy as np
import pytest
import running

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
OURS = [
    "ours, like for like",
    "ours, to the maximum",
    "ours, cached reference",
    "ours, packed and cached",
]
THEIRS = [
    "PyTorch, to the longest",
    "PyTorch, to the maximum",
    "PyTorch, cached reference",
    "PyTorch, logits of targets",
    "PyTorch, cached reference and logits of targets",
]
STEPS = ["--steps=1", "--repeats=2"]


def names(sides):
    shapes = [f"{s}: {what}" for s in sides for what in ("positions", "real tokens among them")]
    speeds = [f"{s}: {what}" for s in sides for what in ("a step", "examples", "real tokens")]
    return shapes + speeds


def trial_and_batch(rows):
    """The trial model, and a padded batch of so many examples with made-up log-probabilities of the reference."""
    import workloads

    config, cut = workloads.SHAPES["trial"], {"inputs": 8, "targets": 9}
    examples = workloads.make_examples(rows, cut, config.vocab_size, 0)
    (batch,) = workloads.padded(examples, rows, cut, multiple=1)
    return config, batch


def test_our_side_needs_arrays_alone(tmp_path):
    found = running.run(
        "step",
        *running.TRIAL,
        *STEPS,
        "--sides=ours",
        "--logits_chunk=4",
        output=tmp_path / "results.json",
        arrays_alone=True,
    )
    lines = found["results"]
    assert list(lines) == names(OURS)
    assert found["conditions"]["layers"] == "unrolled, remat none, logits_chunk 4"
    assert found["conditions"]["dtype"] == "float32"
    assert "torch" not in found["conditions"]
    # Two rows of 8 + 8 positions: rounding up ends at the cut.
    medians = {name: line["median"] for name, line in lines.items()}
    assert medians["ours, like for like: positions"] == 32
    assert medians["ours, to the maximum: positions"] == 32
    assert medians["ours, cached reference: positions"] == 32
    for side in OURS:
        real = lines[f"{side}: real tokens among them"]
        assert 0 < real["least"] <= real["most"] <= 100
        examples, tokens = (lines[f"{side}: {of}"]["median"] for of in ("examples", "real tokens"))
        assert 4 * examples < tokens <= 16 * examples
    assert lines["ours, like for like: a step"]["repeats"] == 2


def test_every_turn_is_of_the_side_s_own_batches(monkeypatch):
    monkeypatch.syspath_prepend(running.BENCHMARKS)
    import step
    import workloads

    seen = {"ours, to the maximum": [], "PyTorch, to the longest": []}
    examples = workloads.make_examples(8, {"inputs": 8, "targets": 8}, 64, 0)
    longer = {"inputs": 9, "targets": 9}
    of_sides = {
        "ours, to the maximum": list(workloads.padded(examples, 2, longer, multiple=1)),
        "PyTorch, to the longest": list(workloads.padded_to(examples, 2, longer)),
    }
    # A second a row for ours, two for theirs.
    sides = {
        name: (
            types.SimpleNamespace(
                run=lambda some, name=name, each=each: (
                    seen[name].append(some) or each * 2 * len(some)
                ),
                parts=lambda batch: 3,
            ),
            iter(batches),
        )
        for each, (name, batches) in enumerate(of_sides.items(), 1)
    }
    lines = {line.name: line for line in step.measure(sides, steps=2, repeats=2)}
    for name, batches in of_sides.items():
        shapes = {step.batch_shape(batch) for batch in batches}
        warm, calls = seen[name][: len(shapes)], seen[name][len(shapes) :]
        # The first with the optimiser's state that it has made.
        assert [len(some) for some in warm] == [2] + [1] * (len(shapes) - 1)
        assert {step.batch_shape(batch) for batch, *_ in warm} == shapes
        sizes = [workloads.count(batch)[2] for batch, *_ in warm]
        assert sizes == sorted(sizes, reverse=True)
        # A step that is not timed where the other library was before; ours is the first to compile.
        first, second = batches[:2], batches[2:]
        before = {
            "ours": [first[:1], first, second[:1], second],
            "PyTorch": [first[:1], first, second],
        }
        assert calls == before[step.library(name)]
    assert lines["PyTorch, to the longest: parts of a batch"].median == 3
    assert lines["ours, to the maximum: examples"].median == 1
    assert lines["PyTorch, to the longest: examples"].median == 0.5
    ratio = lines["ours, to the maximum / PyTorch, to the longest"]
    assert ratio.least == ratio.most == 2


@pytest.mark.skipif(bool(MISSING), reason=f"needs the extra `bench`: no {' and no '.join(MISSING)}")
def test_ratios_are_of_the_turns_beside_each_other(tmp_path):
    found = running.run("step", *running.TRIAL, *STEPS, output=tmp_path / "results.json")
    lines = found["results"]
    longest, maximum, cached, chosen, both = THEIRS
    alike, to_maximum, with_cache, packed = OURS
    ratios = [f"{side} / {longest}" for side in OURS]
    ratios += [f"{to_maximum} / {maximum}", f"{with_cache} / {cached}", f"{packed} / {cached}"]
    ratios += [f"{alike} / {chosen}", f"{packed} / {chosen}"]
    ratios += [f"{with_cache} / {both}", f"{packed} / {both}"]
    assert list(lines) == [*names([*OURS, *THEIRS]), *ratios]
    # Two turns: both medians are means, and the ratio lies between the turns' extremes.
    for side in OURS:
        mine, theirs = lines[f"{side}: examples"], lines[f"{longest}: examples"]
        ratio = lines[f"{side} / {longest}"]
        assert 0.999 * mine["least"] / theirs["most"] <= ratio["least"]
        assert ratio["most"] <= 1.001 * mine["most"] / theirs["least"]


@pytest.mark.skipif(bool(MISSING), reason=f"needs the extra `bench`: no {' and no '.join(MISSING)}")
def test_both_sides_compute_the_same_log_probabilities_and_loss(monkeypatch):
    import jax
    import torch

    monkeypatch.syspath_prepend(running.BENCHMARKS)
    import generate
    import theirs
    import workloads
    from flax.core import meta

    from dro_jax import objectives
    from dro_jax.training import step, train_state

    config = workloads.SHAPES["trial"]
    cut = {"inputs": 8, "targets": 9}
    examples = workloads.make_examples(4, cut, config.vocab_size, 0)
    (batch,) = map(workloads.without_reference, workloads.padded(examples, 4, cut, multiple=1))
    params = meta.unbox(jax.jit(lambda: train_state.init_policy(config, 0))())
    ours = np.asarray(jax.jit(lambda p: step.sequence_log_prob(config, p, batch))(params))[:, 0]

    trainer = theirs.make_trainer(config, "cpu", bfloat16=False, attention="sdpa")
    trainer.policy = generate.in_transformers(config, params)
    host = trainer.to_device(batch)
    with torch.no_grad():
        found = theirs.log_prob(trainer.policy, host).numpy()
        chosen = theirs.log_prob_of_targets(trainer.policy, host).numpy()
        reference = theirs.log_prob(trainer.reference, host).numpy()
        value = trainer.value(host["inputs"], host["attention_mask"]).numpy()
    np.testing.assert_allclose(found, ours, rtol=1e-5)
    np.testing.assert_allclose(chosen, ours, rtol=1e-5)
    loss, metrics = objectives.dro_v_loss(
        policy_log_prob=found[:, None],
        reference_log_prob=reference[:, None],
        value=value[:, None],
        reward=batch["rewards"],
        weights=batch["reward_weights"],
        tau=theirs.TAU,
    )
    assert np.isclose(float(trainer.step(batch)), float(loss), rtol=1e-4), metrics


@pytest.mark.skipif(bool(MISSING), reason=f"needs the extra `bench`: no {' and no '.join(MISSING)}")
def test_the_other_side_s_ways_of_a_step_are_one_step(monkeypatch):
    import torch

    monkeypatch.syspath_prepend(running.BENCHMARKS)
    import theirs
    import workloads

    config, batch = trial_and_batch(4)
    alone = workloads.without_reference(batch)

    def losses(batch, *, log_prob=theirs.log_prob, **settings):
        settings = {"bfloat16": False, "attention": "sdpa"} | settings
        trainer = theirs.make_trainer(config, "cpu", **settings)
        trainer.log_prob = log_prob
        return [float(trainer.step(batch)) for _ in range(3)]

    plain = losses(alone)
    assert plain[-1] < plain[0]
    np.testing.assert_allclose(losses(alone, attention="eager"), plain, rtol=1e-4)
    chosen = theirs.log_prob_of_targets
    np.testing.assert_allclose(losses(alone, log_prob=chosen), plain, rtol=1e-4)
    np.testing.assert_allclose(losses(alone, bfloat16=True), plain, rtol=0.1)
    trainer = theirs.make_trainer(config, "cpu", bfloat16=False, attention="sdpa")
    with torch.no_grad():
        reference = theirs.log_prob(trainer.reference, trainer.to_device(batch)).numpy()
    cached = batch | {"reference_log_probs": reference[:, None]}
    np.testing.assert_allclose(losses(cached), plain, rtol=1e-4)


@pytest.mark.skipif(bool(MISSING), reason=f"needs the extra `bench`: no {' and no '.join(MISSING)}")
@pytest.mark.parametrize(("fit", "parts"), [(5, 1), (4, 2), (2, 3), (1, 5)])
def test_a_batch_that_does_not_fit_into_memory_is_worked_through_in_parts(monkeypatch, fit, parts):
    import torch

    monkeypatch.syspath_prepend(running.BENCHMARKS)
    import theirs
    import workloads

    config, batch = trial_and_batch(5)

    def of_few(model, some):
        if len(some["inputs"]) > fit:
            raise torch.OutOfMemoryError("too many")
        return theirs.log_prob(model, some)

    plain = theirs.make_trainer(config, "cpu", bfloat16=False, attention="sdpa")
    in_parts = theirs.make_trainer(config, "cpu", bfloat16=False, attention="sdpa")
    in_parts.log_prob = of_few
    for given in (batch, workloads.without_reference(batch)):
        losses = [float(trainer.step(given)) for trainer in (in_parts, plain)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        weights = [
            torch.cat([p.flatten() for p in t.policy.parameters()]) for t in (in_parts, plain)
        ]
        torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert in_parts.parts(batch) == parts
    assert plain.parts(batch) == 1
    longer = dict.fromkeys(("encoder_input_tokens", "decoder_input_tokens"), np.zeros((4, 99)))
    assert in_parts.parts(longer | {"rewards": batch["rewards"]}) == 1


@pytest.mark.skipif(bool(MISSING), reason=f"needs the extra `bench`: no {' and no '.join(MISSING)}")
def test_one_example_that_does_not_fit_is_an_error(monkeypatch):
    import torch

    monkeypatch.syspath_prepend(running.BENCHMARKS)
    import theirs

    config, batch = trial_and_batch(2)

    def never(model, some):
        raise torch.OutOfMemoryError("too much")

    trainer = theirs.make_trainer(config, "cpu", bfloat16=False, attention="sdpa")
    trainer.log_prob = never
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step(batch)


@pytest.mark.skipif(bool(MISSING), reason=f"needs the extra `bench`: no {' and no '.join(MISSING)}")
def test_fused_attention_can_read_every_bias(monkeypatch):
    import torch

    monkeypatch.syspath_prepend(running.BENCHMARKS)
    import theirs
    import workloads

    config, batch = trial_and_batch(2)
    trainer = theirs.make_trainer(config, "cpu", bfloat16=False, attention="sdpa")
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def seen(*inputs, attn_mask=None, **options):
        masks.append(attn_mask)
        return attend(*inputs, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    trainer.step(workloads.without_reference(batch))
    # Policy and reference attend three times, the value network's encoder once.
    assert len(masks) == 7
    assert all(mask.stride(-1) == 1 for mask in masks)


def test_packed_rows_are_filled_up_with_empty_ones(monkeypatch):
    monkeypatch.syspath_prepend(running.BENCHMARKS)
    import workloads

    cut = {"inputs": 8, "targets": 8}
    examples = workloads.make_examples(10, cut, 64, 0)
    plain, even = (
        list(workloads.packed(examples, cut, batch=5, multiple=multiple)) for multiple in (1, 4)
    )
    for some, filled in zip(plain, even, strict=True):
        rows = len(some["rewards"])
        assert rows % 4
        assert len(filled["rewards"]) == -(-rows // 4) * 4
        for name, array in some.items():
            np.testing.assert_array_equal(filled[name][:rows], array)
            assert not filled[name][rows:].any()
