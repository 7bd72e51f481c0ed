"""The client against a real server on the loopback: caching, limits, retries, budget, and a key that stays a secret."""

import asyncio
import json
import logging
import threading
import time
import traceback

import pytest

from synpo.judge import (
    FLUENCY,
    AnswerCache,
    BudgetReached,
    ChatClient,
    Key,
    NoAnswer,
    Question,
    Request,
    ServerError,
    Spending,
    ask,
    read_key,
)

from .loopback import completion, judged, serving


def request(text="A cat jumps.", **options):
    messages, _ = ask(Question(FLUENCY, "Describe.", (text,)))
    return Request(messages, "fluency/1", FLUENCY.schema(), **options)


def answers(server, requests, cache=None, **options):
    """Each request's answer, or the exception that it raised, and the client."""
    cache = cache if cache is not None else AnswerCache(None)

    async def run():
        client = ChatClient("loopback", cache, url=server.url, **{"timeout": 5.0, "retries": 2} | options)
        got = await asyncio.gather(*(client.answer(r) for r in requests), return_exceptions=True)
        await client.close()
        return got, client

    return asyncio.run(run())


def test_a_second_run_costs_nothing(tmp_path):
    requests = [request(f"caption {i}") for i in range(20)]
    with serving() as server:
        cache = AnswerCache(tmp_path / "judge.sqlite")
        first, client = answers(server, requests, cache)
        assert server.count == client.spending.calls == 20
        cache.close()
        again = AnswerCache(tmp_path / "judge.sqlite")
        second, client = answers(server, requests, again)
        assert server.count == 20
    assert first == second
    assert (client.spending.calls, client.spending.cached) == (0, 20)
    assert again.usage() == (2000, 400)
    assert "0 answers paid, 20 from the cache; in all 2,000 tokens read, 400 written" in str(client.spending)
    row = again._database.execute("SELECT purpose, model, text FROM answers").fetchone()
    assert row[:2] == ("fluency/1", "loopback")
    assert "scores" in row[2]


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.5}, {"seed": 1}, {"max_tokens": 7}, {"attempt": 1}, {"top_p": 0.5}, {"schema": None}],
)
def test_whatever_an_answer_depends_on_is_in_its_key(change):
    base = request()
    with serving() as server:
        _, client = answers(server, [base, base._replace(**change), request("Another one.")])
        assert client.spending.calls == server.count == 3


def test_equal_requests_under_way_are_sent_once_and_the_limit_holds():
    def slow(body, headers):
        time.sleep(0.02)
        return judged(body, headers)

    with serving(slow) as server:
        _, client = answers(server, [request(f"caption {i % 12}") for i in range(36)], concurrency=3)
        assert server.count == client.spending.calls == 12
        assert server.busiest == 3


def test_an_answer_is_on_disk_before_its_slot_is_free(tmp_path):
    """What the server has answered and the file lacks is never more than the requests under way."""
    file = tmp_path / "judge.sqlite"
    lacking = []

    def count(body, headers):
        reader = AnswerCache(file)
        lacking.append(server.count - len(reader))
        reader.close()
        return judged(body, headers)

    with serving(count) as server:
        answers(server, [request(f"caption {i}") for i in range(40)], AnswerCache(file), concurrency=4)
    assert max(lacking) <= 4


def test_retry_after_is_honoured():
    times = []

    def busy_first(body, headers):
        times.append(time.monotonic())
        return (429, {"Retry-After": "1"}, b"{}") if len(times) == 1 else judged(body, headers)

    with serving(busy_first) as server:
        [answer], client = answers(server, [request()])
    assert answer.text
    assert 1.0 <= times[1] - times[0] < 2
    assert client.spending.calls == 1


def test_a_form_that_the_server_lacks_is_asked_for_once():
    def text_only(body, headers):
        if "response_format" in body:
            return 400, {}, b'{"error": {"message": "response_format is not supported"}}'
        return judged(body, headers)

    with serving(text_only) as server:
        got, client = answers(server, [request(f"caption {i}") for i in range(9)], concurrency=1)
        assert all(answer.text for answer in got)
        assert server.count == 11
        assert not client.failures
        forms = [body.get("response_format", {}).get("type") for body in server.requests]
        assert forms == ["json_schema", "json_object"] + [None] * 9
        strict = server.requests[0]["response_format"]["json_schema"]
        assert strict["strict"] is True
        assert strict["schema"]["properties"]["scores"]["items"]["properties"]["score"]["enum"] == [0, 1, 2, 3, 4, 5]


