"""`synpo caption` in process and killed: files, folders and patterns; resume; bad files; bad options."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from synpo import cli
from synpo.caption import Captioner, UnusableFrames, load_captioner
from synpo.caption.files import video_files
from synpo.caption.records import seeds_of
from synpo.run_files import drop_torn_line
from tests.caption import tiny
from tests.video.films import film, sound


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny LLaVA, and three videos, a file without one, and a file that is none."""
    folder = tmp_path_factory.mktemp("captions")
    tiny.save_llava(folder / "model")
    films = folder / "films"
    (films / "more").mkdir(parents=True)
    for number, name in enumerate(["a.mp4", "b.mp4", "more/c.mkv"]):
        container = "matroska" if name.endswith("mkv") else "mp4"
        (films / name).write_bytes(film(container, frames=6 + number))
    (folder / "sound.mp4").write_bytes(sound())
    (folder / "notes.mp4").write_text("no video")
    return folder


@pytest.fixture
def options(world: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(world / "model"),
        "out": str(tmp_path / "out" / "captions.jsonl"),
        "max_new_tokens": 5,
        "candidates": 2,
        "temperature": 0.9,
    }


def words(options: dict[str, Any], *videos: Path | str) -> list[str]:
    return [
        "caption",
        *map(str, videos),
        *(text for name, value in options.items() for text in (f"--{name}", str(value))),
    ]


def lines(options: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(options["out"]).read_text().splitlines()]


def test_a_folder_of_videos(world: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(options, world / "films")) == 0
    assert capsys.readouterr().out == f"3 of 3 videos captioned; {options['out']}\n"
    found = lines(options)
    names = [str(world / "films" / name) for name in ("a.mp4", "b.mp4", "more/c.mkv")]
    assert [record["video"] for record in found] == names
    first = found[0]
    assert first["duration"] == 0.6
    assert len(first["times"]) == 6
    assert first["settings"] == {
        "model": options["model"], "instruction": first["settings"]["instruction"], "contrast": "third",
        "candidates": 2, "retrospective": 1, "seed": 0, "temperature": 0.9, "top_p": 0.9, "top_k": 32, "alpha": 0.5,
        "plausibility": 0.0, "max_new_tokens": 5, "stop": [], "num_frames": None, "fps": 0.5, "min_frames": 8,
        "max_frames": 16, "dtype": None, "videos_together": 1,
    }  # fmt: skip
    assert set(first["versions"]) == {"synpo", "torch", "transformers"}
    assert [caption["seed"] for caption in first["captions"]] == seeds_of(0, names[0], 2)
    for caption in first["captions"]:
        assert caption["tokens"] == 5
        assert (caption["finish"], caption["failure"]) == ("length", None)
        assert caption["logp"] < 0
        assert caption["model_logp"] < 0
        assert len(caption["drafts"]) == 1
    assert len({caption["text"] for record in found for caption in record["captions"]}) == 6


def test_what_is_done_is_not_done_again_and_a_line_cut_off_is(
    world: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(options, world / "films")) == 0
    out = Path(options["out"])
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (first, first + 40, len(whole) - 1):
        out.write_bytes(whole[:cut])
        assert cli.main(words(options, world / "films")) == 0
        assert out.read_bytes() == whole
    monkeypatch.setattr("synpo.caption.command.load_captioner", lambda *_, **__: pytest.fail("nothing is left to do"))
    assert cli.main(words(options, world / "films")) == 0
    assert cli.main(words(options | {"batch_size": 2}, world / "films" / "a.mp4")) == 0
    capsys.readouterr()
    assert cli.main(words(options | {"seed": 1}, world / "films")) == 2
    assert "holds captions made with other settings (seed: 0 then, 1 now); choose another --out" in (
        capsys.readouterr().err
    )


