"""Measurements with any number of channels, such as multispectral, medical or physics fields, in their own units.

Decoding needs only numpy.
"""

import numpy as np


class ArrayCodec:
    """A field has shape `(C, H, W)`; its array is `(H, W, C)`, each channel scaled from its range in the data to [0, 1]."""

    kind, version = "arrays", 1
    endings = (".npy",)

    def __init__(self, shape, offset, scale, integer: bool = False):
        self.shape = tuple(int(side) for side in shape)
        self.offset, self.scale = (np.asarray(values, np.float64) for values in (offset, scale))
        self.integer = bool(integer)
        self.stored = "uint8" if self.integer else "float16"
        channels = self.shape[-1]
        if len(self.shape) != 3 or self.offset.shape != (channels,) or self.scale.shape != (channels,):
            raise ValueError(f"each of {channels} channels needs an offset and a scale")
        if not (np.isfinite(self.offset).all() and np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError("offsets must be finite and scales above 0")

    def describe(self):
        """See `pipelines.codecs`."""
        settings = {
            "shape": list(self.shape), "offset": self.offset.tolist(), "scale": self.scale.tolist(), "integer": self.integer,
        }  # fmt: skip
        return {
            "kind": self.kind, "version": self.version, "settings": settings, "shape": list(self.shape),
            "axes": ["height", "width", "channel"], "units": "value = offset + scale * array, channel by channel",
        }  # fmt: skip

    def encode(self, thing):
        """Convert from the field's own units to [0, 1]."""
        field = np.asarray(thing)
        if field.ndim != 3 or (*field.shape[1:], field.shape[0]) != self.shape:
            raise ValueError(f"an array of shape {field.shape}; it must be {(self.shape[2], *self.shape[:2])}")
        if not np.isfinite(field).all():
            raise ValueError("numbers that are not finite")
        return ((field.transpose(1, 2, 0) - self.offset) / self.scale).clip(0, 1).astype(np.float32)

    def decode(self, array):
        """Convert from [0, 1] to the field's own units, `(C, H, W)`."""
        field = (np.asarray(array, np.float64).reshape(self.shape) * self.scale + self.offset).transpose(2, 0, 1)
        return np.round(field).astype(np.uint8) if self.integer else field.astype(np.float32)

    def judge(self, thing, caption):
        """Always empty: what a caption asks for is unknown."""
        return {}

    def picture(self, thing):
        """The first nine channels side by side, each from its minimum in the data in black to its maximum in white."""
        shown = ((np.asarray(thing, np.float64).transpose(1, 2, 0) - self.offset) / self.scale).clip(0, 1)[..., :9]
        columns = int(np.ceil(shown.shape[-1] ** 0.5))
        rows = -(-shown.shape[-1] // columns)
        height, width = shown.shape[:2]
        sheet = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1))
        for k in range(shown.shape[-1]):
            top, left = k // columns * (height + 1), k % columns * (width + 1)
            sheet[top : top + height, left : left + width] = shown[..., k]
        return np.repeat(np.round(sheet[..., None] * 255).astype(np.uint8), 3, axis=-1)

    def write(self, thing, path):
        """The field as `.npy`."""
        np.save(str(path), thing)
