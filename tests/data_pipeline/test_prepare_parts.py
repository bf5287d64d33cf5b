"""Several jobs share the work (--part I/N), and a merge joins what they made."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.prepare import folder, main
from data_pipeline.prepare.listing import ShardSize
from data_pipeline.prepare.options import BuildOptions, Part
from data_pipeline.prepare.parts import shards_of
from data_pipeline.shards import shard_index
from data_pipeline.shards.source import DataError

CHOSEN = ("--shard-size", "4")
"""With it, `source` becomes 7 shards."""


def _arguments(source: Path, out: Path, *more: str) -> list[str]:
    return ["imagefolder", "--src", str(source), "--out", str(out), "--jobs", "1", *CHOSEN, *more]


def _prepare(source: Path, out: Path, *more: str) -> int:
    return main(_arguments(source, out, *more))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, image_tree) -> Path:
    """18 images to train on, 2 of them damaged, and 7 held out, 1 damaged."""
    splits = {"train": {"bird": 9, "cat": 9}, "val": {"bird": 4, "cat": 3}}
    folder = image_tree(tmp_path_factory.mktemp("parts") / "source", splits)
    for name in ("train/bird/0003.jpg", "train/cat/0005.jpg", "val/cat/0001.jpg"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, bytes]:
    """What one run makes of the source."""
    out = tmp_path_factory.mktemp("whole") / "set"
    assert _prepare(source, out) == 3
    assert len(list(out.rglob("*.tar"))) == 7
    return _contents(out)


@pytest.mark.parametrize("parts", [1, 3, 9])
def test_parts_and_a_merge_give_the_bytes_of_one_run(
    source: Path, whole: dict[str, bytes], tmp_path: Path, parts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in reversed(range(1, parts + 1)):
        assert _prepare(source, tmp_path / "out", "--part", f"{number}/{parts}") == 0
        assert not (tmp_path / "out" / "index.json").exists()
    capsys.readouterr()
    assert _prepare(source, tmp_path / "out", "--merge") == 3
    printed = capsys.readouterr()
    assert "train: 16 images in 5 shards" in printed.out
    assert ", 2 images left out" in printed.out
    assert printed.err.count("left out: ") == 3
    assert _contents(tmp_path / "out") == whole


def test_parts_made_at_the_same_time_by_several_processes_give_the_bytes_of_one_run(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    program = [sys.executable, "-m", "data_pipeline.prepare"]
    running = [
        subprocess.Popen([*program, *_arguments(source, tmp_path / "out", "--part", f"{number}/3")])
        for number in (1, 2, 3)
    ]
    assert {process.wait(timeout=60) for process in running} <= {0, 3}
    assert _prepare(source, tmp_path / "out", "--merge") == 3
    assert _contents(tmp_path / "out") == whole


def test_a_merge_names_the_parts_that_are_missing_and_changes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(source, tmp_path / "out", "--part", "2/4") == 0
    printed = capsys.readouterr().out
    assert "part 2/4: train: " in printed
    assert printed.splitlines()[-1] == "when all 4 parts have ended: the same command with --merge"
    before = _contents(tmp_path / "out")
    assert _prepare(source, tmp_path / "out", "--merge") == 1
    assert f"3 of 4 parts of {tmp_path / 'out'} are not finished: 1/4, 3/4, 4/4." in capsys.readouterr().err
    assert _contents(tmp_path / "out") == before


def test_a_merge_of_nothing_says_so(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prepared in (False, True):
        if prepared:
            (tmp_path / "out").mkdir()
        assert _prepare(source, tmp_path / "out", "--merge") == 1
        assert "There is nothing to merge" in capsys.readouterr().err
        assert _contents(tmp_path) == {}
    assert _prepare(source, tmp_path / "out") == 3
    (tmp_path / "out" / "index.json").unlink()
    assert _prepare(source, tmp_path / "out", "--merge") == 1
    assert "There is nothing to merge" in capsys.readouterr().err


def test_another_number_of_parts_or_other_options_than_before_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _prepare(source, out, "--part", "1/2") == 0
    before = _contents(out)
    assert _prepare(source, out, "--part", "2/3") == 1
    assert f"The work on {out} was divided into 2 parts, not 3" in capsys.readouterr().err
    assert _prepare(source, out, "--part", "2/2", "--max-size", "20") == 1
    assert "max-size was not given, now 20" in capsys.readouterr().err
    assert _prepare(source, out, "--merge", "--max-size", "20") == 1
    assert "max-size was not given, now 20" in capsys.readouterr().err
    assert main(["digits", "--out", str(out), *CHOSEN, "--merge"]) == 1
    assert "with 'imagefolder', not 'digits'" in capsys.readouterr().err
    assert _contents(out) == before


def test_a_merge_reads_no_tar_and_a_second_one_has_nothing_to_do(
    source: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for number in (1, 2):
        assert _prepare(source, out, "--part", f"{number}/2") == 0
    for tar in out.rglob("*.tar"):
        size = tar.stat().st_size
        os.truncate(tar, 0)
        os.truncate(tar, size)
    assert _prepare(tmp_path / "gone", out, "--merge") == 3, "nor the source"
    assert (out / "index.json").read_bytes() == whole["index.json"]
    capsys.readouterr()
    assert _prepare(source, out, "--merge") == 3
    printed = capsys.readouterr()
    assert "was complete already; nothing was done" in printed.out
    assert printed.err.count("left out: ") == 3


@pytest.mark.parametrize(
    "damage", ["no tar", "short tar", "no index", "other index", "another tar's index", "torn index", "torn record"]
)
def test_a_merge_says_which_part_to_run_again_and_then_succeeds(
    source: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    out = tmp_path / "out"
    for number in (1, 2):
        assert _prepare(source, out, "--part", f"{number}/2") == 0
    tar = out / "train" / "shard-000001.tar"  # the second shard is part 2's
    index = tar.with_suffix(".idx")
    if damage == "no tar":
        tar.unlink()
    elif damage == "short tar":
        os.truncate(tar, 5000)
    elif damage == "no index":
        index.unlink()
    elif damage == "other index":
        index.write_bytes((out / "train" / "shard-000000.idx").read_bytes())
    elif damage == "another tar's index":
        kept = shard_index.load(index)
        rows = [kept.rows_of(number) for number in range(len(kept.keys))]
        index.write_bytes(shard_index.pack(kept.records, list(kept.keys), rows, kept.header.tar_bytes, bytes(32)))
    elif damage == "torn index":
        os.truncate(index, 20)
    else:
        os.truncate(out / ".progress" / "part-2.json", 100)
    capsys.readouterr()
    assert _prepare(source, out, "--merge") == 1
    said = "delete it and run that part again" if damage == "torn record" else "Run part 2/2 again, then merge."
    assert said in capsys.readouterr().err
    assert not (out / "index.json").exists()
    assert _prepare(source, out, "--part", "2/2") == 0
    assert _prepare(source, out, "--merge") == 3
    assert _contents(out) == whole


# Kills itself when one image is asked for.
PROGRAM = """
import dataclasses, functools, os, signal, sys
from data_pipeline.prepare import cli
from data_pipeline.prepare.imagefolder import list_source

