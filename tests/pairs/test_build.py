"""From videos to pairs, through a judge on the loopback."""

import json
import threading
import time
from dataclasses import replace

import pytest

from synpo.caption import UnusableFrames
from synpo.judge import AnswerCache, ChatClient, ModelJudge, OracleJudge, ServerError, Spending, Weights
from synpo.pairs import captioning, check_pairs, load_pairs
from synpo.pairs.build import PairRule, build_pairs
from synpo.pairs.captioning import CaptionPlan, CaptionStore
from synpo.pairs.outputs import only_writer
from synpo.pairs.video_lists import VideoItem, VideoList, folder_videos
from synpo.video import decode
from tests.judge.loopback import CRITERIA, completion, judged, read_question, serving, true_score

from .making import PLAN, FakeCaptioner, make_video, make_videos

VIDEOS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("videos"), VIDEOS)


def model_judge(server, out, **options):
    of_client = {name: options.pop(name) for name in ("spending", "concurrency") if name in options}
    client = ChatClient("loopback", AnswerCache(out / "judge.sqlite"), url=server.url, retries=1, **of_client)
    return ModelJudge(client, **options)


def build(folder, out, judge, captioner=None, videos=None, plan=PLAN, rule=None):
    rule = rule or PairRule(min_score_gap=3.0)
    return build_pairs(videos or folder_videos(folder), captioner or FakeCaptioner(), judge, out, plan, rule)


def rows(out):
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]


def contents(out):
    names = ("pairs.jsonl", "parquet/pairs.parquet", "report/statistics.json", "report/statistics.html")
    return {name: (out / name).read_bytes() for name in names}


def true_total(text):
    factuality, fluency, consistency = (true_score(criterion, text) for criterion in CRITERIA.values())
    return round(1.1 * factuality + fluency + consistency, 6)


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    with serving() as server:
        result = build(folder, out, model_judge(server, out))
        count = server.count
    return out, result, count


def test_every_pair_is_the_best_and_the_worst_of_its_video(built, folder):
    out, result, count = built
    assert result.finished
    assert count == VIDEOS * 17
    made = rows(out)
    assert 0 < len(made) <= VIDEOS
    for row in made:
        candidates = row["provenance"]["candidates"]
        assert len(candidates) == 8
        totals = [true_total(candidate["caption"]) for candidate in candidates]
        assert [candidate["total"] for candidate in candidates] == totals
        assert (row["score_chosen"], row["score_rejected"]) == (max(totals), min(totals))
        assert row["chosen"][0]["content"] == candidates[totals.index(max(totals))]["caption"]
        assert row["rejected"][0]["content"] == candidates[totals.index(min(totals))]["caption"]
        assert row["score_chosen"] - row["score_rejected"] >= 3
        assert all(c["caption"].startswith(c["draft"]) and c["seed"] >= 0 for c in candidates)
        provenance = row["provenance"]
        assert provenance["video"]["times"][0] == 0
        assert len(provenance["video"]["sha256"]) == 64
        assert [len(provenance["clips"]), provenance["clips"][0]["start"]] == [2, 0]
        assert provenance["settings"]["judge"]["model"] == "loopback"
        assert provenance["settings"]["rule"]["weights"]["factuality"] == 1.1
        assert row["videos"] == [{"path": str(folder / provenance["video"]["name"])}]


def test_training_reads_both_files_and_the_check_passes(built):
    out, _, _ = built
    lines, parquet = load_pairs(out), load_pairs(out / "parquet")
    assert lines.remove_columns("source").to_list() == parquet.remove_columns("source").to_list()
    assert [part["type"] for part in lines[0]["prompt"][0]["content"]] == ["video", "text"]
    assert check_pairs(out, min_score_gap=3).ok
    assert check_pairs(out / "parquet").ok


