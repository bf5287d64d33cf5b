from __future__ import annotations

import io
import struct

import jpegs
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipeline import decode
from data_pipeline.decode import DecodeError, Scratch, decode_image, open_image
from data_pipeline.jpeg import parse_header
from data_pipeline.prepare.examine import examine
from data_pipeline.transforms import resize

# The fast DCT and plain chroma upsampling may move a pixel of a smooth image by this much, not more.
FAST_DECODE_ERROR = 12


def picture() -> npt.NDArray[np.uint8]:
    rows, columns = np.mgrid[:75, :101]
    channels = [np.sin(columns / 15 + k) * 60 + np.cos(rows / 10) * 50 + 128 for k in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encode(kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture()).convert(mode).save(file, kind, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> npt.NDArray[np.int64]:
    with Image.open(io.BytesIO(data)) as opened:
        upright = ImageOps.exif_transpose(opened)
        return np.asarray(upright.convert("RGB")).astype(np.int64)


@pytest.fixture(params=["simplejpeg", "pillow only"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with simplejpeg and as if it were not installed."""
    if request.param == "pillow only":
        monkeypatch.setattr(decode, "_simplejpeg", lambda: None)
    return str(request.param)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"quality": 95}),
        ("RGB", {"quality": 95, "subsampling": 0}),
        ("RGB", {"quality": 95, "progressive": True}),
        ("L", {"quality": 95}),
        ("CMYK", {"quality": 95}),
    ],
)
def test_jpeg_of_every_kind_becomes_rgb(decoder: str, mode: str, options: dict[str, object]) -> None:
    data = encode("JPEG", mode, **options)
    pixels = decode_image(data)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (75, 101, 3)
    assert np.abs(pixels - by_pillow(data)).max() <= FAST_DECODE_ERROR


def test_grayscale_jpeg_has_three_equal_channels(decoder: str) -> None:
    pixels = decode_image(encode(mode="L"))
    assert (pixels == pixels[:, :, :1]).all()


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB"), ("GIF", "P")]
)
def test_other_formats_decode_exactly(kind: str, mode: str) -> None:
    data = encode(kind, mode)
    assert (decode_image(data) == by_pillow(data)).all()


def encode_array(array: npt.NDArray[np.generic], kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "dtype", "mode"), [("PNG", "<u2", "I;16"), ("TIFF", "<u2", "I;16"), ("TIFF", ">u2", "I;16B")]
)
def test_grey_of_16_bits_keeps_its_upper_8(kind: str, dtype: str, mode: str) -> None:
    values = np.array([[0, 255, 256, 511], [0x1234, 0x8000, 0xFEFF, 0xFFFF]])
    data = encode_array(values.astype(dtype), kind)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == mode
    pixels = decode_image(data)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (2, 4, 3)
    for channel in range(3):
        assert pixels[:, :, channel].tolist() == [[0, 0, 1, 1], [0x12, 0x80, 0xFE, 0xFF]]


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pixels_without_a_known_white_are_refused_by_mode(dtype: type[np.generic], mode: str) -> None:
    with pytest.raises(DecodeError, match=f"pixels of mode {mode} "):
        decode_image(encode_array(np.ones((2, 4), dtype), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(decoder: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(quality=95, subsampling=0, exif=exif)
    pixels, expected = decode_image(data), by_pillow(data)
    assert pixels.shape == expected.shape == ((75, 101, 3) if orientation < 5 else (101, 75, 3))
    assert np.abs(pixels - expected).max() <= FAST_DECODE_ERROR


@pytest.mark.parametrize("byte_order", [b"II", b"MM"])
def test_damaged_exif_leaves_the_image_as_it_is_stored(byte_order: bytes) -> None:
    data = encode(quality=95)
    exif = b"Exif\0\0" + byte_order + b"\xff" * 12  # a directory far outside the segment
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    assert (decode_image(data[:2] + segment + data[2:]) == decode_image(data)).all()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100, "subsampling": 0}])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.99])
def test_truncated_jpeg_is_refused(decoder: str, options: dict[str, object], kept: float) -> None:
    data = encode(**options)
    with pytest.raises(DecodeError):
        decode_image(data[: int(len(data) * kept)])


def test_jpeg_without_its_end_marker_is_refused(decoder: str) -> None:
    with pytest.raises(DecodeError):
        decode_image(encode()[:-2])


def test_jpeg_with_zeros_to_the_end_is_refused(decoder: str) -> None:
    data = encode()
    half = len(data) // 2
    with pytest.raises(DecodeError):
        decode_image(data[:half] + bytes(len(data) - half))


def test_jpeg_with_zeroed_data_before_the_end_marker_is_refused() -> None:
    pytest.importorskip("simplejpeg")
    data = encode()
    third = len(data) * 2 // 3
    with pytest.raises(DecodeError, match="premature end of data segment"):
        decode_image(data[:third] + bytes(len(data) - third - 2) + data[-2:])


def as_ycck(cmyk: bytes) -> bytes:
    """The same JPEG with its colours declared as YCCK, in the last byte of Adobe's segment."""
    data = bytearray(cmyk)
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


@pytest.mark.parametrize("ycck", [False, True])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_cmyk_jpeg_is_served_when_sound_and_refused_when_zeroed(ycck: bool, options: dict[str, object]) -> None:
    pytest.importorskip("simplejpeg")
    data = encode(mode="CMYK", **options)
    data = as_ycck(data) if ycck else data
    assert np.abs(decode_image(data) - by_pillow(data)).max() <= FAST_DECODE_ERROR
    kept = len(data) * 6 // 10
    damaged = data[:kept] + bytes(len(data) - kept - 2) + data[-2:]
    assert by_pillow(damaged).shape == (75, 101, 3)  # Pillow alone sees nothing wrong
    with pytest.raises(DecodeError, match="damaged JPEG: Corrupt JPEG data"):
        decode_image(damaged)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_truncated_jpeg_of_other_colour_spaces_is_refused(decoder: str, mode: str) -> None:
    data = encode(mode=mode)
    with pytest.raises(DecodeError):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_truncated_file_of_other_formats_is_refused(kind: str) -> None:
    data = encode(kind)
    with pytest.raises(DecodeError):
        decode_image(data[: len(data) // 2])


def test_changed_byte_in_a_png_is_refused() -> None:
    data = bytearray(encode("PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(DecodeError):
        decode_image(bytes(data))


@pytest.mark.parametrize("data", [b"", b"no image at all", bytes(500), b"\xff\xd8", b"\xff\xd8" + bytes(500)])
def test_bytes_that_are_no_image_are_refused(decoder: str, data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_image(data)


def test_decoded_pixels_pass_through_untouched() -> None:
    pixels = picture()
    assert decode_image(pixels) is pixels


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)]
)
def test_arrays_that_are_not_rgb_bytes_are_refused(array: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(DecodeError, match="must be uint8"):
        decode_image(array)


@pytest.mark.parametrize("kind", jpegs.KINDS)
def test_exact_decoding_gives_pillows_pixels(decoder: str, kind: str) -> None:
    data = jpegs.of_kind(kind)
    np.testing.assert_array_equal(decode_image(data, "exact"), jpegs.by_pillow(data))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}])
def test_fast_decoding_stays_close_to_exact(options: dict[str, object]) -> None:
    data = encode(**options)
    assert _psnr(decode_image(data, "fast"), decode_image(data, "exact")) > 40


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "L", {}),
        ("WEBP", "RGB", {"quality": 80}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"quality": 80}),
    ],
)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_other_formats_give_pillows_pixels_upright(
    kind: str, mode: str, options: dict[str, object], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpegs.encoded(jpegs.textured(31, 47), mode, kind, exif=exif, **options)
    picture, expected = open_image(data, "exact"), jpegs.by_pillow(data)
    assert picture.stored_pixels == 31 * 47
    assert picture.size == expected.shape[:2] == ((31, 47) if orientation < 5 else (47, 31))
    np.testing.assert_array_equal(picture.region((3, 5, 20, 21)), expected[3:23, 5:26])


def test_orientation_in_xmp_counts_where_exif_has_none(decoder: str) -> None:
    plain = jpegs.of_kind("4:2:0")
    packet = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="8"/>'
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(packet) + 2) + packet + plain[2:]
    assert decode_image(data, "exact").shape == (101, 75, 3)
    np.testing.assert_array_equal(decode_image(data, "exact"), jpegs.by_pillow(data))