def read(real, item):
    if item.name == FATAL:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(item)

def listing(arguments):
    found = list_source(arguments)
    return dataclasses.replace(found, read=functools.partial(read, found.read))

cli._list_source = listing
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_part_is_continued_while_another_is_left_alone(
    source: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _prepare(source, tmp_path / "reference") == 3
    last = tmp_path / "reference" / "val" / "shard-000001.idx"  # the seventh shard, the fourth of part 1
    fatal = f"val/{shard_index.load(last).keys[-1]}.jpg"
    program = PROGRAM.replace("FATAL", repr(fatal))
    arguments = _arguments(source, out, "--part", "1/2")
    assert subprocess.run([sys.executable, "-c", program, *arguments]).returncode == -signal.SIGKILL
    assert len(list(out.rglob(".unfinished-shard-000001.tar-*"))) == 1
    foreign = out / "val" / ".unfinished-shard-000000.tar-other-7"  # part 2 is at work on it, on another node
    foreign.write_bytes(b"half")
    assert _prepare(source, out, "--merge") == 1
    assert "2 of 2 parts" in capsys.readouterr().err
    assert _prepare(source, out, "--part", "1/2") == 0
    assert "1 shards written, 3 kept" in capsys.readouterr().out
    assert foreign.read_bytes() == b"half"
    foreign.unlink()
    assert list(out.rglob(".unfinished-*")) == []
    assert _prepare(source, out, "--part", "2/2") == 0
    assert _prepare(source, out, "--merge") == 3
    assert _contents(out) == whole


def test_a_merge_that_was_killed_after_its_last_file_is_completed_by_the_next(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch
) -> None:
    from data_pipeline.prepare import build

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    for number in (1, 2):
        assert _prepare(source, out, "--part", f"{number}/2") == 0
    with monkeypatch.context() as patch:
        patch.setattr(build.shutil, "rmtree", interrupt)
        assert _prepare(source, out, "--merge") == 130
    (out / ".progress" / "part-1.json").unlink()  # as where it was clearing away
    assert _prepare(source, out, "--merge") == 3
    assert _contents(out) == whole


def test_one_run_takes_over_the_shards_of_parts(
    source: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(source, tmp_path / "out", "--part", "1/2") == 0
    capsys.readouterr()
    assert _prepare(source, tmp_path / "out") == 3
    assert "3 shards written, 4 kept" in capsys.readouterr().out
    assert _contents(tmp_path / "out") == whole


def test_a_part_of_a_finished_set_rebuilds_what_it_misses_and_leaves_no_trace(
    source: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _prepare(source, out) == 3
    (out / "train" / "shard-000002.tar").unlink()
    assert _prepare(source, out, "--part", "2/2") == 0
    assert not (out / "train" / "shard-000002.tar").exists(), "part 1 makes the third shard"
    assert _prepare(source, out, "--part", "1/2") == 0
    assert _contents(out) == whole


def test_a_part_is_made_by_one_run_at_a_time_and_by_none_beside_a_merge_or_a_whole_run(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert _prepare(source, out, "--part", "1/2") == 0
    with open(out / ".progress" / "part-1.lock", "rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert _prepare(source, out, "--part", "1/2") == 1
        assert f"Another run is preparing {out}, part 1/2, at this moment" in capsys.readouterr().err
        assert _prepare(source, out, "--part", "2/2") == 0
    descriptor = os.open(out / "prepare.json", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # as a part at work holds it
        for arguments in (("--merge",), ()):
            assert _prepare(source, out, *arguments) == 1
            assert "Another run is preparing" in capsys.readouterr().err
        assert _prepare(source, out, "--part", "1/2") == 0
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # as a whole run holds it
        assert _prepare(source, out, "--part", "1/2") == 1
        assert "Another run is preparing" in capsys.readouterr().err
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_several_first_runs_with_other_options_one_record_stands(
    tmp_path: Path, monkeypatch, hard_links: bool
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(folder.os, "link", refuse)
    record = {"converter": "imagefolder", "options": {"max_size": "64"}, "images": 3, "source": "x"}
    folder.create_once(tmp_path / "prepare.json", folder.json_bytes(record))
    folder.create_once(tmp_path / "prepare.json", b"{}")
    assert json.loads((tmp_path / "prepare.json").read_bytes()) == record
    folder.claim(tmp_path, record)
    with pytest.raises(DataError, match="max-size was 64, now 65"):
        folder.claim(tmp_path, {**record, "options": {"max_size": "65"}})
    assert [path.name for path in tmp_path.iterdir()] == ["prepare.json"]


def test_every_shard_belongs_to_one_part() -> None:
    jobs = list(range(20))
    for of in (1, 3, 20, 33):
        shares = [shards_of(jobs, Part(number, of)) for number in range(1, of + 1)]  # type: ignore[arg-type]
        assert sorted(job for share in shares for job in share) == jobs  # type: ignore[type-var]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_parts_are_not_among_the_options_that_are_remembered() -> None:
    size = ShardSize.parse("64MB")
    assert BuildOptions(size, 1, False, part=Part(2, 3)).recorded() == BuildOptions(size, 4, True).recorded()


def test_a_set_of_masks_in_parts_is_that_of_one_run_and_a_changed_mask_is_noticed(
    tmp_path: Path, image_file, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    for split, count in (("train", 6), ("val", 2)):
        for kind in ("images", "annotations"):
            (source / kind / split).mkdir(parents=True)
        for number in range(count):
            (source / "images" / split / f"{number}.jpg").write_bytes(image_file(number, 60, 40))
            mask = Image.new("L", (60, 40), number % 2)
            mask.save(source / "annotations" / split / f"{number}.png")
    (tmp_path / "names.txt").write_text("road\nsky\n")

    def prepare(out: Path, *more: str) -> int:
        own = ("--class-names", str(tmp_path / "names.txt"), "--num-shards", "3", "--max-size", "30")
        return main(["segmentation", "--src", str(source), "--out", str(out), "--jobs", "1", *own, *more])

    assert prepare(tmp_path / "one") == 0
    assert prepare(tmp_path / "out", "--part", "1/2") == 0
    for number in (0, 2, 4):  # of 6, of which part 1 has 4
        Image.new("L", (60, 40), 1).save(source / "annotations" / "train" / f"{number}.png")
    assert prepare(tmp_path / "changed") == 0
    assert _contents(tmp_path / "changed") != _contents(tmp_path / "one")
    capsys.readouterr()
    for number in (1, 2):
        assert prepare(tmp_path / "out", "--part", f"{number}/2") == 0
    assert prepare(tmp_path / "out", "--merge") == 0
    assert _contents(tmp_path / "out") == _contents(tmp_path / "changed")
