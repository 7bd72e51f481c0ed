"""Requests to a server that speaks OpenAI's chat API: cached, bounded in number and in money, retried."""

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import openai

from .cache import Answer, AnswerCache
from .criteria import Message
from .keys import Key, check_url
from .spending import BudgetReached, Spending, Usage

DEFAULT_URL = "https://api.openai.com/v1"
MODES = ("schema", "json", "text")  # how the form of an answer is enforced; each server offers the last at least
_GIVE_UP_AFTER = 16  # requests in a row that failed, with their retries: the server is down
_TEMPLATE_TOKENS = 64  # tokens that a chat template may add to a message, generously

logger = logging.getLogger(__name__)


class ServerError(RuntimeError):
    """The server cannot be used (wrong key, unknown model, down): the run stops, and can go on later."""


class NoAnswer(RuntimeError):
    """One request brought no answer after all its retries; nothing was cached, so a later run asks again."""


class Request(NamedTuple):
    """What an answer depends on.

    Attributes:
        messages: of the chat; content is a string or a list of parts.
        purpose: for the cache: criterion and prompt version.
        schema: JSON schema that the answer should follow; None for free text.
        attempt: asking once more for the same thing is another request.
    """

    messages: Sequence[Message]
    purpose: str
    schema: Mapping[str, Any] | None = None
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int = 1024
    attempt: int = 0


class ChatClient:
    """A model behind a server, with a cache in front of it.

    Args:
        model: name at the server.
        cache: answers found here are not asked for again, and no answer is handed out before it is in here.
        url: base address, such as http://127.0.0.1:8000/v1.
        key: sent with each request, and kept out of everything else.
        concurrency: requests under way at most.
        timeout: seconds for one try of a request.
        retries: further tries of a request after 408, 409, 429, 5xx, a broken connection or a time-out, waiting as long
            as Retry-After says, else twice as long each time.
        spending: prices, totals, budget.
        options: fields merged into each request's body; None takes a field out (`temperature`, for a model without it).
            They are part of what an answer is cached by.
        offline: never send anything; what is not in the cache has no answer.

    Use within one event loop, and `close` at its end.
    """

    def __init__(
        self,
        model: str,
        cache: AnswerCache,
        *,
        url: str = DEFAULT_URL,
        key: Key | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 8,
        spending: Spending | None = None,
        options: Mapping[str, Any] | None = None,
        offline: bool = False,
    ) -> None:
        if concurrency < 1 or retries < 0 or timeout <= 0:
            raise ValueError(
                f"concurrency {concurrency}, retries {retries}, timeout {timeout}: at least 1, at least 0, above 0"
            )
        self.model, self.cache, self.url, self.offline = model, cache, check_url(url), offline
        self.spending = spending or Spending()
        self.spending.add_earlier(cache.usage())
        self.failures: Counter[str] = Counter()  # requests without an answer, by reason
        self._key = key or Key("")
        self.options = dict(options or {})
        if self.spending.budget is not None and _token_limit({"max_tokens": 1, **self.options}) is None:
            raise ValueError("options take max_tokens out of the requests; a budget needs it, or max_completion_tokens")
        self._slots = asyncio.Semaphore(concurrency)
        self._under_way: dict[str, asyncio.Task[Answer]] = {}
        self._sending = 0
        self._freed = asyncio.Event()  # a request under way has ended
        self._failed_in_a_row = 0
        self._mode_works: dict[str, bool] = {}
        self._stopped: Exception | None = None
        for name in ("httpx2", "openai"):  # a line for every request, at a level that runs show
            logging.getLogger(name).setLevel(logging.WARNING)
        # An empty key is refused by the SDK; servers that need none ignore what they get.
        self._client = openai.AsyncOpenAI(
            api_key=self._key.reveal() or "none", base_url=self.url, timeout=timeout, max_retries=retries
        )

    async def close(self) -> None:
        """Wait for the requests under way, whose answers are paid, and close the connections."""
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)
        await self._client.close()

    async def answer(self, request: Request) -> Answer:
        """The cached answer, or the server's, which is then cached.

        Equal requests under way at the same time are sent once.

        Raises:
            NoAnswer: this request failed; others may work.
            ServerError, BudgetReached: no request will work from here on.
        """
        body, key = self._canonical(request)
        if key not in self._under_way:
            if (known := self.cache.get(key)) is not None:
                self.spending.cached += 1
                return known
            task = asyncio.ensure_future(self._ask(request, body, key))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return await asyncio.shield(self._under_way[key])

    def _canonical(self, request: Request) -> tuple[dict[str, Any], str]:
        """The body without the part that enforces a form, and the hash of everything that an answer depends on."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(request.messages),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "max_tokens": request.max_tokens,
            **self.options,
        }
        body = {name: value for name, value in body.items() if value is not None}
        content = {"body": body, "schema": request.schema, "attempt": request.attempt}
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return body, hashlib.sha256(text.encode()).hexdigest()

    async def _ask(self, request: Request, body: dict[str, Any], key: str) -> Answer:
        async with self._slots:  # held until the answer is on disk: a kill loses no more answers than there are slots
            if self._stopped is not None:
                raise self._stopped
            if self.offline:
                self.failures["not recorded"] += 1
                raise NoAnswer("this request is not among the recorded answers")
            size = sum(_bytes(message) + _TEMPLATE_TOKENS for message in request.messages) + _bytes(request.schema)
            reserved = await self._reserve(size, _token_limit(body) or 0)
            try:
                answer = await self._send(request, body)
            except BaseException:
                self.spending.release(reserved)
                raise
            else:
                self.spending.settle(reserved, answer.usage)
            finally:
                self._sending -= 1
                self._freed.set()
            await self.cache.put(key, self.model, request.purpose, answer)
            return answer

    async def _reserve(self, size: int, max_tokens: int) -> float:
        """Reserve a request's cost. Requests under way mostly cost less than was reserved: wait for those first."""
        while True:
            try:
                reserved = self.spending.reserve(size, max_tokens)
            except BudgetReached as stop:
                if not self._sending:
                    self._stopped = stop
                    raise
            else:
                self._sending += 1
                return reserved
            self._freed.clear()
            await self._freed.wait()
            if self._stopped is not None:
                raise self._stopped

    async def _send(self, request: Request, body: dict[str, Any]) -> Answer:
        """Ask in the strictest form that the server offers."""
        modes = MODES if request.schema is not None else ("text",)
        modes = modes[min(request.attempt, len(modes) - 1) :]
        usable = [mode for mode in modes if self._mode_works.get(mode, True)] or [modes[-1]]
        for mode in usable:
            try:
                answer = await self._try(body | _response_format(mode, request))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if mode != usable[-1]:
                    continue  # either the form or the question is refused; the next form tells
                raise self._failed(f"HTTP {error.status_code}", self._text(error)) from None
            for refused in usable[: usable.index(mode)]:
                if refused not in self._mode_works:
                    logger.info("%s does not offer answers in the form %r; asking for %r", self.url, refused, mode)
                    self._mode_works[refused] = False
            self._mode_works.setdefault(mode, True)
            return answer
        raise AssertionError("there is a last mode")

    async def _try(self, body: dict[str, Any]) -> Answer:
        try:
            response = await self._client.chat.completions.with_raw_response.create(**_arguments(body))
            reply = response.http_response.content
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            raise
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._stop(f"HTTP {error.status_code}: {self._text(error)}") from None
        except openai.APIStatusError as error:
            if error.code == "insufficient_quota":
                raise self._stop(f"HTTP {error.status_code}: {self._text(error)}") from None
            raise self._failed(f"HTTP {error.status_code}", self._text(error)) from None
        except openai.APITimeoutError:
            raise self._failed("time-out", "no answer in time") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            raise self._failed("no connection", f"{type(cause).__name__}: {self._key.redact(str(cause))}") from None
        answer = _read_reply(reply, self._key)
        if answer is None:
            raise self._failed("no chat completion", "the reply is not the JSON of a chat completion")
        self._failed_in_a_row = 0
        return answer

    def _failed(self, kind: str, problem: str) -> Exception:
        self.failures[kind] += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _GIVE_UP_AFTER:
            return self._stop(f"{_GIVE_UP_AFTER} requests in a row failed, the last with {kind}: {problem}")
        return NoAnswer(f"{kind}: {problem}")

    def _stop(self, problem: str) -> Exception:
        self._stopped = ServerError(f"model {self.model!r} at {self.url}: {problem}; answers so far are kept")
        return self._stopped

    def _text(self, error: openai.APIStatusError) -> str:
        return self._key.redact(" ".join(str(error.message).split()))[:300]


