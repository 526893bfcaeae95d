"""Checkpoints: every bit comes back or the damage is noticed, and they belong to what they say."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from dro_jax.errors import UsageError
from dro_jax.training import checkpoints
from dro_jax.training.checkpoints import DamagedError
from dro_jax.training.train_state import Layout, TrainState

# Where one read fails Orbax closes its event loop under the others, which then complain to nobody.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s)Exception ignored in.*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
)

META = {
    "model": {"emb_dim": 16, "mlp_dim": 32, "num_heads": 2, "vocab_size": 32},
    "vocabulary": "bytes",
    "algorithm": "dro_v",
}


@pytest.fixture(scope="module")
def layout():
    """Of a state with a few arrays of several types."""
    everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kernel = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    half = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(
        step=count,
        policy={"encoder": {"kernel": kernel}, "half": half},
        value={"value_head": {"kernel": kernel}},
        opt_state={
            "policy": (optax.FactoredState(count, {"w": half}, {"w": half}, {"w": kernel}),)
        },
    )
    shardings = jax.tree.map(lambda _: everywhere, shapes)
    return Layout(mesh=None, rules=(), shapes=shapes, shardings=shardings)


@pytest.fixture(scope="module")
def random_state():
    """A function that fills a layout's state with random bits, as no optimiser would leave them."""

    def fill(layout, seed):
        rng = np.random.default_rng(seed)

        def leaf(shape):
            if shape.dtype == np.int32:
                return rng.integers(-(2**31), 2**31, shape.shape, np.int32)
            return rng.standard_normal(shape.shape, np.float32).astype(shape.dtype)

        state = jax.tree.map(leaf, layout.shapes).replace(step=np.int32(seed))
        return jax.tree.map(jax.device_put, state, layout.shardings)

    return fill


@pytest.fixture
def saved(tmp_path, layout, random_state):
    """A function that saves random states at the given steps into a folder, keeping all of them."""

    def save(*steps, keep_last=99, keep_every=None, layout=layout):
        manager = checkpoints.open_manager(tmp_path, keep_last=keep_last, keep_every=keep_every)
        for step in steps:
            checkpoints.save(manager, random_state(layout, step), META)
        manager.close()
        return tmp_path

    return save


def assert_identical(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)

    def check(path, a, b):
        name = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name

    jax.tree_util.tree_map_with_path(check, first, second)


def data_files(folder):
    """The files of one saved item that hold arrays, and what else TensorStore keeps beside them."""
    return [path for path in folder.rglob("d/*") if path.is_file()]


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("which", ["a few arrays", "DRO-V"])
def test_a_state_comes_back_bit_for_bit_with_its_structure_and_layout(
    which, saved, bench, layout, random_state
):
    layout = bench().layout if which == "DRO-V" else layout
    folder = saved(1, 7, layout=layout)
    state = checkpoints.restore_latest(folder, layout.abstract(), META)
    want = random_state(layout, 7)
    assert_identical(state, want)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, state, want)
    assert all(jax.tree.leaves(same))
    meta = checkpoints.read_meta(folder, 7)
    assert {name: meta[name] for name in META} == META
    assert meta["step"] == 7

    policy = checkpoints.restore_policy(folder, 1, layout.abstract().policy, META)
    assert_identical(policy, random_state(layout, 1).policy)
    value = checkpoints.restore_value(folder, 1, layout.abstract().value)
    assert_identical(value, random_state(layout, 1).value)


def test_an_empty_or_missing_folder_has_no_state(tmp_path, layout):
    for folder in (tmp_path, tmp_path / "missing"):
        assert checkpoints.steps(folder) == []
        assert checkpoints.restore_latest(folder, layout.abstract(), META) is None
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(2, None, [4, 5]), (1, 3, [3, 5]), (2, 2, [2, 4, 5]), (10, None, [1, 2, 3, 4, 5])],
)
def test_the_newest_and_every_kth_checkpoint_are_kept(saved, keep_last, keep_every, kept):
    folder = saved(1, 2, 3, 4, 5, keep_last=keep_last, keep_every=keep_every)
    assert checkpoints.steps(folder) == kept


