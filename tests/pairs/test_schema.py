"""The normalised pair: what it holds, what is refused, and that normalising twice changes nothing."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from synpo.pairs import PAIR_FEATURES, PairError, normalise_pair

USER, ANSWER, WORSE = (
    [{"role": "user", "content": "Who?"}],
    [{"role": "assistant", "content": "Ann."}],
    [{"role": "assistant", "content": "Bob."}],
)


def pair(**columns):
    return {"prompt": USER, "chosen": ANSWER, "rejected": WORSE} | columns


def test_plain_strings_become_messages():
    expected = pair(images=[], videos=[], score_chosen=None, score_rejected=None, source="here")
    assert normalise_pair({"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob."}, "here") == expected
    assert normalise_pair(pair(), "here") == expected


def test_text_parts_are_joined_to_a_string():
    content = [{"type": "text", "text": "Who"}, {"type": "text", "text": "?", "image": None}]
    assert normalise_pair(pair(prompt=[{"role": "user", "content": content}]))["prompt"] == USER


@pytest.mark.parametrize(
    ("content", "columns", "expected"),
    [
        ("Look <image>then<video>now", {"images": ["a.png"], "videos": ["b.mp4"]}, "text image text video text"),
        ("Look", {"images": ["a.png", "c.png"], "videos": ["b.mp4"]}, "image image video text"),
        ("<video>", {"videos": ["b.mp4"]}, "video"),
        ("", {"videos": ["b.mp4"]}, "video"),
        ([{"type": "video"}, {"type": "text", "text": "<image>"}], {"videos": ["b.mp4"]}, "video text"),
        (
            [{"type": "video"}, {"type": "text", "text": "A"}],
            {"videos": "b.mp4", "images": "a.png"},
            "image video text",
        ),
        ([{"type": "video", "video": "b.mp4"}, {"type": "text", "text": "A"}], {}, "video text"),
        ([{"type": "image", "url": "http://x/a.png"}], {}, "image"),
    ],
)
def test_media_parts(content, columns, expected):
    result = normalise_pair(pair(prompt=[{"role": "user", "content": content}], **columns))
    parts = result["prompt"][0]["content"]
    assert " ".join(part["type"] for part in parts) == expected
    assert len(result["images"]) == expected.count("image")
    assert len(result["videos"]) == expected.count("video")


def test_media_go_to_the_first_user_message():
    prompt = [{"role": "system", "content": "S"}, *USER, *ANSWER, *USER]
    result = normalise_pair(pair(prompt=prompt, videos=["b.mp4"]))["prompt"]
    assert [isinstance(message["content"], list) for message in result] == [False, True, False, False]


def test_a_tag_without_media_stays_text():
    assert normalise_pair(pair(prompt="The <video> element", chosen="a", rejected="b"))["prompt"][0]["content"] == (
        "The <video> element"
    )


@pytest.mark.parametrize(
    ("video", "expected"),
    [
        ("a.mp4", {"path": "a.mp4", "bytes": None, "frames": None}),
        (b"x", {"path": None, "bytes": b"x", "frames": None}),
        (["1.png", "2.png"], {"path": None, "bytes": None, "frames": ["1.png", "2.png"]}),
        ({"path": "old.mp4", "bytes": b"x"}, {"path": None, "bytes": b"x", "frames": None}),
    ],
)
def test_forms_of_a_video(video, expected):
    assert normalise_pair(pair(videos=[video]))["videos"] == [expected]


@pytest.mark.parametrize(
    ("columns", "column", "words"),
    [
        ({"rejected": None}, None, "missing or null: rejected; columns found: chosen, prompt"),
        ({"prompt": "Who?"}, "chosen", "a conversation, but the prompt is a plain string"),
        ({"rejected": "Bob."}, "rejected", "a plain string, but the prompt is a conversation"),
        ({"prompt": 3}, "prompt", "got a int"),
        ({"prompt": []}, "prompt", "an empty list"),
        ({"prompt": ["Who?"]}, "prompt", "message 0: expected a dict, got a str"),
        ({"prompt": [{"role": "human", "content": "x"}]}, "prompt", "role 'human' is none of system, user"),
        ({"prompt": [{"role": [], "content": "x"}]}, "prompt", "role [] is none of"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt", "message 0: no 'content'"),
        ({"prompt": [{"role": "user", "content": 5}]}, "prompt", "message 0: content must be a string or a list"),
        ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, "prompt", "part 0: type 'audio' is none of"),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "prompt", "part 0: expected text"),
        ({"prompt": [*USER, *ANSWER]}, "prompt", "the last message is the assistant's"),
        ({"prompt": [*USER, {"role": "system", "content": "S"}, *USER]}, "prompt", "message 1: a system message must"),
        ({"chosen": [*USER, *ANSWER]}, "chosen", "expected one assistant message, got: user, assistant"),
        ({"rejected": USER}, "rejected", "expected one assistant message, got: user"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, "chosen", "text only"),
        ({"chosen": [ANSWER[0] | {"tool_calls": [1]}]}, "chosen", "'tool_calls' is not supported"),
        ({"chosen": [ANSWER[0] | {"reasoning_content": "hm"}]}, "chosen", "'reasoning_content' is not supported"),
        ({"rejected": [{"role": "assistant", "content": "\ud83d"}]}, "rejected", "surrogate"),
        ({"images": ["a.png"], "prompt": [{"role": "user", "content": "<image><image>"}]}, "images", "1 given"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "videos", "0 given, but the prompt has 1"),
        ({"images": [3]}, "images", "item 0: a image is a path"),
        ({"videos": [{"path": "a", "frames": ["b"]}]}, "videos", "item 0"),
        ({"videos": [[1]]}, "videos", "item 0"),
        ({"videos": [""]}, "videos", "item 0"),
        (
            {"videos": ["a"], "prompt": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]},
            "videos",
            "given here and inside",
        ),
        ({"score_chosen": "4"}, "score_chosen", "expected a number or null, got '4'"),
        ({"score_chosen": True}, "score_chosen", "got True"),
        ({"score_rejected": float("nan")}, "score_rejected", "nan is not a score"),
        ({"score_rejected": 10**400}, "score_rejected", "not a score"),
        ({"tools": [{"name": "f"}]}, "tools", "not supported"),
        ({"video": "a.mp4"}, "video", "rename it to 'videos'"),
    ],
)
def test_errors_name_the_place_the_column_and_the_problem(columns, column, words):
    with pytest.raises(PairError) as caught:
        normalise_pair(pair(**columns), "f.jsonl:7")
    assert (caught.value.where, caught.value.column) == ("f.jsonl:7", column)
    assert str(caught.value).startswith("f.jsonl:7: ")
    assert words in str(caught.value)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["42", "null", '"x"', '{"a": 1}', "[1]", "<image>", "a<video>b", "  ", "\u2028"]
)
PARTS = st.lists(
    st.builds(lambda text: {"type": "text", "text": text}, TEXT)
    | st.sampled_from([{"type": "image", "path": "a.png"}, {"type": "video", "video": "b.mp4"}, {"type": "image"}]),
    max_size=4,
)
PROMPTS = st.builds(
    lambda system, turns, last: [*system, *(m for user, reply in turns for m in (user, reply)), last],
    st.lists(st.builds(lambda c: {"role": "system", "content": c}, TEXT), max_size=1),
    st.lists(
        st.tuples(
            st.builds(lambda c: {"role": "user", "content": c}, TEXT | PARTS),
            st.builds(lambda c: {"role": "assistant", "content": c}, TEXT),
        ),
        max_size=2,
    ),
    st.builds(lambda c: {"role": "user", "content": c}, TEXT | PARTS),
)
PAIRS = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "chosen": st.builds(lambda c: [{"role": "assistant", "content": c}], TEXT),
        "rejected": st.builds(lambda c: [{"role": "assistant", "content": c}], TEXT),
    },
    optional={
        "images": st.lists(st.sampled_from(["a.png", b"png"]), max_size=2),
        "videos": st.lists(st.sampled_from(["a.mp4", b"mp4", ["1.png", "2.png"]]), max_size=2),
        "score_chosen": st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 5),
    },
)


def attempt(record):
    try:
        return normalise_pair(record, "f:1")
    except PairError as error:
        return error


def text_without_tags(message):
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return text.replace("<image>", "").replace("<video>", "")


@settings(max_examples=150, deadline=None)
@given(PAIRS)
def test_normalising_twice_changes_nothing_and_the_dataset_gives_back_what_it_got(record):
    once = attempt(record)
    if isinstance(once, PairError):
        assert once.column in ("images", "videos")  # the generated numbers of media may disagree; all else is right
        return
    assert normalise_pair(once, "f:1") == once
    assert Dataset.from_list([once], features=PAIR_FEATURES)[0] == once
    assert [text_without_tags(m) for m in once["prompt"]] == [text_without_tags(m) for m in record["prompt"]]
    assert (once["chosen"], once["rejected"]) == (record["chosen"], record["rejected"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "image", "path", "frames"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*PAIR_FEATURES, "tools"]), JSON), st.booleans())
def test_any_json_is_a_pair_or_a_pair_error(record, complete):
    result = attempt(pair() | record if complete else record)
    assert result.where == "f:1" if isinstance(result, PairError) else set(result) == set(PAIR_FEATURES)
