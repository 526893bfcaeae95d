"""Chat completions over HTTP: questions to an OpenAI-compatible endpoint, asked until they are answered, replies kept.

The key goes into the request's header and nowhere else.
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import hashlib
import json
import logging
import os
import random
import re
import sqlite3
import time
import urllib.parse
import warnings
from collections.abc import Iterator
from typing import Any

import httpx

from dro_jax.errors import UsageError

logger = logging.getLogger(__name__)

TEMPERATURE = 0
LONGEST_BODY = 1 << 20
"""Bytes of a response; what is longer is not read."""

LONGEST_DELAY = 60.0
"""Seconds to which the waiting between tries grows."""

SHORTEST_SECRET = 8
"""Characters. Shorter keys, such as "none", are for servers that do not look at them, and may be any word."""

GIVEN_UP_IN_A_ROW = 16
"""Questions without an answer, one after the other, after which the endpoint is taken to be out of order."""

OF_THE_QUESTION = (400, 413, 422)
"""Statuses with which an endpoint refuses one question, as too long or not to its taste, or else every one."""


class JudgeUnavailableError(OSError):
    """An endpoint that does not answer, or limits requests for too long; what it has answered is kept."""


class _Unanswered(Exception):
    """A request that brought no reply and may be sent again.

    Attributes:
      delay: what the server asks for, seconds; None where it does not.
      limited: it was one too many.
      gone: there was nobody to send it to.
    """

    def __init__(
        self,
        problem: str,
        delay: float | None = None,
        *,
        limited: bool = False,
        gone: bool = False,
    ) -> None:
        super().__init__(problem)
        self.delay = delay
        self.limited = limited
        self.gone = gone


class RefusedError(UsageError):
    """A request that the endpoint does not take, be it for what is asked or for how.

    Attributes:
      answer: the endpoint's, in a few words.
    """

    def __init__(self, message: str, answer: str) -> None:
        """A line for the person, and what the endpoint answered."""
        super().__init__(message)
        self.answer = answer


class GivenUpError(Exception):
    """A question that was sent as often as it may be."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where the judge is and how to be let in.

    Attributes:
      base_url: what `/chat/completions` is added to, such as https://host/v1.
      model: the model's name there.
      key: sent as a bearer token; "" for servers that want none.
    """

    base_url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        """Raises UsageError, without the key, for what cannot be an address, a model or a key."""
        url = _split_url(self.base_url)
        if url is not None and "@" in url.netloc:
            raise UsageError(
                "OPENAI_BASE_URL holds a user name or a password; leave it out and set OPENAI_API_KEY"
            )
        if url is None or url.query or url.fragment:
            raise UsageError(
                "OPENAI_BASE_URL is no address that /chat/completions can be added to: give one such as "
                "https://host/v1"
            )
        if not self.model.strip():
            raise UsageError("DRO_JAX_JUDGE_MODEL is empty: give the judge's name at the endpoint")
        # Without what JSON would write otherwise, too.
        if not re.fullmatch(r"[!#-\[\]-~]*", self.key):
            raise UsageError(
                "OPENAI_API_KEY holds white space, quotation marks, backslashes or characters that are not ASCII: give "
                "the key alone"
            )

    @property
    def url(self) -> str:
        """Of the requests."""
        return f"{self.base_url.rstrip('/')}/chat/completions"

    def without_key(self, text: str) -> str:
        """Text of a server's, which may repeat what it was sent, as valid Unicode and without the key."""
        text = text.encode("utf-8", "replace").decode()
        return text.replace(self.key, "[key]") if len(self.key) >= SHORTEST_SECRET else text


def _split_url(text: str) -> urllib.parse.SplitResult | None:
    try:
        url = urllib.parse.urlsplit(text)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        return None
    return url if usable and re.fullmatch(r"[!-~]+", text) else None


