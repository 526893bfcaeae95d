"""What devices send, read from programs whose collectives are known, and from the forms that TPU programs have."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec

from dro_jax.training.collectives import Collective, read_collectives

DEVICES = 8
ARRAY = 4 * 64 * 16
"""Bytes of the float32 array that every device has."""


def compiled(function):
    """The program of a function that runs on eight devices, each with an array [64, 16]."""
    mesh = Mesh(jax.devices()[:DEVICES], ("x",))
    spread = PartitionSpec("x")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False)
    array = jax.ShapeDtypeStruct((DEVICES * 64, 16), jnp.float32)
    return jax.jit(mapped).lower(array).compile().as_text()


def all_reduce(x):
    return jax.lax.psum(jnp.sin(x), "x")


@pytest.mark.parametrize(
    ("kind", "function", "sent"),
    [
        ("all-reduce", all_reduce, 2 * 7 / 8 * ARRAY),
        ("all-gather", lambda x: jax.lax.all_gather(x, "x", tiled=True), 7 * ARRAY),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "x", tiled=True), 7 / 8 * ARRAY),
        (
            "all-to-all",
            lambda x: jax.lax.all_to_all(x.reshape(8, 8, 16), "x", 0, 0).reshape(64, 16),
            7 / 8 * ARRAY,
        ),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
            ARRAY,
        ),
    ],
)
def test_each_kind_is_counted_as_it_is_sent_round_a_ring(kind, function, sent):
    assert read_collectives(compiled(function)) == [Collective(kind, 1, pytest.approx(sent))]


def test_loops_count_as_often_as_they_turn():
    def again(x, times, body):
        return jax.lax.fori_loop(0, times, lambda _, x: body(x), x)

    inner = functools.partial(again, times=3, body=all_reduce)
    (found,) = read_collectives(compiled(lambda x: again(inner(x), 4, inner)))
    assert (found.runs, found.sent) == (15, pytest.approx(15 * 2 * 7 / 8 * ARRAY))


def test_a_loop_that_the_data_may_end_counts_to_its_limit():
    def until(x):
        def goes_on(carry):
            return (carry[0] < 6) & (carry[0] < carry[2])

        def turn(carry):
            return carry[0] + 1, all_reduce(carry[1]), carry[2]

        return jax.lax.while_loop(goes_on, turn, (jnp.int32(0), x, x[0, 0].astype(jnp.int32)))[1]

    (found,) = read_collectives(compiled(until))
    assert (found.runs, found.sent) == (6, pytest.approx(6 * 2 * 7 / 8 * ARRAY))


def test_groups_smaller_than_all():
    def pairs(x):
        return jax.lax.psum(jnp.sin(x), "x", axis_index_groups=[[0, 1], [2, 3], [4, 5], [6, 7]])

    assert read_collectives(compiled(pairs))[0].sent == ARRAY


def test_one_device_sends_nothing():
    program = jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()
    assert read_collectives(program) == []


def program(body, computations=""):
    return f"HloModule m, num_partitions=4\n{computations}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("groups", "ring"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,2]<=[4]", 2),
        ("[1,4]<=[2,2]T(1,0)", 4),
        ("mesh['a'=2,'b'=2] {'b'}", 2),
        ("mesh['a'=2,'b'=2] {'a','b'}", 4),
        ("mesh['a'=4] {'a':(2)2}", 2),
        ("{}", 4),
    ],
)
def test_all_notations_of_groups(groups, ring):
    line = f"  ROOT %r = bf16[4,2]{{1,0:T(8,128)(2,1)}} all-gather(%p), channel_id=1, replica_groups={groups}"
    assert read_collectives(program(line)) == [Collective("all-gather", 1, 16 * (ring - 1) / ring)]


def test_started_and_done_is_once():
    body = """\
  %s = (f32[2]{0}, f32[8]{0:T(256)}) all-gather-start(%p), replica_groups=[1,4]<=[4]
  %d = f32[8]{0} all-gather-done(%s)
  %t = (bf16[8]{0}, bf16[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%d), source_target_pairs={{0,1}}
  %e = bf16[8]{0} collective-permute-done(%t)
  %a = (f32[2]{0}, /*index=1*/f32[]) all-reduce-start(%p, %q), replica_groups=[1,4]<=[4]
  ROOT %b = (f32[2]{0}, f32[]) all-reduce-done(%a)"""
    assert read_collectives(program(body)) == [
        Collective("all-gather", 1, 24),
        Collective("all-reduce", 1, 18),
        Collective("collective-permute", 1, 16),
    ]


FUSED = """\
%piece (q: f32[2]) -> f32[8] {
  %g = f32[8]{0} all-gather(%q), channel_id=7, replica_groups=[1,4]<=[4]
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = f32[8]{0} fusion(%i), kind=kCustom, calls=%piece
  %y = f32[8]{0} all-reduce(%x), channel_id=8, replica_groups=[1,4]<=[4]
  ROOT %o = (s32[], /*index=1*/f32[8]{0}) tuple(%next, /*index=1*/%y)
}

%condition (t: (s32[], f32[8])) -> pred[] {
  %j = s32[]{:T(128)} get-tuple-element(%t), index=0
  %end = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%j, %end), direction=LT
}
"""


def test_pieces_of_one_collective_are_one():
    """A TPU program runs an all-gather in pieces beside its products, some of them in the loops of other ones."""
    body = """\
  %a = f32[8]{0} fusion(%p), kind=kCustom, calls=%piece
  %b = (s32[], f32[8]{0}) while(%a), condition=%condition, body=%body
  ROOT %c = f32[8]{0} fusion(%b), kind=kCustom, calls=%piece"""
    # The loop goes in steps of 2, which its condition does not tell.
    assert read_collectives(program(body, FUSED)) == [
        Collective("all-reduce", 4, 4 * 2 * 3 / 4 * 32),
        Collective("all-gather", 1, 24),
    ]