def test_a_question_that_is_refused_with_400_spoils_no_form():
    def some(body, headers):
        if "forbidden" in body["messages"][-1]["content"]:
            return 400, {}, b'{"error": {"message": "inappropriate content"}}'
        return judged(body, headers)

    with serving(some) as server:
        got, client = answers(server, [request("fine"), request("forbidden"), request("good")], concurrency=1)
        assert isinstance(got[1], NoAnswer)
        assert "inappropriate content" in str(got[1])
        assert server.requests[-1]["response_format"]["type"] == "json_schema"
    assert client.failures == {"HTTP 400": 1}
    assert len(client.cache) == 2


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ((200, {}, b""), "no chat completion"),
        ((200, {}, b"<html>"), "no chat completion"),
        ((200, {}, completion("x")[2][:-30]), "no chat completion"),
        ((200, {}, b'{"choices": []}'), "no chat completion"),
        ((200, {}, b'{"choices": null}'), "no chat completion"),
        ((200, {}, b'{"choices": [{"message": {"content": 5}}]}'), "no chat completion"),
        ((200, {}, b'{"choices": [{"message": "5"}]}'), "no chat completion"),
        ((500, {"retry-after-ms": "1"}, b"oops"), "HTTP 500"),
        ((429, {"retry-after-ms": "1"}, b"{}"), "HTTP 429"),
        ((429, {"Retry-After": "86400"}, b"{}"), "HTTP 429"),
        ((200, {"Content-Length": "9999"}, b'{"choices'), "no connection"),
    ],
)
def test_what_is_no_answer_is_counted_and_not_cached(reply, kind):
    with serving(lambda body, headers: reply) as server:
        [error], client = answers(server, [request()], retries=1)
    assert isinstance(error, NoAnswer)
    assert str(error).startswith(kind)
    assert client.failures == {kind: 1}
    assert (len(client.cache), client.spending.calls, client.spending.cost) == (0, 0, 0)


def test_time_outs():
    gone = threading.Event()
    with serving(lambda body, headers: (gone.wait(3), judged(body, headers))[1]) as server:
        [error], client = answers(server, [request()], timeout=0.1, retries=0)
        gone.set()
    assert str(error).startswith("time-out")
    assert client.failures == {"time-out": 1}


@pytest.mark.parametrize(
    ("status", "body"),
    [(401, "Incorrect API key provided: sk-very-secret"), (403, "no"), (404, "no such model"), (429, "quota")],
)
def test_what_no_request_would_survive_stops_the_run(status, body):
    error = json.dumps({"error": {"message": body, "code": "insufficient_quota"}}).encode()
    with serving(lambda *_: (status, {"x-should-retry": "false"}, error)) as server:
        got, _ = answers(server, [request(f"{i}") for i in range(30)], concurrency=2, key=Key("sk-very-secret"))
        assert server.count <= 3
    assert all(isinstance(e, ServerError) for e in got)
    assert body.replace("sk-very-secret", "[key]") in str(got[0])
    assert "model 'loopback'" in str(got[0])


def test_a_server_that_is_down_stops_the_run():
    with serving(lambda *_: (500, {}, b"oops")) as server:
        got, _ = answers(server, [request(f"{i}") for i in range(60)], retries=0, concurrency=4)
        assert server.count <= 20
    assert isinstance(got[-1], ServerError)
    assert "16 requests in a row failed, the last with HTTP 500" in str(got[-1])


def test_the_key_is_nowhere(tmp_path, caplog, capfd):
    """A server that echoes the key in answers and errors, at the most talkative log level."""
    caplog.set_level(logging.DEBUG)
    secret = "sk-0123456789-very-secret"
    (tmp_path / "key").write_text(secret + "\n")
    key = read_key(tmp_path / "key")

    def echo(body, headers):
        assert headers["authorization"] == f"Bearer {secret}"
        if "bad" in body["messages"][-1]["content"]:
            return 400, {}, json.dumps({"error": {"message": f"who is {secret}?"}}).encode()
        return completion(f"your key is {secret}", refusal=secret)

    file = tmp_path / "out" / "judge.sqlite"
    with serving(echo) as server:
        cache = AnswerCache(file)
        got, client = answers(server, [request("good"), request("bad")], cache, key=key)
    cache.export(tmp_path / "out" / "answers.jsonl")
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    seen = [written.decode("latin1"), caplog.text, *capfd.readouterr(), *map(repr, got), repr(key), str(key)]
    seen += ["".join(traceback.format_exception(got[1])), repr(vars(client)), str(client.spending)]
    assert "your key is [key]" in seen[0]
    assert "who is [key]?" in str(got[1])
    assert not any(secret in text for text in seen)


