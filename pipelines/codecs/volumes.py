"""Solids on a voxel grid, with height as channels: one part on top of another, described in words that a program can check.

Decoding needs only numpy; meshes (`.glb`, `.stl`) need scikit-image and trimesh, which come with the extra `volumes`.
"""

import itertools
from functools import lru_cache

import numpy as np

TOPS = ("cone", "ball", "cube", "cylinder", "pyramid")
TOP_SIZES = {"thin": 0.19, "thick": 0.31}  # half the width, as a fraction of the grid's side
BASES = ("box", "cylinder", "slab")
HEIGHTS = {"low": 0.16, "tall": 0.34}  # of the base, as a fraction of the side
WIDTHS = {"narrow": 0.29, "wide": 0.45}  # half the width of the base
NAMES = ("top size", "top", "height", "width", "base")


def caption_of(words: tuple[str, ...]) -> str:
    """A caption such as `thin cone on a low wide box`."""
    size, top, height, width, base = words
    return f"{size} {top} on a {height} {width} {base}"


def words_of(caption: str) -> tuple[str, ...]:
    """The five words of a caption.

    Raises:
        ValueError: it is not a caption of a solid.
    """
    words = tuple(word for word in caption.split() if word not in ("on", "a"))
    if words not in everything():
        raise ValueError(f"{caption!r} is not a caption of a solid; an example is {caption_of(everything()[0])!r}")
    return words


@lru_cache(maxsize=1)
def everything() -> list[tuple[str, ...]]:
    """All combinations of words."""
    return list(itertools.product(TOP_SIZES, TOPS, HEIGHTS, WIDTHS, BASES))


@lru_cache(maxsize=512)
def ideal_solid(words: tuple[str, ...], side: int) -> np.ndarray:
    """How much of each voxel is filled, `(side, side, side)` in [0, 1], height last; from 3 x 3 x 3 points per voxel."""
    size, top, height, width, base = words
    points = (np.arange(side * 3) + 0.5) / (side * 3)
    x, y, z = points[:, None, None] - 0.5, points[None, :, None] - 0.5, points[None, None, :] - 0.04
    half, tall = WIDTHS[width], HEIGHTS[height]
    within = (z >= 0) & (z < tall)
    if base == "cylinder":
        solid = within & (x**2 + y**2 <= half**2)
    else:  # a slab is half as deep as a box
        solid = within & (abs(x) <= half) & (abs(y) <= half * (0.45 if base == "slab" else 1.0))
    radius, up = TOP_SIZES[size], z - tall
    if top == "ball":
        solid = solid | (x**2 + y**2 + (up - radius) ** 2 <= radius**2)
    elif top in ("cone", "pyramid"):
        left = radius * (1 - up / 0.5)
        inside = (x**2 + y**2 <= left**2) if top == "cone" else (np.maximum(abs(x), abs(y)) <= left)
        solid = solid | (inside & (up >= 0) & (up < 0.5))
    else:
        across = np.maximum(abs(x), abs(y)) <= radius if top == "cube" else x**2 + y**2 <= radius**2
        solid = solid | (across & (up >= 0) & (up < (2 * radius if top == "cube" else 0.46)))
    return solid.reshape(side, 3, side, 3, side, 3).mean((1, 3, 5)).astype(np.float32)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two grids of fill fractions."""
    return float(np.minimum(one, other).sum() / max(np.maximum(one, other).sum(), 1e-9))


class VolumeCodec:
    """A solid is an array `(side, side, side)` of fill fractions in [0, 1]: depth, width, height."""

    kind, version, stored = "volumes", 1, "uint8"
    endings = (".glb", ".stl", ".npy")

    def __init__(self, side: int = 16):
        self.side = int(side)
        self.shape = (self.side, self.side, self.side)

    def describe(self):
        """See the module."""
        return {
            "kind": self.kind, "version": self.version, "settings": {"side": self.side}, "shape": list(self.shape),
            "axes": ["depth", "width", "height"], "units": "share of the voxel that is filled",
        }  # fmt: skip

    def encode(self, thing):
        """The grid itself."""
        grid = np.asarray(thing, np.float32)
        if grid.shape != self.shape or not np.isfinite(grid).all():
            raise ValueError(f"a solid must be {self.shape} finite numbers, got {grid.shape}")
        return grid.clip(0, 1)

    def decode(self, array):
        """The grid itself."""
        return np.asarray(array, np.float32).reshape(self.shape).clip(0, 1)

    def judge(self, thing, caption):
        """Compare the words of the ideal solid that it overlaps most; `solid`: it overlaps the requested one by 90%."""
        wanted = words_of(caption)
        thing = ((thing - 0.15) / 0.7).clip(0, 1)  # faint mist is not solid
        read = max(everything(), key=lambda words: overlap(thing, ideal_solid(words, self.side)))
        right = {name: a == b for name, a, b in zip(NAMES, read, wanted)}
        return {**right, "all": read == wanted, "solid": overlap(thing, ideal_solid(wanted, self.side)) >= 0.9}

    def picture(self, thing):
        """A view from the front and above, shaded by the direction of the surface."""
        turned = np.kron(np.asarray(thing), np.ones((2, 2, 2), np.float32)) > 0.5  # depth, width, height
        n = turned.shape[0]
        depth, width, height = np.nonzero(turned)
        across = np.round(n * 0.35 + width * 0.75 + (depth - n / 2) * 0.35).astype(int)
        down = np.round(n * 1.35 - height * 0.9 + (depth - n / 2) * 0.35).astype(int)
        filled = np.pad(turned, 1)
        normal = np.stack([np.diff(filled.astype(float), axis=a)[tuple(slice(1, None) if k == a else slice(1, -1)
                           for k in range(3))] for a in range(3)], -1)  # fmt: skip
        light = 0.55 + 0.25 * -normal[..., 2] + 0.18 * normal[..., 0] * -1 + 0.08 * normal[..., 1]
        order = np.argsort(depth + height * 0.5)
        sheet = np.full((2 * n, 2 * n, 3), 255, np.uint8)
        colour = np.array([90, 140, 210])
        for k in order:
            shade = np.clip(light[depth[k], width[k], height[k]], 0.15, 1.0)
            row, column = np.clip(down[k], 0, 2 * n - 2), np.clip(across[k] + n // 8, 0, 2 * n - 2)
            sheet[row : row + 2, column : column + 2] = (colour * shade + 40 * (shade > 0.7)).clip(0, 255)
        return sheet

    def write(self, thing, path):
        """A mesh by marching cubes at the half-filled level, `.glb` or `.stl`; or the grid, `.npy`."""
        path = str(path)
        if path.endswith(".npy"):
            return np.save(path, thing)
        try:
            import trimesh
            from skimage.measure import marching_cubes
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"meshes need {error.name}: pip install scikit-image trimesh; or write .npy") from error
        grid = np.pad(np.asarray(thing), 1)
        if grid.max() <= 0.5:
            raise ValueError("there is nothing in this solid to make a mesh of")
        corners, faces, normals, _ = marching_cubes(grid, 0.5, spacing=(1 / self.side,) * 3, gradient_direction="ascent")
        return trimesh.Trimesh(corners, faces, vertex_normals=normals).export(path)
