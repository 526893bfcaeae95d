"""Checkpoints: saved by Orbax in the background and atomically, read back only if every bit is as written.

A run's folder holds `checkpoint_<step>/` with the items `policy` and `value` (parameter trees), `optimizer`
and `meta` (JSON: what the checkpoint belongs to, and a checksum of every array, since Orbax restores a
flipped bit without a word), and `reference/checkpoint_0/` with the frozen reference in the same form.
"""

import contextlib
import gc
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dro_jax.errors import UsageError
from dro_jax.training import processes
from dro_jax.training.train_state import TrainState

Tree = Any
Meta = dict[str, Any]

logger = logging.getLogger(__name__)

WIN_RATE = "win_rate"
"""In a checkpoint's meta and metrics."""

BEST = "best"
"""What a person calls the checkpoint of a run that wins most."""

_NAMES = ocp.path.step.standard_name_format(step_prefix="checkpoint")


class DamagedError(UsageError):
    """A checkpoint that cannot be read, or whose arrays are not the ones that were written."""


class SaveError(OSError):
    """A checkpoint that cannot be written, because a disk is full or the like; the older ones are whole."""


def checksums(tree: Tree) -> dict[str, int]:
    """Of each array, by its path: the sum of its 32-bit patterns modulo 2^32, the same on every mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_bit_sums([leaf for _, leaf in leaves]))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(total)
        for (path, _), total in zip(leaves, sums, strict=True)
    }


def weights_digest(tree: Tree) -> str:
    """What identifies a parameter tree: the SHA-256 of its arrays' checksums."""
    return _digest_of_checksums(checksums(tree))


def policy_digest(meta: Meta) -> str:
    """`weights_digest` of the policy of a checkpoint, from its facts alone."""
    return _digest_of_checksums(meta["checksums"]["policy"])


def _digest_of_checksums(sums: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


@jax.jit
def _bit_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    return [
        jnp.sum(
            jax.lax.bitcast_convert_type(leaf, words[leaf.dtype.itemsize]).astype(jnp.uint32),
            dtype=jnp.uint32,
        )
        for leaf in leaves
    ]


def open_manager(
    directory: epath.PathLike, *, keep_last: int, keep_every: int | None
) -> ocp.CheckpointManager:
    """Opens a folder for saving; left-overs of interrupted saves are removed.

    Args:
      directory: the run's folder; made if it is missing.
      keep_last: number of newest checkpoints to keep.
      keep_every: checkpoints at multiples of this many steps are kept for ever; None keeps only the newest.

    Returns:
      The manager, for `save` and `close`.
    """
    policies = ocp.checkpoint_managers

    def win_rate(metrics: Any) -> float:
        return metrics[WIN_RATE]

    keep: list[Any] = [
        policies.LatestN(keep_last),
        policies.BestN(n=1, get_metric_fn=win_rate, keep_checkpoints_without_metrics=False),
    ]
    if keep_every is not None:
        keep.append(policies.EveryNSteps(keep_every))
    return ocp.CheckpointManager(
        epath.Path(directory).absolute(),
        options=ocp.CheckpointManagerOptions(
            step_name_format=_NAMES,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            # Without it Orbax writes no metrics.
            best_fn=win_rate,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        ),
    )


def save(
    manager: ocp.CheckpointManager, state: TrainState, meta: Meta, win_rate: float | None = None
) -> None:
    """Starts saving a training state; returns once the arrays are copied off the devices.

    Args:
      manager: of `open_manager`.
      state: the state.
      meta: JSON-ready facts that the checkpoint belongs to.
      win_rate: of its policy over the reference, None where nobody was asked. The checkpoint with the greatest is kept.

    Raises:
      SaveError: if this cannot be written, or the save before it could not.
    """
    _save(manager, int(state.step), _items(state), meta | {WIN_RATE: win_rate})


def close(manager: ocp.CheckpointManager) -> None:
    """Waits for the save under way. Raises SaveError if it failed."""
    with _writing(manager.directory):
        manager.close()


def save_policy(directory: epath.PathLike, policy: Tree, meta: Meta) -> None:
    """Saves one parameter tree, such as the reference, as `directory/checkpoint_0` and waits for it.

    One that an earlier start left there is replaced.
    """
    if processes.is_first() and 0 in steps(directory):
        path_of(directory, 0).rmtree()
    processes.wait_for_all("place for the reference")
    manager = open_manager(directory, keep_last=1, keep_every=None)
    _save(manager, 0, {"policy": policy}, meta)
    close(manager)


def _items(state: TrainState) -> dict[str, Tree]:
    items = {"policy": state.policy, "value": state.value, "optimizer": state.opt_state}
    return {name: tree for name, tree in items.items() if tree}


def _save(manager: ocp.CheckpointManager, step: int, trees: dict[str, Tree], meta: Meta) -> None:
    meta = meta | {"step": step, "checksums": {k: checksums(v) for k, v in trees.items()}}
    meta["digest"] = _digest(meta)
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    rate = meta.get(WIN_RATE)
    with _writing(manager.directory):
        begun = manager.save(
            step,
            args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items),
            metrics=None if rate is None else {WIN_RATE: rate},
        )
        if not begun:
            raise FileExistsError("there are checkpoints of later steps")


