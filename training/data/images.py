"""One reader for image files: turned upright, on white, with the wanted size and channels, or refused with a reason."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, features

from sfumato.figures import open_image
from sfumato.pipelines.images import UnsupportedImage, to_8_bits
from sfumato.training.data.records import Unusable

MAX_PIXELS = 32_000_000
MIN_SIDE = 4
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def _unread_reason(source: Path | bytes) -> str:
    """What a file that Pillow cannot identify is, and what to do about it."""
    if isinstance(source, Path):
        with open(source, "rb") as file:
            start = file.read(12)
    else:
        start = source[:12]
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS:
        return "damaged image" if "HEIF" in Image.OPEN else "HEIC, which needs a package: pip install 'sfumato[heic]'"
    if start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis") and not features.check("avif"):
        return "AVIF, which needs Pillow 11.3 or later"
    return "not an image"


def read_image(
    source: Path | bytes, size: tuple[int, int], channels: int = 3, resize: str = "crop", notes: set[str] | None = None
) -> np.ndarray:
    """One image as `(*size, channels)` uint8: turned upright, laid on white unless `channels` is 4, and fitted.

    Args:
        source: a file or its content.
        size: height and width.
        channels: 1 grey, 3 RGB, 4 RGBA.
        resize: `crop` the longer side, `pad` the shorter one with white, or `stretch`.
        notes: filled with what was unusual about the image, such as a palette.

    Raises:
        Unusable: the image is too large (checked before decoding), too small or not readable; gives the reason in a few words.
    """
    notes = set() if notes is None else notes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large and of odd images; both get our own messages
            image = open_image(source)
            if image.width * image.height > MAX_PIXELS:
                raise Unusable(f"more than {MAX_PIXELS // 1_000_000} megapixels")
            if min(image.size) < MIN_SIDE:
                raise Unusable(f"smaller than {MIN_SIDE} pixels")
            if getattr(image, "n_frames", 1) > 1:
                notes.add("animated: first frame taken")
            image = to_8_bits(image, channels, notes)
    except Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise Unusable(f"more than {MAX_PIXELS // 1_000_000} megapixels") from error
    except Image.UnidentifiedImageError as error:
        raise Unusable(_unread_reason(source)) from error
    except UnsupportedImage as error:
        raise Unusable(str(error)) from error
    except Exception as error:  # PIL raises almost anything on a damaged file
        raise Unusable("damaged image") from error
    return fit(image, size, channels, resize)


def fit(image: Image.Image, size: tuple[int, int], channels: int, resize: str) -> np.ndarray:
    """An 8-bit image as `(*size, channels)` uint8; arguments as for `read_image`."""
    target_size, resample = (size[1], size[0]), Image.Resampling.LANCZOS
    if resize == "stretch":
        fitted = image.resize(target_size, resample)
    elif resize == "pad":
        fitted = ImageOps.pad(image, target_size, resample, color={1: 255, 3: (255,) * 3, 4: (255, 255, 255, 0)}[channels])
    else:
        fitted = ImageOps.fit(image, target_size, resample)
    return np.asarray(fitted).reshape(*size, channels)


def read_shape(source: Path | bytes) -> tuple[int, int]:
    """Height and width of an image once it is upright; (1, 1) if it cannot be opened, which `read_image` then reports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with open_image(source) as image:
                turned = image.getexif().get(0x0112, 1) >= 5
                width, height = image.size[::-1] if turned else image.size
        except Exception:  # PIL raises almost anything on a damaged file
            return 1, 1
    return max(height, 1), max(width, 1)
