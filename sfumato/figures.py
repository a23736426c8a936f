"""Grids, sheets and curves: numpy and PIL only."""

import json
import re
from functools import cache
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sfumato.files import read_lines

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "MPO", "AVIF", "HEIF")


def open_image(source: Path | bytes) -> Image.Image:
    """Open an image file or its contents, in a plain format; others, such as EPS, run programs on untrusted input.

    Raises:
        PIL.UnidentifiedImageError: any other format.
    """
    _register_heif()
    return Image.open(source if isinstance(source, Path) else BytesIO(source), formats=[n for n in FORMATS if n in Image.OPEN])


@cache
def _register_heif() -> None:
    """Let Pillow read HEIC, the format of phone cameras, if the extra `sfumato[heic]` is installed."""
    Image.init()
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def to_arrays(images: list[Image.Image]) -> np.ndarray:
    """Images of one size as `(N, H, W, C)` uint8, grey ones with one channel."""
    return np.stack([np.asarray(image).reshape(image.height, image.width, -1) for image in images])


GAP = 6  # pixels between the images of a grid
TEXT = 26  # pixels for the caption below an image
COLUMNS = 6  # images per row


def grid(images: list[Image.Image], prompts: list[str], columns: int = COLUMNS, min_side: int = 128) -> Image.Image:
    """Many images in one, each enlarged to at least `min_side` pixels without smoothing, with its prompt below."""
    scale = max(1, -(-min_side // images[0].width))
    width = images[0].width * scale
    height = images[0].height * scale
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP + TEXT) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, prompt) in enumerate(zip(images, prompts)):
        x, y = _corner(i, columns, width, height)
        sheet.paste(flatten(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        font = caption_font(prompt)
        pen.multiline_text((x, y + height), "\n".join(wrap(prompt, font, width)[:2]), "black", font, spacing=0)
    return sheet


def cell(sheet: Image.Image, i: int, count: int) -> Image.Image:
    """Image `i` of the `count` in a `grid` with the default columns, at the size that it has there."""
    columns = min(COLUMNS, count)
    width = (sheet.width - GAP) // columns - GAP
    height = (sheet.height - GAP) // -(-count // columns) - GAP - TEXT
    x, y = _corner(i, columns, width, height)
    return sheet.crop((x, y, x + width, y + height))


def _corner(i: int, columns: int, width: int, height: int) -> tuple[int, int]:
    return GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP + TEXT)


def caption_font(text: str, size: int = 11) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font for ASCII, which is all it covers; otherwise one with accents, Greek, Cyrillic, Chinese and kana."""
    return _unicode_font(size) if re.search(r"[^\x00-\x7f]", text) else ImageFont.load_default(size)


@cache
def _unicode_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.truetype(str(files("sfumato").joinpath("fonts/NotoSansSC-subset.woff2")), size)
    except OSError:  # Pillow was built without the compression of web fonts
        return ImageFont.load_default(size)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words, or between any two Chinese characters."""
    lines = [""]
    for word in re.findall(r"(?:[\u2e80-\u9fff\uff00-\uffef]|[^\s\u2e80-\u9fff\uff00-\uffef]+)\s*", text):
        if lines[-1] and font.getlength((lines[-1] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines]


def to_pil(image: np.ndarray) -> Image.Image:
    """`(H, W, C)` uint8 as a PIL image."""
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def loss_curve(metrics: Path, width: int = 640, height: int = 240) -> Image.Image | None:
    """The smoothed loss of `metrics.jsonl` over the steps, on a logarithmic scale; None for fewer than ten steps."""
    entries = [json.loads(line) for line in read_lines(metrics)]
    losses = np.array([entry["loss"] for entry in entries if entry["loss"]], dtype=float)
    if len(losses) < 10:
        return None
    window = max(1, len(losses) // 50)
    smooth = np.log10(np.convolve(losses, np.ones(window) / window, "valid"))
    low, high = smooth.min(), max(smooth.max(), smooth.min() + 1e-6)
    left = 60
    bottom = height - 30
    top = 12
    right = width - 12
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.line([(left, top), (left, bottom), (right, bottom)], "black")
    for part in (0.0, 0.5, 1.0):
        y = bottom - part * (bottom - top)
        pen.text((left - 6, y), f"{10 ** (low + part * (high - low)):.3g}", "black", font, anchor="rm")
        x = left + part * (right - left)
        pen.text((x, bottom + 6), f"{int(part * entries[-1]['step']):,}", "black", font, anchor="ma" if part < 1 else "ra")
    xs = np.linspace(left, right, len(smooth))
    ys = bottom - (smooth - low) / (high - low) * (bottom - top)
    pen.line(list(zip(xs, ys)), (50, 80, 160), width=2)
    pen.text((right, top), f"loss over steps, mean of {window}", "black", font, anchor="ra")
    return sheet


def flatten(image: Image.Image) -> Image.Image:
    """An image as RGB, its transparent parts on white."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