def test_keys_and_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " from-environment\n")
    assert read_key().reveal() == "from-environment"
    (tmp_path / "key").write_text("two words")
    (tmp_path / "empty").write_text("\n")
    for file, message in (("key", "one word"), ("empty", "is empty"), ("none", "No such file")):
        with pytest.raises(ValueError, match=message) as error:
            read_key(tmp_path / file)
        assert "two words" not in str(error.value)
    for url in ("localhost:8000", "http://u:hunter2@h/v1", "https://h/v1?api-key=hunter2", "http://["):
        with pytest.raises(ValueError, match="url") as error:
            ChatClient("m", AnswerCache(None), url=url)
        assert "hunter2" not in str(error.value)


def test_the_budget_is_not_passed():
    """An answer costs 100 x 10 + 20 x 50 = 2000 millionths, whatever the reservation."""
    options = {"price_in": 10.0, "price_out": 50.0}
    with serving() as server:
        cache = AnswerCache(None)
        spending = Spending(**options, budget=0.2)
        got, _ = answers(server, [request(f"caption {i}") for i in range(200)], cache, spending=spending, concurrency=4)
        paid = [answer for answer in got if not isinstance(answer, Exception)]
        assert 40 < len(paid) < 100
        assert all(isinstance(e, BudgetReached) for e in got if isinstance(e, Exception))
        assert spending.cost == pytest.approx(0.002 * len(paid))
        assert spending.cost <= 0.2
        assert "the budget of 0.2 is used up" in str(got[-1])
        # A later run counts what earlier ones spent; cached answers are handed out all the same.
        before = server.count
        spending = Spending(**options, budget=0.2)
        got, _ = answers(server, [request(f"caption {i}") for i in range(200)], cache, spending=spending, concurrency=4)
        assert sum(not isinstance(answer, Exception) for answer in got) >= len(paid)
        assert spending.cost <= 0.2
        assert server.count - before <= 100 - len(paid)


def test_an_answer_without_token_counts_is_charged_in_full():
    spending = Spending(price_in=1.0, price_out=1.0, budget=1.0)
    with serving(lambda *_: completion("x", usage={"prompt_tokens": "many", "completion_tokens": -1})) as server:
        answers(server, [request(max_tokens=100)], spending=spending)
    assert spending.without_usage == 1
    assert spending.cost > 1000e-6  # a byte of the prompt counts as a token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 5}, "a budget needs prices"),
        ({"budget": -1, "price_in": 1}, "budget is -1"),
        ({"price_in": float("nan")}, "price_in is nan"),
    ],
)
def test_bad_spending(options, message):
    with pytest.raises(ValueError, match=message):
        Spending(**options)


def test_options_are_sent_and_take_fields_out():
    with serving() as server:
        options = {"temperature": None, "max_tokens": None, "max_completion_tokens": 99, "reasoning_effort": "low"}
        answers(server, [request()], options=options)
        body = server.requests[0]
    assert body["max_completion_tokens"] == 99
    assert body["reasoning_effort"] == "low"
    assert {"temperature", "max_tokens"}.isdisjoint(body)
    with pytest.raises(ValueError, match="options take max_tokens out"):
        ChatClient("m", AnswerCache(None), spending=Spending(1, 1, 1), options={"max_tokens": None})


def test_recorded_answers_serve_without_a_server(tmp_path):
    with serving() as server:
        cache = AnswerCache(None)
        first, _ = answers(server, [request()], cache)
    assert cache.export(tmp_path / "answers.jsonl") == 1
    recorded = AnswerCache.recorded(tmp_path / "answers.jsonl")
    second, client = answers(server, [request(), request("unknown")], recorded, offline=True)
    assert second[0] == first[0]
    assert isinstance(second[1], NoAnswer)
    assert client.failures == {"not recorded": 1}
    (tmp_path / "broken.jsonl").write_text('{"key": "x"}\n')
    with pytest.raises(ValueError, match=r"broken.jsonl:1: not a recorded answer"):
        AnswerCache.recorded(tmp_path / "broken.jsonl")


def test_files_that_are_no_cache(tmp_path):
    (tmp_path / "text").write_text("this is no database, and long enough to be seen as none " * 20)
    with pytest.raises(ValueError, match="cannot be used as a cache of answers"):
        AnswerCache(tmp_path / "text")
    newer = AnswerCache(tmp_path / "newer")
    newer._database.execute("PRAGMA user_version=99")
    newer.close()
    with pytest.raises(ValueError, match="a cache of version 99"):
        AnswerCache(tmp_path / "newer")
