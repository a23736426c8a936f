"""One interpretation of every image file in training, calls and commands: upright, sRGB, 8 bits per channel, on white.

Self-contained on purpose (numpy and PIL only): this file travels inside shared model folders.
"""

from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
# Formats whose 16-bit files Pillow opens with 32 bits.
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")


class UnsupportedImage(ValueError):
    """An image whose values are ambiguous; the message says why."""


def to_8_bits(image: Image.Image, channels: int, notes: set[str] | None = None) -> Image.Image:
    """Convert an image of any mode to 8-bit grey, RGB or RGBA: upright, in sRGB, on white unless `channels` is 4.

    The range follows the file format: of 16 bits the upper eight are used, and floats must lie in [0, 1]. No image is scaled
    by its own contents.

    Args:
        channels: 1 is grey, 3 RGB, 4 RGBA.
        notes: receives what was unusual about the image, such as a palette.

    Raises:
        UnsupportedImage: 32-bit integers, floats outside [0, 1], or a mode that cannot be converted.
    """
    notes = set() if notes is None else notes
    if image.getexif().get(0x0112, 1) != 1:
        notes.add("turned upright")
        image = ImageOps.exif_transpose(image)
    image = _scale(image, notes)
    image = _to_srgb(image, notes)
    if image.mode not in ("RGB", "L"):
        notes.add(f"converted from {image.mode}")
    try:
        if image.mode in TRANSPARENT or "transparency" in image.info:
            image = image.convert("RGBA")
            if channels != 4:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(MODES[channels])
    except ValueError as error:
        raise UnsupportedImage(f"mode {image.mode} is not read; save it as RGB") from error


def _scale(image: Image.Image, notes: set[str]) -> Image.Image:
    """Convert images with more than 8 bits to 8 bits."""
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in SIXTEEN_BIT_FORMATS):
        notes.add("16 bits scaled to 8")
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "I":
        raise UnsupportedImage("integers of 32 bits, whose range is not known; save it with 8 or 16")
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UnsupportedImage("float values outside of [0, 1]; scale them, all images by the same factor")
        notes.add("float values in [0, 1]")
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    return image


def _to_srgb(image: Image.Image, notes: set[str]) -> Image.Image:
    """Convert colours from the profile in the file to sRGB, as image viewers do."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        given, srgb = (ImageCms.ImageCmsProfile(each) for each in (BytesIO(profile), ImageCms.createProfile("sRGB")))
        if _same_colours(given.profile, srgb.profile):
            return image
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        plain = image.convert("RGB") if alpha else image
        done = ImageCms.profileToProfile(plain, given, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.add("unreadable colour profile, ignored")
        return image
    if done is None:
        return image
    notes.add("colours converted to sRGB")
    if alpha:
        done.putalpha(alpha)
    return done


def _same_colours(given, srgb) -> bool:
    """Whether a profile is sRGB under one of its many names."""
    named = "srgb" in (given.profile_description or "").lower()
    primaries = [(getattr(p, f"{name}_colorant") or (np.nan,))[0] for p in (given, srgb) for name in ("red", "green", "blue")]
    values = np.array([np.resize(primary, 3) for primary in primaries], float)
    return named and bool(np.allclose(values[:3], values[3:], atol=0.01))
