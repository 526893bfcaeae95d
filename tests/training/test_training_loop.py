"""The loop: resuming, stopping, diverging, and what happens at which step."""

import os
import signal
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from dro_jax.errors import DivergenceError
from dro_jax.training import checkpoints, loop
from dro_jax.training.loop import Periods, StopRequest
from dro_jax.training.train_state import TrainState

NEVER = 10**6
META = {"model": "tiny"}


class Recorder:
    """A run without networks: a fake step, and all that the loop called with the step it did so at."""

    def __init__(self, *, start=0, metrics=None):
        self.calls: list[tuple[str, int]] = []
        self.logged: dict[int, loop.Scalars] = {}
        self.metrics = metrics or {}
        self.in_evaluation = lambda done: None
        self.stop = StopRequest()
        self.state = TrainState(step=np.int32(start), policy={}, value={}, opt_state={})

    def train_step(self, state, reference, batch):
        done = int(state.step) + 1
        assert batch["number"].tolist() == [done - 1]
        values = {
            "loss": 1.0 * done,
            "loss/value": 0.0,
            "grad_norm/policy": 1.0,
            "kl/other": 0.0,
            "learning_rate/policy": 0.1 * done,
            "data/examples": 4.0,
            "data/tokens": 10.0,
        } | self.metrics.get(done, {})
        return state.replace(step=np.int32(done)), {k: jnp.float32(v) for k, v in values.items()}

    def run(self, num_steps, periods, sharding, progress=lambda done: None):
        def log(done, scalars):
            self.calls.append(("log", done))
            self.logged[done] = scalars

        def batches():
            for number in range(int(self.state.step), NEVER):
                yield {"number": np.asarray([number])}, f"after {number + 1}"

        self.state = loop.train(
            self.state,
            None,
            train_step=self.train_step,
            batches=batches(),
            batch_sharding=sharding,
            num_steps=num_steps,
            periods=periods,
            log=log,
            evaluate=self.evaluate,
            save=self.save,
            stop=self.stop,
            progress=progress,
        )

    def evaluate(self, done, state):
        self.note("evaluate", done, state)
        self.in_evaluation(done)
        self.stop.leave_evaluation()

    def save(self, state, position):
        assert position == f"after {int(state.step)}"
        self.note("save", int(state.step), state)

    def note(self, name, done, state):
        assert int(state.step) == done
        self.calls.append((name, done))

    def at(self, name):
        return [done for called, done in self.calls if called == name]


@pytest.fixture(scope="module")
def one_device():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_logs_evaluations_and_saves_come_at_their_steps_and_at_the_last(one_device):
    run = Recorder()
    seen = []
    run.run(11, Periods(log=3, evaluate=4, checkpoint=5), one_device, seen.append)
    assert seen == list(range(1, 12))
    assert run.at("evaluate") == [4, 8, 11]
    assert run.at("save") == [5, 10, 11]
    # The first step, every third, and wherever the metrics had to be read anyway.
    assert run.at("log") == [1, 3, 4, 5, 6, 8, 9, 10, 11]
    # At one step: log, then evaluate, then save.
    assert run.calls[-3:] == [("log", 11), ("evaluate", 11), ("save", 11)]
    # Means since the last log, and the last learning rate.
    assert run.logged[8]["loss"] == 7.5
    assert run.logged[8]["learning_rate/policy"] == pytest.approx(0.8)
    assert "speed/steps_per_second" not in run.logged[1]
    assert run.logged[8]["speed/steps_per_second"] > 0


def test_a_resumed_run_counts_on_and_a_complete_one_does_nothing(one_device):
    run = Recorder(start=6)
    run.run(9, Periods(log=NEVER, evaluate=NEVER, checkpoint=8), one_device)
    assert run.calls == [
        ("log", 7),
        ("log", 8),
        ("save", 8),
        ("log", 9),
        ("evaluate", 9),
        ("save", 9),
    ]
    run.calls.clear()
    run.run(9, Periods(), one_device)
    assert run.calls == []
    assert int(run.state.step) == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_current_step_with_a_save(number, one_device):
    run = Recorder()
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(done):
        if done == 5:
            os.kill(os.getpid(), number)

    with run.stop.listening():
        run.run(100, Periods(log=NEVER, evaluate=NEVER, checkpoint=NEVER), one_device, interrupt)
    assert run.stop.signal is number
    assert int(run.state.step) == 5
    assert run.calls == [("log", 1), ("log", 5), ("save", 5)]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("shared", [False, True])
def test_a_request_in_an_evaluation_leaves_it_and_saves(shared, one_device, monkeypatch):
    run = Recorder()
    monkeypatch.setattr(run.stop, "_shared", shared)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 6)
    run.in_evaluation = lambda done: setattr(run.stop, "signal", signal.SIGTERM)
    run.run(100, Periods(log=NEVER, evaluate=4, checkpoint=NEVER), one_device)
    # One of several processes goes on until all stop.
    assert int(run.state.step) == (6 if shared else 4)
    assert run.at("save") == [6 if shared else 4]


