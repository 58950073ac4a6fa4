"""Encoded bytes -> upright 8-bit RGB pixels, or a RowError that says why not. Pure and total: nothing else is ever raised.

Choices, and what they cost:
- Content decides, never the file's name: a PNG called .jpg decodes. Only the seven formats of FORMATS are tried, so that
  hostile bytes cannot reach Pillow's rarer readers (EPS starts a subprocess).
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

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from rar.schema import RowError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 178_956_970  # as many as fit 512 MiB of RGB; Pillow raises above the same number
JPEG_END = b"\xff\xd9"
TIFF_BITS_PER_SAMPLE = 258

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
        stream = io.BytesIO(data)
        with Image.open(stream, formats=FORMATS) as image:
            _check_size(*image.size)
            if image.format == "JPEG" and data.find(JPEG_END, stream.tell()) < 0:  # Pillow stops reading where the scan starts
                raise RowError("truncated JPEG: no end marker")
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            turn = _turn(image)
            rgb = _rgb(image)
            return np.array(rgb if turn is None else rgb.transpose(turn))
    except RowError:
        raise
    except UnidentifiedImageError:
        raise RowError("not a readable JPEG, PNG, WebP, GIF, BMP, TIFF or PPM image") from None
    except Image.DecompressionBombError:
        raise RowError(f"too large: more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # on hostile bytes Pillow raises nearly everything: SyntaxError, KeyError, struct.error
        raise RowError(f"cannot decode: {type(error).__name__}: {' '.join(str(error).split())}") from None


def resize_square(image: np.ndarray, side: int) -> np.ndarray:
    """Stretch (H, W, 3) uint8 to (side, side, 3) uint8 with an antialiased bicubic filter; the aspect ratio is not kept."""
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


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


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RowError(f"too large: {width} x {height} is more than {MAX_PIXELS:,} pixels")
    if width < 1 or height < 1:
        raise RowError(f"no pixels: {width} x {height}")


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
    grey = Image.fromarray((deep >> (bits - 8)).astype(np.uint8))
    key = image.info.get("transparency")  # PNG tRNS: this one grey level is see-through
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(deep == key, 0, 255).astype(np.uint8)))
    return grey
