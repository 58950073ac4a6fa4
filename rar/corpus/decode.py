"""Encoded bytes -> upright 8-bit RGB pixels, or a RowError that says why not. Pure and total: nothing else is ever raised.

Choices, and what they cost:
- Content decides, never the file's name: a PNG called .jpg decodes. Tried are Pillow's formats of photos, screenshots and
  textures; not those that start a subprocess (EPS), need Windows (WMF) or hold measurements (FITS, HDF5). HEIC needs the extra
  `rar[heic]`, and says so in its row where that is missing.
- What a viewer shows is not lost to its wrapping: where Pillow refuses a PNG or JPEG for its text, profile or metadata (too
  large, damaged), these are cut away and the rest is decoded. Damaged pixels stay an error.
- The size is checked in the header, before a pixel is decoded; at MAX_PIXELS the RGB pixels alone take 512 MiB.
- A truncated file is an error, not half a picture over grey; so is a JPEG whose end was never written (an interrupted download
  padded with zeros), which libjpeg alone would fill. Damage in the middle of a format without checksums (JPEG, lossy WebP, BMP,
  PPM) goes unnoticed.
- Broken EXIF does not lose the photo: it is decoded as stored, as viewers do.
- Transparency is composited on white, which is what product shots and clip art assume.
- Deep grey is scaled by its own white level; colour profiles are not applied. Pixels without a defined white (32-bit integers,
  floats) are refused rather than guessed.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from rar.schema import RowError

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "QOI", "PSD", "SGI", "SUN", "DDS", "ICNS"),
    *("DIB", "PCX", "TGA"),  # the last have the weakest marks and are tried after all others
)
SUFFIXES = frozenset(
    f".{name}"
    for names in (
        "jpg jpeg jpe jfif jif jfi mpo png apng webp gif bmp dib tif tiff ppm pgm pbm pnm pfm avif avifs heic heif hif",
        "jp2 j2k j2c jpc jpf jpx ico icns qoi psd sgi rgb rgba bw ras dds pcx tga icb vda vst",
    )
    for name in names.split()
)
HEAD = 32  # bytes that tell most formats
MARKS = (  # of the formats that often come without a suffix
    *(
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF87a",
        b"GIF89a",
        b"II*\0",
        b"MM\0*",
        b"II+\0",
        b"MM\0+",
        b"qoif",
        b"8BPS\0\1",
    ),
    *(b"DDS ", b"icns", b"\0\0\1\0", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
)
MARK = re.compile(
    rb"RIFF....WEBP|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|P[1-7fF]\s|\x01\xda[\0\1][\1\2]|\x0a\x05[\0\1][\1\2\4\x08]",
    re.DOTALL,
)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
AVIF_BRANDS = (b"avif", b"avis")
KEPT_CHUNKS = (b"tRNS", b"eXIf")  # of a PNG's ancillary ones: what changes the picture
KEPT_SEGMENTS = {  # of a JPEG's descriptive ones: how colours are meant, how it is turned; and how long each must be
    b"\xe0": (b"JFIF\0", 16),
    b"\xe1": (b"Exif\0\0", 10),
    b"\xee": (b"Adobe", 16),
}
MAX_PIXELS = 178_956_970  # as many as fit 512 MiB of RGB; Pillow raises above the same number
JPEG_END = b"\xff\xd9"
TIFF_ROWS, TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 257, 258, 262, 0

UPRIGHT = {  # EXIF 2.3, tag 0x0112: how the stored picture must be turned
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, min_side: int | None = None) -> np.ndarray:
    """Decode an image's first frame, turned upright: (H, W, 3) uint8 RGB, writable.

    min_side: pixels. A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size (DCT scaling, much cheaper) as long as its shorter
    side stays >= min_side; a smaller image keeps its size. Raises RowError with the reason, and nothing else.
    """
    if not data:
        raise RowError("empty file")
    try:
        return _pixels(data, min_side)
    except RowError as error:
        bare = _bare(data)
        if bare is None:
            raise
        try:
            return _pixels(bare, min_side)
        except RowError:
            raise error from None


def begins_as_picture(head: bytes) -> bool:
    """Whether a file's first HEAD bytes are those of a picture; formats without a mark of their own (TGA) are not told."""
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    known = brand in HEIF_BRANDS or brand in AVIF_BRANDS or brand in (b"mif1", b"msf1")
    return known or head.startswith(MARKS) or MARK.match(head) is not None


