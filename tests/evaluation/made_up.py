"""A report about nothing, for tests of what is done with one."""

import numpy as np

from dro_jax.evaluation.judges import Verdict
from dro_jax.evaluation.report import Curve, Policy, Report, Setting, make_report

HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
"""Text that a careless page would run."""

WORDS = ["a", "sorted", "list", "of", "letters", "in", "order", "because", "then", "colour", "red"]

SETTING = Setting(
    judge="reward:rewards:order",
    prompts_file="prompts.txt",
    sampling="sampled at temperature 1, at most 24 tokens, seeds from 0",
    samples_policy=True,
    reference="runs/sft",
    no_reference="",
    seed=0,
    folds=5,
    fold_size=1000,
    date="2026-11-21 12:00 UTC",
    version="0.1.0",
)


def made_up(prompts: int = 231, names: tuple[str, ...] = ("sft", "dro_v", "kto")) -> Report:
    """The first policy is the reference; each later one is better, longer and further away."""
    rng = np.random.default_rng(0)
    texts = [f"ann: {' '.join(rng.permutation(list('abcd')))} ({k})" for k in range(prompts)]
    texts[1] = HOSTILE
    policies = []
    for k, name in enumerate(names):
        answers = [" ".join(rng.choice(WORDS, rng.integers(2, 20 + 25 * k))) for _ in texts]
        answers[:2] = [f"{HOSTILE} {name}", ""]
        steps = list(range(1, 501, 50))
        curves = {
            "train loss/dro": Curve(steps, list(np.exp(-np.arange(10) / 4) + 0.4)),
            "held out loss/dro": Curve(steps[::5], [1.2, 0.6]),
            "held out loss/constant": Curve(steps[::5], [1.3, 1.3]),
            "held out kl/log_ratio_mean": Curve(steps[::5], [0.0, 0.1 * k]),
            "held out side_by_side/win_rate": Curve(steps[::5], [0.5, 0.5 + 0.1 * k]),
        }
        policies.append(
            Policy(
                name=name,
                source=f"runs/{name}",
                answers=answers,
                log_ratios=rng.normal(0.2 * k, float(k > 0), prompts),
                cut=k,
                is_reference=k == 0,
                curves=curves if k else {},
            )
        )
    verdicts = {}
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            drawn = rng.choice(4, prompts, p=[0.28, 0.15, 0.52, 0.05])
            verdicts[i, j] = [
                Verdict(
                    ("A", "tie", "B", None)[c],
                    f"because {HOSTILE}",
                    None if c == 3 else bool(c == 1 and rng.random() < 0.4),
                )
                for c in drawn
            ]
    return make_report(SETTING, texts, policies, verdicts)
