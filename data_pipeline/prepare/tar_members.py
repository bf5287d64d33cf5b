"""Where the files inside a tar lie, and reading them there: for tars of hundreds of gigabytes, also inside a tar.

One header is read per member and none of its data, and nothing is unpacked. The standard library's tarfile takes a tar
that was cut short for a finished one, trusts the sizes that headers state, and needs a file object for a tar within a
tar; here every header's checksum is proved, every member must lie within its archive, and the archive must end as tars
end, so that half a download is not taken for a small data set.

Understood are ustar, GNU (long names, sizes in base 256) and pax (path, size). Sparse members are refused.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.shards.source import DataError

_BLOCK = tarfile.BLOCKSIZE
_OPEN_TARS = 64
_MOST_EXTENDED_BYTES = 1 << 20  # of a long name or a pax header; what is larger is damage, or meant to exhaust memory
_MOST_PADDING_BYTES = 1 << 18  # zeros at the end; tar fills up to its record, 10 KiB unless told otherwise
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_DECOMPRESS = {"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd"}

_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_WITHOUT_DATA = {
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "link",
    tarfile.LNKTYPE: "link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "device",
}
_SPARSE = "it is sparse (stored without its holes), which is not supported; make the archive without --sparse"


class DamagedTarError(DataError):
    """An archive is not what a tar must be. The message names the file, the place in it, the member and the fault."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str
    """As the archive says, without leading "/" and "./". Never to be used as a path to write to."""

    offset: int
    """Of its first byte of data in the file that holds the archive."""

    size: int
    """Bytes."""


@dataclass
class Contents:
    """What an archive holds."""

    members: list[Member] = field(default_factory=list)
    """Its regular files, in the order of the archive."""

    passed_over: Counter[str] = field(default_factory=Counter)
    """How many members of which kind are no regular files: folder, link, device, other."""

    damage: str = ""
    """Why it could not be read to its end; empty where it could."""


@dataclass
class _Override:
    """What extended headers say about the member after them."""

    name: bytes | None = None
    size: int | None = None

    def __bool__(self) -> bool:
        return self.name is not None or self.size is not None


def list_members(path: Path | str, start: int = 0, size: int | None = None) -> Contents:
    """The regular files of a tar: of the file `path`, or of the `size` bytes from `start` in it (a tar within a tar).

    Raises DamagedTarError where it is damaged, cut short, compressed, or holds sparse members or unsafe names; OSError
    where the file cannot be opened.
    """
    contents = list_until_damage(path, start, size)
    if contents.damage:
        raise DamagedTarError(contents.damage)
    return contents


def list_until_damage(path: Path | str, start: int = 0, size: int | None = None) -> Contents:
    """As `list_members`, but damage is reported in the result, beside the members that lie before it."""
    contents = Contents()
    file = _opened(str(path))
    end = file.size() if size is None else start + size
    try:
        for member in _walk(_Archive(file, str(path), start, end), contents.passed_over):
            contents.members.append(member)
    except DamagedTarError as error:
        contents.damage = str(error)
    return contents


