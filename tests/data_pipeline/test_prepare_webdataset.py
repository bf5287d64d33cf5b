from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig
from data_pipeline.prepare import main
from data_pipeline.prepare.tar_members import Member
from data_pipeline.prepare.webdataset_samples import group
from data_pipeline.shards import open_source, set_index

Files = list[tuple[str, bytes]]


def _tar(path: Path, files: Files, form: int = tarfile.GNU_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def picture(image_file):
    """picture(n): the bytes of the nth image, made once."""
    made: dict[int, bytes] = {}

    def make(number: int) -> bytes:
        if number not in made:
            made[number] = image_file(3000 + number)
        return made[number]

    return make


@pytest.fixture
def source(tmp_path: Path, picture) -> Path:
    """Two tars to train on and one to validate, in folders, as webdataset's ShardWriter writes them."""
    folder = tmp_path / "source"
    for split, shards in {"train": (4, 3), "val": (2,)}.items():
        first = 0 if split == "train" else 100
        for number, count in enumerate(shards):
            files: Files = []
            for sample in range(first, first + count):
                files += [(f"{sample:06d}.cls", b"%d" % (sample % 3)), (f"{sample:06d}.jpg", picture(sample))]
            _tar(folder / split / f"{number:05d}.tar", files)
            first += count
    return folder


def _run(out: Path, source: object, *more: object) -> int:
    return main(["webdataset", "--out", str(out), "--jobs", "1", "--src", str(source), *map(str, more)])


def _samples(out: Path, split: str = "train") -> dict[str, tuple[int, bytes]]:
    source = open_source(DataConfig(path=str(out), num_classes=len(set_index.load(out).classes)), split)
    samples = [source.read(index) for index in range(len(source))]
    return {sample.key: (sample.label, bytes(sample.image)) for sample in samples}


def test_folders_of_tars_become_the_splits_and_webdataset_reads_the_result(
    source: Path, tmp_path: Path, picture, capsys: pytest.CaptureFixture[str]
) -> None:
    webdataset = pytest.importorskip("webdataset")
    assert _run(tmp_path / "out", source, "--shard-size", "3") == 0
    assert list(set_index.load(tmp_path / "out").splits) == ["train", "val"]
    assert set_index.load(tmp_path / "out").classes == ("0", "1", "2")
    expected = {f"{number:06d}": (number % 3, picture(number)) for number in range(7)}
    assert _samples(tmp_path / "out") == expected
    assert _samples(tmp_path / "out", "val") == {f"{n:06d}": (n % 3, picture(n)) for n in (100, 101)}
    shards = sorted(str(path) for path in (tmp_path / "out" / "train").glob("*.tar"))
    assert len(shards) == 3
    read = webdataset.WebDataset(shards, shardshuffle=False)
    assert {sample["__key__"]: (int(sample["cls"]), sample["jpg"]) for sample in read} == expected
    assert "warning" not in capsys.readouterr().err


def test_what_we_prepared_and_what_webdataset_wrote_can_be_prepared_again(
    source: Path, tmp_path: Path, picture
) -> None:
    webdataset = pytest.importorskip("webdataset")
    assert _run(tmp_path / "once", source, "--shard-size", "3") == 0
    assert _run(tmp_path / "twice", tmp_path / "once", "--shard-size", "2") == 0
    assert _samples(tmp_path / "twice") == _samples(tmp_path / "once")
    (tmp_path / "written").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "written" / "%03d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(5):
            writer.write({"__key__": f"folder/{number}", "jpg": picture(number), "cls": number % 3, "txt": "words"})
    assert _run(tmp_path / "out", tmp_path / "written") == 0
    assert _samples(tmp_path / "out") == {f"folder/{n}": (n % 3, picture(n)) for n in range(5)}


def test_patterns_named_by_split_choose_the_tars(source: Path, tmp_path: Path, picture) -> None:
    patterns = [f"val={source}/train/00000.tar", f"train={source}/[tv]*/*1.tar", f"train={source}/val/*.tar"]
    assert _run(tmp_path / "out", patterns[0], *patterns[1:]) == 0
    assert sorted(_samples(tmp_path / "out")) == ["000004", "000005", "000006", "000100", "000101"]
    assert sorted(_samples(tmp_path / "out", "val")) == ["000000", "000001", "000002", "000003"]
    assert list(set_index.load(tmp_path / "out").splits) == ["val", "train"]


@pytest.mark.parametrize("how", ["folder", "pattern", "files"])
def test_tars_without_splits_are_to_train_on_and_a_part_can_be_held_out(
    source: Path, tmp_path: Path, picture, how: str
) -> None:
    folder = source / "train"
    sources = {"folder": [folder], "pattern": [f"{folder}/*.tar"], "files": sorted(folder.iterdir())}[how]
    assert _run(tmp_path / "all", *sources) == 0
    assert _run(tmp_path / "out", *sources, "--val-fraction", "0.4") == 0
    train, val = _samples(tmp_path / "out"), _samples(tmp_path / "out", "val")
    assert (len(train), len(val)) == (4, 3)
    assert {**train, **val} == _samples(tmp_path / "all")


def test_labels_from_json_may_be_numbers_or_names(tmp_path: Path, picture) -> None:
    files: Files = []
    for number, label in enumerate(["cat", 0, "1", "dog"]):
        metadata = json.dumps({"label": label, "caption": "é"}).encode()
        files += [(f"{number}.jpg", picture(number)), (f"{number}.json", metadata), (f"{number}.cls", b"77")]
    _tar(tmp_path / "in" / "a.tar", files)
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    assert _run(tmp_path / "out", tmp_path / "in", "--label-key", "label", "--classes", tmp_path / "classes.txt") == 0
    assert set_index.load(tmp_path / "out").classes == ("dog", "cat")
    assert [_samples(tmp_path / "out")[str(number)][0] for number in range(4)] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("x.cls", b"1")], "it has no image, only .cls"),
        ([("x.jpg", b"IMAGE")], "it has no label: no .cls, only .jpg"),
        ([("x.jpg", b"IMAGE"), ("x.cls", b"cat")], "its label 'cat' is no number, and there is no list of names"),
        ([("x.jpg", b"IMAGE"), ("x.cls", b"-1")], "its label '-1' is no number"),
        ([("x.jpg", b"IMAGE"), ("x.cls", b"")], "its .cls gives '', which is no label"),
        ([("x.jpg", b"IMAGE"), ("x.cls", b"\xff")], "its .cls is not what it should be"),
        ([("x.jpg", b"IMAGE"), ("x.cls", b"9" * 12)], "its label 999,999,999,999 is too large for a class"),
        ([("x.jpg", b"IMAGE"), ("x.cls", b"9" * 5000)], "is no number, and there is no list"),
        ([("x.jpg", b"IMAGE"), ("x.cls", b"1" * (2 << 20))], "its .cls has 2,097,152 bytes, which is no label"),
        ([("x.jpg", b"IMAGE"), ("x.jpg", b"IMAGE"), ("x.cls", b"1")], "it has two members .jpg"),
        ([("x.jpg", b"no image"), ("x.cls", b"1")], "cannot be decoded"),
    ],
)
def test_a_sample_that_cannot_be_used_is_left_out_and_reported(
    tmp_path: Path, picture, capsys: pytest.CaptureFixture[str], files: Files, reason: str
) -> None:
    files = [(name, picture(9) if data == b"IMAGE" else data) for name, data in files]
    _tar(tmp_path / "in" / "a.tar", [("good.jpg", picture(0)), ("good.cls", b"0"), *files])
    assert _run(tmp_path / "out", tmp_path / "in") == 3
    assert _samples(tmp_path / "out") == {"good": (0, picture(0))}
    (line,) = (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] in ("a.tar/x", "a.tar/x.jpg")
    if reason != "cannot be decoded":
        assert reason in json.loads(line)["reason"]


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (b"{}", "its .json is not what it should be with the field 'label' (KeyError('label'))"),
        (b"[1]", "its .json is not what it should be with the field 'label' (TypeError("),
        (b"{", "its .json is not what it should be with the field 'label' (JSONDecodeError("),
        (b"[" * 100_000, "its .json is not what it should be with the field 'label' (RecursionError("),
        (b'{"label": true}', "its .json gives 'True', which is no label"),
        (b'{"label": 1.0}', "its .json gives '1.0', which is no label"),
        (b'{"label": -1}', "its .json gives '-1', which is no label"),
        (b'{"label": 2}', "its label '2' is none of the 2 of --classes"),
        (b'{"label": "cow"}', "its label 'cow' is none of the 2 of --classes"),
    ],
)
def test_a_label_that_json_does_not_give_is_reported(tmp_path: Path, picture, metadata: bytes, reason: str) -> None:
    good = [("good.jpg", picture(0)), ("good.json", b'{"label": "cat"}')]
    _tar(tmp_path / "in" / "a.tar", [*good, ("x.jpg", picture(1)), ("x.json", metadata)])
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    assert _run(tmp_path / "out", tmp_path / "in", "--label-key", "label", "--classes", tmp_path / "classes.txt") == 3
    (line,) = (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"].startswith(reason)


def test_where_no_sample_can_be_used_the_options_are_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path / "out", source, "--label-key", "label") == 1
    message = capsys.readouterr().err
    assert (
        "None of the 7 samples of the split 'train' can be used. 00000.tar/000000: it has no label: no .json" in message
    )
    assert "--label-key" in message
    assert not (tmp_path / "out").exists()