@dataclasses.dataclass
class Usage:
    """What an evaluation has cost so far.

    Attributes:
      requests: sent over the network, those that failed included.
      replies: received.
      cached: replies that were there already.
    """

    requests: int = 0
    replies: int = 0
    cached: int = 0


class ReplyCache:
    """Replies by question in an SQLite file: one that was put there stays, whatever happens to the process."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens or makes the file. Raises UsageError where it cannot be used."""
        self._path = os.fspath(path)
        with self._naming_the_file():
            # One thread at a time uses it, though not the one that opens it.
            self._database = sqlite3.connect(self._path, timeout=60, check_same_thread=False)
        try:
            with self._naming_the_file(), self._database:
                ((health,),) = self._database.execute("PRAGMA quick_check(1)")
                if health != "ok":
                    raise sqlite3.DatabaseError(health)
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS replies (question TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID"
                )
        except UsageError:
            self._database.close()
            raise

    def get(self, question: str) -> str | None:
        """The reply, None if there is none yet."""
        with self._naming_the_file():
            row = self._database.execute(
                "SELECT reply FROM replies WHERE question = ?", (question,)
            ).fetchone()
        return None if row is None else str(row[0])

    def put(self, question: str, reply: str) -> None:
        """Keeps a reply, on disk when this returns."""
        with self._naming_the_file(), self._database:
            self._database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (question, reply))

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"{self._path}: cannot be used to keep the judge's replies ({reason}); give a file in a folder that "
                "can be written, or move a damaged one away, whose replies are then asked for again"
            ) from error