def read_member(path: Path | str, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of a file, which stays open for the next ones of this process.

    Raises OSError, and ValueError where the file ends before.
    """
    data = _opened(str(path)).read(offset, size)
    if len(data) < size:
        raise ValueError(f"{path} ends within it: the tar was cut short while it was in use")
    return data


def _walk(archive: _Archive, passed_over: Counter[str]) -> Iterator[Member]:
    position, override = archive.start, _Override()
    while (header := archive.header(position)) is not None:
        data = position + _BLOCK
        kind = header[156:157]
        if kind == tarfile.GNUTYPE_SPARSE:
            raise archive.error(position, _SPARSE, _text(header[:100]))
        if kind in (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            size = archive.stated_size(position, header)
            extension = archive.extended_header(position, size)
            _extend(archive, position, kind, extension, override)
            position = data + _padded(size)
            continue
        name = _text(_name(header) if override.name is None else override.name)
        size = archive.stated_size(position, header) if override.size is None else override.size
        if kind in _WITHOUT_DATA or (kind == tarfile.AREGTYPE and name.endswith("/")):  # a folder, before there was 5
            passed_over[_WITHOUT_DATA.get(kind, "folder")] += 1
            size = 0
        else:
            archive.check_data(position, size, name)
            if kind in _REGULAR:
                yield Member(_checked_name(archive, position, name), data, size)
            else:
                passed_over["other"] += 1
        position, override = data + _padded(size), _Override()
    if override:
        raise archive.error(position, "the archive ends after an extended header, before the member it belongs to")


@dataclass(frozen=True)
class _Archive:
    """A stretch of a file that is a tar."""

    file: _OpenFile
    path: str
    start: int
    end: int

    def error(self, position: int, what: str, name: str = "") -> DamagedTarError:
        member = f", member '{name}'" if name else ""
        return DamagedTarError(f"{self.path}, at byte {position}{member}: {what}.")

    def read(self, position: int, size: int) -> bytes:
        try:
            data = self.file.read(position, size)
        except OSError as error:
            raise self.error(position, f"it cannot be read ({error.strerror})") from error
        if len(data) < size:
            raise self.error(position, "the file ends here: it was cut short")
        return data

    def header(self, position: int) -> bytes | None:
        """The header at `position`, its checksum proved; None at the end of the archive, which is proved too."""
        left = self.end - position
        if left < _BLOCK:
            self._refuse_compressed(position, self.read(position, max(0, left)))
            raise self.error(position, _ending(left, empty=position == self.start))
        block = self.read(position, _BLOCK)
        if not any(block):
            self._check_end(position)
            return None
        try:
            stated = _number(block[148:156])
        except ValueError:
            stated = -1
        if stated != sum(block) - sum(block[148:156]) + 8 * ord(" "):  # its own field counts as spaces
            raise self._no_header(position, block)
        return block

    def _no_header(self, position: int, block: bytes) -> DamagedTarError:
        self._refuse_compressed(position, block)
        if position != self.start:
            return self.error(position, "there is no tar header where one must be (checksum differs): it is damaged")
        return self.error(position, "it is no tar: there is no header at its beginning (checksum differs)")

    def _refuse_compressed(self, position: int, block: bytes) -> None:
        for magic, name in _COMPRESSED.items():
            if position == self.start and block.startswith(magic):
                what = f"it is compressed ({name}), and images are read from anywhere in it; decompress it first: "
                raise self.error(position, f"{what}{_DECOMPRESS[name]} {self.path}")

    def _check_end(self, position: int) -> None:
        """A tar ends in blocks of zeros. Zeros that go on and on, as in a download that was allocated before it was
        filled, or a second archive behind the first would otherwise pass for the end."""
        left = self.end - position
        if left > _MOST_PADDING_BYTES:
            raise self.error(position, f"the end of the archive, but {left:,} bytes follow: zeroed, or joined archives")
        rest = self.read(position, left)
        if any(rest):
            raise self.error(position, "zeros in place of a tar header, and more follows: damaged, or joined archives")

    def stated_size(self, position: int, header: bytes) -> int:
        try:
            return _number(header[124:136])
        except ValueError as error:
            raise self.error(position, f"its size is {error}", _text(_name(header))) from error

    def extended_header(self, position: int, size: int) -> bytes:
        if size > _MOST_EXTENDED_BYTES:
            raise self.error(position, f"an extended header of {size:,} bytes: it is damaged")
        self.check_data(position, size, "extended header")
        return self.read(position + _BLOCK, size)

    def check_data(self, position: int, size: int, name: str) -> None:
        beyond = position + _BLOCK + _padded(size) - self.end
        if beyond > 0:
            raise self.error(
                position,
                f"its {size:,} bytes end {beyond:,} bytes after the archive: it was cut short or damaged",
                name,
            )


def _ending(left: int, empty: bool) -> str:
    if empty:
        return "it is empty" if left <= 0 else "it is shorter than one tar header: it was cut short"
    if left > 0:
        return "the file ends within a tar header: it was cut short"
    return "the file ends without the zeros that end an archive: it was cut short"


def _extend(archive: _Archive, position: int, kind: bytes, data: bytes, override: _Override) -> None:
    """Take over what an extended header says."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        override.name = data.split(b"\0", 1)[0]
    if kind not in (*_PAX, tarfile.XGLTYPE):
        return
    try:
        records = dict(_pax_records(data))
        if any(keyword.startswith(b"GNU.sparse.") for keyword in records):
            raise archive.error(position, _SPARSE, _text(records.get(b"GNU.sparse.name", b"")))
        if kind == tarfile.XGLTYPE:
            if records.keys() & {b"path", b"size"}:
                raise ValueError("gives all members one name or size")
            return
        override.name = records.get(b"path", override.name)
        if b"size" in records:
            if not re.fullmatch(rb"[0-9]{1,19}", records[b"size"]):
                raise ValueError(f"states the size {records[b'size'][:40]!r}")
            override.size = int(records[b"size"])
    except ValueError as error:
        raise archive.error(position, f"a pax header that {error}: it is damaged") from error


def _pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(keyword, value) of records "LENGTH KEYWORD=VALUE\\n"; LENGTH counts the whole record. Raises ValueError."""
    position = 0
    while position < len(data) and data[position]:
        match = re.compile(rb"([0-9]{1,7}) ").match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise ValueError("has a record of another length than it states")
        keyword, equals, value = data[match.end() : end - 1].partition(b"=")
        if not keyword or not equals:
            raise ValueError("has a record without a name or a value")
        yield keyword, value
        position = end


def _number(text: bytes) -> int:
    """A header's number: octal digits, or a byte 0x80 and a number in base 256. Raises ValueError with the text."""
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    digits = text.split(b"\0", 1)[0].strip(b" ")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError(f"{text!r}, which is no number")
    return int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] != b"ustar\0":  # GNU's own format keeps times where ustar keeps the beginning of a long name
        return name
    prefix = header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix else name


def _text(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _checked_name(archive: _Archive, position: int, name: str) -> str:
    """A member's name without leading "/" and "./", which tar removes too; names that lead out of a folder are refused.

    No name is ever opened for writing here. But keys are made of them, and whoever unpacks the shards writes those.
    """
    parts = name.replace("\\", "/").split("/")
    if ".." in parts:
        raise archive.error(position, "its name leads out of the folder ('..'); make the archive anew", name)
    plain = re.sub(r"^(?:\.?/)+", "", name)
    if not plain:
        raise archive.error(position, "a file without a name: it is damaged", name)
    return plain


def _padded(size: int) -> int:
    return size + -size % _BLOCK


class _OpenFile:
    """A file that is closed when nobody uses this object any more."""

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self, position: int, size: int) -> bytes:
        """`size` bytes at `position`, or what there is before the end of the file."""
        data = os.pread(self._descriptor, size, position)
        while len(data) < size:  # a network file system, or a read above 2 GB, may return less than asked for
            more = os.pread(self._descriptor, size - len(data), position + len(data))
            if not more:
                break
            data += more
        return data

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _opened(path: str) -> _OpenFile:
    """The file `path`, kept open among the last ones used; opened anew where another file has taken its name."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        raise DataError(f"{path} is no regular file.")
    return _open_file(path, status.st_dev, status.st_ino)


@functools.lru_cache(maxsize=_OPEN_TARS)
def _open_file(path: str, device: int, inode: int) -> _OpenFile:
    return _OpenFile(path)
