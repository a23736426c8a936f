"""One reader for image files: upright, on white, in the wanted size and channels, or refused with the reason."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sfumato.pipelines.inputs import MODES, composite_on_white

MAX_PIXELS = 32_000_000


MIN_SIDE = 4


FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def _open(source: Path | bytes) -> Image.Image:
    """A picture in a plain format; others, such as EPS, run programs of their own on what a stranger wrote."""
    return Image.open(source if isinstance(source, Path) else BytesIO(source), formats=FORMATS)


def read_picture(
    source: Path | bytes, size: tuple[int, int], channels: int = 3, resize: str = "crop", notes: set[str] | None = None
) -> np.ndarray:
    """One picture as `(*size, channels)` uint8: turned upright, laid on white unless `channels` is 4, and fitted.

    Args:
        source: a file or its content.
        size: height and width.
        channels: 1 grey, 3 RGB, 4 RGBA.
        resize: `crop` the longer side, `pad` the shorter one with white, or `stretch`.
        notes: gets what was unusual about the picture, such as a palette.

    Raises:
        ValueError: too large (judged before decoding), too small, or not readable; the reason in a few words.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL, on large and on odd pictures: we have our own words for both
            picture = _open(source)
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"more than {MAX_PIXELS // 1_000_000} megapixels")
            if min(picture.size) < MIN_SIDE:
                raise ValueError(f"smaller than {MIN_SIDE} pixels")
            notes = set() if notes is None else notes
            if getattr(picture, "n_frames", 1) > 1:
                notes.add("animated: first frame taken")
            if picture.getexif().get(0x0112, 1) != 1:
                notes.add("turned upright")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 bits: PIL would clip, not scale
                notes.add("16 bits scaled to 8")
                deep = np.asarray(picture).astype(np.uint32)
                picture = Image.fromarray((deep >> 8).clip(0, 255).astype(np.uint8))
            if picture.mode not in ("RGB", "L"):
                notes.add(f"converted from {picture.mode}")
            picture = composite_on_white(picture, channels).convert(MODES[channels])
    except ValueError as error:
        known = ("megapixels", "pixels")
        raise error if str(error).endswith(known) else ValueError("damaged picture") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"more than {MAX_PIXELS // 1_000_000} megapixels") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError("not a picture") from error
    except Exception as error:  # PIL raises nearly anything on a damaged file
        raise ValueError("damaged picture") from error
    wanted, how = (size[1], size[0]), Image.Resampling.LANCZOS
    if resize == "stretch":
        fitted = picture.resize(wanted, how)
    elif resize == "pad":
        fitted = ImageOps.pad(picture, wanted, how, color={1: 255, 3: (255,) * 3, 4: (255, 255, 255, 0)}[channels])
    else:
        fitted = ImageOps.fit(picture, wanted, how)
    return np.asarray(fitted).reshape(*size, channels)