def test_size_is_known_before_anything_is_decoded() -> None:
    pytest.importorskip("simplejpeg")
    data = jpegs.of_kind("orientation 6")
    header_only = data[: data.index(b"\xff\xda") + 14]
    assert open_image(header_only).size == (101, 75)
    assert open_image(header_only).stored_pixels == 75 * 101
    with pytest.raises(DecodeError):
        open_image(header_only).region((0, 0, 10, 10))


def _with_a_row_spoilt(data: bytes) -> bytes:
    """Zeros in the lower half of the coded pixels, before the end marker."""
    start = len(data) * 3 // 5
    return data[:start] + bytes(len(data) - start - 2) + data[-2:]


def test_what_lies_below_a_box_is_looked_at_unless_a_checksum_has_proved_it() -> None:
    pytest.importorskip("simplejpeg")
    data = jpegs.of_kind("4:2:0")
    spoilt = _with_a_row_spoilt(data)
    upper, lower = (0, 0, 20, 101), (60, 0, 15, 101)
    with pytest.raises(DecodeError, match="damaged JPEG"):
        open_image(spoilt).region(upper)
    np.testing.assert_array_equal(open_image(spoilt, verified=True).region(upper), decode_image(data)[:20])
    with pytest.raises(DecodeError, match="damaged JPEG"):
        open_image(spoilt, verified=True).region(lower)


