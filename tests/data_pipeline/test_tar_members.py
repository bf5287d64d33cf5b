from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_pipeline.prepare.tar_members import (
    DamagedTarError,
    Member,
    list_members,
    list_until_damage,
    read_member,
)
from data_pipeline.shards.source import DataError

_FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
_LONG = "folder/" * 30 + "a-name-that-no-header-can-hold.jpg"
_FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _tar(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _special(*members: tuple[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of members without data, given as (name, type)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
    return file.getvalue()


def _header(name: bytes, size: bytes, kind: bytes = b"0", magic: bytes = b"ustar  \0") -> bytes:
    """One header block by hand, with a right checksum whatever else it says."""
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[257 : 257 + len(magic)] = magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _pax(record: bytes, kind: bytes = b"x") -> bytes:
    """An extended header of one record, its length as the record begins."""
    return _header(b"pax", b"%011o\0" % len(record), kind) + record + bytes(-len(record) % 512)


def _record(keyword: bytes, value: bytes) -> bytes:
    length = len(keyword) + len(value) + 3
    while len(str(length)) + len(keyword) + len(value) + 3 != length:
        length += 1
    return b"%d %s=%s\n" % (length, keyword, value)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_file(data: bytes) -> Path:
        (tmp_path / "a.tar").write_bytes(data)
        return tmp_path / "a.tar"

    return write_file


_names = st.lists(
    st.text(st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
        lambda part: part not in (".", "..")
    ),
    min_size=1,
    max_size=5,
).map("/".join)


@_FUZZ
@given(st.dictionaries(_names, st.binary(max_size=1100), max_size=6), st.sampled_from(sorted(_FORMATS)))
@example({_LONG: b"x" * 513, "empty": b"", "é/" * 90 + "ü": b"ab"}, "pax")
@example({_LONG: b"x" * 512, "empty": b"", "é/" * 90 + "ü": b"ab"}, "gnu")
def test_members_are_those_that_tarfile_finds(write, files: dict[str, bytes], form: str) -> None:
    try:
        data = _tar(files, _FORMATS[form])
    except ValueError:  # ustar holds no overlong names
        return
    path = write(data)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar.getmembers()]
    found = list_members(path).members
    assert [(member.name, member.offset, member.size) for member in found] == expected
    assert {member.name: read_member(path, member.offset, member.size) for member in found} == files


def test_a_tar_in_a_tar_is_listed_where_it_lies(write) -> None:
    inner = {name: _tar({f"{name}_{number}.JPEG": name.encode() * number for number in range(3)}) for name in "ab"}
    path = write(_tar({f"{name}.tar": data for name, data in inner.items()}))
    for outer in list_members(path).members:
        members = list_members(path, outer.offset, outer.size).members
        letter = outer.name[0]
        assert [member.name for member in members] == [f"{letter}_{number}.JPEG" for number in range(3)]
        assert [read_member(path, member.offset, member.size) for member in members] == [
            letter.encode() * number for number in range(3)
        ]


def test_a_member_of_a_tar_in_a_tar_may_not_reach_beyond_it(write) -> None:
    inner = _tar({"a.jpg": bytes(3000)})
    path = write(_tar({"a.tar": inner[:2048], "b.tar": inner}))
    cut, whole = list_members(path).members
    with pytest.raises(DamagedTarError, match=r"a\.tar, at byte 512, member 'a\.jpg': its 3,000 bytes end 1,536 bytes"):
        list_members(path, cut.offset, cut.size)
    assert [member.size for member in list_members(path, whole.offset, whole.size).members] == [3000]


def test_sizes_beyond_8_gib_in_base_256_and_pax_are_read_without_reading_the_data(tmp_path: Path) -> None:
    size = 9 << 30
    pax = _pax(_record(b"size", b"%d" % size)) + _header(b"b.jpg", b"00000000000\0")
    with open(tmp_path / "large.tar", "wb") as file:  # holes: it takes no room on the disk
        file.write(_header(b"a.jpg", b"\x80" + size.to_bytes(11, "big")))
        file.seek(512 + size)
        file.write(pax)
        file.seek(512 + size + len(pax) + size)
        file.write(bytes(1024))
    tracemalloc.start()
    members = list_members(tmp_path / "large.tar").members
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert members == [Member("a.jpg", 512, size), Member("b.jpg", 512 + size + len(pax), size)]
    assert peak < 4 << 20


def test_links_devices_and_folders_are_counted_and_not_listed(write) -> None:
    kinds = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    old_folder = _header(b"old/", b"0", b"\0", magic=b"")
    vendor = _header(b"label", b"00000000003\0", b"V") + b"abc".ljust(512, b"\0")
    data = old_folder + vendor + _special(*((f"m{number}", kind) for number, kind in enumerate(kinds)))[: 6 * 512]
    contents = list_members(write(data + _tar({"a.jpg": b"a"})))
    assert [member.name for member in contents.members] == ["a.jpg"]
    assert contents.passed_over == {"folder": 2, "link": 2, "device": 3, "other": 1}


@pytest.mark.parametrize("name", ["../a.jpg", "x/../../a.jpg", "x\\..\\a.jpg", ".."])
@pytest.mark.parametrize("form", sorted(_FORMATS))
def test_names_that_lead_out_of_a_folder_are_refused(write, name: str, form: str) -> None:
    with pytest.raises(DamagedTarError, match="leads out of the folder") as caught:
        list_members(write(_tar({"good.jpg": b"a", name: b"b"}, _FORMATS[form])))
    assert f"member '{name}'" in str(caught.value)


@pytest.mark.parametrize(("name", "plain"), [("/etc/a.jpg", "etc/a.jpg"), ("./a.jpg", "a.jpg"), ("//././a", "a")])
def test_absolute_names_lose_their_beginning(write, name: str, plain: str) -> None:
    assert [member.name for member in list_members(write(_tar({name: b"a"}))).members] == [plain]


def test_the_prefix_of_old_gnu_headers_is_no_part_of_the_name(write) -> None:
    header = bytearray(_header(b"a.jpg", b"00000000000\0"))
    header[345:356] = b"13370000000"  # there GNU keeps the time of the last access
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert list_members(write(bytes(header) + bytes(1024))).members == [Member("a.jpg", 512, 0)]


_GOOD = _tar({"one.jpg": b"1" * 700, "two.jpg": b"2" * 700}).rstrip(b"\0") + bytes(324)  # without the end mark


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"x" * 100, "shorter than one tar header"),
        (b"x" * 5000, "it is no tar"),
        (b"\x1f\x8b" + bytes(600), r"it is compressed \(gzip\).*decompress it first: gunzip"),
        (b"\x1f\x8b short", r"it is compressed \(gzip\)"),
        (b"BZh9" + b"x" * 600, r"it is compressed \(bzip2\)"),
        (b"\xfd7zXZ\0" + b"x" * 600, r"it is compressed \(xz\)"),
        (_GOOD[:400], "at byte 0: it is shorter than one tar header"),
        (_GOOD[:900], "at byte 0, member 'one.jpg': its 700 bytes end 636 bytes after the archive"),
        (_GOOD[:1600], "at byte 1536: the file ends within a tar header"),
        (_GOOD[:2560], "at byte 1536, member 'two.jpg': its 700 bytes end 512 bytes"),
        (_GOOD, "at byte 3072: the file ends without the zeros"),
        (_GOOD[:1536] + bytes(512) + _GOOD[2048:], "at byte 1536: zeros in place of a tar header, and more follows"),
        (_GOOD[:1536] + bytes(1 << 20), "at byte 1536: the end of the archive, but 1,048,576 bytes follow"),
        (_GOOD + bytes(1024) + _GOOD, "at byte 3072: zeros in place of a tar header, and more follows"),
        (_GOOD[:1540] + b"X" + _GOOD[1541:], "at byte 1536: there is no tar header where one must be"),
        (_header(b"a", b"-0000000001\0") + bytes(1024), "member 'a': its size is b'-0000000001"),
        (_header(b"a", b"0000_000001\0") + bytes(1024), "member 'a': its size is b'0000_000001"),
        (_header(b"a", b"\xff" * 12) + bytes(1024), "member 'a': its size is "),
        (_header(b"a", b"\x80" + b"\xff" * 11) + bytes(1024), "member 'a': its 309,485,009,821,345,068,724,781,055"),
        (_header(b"a", b"77777777777\0") + bytes(1024), "member 'a': its 8,589,934,591 bytes end"),
        (_header(b"", b"0") + bytes(1024), "a file without a name"),
        (_header(b"./", b"0") + bytes(1024), "a file without a name"),
        (_header(b"a", b"0", b"S") + bytes(1024), "member 'a': it is sparse"),
        (_pax(_record(b"GNU.sparse.name", b"b")) + _GOOD, "member 'b': it is sparse"),
        (_pax(_record(b"size", b"-5")) + _GOOD, "a pax header that states the size b'-5'"),
        (_pax(_record(b"size", b"9" * 40)) + _GOOD, "a pax header that states the size b'9999"),
        (_pax(_record(b"size", b"9" * 19)) + _GOOD, "member 'one.jpg': its 9,999,999,999,999,999,999 bytes"),
        (_pax(_record(b"path", b"../x")) + _GOOD, r"member '\.\./x': its name leads out"),
        (_pax(_record(b"path", b"x"), b"g") + _GOOD, "a pax header that gives all members one name"),
        (_pax(b"0 path=x\n") + _GOOD, "a record of another length"),
        (_pax(b"3 path=x\n") + _GOOD, "a record of another length"),
        (_pax(b"9999 path=x\n") + _GOOD, "a record of another length"),
        (_pax(b"path=x\n") + _GOOD, "a record of another length"),
        (_pax(b"8 path\0\n") + _GOOD, "a record without a name or a value"),
        (_pax(_record(b"path", b"x")) + bytes(1024), "ends after an extended header"),
        (_header(b"L", b"%011o\0" % (1 << 30), b"L") + _GOOD, "an extended header of 1,073,741,824 bytes"),
        (_header(b"L", b"00000004000\0", b"L") + bytes(512), "member 'extended header': its 2,048 bytes end"),
    ],
)
def test_damage_is_an_error_that_says_where(write, data: bytes, message: str) -> None:
    path = write(data)
    with pytest.raises(DamagedTarError, match=message) as caught:
        list_members(path)
    assert str(path) in str(caught.value)
    assert list_until_damage(path).damage == str(caught.value)


