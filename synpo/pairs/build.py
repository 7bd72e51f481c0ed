"""From videos to preference pairs: caption, judge, choose, filter, write.

Captioning and judging run side by side. Captions are kept a file each, answers of a judge in its cache, and everything
after them is made again at every run, from those: so a run that was stopped anywhere goes on, and ends in the same
bytes as one that was not.
"""

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..judge import BudgetReached, Judge, Judgement, ModelJudge, Weights, judge_candidates
from ..judge.background import Background
from .captioning import Captioner, CaptionPlan, CaptionStore, Failure, Record, captioned
from .choosing import Lengths, choose, unbalanced
from .filters import PairFilters
from .outputs import Spool, only_writer, write_pairs, write_statistics
from .ray_captions import RayCaptioner
from .schema import normalise_pair
from .statistics import Statistics
from .video_lists import VideoItem, VideoList

_AHEAD = 64  # videos whose judging may be under way

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairRule:
    """Which pairs are made of scores.

    Attributes:
        weights: of the criteria in a candidate's total.
        min_score_gap: least difference between the totals of chosen and rejected.
        balance_length: drop pairs until the chosen answer is the longer one as often as the shorter one.
    """

    weights: Weights = Weights()  # noqa: RUF009 - frozen
    min_score_gap: float = 4.0
    balance_length: bool = False


@dataclass(frozen=True)
class BuildResult:
    """What a build came to. finished: every video was judged; the budget may end it before."""

    statistics: Statistics
    finished: bool


def build_pairs(
    videos: VideoList,
    captioner: Captioner | RayCaptioner,
    judge: Judge,
    out: Path,
    plan: CaptionPlan = CaptionPlan(),  # noqa: B008 - frozen
    rule: PairRule = PairRule(),
    background: Background | None = None,
) -> BuildResult:
    """Write the pairs of these videos into the folder `out`; see synpo.pairs.outputs for its files.

    background: where the judge's requests run; None: in a loop of this call's own. Captioner and judge are closed.

    Raises:
        ServerError: the judge or captioner cannot be used; what was done is kept for the next run.
        ValueError: `out` holds captions made with other settings, or another run is writing there.
    """
    store = CaptionStore(out / "captions", {"captioner": dict(captioner.settings), "plan": plan.settings()})
    settings = {
        "synpo": version("synpo"),
        "captioner": dict(captioner.settings),
        "captions": plan.settings(),
        "judge": judge.settings,
        "rule": asdict(rule),
    }
    statistics = Statistics()
    statistics.videos = len(videos.items) + len(videos.missing)
    for name in videos.missing:
        statistics.lose("not in the folder", name)
    maker = _RowMaker(statistics, rule, settings)
    lengths: list[Lengths] = []
    finished = True
    with (
        closing(captioner),
        only_writer(out),
        closing(_captions(captioner, videos.items, plan, store)) as made,
        closing(_judged(made, judge, plan.instruction, background)) as judged,
        Spool(out) as spool,
        tqdm(total=len(videos.items), desc="videos", unit=" videos", disable=None) as progress,
    ):
        for position, (item, record, verdict) in enumerate(judged):
            progress.update()
            if isinstance(verdict, BudgetReached):
                finished = False
                logger.warning("%s", verdict)
                for unjudged in videos.items[position:]:
                    statistics.lose("budget reached", unjudged.name)
                break
            row = maker.row(item, record, verdict)
            if row is not None:
                spool.add(row)
                lengths.append(Lengths(*(len(row[side][0]["content"]) for side in ("chosen", "rejected")), item.name))
        dropped = unbalanced(lengths) if rule.balance_length else set()
        for index, pair in enumerate(lengths):
            if index in dropped:
                statistics.lose("length balance", pair.name)
            else:
                statistics.kept(pair.chosen, pair.rejected)
        write_pairs(out, spool.rows(without=dropped))
    summary = {**statistics.summary(), **_judge_summary(judge), "settings": settings}
    write_statistics(out, summary)
    return BuildResult(statistics, finished)


def _captions(
    captioner: Captioner | RayCaptioner, items: Sequence[VideoItem], plan: CaptionPlan, store: CaptionStore
) -> Generator[tuple[VideoItem, Record | Failure], None, None]:
    if isinstance(captioner, RayCaptioner):
        yield from captioner.captioned(items, plan, store)
    else:
        yield from captioned(items, captioner, plan, store)


def _judge_summary(judge: Judge) -> dict[str, Any]:
    problems = dict(sorted(judge.problems.items()))
    if not isinstance(judge, ModelJudge):
        return {"judge_problems": problems}
    failures = {f"request failed: {kind}": count for kind, count in sorted(judge.client.failures.items())}
    spending = judge.client.spending
    cost = {"tokens_read": spending.prompt_tokens, "tokens_written": spending.completion_tokens, "cost": spending.cost}
    return {"judge_problems": problems | failures, "cost": cost}


Verdict = Judgement | Failure | str | BudgetReached