def _psnr(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / ((first.astype(float) - second) ** 2).mean()))


@pytest.mark.parametrize(("side", "reduction"), [(127, 1), (128, 2), (255, 2), (256, 4), (511, 4), (512, 8), (900, 8)])
def test_decoding_is_scaled_by_what_leaves_two_pixels_for_each_one_wanted(side: int, reduction: int) -> None:
    pytest.importorskip("simplejpeg")
    data = jpegs.encoded(jpegs.textured(900, 910))
    box, target = (0, 0, side, side), (32, 32)
    assert open_image(data, "fast").region(box, target).shape == (*[round(side / reduction)] * 2, 3)
    assert open_image(data, "exact").region(box, target).shape == (side, side, 3)
    assert open_image(data, "fast").region(box).shape == (side, side, 3)


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "gray", "progressive", "orientation 6"])
@pytest.mark.parametrize("target", [(16, 16), (5, 9), (9, 5)])
def test_scaled_regions_are_the_same_from_rows_and_near_to_the_resized_box(kind: str, target: tuple[int, int]) -> None:
    pytest.importorskip("simplejpeg")
    smooth = picture()
    data = {"gray": lambda: jpegs.encoded(smooth, "L"), "progressive": lambda: jpegs.encoded(smooth, progressive=True)}
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind in jpegs.SAMPLINGS:
        source = jpegs.by_cjpeg(smooth, "-sample", jpegs.SAMPLINGS[kind])
    else:
        source = data.get(kind, lambda: jpegs.encoded(smooth, exif=exif))()
    rows = jpegs.in_rows(*jpegs.rows_inserted(source))
    exact = decode_image(source, "exact")
    for box in [(0, 0, *exact.shape[:2]), (3, 5, 64, 64), (1, 2, 70, 66), (8, 9, 65, 65)]:
        top, left, height, width = box
        plain = open_image(source, verified=True, scratch=Scratch()).region(box, target)
        assert plain.shape[0] < height
        assert np.array_equal(plain, open_image(rows, verified=True).region(box, target))
        assert np.array_equal(plain, open_image(source).region(box, target))
        small, expected = np.zeros((*target, 3), np.uint8), np.zeros((*target, 3), np.uint8)
        resize(plain, small, "antialias")
        resize(exact[top : top + height, left : left + width], expected, "antialias")
        # the box is rounded to whole pixels of the reduced image, which moves it by a quarter of a target pixel or less
        assert _psnr(small, expected) > 30


def test_a_region_in_scratch_memory_is_what_it_is_in_fresh_memory() -> None:
    pytest.importorskip("simplejpeg")
    scratch = Scratch()
    for kind in ("4:2:0", "gray", "progressive", "4:2:0"):
        data = jpegs.of_kind(kind)
        region = open_image(data, scratch=scratch).region((5, 6, 60, 80))
        assert np.shares_memory(region, scratch.take(75 * 101 * 3))
        np.testing.assert_array_equal(region, decode_image(data)[5:65, 6:86])


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from([("PNG", "RGB"), ("PNG", "P"), ("PNG", "L"), ("WEBP", "RGB"), ("WEBP", "RGBA")]),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=3),
)
def test_fuzzed_files_of_other_formats_give_pixels_or_a_decode_error(
    kind: tuple[str, str], changes: list[tuple[int, int, bytes]]
) -> None:
    data = bytearray(jpegs.encoded(jpegs.textured(9, 12), kind[1], kind[0]))
    for at, length, new in changes:
        data[at : at + length] = new
    try:
        if open_image(bytes(data)).stored_pixels > 1_000_000:
            return  # a claim that decoding would take at its word, up to MAX_PIXELS
        pixels = decode_image(bytes(data), "exact")
    except DecodeError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        *((sampling, kind.replace(":", "")) for kind, sampling in jpegs.SAMPLINGS.items() if kind[0] == "4"),
        ("2x2,2x1,2x1", "440"),
        ("2x2,1x2,1x2", "422"),
        ("2x1,2x1,2x1", "444"),
        ("2x1,1x2,1x1", "other"),
        ("3x1,1x1,1x1", "other"),
    ],
)
def test_the_header_alone_tells_the_subsampling(sampling: str, name: str) -> None:
    data = jpegs.by_cjpeg(picture(), "-sample", sampling)
    assert parse_header(data).subsampling == name
    if name != "other":  # the two that have no name are refused by simplejpeg
        assert examine(data).subsampling == name


@pytest.mark.parametrize(("kind", "name"), [("gray of 2x2", "Gray"), ("CMYK", "444"), ("progressive", "420")])
def test_the_subsampling_of_grey_cmyk_and_progressive_files(decoder: str, kind: str, name: str) -> None:
    assert examine(jpegs.of_kind(kind)).subsampling == name