def test_the_image_is_told_by_the_end_of_its_extension_or_by_being_plain_or_by_its_key(
    tmp_path: Path, picture, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        ("a.b.jpg", picture(0)),
        ("a.cls", b"0"),
        ("c.SEG.png", picture(1)),
        ("c.JPEG", picture(2)),
        ("c.cls", b"1"),
        ("v1.5/d.webp", picture(3)),
        ("v1.5/d.cls", b"0"),
    ]
    _tar(tmp_path / "in" / "a.tar", files)
    assert _run(tmp_path / "out", tmp_path / "in") == 0
    assert _samples(tmp_path / "out") == {"a": (0, picture(0)), "c": (1, picture(2)), "v1_5/d": (0, picture(3))}
    assert ".seg.png beside the image (1)" in capsys.readouterr().out
    assert _run(tmp_path / "chosen", tmp_path / "in", "--image-key", ".Seg.png") == 3
    assert _samples(tmp_path / "chosen") == {"c": (1, picture(1))}


@pytest.mark.parametrize("names", [("x.jpg", "x.png"), ("x.1.jpg", "x.2.jpg")])
def test_several_images_in_a_sample_are_an_error_that_asks_for_a_choice(
    tmp_path: Path, picture, capsys: pytest.CaptureFixture[str], names: tuple[str, str]
) -> None:
    _tar(tmp_path / "in" / "a.tar", [(names[0], picture(0)), (names[1], picture(1)), ("x.cls", b"0")])
    assert _run(tmp_path / "out", tmp_path / "in") == 1
    message = capsys.readouterr().err
    assert (
        f"the sample 'x' has several images (.{names[0][2:]}, .{names[1][2:]}). Choose one with --image-key" in message
    )
    assert _run(tmp_path / "out", tmp_path / "in", "--image-key", names[1][2:]) == 0
    assert _samples(tmp_path / "out") == {"x": (0, picture(1))}


