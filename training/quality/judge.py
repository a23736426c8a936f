"""A judge of captions: a small CLIP-like pair of encoders, trained on the data set to tell which caption an image shows."""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from sfumato.training.config.schema import TextEncoderConfig
from sfumato.training.data.array_set import ArraySet
from sfumato.training.models.text import build_text_encoder, train_tokenizer
from sfumato.training.quality.features import DEFAULT, compute_features, reference_features, to_network

SIZE = 128
GRID = 8
STEPS = 800
MAX_LENGTH = 256
NUM_JUDGES = 3
NUM_ALTERED_COPIES = 2
# Raise this by hand with every change of code that changes a judge.
FORMAT_VERSION = 1


class Judge(torch.nn.Module):
    """Embeds images and captions in one space, each nearest to its own counterpart (Radford et al. 2021, arXiv 2103.00020).

    Its input is an image's EfficientNet-Lite0 features and its colours on a coarse grid. It is trained on all images of a
    set, including held-out ones: it judges models and is not one of them.
    """

    def __init__(self, captions: list[str]):
        super().__init__()
        self.tokenizer = train_tokenizer(captions, 4096, MAX_LENGTH)
        longest = max(map(len, self.tokenizer(captions, truncation=True).input_ids))
        self.tokenizer.model_max_length = longest  # otherwise captions that differ only in their last words would be the same
        config = TextEncoderConfig(hidden_size=SIZE, num_hidden_layers=1, max_length=longest)
        self.text = build_text_encoder(config, captions, self.tokenizer)[1]
        self.caption = torch.nn.Linear(SIZE, SIZE)
        self.image = torch.nn.Sequential(
            torch.nn.LazyLinear(4 * SIZE), torch.nn.GELU(), torch.nn.LayerNorm(4 * SIZE), torch.nn.Linear(4 * SIZE, SIZE)
        )
        self.log_scale = torch.nn.Parameter(torch.tensor(2.3))
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """Token ids `(N, L)`, where L is that of the longest caption of the set, at most `MAX_LENGTH`."""
        return self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def embed_captions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unit vectors `(N, 128)`."""
        return F.normalize(self.caption(self.text(tokens).pooler_output), dim=-1)

    def embed_images(self, seen: torch.Tensor) -> torch.Tensor:
        """Unit vectors `(N, 128)` for the output of `look`."""
        return F.normalize(self.image((seen - self.mean) / self.std), dim=-1)

    @torch.no_grad()
    def scores(self, images: np.ndarray, captions: list[str], seen: np.ndarray | None = None) -> np.ndarray:
        """How well each caption matches each image `(N, H, W, C)` uint8: cosines `(N, len(captions))`.

        `seen`: the images' features, if they are known.
        """
        embeds = [self.embed_captions(self.tokens(captions[k : k + 1024])) for k in range(0, len(captions), 1024)]
        return (self.embed_images(look(images, seen)) @ torch.cat(embeds).T).numpy()


def look(images: np.ndarray, seen: np.ndarray | None = None) -> torch.Tensor:
    """The judge's input for images `(N, H, W, C)` uint8: `(N, D)`."""
    seen = compute_features(images) if seen is None else seen
    pixels = to_network(images)
    return torch.cat([torch.from_numpy(seen), F.adaptive_avg_pool2d(pixels, GRID).flatten(1)], dim=1)


def first_duplicates(images: ArraySet) -> np.ndarray:
    """For each record, the number of the first record whose image is the same, pixel for pixel, `(N,)`.

    Captions of such images cannot be told apart by looking, and training on one of them also shows the other's image.
    """
    first, first_numbers = {}, []
    for i in range(len(images)):
        image = images.image(i)
        digest = hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest()
        first_numbers.append(first.setdefault(digest, i))
    return np.array(first_numbers)