def test_members_before_the_damage_are_there_and_one_block_of_zeros_ends_an_archive(write) -> None:
    contents = list_until_damage(write(_GOOD[:1540] + b"X" + _GOOD[1541:]))
    assert [member.name for member in contents.members] == ["one.jpg"]
    assert "at byte 1536" in contents.damage
    assert [member.name for member in list_members(write(_GOOD + bytes(512))).members] == ["one.jpg", "two.jpg"]


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    form = draw(st.sampled_from(sorted(_FORMATS)))
    names = ["a.jpg", "b/c.cls"] if form == "ustar" else [_LONG, "b/c.cls", "ü.jpg"]
    data = bytearray(_tar(dict.fromkeys(names, b"x" * 600), _FORMATS[form]))
    for _ in range(draw(st.integers(0, 4))):
        header = draw(st.integers(0, len(data) // 512 - 1)) * 512
        begin = header + draw(st.sampled_from([0, 124, 148, 156, 257, 345]) | st.integers(0, 511))
        damage = draw(st.binary(min_size=1, max_size=16))
        data[begin : begin + len(damage)] = damage
        if draw(st.booleans()) and len(data) >= header + 512:  # a header that lies, with a right checksum
            data[header + 148 : header + 156] = b" " * 8
            data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))])


@_FUZZ
@given(_damaged() | st.binary(max_size=2000))
def test_whatever_the_bytes_only_damage_is_raised_and_members_lie_within_the_file(write, data: bytes) -> None:
    path = write(data)
    contents = list_until_damage(path)
    position = 0
    for member in contents.members:
        assert position < member.offset <= member.offset + member.size <= len(data)
        assert member.name
        assert ".." not in member.name.split("/")
        assert not member.name.startswith("/")
        position = member.offset + member.size
    if contents.damage:
        with pytest.raises(DamagedTarError):
            list_members(path)


def test_a_replaced_file_is_read_anew_and_reading_past_its_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(_tar({"a": b"first"}))
    assert read_member(path, 512, 5) == b"first"
    (tmp_path / "b.tar").write_bytes(_tar({"a": b"other"}))
    os.replace(tmp_path / "b.tar", path)
    assert read_member(path, 512, 5) == b"other"
    with pytest.raises(ValueError, match="cut short while it was in use"):
        read_member(path, 512, 1 << 20)


def test_files_that_are_not_there_and_pipes_are_errors_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list_members(tmp_path / "none.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(DataError, match="is no regular file"):
        list_members(tmp_path / "pipe.tar")


def test_only_a_bounded_number_of_tars_stays_open(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}.tar").write_bytes(_tar({"a": b"a"}))
        assert len(list_members(tmp_path / f"{number}.tar").members) == 1
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert sum(target.startswith(str(tmp_path)) for target in opened) == 64
