"""Short clips with their frames as channels, among them moving shapes described in words that tracking can check.

Decoding needs only numpy; `.gif` needs Pillow.
"""

import itertools
from functools import lru_cache

import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "orange": (240, 130, 20),
    "green": (40, 150, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
WAYS = {
    "right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1),
    "up and right": (1, -1), "up and left": (-1, -1), "down and right": (1, 1), "down and left": (-1, 1),
}  # fmt: skip
SPEEDS = {"slowly": 0.03, "quickly": 0.075}  # image sides per frame
WALLS = {"right": (1, 0), "left": (-1, 0), "upper": (0, -1), "lower": (0, 1)}
RADIUS = 0.13
NAMES = ("colour", "shape", "way", "speed")


def caption_of(words: tuple[str, str, str, str]) -> str:
    """A caption such as `a red circle moves up and left slowly` or `a red circle bounces off the left wall`."""
    colour, shape, way, speed = words
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape} {motion_words(way, speed)}"


def motion_words(way: str, speed: str) -> str:
    """Words such as `moves up and left slowly` or `bounces off the left wall`."""
    return f"bounces off the {way} wall" if speed == "bouncing" else f"moves {way} {speed}"


def motions() -> list[tuple[str, str]]:
    """Pairs of way and speed; for a wall the speed is `bouncing`."""
    return [*itertools.product(WAYS, SPEEDS), *((wall, "bouncing") for wall in WALLS)]


@lru_cache(maxsize=1)
def everything() -> dict[str, tuple[str, str, str, str]]:
    """Caption -> its words, for all combinations."""
    words = [(colour, shape, *motion) for colour in COLOURS for shape in SHAPES for motion in motions()]
    return {caption_of(each): each for each in words}


def mask_of(shape: str, x: float, y: float, side: int, *, radius: float = RADIUS, fineness: int = 3) -> np.ndarray:
    """The fraction of each pixel that a shape covers, `(side, side)` in [0, 1].

    `x`, `y` (the shape's centroid) and `radius` are fractions of the image's side. Each pixel is sampled at `fineness` points
    in each direction.
    """
    points = (np.arange(side * fineness) + 0.5) / (side * fineness)
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
    return inside.reshape(side, fineness, side, fineness).mean((1, 3))