def test_a_second_ctrl_c_is_not_caught_and_the_handlers_come_back(one_device):
    run = Recorder()
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def interrupt_twice(done):
        if done == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)  # interrupted by the handler

    def impatient():
        with run.stop.listening():
            run.run(100, Periods(log=NEVER), one_device, interrupt_twice)

    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert run.at("save") == []
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("name", ["loss", "loss/value", "grad_norm/policy"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_loss_or_gradient_names_its_step_and_is_never_saved(name, value, one_device):
    run = Recorder(metrics={6: {name: value}, 7: {"loss": np.nan}})
    with pytest.raises(DivergenceError, match=rf"^{name} is {value} at step 6: stopped"):
        run.run(100, Periods(log=5, evaluate=8, checkpoint=4), one_device)
    assert run.calls == [("log", 1), ("log", 4), ("save", 4), ("log", 5)]


def test_a_step_that_is_due_to_be_saved_is_not_saved_when_it_diverges(one_device):
    run = Recorder(metrics={4: {"grad_norm/policy": np.nan}})
    with pytest.raises(DivergenceError, match="at step 4"):
        run.run(100, Periods(log=NEVER, evaluate=2, checkpoint=2), one_device)
    assert run.at("save") == [2]
    assert run.at("evaluate") == [2]


def test_other_metrics_may_be_anything(one_device):
    run = Recorder(metrics={2: {"kl/other": np.nan}})
    run.run(3, Periods(log=1), one_device)
    assert run.at("save") == [3]


def test_a_summary_has_means_the_last_rate_and_the_speed_of_the_timed_steps():
    steps = [
        {"loss": 1.0, "learning_rate/value": 0.1, "data/examples": 8.0, "data/tokens": 100.0},
        {"loss": 3.0, "learning_rate/value": 0.2, "data/examples": 4.0, "data/tokens": 60.0},
        {"loss": 8.0, "learning_rate/value": 0.3, "data/examples": 6.0, "data/tokens": 20.0},
    ]
    steps = [{name: np.float32(value) for name, value in step.items()} for step in steps]
    summary = loop.summarise(steps, steps[1:], 0.5)
    assert summary == {
        "loss": 4.0,
        "learning_rate/value": pytest.approx(0.3),
        "data/examples": 6.0,
        "data/tokens": 60.0,
        "speed/examples_per_second": 20.0,
        "speed/tokens_per_second": 160.0,
        "speed/steps_per_second": 4.0,
    }
    assert {type(value) for value in summary.values()} == {float}
    alone = loop.summarise(steps[:1], [], 0.0)
    assert not any(name.startswith("speed") for name in alone)


@pytest.fixture
def real_run(bench, make_batch, tmp_path):
    """A function that trains DRO-V into a folder, from its newest checkpoint if it has one."""
    one = bench()

    def run(name, *, stop_at=None, poison=None, num_steps=9, checkpoint=4):
        folder = tmp_path / name
        state = checkpoints.restore_latest(folder, one.layout.abstract(), META) or one.state()
        start, stop, copies = int(state.step), StopRequest(), {}

        def batches():
            for number in range(start, NEVER):
                batch = make_batch(number)
                if number + 1 == poison:
                    batch["rewards"][3] = np.inf
                yield batch, number + 1

        def progress(done):
            if done == stop_at:
                stop.signal = signal.SIGTERM

        manager = checkpoints.open_manager(folder, keep_last=9, keep_every=None)

        def save(state, position):
            assert position == int(state.step)
            copies[int(state.step)] = jax.tree.map(lambda x: np.array(x, copy=True), state)
            checkpoints.save(manager, state, META)

        try:
            state = loop.train(
                state,
                one.reference,
                train_step=one.train_step,
                batches=batches(),
                batch_sharding=one.to_devices(make_batch(0))["rewards"].sharding,
                num_steps=num_steps,
                periods=Periods(log=2, evaluate=NEVER, checkpoint=checkpoint),
                log=lambda done, scalars: None,
                evaluate=lambda done, state: None,
                save=save,
                stop=stop,
                progress=progress,
            )
        finally:
            manager.close()
        return SimpleNamespace(folder=folder, state=state, copies=copies)

    return run


def assert_identical(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_train_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(real_run):
    whole = real_run("whole")
    stopped = real_run("parts", stop_at=5)
    assert int(stopped.state.step) == 5
    resumed = real_run("parts")
    assert int(resumed.state.step) == int(whole.state.step) == 9
    assert_identical(resumed.state, whole.state)
    assert checkpoints.steps(resumed.folder) == [4, 5, 8, 9]
    assert checkpoints.steps(whole.folder) == [4, 8, 9]


def test_checkpoints_hold_their_own_step_though_training_goes_on_while_they_are_written(
    real_run, bench
):
    run = real_run("busy", num_steps=12, checkpoint=1)
    assert checkpoints.steps(run.folder)[-1] == 12
    abstract = bench().layout.abstract()
    for step in checkpoints.steps(run.folder):
        policy = checkpoints.restore_policy(run.folder, step, abstract.policy, META)
        assert_identical(policy, run.copies[step].policy)


def test_a_reward_that_is_infinite_stops_the_run_and_leaves_the_checkpoint_before_it(
    real_run, bench
):
    with pytest.raises(DivergenceError, match="at step 7: stopped"):
        real_run("poisoned", poison=7)
    whole = real_run("whole", num_steps=4)
    folder = whole.folder.parent / "poisoned"
    assert checkpoints.steps(folder) == [4]
    state = checkpoints.restore_latest(folder, bench().layout.abstract(), META)
    assert_identical(state, whole.state)
    assert sys.exc_info() == (None, None, None)