@pytest.mark.parametrize("damage", [flip_byte, truncate, Path.unlink])
@pytest.mark.parametrize("item", ["policy", "value", "optimizer"])
def test_a_damaged_file_is_noticed_and_the_older_checkpoint_used(
    damage, item, saved, layout, random_state, caplog
):
    folder = saved(1, 2)
    for path in data_files(folder / "checkpoint_2" / item):
        damage(path)
    if item == "policy":
        with pytest.raises(DamagedError, match=r"checkpoint_2: damaged, "):
            checkpoints.restore_policy(folder, 2, layout.abstract().policy, META)
    with caplog.at_level(logging.WARNING, logger="dro_jax.training.checkpoints"):
        state = checkpoints.restore_latest(folder, layout.abstract(), META)
    assert_identical(state, random_state(layout, 1))
    assert "checkpoint_2: damaged" in caplog.text
    assert "moved to checkpoint_2.damaged" in caplog.text
    assert (folder / "checkpoint_2.damaged").is_dir()
    assert checkpoints.steps(folder) == [1]

    saved(2)
    assert_identical(
        checkpoints.restore_latest(folder, layout.abstract(), META), random_state(layout, 2)
    )


@pytest.mark.parametrize(
    ("item", "leaf"), [("policy", "encoder/kernel"), ("value", "value_head/kernel")]
)
def test_a_flipped_byte_that_orbax_restores_without_a_word_is_noticed(item, leaf, saved, layout):
    folder = saved(1)
    for path in data_files(folder / "checkpoint_1" / item):
        if "ocdbt.process_0" in path.parts:  # the arrays; the rest has a checksum of its own
            flip_byte(path)
    with pytest.raises(UsageError, match=f"checkpoint_1: damaged, {item}/{leaf} is not what was"):
        checkpoints.restore_latest(folder, layout.abstract(), META)


def test_a_damaged_description_counts_as_a_damaged_checkpoint(saved, layout, random_state):
    folder = saved(1, 2)
    (description,) = (path for path in (folder / "checkpoint_2" / "meta").rglob("metadata"))
    truncate(description)
    state = checkpoints.restore_latest(folder, layout.abstract(), META)
    assert_identical(state, random_state(layout, 1))