def test_the_statistics_add_up(built):
    out, result, _ = built
    summary = json.loads((out / "report" / "statistics.json").read_text())
    lost = sum(reason["count"] for reason in summary["lost"].values())
    assert summary["videos"] == VIDEOS == summary["pairs"] + lost
    assert summary["pairs"] == len(rows(out)) == result.statistics.pairs
    assert summary["candidates"] == {
        "sampled": 8 * VIDEOS, "without a caption": 0, "judged": 8 * VIDEOS, "with a missing score": 0
    }  # fmt: skip
    for histogram in (*summary["scores"].values(), summary["totals"]):
        assert sum(histogram.values()) == 8 * VIDEOS
    assert sum(summary["gaps"].values()) == summary["lengths"]["all"]["pairs"] == VIDEOS
    assert summary["cost"] == {"tokens_read": 17 * VIDEOS * 100, "tokens_written": 17 * VIDEOS * 20, "cost": 0.0}
    page = (out / "report" / "statistics.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert f"{len(rows(out))} preference pairs from {VIDEOS} videos" in page


def test_a_second_run_writes_the_same_bytes_and_asks_nobody(built, folder):
    out, _, _ = built
    before = contents(out)
    captioner = FakeCaptioner()
    with serving() as server:
        build(folder, out, model_judge(server, out), captioner)
        assert (server.count, captioner.calls) == (0, 0)
    assert contents(out) == before


def test_texts_do_not_depend_on_the_other_videos(built, folder, tmp_path):
    out, _, _ = built
    with serving() as server:
        few = VideoList(folder_videos(folder).items[3:])
        build(folder, tmp_path, model_judge(server, tmp_path), videos=few)
    names = {item.name for item in few.items}
    expected = [row for row in rows(out) if row["provenance"]["video"]["name"] in names]
    assert rows(tmp_path) == expected


def test_a_missing_score_is_neither_chosen_nor_rejected(folder, tmp_path):
    """The judge never says how fluent the captions with "slowly" are, though they are the best or the worst of some."""

    def mute(body, headers):
        criterion, captions = read_question(body["messages"])
        if criterion.name == "fluency" and "slowly" in next(iter(captions.values())):
            return completion("score: 0")
        return judged(body, headers)

    with serving(mute) as server:
        judge = model_judge(server, tmp_path)
        build(folder, tmp_path, judge, rule=PairRule(min_score_gap=0.0))
    made = rows(tmp_path)
    assert made
    missing = 0
    for row in made:
        for candidate in row["provenance"]["candidates"]:
            assert (candidate["total"] is None) == ("slowly" in candidate["caption"]) == (candidate["fluency"] is None)
            missing += candidate["total"] is None
        assert "slowly" not in row["chosen"][0]["content"] + row["rejected"][0]["content"]
    assert missing
    summary = json.loads((tmp_path / "report" / "statistics.json").read_text())
    assert summary["scores"]["fluency"]["missing"] == summary["candidates"]["with a missing score"]
    assert summary["judge_problems"]["no object with scores"] == 3 * summary["scores"]["fluency"]["missing"]


def test_what_gives_no_pair_is_counted_and_named(folder, tmp_path):
    """A broken file, the same film twice, a film missing from a list, captions that fail, candidates all alike."""
    videos = tmp_path / "videos"
    for number in range(4):
        make_video(videos / f"{number}.mp4", number)
    (videos / "0 again.mp4").write_bytes((videos / "0.mp4").read_bytes())
    (videos / "broken.mp4").write_bytes(b"no video")
    found = folder_videos(videos)
    found.missing.append("gone.mp4")
    seeds = {}

    def fails(instruction, seed):
        return (seed is None and seeds.get("quiet")) or seed in seeds.get("mute", ())

    class Moody(FakeCaptioner):
        parallel = 1

        def __call__(self, views, instruction, given):
            start = float(views[0].images[0][0, 0, 0])
            seeds["quiet"] = given is None and 5 < start < 12  # 1.mp4: no clip caption
            seeds["mute"] = given[0][1:] if given and 12 <= start < 19 else ()  # 2.mp4: one candidate
            return super().__call__(views, instruction, given)

    judge = OracleJudge(lambda question: [len(text) % 4 for text in question.captions])
    result = build(videos, tmp_path / "out", judge, Moody(fails), found)
    lost = {reason: lost.first for reason, lost in result.statistics.lost.items() if reason != "score gap"}
    assert lost.pop("failed")[0].startswith("broken.mp4: ")
    assert lost == {
        "not in the folder": ["gone.mp4"],
        "same content as another video": ["0.mp4 is 0 again.mp4"],
        "no clip caption": ["1.mp4"],
        "fewer than two captions": ["2.mp4"],
    }
    assert result.statistics.candidates["without a caption"] == 0  # of the videos that were judged


def test_a_section_of_a_file_becomes_frames(folder, tmp_path):
    path = make_video(tmp_path / "long.mp4", 3, frames=48)
    items = [VideoItem(f"long.mp4@{a:g}-{b:g}", path, (a, b)) for a, b in ((0.0, 1.5), (1.5, 4.0))]
    asked = set()

    def oracle(question):
        asked.add(question.video)
        return [true_score(question.criterion, text) for text in question.captions]

    judge = OracleJudge(oracle)
    build(tmp_path, tmp_path / "out", judge, videos=VideoList(items), rule=PairRule(min_score_gap=0.0))
    assert {f"{path}#t=0,1.5", f"{path}#t=1.5,4"} == asked
    made = rows(tmp_path / "out")
    assert [row["provenance"]["video"]["section"] for row in made] == [[0.0, 1.5], [1.5, 4.0]]
    assert all(len(row["videos"][0]["frames"]) == 2 for row in made)
    assert check_pairs(tmp_path / "out").ok


def test_balanced_lengths(folder, tmp_path):
    """A judge who loves length: without balance each chosen caption is the longer one."""

    def loves_length(question):
        low = min(map(len, question.captions)) if len(question.captions) > 1 else 40
        return [min(question.criterion.high, max(0, (len(text) - low) // 7)) for text in question.captions]

    judge = OracleJudge(loves_length)
    build(folder, tmp_path / "all", judge, rule=PairRule(min_score_gap=0.1))
    result = build(folder, tmp_path / "some", judge, rule=PairRule(min_score_gap=0.1, balance_length=True))
    assert rows(tmp_path / "all")
    bias = {name: bias.summary() for name, bias in result.statistics.lengths.items()}
    assert bias["all"]["chosen_longer"] == 1
    assert bias["kept"] == {"pairs": 0}
    assert result.statistics.lost["length balance"].count == len(rows(tmp_path / "all"))
    assert rows(tmp_path / "some") == []
    assert (tmp_path / "some" / "parquet" / "pairs.parquet").exists()


def test_the_budget_ends_a_build_with_what_it_paid_for(folder, tmp_path):
    spending = Spending(price_in=10.0, price_out=10.0, budget=0.12)
    with serving() as server:
        judge = model_judge(server, tmp_path, spending=spending, max_tokens=100)
        result = build(folder, tmp_path, judge, rule=PairRule(min_score_gap=0.0))
        assert not result.finished
        assert spending.cost <= 0.12
        assert 0 < len(rows(tmp_path)) < VIDEOS
        assert result.statistics.lost["budget reached"].count == VIDEOS - len(rows(tmp_path))
        # With more money the same command goes on, and pays the rest alone.
        paid = server.count
        judge = model_judge(server, tmp_path, max_tokens=100)
        result = build(folder, tmp_path, judge, rule=PairRule(min_score_gap=0.0))
        assert result.finished
        assert len(rows(tmp_path)) == VIDEOS
        assert server.count == VIDEOS * 17 >= paid


def test_a_judge_that_cannot_be_used_stops_the_build_and_captions_stay(folder, tmp_path):
    with serving(lambda *_: (401, {}, b'{"error": {"message": "who are you?"}}')) as server:
        with pytest.raises(ServerError, match="who are you"):
            build(folder, tmp_path, model_judge(server, tmp_path))
        assert server.count < 40
    assert not (tmp_path / "pairs.jsonl").exists()
    assert not list(tmp_path.glob("*.spool"))
    captioner = FakeCaptioner()
    with serving() as server:
        build(folder, tmp_path, model_judge(server, tmp_path), captioner)
    assert captioner.calls < 2 * VIDEOS


def test_other_settings_need_another_folder(built, folder):
    out, _, _ = built
    judge = OracleJudge(lambda question: [0] * len(question.captions))
    with pytest.raises(ValueError, match=r"made with other settings \(captioner: .*fake.* then, .*other.* now\)"):
        build(folder, out, judge, FakeCaptioner(model="other"))
    with pytest.raises(ValueError, match=r"made with other settings \(plan"):
        build(folder, out, judge, plan=CaptionPlan(frames=PLAN.frames, seed=1))


def test_two_runs_cannot_write_to_one_folder(folder, tmp_path):
    judge = OracleJudge(lambda question: [0] * len(question.captions))
    with only_writer(tmp_path), pytest.raises(ValueError, match="another run is writing to"):
        build(folder, tmp_path, judge)
    build(folder, tmp_path, judge)


def test_a_damaged_record_is_named(folder, tmp_path):
    judge = OracleJudge(lambda question: [0] * len(question.captions))
    build(folder, tmp_path, judge)
    next((tmp_path / "captions").glob("*/*.json")).write_text("{")
    with pytest.raises(ValueError, match=r"json is no record of captions .* delete it to caption video"):
        build(folder, tmp_path, judge)


def test_a_video_that_changed_is_captioned_again(folder, tmp_path):
    videos = make_videos(tmp_path / "videos", 2)
    judge = OracleJudge(lambda question: [0] * len(question.captions))
    build(videos, tmp_path / "out", judge)
    make_video(videos / "video01.mp4", 5, frames=18)
    captioner = FakeCaptioner()
    build(videos, tmp_path / "out", judge, captioner)
    assert captioner.calls == 2


def test_bad_plans():
    for options, message in (({"candidates": 1}, "candidates is 1"), ({"instruction": " "}, "instruction is empty")):
        with pytest.raises(ValueError, match=message):
            CaptionPlan(**options)
    with pytest.raises(ValueError, match="the weight of fluency"):
        PairRule(Weights(fluency=-1))


def test_one_call_at_a_time_is_made_by_the_caller_while_one_video_is_decoded(folder, tmp_path, monkeypatch):
    """Two threads that call torch by turns are slower than one: each has a team of its own."""
    decoded = []

    def counted(path, *given, **named):
        decoded.append(path)
        return decode(path, *given, **named)

    class Alone(FakeCaptioner):
        parallel = 1

        def __call__(self, views, instruction, seeds):
            assert threading.get_ident() == caller
            video = self.calls // 2  # clips, then the whole
            end = time.monotonic() + 30
            while len(decoded) < min(video + 2, VIDEOS) and time.monotonic() < end:
                time.sleep(0.01)
            assert len(decoded) == min(video + 2, VIDEOS)
            return super().__call__(views, instruction, seeds)

    caller = threading.get_ident()
    monkeypatch.setattr(captioning, "decode", counted)
    store = CaptionStore(tmp_path / "captions", {})
    records = list(captioning.captioned(folder_videos(folder).items, Alone(), PLAN, store))
    assert [isinstance(record, dict) for _, record in records] == [True] * VIDEOS


def test_videos_captioned_together_give_the_same_pairs_and_fail_alone(built, folder, tmp_path):
    """Groups of four: the broken video is decoded in vain, another one spoils its group's call."""
    videos = tmp_path / "videos"
    make_videos(videos, VIDEOS)
    (videos / "video02 broken.mp4").write_bytes(b"no video")
    unfit = make_video(videos / "zz.mp4", 99)
    spoiled = decode(unfit, PLAN.frames).whole.images[0].tobytes()

    class Picky(FakeCaptioner):
        def __call__(self, views, instruction, seeds):
            if any(view.images[0].tobytes() == spoiled for view in views):
                raise UnusableFrames("frames of this size")
            return super().__call__(views, instruction, seeds)

    def oracle(question):
        return [true_score(question.criterion, text) for text in question.captions]

    captioner = Picky()
    result = build(videos, tmp_path / "out", OracleJudge(oracle), captioner, plan=replace(PLAN, together=4))
    lost = result.statistics.lost["failed"].first
    assert [line.partition(":")[0] for line in lost] == ["video02 broken.mp4", "zz.mp4"]
    assert captioner.calls == 2 + 2 * 3  # the first group at once; of the second each good video alone
    expected = {row["provenance"]["video"]["name"]: row["chosen"] for row in rows(built[0])}
    assert {row["provenance"]["video"]["name"]: row["chosen"] for row in rows(tmp_path / "out")} == expected

    stopped = CaptionStore(
        tmp_path / "out" / "captions", json.loads((tmp_path / "out/captions/settings.json").read_text())
    )
    items = folder_videos(videos).items
    stopped.file(items[1].name).unlink()
    again = FakeCaptioner()
    build(videos, tmp_path / "out", OracleJudge(oracle), again, VideoList(items[:4]), replace(PLAN, together=4))
    assert again.calls == 2  # the whole group, as before
