"""Published lists as sources of videos: small files in the layouts of the datasets."""

import json

import pytest

from synpo.pairs.video_lists import VideoItem, folder_videos, listed_videos


@pytest.fixture
def folder(tmp_path):
    names = (
        "a.mp4", "sub/b.MKV", "panda/aD2nPqcd.mp4", "YSKX3.mp4", "Ptf_2VRj-V0_000122_000132.mp4", "video2118.mp4",
        "notes.txt", ".hidden/c.mp4", "sub/.d.mp4",
    )  # fmt: skip
    for name in names:
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "videos"


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_folder(folder, tmp_path):
    names = [item.name for item in folder_videos(folder).items]
    assert names == sorted(names)
    assert {"a.mp4", "sub/b.MKV"} < set(names)
    assert not any("txt" in name or name.startswith((".", "sub/.")) for name in names)
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "no video in it"), (tmp_path / "none", "no such folder")):
        with pytest.raises(FileNotFoundError, match=message):
            folder_videos(path)


SHAREGPT4VIDEO = {
    "video_id": "aD2nPqcd", "video_path": "panda/aD2nPqcd.mp4", "timestamp": ["00:00:02.0"], "keyframe": [0, 48],
    "captions": [{"idx": "-1", "content": "A dog."}], "zip_folder": "panda_videos_1.zip",
}  # fmt: skip
CHARADES = (
    "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\r\n"
    'YSKX3,F4N4,Kitchen,6,7,Yes,"A person opens\na door.",door,"One, two.",c008 0.0 5.2;c059 4.1 9.0,31.5\r\n'
    "GONE1,A,B,1,2,Yes,x,y,z,,30\r\n"
)
PANDA = (
    "videoID,url,timestamp,caption,matching_score\n"
    "aD2nPqcd,https://www.youtube.com/watch?v=aD2nPqcd,"
    "\"[['0:00:16.300', '0:00:25.500'], ['1:02:03', '1:02:04.25']]\",\"['A dog.', 'A cat.']\",\"[0.4, 0.5]\"\n"
    "missing01,u,\"[['0:00:01', '0:00:02']]\",\"['x']\",[0.1]\n"
)
MSR_VTT = {
    "info": {"year": "2016"},
    "videos": [
        {"category": 9, "url": "u", "video_id": "video2118", "start time": 137.7, "end time": 149.4, "split": "train"},
        {"category": 9, "url": "u", "video_id": "video9", "start time": 1, "end time": 2, "split": "train"},
    ],
    "sentences": [{"caption": "a car", "video_id": "video2118", "sen_id": 0}],
}
VATEX = [
    {"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["A man."] * 10, "chCap": ["x"] * 10},
    {"videoID": "none_000001_000011", "enCap": [], "chCap": []},
]


@pytest.mark.parametrize(
    ("name", "content", "found", "missing"),
    [
        ("sharegpt4video_40k.jsonl", json.dumps(SHAREGPT4VIDEO) + "\n", ["panda/aD2nPqcd.mp4"], []),
        ("share-captioner.json", [SHAREGPT4VIDEO, {"video_path": "x/y.mp4"}], ["panda/aD2nPqcd.mp4"], ["x/y.mp4"]),
        ("Charades_v1_train.csv", CHARADES, ["YSKX3.mp4"], ["GONE1"]),
        ("vatex_training_v1.0.json", VATEX, ["Ptf_2VRj-V0_000122_000132.mp4"], ["none_000001_000011"]),
        ("train_val_videodatainfo.json", MSR_VTT, ["video2118.mp4"], ["video9"]),
        (
            "panda70m_testing.csv",
            PANDA,
            ["panda/aD2nPqcd.mp4@16.3-25.5", "panda/aD2nPqcd.mp4@3723-3724.25"],
            ["missing01@1-2"],
        ),
    ],
)
def test_lists_as_published(folder, tmp_path, name, content, found, missing):
    videos = listed_videos(write(tmp_path / name, content), folder)
    assert [item.name for item in videos.items] == found
    assert videos.missing == missing
    assert all(item.path.is_file() for item in videos.items)


def test_time_stamps_are_seconds(folder, tmp_path):
    [first, second] = listed_videos(write(tmp_path / "p.csv", PANDA), folder).items
    path = folder / "panda" / "aD2nPqcd.mp4"
    assert first == VideoItem("panda/aD2nPqcd.mp4@16.3-25.5", path, (16.3, 25.5))
    assert second.section == (3723.0, 3724.25)


@pytest.mark.parametrize(
    ("name", "content", "layout", "message"),
    [
        ("x.csv", "a,b\n1,2\n", "auto", "is neither panda-70m nor charades"),
        ("x.json", {"a": 1}, "auto", "none of the known layouts"),
        ("x.json", "{", "auto", "malformed JSON"),
        ("x.json", [], "vatex", "no video in this list"),
        ("x.json", [{"videoID": 3}], "vatex", "x.json record 1: text under 'videoID'"),
        ("x.json", {"videos": 3}, "msr-vtt", "a list of videos is needed"),
        ("x.json", [], "msr-vtt", "an object with 'videos'"),
        ("x.jsonl", '{"video_path": "a.mp4"}\n[]\n', "auto", "x.jsonl:2: text under 'video_path'"),
        (
            "x.csv",
            "videoID,timestamp\nv,\"[['0:00:09', '0:00:08']]\"\n",
            "auto",
            "x.csv:2: a time span from 9 s to 8 s",
        ),
        ("x.csv", "videoID,timestamp\nv,__import__('os')\n", "auto", "x.csv:2: timestamp .* is no list"),
        ("x.csv", "videoID,timestamp\nv,\n", "auto", "x.csv:2: videoID, timestamp: one of them is empty"),
        ("x.csv", "videoID,timestamp\nv,x\n", "charades", "no column 'id'"),
        ("x.csv", "videoID,timestamp\nv,x\n", "coco", "layout is 'coco'"),
    ],
)
def test_lists_that_are_not_as_published(folder, tmp_path, name, content, layout, message):
    with pytest.raises(ValueError, match=message):
        listed_videos(write(tmp_path / name, content), folder, layout)


def test_names_that_fit_several_files(folder, tmp_path):
    (folder / "sub" / "YSKX3.mp4").touch()
    with pytest.raises(ValueError, match=r"'YSKX3' fits several files: YSKX3.mp4, sub/YSKX3.mp4"):
        listed_videos(write(tmp_path / "c.csv", CHARADES), folder)