def fit_square(image: np.ndarray, side: int, resize_mode: str, interpolation: str) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3) uint8 as open_clip's preprocessing does it.

    resize_mode: `shortest` resizes the shorter side to `side` and crops the middle, `squash` stretches. interpolation:
    `bicubic` or `bilinear`, antialiased. Resizing and cropping are one step here, so what is cropped away is never computed.
    """
    kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    if resize_mode == "squash":
        return np.asarray(Image.fromarray(image).resize((side, side), kernel))
    height, width = image.shape[:2]
    grown_width, grown_height = (int(side * length / min(height, width)) for length in (width, height))
    left, top = round((grown_width - side) / 2) / grown_width * width, round((grown_height - side) / 2) / grown_height * height
    right, bottom = left + side / grown_width * width, top + side / grown_height * height
    box = (left, top, min(right, width), min(bottom, height))
    return np.asarray(Image.fromarray(image).resize((side, side), kernel, box=box))


def _pixels(data: bytes, min_side: int | None) -> np.ndarray:
    try:
        stream = io.BytesIO(data)
        with Image.open(stream, formats=_formats(data)) as image:
            _check_size(*image.size)
            if (
                image.format in ("JPEG", "MPO") and data.find(JPEG_END, stream.tell()) < 0
            ):  # Pillow stopped where the scan starts
                raise RowError("truncated JPEG: no end marker")
            if isinstance(image, TiffImageFile):
                _check_strips(image)
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            if image.format == "PNG":
                _scale_key(image, data)
            turn = _turn(image)
            rgb = _rgb(image)
            return np.array(rgb if turn is None else rgb.transpose(turn))
    except RowError:
        raise
    except UnidentifiedImageError:
        raise RowError(f"not a readable picture (JPEG, PNG, WebP, GIF, BMP, TIFF, ...): it begins {data[:16]!r}") from None
    except Image.DecompressionBombError:
        raise RowError(f"too large: more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # on hostile bytes Pillow raises nearly everything: SyntaxError, KeyError, struct.error
        raise RowError(f"cannot decode: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _formats(data: bytes) -> tuple[str, ...]:
    """Those to try. HEIC's is another package's."""
    if data[4:8] != b"ftyp" or not any(brand in data[8 : min(int.from_bytes(data[:4]), 256)] for brand in HEIF_BRANDS):
        return FORMATS
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise RowError("a HEIC picture: pip install 'rar[heic]' to decode it") from None
    register_heif_opener()
    return ("HEIF",)


def _bare(data: bytes) -> bytes | None:
    """A PNG or JPEG without what only describes it: text, profiles, thumbnails, checksums of these. None: it is neither."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data[:8] + b"".join(_png_chunks(data))
    return _bare_jpeg(data) if data.startswith(b"\xff\xd8") else None


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """The critical chunks, and those of KEPT_CHUNKS that are sound."""
    place, colour = 8, data[25:26]
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        chunk = data[place : place + 12 + length]
        place += len(chunk)
        if name in KEPT_CHUNKS:
            sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
            fits = name != b"tRNS" or {b"\0": length == 2, b"\2": length == 6, b"\3": 0 < length <= 256}.get(colour, False)
            if sound and fits:
                yield chunk
        elif not name[0] & 0x20:
            yield chunk
        if name == b"IEND":
            return


def _bare_jpeg(data: bytes) -> bytes | None:
    """The segments that the pixels and their turn need. Stray bytes between segments are skipped, as libjpeg does."""
    kept, place = [data[:2]], 2
    while (mark := data.find(b"\xff", place)) >= 0:
        kind = data[mark + 1 : mark + 2]
        if kind in (b"", b"\xd9"):
            return None
        if kind == b"\xda":
            return b"".join([*kept, data[mark:]])
        if kind == b"\xff" or kind <= b"\x01" or b"\xd0" <= kind <= b"\xd8":  # filling, and marks without a segment
            place = mark + (1 if kind == b"\xff" else 2)
            continue
        place = mark + 2 + max(int.from_bytes(data[mark + 2 : mark + 4]), 2)
        described = b"\xe0" <= kind <= b"\xef" or kind == b"\xfe"
        begin, least = KEPT_SEGMENTS.get(kind, (b"", 0))
        if not described or (begin and data.startswith(begin, mark + 4) and place - mark >= least):
            kept.append(data[mark:place])
    return None


def _scale_key(image: Image.Image, data: bytes) -> None:
    """A PNG's transparent colour is stored in the file's bits, and compared by Pillow in 8 bits."""
    key, bits = image.info.get("transparency"), data[24]
    if image.mode == "RGB" and bits == 16 and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif image.mode in ("1", "L") and bits < 8 and isinstance(key, int):
        image.info["transparency"] = min(key * 255 // (2**bits - 1), 255)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RowError(f"too large: {width} x {height} is more than {MAX_PIXELS:,} pixels")
    if width < 1 or height < 1:
        raise RowError(f"no pixels: {width} x {height}")


def _check_strips(image: TiffImageFile) -> None:
    """Pillow leaves the rows black that a TIFF says it has, and has no strip of."""
    if max((tile.extents[3] for tile in image.tile if tile.extents), default=0) < image.tag_v2[TIFF_ROWS]:
        raise RowError("truncated TIFF: its strips are fewer than its rows")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What EXIF asks for; None: upright, unknown or unreadable. (Pillow itself turns a TIFF, and then drops the tag.)"""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF raises SyntaxError, struct.error, ZeroDivisionError, ...: the pixels are still good
        return None


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow reads -> RGB, composited on white where something is transparent."""
    if image.mode == "F":
        raise RowError("floating-point pixels have no defined white level")
    if image.mode.startswith("I"):
        image = _eight_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _eight_bit(image: Image.Image) -> Image.Image:
    """Deep grey (Pillow's modes I;16, I;16B, I) -> L or LA: the high bits, as Pillow itself takes them from deep colour.

    Pillow's own convert("L") would clip at 255 instead.
    """
    if image.mode == "I" and image.format not in ("PPM", "PNG"):  # those two hold 16 bits in it
        raise RowError("32-bit or signed integer pixels have no defined white level")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TIFF_BITS_PER_SAMPLE, (16,))[0]
    deep = np.asarray(image)
    high = (deep >> (bits - 8)).astype(np.uint8)
    grey = Image.fromarray(255 - high if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO else high)
    key = image.info.get("transparency")  # PNG tRNS: this one grey level is see-through
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(deep == key, 0, 255).astype(np.uint8)))
    return grey
