from __future__ import annotations

import contextlib
import itertools
import shutil

import jpegs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jpegs import KINDS, SAMPLINGS, boxes, by_cjpeg, by_pillow, encoded, in_rows, of_kind, textured
from PIL import Image

from data_pipeline import decode, restart_rows
from data_pipeline.config import Decoding
from data_pipeline.decode import DecodeError, decode_image, open_image
from data_pipeline.jpeg import JpegHeader, parse_header
from data_pipeline.restart_rows import RestartRows, Span, cut_rows, find_rows, insert, pieces_per_row

pytest.importorskip("simplejpeg")
if shutil.which("jpegtran") is None:
    pytest.skip("jpegtran is not installed (package libjpeg-turbo-progs)", allow_module_level=True)


@pytest.mark.parametrize("kind", KINDS)
def test_inserting_rows_changes_no_pixel_and_no_orientation(kind: str) -> None:
    data = of_kind(kind)
    changed, offsets = insert(data)
    header = parse_header(changed)
    assert header.plain
    assert header.orientation == parse_header(data).orientation
    assert len(offsets) == header.rows * pieces_per_row(header) + 1
    np.testing.assert_array_equal(by_pillow(changed), by_pillow(data))
    np.testing.assert_array_equal(decode_image(changed), decode_image(data))


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (8, 8), (9, 17), (16, 16), (33, 31), (200, 20)])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_inserting_rows_changes_no_pixel_at_any_size(sampling: str, size: tuple[int, int]) -> None:
    data = by_cjpeg(textured(*size), "-sample", SAMPLINGS[sampling])
    changed, offsets = insert(data)
    np.testing.assert_array_equal(by_pillow(changed), by_pillow(data))
    rows = in_rows(changed, offsets)
    np.testing.assert_array_equal(decode_image(rows, "exact"), by_pillow(data))
    np.testing.assert_array_equal(decode_image(rows, "fast"), decode_image(data, "fast"))


def test_inserting_keeps_exif_profile_and_comment() -> None:
    data = encoded(textured(40, 40), icc_profile=b"profile" * 30, comment=b"a comment")
    changed, _ = insert(data)
    for part in (b"profile" * 30, b"a comment"):
        assert part in changed


def test_pieces_are_the_header_and_the_rows_with_their_markers() -> None:
    data, offsets = insert(of_kind("4:4:4"))
    assert offsets[0] == 0
    pieces = [data[start:end] for start, end in zip(offsets, (*offsets[1:], len(data)), strict=True)]
    assert len(pieces) == 1 + 10
    assert b"\xff\xda" in pieces[0][-16:]  # the start of the scan
    assert [piece[-2:] for piece in pieces[1:-1]] == [bytes([0xFF, 0xD0 + number % 8]) for number in range(9)]
    assert pieces[-1][-2:] == b"\xff\xd9"
    assert find_rows(data) == offsets


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "restart every row"])
def test_a_jpeg_without_a_marker_after_every_row_has_no_rows(kind: str) -> None:
    assert find_rows(of_kind(kind)) == ()


@pytest.mark.parametrize(
    ("sampling", "width", "pieces"),
    [
        ("4:2:0", 500, 8),  # 32 MCUs
        ("4:4:4", 500, 7),  # 63 MCUs: 9 to a piece
        ("4:4:4", 375, 1),  # 47 MCUs
        ("4:1:1", 250, 4),
        ("4:2:0", 4000, 5),  # 250 MCUs: 50 to a piece, so that there are no more than 8
        ("4:2:0", 127, 2),
        ("4:2:0", 64, 1),
        ("4:4:4", 1, 1),
    ],
)
def test_a_row_is_divided_evenly_into_up_to_8_pieces_of_64_pixels_or_more(
    sampling: str, width: int, pieces: int
) -> None:
    data, offsets = insert(by_cjpeg(textured(40, width), "-sample", SAMPLINGS[sampling]))
    header = parse_header(data)
    assert pieces_per_row(header) == pieces
    assert len(offsets) == 1 + header.rows * pieces
    assert find_rows(data) == offsets


def test_a_jpeg_of_more_pieces_than_the_index_can_count_has_no_rows() -> None:
    pixels = np.zeros((8 * 256, 8 * 256, 3), np.uint8)
    assert find_rows(encoded(pixels, subsampling=0, restart_marker_blocks=1)) == ()
    assert len(find_rows(encoded(pixels[:-8], subsampling=0, restart_marker_blocks=1))) == 1 + 255 * 256


@pytest.mark.parametrize("data", [b"", b"no image", of_kind("gray")[:1200], of_kind("gray")[:200]])
def test_what_cannot_take_rows_is_given_back_as_it_is(data: bytes) -> None:
    assert insert(data) == (data, ())


def test_missing_program_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart_rows.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="jpegtran: install the package libjpeg-turbo-progs"):
        insert(of_kind("gray"))