@contextlib.contextmanager
def _writing(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    # A full disk is an OSError in one writer below and a ValueError in another.
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if line]
        full = next((line for line in lines if "No space left" in line), None)
        reason = "No space left on device" if full else (lines or [type(error).__name__])[0][:200]
        found = steps(directory)
        older = f"the checkpoint of step {found[-1]} is whole: " if found else ""
        raise SaveError(
            f"{directory}: a checkpoint cannot be written ({reason}); {older}make room, and the same command "
            "goes on"
        ) from error


def steps(directory: epath.PathLike) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; [] if there is no such folder."""
    path = epath.Path(directory)
    return sorted(found.step for found in _NAMES.find_all(path)) if path.is_dir() else []


def read_meta(directory: epath.PathLike, step: int) -> Meta:
    """The facts saved with a checkpoint. Raises DamagedError if they cannot be read."""
    path = path_of(directory, step)
    meta = _restore(path, {"meta": ocp.args.JsonRestore()})["meta"]
    if not isinstance(meta, dict) or meta.get("digest") != _digest(meta):
        raise DamagedError(f"{path}: damaged, meta is not what was written")
    return meta


def restore_latest(
    directory: epath.PathLike, abstract: TrainState, expected: Meta
) -> TrainState | None:
    """The newest training state in a folder that is whole.

    Damaged checkpoints that are newer are moved aside to `checkpoint_<step>.damaged`, with a warning.

    Args:
      directory: the run's folder.
      abstract: shapes and shardings to restore into.
      expected: facts that must be the same in the checkpoint's meta.

    Returns:
      The state, or None if the folder has no checkpoint.

    Raises:
      UsageError: if a checkpoint belongs to something else, or if none of them is whole.
    """
    # Of an error its text alone: with its frames it would keep the damaged arrays.
    damaged: list[tuple[int, str]] = []
    found = steps(directory)
    for step in reversed(found):
        path = path_of(directory, step)
        try:
            meta = read_meta(directory, step)
            check_meta(path, meta, expected)
            restored = _restore_checked(path, _items(abstract), meta)
        except DamagedError as error:
            damaged.append((step, str(error)))
            continue
        if processes.is_first():
            for bad, reason in damaged:
                move_aside(path_of(directory, bad), reason)
        processes.wait_for_all("damaged checkpoints are aside")
        return TrainState(
            step=jax.device_put(np.int32(step), abstract.step.sharding),
            policy=restored["policy"],
            value=restored.get("value", {}),
            opt_state=restored["optimizer"],
        )
    if damaged:
        raise UsageError(
            f"{damaged[0][1]}; no older checkpoint is whole either: choose another MODEL_DIR"
            if len(found) > 1
            else f"{damaged[0][1]}; there is no older one: choose another MODEL_DIR"
        )
    return None


def move_aside(path: epath.Path, reason: str) -> None:
    """Moves a damaged checkpoint to `checkpoint_<step>.damaged`, or the next such name that is free, with a warning."""
    names = (f"{path.name}.damaged{suffix}" for suffix in ("", *range(2, 1000)))
    aside = next(place for name in names if not (place := path.parent / name).exists())
    logger.warning("%s; moved to %s", reason, aside.name)
    path.rename(aside)


def find(path: epath.PathLike) -> tuple[epath.Path, int]:
    """The folder and step of a checkpoint that a person named.

    Args:
      path: a run's folder (its newest checkpoint is meant), one `checkpoint_<step>` in it, or `best` in it.

    Returns:
      Folder and step.

    Raises:
      UsageError: if there is no complete checkpoint.
    """
    folder = epath.Path(path)
    prefix, _, number = folder.name.partition("_")
    if prefix == "checkpoint" and number.isdigit() and int(number) in steps(folder.parent):
        return folder.parent, int(number)
    if folder.name == BEST and not folder.exists():
        rates = {
            step: read_meta(folder.parent, step).get(WIN_RATE) for step in steps(folder.parent)
        }
        judged = {step: rate for step, rate in rates.items() if rate is not None}
        if not judged:
            raise UsageError(
                f"{path}: no checkpoint of that run was held against its reference; train with a JUDGE, or name "
                "one checkpoint_<step>"
            )
        # Orbax, too, keeps the last of equals.
        return folder.parent, max(judged, key=lambda step: (judged[step], step))
    found = steps(folder)
    if not found:
        raise UsageError(
            f"{path}: no checkpoint here (looked for checkpoint_<step>); give the folder of a run "
            "(its MODEL_DIR) or one checkpoint in it"
        )
    return folder, found[-1]


def restore_policy(directory: epath.PathLike, step: int, abstract: Tree, expected: Meta) -> Tree:
    """The policy's parameters of one checkpoint.

    Args:
      directory: folder of the checkpoint.
      step: its step.
      abstract: shapes and shardings to restore into.
      expected: facts that must be the same in the checkpoint's meta.

    Returns:
      The parameter tree.

    Raises:
      UsageError: if the checkpoint belongs to something else or is damaged.
    """
    path = path_of(directory, step)
    meta = read_meta(directory, step)
    check_meta(path, meta, expected)
    return _restore_checked(path, {"policy": abstract}, meta)["policy"]


def restore_value(directory: epath.PathLike, step: int, abstract: Tree) -> Tree:
    """The value network's parameters of one checkpoint; as `restore_policy`."""
    meta = read_meta(directory, step)
    return _restore_checked(path_of(directory, step), {"value": abstract}, meta)["value"]