def _response_format(mode: str, request: Request) -> dict[str, Any]:
    if mode == "schema":
        name = request.purpose.replace("/", "_")
        schema = {"name": name, "strict": True, "schema": request.schema}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"response_format": {"type": "json_object"}} if mode == "json" else {}


def _arguments(body: dict[str, Any]) -> dict[str, Any]:
    """The SDK's own parameters by name, anything else through extra_body."""
    own = {"model", "messages", "temperature", "top_p", "seed", "max_tokens", "response_format"}
    extra = {name: value for name, value in body.items() if name not in own}
    return {name: value for name, value in body.items() if name in own} | ({"extra_body": extra} if extra else {})


def _bytes(content: Any) -> int:
    return len(json.dumps(content, ensure_ascii=False).encode())


def _token_limit(body: Mapping[str, Any]) -> int | None:
    """The most tokens that an answer may have; None: no limit."""
    limits = [body.get(name) for name in ("max_tokens", "max_completion_tokens")]
    return max((limit for limit in limits if isinstance(limit, int)), default=None)


def _read_reply(reply: bytes, key: Key) -> Answer | None:
    """A chat completion's first choice, each field checked, since nobody else does; None where it is not one."""
    try:
        content = json.loads(reply)
        choice = content["choices"][0]
        message = choice["message"]
        fields = [message.get("content"), message.get("refusal"), choice.get("finish_reason")]
        usage = content.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    if not all(field is None or isinstance(field, str) for field in fields):
        return None
    told = all(isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**40 for count in counts)
    text, refusal, finish_reason = (None if field is None else key.redact(_clean(field)) for field in fields)
    return Answer(text, refusal, finish_reason, Usage(*counts) if told else None)


def _clean(text: str) -> str:
    """Halves of surrogate pairs, which JSON can hold and UTF-8 cannot, as replacement characters."""
    return text.encode("utf-8", "replace").decode()