def alter_image(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image `(H, W, C)` uint8 altered as a drawing may be: moved, blurred half of the time, and slightly noisy.

    It moves by up to 1/32 of its height, and by up to one pixel if that is less.
    """
    step = max(1, len(image) // 32)
    top, left = rng.integers(0, 2 * step + 1, 2)
    moved = np.pad(image, ((step, step), (step, step), (0, 0)), mode="edge")[top:, left:][: len(image), : image.shape[1]]
    if rng.random() < 0.5:
        blur = ImageFilter.GaussianBlur(step * rng.uniform(0.3, 0.8))
        moved = np.stack([np.asarray(Image.fromarray(channel).filter(blur)) for channel in np.moveaxis(moved, 2, 0)], axis=2)
    return np.clip(moved + rng.normal(0, rng.uniform(0, 12), moved.shape).round(), 0, 255).astype(np.uint8)


def train_judges(images: ArraySet, cache_dir: str, count: int = NUM_JUDGES, batch_size: int = 256) -> list[Judge]:
    """The judges of an image set, by default `NUM_JUDGES`, which differ only in their seeds, since one alone may be off by a
    few hundredths. They are trained once, in a few minutes, and cached on disk by the content of the data.

    Each time, an image is read unchanged or altered, with noise on its features and with another of its captions, so that
    drawings which differ slightly from the true images are recognised as well.
    """
    captions = [images.captions[i] for i in range(len(images.captions))]
    folder = Path(cache_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    judges, seen, same = [], None, None
    with FileLock(folder / f"judge-{images.fingerprint}.lock"):
        for seed in range(count):
            torch.manual_seed(seed)
            judge = Judge(captions)
            path = folder / f"judge-{images.fingerprint}-{STEPS}-{seed}-v{FORMAT_VERSION}.safetensors"
            if path.is_file():
                tensors = load_file(path)
                judge.embed_images(torch.zeros(1, tensors["image.0.weight"].shape[1]))  # lazy layers take their size
                judge.mean, judge.std = tensors["mean"], tensors["std"]
                judge.load_state_dict(tensors)
            else:
                if seen is None or same is None:  # shared by all judges
                    seen = _sights(images, cache_dir, STEPS * batch_size)
                    same = torch.from_numpy(first_duplicates(images))
                _fit(judge, images, captions, seen, same, STEPS, batch_size, seed)
                new = path.with_suffix(".new")
                save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, new)
                new.replace(path)
            judges.append(judge.eval())
    return judges


def _sights(images: ArraySet, cache_dir: str, seen_in_all: int) -> torch.Tensor:
    """The judge's input for every image and for up to `NUM_ALTERED_COPIES` altered copies of it, `(1 + copies, N, D)` float16.

    There are fewer copies of a set so large that `seen_in_all` readings hardly reach each image.
    """
    reference = reference_features(images, DEFAULT, cache_dir)
    rng = np.random.default_rng(0)
    count = len(images)
    copies = min(NUM_ALTERED_COPIES, seen_in_all // (4 * count))
    sights = torch.empty((1 + copies, count, look(images.image(0)[None], np.array(reference[:1])).shape[1]), dtype=torch.half)
    for start in tqdm(range(0, count, 256), desc="looking at altered images", unit="batch"):
        part = slice(start, start + 256)
        originals = np.stack([images.image(i) for i in range(count)[part]])
        sights[0, part] = look(originals, np.array(reference[part])).half()
        for k in range(copies):
            sights[1 + k, part] = look(np.stack([alter_image(image, rng) for image in originals])).half()
    return sights


def _fit(
    judge: Judge,
    images: ArraySet,
    captions: list[str],
    seen: torch.Tensor,
    same: torch.Tensor,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train a judge on its inputs `seen` `(copies, N, D)`; `same` `(N,)` is the first record with the same image."""
    torch.manual_seed(seed)  # other code may have drawn random numbers since
    judge.mean, judge.std = seen[0].float().mean(0), seen[0].float().std(0) + 1e-3
    tokens = judge.tokens(captions)
    rng = np.random.default_rng(seed)
    judge.embed_images(seen[0, :2].float())
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    table, order = images.table, rng.permutation(len(images))
    for step in tqdm(range(steps), desc="training the judge of captions", unit="step"):
        chosen = np.take(order, range(step * batch_size, (step + 1) * batch_size), mode="wrap")
        rows = table[chosen]
        numbers = rows["first_caption"] + (rng.random(len(chosen)) * rows["num_captions"]).astype(np.uint64)
        noise = torch.from_numpy(rng.standard_normal((len(chosen), seen.shape[2]), np.float32))
        sight = seen[rng.integers(0, len(seen), len(chosen)), chosen].float()
        x = judge.embed_images(sight + 0.5 * judge.std * noise)
        y = judge.embed_captions(tokens[numbers.astype(np.int64)])
        twins = (same[chosen][:, None] == same[chosen]) & ~torch.eye(len(chosen), dtype=torch.bool)  # neither right nor wrong
        scores = (judge.log_scale.exp().clamp(max=100) * x @ y.T).masked_fill(twins, -torch.inf)
        target = torch.arange(len(chosen))
        loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