class ChatClient:
    """Questions of one evaluation to one endpoint; its coroutines run in one event loop.

    A question is sent until it is answered, and again after faults and rate limits. Where the endpoint answers others
    it is given up in the end, or refused alone; else the endpoint's fault ends the evaluation.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        replies: ReplyCache,
        usage: Usage,
        *,
        harmless: str,
        concurrency: int,
        timeout: float,
        tries: int,
        first_delay: float,
        patience: float,
    ) -> None:
        """Opens nothing yet.

        Args:
          endpoint: which.
          replies: those that are there, and where others are kept.
          usage: is counted up.
          harmless: a question that no endpoint has a reason to refuse.
          concurrency: the most requests at a time.
          timeout: the longest a response may take to its last byte, seconds.
          tries: of a question, before it is given up; rate limits do not count.
          first_delay: before the second try, seconds; it doubles from try to try, up to `LONGEST_DELAY`, with jitter.
          patience: the longest that rate limits may hold up one question, seconds.
        """
        self._endpoint = endpoint
        self._replies = replies
        self._usage = usage
        self._harmless = harmless
        self._timeout, self._tries = timeout, tries
        self._first_delay, self._patience = first_delay, patience
        self._slots = asyncio.Semaphore(concurrency)
        self._under_way: dict[str, asyncio.Task[str]] = {}
        self._probed: asyncio.Task[str] | None = None
        self._http = _http_client(endpoint)
        self._paused_until = 0.0
        self._answered_once = False
        self._given_up = 0
        self._told: set[str] = set()

    async def close(self) -> None:
        """Ends what is still under way."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        with warnings.catch_warnings():
            # anyio's, of a connection that is called off before it begins.
            warnings.filterwarnings("ignore", "coroutine 'connect_tcp", RuntimeWarning)
            await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    async def reply(self, question: str) -> str:
        """The reply to a question: from the cache, from a request under way, or from a new one; "" is not kept.

        Raises:
          RefusedError: if the endpoint refuses this question, though not others.
          GivenUpError: if it does not answer this one, though others.
          UsageError: if it refuses whatever it is asked.
          JudgeUnavailableError: if it does not answer, or limits requests for too long.
        """
        body = self._body(question)
        key = hashlib.sha256(json.dumps([self._endpoint.url, body]).encode()).hexdigest()
        kept = self._replies.get(key)
        if kept is not None:
            self._usage.cached += 1
            self._answered()
            return kept
        if key not in self._under_way:
            self._under_way[key] = asyncio.ensure_future(self._pay(key, json.dumps(body)))
            self._under_way[key].add_done_callback(lambda _: self._under_way.pop(key))
        return await self._under_way[key]

    def _body(self, question: str) -> dict[str, Any]:
        return {
            "model": self._endpoint.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": TEMPERATURE,
        }

    async def _pay(self, key: str, body: str) -> str:
        """Has a question answered, and keeps the reply."""
        # Held between tries too: an endpoint in trouble is not asked other things meanwhile.
        async with self._slots:
            try:
                reply = await self._answer(body)
            except RefusedError as refusal:
                if not self._answered_once:
                    await self._probe()
                # An over-long question would be refused for ever, and must not end the evaluation each time.
                self._tell("refuses a question", f" ({refusal.answer}); going on without its reply")
                raise
        # What a filter or a limit left nothing of is worth another request.
        if reply:
            self._replies.put(key, reply)
        self._usage.replies += 1
        self._answered()
        return reply

    async def _probe(self) -> None:
        """Raises what the endpoint does about a question that nobody has a reason to refuse."""
        if self._probed is None:
            body = json.dumps(self._body(self._harmless))
            self._probed = asyncio.ensure_future(self._answer(body))
        try:
            await self._probed
        except RefusedError as refusal:
            raise UsageError(str(refusal)) from None
        self._answered()

    async def _answer(self, body: str) -> str:
        """Sends a question until it is answered."""
        clock = asyncio.get_running_loop().time
        faults, limits, held_up = 0, 0, 0.0
        while True:
            while (left := self._paused_until - clock()) > 0:
                await asyncio.sleep(left)
            try:
                return await self._send(body)
            except _Unanswered as problem:
                self._tell(str(problem), "; trying again")
                limits += problem.limited
                faults += not problem.limited
                if faults == self._tries:
                    raise self._give_up(problem) from None
                delay = self._delay(problem, limits if problem.limited else faults)
                if problem.limited or problem.delay is not None:
                    held_up += delay
                if held_up > self._patience:
                    raise JudgeUnavailableError(
                        f"{self._endpoint.url}: {problem}, and asks to wait for longer than {self._patience:g} s; "
                        "what was answered is kept: run the same command later"
                    ) from None
                if problem.limited:
                    # The limit is for all questions.
                    self._paused_until = max(self._paused_until, clock() + delay)
                else:
                    await asyncio.sleep(delay)

    def _delay(self, problem: _Unanswered, times: int) -> float:
        if problem.delay is not None:
            return problem.delay
        longest = min(LONGEST_DELAY, self._first_delay * 2 ** (times - 1))
        return random.uniform(longest / 2, longest)

    def _answered(self) -> None:
        self._answered_once, self._given_up = True, 0

    def _give_up(self, problem: _Unanswered) -> Exception:
        """What a question that was sent as often as it may be means: for itself alone, or for the evaluation."""
        self._given_up += 1
        if self._answered_once and not problem.gone and self._given_up < GIVEN_UP_IN_A_ROW:
            return GivenUpError(str(problem))
        return JudgeUnavailableError(
            f"{self._endpoint.url}: {problem}, {self._tries} times; check OPENAI_BASE_URL and the server. "
            "What was answered is kept: the same command goes on"
        )

    def _tell(self, problem: str, details: str) -> None:
        # Once for each kind: a busy endpoint says the same a thousand times.
        if problem not in self._told:
            self._told.add(problem)
            logger.warning("%s: %s%s", self._endpoint.url, problem, details)

    async def _send(self, body: str) -> str:
        """Sends one request.

        Returns:
          The reply's text, "" where the model said nothing.

        Raises:
          _Unanswered: if it may be sent again.
          RefusedError: if the endpoint does not take it, though it might take another.
          UsageError: if it would take no other either.
        """
        endpoint = self._endpoint
        self._usage.requests += 1
        received = bytearray()
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._http.stream("POST", endpoint.url, content=body) as response,
            ):
                async for chunk in response.aiter_bytes():
                    received += chunk
                    if len(received) > LONGEST_BODY:
                        raise _Unanswered(f"a response of more than {LONGEST_BODY} bytes")
        except TimeoutError:
            raise _Unanswered(f"no response within {self._timeout:g} s") from None
        except httpx.HTTPError as error:
            said = endpoint.without_key(" ".join(str(error).split()))
            raise _Unanswered(
                f"{said or 'the connection failed'} ({type(error).__name__})",
                gone=isinstance(error, httpx.ConnectError),
            ) from None
        if response.is_success:
            return endpoint.without_key(_content(bytes(received)))
        raise _refusal(endpoint, response, bytes(received))