@pytest.mark.parametrize("decoding", ["fast", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_box_equals_that_part_of_the_whole_image(kind: str, decoding: Decoding) -> None:
    data = of_kind(kind)
    whole = decode_image(data, decoding)
    sources = [
        open_image(data, decoding),
        open_image(data, decoding, verified=True),
        open_image(in_rows(*insert(data)), decoding, verified=True, scratch=decode.Scratch()),
    ]
    for picture in sources:
        assert picture.size == whole.shape[:2]
        for top, left, height, width in boxes(*whole.shape[:2]):
            pixels = picture.region((top, left, height, width))
            np.testing.assert_array_equal(pixels, whole[top : top + height, left : left + width])


def _of_several_pieces_a_row(kind: str) -> tuple[bytes, tuple[int, ...]]:
    """A JPEG of which pieces can be cut from within a row, and where they begin; its last MCU is narrow."""
    pixels = textured(75, 252)
    if kind in SAMPLINGS:
        return insert(by_cjpeg(pixels, "-sample", SAMPLINGS[kind]))
    if kind == "a marker after every MCU":
        data = encoded(pixels[:, :100], restart_marker_blocks=1)
        return data, find_rows(data)
    exif = Image.Exif()
    exif[0x0112] = int(kind[-1]) if kind.startswith("orientation") else 1
    return insert(encoded(pixels, "L" if kind == "gray" else "RGB", exif=exif, progressive=kind == "progressive"))


@pytest.mark.parametrize("decoding", ["fast", "exact"])
@pytest.mark.parametrize(
    "kind", [*SAMPLINGS, "gray", "progressive", "orientation 3", "orientation 6", "a marker after every MCU"]
)
def test_every_box_equals_that_part_where_columns_can_be_cut(kind: str, decoding: Decoding) -> None:
    data, offsets = _of_several_pieces_a_row(kind)
    header = parse_header(data)
    assert pieces_per_row(header) >= 2
    whole = decode_image(data, decoding)
    picture = open_image(in_rows(data, offsets), decoding, verified=True, scratch=decode.Scratch())
    edges = [place + shift for place in range(0, header.width + 1, 4 * header.mcu_width) for shift in (-1, 0, 1)]
    edges += [header.width - 3, header.width]  # within the last MCU, which may be narrower than smooth upsampling likes
    sides = [(left, right) for left, right in itertools.product(edges, edges) if 0 <= left < right <= header.width]
    flip = header.orientation >= 5
    strips = [(left, 3, right - left, 20) if flip else (3, left, 20, right - left) for left, right in sides]
    for top, left, height, width in [*boxes(*picture.size), *strips]:
        pixels = picture.region((top, left, height, width))
        np.testing.assert_array_equal(pixels, whole[top : top + height, left : left + width])
        target = (-(-height // 5), -(-width // 5))
        scaled = open_image(data, decoding).region((top, left, height, width), target)
        np.testing.assert_array_equal(picture.region((top, left, height, width), target), scaled)


def test_only_the_columns_under_the_box_are_read() -> None:
    log: list[list[Span]] = []
    data, offsets = _of_several_pieces_a_row("4:2:0")  # 5 rows of 4 pieces, 16 x 64 pixels each
    fast, exact = (open_image(in_rows(data, offsets, log), decoding) for decoding in ("fast", "exact"))
    for picture, box, spans in [
        (fast, (16, 64, 32, 64), [(6, 7), (10, 11)]),
        (fast, (17, 63, 2, 2), [(5, 7)]),
        (fast, (17, 0, 20, 252), [(5, 13)]),
        (exact, (17, 65, 5, 62), [(6, 7)]),
        (exact, (17, 64, 5, 62), [(5, 7)]),  # its first column mixes in chroma from the left
        (exact, (17, 65, 5, 63), [(6, 8)]),  # its last column mixes in chroma from the right
    ]:
        log.clear()
        picture.region(box)
        assert log == [spans]


def test_the_smooth_upsampling_of_exact_decoding_needs_rows_beyond_the_box() -> None:
    """Guards the tests above: where rows are cut without a neighbour, pixels do differ."""
    data, offsets = insert(of_kind("4:2:0"))
    header = parse_header(data)
    rows = in_rows(data, offsets)
    alone = decode_image(bytes(cut_rows(rows, data[: offsets[1]], header, (1, 3), (0, 1))), "exact")
    assert (alone != by_pillow(data)[16:48]).any(axis=(1, 2)).nonzero()[0].tolist() == [0, 31]


def test_only_the_rows_under_the_box_are_read() -> None:
    log: list[list[Span]] = []
    picture = open_image(in_rows(*insert(of_kind("4:2:0")), log), "exact")  # rows of 16 pixels
    assert log == [[(0, 1)]]
    for top, height, pieces in [
        (17, 10, (2, 3)),
        (16, 15, (1, 3)),  # its first row of pixels mixes in chroma from above
        (17, 15, (2, 4)),  # its last row of pixels mixes in chroma from below
        (0, 3, (1, 2)),
        (70, 5, (5, 6)),
    ]:
        log.clear()
        picture.region((top, 0, height, 5))
        assert log == [[pieces]]


def test_fast_decoding_reads_no_neighbours() -> None:
    log: list[list[Span]] = []
    picture = open_image(in_rows(*insert(of_kind("4:2:0")), log), "fast")
    log.clear()
    picture.region((16, 0, 16, 5))
    assert log == [[(2, 3)]]


def test_a_row_table_of_another_image_is_an_error() -> None:
    data, offsets = insert(of_kind("4:2:0"))
    for wrong in (offsets[:-1], (*offsets, len(data) - 2)):
        with pytest.raises(DecodeError, match="its 5 rows of MCUs have 1 pieces each, and the index lists"):
            open_image(in_rows(data, wrong)).region((0, 0, 5, 5))


@pytest.mark.parametrize("decoding", ["fast", "exact"])
def test_a_changed_row_is_noticed_where_the_coding_gives_it_away(decoding: Decoding) -> None:
    data, offsets = insert(of_kind("4:2:0"))
    broken = bytearray(data)
    broken[offsets[2] : offsets[3] - 2] = bytes(offsets[3] - 2 - offsets[2])
    picture = open_image(in_rows(bytes(broken), offsets), decoding)
    assert picture.region((33, 0, 10, 10)).shape == (10, 10, 3)
    with pytest.raises(DecodeError, match="damaged JPEG"):
        picture.region((17, 0, 10, 10))


SOURCES = [of_kind(kind) for kind in ("4:2:0", "progressive", "gray", "restart every row", "CMYK", "orientation 6")]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A JPEG with bytes changed, taken out, repeated or put in; most often near its beginning."""
    data = bytearray(draw(st.sampled_from(SOURCES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.one_of(st.integers(0, 700), st.integers(0, len(data))))
        length = draw(st.integers(0, 30))
        data[at : at + length] = draw(
            st.one_of(st.binary(max_size=8), st.just(bytes(length)), st.just(b"\xff" * length))
        )
    return bytes(data)


@settings(max_examples=300, deadline=None)
@given(st.one_of(mutated(), st.binary(max_size=100), st.binary(max_size=100).map(lambda rest: b"\xff\xd8\xff" + rest)))
def test_fuzzed_headers_give_a_header_or_a_value_error(data: bytes) -> None:
    try:
        header = parse_header(data)
    except ValueError:
        return
    assert isinstance(header, JpegHeader)
    assert 1 <= header.orientation <= 8
    assert 0 < header.height_at < header.scan_at <= len(data)
    assert find_rows(data) == () or len(find_rows(data)) == header.rows * pieces_per_row(header) + 1


@settings(max_examples=300, deadline=None)
@given(mutated(), st.booleans(), st.sampled_from(["fast", "exact"]), st.tuples(*[st.floats(0, 1)] * 4))
def test_fuzzed_jpegs_give_pixels_or_a_decode_error(
    data: bytes, verified: bool, decoding: Decoding, box: tuple[float, ...]
) -> None:
    try:
        picture = open_image(data, decoding, verified=verified)
        if picture.stored_pixels > 1_000_000:
            return  # a claim that decoding would take at its word, up to MAX_PIXELS
        height, width = (max(1, round(share * side)) for share, side in zip(box, picture.size, strict=False))
        top, left = (
            int(share * (side - part)) for share, side, part in zip(box[2:], picture.size, (height, width), strict=True)
        )
        pixels = picture.region((top, left, height, width), (5, 5))
    except DecodeError:
        return
    assert pixels.dtype == np.uint8
    assert min(pixels.shape) > 0


@settings(max_examples=300, deadline=None)
@given(mutated(), st.lists(st.integers(0, 5000), min_size=4, max_size=6), st.integers(0, 74), st.integers(1, 75))
def test_fuzzed_rows_give_pixels_or_a_decode_error(data: bytes, starts: list[int], top: int, height: int) -> None:
    with contextlib.suppress(ValueError):
        starts = [parse_header(data).scan_at, *starts[1:]]
    rows = in_rows(data, (0, *sorted(starts)))
    try:
        picture = open_image(rows, "exact")
        if picture.stored_pixels > 1_000_000:
            return
        limit = picture.size[0]
        pixels = picture.region((min(top, limit - 1), 0, min(height, limit - min(top, limit - 1)), 1))
    except DecodeError:
        return
    assert min(pixels.shape) > 0


def test_rows_as_a_whole_are_the_file() -> None:
    data, offsets = insert(of_kind("gray"))
    assert isinstance(in_rows(data, offsets), RestartRows)
    assert in_rows(data, offsets).whole() == data
    np.testing.assert_array_equal(decode_image(in_rows(data, offsets), "exact"), jpegs.by_pillow(data))
