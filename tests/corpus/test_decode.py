from __future__ import annotations

import io
import struct
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rar.corpus import decode as module
from rar.corpus.decode import begins_as_picture, decode, fit_square
from rar.schema import RowError
from tests.conftest import SHARED_DATA

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def quarters() -> Image.Image:
    """48 x 32, four flat quarters: red, green over blue, white."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24], pixels[:16, 24:], pixels[16:, :24], pixels[16:, 24:] = RED, GREEN, BLUE, WHITE
    return Image.fromarray(pixels)


def noise(height: int = 40, width: int = 56) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def centers(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The middle pixel of each quarter, rounded to 0 or 255: top left, top right, bottom left, bottom right."""
    height, width = pixels.shape[:2]
    spots = [(height * y // 4, width * x // 4) for y in (1, 3) for x in (1, 3)]
    return [tuple(int(value > 127) * 255 for value in pixels[spot]) for spot in spots]


LOSSLESS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "ppm": ("PPM", {}),
    "tiff": ("TIFF", {}),
    "tiff-lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff-deflate": ("TIFF", {"compression": "tiff_deflate"}),
}
LOSSY: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {}),
    "jpeg-progressive": ("JPEG", {"progressive": True}),
    "webp-lossy": ("WEBP", {}),
    "gif": ("GIF", {}),
    "tiff-jpeg": ("TIFF", {"compression": "jpeg"}),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_format_gives_the_very_pixels(name: str) -> None:
    kind, options = LOSSLESS[name]
    pixels = decode(encoded(noise(), kind, **options))
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.asarray(noise()))


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_format_gives_the_same_colours(name: str) -> None:
    kind, options = LOSSY[name]
    pixels = decode(encoded(quarters(), kind, **options))
    assert pixels.shape == (32, 48, 3)
    assert centers(pixels) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert centers(decode(data)) == [RED] * 4


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),
        (3, [WHITE, BLUE, GREEN, RED]),
        (4, [BLUE, WHITE, RED, GREEN]),
        (5, [RED, BLUE, GREEN, WHITE]),
        (6, [BLUE, RED, WHITE, GREEN]),
        (7, [WHITE, GREEN, BLUE, RED]),
        (8, [GREEN, WHITE, RED, BLUE]),
        (0, [RED, GREEN, BLUE, WHITE]),  # not in the standard: as stored
        (9, [RED, GREEN, BLUE, WHITE]),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_undone(kind: str, orientation: int, expected: list[tuple[int, ...]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encoded(quarters(), kind, exif=exif))
    assert pixels.shape == ((48, 32, 3) if orientation in (5, 6, 7, 8) else (32, 48, 3))
    assert centers(pixels) == expected


def exif_block(entry: bytes) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0"


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        exif_block(struct.pack("<HHI", 0x0112, 3, 1)),  # an entry cut in half
        exif_block(struct.pack("<HHII", 0x0112, 5, 1, 0xFFFFFF00)),  # a rational beyond the end
        exif_block(struct.pack("<HHI4s", 0x0112, 2, 4, b"six\0")),  # text where a number belongs
        exif_block(struct.pack("<HHII", 0x0112, 3, 0, 0)),  # no value
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, for the cut tags
def test_broken_exif_does_not_lose_the_photo(exif: bytes) -> None:
    assert centers(decode(encoded(quarters(), "JPEG", exif=exif))) == [RED, GREEN, BLUE, WHITE]


def test_exif_with_a_zero_denominator_does_not_lose_the_photo() -> None:
    block = exif_block(struct.pack("<HHII", 0x0112, 5, 1, 26)) + struct.pack("<II", 1, 0)
    assert centers(decode(encoded(quarters(), "JPEG", exif=block))) == [RED, GREEN, BLUE, WHITE]


# Modes


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_palette(kind: str) -> None:
    assert centers(decode(encoded(quarters().quantize(), kind))) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_a_transparent_palette_colour_becomes_white(kind: str) -> None:
    image = quarters().quantize()
    red = image.getpixel((0, 0))
    pixels = decode(encoded(image, kind, transparency=red) if kind != "WEBP" else encoded(rgba_quarters(), kind, lossless=True))
    assert centers(pixels) == [WHITE, GREEN, BLUE, WHITE]


def rgba_quarters() -> Image.Image:
    image = quarters().convert("RGBA")
    image.paste((255, 0, 0, 0), (0, 0, 24, 16))
    return image


def test_palette_with_graded_transparency_is_composited_on_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    data = encoded(image, "PNG", transparency=bytes([255, 128]))
    np.testing.assert_allclose(decode(data)[0, 0], [227, 127, 127], atol=1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_composited_on_white(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    half = decode(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 128)), kind, **options))
    np.testing.assert_allclose(half[0, 0], [227, 127, 127], atol=1)
    none = decode(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 0)), kind, **options))
    assert tuple(none[0, 0]) == WHITE


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_with_alpha(kind: str) -> None:
    image = Image.merge("LA", [Image.new("L", (2, 1), 100), Image.fromarray(np.array([[255, 0]], np.uint8))])
    assert decode(encoded(image, kind)).tolist() == [[[100] * 3, [255] * 3]]


