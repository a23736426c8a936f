"""The input of metrics on drawings: images drawn once, split over all processes, and their features in a network."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from sfumato.figures import to_arrays
from sfumato.pipelines import SfumatoPipeline
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import ArraySet, evenly_spaced
from sfumato.training.data.sources.openmoji import is_combination
from sfumato.training.quality.drawing import draw_images
from sfumato.training.quality.features import DEFAULT, compute_features, reference_features
from sfumato.training.quality.judge import Judge, first_duplicates, train_judges

PARTS = ("train", "held_out", "combination", "pair")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        count: number of training captions that are drawn, and the largest number of captions drawn of each held-out part.
        extractor: the network whose features are used; see `features.compute_features`.
        num_diverse, num_repeats: how many captions are drawn several times, and how many times each.
        bits: number of images whose bits per dimension are bounded.
        bits_levels: number of noise levels per image for that bound.
        parts: which of `PARTS` are drawn.
        intervals: whether distances between sets get confidence intervals, for which each is computed eleven times.
    """

    count: int = 512
    extractor: str = DEFAULT
    num_diverse: int = 16
    num_repeats: int = 8
    bits: int = 0
    bits_levels: int = 100
    parts: tuple[str, ...] = PARTS
    intervals: bool = True


class Evaluation:
    """A model, a set of images, and what the model draws for its captions; each is computed once, when first needed.

    Attributes:
        dataset: the true images and captions.
        sheets: images that metrics add to the report, by file name.
    """

    def __init__(self, pipe: SfumatoPipeline, config: Config, dataset: ArraySet, accelerator: Accelerator, plan: Plan):
        self.pipe = pipe
        self.config = config
        self.dataset = dataset
        self.accelerator = accelerator
        self.plan = plan
        self.sheets: dict[str, Image.Image] = {}

    @cached_property
    def duplicates(self) -> np.ndarray:
        """For each record, the number of the first record with the same image; see `judge.first_duplicates`."""
        return first_duplicates(self.dataset)

    @cached_property
    def parts(self) -> dict[str, np.ndarray]:
        """The records whose captions are drawn, by part."""
        return {part: self._numbers(part) if part in self.plan.parts else np.zeros(0, np.int64) for part in PARTS}

    def _numbers(self, part: str) -> np.ndarray:
        if part == "combination":
            combined = [i for i in self.unseen("held_out_combination") if is_combination(self.caption(i))]
            return np.array(combined, np.int64)
        numbers = self.dataset.select("train") if part == "train" else self.unseen({"pair": "held_out_pair"}.get(part, part))
        return numbers[evenly_spaced(len(numbers), self.plan.count)]

    @cached_property
    def drawings(self) -> np.ndarray:
        """The images that the model draws for the first captions of all parts, in order, `(N, H, W, C)` uint8."""
        numbers = np.concatenate(list(self.parts.values())).astype(np.int64)
        return self.draw([self.caption(i) for i in numbers])

    @cached_property
    def features(self) -> np.ndarray:
        """The features of `drawings`, `(N, D)`."""
        return self.features_of(self.drawings)

    @cached_property
    def reference(self) -> np.ndarray:
        """The features of every record of the set, `(M, D)`."""
        return reference_features(self.dataset, self.plan.extractor, self.config.data.cache_dir)

    @cached_property
    def judges(self) -> list[Judge]:
        """The caption judges of this set."""
        return train_judges(self.dataset, self.config.data.cache_dir)

    def unseen(self, split: str) -> np.ndarray:
        """Records of a held-out split whose image is not in the training set under another caption."""
        numbers = self.dataset.select(split)
        if not len(numbers):
            return numbers
        return numbers[~np.isin(self.duplicates[numbers], self.duplicates[self.dataset.select("train")])]

    def caption(self, i: int) -> str:
        """The first caption of record i."""
        return self.dataset[int(i)]["captions"][0]

    def real(self, numbers: np.ndarray) -> np.ndarray:
        """The images of records, `(N, H, W, C)` uint8."""
        return np.stack([self.dataset.image(int(i)) for i in numbers])

    def draw(self, captions: list[str]) -> np.ndarray:
        """One image per caption, `(N, H, W, C)` uint8."""
        return to_arrays(draw_images(self.pipe, captions, self.config.validation, self.accelerator))

    def features_of(self, images: np.ndarray) -> np.ndarray:
        """Features `(N, D)` of images; each process computes its share."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = compute_features(images[rank::world], self.plan.extractor) if len(images[rank::world]) else []
        pairs = gather_object(list(zip(range(rank, len(images), world), mine)))
        return np.stack([row for _, row in sorted(pairs, key=lambda pair: pair[0])])

    def of(self, part: str, values: np.ndarray) -> np.ndarray:
        """The rows of `values` (one per drawing) that belong to a part."""
        start = sum(len(self.parts[name]) for name in PARTS[: PARTS.index(part)])
        return values[start : start + len(self.parts[part])]

    def judge_scores(self, part: str, captions: list[str]) -> dict[str, np.ndarray]:
        """Each judge's scores of a part's drawings and of its true images, `(J, N, len(captions))`, by the suffix of
        the figure's name. Features that are already known are not computed again.
        """
        numbers, own = self.parts[part], self.plan.extractor == DEFAULT
        images = {"": self.of(part, self.drawings), " by true images": self.real(numbers)}
        if own:
            features = {"": self.of(part, self.features), " by true images": np.array(self.reference[numbers])}
        else:
            features = {ending: compute_features(of_part) for ending, of_part in images.items()}
        return {ending: self.ask_judges(of_part, captions, features[ending]) for ending, of_part in images.items()}

    def ask_judges(self, images: np.ndarray, captions: list[str], features: np.ndarray) -> np.ndarray:
        """Each judge's scores of images `(N, H, W, C)` uint8, whose features are known: `(J, N, len(captions))`."""
        return np.stack([judge.scores(images, captions, features) for judge in self.judges])