def _http_client(endpoint: Endpoint) -> httpx.AsyncClient:
    headers = {
        "Content-Type": "application/json",
        # What is compressed may be of any length when it is not.
        "Accept-Encoding": "identity",
    }
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    # `_pay` has a limit for the connections, and `_send` one for the response as a whole.
    return httpx.AsyncClient(headers=headers, timeout=None, limits=httpx.Limits())


def _content(body: bytes) -> str:
    """The text of a chat completion; "" where it has none, as when a filter took it away."""
    try:
        content: Any = json.loads(body)["choices"][0]["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Unanswered("a response that is no chat completion") from None
    return content if isinstance(content, str) else ""


def _refusal(endpoint: Endpoint, response: httpx.Response, body: bytes) -> Exception:
    """What to do about a response that is not of the 200s."""
    status = response.status_code
    # Cut when the key is out of it: half a key is no key to look for.
    said = endpoint.without_key(_error_message(body))[:200]
    answer = f"{status}: {said}" if said else str(status)
    if status == 429 and "insufficient_quota" not in body.decode("utf-8", "replace"):
        return _Unanswered("too many requests (429)", _retry_after(response), limited=True)
    if status in (408, 409, 425) or status >= 500:
        return _Unanswered(f"the server answered {status}", _retry_after(response))
    if status == 401 and not endpoint.key:
        return UsageError(f"{endpoint.url}: asks for a key (401); set OPENAI_API_KEY")
    if status == 401:
        # Some servers repeat parts of the key here.
        return UsageError(f"{endpoint.url}: does not accept the key (401); check OPENAI_API_KEY")
    remedies = {
        403: f"check that the key in OPENAI_API_KEY may use DRO_JAX_JUDGE_MODEL={endpoint.model}",
        404: f"check that OPENAI_BASE_URL ends where /chat/completions follows (often in /v1) and that it has "
        f"DRO_JAX_JUDGE_MODEL={endpoint.model}",
        429: "the account has no money left: raise its limit, and the same command goes on",
    }
    remedy = remedies.get(status, f"check OPENAI_BASE_URL and DRO_JAX_JUDGE_MODEL={endpoint.model}")
    message = f"{endpoint.url}: refuses the request ({answer}); {remedy}"
    return RefusedError(message, answer) if status in OF_THE_QUESTION else UsageError(message)


def _error_message(body: bytes) -> str:
    """What a server says is wrong: its JSON's message or else the body, as one printable line."""
    text = body.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
        error: Any = json.loads(text)
        if isinstance(error, dict):
            error = error.get("error", error)
        if isinstance(error, dict):
            error = error.get("message", error)
        text = error if isinstance(error, str) else json.dumps(error)
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that a server asks to wait, None where it asks for no wait (or not intelligibly)."""
    asked = response.headers.get("Retry-After", "").strip()
    seconds = 0.0
    if re.fullmatch(r"\d{1,9}(\.\d+)?", asked):
        seconds = float(asked)
    elif (then := _timestamp(asked)) is not None:
        # By the server's own clock, where it shows one.
        now = _timestamp(response.headers.get("Date", ""))
        seconds = then - (time.time() if now is None else now)
    return seconds if seconds > 0 else None


def _timestamp(date: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None