def test_keys_that_come_again_in_other_tars_are_made_unique_and_reported(
    tmp_path: Path, picture, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, folder in enumerate(["one", "two"]):
        files = [
            ("0.jpg", picture(10 * number)),
            ("0.cls", b"0"),
            (f"{number}5.jpg", picture(number)),
            (f"{number}5.cls", b"1"),
        ]
        _tar(tmp_path / "in" / folder / "000000.tar", files)
    pattern = f"train={tmp_path}/in/*/000000.tar"
    assert _run(tmp_path / "out", pattern) == 0
    assert _samples(tmp_path / "out") == {
        "0": (0, picture(0)),
        "05": (1, picture(0)),
        "0~2": (0, picture(10)),
        "15": (1, picture(1)),
    }
    assert "warning: train: 1 samples have a key that came before (0)" in capsys.readouterr().err


def test_interleaved_members_are_brought_together_and_reported(
    tmp_path: Path, picture, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [("a.jpg", picture(0)), ("b.jpg", picture(1)), ("a.cls", b"0"), ("b.cls", b"1")]
    _tar(tmp_path / "in" / "a.tar", files)
    assert _run(tmp_path / "out", tmp_path / "in") == 0
    assert _samples(tmp_path / "out") == {"a": (0, picture(0)), "b": (1, picture(1))}
    assert "the members of 2 samples lie apart in their tar" in capsys.readouterr().err


def test_one_key_twice_in_a_tar_with_others_between_is_two_samples(tmp_path: Path, picture) -> None:
    files = [("a.jpg", picture(0)), ("a.cls", b"0"), ("b.jpg", picture(1)), ("b.cls", b"1")]
    again = [("a.jpg", picture(2)), ("a.cls", b"2")]
    _tar(tmp_path / "in" / "a.tar", [*files, *again, *files[2:]])
    assert _run(tmp_path / "out", tmp_path / "in") == 0
    expected = {"a": 0, "b": 1, "a~2": 2, "b~2": 1}
    assert {key: label for key, (label, _) in _samples(tmp_path / "out").items()} == expected


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_with_other_letters_become_keys(tmp_path: Path, picture, form: int) -> None:
    key = "photographs/" + "a-long-folder/" * 20 + "Grüße"
    _tar(tmp_path / "in" / "a.tar", [(f"{key}.jpg", picture(0)), (f"{key}.cls", b"0")], form)
    assert _run(tmp_path / "out", tmp_path / "in") == 0
    assert _samples(tmp_path / "out") == {key: (0, picture(0))}


def test_shards_without_a_sample_and_with_one_are_taken_as_they_are(tmp_path: Path, picture) -> None:
    _tar(tmp_path / "in" / "0.tar", [])
    _tar(tmp_path / "in" / "1.tar", [("a.jpg", picture(0)), ("a.cls", b"0")])
    _tar(
        tmp_path / "in" / "2.tar",
        [("__meta__", b"{}"), ("__x__/a.jpg", b"?"), ("readme", b"no dot"), (".jpg", b"?")],
    )
    assert _run(tmp_path / "out", tmp_path / "in") == 0
    assert _samples(tmp_path / "out") == {"a": (0, picture(0))}


def test_classes_without_an_image_are_a_warning(tmp_path: Path, picture, capsys: pytest.CaptureFixture[str]) -> None:
    _tar(tmp_path / "in" / "0.tar", [("a.jpg", picture(0)), ("a.cls", b"1"), ("b.jpg", picture(1)), ("b.cls", b"2")])
    assert _run(tmp_path / "out", tmp_path / "in") == 0
    assert "warning: train: 1 of 3 classes have no image: 0. Labels begin at 0." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-3000], "cut short"),
        (lambda data: data[:100] + b"?" + data[101:], "there is no header at its beginning"),
        (lambda data: b"", "it is empty"),
        (lambda data: b"\x1f\x8b" + data, "it is compressed (gzip)"),
    ],
)
def test_a_damaged_tar_is_an_error_that_names_it(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, message: str
) -> None:
    path = source / "train" / "00001.tar"
    path.write_bytes(damage(path.read_bytes().rstrip(b"\0") + bytes(2000)))
    assert _run(tmp_path / "out", source) == 1
    error = capsys.readouterr().err
    assert f"{path}, at byte " in error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_names_that_lead_out_of_a_folder_are_refused_and_absolute_ones_made_plain(
    tmp_path: Path, picture, capsys: pytest.CaptureFixture[str]
) -> None:
    _tar(tmp_path / "in" / "a.tar", [("/data/a.jpg", picture(0)), ("/data/a.cls", b"0")])
    assert _run(tmp_path / "out", tmp_path / "in") == 0
    assert list(_samples(tmp_path / "out")) == ["data/a"]
    _tar(tmp_path / "in" / "b.tar", [("../../b.jpg", picture(1)), ("../../b.cls", b"0")])
    assert _run(tmp_path / "other", tmp_path / "in") == 1
    assert "member '../../b.jpg': its name leads out of the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nothing"], "There is no tar"),
        (["{tmp}/*.none"], "There is no tar"),
        (["train={tmp}/source/train/*.tar", "{tmp}/source/val"], "all of --src as SPLIT=PATTERN, or none"),
        (["{tmp}/source", "--val-fraction", "0.1"], "--val-fraction is for one split; here are train and val"),
        (["{tmp}/mixed"], "holds tars, and folders of tars (train)"),
        (["{tmp}/source", "--classes", "{tmp}/twice.txt"], "has the line 'a' more than once"),
        (["{tmp}/source", "--classes", "{tmp}/empty.txt"], "is empty"),
        (["{tmp}/source", "--classes", "{tmp}/none.txt"], "none.txt cannot be read"),
        (["{tmp}/out/train"], "holds the source"),
    ],
)
def test_wrong_sources_and_options_are_errors(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    _tar(tmp_path / "mixed" / "a.tar", [])
    _tar(tmp_path / "mixed" / "train" / "a.tar", [])
    _tar(tmp_path / "out" / "train" / "a.tar", [])
    (tmp_path / "twice.txt").write_text("a\na\n")
    (tmp_path / "empty.txt").write_text("")
    assert _run(tmp_path / "out", *(argument.format(tmp=tmp_path) for argument in arguments)) == 1
    assert message in capsys.readouterr().err


def test_two_parts_give_the_same_bytes_as_one_run(source: Path, tmp_path: Path) -> None:
    options = ["--shard-size", "2"]
    assert _run(tmp_path / "one", source, *options) == 0
    for part in ("1/2", "2/2"):
        assert _run(tmp_path / "parts", source, *options, "--part", part) == 0
    assert _run(tmp_path / "parts", source, *options, "--merge") == 0
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "parts" / path.relative_to(tmp_path / "one")).read_bytes()