def test_a_run_that_is_killed_goes_on(world: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """Killed for real, right after its first line is on disk; the finished file is an undisturbed run's."""
    killed = options | {"out": str(tmp_path / "killed.jsonl")}
    program = (
        "import os, signal, sys\n"
        "from synpo import cli\n"
        "from synpo.caption import command\n"
        "append = command.append_json_line\n"
        "def once(path, record):\n"
        "    append(path, record)\n"
        "    with path.open('a') as file:\n"
        '        file.write(\'{"video": "torn\')\n'
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "command.append_json_line = once\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words(killed, world / "films")],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # a sum's order is the threads'
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert cli.main(words(killed, world / "films")) == 0
    assert cli.main(words(options, world / "films")) == 0
    assert Path(killed["out"]).read_bytes() == Path(options["out"]).read_bytes()


def test_bad_files_are_reported_and_skipped(
    world: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [world / "notes.mp4", world / "sound.mp4", world / "absent.mp4"]
    assert cli.main(words(options, world / "films" / "a.mp4", *bad, world / "films" / "b.mp4")) == 1
    shown = capsys.readouterr()
    assert "2 of 5 videos captioned" in shown.out
    for file, reason in zip(bad, ("cannot be read as a video", "has no video stream", "does not exist"), strict=True):
        (line,) = (line for line in shown.err.splitlines() if str(file) in line)
        assert line.startswith(f"synpo caption: {file}: {reason}")
        assert line.endswith("; skipped")
    assert [Path(record["video"]).name for record in lines(options)] == ["a.mp4", "b.mp4"]


def told(options: dict[str, Any]) -> dict[str, list[str]]:
    return {Path(line["video"]).name: [caption["text"] for caption in line["captions"]] for line in lines(options)}


def test_videos_together_get_the_captions_that_they_get_alone(
    world: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    captions = Captioner.captions

    def counted(self: Captioner, views: Any, *given: Any, **named: Any) -> Any:
        calls.append(len(views))
        return captions(self, views, *given, **named)

    monkeypatch.setattr(Captioner, "captions", counted)
    assert cli.main(words(options, world / "films")) == 0
    assert calls == [1, 1, 1]
    both = options | {"out": str(tmp_path / "together.jsonl"), "videos_together": 2}
    assert cli.main(words(both, world / "films")) == 0
    assert calls[3:] == [2, 1]
    assert told(both) == told(options)
    # A group that was stopped is made as a whole, and gets the missing line alone.
    out = Path(both["out"])
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.index(b"\n") + 1])
    assert cli.main(words(both, world / "films")) == 0
    assert calls[5:] == [2, 1]
    assert out.read_bytes() == whole
    assert cli.main(words(both | {"videos_together": 3}, world / "films")) == 2


def test_a_bad_video_does_not_spoil_its_group(
    world: Path,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "odd.mp4").write_bytes(film(frames=6, size=(32, 32)))
    films = [world / "films" / "a.mp4", tmp_path / "odd.mp4", world / "notes.mp4", world / "films" / "b.mp4"]
    captions = Captioner.captions

    def picky(self: Captioner, views: Any, *given: Any, **named: Any) -> Any:
        if any(view.frames.shape[1] == 32 for view in views):
            raise UnusableFrames("frames of this size")
        return captions(self, views, *given, **named)

    monkeypatch.setattr(Captioner, "captions", picky)
    options["videos_together"] = 4
    assert cli.main(words(options, *films)) == 1
    shown = capsys.readouterr()
    assert "2 of 4 videos captioned" in shown.out
    assert f"{films[1]}: frames of this size; skipped" in shown.err
    assert f"{films[2]}: cannot be read as a video" in shown.err
    assert list(told(options)) == ["a.mp4", "b.mp4"]
    monkeypatch.setattr(Captioner, "captions", lambda *_, **__: pytest.fail("no video is new that can be read"))
    assert cli.main(words(options, films[0], films[2], films[3])) == 1


def test_a_caption_that_failed_is_written_with_its_reason(
    world: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (world / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    captioner = load_captioner(str(world / "model"))
    with torch.no_grad():
        captioner.model.lm_head.weight[7] = float("nan")
    captioner.model.save_pretrained(broken)
    bad = options | {"model": str(broken)}
    for _ in range(2):  # the second time from the file
        assert cli.main(words(bad, world / "films" / "a.mp4")) == 1
    assert "a.mp4: 2 of 2 captions failed: NaN or infinite logits at token 0" in capsys.readouterr().err
    (record,) = lines(options)
    assert {caption["finish"] for caption in record["captions"]} == {"nan"}
    assert {caption["text"] for caption in record["captions"]} == {""}


def test_options_of_a_file(world: Path, options: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    given = options | {"videos": [str(world / "films" / "*.mp4")], "stop": ["stop here", "w1000"], "fps": 2e0}
    config.write_text(yaml.safe_dump(given))
    assert cli.main(["caption", "--config", str(config), "--candidates", "1"]) == 0
    found = lines(options)
    assert [Path(record["video"]).name for record in found] == ["a.mp4", "b.mp4"]
    assert found[0]["settings"]["stop"] == ["stop here", "w1000"]
    assert len(found[0]["captions"]) == 1


def test_which_files_are_meant(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    assert video_files(["films"]) == ["films/a.mp4", "films/b.mp4", "films/more/c.mkv"]
    assert video_files(["films/*.mp4"]) == ["films/a.mp4", "films/b.mp4"]
    assert video_files(["films/**/*.m*"]) == ["films/a.mp4", "films/b.mp4", "films/more/c.mkv"]
    assert video_files(["films/b.mp4", "films", "absent.mp4"]) == [
        "films/b.mp4", "films/a.mp4", "films/more/c.mkv", "absent.mp4"
    ]  # fmt: skip
    (world / "odd[1].mp4").touch()
    assert video_files(["odd[1].mp4"]) == ["odd[1].mp4"]


def test_seeds_depend_on_the_run_and_the_file() -> None:
    first = seeds_of(0, "films/a.mp4", 3)
    assert first == seeds_of(0, "elsewhere/a.mp4", 3)
    assert len({*first, *seeds_of(1, "films/a.mp4", 3), *seeds_of(0, "films/b.mp4", 3)}) == 9


def test_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    drop_torn_line(path)
    assert not path.exists()
    for content, kept in ((b"", b""), (b"{}\n", b"{}\n"), (b"{}\n{", b"{}\n"), (b"{", b"")):
        path.write_bytes(content)
        drop_torn_line(path)
        assert path.read_bytes() == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model is missing; give --model"),
        ({"model": "./nowhere"}, "model './nowhere': no such folder"),
        ({"top_p": 0}, "top_p is 0.0; it has to be above 0"),
        ({"plausibility": 2}, "plausibility is 2.0; it has to be between 0 and 1"),
        ({"candidates": 0}, "candidates is 0; it has to be at least 1"),
        ({"temperature": 0}, "2 greedy candidates would all be the same"),
        ({"videos_together": 0}, "videos_together is 0; it has to be at least 1"),
        ({"contrast": "half"}, "contrast is 'half'; allowed: off, third"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: auto"),
        ({"num_frames": 4, "fps": 1}, "num_frames=4 and fps=1.0: give one of them"),
        ({"instruction": " "}, "the instruction is empty"),
        ({"seeed": 1}, "there is no option '--seeed'; did you mean '--seed'?"),
    ],
)
def test_bad_options_are_one_clear_line(
    world: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    given = {name: value for name, value in (options | change).items() if value is not None}
    assert cli.main(words(given, world / "films" / "a.mp4")) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("synpo caption: ")
    assert message in last
    assert not Path(options["out"]).exists()


def test_a_model_of_text_alone(
    world: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "text")
    tiny.tokenizer().save_pretrained(tmp_path / "text")
    assert cli.main(words(options | {"model": str(tmp_path / "text")}, world / "films")) == 2
    assert "a llama model takes no frames here; models that do: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ([], "no video is given; name files, folders or patterns"),
        (["model"], "holds no video (.mp4"),
        (["films/*.webm"], "matches no file"),
    ],
)
def test_no_videos(
    world: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str], videos: list[str], message: str
) -> None:
    assert cli.main(words(options, *(world / video for video in videos))) == 2
    assert message in capsys.readouterr().err


def test_another_file_is_not_appended_to(
    world: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(options["out"])
    out.parent.mkdir()
    out.write_text('{"prompt": "p"}\n')
    assert cli.main(words(options, world / "films")) == 2
    assert "captions.jsonl:1 is not a line of `synpo caption`; choose another --out" in capsys.readouterr().err
    assert out.read_text() == '{"prompt": "p"}\n'


def test_an_adapter_of_synpo_train_is_a_captioner(world: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = load_captioner(str(world / "model"))
    tuned = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    found = load_captioner(str(tmp_path))
    assert found.pixels is not None
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(found.model(ids).logits, tuned(ids).logits)
