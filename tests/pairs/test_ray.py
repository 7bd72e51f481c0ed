"""Captioning over Ray Data on a local Ray: the same bytes as on one machine."""

import shutil

import pytest

from synpo import cli
from synpo.judge import OracleJudge
from synpo.pairs.ray_captions import RayCaptioner
from synpo.pairs.video_lists import folder_videos
from tests.caption import tiny
from tests.judge.loopback import true_score

from .making import FakeCaptioner, make_videos
from .test_build import build, contents, rows
from .test_command import ORACLE, SMALL

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def oracle():
    return OracleJudge(lambda question: [true_score(question.criterion, text) for text in question.captions])


def test_the_same_pairs_as_on_one_machine(tmp_path):
    folder = make_videos(tmp_path / "videos", 5)
    (folder / "broken.mp4").write_bytes(b"no video")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        build(folder, tmp_path / "one", oracle())
        many = RayCaptioner(FakeCaptioner, FakeCaptioner().settings, workers=2)
        result = build(folder, tmp_path / "many", oracle(), many)
        assert contents(tmp_path / "many") == contents(tmp_path / "one")
        assert len(rows(tmp_path / "many")) > 0
        assert result.statistics.lost["failed"].count == 1
        # Records that are there are not made again, and a lost one is.
        record = next((tmp_path / "many" / "captions").glob("*/*.json"))
        record.unlink()
        others = {path: path.stat().st_mtime_ns for path in (tmp_path / "many" / "captions").glob("*/*.json")}
        build(folder, tmp_path / "many", oracle(), RayCaptioner(FakeCaptioner, FakeCaptioner().settings, workers=1))
        assert record.exists()
        assert all(path.stat().st_mtime_ns == time for path, time in others.items())
        assert contents(tmp_path / "many") == contents(tmp_path / "one")
        assert len(folder_videos(folder).items) == 6
    finally:
        ray.shutdown()
        shutil.rmtree(tmp_path / "many")


def test_the_command_with_a_model(tmp_path):
    """Each worker loads the model itself."""
    folder = make_videos(tmp_path / "videos", 2)
    tiny.save_llava(tmp_path / "model")
    words = ["pairs", "--videos", str(folder), "--model", str(tmp_path / "model"), "--judge", ORACLE, *SMALL]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert cli.main([*words, "--out", str(tmp_path / "one")]) == 0
        assert cli.main([*words, "--out", str(tmp_path / "many"), "--ray", "2"]) == 0
        assert contents(tmp_path / "many") == contents(tmp_path / "one")
    finally:
        ray.shutdown()


def test_workers():
    with pytest.raises(ValueError, match="workers is 0"):
        RayCaptioner(FakeCaptioner, {}, workers=0)
