"""Captioning over the machines of a Ray cluster; judging and everything after it stay with the caller.

Each worker is an actor of Ray Data with a captioner of its own. It writes its records into the same folder as a run on
one machine does, which all machines have to share, and with the same texts: a text depends on its video and seed alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .captioning import Captioner, CaptionPlan, CaptionStore, Failure, Record, caption_group
from .video_lists import VideoItem


class _Worker:
    """Makes the captioner once, then records of videos."""

    def __init__(self, make: Callable[[], Captioner], plan: CaptionPlan, store: CaptionStore) -> None:
        self._captioner, self._plan, self._store = make(), plan, store

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        [result] = caption_group([row["item"]], self._captioner, self._plan, self._store)
        return {"position": row["position"], "failure": None if isinstance(result, dict) else str(result)}


class RayCaptioner:
    """Takes a captioner's place in `build_pairs`: as many captioners as there are workers.

    Args:
        make: makes a worker's captioner; it and what it holds are pickled.
        settings: of those captioners.
        workers: actors; cpus, gpus: what each of them takes of the cluster.

    Errors: ImportError without the extra `ray`; ValueError below 1 worker.
    """

    def __init__(
        self,
        make: Callable[[], Captioner],
        settings: Mapping[str, Any],
        workers: int,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; it has to be at least 1")
        try:
            import ray.data
        except ImportError:
            raise ImportError("captioning over a cluster needs Ray; install synpo[ray]") from None
        self.settings, self._make, self._ray = settings, make, ray
        self._resources = {"num_cpus": cpus, "num_gpus": gpus, "compute": ray.data.ActorPoolStrategy(size=workers)}

    def captioned(
        self, items: Sequence[VideoItem], plan: CaptionPlan, store: CaptionStore
    ) -> Iterator[tuple[VideoItem, Record | Failure]]:
        """As synpo.pairs.captioning.captioned, over the cluster that Ray finds (RAY_ADDRESS), else on this machine."""
        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False)
        self._ray.data.DataContext.get_current().execution_options.preserve_order = True  # pairs are in videos' order
        rows = [{"position": position, "item": item} for position, item in enumerate(items) if store.get(item) is None]
        pending = {row["position"] for row in rows}
        made = self._made(rows, plan, store) if rows else iter(())
        failures: dict[int, str] = {}
        for position, item in enumerate(items):
            while position in pending:
                done = next(made)
                pending.discard(done["position"])
                if done["failure"] is not None:
                    failures[done["position"]] = done["failure"]
            record = None if position in failures else store.get(item)
            if record is None:
                lost = "its worker has kept no record here; the folder has to be shared by all machines"
                yield item, OSError(failures.pop(position, lost))
            else:
                yield item, record

    def close(self) -> None:
        """Actors end with the data set that they worked for."""

    def _made(self, rows: list[dict[str, Any]], plan: CaptionPlan, store: CaptionStore) -> Iterator[dict[str, Any]]:
        made = self._ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Worker, fn_constructor_args=(self._make, plan, store), **self._resources
        )
        return iter(made.iter_rows())