_parts = st.text("ab.", min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "f/", "f.g/"]), _parts), max_size=8))
def test_keys_and_extensions_are_those_of_webdataset(names: list[tuple[str, str]]) -> None:
    base_plus_ext = pytest.importorskip("webdataset.tariterators").base_plus_ext
    members = [Member(folder + name, 0, 0) for folder, name in names if not name.startswith(".")]
    samples, outside = group(members)
    expected = [base_plus_ext(member.name) for member in members]
    assert {sample.key for sample in samples} == {key for key, _ in expected if key is not None}
    assert outside == sum(key is None for key, _ in expected)
    found = {(sample.key, extension) for sample in samples for extension in sample.members}
    assert found == {(key, extension) for key, extension in expected if key is not None}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.from_regex(re.compile(r"[ab]\.(jpg|cls|json)"), fullmatch=True), max_size=12))
def test_every_member_is_in_one_sample_or_reported_as_coming_twice(names: list[str]) -> None:
    members = [Member(name, number, 1) for number, name in enumerate(names)]
    samples, _ = group(members)
    placed = [member.offset for sample in samples for member in sample.members.values()]
    assert len(placed) == len(set(placed))
    assert set(range(len(names))) - set(placed) == set() or any(sample.twice for sample in samples)
    for sample in samples:
        assert all(f"{sample.key}.{extension}" == member.name for extension, member in sample.members.items())
