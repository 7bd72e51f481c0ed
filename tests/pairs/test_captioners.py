"""Captioners as the first stage uses them: a server that takes images, and a tiny model on this machine."""

import base64
import io
import json
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from synpo.caption import CERTAIN, Sampling
from synpo.judge import AnswerCache, ChatClient, NoAnswer, OracleJudge
from synpo.judge.background import Background
from synpo.pairs.captioning import CaptionStore, Shrink, Written, captioned, seed_of
from synpo.pairs.server_captioner import ServerCaptioner
from synpo.pairs.video_lists import folder_videos
from synpo.video import View
from tests.judge.loopback import completion, serving, true_score

from .making import PLAN, make_videos
from .test_build import build, check_pairs, rows


def teller(body, headers):
    """Tells the seed, and on the second look what it told before."""
    [message] = body["messages"]
    words = message["content"][-1]["text"]
    return completion(f"Seed {body.get('seed')} of {len(message['content']) // 2} frames, {len(words)} characters.")


def captioner(server, background, cache=None, **options):
    client = ChatClient("eyes", AnswerCache(None) if cache is None else cache, url=server.url, retries=0)
    return ServerCaptioner(client, background, sampling=Sampling(0.9, 0.95, max_new_tokens=64), **options)


def test_requests_to_a_server_that_takes_images():
    images = tuple(np.full((60, 90, 3), value, np.uint8) for value in (0, 255))
    views = [View(5.0, 7.0, np.array([5.0, 6.5]), images), View(7.0, 9.0, np.array([7.0]), images[:1])]
    with serving(teller) as server, Background() as background:
        eyes = captioner(server, background, max_side=45)
        told = eyes(views, "Describe.", None)
        first = next(body for body in server.requests if len(body["messages"][0]["content"]) == 5)  # sent at once
        sampled = eyes(views[:1], "Describe.", [[7, 8]])
        bodies = server.requests
        eyes.close()
    assert [len(texts) for texts in told] == [1, 1]
    assert told[0][0].draft == "Seed None of 2 frames, 9 characters."
    assert told[0][0].caption != told[0][0].draft
    assert [text.draft for text in sampled[0]] == [f"Seed {seed} of 2 frames, 9 characters." for seed in (7, 8)]
    assert (first["temperature"], bodies[-1]["temperature"], bodies[-1]["top_p"]) == (0.0, 0.9, 0.95)
    parts = first["messages"][0]["content"]
    assert [part.get("text") for part in parts] == ["Frame at 0.0 s:", None, "Frame at 1.5 s:", None, "Describe."]
    data = parts[3]["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (picture.format, picture.size) == ("JPEG", (90, 60))  # frames are shrunk when they are decoded
    again = next(body for body in bodies if told[0][0].draft in body["messages"][0]["content"][-1]["text"])
    assert again["messages"][0]["content"][-1]["text"].startswith("Describe.\n")


def test_refusals_and_empty_answers_are_no_captions():
    replies = iter(
        [completion(""), completion(None, refusal="no"), completion("<think>hm</think> A cat."), completion("")]
    )
    view = View(0.0, 1.0, np.array([0.0]), (np.zeros((8, 8, 3), np.uint8),))
    with serving(lambda *_: next(replies)) as server, Background() as background:
        eyes = captioner(server, background)
        found = [eyes([view], f"Describe {number}.", [[1]])[0][0] for number in range(3)]
        eyes.close()
    assert found == [Written(None, None), Written(None, None), Written("A cat.", None)]


def test_a_video_whose_request_failed_is_tried_again(tmp_path):
    folder = make_videos(tmp_path / "videos", 2)
    store = CaptionStore(tmp_path / "captions", {})

    def results(handle):
        with serving(handle) as server, Background() as background, closing(captioner(server, background)) as eyes:
            return [record for _, record in captioned(folder_videos(folder).items, eyes, PLAN, store)]

    assert all(isinstance(record, NoAnswer) for record in results(lambda *_: (400, {}, b"{}")))
    assert [len(record["candidates"]) for record in results(teller)] == [8, 8]


def test_from_videos_to_pairs_with_a_server_for_both(tmp_path):
    folder = make_videos(tmp_path / "videos", 3)

    def run(count):
        with serving(teller) as server, Background() as background:
            eyes = captioner(server, background, AnswerCache(tmp_path / "out" / "captioner.sqlite"))
            judge = OracleJudge(lambda question: [true_score(question.criterion, text) for text in question.captions])
            build(folder, tmp_path / "out", judge, eyes)
            assert server.count == count

    run(3 * (2 + 8) * 2)
    made = rows(tmp_path / "out")
    assert made[0]["provenance"]["settings"]["captioner"]["model"] == "eyes"
    seed = seed_of(0, made[0]["provenance"]["video"]["name"], 0)
    assert made[0]["provenance"]["candidates"][0]["draft"].startswith(f"Seed {seed} of 2 frames")
    assert check_pairs(tmp_path / "out").ok
    run(0)
    assert CERTAIN in made[0]["provenance"]["settings"]["captions"]["clip_instruction"]


def test_shrinking():
    assert Shrink(10)(np.zeros((20, 40, 3), np.uint8), 1).shape == (5, 10, 3)
    assert Shrink(40)(np.zeros((20, 40, 3), np.uint8), 1).shape == (20, 40, 3)
    assert Shrink(3)(np.zeros((1, 900, 3), np.uint8), 1).shape == (1, 3, 3)
    with pytest.raises(ValueError, match="max_side is 0"):
        Shrink(0)


def test_store_settings_are_compared_as_json(tmp_path):
    CaptionStore(tmp_path, {"a": (1, 2)})
    CaptionStore(tmp_path, json.loads('{"a": [1, 2]}'))
