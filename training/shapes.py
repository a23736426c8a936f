"""The `shapes` data set: one figure on a plain ground, drawn by code, with captions that can be checked exactly.

Every picture is one combination of colour x shape x size x place x ground (6 x 4 x 2 x 9 x 4 = 1728); 256 of the
combinations are held out, so that obedience is measured on captions that training never showed.
"""

import itertools
from dataclasses import dataclass

import numpy as np

# Every figure is darker than every ground.
COLOURS = {
    "red": (220, 40, 40),
    "orange": (240, 130, 20),
    "green": (40, 150, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.14, "large": 0.24}  # radius as a share of the picture's side
PLACES = {
    f"{row} {column}".strip() or "centre": (x, y)
    for (row, y), (column, x) in itertools.product(
        {"top": 0.25, "": 0.5, "bottom": 0.75}.items(), {"left": 0.25, "": 0.5, "right": 0.75}.items()
    )
}
GROUNDS = {"white": (255, 255, 255), "grey": (190, 190, 195), "pink": (255, 190, 205), "cream": (255, 240, 185)}
NUM_HELD_OUT = 256


@dataclass(frozen=True)
class Scene:
    """What a caption of the data set says."""

    colour: str
    shape: str
    size: str
    place: str
    ground: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} at the {self.place} on {self.ground}"


def scenes(held_out: bool, count: int | None = None) -> list[Scene]:
    """The combinations that are held out, or those that are not; the division never changes.

    Of all, or of no more than `count`, evenly spread: they are sorted by colour.
    """
    everything = [Scene(*values) for values in itertools.product(COLOURS, SHAPES, SIZES, PLACES, GROUNDS)]
    order = np.random.default_rng(0).permutation(len(everything))
    chosen = order[:NUM_HELD_OUT] if held_out else order[NUM_HELD_OUT:]
    found = [everything[i] for i in sorted(chosen)]
    return found if count is None else found[:: max(1, len(found) // count)][:count]


def coverage(shape: str, x: float, y: float, radius: float, resolution: int) -> np.ndarray:
    """Share of each pixel that the figure covers, `(resolution, resolution)` in [0, 1].

    `x`, `y` (the figure's centroid) and `radius` are shares of the picture's side. Sampled at 4 x 4 points a pixel.
    """
    points = (np.arange(resolution * 4) + 0.5) / (resolution * 4)
    u, v = (points[None, :] - x) / radius, (points[:, None] - y) / radius
    if shape == "circle":
        inside = u**2 + v**2 <= 1
    elif shape == "square":
        inside = np.maximum(abs(u), abs(v)) <= 0.9
    elif shape == "triangle":  # equilateral, circumradius 1.2, apex up
        inside = (v <= 0.6) & (3**0.5 * abs(u) - v <= 1.2)
    elif shape == "cross":  # two bars
        inside = (np.minimum(abs(u), abs(v)) <= 0.36) & (np.maximum(abs(u), abs(v)) <= 1.05)
    else:
        raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
    return inside.reshape(resolution, 4, resolution, 4).mean((1, 3))


def draw(scene: Scene, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene, `(resolution, resolution, 3)` uint8; `rng` shakes centre (3%) and radius (6%) a little."""
    x, y = np.array(PLACES[scene.place]) + rng.uniform(-0.03, 0.03, 2)
    radius = SIZES[scene.size] * rng.uniform(0.94, 1.06)
    mask = coverage(scene.shape, x, y, radius, resolution)[..., None]
    picture = mask * np.array(COLOURS[scene.colour]) + (1 - mask) * np.array(GROUNDS[scene.ground])
    return np.round(picture).astype(np.uint8)
