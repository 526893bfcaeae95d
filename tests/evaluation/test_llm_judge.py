"""The judge over HTTP, against a real server that delays, errors, limits and babbles."""

import asyncio
import email.utils
import itertools
import logging
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import traceback

import pytest
from judge_server import Request, prefer_longer, serving

from dro_jax.errors import UsageError
from dro_jax.evaluation import chat_completions, llm_judge
from dro_jax.evaluation.chat_completions import Endpoint, JudgeUnavailableError
from dro_jax.evaluation.judges import Comparison
from dro_jax.evaluation.llm_judge import (
    TEMPLATE,
    LlmJudge,
    check_template,
    parse_verdict,
    render,
)

# anyio does so with a connection that is called off before it begins.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'connect_tcp.*was never awaited")

KEY = "sk-planted-Zq7vL0tM9xKe"


@pytest.fixture
def make_judge(tmp_path):
    """A judge of a server, quick to try again."""

    def make(server, model="judge-1", key=KEY, **settings):
        base_url = server if isinstance(server, str) else server.base_url
        defaults = {"cache": tmp_path / "replies.sqlite", "first_delay": 0.01, "timeout": 20.0}
        return LlmJudge(Endpoint(base_url, model, key), **(defaults | settings))

    return make


def comparisons(count):
    """Every third pair is won by A, by B, and equally long."""
    pairs = [("longer one", "short"), ("short", "longer one"), ("same", "size")]
    return [
        Comparison(f"Prompt {i}?", f"{a} {i}", f"{b} {i}")
        for i, (a, b) in zip(range(count), itertools.cycle(pairs), strict=False)
    ]


def winners(verdicts):
    return [verdict.winner for verdict in verdicts]


EXPECTED = ["A", "B", "tie"]


# What is asked, and in which order it comes back.


def test_verdicts_come_in_the_order_of_the_comparisons(make_judge):
    def slowly(request):
        time.sleep(random.uniform(0, 0.05))
        prefer_longer(request)

    with serving(slowly) as server:
        verdicts = list(make_judge(server)(comparisons(30)))
    assert winners(verdicts) == EXPECTED * 10
    assert [verdict.flipped for verdict in verdicts] == [False] * 30
    assert verdicts[3].reason == "longer one 3 and short 3.\nVerdict: A"


def test_both_orders_are_asked_as_the_endpoint_expects_it(make_judge):
    with serving(prefer_longer) as server:
        list(make_judge(server)([Comparison("Why?", "left one", "right")]))
    assert sorted(r.answers for r in server.requests) == [
        ("left one", "right"),
        ("right", "left one"),
    ]
    for request in server.requests:
        assert request.path == "/v1/chat/completions"
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert request.body == {
            "model": "judge-1",
            "temperature": 0,
            "messages": [{"role": "user", "content": render(TEMPLATE, "Why?", *request.answers)}],
        }
        assert "\n[Instruction]\nWhy?\n" in request.question
        assert all(word in request.question for word in ("helpful", "fulfils", "(left)", "(right)"))


def test_without_a_key_none_is_sent(make_judge):
    with serving(prefer_longer) as server:
        list(make_judge(server, key="")(comparisons(1)))
    assert all("authorization" not in request.headers for request in server.requests)


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_judge_with_an_eye_for_one_side_gives_only_ties(make_judge, side):
    with serving(lambda request: request.say(f"Because.\nVerdict: {side}")) as server:
        verdicts = list(make_judge(server)(comparisons(9)))
    assert [(v.winner, v.flipped) for v in verdicts] == [("tie", True)] * 9
    assert verdicts[0].reason.count("Because.") == 2


def test_a_tie_in_one_order_only_is_a_contradiction(make_judge):
    def respond(request):
        request.say("Verdict: A" if request.answers[0] == "x" else "Verdict: tie")

    with serving(respond) as server:
        (verdict,) = make_judge(server)([Comparison("p", "x", "y")])
    assert (verdict.winner, verdict.flipped) == ("tie", True)


def test_answers_that_are_the_same_are_not_asked_about(make_judge):
    with serving(prefer_longer) as server:
        verdicts = list(make_judge(server)([Comparison("p", "x", "x")]))
    assert [(v.winner, v.flipped) for v in verdicts] == [("tie", None)]
    assert not server.requests


