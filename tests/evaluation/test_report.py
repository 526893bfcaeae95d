"""The report in JSON and Markdown, and its sentences."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_up import HOSTILE, SETTING, made_up

from dro_jax.evaluation import report as reports
from dro_jax.evaluation.judges import Verdict
from dro_jax.evaluation.report import Policy, headline, make_report, notes, to_json, to_markdown


def report_of(*outcomes, lengths=(3, 3), setting=SETTING, log_ratios=None):
    """Of pairs of policies p0, p1, ... in order; each outcome is a string of A, B, t and -."""
    num = {1: 2, 3: 3}[len(outcomes)]
    prompts = [str(k) for k in range(len(outcomes[0]))]
    policies = [
        Policy(
            name=f"p{k}",
            source=f"runs/p{k}",
            answers=["x" * (lengths[k % 2])] * len(prompts),
            log_ratios=log_ratios,
        )
        for k in range(num)
    ]
    winner = {"A": "A", "B": "B", "t": "tie", "-": None}
    pairs = [(i, j) for i in range(num) for j in range(i + 1, num)]
    verdicts = {
        pair: [Verdict(winner[c]) for c in outcome]
        for pair, outcome in zip(pairs, outcomes, strict=True)
    }
    return make_report(setting, prompts, policies, verdicts)


def test_the_headline_names_the_winner_of_two():
    said = "p1 wins 77.5% (95% interval 62.5% to 87.7%) against p0."
    assert headline(report_of("B" * 31 + "A" * 9)) == said
    swapped = said.replace("p1 wins", "p0 wins").replace("against p0", "against p1")
    assert headline(report_of("A" * 31 + "B" * 9)) == swapped


def test_the_headline_says_where_nothing_is_clear():
    said = headline(report_of("B" * 21 + "A" * 19))
    assert said.startswith(
        "No clear winner: p1 wins 52.5% (95% interval 37.5% to 67.1%) against p0, "
    )
    assert said.endswith("which may well be chance (p = 0.87).")
    assert headline(report_of("--")) == "The judge gave no verdict, so nothing can be said."


def test_the_headline_of_three_names_the_best_and_its_closest_rival():
    # p0 against p1, p0 against p2, p1 against p2.
    clear = report_of("B" * 40, "B" * 30 + "A" * 10, "A" * 30 + "B" * 10)
    assert headline(clear) == (
        "p1 wins most often, 87.5% on average over the others; against the closest, p2, 75.0% "
        "(95% interval 59.8% to 85.8%)."
    )
    unclear = report_of("B" * 40, "B" * 30 + "A" * 10, "A" * 21 + "B" * 19)
    assert headline(unclear).startswith(
        "p1 wins most often, 76.2% on average over the others, but not clearly: 52.5%"
    )
    # Three pairs: what is clear alone (p = 0.04) is not after Holm's adjustment.
    hardly = report_of("B" * 27 + "A" * 13, "B" * 20 + "A" * 20, "A" * 28 + "B" * 12)
    assert hardly.pairs[0].p_value < 0.05 < hardly.pairs[0].adjusted_p_value
    assert "but not clearly: 67.5%" in headline(hardly)


def test_json_has_the_numbers_and_no_nan():
    report = made_up()
    found = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert found["win_rates"]["policies"] == ["sft", "dro_v", "kto"]
    matrix = found["win_rates"]["matrix"]
    assert matrix[0][0] is None
    assert matrix[1][0] == pytest.approx(1 - matrix[0][1])
    for pair, expected in zip(found["pairs"], report.pairs, strict=True):
        assert pair["win_rate"] == expected.win_rate
        assert pair["wins"] + pair["ties"] + pair["losses"] + pair["unjudged"] == 231
        assert len(pair["fold_rates"]) == 5
    assert (found["num_prompts"], found["num_folds"], found["prompts_per_fold"]) == (231, 5, 46)
    policy = found["policies"][2]
    ratios = report.policies[2].log_ratios
    assert policy["log_ratio"]["mean"] == pytest.approx(ratios.mean())
    assert policy["log_ratio"]["standard_error"] == pytest.approx(
        ratios.std(ddof=1) / math.sqrt(231)
    )
    assert policy["log_ratio_is_kl"] is True
    assert policy["mean_length"] == np.mean([len(answer) for answer in report.policies[2].answers])
    assert policy["curves"]["held out loss/dro"] == {"steps": [1, 251], "values": [1.2, 0.6]}
    json.dumps(to_json(report_of("--")), allow_nan=False)


def test_verdicts_count_for_the_right_policy():
    report = report_of("A" * 30 + "B" * 10, "t" * 40, "-" * 40)
    np.testing.assert_array_equal(
        report.matrix(),
        [[math.nan, 0.75, 0.5], [0.25, math.nan, math.nan], [0.5, math.nan, math.nan]],
    )
    rows = dict(zip(reports.PAIR_COLUMNS, reports.pair_rows(report)[0], strict=True))
    assert rows["pair"] == "p0 over p1"
    assert (rows["wins"], rows["ties"], rows["losses"], rows["no verdict"]) == (
        "30",
        "0",
        "10",
        "0",
    )
    other = dict(
        zip(reports.PAIR_COLUMNS, reports.pair_rows(report_of("B" * 3 + "A"))[0], strict=True)
    )
    assert (other["pair"], other["win rate"], other["wins"], other["losses"]) == (
        "p1 over p0",
        "75.0%",
        "3",
        "1",
    )
    unjudged = dict(zip(reports.PAIR_COLUMNS, reports.pair_rows(report)[2], strict=True))
    assert (unjudged["win rate"], unjudged["folds"], unjudged["no verdict"]) == ("-", "-", "40")


def columns_of(verdicts):
    report = make_report(
        dataclasses.replace(SETTING, folds=1),
        ["p"] * len(verdicts),
        [Policy(name=name, source=name, answers=["x"] * len(verdicts)) for name in ("p", "q")],
        {(0, 1): verdicts},
    )
    return report, dict(zip(reports.PAIR_COLUMNS, reports.pair_rows(report)[0], strict=True))


def test_flips_are_a_share_of_what_was_asked_in_both_orders():
    same = [Verdict("tie", "The answers are the same.")] * 6
    report, row = columns_of([Verdict("A", "", flipped=False), Verdict("tie", "", True), *same])
    assert row["flips"] == "1 (50.0%)"
    assert "Flips: " in said(report)
    # A reward is not asked twice.
    report, row = columns_of([Verdict("A", "reward 2 against 1")] * 3)
    assert row["flips"] == "-"
    assert "Flips: " not in said(report)


def test_questions_without_an_answer_are_counted_apart_from_replies_without_a_verdict():
    babble, outage = Verdict(None, "no verdict"), Verdict(None, "given up", unanswered=True)
    report, row = columns_of([babble, outage, outage, Verdict("A")])
    assert row["no verdict"] == "3 (2 not answered)"
    assert "Not answered: " in said(report)
    (pair,) = to_json(report)["pairs"]
    assert (pair["unjudged"], pair["unanswered"]) == (3, 2)
    report, row = columns_of([babble, Verdict("A")])
    assert row["no verdict"] == "1"
    assert "Not answered: " not in said(report)


def test_lengths_that_always_differ_by_as_much_have_no_control():
    report = report_of("A" * 30 + "B" * 10, lengths=(9, 3))
    row = dict(zip(reports.PAIR_COLUMNS, reports.pair_rows(report)[0], strict=True))
    assert row["length controlled"] == "-"
    assert "nothing is known about equal lengths" in said(report)
    assert "nothing is known about equal lengths" not in said(report_of("AB"))
    assert "nothing is known about equal lengths" not in said(report_of("--"))


def test_markdown_is_a_table_for_any_name():
    report = made_up(names=("a|b", "c\nd", "e"))
    lines = to_markdown(report).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    columns = {line.replace("\\|", "").count("|") for line in tables}
    assert columns == {5, 12, 7}
    assert any("a\\|b" in line for line in tables)
    assert lines[0] == "# Side by side"
    assert headline(report).replace("\n", " ") in to_markdown(report).replace("\n", " ")


def said(report):
    return " ".join(notes(report))


def test_notes_say_what_the_folds_are():
    assert "5 disjoint random folds of 46 prompts" in said(made_up())
    assert "5 folds of 1000 were asked for, and there are 231 prompts" in said(made_up())
    exact = dataclasses.replace(SETTING, folds=2, fold_size=20)
    assert "asked for" not in said(report_of("AB" * 20, setting=exact))
    assert "The folds hold" not in said(report_of("AB" * 20, setting=exact))
    assert "The folds hold 40 of the 42 prompts" in said(report_of("AB" * 21, setting=exact))


def test_a_log_ratio_is_only_called_kl_where_it_is_one():
    ratios = np.array([0.1, 0.3])
    kl = report_of("AB", log_ratios=ratios)
    assert reports.policy_columns(kl)[-1] == "KL to the reference"
    assert "an estimate without bias" in said(kl)
    greedy = dataclasses.replace(SETTING, samples_policy=False)
    ratio = report_of("AB", log_ratios=ratios, setting=greedy)
    assert reports.policy_columns(ratio)[-1] == "log-ratio to the reference (not KL)"
    assert "It is no estimate of the KL" in said(ratio)
    cut = [dataclasses.replace(policy, cut=1) for policy in kl.policies]
    assert "as far as the limit of tokens" in said(dataclasses.replace(kl, policies=cut))
    assert "as far as the limit of tokens" not in said(kl)
    assert "KL to the reference" not in to_markdown(ratio)
    none = dataclasses.replace(SETTING, reference=None, no_reference="nobody gave one")
    assert "No KL: nobody gave one." in said(report_of("AB", setting=none))
    assert reports.policy_rows(kl)[0][-1] == "0.200 ± 0.100"
    assert reports.policy_rows(report_of("AB", setting=none))[0][-1] == "-"


def test_repeated_prompts_are_said():
    report = made_up()
    repeated = make_report(SETTING, ["same"] * 231, report.policies, report.verdicts)
    assert "230 prompts repeat another" in said(repeated)
    assert "repeat another" not in said(report)


def test_the_plane_compares_with_the_reference_or_else_the_first():
    report = made_up(names=("a", "b"))
    assert reports.opponent(report) == 0
    other = [dataclasses.replace(p, is_reference=p.name == "b") for p in report.policies]
    assert reports.opponent(dataclasses.replace(report, policies=other)) == 1
    neither = [dataclasses.replace(p, is_reference=False) for p in report.policies]
    assert reports.opponent(dataclasses.replace(report, policies=neither)) == 0


def test_hostile_text_is_there_to_be_escaped():
    assert made_up().prompts[1] == HOSTILE


def test_reports_need_neither_tensorflow_nor_seqio_nor_gin():
    modules = ("side_by_side", "report", "charts", "page")
    code = f"import sys\n{';'.join(f'import dro_jax.evaluation.{name}' for name in modules)}\n"
    code += "print([m for m in ('gin', 'seqio', 'tensorflow', 'clu', 'tensorboard') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