def film(words: tuple[str, str, str, str], frames: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """A real clip, `(frames, side, side, 3)` uint8; `rng` chooses where in the image it takes place."""
    colour, shape, way, speed = words
    places = path_of(way, speed, frames, rng)
    masks = np.stack([mask_of(shape, x, y, side) for x, y in places])[..., None]
    return np.round(masks * np.array(COLOURS[colour]) + (1 - masks) * 255).astype(np.uint8)


def film_of(sprite: np.ndarray, way: str, speed: str, frames: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """A real clip of a picture on white; `sprite` is `(4 s, 4 s, 3)` uint8, four times as large as it appears."""
    clip, large = [], len(sprite)
    for x, y in path_of(way, speed, frames, rng, radius=large / 8 / side):
        canvas = np.full((4 * side, 4 * side, 3), 255.0)
        left, top = (int(np.clip(round(4 * side * place - large / 2), 0, 4 * side - large)) for place in (x, y))
        canvas[top : top + large, left : left + large] = sprite
        clip.append(canvas.reshape(side, 4, side, 4, 3).mean((1, 3)))
    return np.round(clip).astype(np.uint8)


def path_of(way: str, speed: str, frames: int, rng: np.random.Generator, radius: float = RADIUS) -> list[np.ndarray]:
    """The position of the moving thing in each frame, in image sides; `rng` chooses where it begins."""
    low, high = radius * 1.1, 1 - radius * 1.1
    if speed == "bouncing":
        direction, step = np.array(WALLS[way], float), SPEEDS["quickly"]
        turn = rng.uniform(0.35, 0.65) * (frames - 1)
        wall = np.where(direction > 0, high, low)
        across = rng.uniform(low + 0.1, high - 0.1)
        distances = [abs(k - turn) * step for k in range(frames)]
        return [np.where(direction != 0, wall - direction * away, across) for away in distances]
    move = np.array(WAYS[way], float)
    move *= SPEEDS[speed] / np.linalg.norm(move)
    room = move * (frames - 1)
    start = np.array([rng.uniform(low - min(r, 0), high - max(r, 0)) for r in room])
    return [start + move * k for k in range(frames)]


def track(frames: np.ndarray) -> np.ndarray:
    """The position of the shape in each frame, `(F, 2)` in image sides; NaN if a frame is empty."""
    ink = np.clip((255 - frames.astype(float).min(-1)) / 200 - 0.2, 0, 1)
    places = (np.arange(frames.shape[1]) + 0.5) / frames.shape[1]
    mass = ink.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([(ink.sum(1) @ places) / mass, (ink.sum(2) @ places) / mass], -1)


def look(frame: np.ndarray, place: np.ndarray, radius: float = RADIUS) -> tuple[str | None, str | None]:
    """Colour and shape at a position of a frame `(side, side, 3)` uint8; None if nothing matches."""
    frame, (x, y) = frame.astype(float), place
    core = (255 - frame.min(-1)) > 120
    if not np.isfinite([x, y]).all() or core.sum() < 4:
        return None, None
    middle = np.median(frame[core], axis=0)
    colour = min(COLOURS, key=lambda name: float(np.sum((np.array(COLOURS[name]) - middle) ** 2)))
    axis = np.array(COLOURS[colour], float) - 255
    mask = np.clip((frame - 255) @ axis / (axis @ axis), 0, 1)
    mask[mask < 0.15] = 0  # faint texture is not a shape

    def fit(shape):
        template = mask_of(shape, x, y, len(frame), radius=radius)
        return np.minimum(mask, template).sum() / np.maximum(mask, template).sum()

    best = max(SHAPES, key=fit)
    return colour, best if fit(best) > 0.7 else None


class VideoCodec:
    """A clip is `(F, H, W, 3)` uint8; its array has the RGB channels of the frames one after another.

    Args:
        frames, height, width: the size of every clip.
        fps: frames per second, for files.
    """

    kind, version, stored = "videos", 1, "uint8"
    endings = (".gif", ".npy")

    def __init__(self, frames: int = 8, height: int = 32, width: int = 32, fps: float = 8.0):
        self.frames, self.height, self.width, self.fps = int(frames), int(height), int(width), float(fps)
        self.shape = (self.height, self.width, 3 * self.frames)

    def _settings(self):
        return {"frames": self.frames, "height": self.height, "width": self.width, "fps": self.fps}

    def describe(self):
        """See the module."""
        return {
            "kind": self.kind, "version": self.version, "settings": self._settings(), "shape": list(self.shape),
            "axes": ["height", "width", "frame x RGB"], "units": "sRGB",
        }  # fmt: skip

    def encode(self, thing):
        """Frames to channels."""
        clip, wanted = np.asarray(thing), (self.frames, self.height, self.width, 3)
        if clip.shape != wanted or clip.dtype != np.uint8:
            raise ValueError(f"a clip must be {' x '.join(map(str, wanted))} bytes, got {clip.shape}")
        return clip.transpose(1, 2, 0, 3).reshape(self.shape).astype(np.float32) / 255

    def decode(self, array):
        """Channels to frames."""
        values = np.asarray(array, np.float32).reshape(self.height, self.width, self.frames, 3).transpose(2, 0, 1, 3)
        return np.round(values.clip(0, 1) * 255).astype(np.uint8)

    def judge(self, thing, caption):
        """Always empty: what a caption of an arbitrary clip asks for is unknown."""
        return {}

    def picture(self, thing):
        """A strip of four frames."""
        chosen = np.linspace(0, self.frames - 1, 4).round().astype(int)
        pad = [(0, 0), (0, 1), (0, 0)]
        return np.concatenate([np.pad(thing[k], pad, constant_values=200) for k in chosen], axis=1)

    def write(self, thing, path):
        """Write a looping `.gif`, or the frames as `.npy`."""
        path = str(path)
        if path.endswith(".npy"):
            return np.save(path, thing)
        from PIL import Image

        first, *rest = (Image.fromarray(frame) for frame in np.asarray(thing))
        return first.save(path, save_all=True, append_images=rest, duration=round(1000 / self.fps), loop=0)


class ClipCodec(VideoCodec):
    """Square clips as made by `film`, whose captions a program can check."""

    kind = "clips"

    def __init__(self, frames: int = 8, side: int = 32, fps: float = 8.0):
        super().__init__(frames, side, side, fps)
        self.side = self.height

    def _settings(self):
        return {"frames": self.frames, "side": self.side, "fps": self.fps}

    def judge(self, thing, caption):
        """Colour and shape by the best template in the middle frame, way and speed by tracking; `all`: all of them."""
        wanted = everything()[caption]
        path = track(thing)
        middle = self.frames // 2
        read = (*look(thing[middle], path[middle]), *_motion(path))
        right = {name: a == b for name, a, b in zip(NAMES, read, wanted)}
        return {**right, "motion": right["way"] and right["speed"], "all": read == wanted}


class MovingPictureCodec(VideoCodec):
    """Clips as made by `film_of`: one of several named pictures moves, as in `a red apple moves up and left slowly`.

    Args:
        pictures: name -> `(s, s, 3)` values from 0 to 255, at the size at which it appears; used by the judge.
    """

    kind = "moving_emoji"

    def __init__(self, frames: int = 8, side: int = 32, fps: float = 8.0, pictures=None):
        super().__init__(frames, side, side, fps)
        self.pictures = {name: np.array(picture) for name, picture in (pictures or {}).items()}
        for name, picture in self.pictures.items():
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.min() < 0 or picture.max() > 255:
                raise ValueError(f"the picture of {name} is not an (s, s, 3) array of values from 0 to 255")

    def _settings(self):
        pictures = {name: picture.tolist() for name, picture in self.pictures.items()}
        return {"frames": self.frames, "side": self.height, "fps": self.fps, "pictures": pictures}

    def judge(self, thing, caption):
        """The moving thing by the nearest known picture in the middle frame, way and speed by tracking; `all`: all of them."""
        rest = caption.partition(" ")[2]
        known = {f"{name} {motion_words(*motion)}": (name, *motion) for name in self.pictures for motion in motions()}
        if rest not in known:
            raise ValueError(f"not a caption of this kind: {caption}")
        name, *wanted = known[rest]
        path, middle = track(thing), self.frames // 2
        way, speed = _motion(path)
        right = {"thing": self._nearest(thing[middle]) == name, "way": way == wanted[0], "speed": speed == wanted[1]}
        return {**right, "motion": right["way"] and right["speed"], "all": all(right.values())}

    def _nearest(self, frame):
        """The name of the picture that matches a frame with the smallest error at any position."""

        def error(picture):
            size = len(picture)
            windows = np.lib.stride_tricks.sliding_window_view(frame.astype(float), (size, size), axis=(0, 1))
            return np.square(windows - picture.transpose(2, 0, 1).astype(float)).mean((2, 3, 4)).min()

        return min(self.pictures, key=lambda name: error(self.pictures[name]))


def _motion(path: np.ndarray) -> tuple[str | None, str | None]:
    """Way and speed of a path of positions."""
    if not np.isfinite(path).all():
        return None, None
    steps = np.diff(path, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    whole = np.linalg.norm(path[-1] - path[0])
    if lengths.sum() > 1.6 * whole + 0.05:  # it came back
        middle, ends = path[len(path) // 2 - 1 : len(path) // 2 + 1].mean(0), (path[0] + path[-1]) / 2
        out = middle - ends
        return max(WALLS, key=lambda name: float(np.dot(WALLS[name], out))), "bouncing"
    move = (path[-1] - path[0]) / (len(path) - 1)
    size = float(np.linalg.norm(move))
    if size < 0.01:
        return None, None
    way = max(WAYS, key=lambda name: float(np.dot(WAYS[name], move) / np.linalg.norm(WAYS[name])))
    return way, min(SPEEDS, key=lambda name: abs(np.log(SPEEDS[name] / size)))