def test_a_question_that_comes_twice_is_paid_for_once(make_judge):
    def slowly(request):
        time.sleep(0.05)
        prefer_longer(request)

    with serving(slowly) as server:
        judge = make_judge(server)
        assert winners(judge(comparisons(1) * 5)) == ["A"] * 5
    assert len(server.requests) == 2
    assert (judge.usage.requests, judge.usage.replies) == (2, 2)


def test_no_more_requests_at_a_time_than_asked_for(make_judge):
    def slowly(request):
        time.sleep(0.02)
        prefer_longer(request)

    with serving(slowly) as server:
        list(make_judge(server, concurrency=3)(comparisons(15)))
    assert server.most_at_once == 3


def test_comparisons_are_taken_as_they_are_needed(make_judge):
    taken = []
    held = threading.Event()

    def respond(request):
        if request.answers[0] == "longer one 0":
            held.wait(10)
        prefer_longer(request)

    class Watched(list):
        def __iter__(self):
            for comparison in super().__iter__():
                taken.append(comparison)
                if len(taken) == 2 * llm_judge.AHEAD:
                    # The first is not answered before this many are under way.
                    held.set()
                yield comparison

    with serving(respond) as server:
        verdicts = make_judge(server, concurrency=2)(Watched(comparisons(60)))
        assert next(verdicts).winner == "A"
        assert len(taken) == 2 * llm_judge.AHEAD
        assert winners(verdicts) == (EXPECTED * 20)[1:]


def test_it_works_inside_a_program_that_has_an_event_loop(make_judge):
    async def notebook():
        return winners(make_judge(server)(comparisons(3)))

    with serving(prefer_longer) as server:
        assert asyncio.run(notebook()) == EXPECTED


# Replies.


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: A", "A"),
        ("A is vague, B is exact.\n\nVerdict: B\n\n", "B"),
        ("So:\n**Verdict: A**", "A"),
        ("### Verdict: **B**.", "B"),
        ("Verdict: [[A]]", "A"),
        ("verdict : B", "B"),
        ("VERDICT:A", "A"),
        ("Both are good.\nVerdict: Tie.", "tie"),
        ("Verdict: B\nOn the whole:\nVerdict: B", "B"),
        ("", None),
        ("A", None),
        ("B.", None),
        ("A is better than B", None),
        ("Verdict: A\nor perhaps not", None),
        ("Verdict: A\nVerdict: B", None),
        ("Verdict: tie\n\nVerdict: B", None),
        ("The verdict: A", None),
        ("Verdict: A or B", None),
        ("Verdict: A is better", None),
        ("Verdict: a", None),
        ("Verdict: C", None),
        ("Verdict:", None),
        ("Verdict: AB", None),
        ("Verdict A", None),
        ('{"verdict": "A"}', None),
        ("Write Verdict: A", None),
    ],
)
def test_only_a_last_line_that_is_a_verdict_is_one(reply, verdict):
    assert parse_verdict(reply) == verdict


def test_a_babbling_judge_is_reminded_once_and_then_counted(make_judge):
    with serving(lambda request: request.say("A. Hm, A it is!")) as server:
        judge = make_judge(server)
        verdicts = list(judge(comparisons(3)))
        assert [(v.winner, v.flipped, v.unanswered) for v in verdicts] == [(None, None, False)] * 3
        assert verdicts[0].reason == "no verdict in the reply: A. Hm, A it is!"
        assert sorted(r.reminded for r in server.requests) == [False] * 6 + [True] * 6
        # They were paid for all the same.
        again = make_judge(server)
        assert winners(again(comparisons(3))) == [None] * 3
        assert (len(server.requests), again.usage.requests, again.usage.cached) == (12, 0, 12)


def test_who_minds_the_reminder_has_a_verdict(make_judge):
    def respond(request):
        if request.reminded:
            prefer_longer(request)
        else:
            request.say("I like the first.")

    with serving(respond) as server:
        assert winners(make_judge(server)(comparisons(3))) == EXPECTED
    assert len(server.requests) == 12


@pytest.mark.parametrize("side", [0, 1], ids=["first order", "second order"])
def test_one_order_alone_is_no_verdict(make_judge, side):
    def respond(request):
        if request.answers[side].startswith("longer"):
            request.say("no")
        else:
            prefer_longer(request)

    with serving(respond) as server:
        assert winners(make_judge(server)(comparisons(2))) == [None, None]