def check_meta(path: epath.Path, meta: Meta, expected: Meta) -> None:
    """Raises UsageError naming what differs where a checkpoint does not belong to `expected`."""
    for key, want in expected.items():
        have = meta.get(key)
        if have == want:
            continue
        if isinstance(want, dict) and isinstance(have, dict):
            differing = [name for name in want if have.get(name) != want[name]]
            detail = ", ".join(
                f"{n} {have.get(n)!r} there, {want[n]!r} here" for n in differing[:3]
            )
        else:
            detail = f"{have!r} there, {want!r} here"
        raise UsageError(
            f"{path}: this checkpoint has another {key} ({detail}): choose another MODEL_DIR or "
            "checkpoint, or the gin file it was made with"
        )


def _restore_checked(path: epath.Path, abstract: dict[str, Tree], meta: Meta) -> dict[str, Tree]:
    items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    restored = _restore(path, items)
    for name, tree in restored.items():
        written = meta["checksums"][name]
        for leaf, total in checksums(tree).items():
            if written.get(leaf) != total:
                raise DamagedError(f"{path}: damaged, {name}/{leaf} is not what was written")
    return restored


def _restore(path: epath.Path, items: dict[str, Any]) -> dict[str, Any]:
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return dict(checkpointer.restore(path, args=ocp.args.Composite(**items)).items())
    except (MemoryError, PermissionError):
        raise
    # Whatever a damaged file makes the readers below raise, it means one thing here.
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
    # Orbax leaves reads behind that it never awaits, of which Python would warn a person at some later time.
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        gc.collect()
    raise DamagedError(f"{path}: damaged, cannot be read ({reason[0][:200]})")


def _digest(meta: Meta) -> str:
    facts = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def path_of(directory: epath.PathLike, step: int) -> epath.Path:
    """The folder of a run's checkpoint."""
    return epath.Path(directory).absolute() / f"checkpoint_{step}"