@pytest.mark.parametrize(
    ("steps", "advice"),
    [((3,), "there is no older one"), ((3, 4), "no older checkpoint is whole either")],
)
def test_where_all_are_damaged_one_line_says_so_and_nothing_is_moved(saved, layout, steps, advice):
    folder = saved(*steps)
    for step in steps:
        for path in data_files(folder / f"checkpoint_{step}" / "policy"):
            truncate(path)
    with pytest.raises(UsageError) as raised:
        checkpoints.restore_latest(folder, layout.abstract(), META)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"{folder}/checkpoint_{steps[-1]}: damaged")
    assert message.endswith(f"{advice}: choose another MODEL_DIR")
    assert checkpoints.steps(folder) == list(steps)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"model": dict.fromkeys(META["model"], 1)},
            r"another model \(emb_dim 16 there, 1 here, mlp_dim 32 there, 1 here, "
            r"num_heads 2 there, 1 here\)",
        ),
        ({"model": META["model"] | {"depth": 3}}, r"model \(depth None there, 3 here\)"),
        (
            {"vocabulary": "sentencepiece:ab"},
            r"vocabulary \('bytes' there, 'sentencepiece:ab' here",
        ),
        ({"algorithm": "sft"}, r"another algorithm \('dro_v' there, 'sft' here\)"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_what_differs(saved, layout, change, named):
    folder = saved(1)
    for restore in (
        lambda: checkpoints.restore_latest(folder, layout.abstract(), META | change),
        lambda: checkpoints.restore_policy(folder, 1, layout.abstract().policy, META | change),
    ):
        with pytest.raises(
            UsageError, match=r"checkpoint_1: this checkpoint has " + r".*" + named
        ) as e:
            restore()
        assert not isinstance(e.value, DamagedError)
        assert "\n" not in str(e.value)
    assert checkpoints.steps(folder) == [1]


def test_left_overs_of_an_interrupted_save_are_no_checkpoint_and_are_cleared(
    saved, layout, random_state
):
    folder = saved(1)
    left_over = folder / "checkpoint_2.orbax-checkpoint-tmp"
    (left_over / "policy").mkdir(parents=True)
    (left_over / "policy" / "data").write_text("half")
    (folder / "checkpoint_x").mkdir()
    assert checkpoints.steps(folder) == [1]
    assert checkpoints.find(folder)[1] == 1
    state = checkpoints.restore_latest(folder, layout.abstract(), META)
    assert_identical(state, random_state(layout, 1))
    saved(2)
    assert not left_over.exists()
    assert checkpoints.steps(folder) == [1, 2]


def test_find_takes_a_run_or_one_checkpoint_in_it(saved, tmp_path):
    folder = saved(3, 11)
    assert checkpoints.find(str(folder)) == (epath.Path(folder), 11)
    assert checkpoints.find(folder / "checkpoint_3") == (epath.Path(folder), 3)
    for wrong in (folder / "checkpoint_4", folder / "checkpoint_3" / "policy", tmp_path / "no"):
        with pytest.raises(UsageError) as raised:
            checkpoints.find(wrong)
        assert str(raised.value) == (
            f"{wrong}: no checkpoint here (looked for checkpoint_<step>); give the folder of a run "
            "(its MODEL_DIR) or one checkpoint in it"
        )


def test_the_reference_is_saved_alone_and_replaced_by_a_later_start(tmp_path, layout, random_state):
    folder = tmp_path / "reference"
    for seed in (1, 2):
        policy = random_state(layout, seed).policy
        checkpoints.save_policy(folder, policy, META)
        assert checkpoints.find(folder) == (epath.Path(folder), 0)
        restored = checkpoints.restore_policy(folder, 0, layout.abstract().policy, META)
        assert_identical(restored, policy)
    with pytest.raises(DamagedError):
        checkpoints.restore_value(folder, 0, layout.abstract().value)


def test_a_save_that_orbax_declines_is_no_save(tmp_path, layout, random_state):
    checkpoints.save_policy(tmp_path, random_state(layout, 1).policy, META)
    (tmp_path / "checkpoint_0").rename(tmp_path / "checkpoint_9")
    with pytest.raises(checkpoints.SaveError, match="there are checkpoints of later steps"):
        checkpoints.save_policy(tmp_path, random_state(layout, 2).policy, META)
    assert checkpoints.steps(tmp_path) == [9]


def test_another_mesh_restores_the_same_bits_and_has_the_same_checksums(saved, bench, random_state):
    one, cube = bench().layout, bench((2, 2, 2)).layout
    folder = saved(5, layout=one)
    state = checkpoints.restore_latest(folder, cube.abstract(), META)
    want = random_state(one, 5)
    assert_identical(jax.device_get(state), jax.device_get(want))
    embedding = state.policy["token_embedder"]["embedding"]
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(16, 8)}
    assert checkpoints.checksums(state.policy) == checkpoints.checksums(want.policy)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8])
def test_a_checksum_is_the_sum_of_the_words_and_changes_with_any_bit(dtype):
    word = {1: np.uint8, 2: np.uint16, 4: np.uint32}[jnp.dtype(dtype).itemsize]
    raw = np.random.default_rng(0).integers(0, np.iinfo(word).max, (3, 5), word, endpoint=True)
    leaf = jax.lax.bitcast_convert_type(jnp.asarray(raw), dtype)
    want = int(raw.astype(np.uint64).sum() % 2**32)
    assert checkpoints.checksums({"a": {"b": leaf}}) == {"a/b": want}
    for bit in (0, 3, 8 * raw.itemsize - 1):
        flipped = raw.copy()
        flipped[1, 2] ^= word(1 << bit)
        leaf = jax.lax.bitcast_convert_type(jnp.asarray(flipped), dtype)
        assert checkpoints.checksums({"a": {"b": leaf}})["a/b"] != want


def test_the_checkpoint_that_wins_most_stays(tmp_path, layout, random_state):
    def save(rates, first):
        manager = checkpoints.open_manager(tmp_path, keep_last=1, keep_every=None)
        for step, rate in enumerate(rates, first):
            checkpoints.save(manager, random_state(layout, step), META, win_rate=rate)
        checkpoints.close(manager)

    save([0.4, 0.9, None, 0.3], 1)
    assert checkpoints.steps(tmp_path) == [2, 4]
    assert checkpoints.find(tmp_path / "best") == (tmp_path, 2)
    # What an earlier process wrote counts too; the last of equals is the best.
    save([0.2, None], 5)
    assert checkpoints.steps(tmp_path) == [2, 6]
    save([0.9, 0.1], 7)
    assert checkpoints.steps(tmp_path) == [7, 8]
    assert checkpoints.find(tmp_path / "best") == (tmp_path, 7)