def _judged(
    made: Iterable[tuple[VideoItem, Record | Failure]], judge: Judge, instruction: str, background: Background | None
) -> Iterator[tuple[VideoItem, Record, Verdict]]:
    """Each video in order with its judgement, or with why it has none: an error, or a reason in words."""
    waiting: deque[tuple[VideoItem, Record, Future[Judgement] | Failure | str]] = deque()
    seen: dict[str, str] = {}  # content -> the first video with it

    def ready() -> tuple[VideoItem, Record, Verdict]:
        item, record, pending = waiting.popleft()
        if not isinstance(pending, Future):
            return item, record, pending
        try:
            return item, record, pending.result()
        except BudgetReached as stop:
            return item, record, stop

    own = background or Background()
    try:
        for item, record in made:
            pending: Future[Judgement] | Failure | str
            if not isinstance(record, dict):
                record, pending = {}, record
            elif (problem := _unfit(record, seen)) is not None:
                pending = problem
            else:
                texts = [candidate["caption"] for candidate in _written(record)]
                references = [clip["caption"] for clip in record["clips"] if clip["caption"]]
                pending = own.submit(judge_candidates(judge, instruction, texts, references, _address(record)))
            waiting.append((item, record, pending))
            while waiting and (len(waiting) > _AHEAD or _settled(waiting[0][2])):
                yield ready()
        while waiting:
            yield ready()
    finally:
        own.run(judge.close())  # answers under way are paid: they go to the cache first
        if background is None:
            own.__exit__()


def _address(record: Record) -> str:
    """What an oracle knows a video by: its path, for a section with the seconds as a media fragment."""
    return record["path"] + ("" if record["section"] is None else "#t={:g},{:g}".format(*record["section"]))


def _settled(pending: Any) -> bool:
    return not isinstance(pending, Future) or pending.done()


def _unfit(record: Record, seen: dict[str, str]) -> str | None:
    """Why a video's captions cannot become a pair, before anything is paid for them."""
    content = f"{record['sha256']} {record['section']}"
    if content in seen:
        return f"same content as another video: {record['name']} is {seen[content]}"
    seen[content] = record["name"]
    if not any(clip["caption"] for clip in record["clips"]):
        return "no clip caption"
    return "fewer than two captions" if len(_written(record)) < 2 else None


def _written(record: Record) -> list[dict[str, Any]]:
    return [candidate for candidate in record["candidates"] if candidate["caption"]]


class _RowMaker:
    """Judged captions to rows; what becomes of each is counted."""

    def __init__(self, statistics: Statistics, rule: PairRule, settings: dict[str, Any]) -> None:
        self._statistics, self._rule, self._settings = statistics, rule, settings
        self._filters = PairFilters(rule.min_score_gap)

    def row(self, item: VideoItem, record: Record, verdict: Any) -> dict[str, Any] | None:
        """The pair of a video with its provenance; None, counted, where there is none."""
        statistics = self._statistics
        if isinstance(verdict, Exception):
            logger.warning("%s: %s", item.name, verdict)
            statistics.lose("failed", f"{item.name}: {verdict}")
            return None
        if isinstance(verdict, str):
            reason, _, detail = verdict.partition(": ")
            statistics.lose(reason, detail or item.name)
            return None
        written = _written(record)
        statistics.candidates["sampled"] += len(record["candidates"])
        statistics.candidates["without a caption"] += len(record["candidates"]) - len(written)
        totals = [self._rule.weights.total(scores) for scores in verdict.scores]
        statistics.judged([candidate["caption"] for candidate in written], verdict, totals)
        choice = choose(totals)
        if choice is None:
            statistics.lose("fewer than two scored captions", item.name)
            return None
        row = self._row(record, written, verdict, totals, choice.chosen, choice.rejected)
        texts = [written[index]["caption"] for index in choice]
        statistics.paired(row["score_chosen"] - row["score_rejected"], *map(len, texts))
        reason = self._filters.dropped_by(normalise_pair(row, item.name))
        if reason is not None:
            statistics.lose(reason, item.name)
            return None
        return row

    def _row(
        self,
        record: Record,
        written: list[dict[str, Any]],
        verdict: Judgement,
        totals: list[float | None],
        chosen: int,
        rejected: int,
    ) -> dict[str, Any]:
        candidates = [
            {**candidate, **scores._asdict(), "total": total}
            for candidate, scores, total in zip(written, verdict.scores, totals, strict=True)
        ]
        video = {key: record[key] for key in ("name", "section", "bytes", "sha256", "duration", "times", "damaged")}
        question = self._settings["captions"]["instruction"]
        return {
            "prompt": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
            "chosen": [{"role": "assistant", "content": written[chosen]["caption"]}],
            "rejected": [{"role": "assistant", "content": written[rejected]["caption"]}],
            "videos": [{"frames": record["images"]} if record["images"] else {"path": record["path"]}],
            "score_chosen": totals[chosen],
            "score_rejected": totals[rejected],
            "provenance": {
                "video": video,
                "clips": record["clips"],
                "candidates": candidates,
                "chosen": chosen,
                "rejected": rejected,
                "settings": self._settings,
            },
        }