@pytest.mark.parametrize(("mode", "key"), [("L", 0), ("RGB", (0, 0, 0)), ("1", 0)])
def test_png_colour_key_becomes_white(mode: str, key: object) -> None:
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), (90, 90, 90) if mode == "RGB" else 90)
    seen = 255 if mode == "1" else 90
    assert decode(encoded(image, "PNG", transparency=key)).tolist() == [[[255] * 3, [seen] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM", "GIF"])
def test_grey(kind: str) -> None:
    pixels = decode(encoded(Image.new("L", (16, 8), 77), kind))
    assert pixels.shape == (8, 16, 3)
    np.testing.assert_allclose(pixels, 77, atol=1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM", "GIF"])
def test_one_bit(kind: str) -> None:
    image = Image.fromarray(np.array([[True, False, True]] * 2))
    assert image.mode == "1"
    assert decode(encoded(image, kind))[:, :, 0].tolist() == [[255, 0, 255]] * 2


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    inks = {RED: (0, 255, 255, 0), BLACK: (0, 0, 0, 255), WHITE: (0, 0, 0, 0)}
    for color, ink in inks.items():
        pixels = decode(encoded(Image.new("CMYK", (16, 16), ink), kind))
        np.testing.assert_allclose(pixels, np.broadcast_to(color, (16, 16, 3)), atol=3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    deep = np.array([[0, 255, 256, 128 * 257, 65535]], np.uint16)
    assert decode(encoded(Image.fromarray(deep), kind))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def png(width: int, height: int, bits: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG from its unfiltered rows; Pillow cannot write deep colour."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_sixteen_bit_colour_png() -> None:
    rows = b"\0" + struct.pack(">6H", 0, 0x8000, 0xFFFF, 0x0100, 0x00FF, 0x7FFF)
    assert decode(png(2, 1, 16, 2, rows)).tolist() == [[[0, 128, 255], [1, 0, 127]]]


def test_sixteen_bit_grey_png_with_a_colour_key() -> None:
    rows = b"\0" + struct.pack(">3H", 0x0100, 0x0101, 0xFFFF)
    data = png(3, 1, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 0x0101)))
    assert decode(data)[0, :, 0].tolist() == [1, 255, 255]


def test_sixteen_bit_grey_with_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 2
    deep = Image.fromarray(np.array([[0, 65535]], np.uint16))
    for kind in ("PNG", "TIFF"):
        assert decode(encoded(deep, kind, exif=exif))[0, :, 0].tolist() == [255, 0]


def test_twelve_bit_tiff_is_scaled_by_its_own_white() -> None:
    packed = bytes([0xFF, 0xF8, 0x00])  # two 12-bit pixels: 0xFFF, 0x800
    # width, height, bits, compression, photometric, strip offset, samples, rows per strip, strip bytes
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<I", 12) + packed + b"\0" + ifd + b"\0\0\0\0"
    assert decode(data)[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_defined_white_are_refused(dtype: type) -> None:
    with pytest.raises(RowError, match="no defined white"):
        decode(encoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF"))


# Formats beyond the web's, and what a viewer opens though its wrapping is broken


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "QOI", "SGI", "DDS", "PCX", "TGA", "DIB", "ICO", "ICNS"])
def test_other_formats(kind: str) -> None:
    image = quarters().resize((64, 64)) if kind in ("ICO", "ICNS") else quarters()
    data = encoded(image, kind)
    assert centers(decode(data)) == [RED, GREEN, BLUE, WHITE]
    assert begins_as_picture(data[: module.HEAD]) == (kind not in ("TGA", "DIB"))  # these have no mark


def test_heic_by_its_extra() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    data = encoded(quarters(), "HEIF")
    assert begins_as_picture(data[: module.HEAD]) and centers(decode(data)) == [RED, GREEN, BLUE, WHITE]


def test_heic_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # what an import finds where the package is not there
    with pytest.raises(RowError, match=r"pip install 'rar\[heic\]'"):
        decode(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(40))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_pictures_are_told_by_their_first_bytes(kind: str) -> None:
    assert begins_as_picture(encoded(quarters(), kind)[: module.HEAD])


@pytest.mark.parametrize(
    "head", [b"", b"BM", b"P", b"Python", b"RIFF....WAVE", b"<svg>", b"%PDF-1.7", b"\0\0\0\x18ftypmp42", bytes(32)]
)
def test_other_files_are_told_apart(head: bytes) -> None:
    assert not begins_as_picture(head)


MEGABYTES = zlib.compress(b"x" * 3_000_000)
ANCILLARY = {
    "large compressed text": chunk(b"zTXt", b"k\0\0" + MEGABYTES),
    "large profile": chunk(b"iCCP", b"k\0\0" + MEGABYTES),
    "much text": b"".join(chunk(b"tEXt", b"k\0" + b"y" * 900_000) for _ in range(80)),
    "wrong checksum": chunk(b"tEXt", b"k\0hello")[:-1] + b"?",
    "wrong checksum of a colour key": chunk(b"tRNS", bytes(6))[:-1] + b"?",
    "short colour key": chunk(b"tRNS", b"\0"),
    "short resolution": chunk(b"pHYs", b"\0"),
    "short gamma": chunk(b"gAMA", b"\0"),
    "animation without frames": chunk(b"acTL", struct.pack(">II", 9, 0)),
    "frame of nothing": chunk(b"fcTL", bytes(26)),
}


@pytest.mark.parametrize("name", ANCILLARY)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_png_is_not_lost_to_what_describes_it(name: str) -> None:
    data = encoded(noise(), "PNG")
    np.testing.assert_array_equal(decode(data[:33] + ANCILLARY[name] + data[33:]), np.asarray(noise()))


def test_a_salvaged_png_keeps_its_turn_and_its_key() -> None:
    exif = Image.Exif()
    exif[0x0112] = 2
    data = encoded(quarters(), "PNG", exif=exif, transparency=RED)
    broken = data[:33] + ANCILLARY["wrong checksum"] + data[33:]
    assert centers(decode(broken)) == centers(decode(data)) == [GREEN, WHITE, WHITE, BLUE]


def test_damaged_pixels_of_a_png_stay_an_error() -> None:
    data = bytearray(encoded(noise(), "PNG"))
    data[60] ^= 1
    with pytest.raises(RowError, match="broken data stream"):
        decode(bytes(data))


def segment(kind: int, body: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body


BODIES = [
    b"",
    b"MPF\0",
    b"Adobe",
    b"JFIF",
    b"JFIF\0",
    b"ICC_PROFILE\0",
    b"Exif\0\0",
    b"FPXR\0",
    b"Photoshop 3.0\0" + b"8BIM\3\xed\0\0\0\0\0\x10",
]


@pytest.mark.parametrize("kind", [*range(0xE0, 0xF0), 0xFE])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_jpeg_is_not_lost_to_what_describes_it(kind: int) -> None:
    data = encoded(noise(), "JPEG")
    for body in BODIES:
        np.testing.assert_array_equal(decode(data[:2] + segment(kind, body) + data[2:]), decode(data))


def test_stray_bytes_between_segments_are_skipped() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(quarters(), "JPEG", exif=exif)
    for place in (2, 20):
        assert centers(decode(data[:place] + b"junk" + data[place:])) == [WHITE, BLUE, GREEN, RED]


def test_jpeg_variants() -> None:
    profile = decode(encoded(noise(), "JPEG", icc_profile=b"z" * 3_000_000))  # in many segments
    np.testing.assert_array_equal(profile, decode(encoded(noise(), "JPEG")))
    assert centers(decode(encoded(quarters(), "JPEG", keep_rgb=True))) == [RED, GREEN, BLUE, WHITE]
    for subsampling in ("4:4:4", "4:2:0", "4:1:1"):
        assert centers(decode(encoded(quarters(), "JPEG", subsampling=subsampling))) == [RED, GREEN, BLUE, WHITE]
    pair = encoded(quarters(), "MPO", save_all=True, append_images=[noise()])
    assert centers(decode(pair)) == centers(decode(pair, 8)) == [RED, GREEN, BLUE, WHITE]
    np.testing.assert_array_equal(decode(pair[:-500]), decode(pair))  # the second picture is cut
    with pytest.raises(RowError, match=r"(?i)truncated"):
        decode(pair[: len(encoded(quarters(), "JPEG")) // 2])


def grey_tiff(bits: int, photometric: int, row: bytes, width: int) -> bytes:
    # width, height, bits, compression, photometric, strip offset, samples, rows per strip, strip bytes
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(row)}
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    row += b"\0" * (len(row) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(row)) + row + ifd + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("bits", "row", "levels"),
    [
        (1, bytes([0b10110000]), [255, 0, 255, 255]),
        (2, bytes([0b00011011]), [0, 85, 170, 255]),
        (4, bytes([0x0F, 0x5A]), [0, 255, 85, 170]),
        (8, bytes([0, 100, 200, 255]), [0, 100, 200, 255]),
        (16, struct.pack("<4H", 0, 100 * 257, 200 * 257, 65535), [0, 100, 200, 255]),
    ],
)
def test_a_tiff_whose_white_is_zero_is_no_negative(bits: int, row: bytes, levels: list[int]) -> None:
    assert decode(grey_tiff(bits, 1, row, 4))[0, :, 0].tolist() == levels
    assert decode(grey_tiff(bits, 0, row, 4))[0, :, 0].tolist() == [255 - level for level in levels]


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_tiff_of_fewer_strips_than_rows_is_truncated(orientation: int) -> None:
    """Found by fuzzing: 130 bytes that say 16 million rows, and hold eight; the rest came out black."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", (4, 4), 9).save(buffer, "TIFF", exif=exif)
    data = buffer.getvalue()
    assert decode(data).shape == (4, 4, 3)
    rows = struct.pack("<HHII", 257, 4, 1, 4)
    assert data.count(rows) == 1
    with pytest.raises(RowError, match="truncated TIFF"):
        decode(data.replace(rows, struct.pack("<HHII", 257, 4, 1, 4000)))


@pytest.mark.parametrize(
    ("bits", "row", "key", "seen"),
    [
        (1, bytes([0b01010000]), 1, [0, 255, 0, 255]),
        (2, bytes([0b00011011]), 1, [0, 255, 170, 255]),
        (4, bytes([0x05, 0xAF]), 5, [0, 255, 170, 255]),
        (8, bytes([0, 5, 9, 255]), 5, [0, 255, 9, 255]),
    ],
)
def test_a_pngs_key_counts_in_its_own_bits(bits: int, row: bytes, key: int, seen: list[int]) -> None:
    assert decode(png(4, 1, bits, 0, b"\0" + row, chunk(b"tRNS", struct.pack(">H", key))))[0, :, 0].tolist() == seen


def test_a_deep_colour_key() -> None:
    rows = b"\0" + struct.pack(">6H", 0x1234, 0x1234, 0x1234, 0x3400, 0x3400, 0x3400)
    data = png(2, 1, 16, 2, rows, chunk(b"tRNS", struct.pack(">3H", 0x1234, 0x1234, 0x1234)))
    assert decode(data).tolist() == [[[255] * 3, [0x34] * 3]]


# What cannot be decoded


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"\0", "not a readable"),
        (b"<html>404 Not Found</html>", "not a readable"),
        (b"\xff\xd8\xff", "not a readable"),
        (b"\x89PNG\r\n\x1a\n", "not a readable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a readable"),  # a format Pillow would run a program for
    ],
)
def test_not_an_image(data: bytes, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        decode(data)


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, for cut TIFF tags
def test_a_truncated_file_is_an_error_and_never_half_a_picture(name: str) -> None:
    kind, options = (LOSSLESS | LOSSY)[name]
    data = encoded(noise(), kind, **options)
    whole = decode(data)
    for cut in {*range(0, len(data), max(1, len(data) // 40)), len(data) - 1}:
        try:
            pixels = decode(data[:cut])
        except RowError:
            continue
        np.testing.assert_array_equal(pixels, whole)  # only the format's own end was missing


@pytest.mark.parametrize("thumbnail", [b"", b"\xff\xd9"])
def test_a_jpeg_padded_with_zeros_is_truncated(thumbnail: bytes) -> None:
    data = encoded(noise(), "JPEG", exif=b"Exif\0\0" + thumbnail)
    with pytest.raises(RowError, match="truncated"):
        decode(data[: len(data) // 2] + b"\0" * (len(data) - len(data) // 2))


def test_bytes_after_the_end_do_not_matter() -> None:
    for kind in ("JPEG", "PNG", "GIF", "BMP", "PPM"):
        data = encoded(noise(), kind)
        np.testing.assert_array_equal(decode(data + b"\xff\xda motion photo" * 9), decode(data))


def test_a_bomb_is_refused_from_its_header() -> None:
    bomb = png(30_000, 30_000, 8, 0, b"")
    with pytest.raises(RowError, match="too large"):
        decode(bomb)


def test_the_limit_is_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    assert decode(encoded(noise(10, 10), "PNG")).shape == (10, 10, 3)
    with pytest.raises(RowError, match="too large: 11 x 10"):
        decode(encoded(noise(10, 11), "PNG"))


@pytest.mark.parametrize("size", [(1, 1), (1, 100_000), (100_000, 1)])
def test_odd_but_legal_sizes_decode(size: tuple[int, int]) -> None:
    assert decode(encoded(Image.new("RGB", size, RED), "PNG"), min_side=64).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("data", [b"P6 0 4 255\n", png(0, 4, 8, 0, b""), png(4, 0, 8, 0, b"")])
def test_no_pixels_is_an_error(data: bytes) -> None:
    with pytest.raises(RowError):
        decode(data)


def test_reasons_are_one_line_and_repeatable() -> None:
    for data in (b"junk", encoded(noise(), "PNG")[:-40], encoded(noise(), "WEBP")[:-40]):
        reasons = set()
        for _ in range(2):
            with pytest.raises(RowError) as caught:
                decode(data)
            reasons.add(str(caught.value))
        assert len(reasons) == 1 and "\n" not in reasons.pop()


PARENTS = [
    encoded(noise(12, 12), "JPEG"),
    encoded(noise(12, 12), "JPEG", progressive=True, exif=exif_block(struct.pack("<HHII", 0x0112, 3, 1, 6))),
    encoded(noise(12, 12).quantize(), "PNG"),
    encoded(noise(12, 12), "TIFF", compression="tiff_lzw"),
    encoded(noise(12, 12), "WEBP"),
    encoded(noise(12, 12).quantize(), "GIF"),
    encoded(noise(12, 12).quantize(), "BMP"),
    encoded(noise(12, 12), "PPM"),
]


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(PARENTS)))
    for _ in range(draw(st.integers(1, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(1, len(data)))]) if draw(st.booleans()) else bytes(data)


@given(data=st.one_of(st.binary(max_size=200), mutants()), min_side=st.sampled_from([None, 1, 4]))
@settings(max_examples=400)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_any_bytes_give_pixels_or_a_row_error(data: bytes, min_side: int | None) -> None:
    try:
        pixels = decode(data, min_side)
    except RowError as error:
        assert str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size


# Scaling


@pytest.mark.parametrize(
    ("min_side", "expected"),
    [(None, (400, 640)), (401, (400, 640)), (200, (200, 320)), (120, (200, 320)), (50, (50, 80)), (1, (50, 80))],
)
def test_min_side_scales_a_jpeg_down_but_not_below_it(min_side: int | None, expected: tuple[int, int]) -> None:
    image = quarters().resize((640, 400))
    for options in ({}, {"progressive": True}):
        pixels = decode(encoded(image, "JPEG", **options), min_side)
        assert pixels.shape == (*expected, 3)
        assert centers(pixels) == [RED, GREEN, BLUE, WHITE]


def test_min_side_leaves_other_formats_alone_and_keeps_cmyk_right() -> None:
    assert decode(encoded(noise(), "PNG"), 8).shape == (40, 56, 3)
    red = decode(encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG"), 8)
    np.testing.assert_allclose(red, np.broadcast_to(RED, red.shape), atol=3)


def test_fit_square_stretches_and_antialiases() -> None:
    assert centers(fit_square(np.asarray(quarters()), 8, "squash", "bicubic")) == [RED, GREEN, BLUE, WHITE]
    checkers = np.kron(np.indices((32, 32)).sum(0) % 2, np.ones((1, 1))).astype(np.uint8)[..., None].repeat(3, 2) * 255
    small = fit_square(checkers, 4, "squash", "bicubic")
    assert small.shape == (4, 4, 3) and small.dtype == np.uint8
    np.testing.assert_allclose(small, 127.5, atol=8)  # every second pixel without antialiasing would be all black


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")
def test_real_photos_decode() -> None:
    coco = sorted((SHARED_DATA / "coco" / "images").glob("*.jpg"))
    grocery = sorted((SHARED_DATA / "grocery" / "images").rglob("*.jpg"))[::50]
    assert len(coco) == 128 and len(grocery) > 50
    for photo in coco + grocery:
        pixels = decode(photo.read_bytes())
        with Image.open(photo) as image:
            assert pixels.shape[:2] in (image.size, image.size[::-1])
        small = decode(photo.read_bytes(), 96)
        assert min(small.shape[:2]) >= min(96, min(pixels.shape[:2]))
        # the same picture, only smaller
        assert np.abs(np.subtract(*(fit_square(one, 8, "squash", "bicubic").astype(int) for one in (small, pixels)))).mean() < 4