@pytest.mark.parametrize("content", [None, "", [{"type": "text", "text": "Verdict: A"}], 3])
def test_a_completion_that_says_nothing_is_asked_for_again(make_judge, content):
    silent = True

    def respond(request):
        if silent:
            request.say(content)
        else:
            prefer_longer(request)

    with serving(respond) as server:
        (verdict,) = make_judge(server)(comparisons(1))
        assert (verdict.winner, verdict.unanswered) == (None, True)
        assert verdict.reason == "the reply is empty"
        assert len(server.requests) == 4
        # A filter or a limit may be gone the next time.
        silent = False
        assert winners(make_judge(server)(comparisons(1))) == ["A"]
        assert len(server.requests) == 6


def test_text_that_is_no_unicode_can_be_kept(make_judge):
    with serving(lambda request: request.say("half \ud800\nVerdict: A")) as server:
        (verdict,) = make_judge(server)([Comparison("\ud83d", "x", "y")])
    assert verdict.reason.startswith("half ?\n")


# Faults.


def not_json(request):
    request.send(200, b"<html>busy</html>")


COMPLETION = {"choices": [{"message": {"content": "Verdict: A"}}]}
FAULTS = {
    "500": lambda request: request.send(500, {"error": {"message": "oops"}}),
    "503 with Retry-After": lambda request: request.send(503, b"", Retry_After="0"),
    "408": lambda request: request.send(408, b""),
    "reset": Request.reset,
    "half a body": Request.send_half,
    "not JSON": not_json,
    "not UTF-8": lambda request: request.send(200, b'{"choices": "\xff"}'),
    "nested": lambda request: request.send(200, b"[" * 100_000),
    "a list": lambda request: request.send(200, []),
    "no choices": lambda request: request.send(200, {"choices": []}),
    "no message": lambda request: request.send(200, {"choices": [{"text": "Verdict: A"}]}),
    "message is text": lambda request: request.send(200, {"choices": [{"message": "Verdict: A"}]}),
    "huge": lambda request: request.send(200, COMPLETION | {"padding": "-" * 3_000_000}),
    "drip": lambda request: request.drip(1.0),
    "silence": lambda request: time.sleep(0.6),
    "no HTTP": lambda request: request.handler.wfile.write(b"hello there\r\n\r\n"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_tried_again(make_judge, fault, caplog):
    failed = {}

    def respond(request):
        failed[request.question] = failed.get(request.question, 0) + 1
        if failed[request.question] <= 2:
            FAULTS[fault](request)
        else:
            prefer_longer(request)

    with serving(respond) as server:
        judge = make_judge(server, timeout=0.3 if fault in ("drip", "silence") else 20.0)
        assert winners(judge(comparisons(2))) == ["A", "B"]
    assert set(failed.values()) == {3}
    assert (judge.usage.requests, judge.usage.replies) == (12, 4)
    # Said once, and not for each request.
    assert 1 <= len(caplog.messages) <= 2
    assert all(m.startswith(server.base_url) for m in caplog.messages)


def test_the_time_between_tries_doubles(make_judge):
    def respond(request):
        request.send(500, b"") if request.number < 3 else request.say("Verdict: tie")

    # Both orders of this are one question.
    template, one = "{instruction} {response_a}{response_b} Verdict:", Comparison("p", "x", "xx")
    with serving(respond) as server:
        list(make_judge(server, template=template, first_delay=0.1)([one]))
    times = [request.arrived for request in server.requests]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(gaps) == 3
    for gap, longest in zip(gaps, [0.1, 0.2, 0.4], strict=True):
        assert longest / 2 <= gap < longest + 0.1


@pytest.mark.parametrize("fault", ["500", "reset"])
def test_a_question_that_is_never_answered_is_given_up_and_the_others_judged(make_judge, fault):
    broken = True

    def respond(request):
        if "Prompt 3?" in request.question and broken:
            FAULTS[fault](request)
        else:
            prefer_longer(request)

    with serving(respond) as server:
        judge = make_judge(server, tries=3)
        verdicts = list(judge(comparisons(9)))
        assert winners(verdicts) == [*EXPECTED, None, *EXPECTED[1:], *EXPECTED]
        assert verdicts[3].reason.startswith("given up: ")
        assert [v.unanswered for v in verdicts] == [k == 3 for k in range(9)]
        assert fault != "500" or verdicts[3].reason == "given up: the server answered 500"
        # In one order; the other may not have come so far.
        assert 3 <= sum("Prompt 3?" in question for question in server.questions) <= 6
        # Again the same, though there is nothing else to ask now.
        assert list(make_judge(server, tries=3)(comparisons(9))) == verdicts
        # Nothing was paid for it, so that it is asked again.
        broken = False
        before = len(server.requests)
        assert winners(make_judge(server)(comparisons(9))) == EXPECTED * 3
        again = server.questions[before:]
        assert len(set(again)) == 2
        assert all("Prompt 3?" in question for question in again)


def test_questions_given_up_here_and_there_end_nothing(make_judge):
    def respond(request):
        if int(request.question.partition("?")[0].rpartition(" ")[2]) % 5 == 1:
            request.send(500, b"")
        else:
            prefer_longer(request)

    with serving(respond) as server:
        verdicts = list(make_judge(server, tries=1)(comparisons(60)))
    expected = [None if i % 5 == 1 else winner for i, winner in enumerate(EXPECTED * 20)]
    assert winners(verdicts) == expected
    assert sum(winner is None for winner in expected) * 2 > chat_completions.GIVEN_UP_IN_A_ROW


def nobody():
    """An address where nothing listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}/v1"


def test_an_endpoint_that_is_not_there(make_judge):
    url = nobody()
    judge = make_judge(url, tries=3)
    with pytest.raises(JudgeUnavailableError) as raised:
        next(judge(comparisons(20)))
    message = str(raised.value)
    assert message.startswith(f"{url}/chat/completions: ")
    assert "3 times; check OPENAI_BASE_URL" in message
    assert len(message.splitlines()) == 1
    # Of 120 that there might be: eight at a time, and those that begin while it ends.
    assert 3 <= judge.usage.requests <= 3 * 20


def test_an_endpoint_that_is_no_longer_there_ends_the_evaluation(make_judge):
    with serving(prefer_longer) as server:
        list(make_judge(server)(comparisons(3)))
    verdicts = make_judge(server, tries=2)(comparisons(4))
    assert [next(verdicts).winner for _ in range(3)] == EXPECTED
    with pytest.raises(JudgeUnavailableError, match="2 times"):
        next(verdicts)


def test_an_endpoint_that_never_answers_well(make_judge):
    with (
        serving(not_json) as server,
        pytest.raises(JudgeUnavailableError, match="a response that is no chat completion"),
    ):
        list(make_judge(server, tries=2)(comparisons(1)))
    assert len(server.requests) <= 4


def test_an_endpoint_that_is_out_of_order_ends_the_evaluation(make_judge):
    def respond(request):
        if request.number < 10:
            prefer_longer(request)
        else:
            request.send(502, b"")

    with serving(respond) as server:
        verdicts = make_judge(server, tries=2)(comparisons(100))
        with pytest.raises(JudgeUnavailableError, match=r"the server answered 502, 2 times"):
            list(verdicts)
        assert len(server.requests) <= 10 + 2 * (chat_completions.GIVEN_UP_IN_A_ROW + 8)


# Rate limits.


@pytest.mark.parametrize("form", ["seconds", "date", "date of another clock"])
def test_retry_after_is_honoured(make_judge, form):
    limited = None

    def respond(request):
        nonlocal limited
        if limited is None:
            limited = time.monotonic()
            now = time.time() + (86_400 if form == "date of another clock" else 0)
            headers = {"Retry_After": "1"}
            if form != "seconds":
                # A date has whole seconds: at least one, at most two from now.
                now = int(now)
                headers = {"Retry_After": email.utils.formatdate(now + 1, usegmt=True)}
                headers["Date"] = email.utils.formatdate(now, usegmt=True)
            request.send(429, {"error": {"message": "slow down"}}, **headers)
        else:
            prefer_longer(request)

    with serving(respond) as server:
        assert winners(make_judge(server, concurrency=1)(comparisons(2))) == ["A", "B"]
    first, *later = [request.arrived - limited for request in server.requests]
    assert first <= 0
    assert len(later) == 4
    assert 0.99 <= min(later) < 1.5


def test_a_limit_holds_for_all_questions(make_judge):
    limited = []

    def respond(request):
        if request.number == 4:
            limited.append(time.monotonic())
            request.send(429, b"", Retry_After="1")
        else:
            prefer_longer(request)
            time.sleep(0.01)

    with serving(respond) as server:
        assert winners(make_judge(server, concurrency=4)(comparisons(12))) == EXPECTED * 4
    assert len(server.requests) == 25
    # But for those that were on their way.
    early = [r for r in server.requests if limited[0] < r.arrived < limited[0] + 0.99]
    assert len(early) <= 3


def test_an_endpoint_that_takes_one_at_a_time_is_waited_for(make_judge):
    """However often a question comes too early, it is not given up."""
    busy = threading.Lock()

    def respond(request):
        if busy.acquire(blocking=False):
            time.sleep(0.01)
            prefer_longer(request)
            busy.release()
        else:
            request.send(429, b"")

    with serving(respond) as server:
        judge = make_judge(server, tries=2)
        assert winners(judge(comparisons(12))) == EXPECTED * 4
    assert judge.usage.requests == len(server.requests) > 24


@pytest.mark.parametrize(
    "retry_after",
    ["0", "", "soon", "-5", "1e9999", "nan", "Thu, 01 Jan 1970 00:00:00 GMT", "Thu, 99 Foo"],
)
def test_no_intelligible_wait_is_a_short_one(make_judge, retry_after):
    def respond(request):
        if request.number < 3:
            request.send(429, b"", Retry_After=retry_after)
        else:
            prefer_longer(request)

    with serving(respond) as server:
        started = time.monotonic()
        assert winners(make_judge(server, concurrency=1)(comparisons(1))) == ["A"]
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("retry_after", ["3600", "Fri, 31 Dec 2999 23:59:59 GMT"])
def test_who_asks_for_too_long_a_wait_is_not_waited_for(make_judge, status, retry_after):
    with (
        serving(lambda request: request.send(status, b"", Retry_After=retry_after)) as server,
        pytest.raises(JudgeUnavailableError, match="asks to wait for longer than 600 s"),
    ):
        list(make_judge(server)(comparisons(3)))


def test_limits_without_end_end(make_judge):
    with serving(lambda request: request.send(429, b"", Retry_After="0")) as server:
        judge = make_judge(server, patience=0.2, concurrency=2)
        with pytest.raises(JudgeUnavailableError, match=r"too many requests \(429\)"):
            list(judge(comparisons(3)))
    # The pauses grow, though the server asks for none: 0.005 and 0.01 and 0.02 and so on.
    assert len(server.requests) <= 6 * 6


# What no retry helps against.


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, {"error": {"message": "bad temperature"}}, "refuses the request (400: bad temp"),
        (401, {"error": "no"}, "does not accept the key (401); check OPENAI_API_KEY"),
        (403, {"detail": "not yours"}, "refuses the request (403: {"),
        (
            404,
            b"<html>\n\x1b[31mnothing\nhere",
            "refuses the request (404: <html> [31mnothing here)",
        ),
        (404, b"", "refuses the request (404); check that OPENAI_BASE_URL ends"),
        (422, [1], "refuses the request (422: [1])"),
        (301, b"", "refuses the request (301); check OPENAI_BASE_URL"),
        (429, {"error": {"code": "insufficient_quota"}}, "the account has no money left"),
    ],
)
def test_a_refusal_ends_the_evaluation_at_once(make_judge, status, body, message):
    with (
        serving(lambda request: request.send(status, body, Location="/elsewhere")) as server,
        pytest.raises(UsageError) as raised,
    ):
        list(make_judge(server, concurrency=2)(comparisons(20)))
    text = str(raised.value)
    assert text.startswith(f"{server.base_url}/chat/completions: ")
    assert message in text
    assert text.isprintable()
    # Two, a question that nobody has a reason to refuse, and what begins while it ends: not 40.
    assert len(server.requests) <= 8


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("place", [0, 5], ids=["the first", "a later one"])
def test_a_question_that_is_refused_alone_ends_nothing(make_judge, status, place, caplog):
    def respond(request):
        if f"Prompt {place}?" in request.question:
            request.send(status, {"error": {"message": "context of 5000 tokens"}})
        else:
            prefer_longer(request)

    with serving(respond) as server:
        verdicts = list(make_judge(server, concurrency=1)(comparisons(9)))
        expected = [None if k == place else winner for k, winner in enumerate(EXPECTED * 3)]
        assert winners(verdicts) == expected
        assert [v.unanswered for v in verdicts] == [k == place for k in range(9)]
        assert verdicts[place].reason == f"given up: refused ({status}: context of 5000 tokens)"
        (told,) = caplog.messages
        assert told.endswith(
            f": refuses a question ({status}: context of 5000 tokens); going on without its reply"
        )
        # And so it is again, for the price of a refusal.
        before = len(server.requests)
        assert list(make_judge(server)(comparisons(9))) == verdicts
        assert {f"Prompt {place}?" in q for q in server.questions[before:]} == {True}


def test_many_refused_questions_in_a_row_end_nothing(make_judge):
    def respond(request):
        if int(request.question.partition("?")[0].rpartition(" ")[2]) >= 2:
            request.send(400, {"error": {"message": "too long"}})
        else:
            prefer_longer(request)

    with serving(respond) as server:
        verdicts = list(make_judge(server)(comparisons(40)))
    assert winners(verdicts) == ["A", "B"] + [None] * 38


def test_a_server_that_asks_for_a_key(make_judge):
    with (
        serving(lambda request: request.send(401, b"")) as server,
        pytest.raises(UsageError, match=r"asks for a key \(401\); set OPENAI_API_KEY$"),
    ):
        list(make_judge(server, key="")(comparisons(1)))


def test_a_refusal_is_told_though_others_wait(make_judge):
    def respond(request):
        if "Prompt 0?" in request.question:
            request.send(500, b"")
        elif "Prompt 5?" in request.question:
            request.send(403, b"")
        else:
            prefer_longer(request)

    with serving(respond) as server:
        started = time.monotonic()
        with pytest.raises(UsageError, match="403"):
            list(make_judge(server, first_delay=60.0)(comparisons(9)))
    assert time.monotonic() - started < 5


# The key.


def test_the_key_is_nowhere_but_in_the_request(make_judge, tmp_path, caplog, capfd):
    """Though the server repeats it wherever it can."""
    caplog.set_level(logging.DEBUG)

    def respond(request):
        assert request.headers["authorization"] == f"Bearer {KEY}"
        if "Prompt 1?" in request.question:
            request.send(403, {"error": {"message": f"{'x' * 185} {KEY} may not"}})
        elif request.number < 2:
            request.send(500, {"error": {"message": KEY}})
        else:
            request.say(f"Your key is {KEY}.\nVerdict: A")

    with serving(respond) as server:
        judge = make_judge(server, concurrency=1)
        (verdict,) = judge(comparisons(1))
        try:
            list(judge(comparisons(2)))
            raise AssertionError
        except UsageError:
            told = traceback.format_exc()
    assert "[key]" in told
    assert "Your key is [key]." in verdict.reason
    out, err = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"Your key is [key]." in written
    logged = "\n".join(str(vars(record)) for record in caplog.records)
    assert "HTTP Request" in logged
    for text in (told, verdict.reason, out, err, logged, repr(judge), str(vars(judge))):
        # Nor a part of it, as a message that is cut would have.
        assert KEY[:6] not in text
    assert KEY[:6].encode() not in written


def test_a_key_that_stands_for_none_is_an_ordinary_word(make_judge):
    with serving(lambda request: request.say("A is none too good.\nVerdict: B")) as server:
        (verdict,) = make_judge(server, key="A")(comparisons(1))
    assert verdict.reason.startswith("A is none too good.\nVerdict: B")


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY} ", f"{KEY}\u00e9", f"{KEY}\0", f'"{KEY}"'])
def test_a_key_that_cannot_be_sent_is_not_shown(make_judge, key):
    with pytest.raises(UsageError) as raised:
        make_judge("http://127.0.0.1:1/v1", key=key)
    assert "OPENAI_API_KEY" in str(raised.value)
    assert KEY[:6] not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000/v1",
        "ftp://host/v1",
        "https://",
        "https://host/v1?key=1",
        "https://host/v1#a",
        "https://ho st/v1",
        "https://host:port/v1",
        "https://[host/v1",
        f"https://user:{KEY}@host/v1",
        KEY,
    ],
)
def test_an_address_that_is_none(make_judge, url):
    with pytest.raises(UsageError) as raised:
        make_judge(url)
    assert str(raised.value).startswith("OPENAI_BASE_URL ")
    assert KEY[:6] not in str(raised.value)


# The cache.


def test_an_evaluation_that_is_repeated_costs_nothing(make_judge):
    with serving(prefer_longer) as server:
        first = list(make_judge(server)(comparisons(6)))
        judge = make_judge(server, key="another")
        assert list(judge(comparisons(6))) == first
        assert len(server.requests) == 12
        assert (judge.usage.requests, judge.usage.replies, judge.usage.cached) == (0, 0, 12)


@pytest.mark.parametrize("changed", ["model", "template", "address", "prompt", "answer"])
def test_what_matters_is_asked_anew(make_judge, changed):
    one = Comparison("p", "x", "yy")
    with serving(prefer_longer) as server:
        list(make_judge(server)([one]))
        if changed == "model":
            list(make_judge(server, model="judge-2")([one]))
        elif changed == "template":
            list(make_judge(server, template=f"Well. {TEMPLATE}")([one]))
        elif changed == "address":
            list(make_judge(server.base_url.replace("127.0.0.1", "localhost"))([one]))
        elif changed == "prompt":
            list(make_judge(server)([Comparison("q", "x", "yy")]))
        else:
            list(make_judge(server)([Comparison("p", "x", "yyy")]))
        assert len(server.requests) == 4


def test_exchanged_answers_are_the_same_questions(make_judge):
    with serving(prefer_longer) as server:
        assert winners(make_judge(server)([Comparison("p", "x", "yy")])) == ["B"]
        assert winners(make_judge(server)([Comparison("p", "yy", "x")])) == ["A"]
        assert len(server.requests) == 2


# Where the tests run in the background, Ctrl-C is ignored, and so it would be by their children.
HEED_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
PROGRAM = """
import os, sys
from dro_jax.evaluation.judges import Comparison
from dro_jax.evaluation.chat_completions import Endpoint
from dro_jax.evaluation.llm_judge import LlmJudge

url, cache, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
endpoint = Endpoint(url, "judge-1", os.environ["OPENAI_API_KEY"])
judge = LlmJudge(endpoint, cache, concurrency=4, first_delay=0.01)
comparisons = [Comparison(f"Prompt {i}?", "longer one", "short") for i in range(count)]
try:
    for verdict in judge(comparisons):
        print(verdict.winner, flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start(server, cache, count, program=PROGRAM):
    arguments = [
        sys.executable,
        "-c",
        HEED_CTRL_C + program,
        server.base_url,
        str(cache),
        str(count),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"OPENAI_API_KEY": KEY}
    return subprocess.Popen(arguments, text=True, env=environment, **pipes)


def kept_replies(cache):
    if not cache.exists():
        return 0
    with sqlite3.connect(cache, timeout=10) as database:
        try:
            (count,) = database.execute("SELECT count(*) FROM replies").fetchone()
        except sqlite3.OperationalError:
            count = 0
    database.close()
    return count


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_what_was_answered_is_never_paid_for_again(tmp_path, how):
    answered, held = [], threading.Event()

    def respond(request):
        if request.number >= 11:
            held.wait(30)
        answered.append(request.question)
        prefer_longer(request)

    cache = tmp_path / "replies.sqlite"
    with serving(respond) as server:
        process = start(server, cache, 20)
        wait_for(lambda: kept_replies(cache) == 11 and len(server.requests) == 15)
        before = set(answered)
        assert len(before) == 11
        stopped = time.monotonic()
        process.send_signal(how)
        _, err = process.communicate(timeout=10)
        assert time.monotonic() - stopped < 3
        assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
        assert err == ""
        held.set()
        asked_before = len(server.requests)

        finished = start(server, cache, 20)
        out, err = finished.communicate(timeout=60)
        assert (finished.returncode, err) == (0, "")
        assert out.split() == ["A"] * 20
        asked = server.questions[asked_before:]
    assert len(asked) == len(set(asked)) == 40 - 11
    assert not before & set(asked)
    files = list(tmp_path.iterdir())
    assert files == [cache]
    assert KEY.encode() not in cache.read_bytes()


def test_two_processes_share_a_cache(tmp_path):
    def respond(request):
        time.sleep(0.005)
        prefer_longer(request)

    cache = tmp_path / "replies.sqlite"
    with serving(respond) as server:
        both = [start(server, cache, 30) for _ in range(2)]
        for process in both:
            out, err = process.communicate(timeout=60)
            assert (out.split(), err) == (["A"] * 30, "")
        assert kept_replies(cache) == 60
        before = len(server.requests)
        assert start(server, cache, 30).communicate(timeout=60) == ("A\n" * 30, "")
        assert len(server.requests) == before


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"not a database, but long enough to look at\n" * 100, lambda good: good[:5000]],
    ids=["other content", "cut off"],
)
def test_a_damaged_cache_is_one_line(make_judge, tmp_path, damage):
    cache = tmp_path / "replies.sqlite"
    with serving(prefer_longer) as server:
        list(make_judge(server)(comparisons(9)))
        cache.write_bytes(damage(cache.read_bytes()))
        with pytest.raises(UsageError) as raised:
            list(make_judge(server)(comparisons(9)))
    assert str(raised.value).startswith(f"{cache}: cannot be used to keep the judge's replies (")
    assert len(str(raised.value).splitlines()) == 1


def test_a_cache_in_no_folder(make_judge, tmp_path):
    judge = make_judge("http://127.0.0.1:1/v1", cache=tmp_path / "none" / "replies.sqlite")
    with pytest.raises(UsageError, match="unable to open database file"):
        next(judge(comparisons(1)))


def test_leaving_early_ends_everything(make_judge):
    def respond(request):
        if request.number >= 6:
            time.sleep(0.5)
        prefer_longer(request)

    with serving(respond) as server:
        verdicts = make_judge(server, concurrency=3)(comparisons(50))
        next(verdicts)
        started = time.monotonic()
        verdicts.close()
        assert time.monotonic() - started < 0.3
        seen = len(server.requests)
        assert "llm_judge" not in [thread.name for thread in threading.enumerate()]
        time.sleep(0.1)
        assert len(server.requests) <= seen + 3


def test_a_program_may_end_in_the_middle(tmp_path):
    program = PROGRAM.partition("try:")[0] + "verdicts = judge(comparisons)\nnext(verdicts)\n"
    with serving(prefer_longer) as server:
        process = start(server, tmp_path / "replies.sqlite", 100, program)
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 0


# Templates.


def test_braces_in_texts_and_templates_are_text(make_judge):
    template = (
        'As {"a": {}, { x }, %s}: {instruction}|{response_a}|{response_b}|{response_a} Verdict:'
    )
    texts = ("{response_a}", "{response_b} {0} {", "}{instruction}\\1 \\g<0>")
    assert render(template, *texts) == (
        'As {"a": {}, { x }, %s}: {response_a}|{response_b} {0} {|}{instruction}\\1 \\g<0>|'
        "{response_b} {0} { Verdict:"
    )
    with serving(lambda request: request.say("Verdict: tie")) as server:
        (verdict,) = make_judge(server)([Comparison(*texts)])
    assert (verdict.winner, verdict.flipped) == ("tie", False)
    assert texts[0] in server.questions[0]
    assert {request.answers for request in server.requests} == {texts[1:], texts[:0:-1]}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{instruction} {response_a} Verdict:",
            "lacks {response_b}; a template needs {instruction}, ",
        ),
        ("{response_a} {response_b} Verdict:", "lacks {instruction};"),
        (
            TEMPLATE + "{answer}",
            "has {answer}, which nothing fills; use {instruction}, {response_a}",
        ),
        (TEMPLATE.replace("Verdict:", "Winner:"), 'has to ask for a last line "Verdict: A"'),
    ],
)
def test_a_template_that_cannot_serve(make_judge, template, message):
    with pytest.raises(UsageError) as raised:
        check_template(template, "my.txt")
    assert str(raised.value).startswith(f"my.txt: {message}")
    with pytest.raises(UsageError, match="the judge's template: "):
        make_judge("http://127.0.0.1:1/v1", template=template)
