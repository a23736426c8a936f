"""Whether drawings show their captions, by the judges."""

import numpy as np

from sfumato.training.data.sources.openmoji import chinese_caption
from sfumato.training.quality.evaluation import Evaluation
from sfumato.training.quality.features import compute_features
from sfumato.training.quality.statistics import Score, panel_score

LABELS = {"train": "training captions", "held_out": "held-out captions"}


def retrieval(evaluation: Evaluation) -> dict[str, Score]:
    """How often a judge ranks an image's own caption first, or among the first five, of all captions of the set; the mean
    over judges.
    """
    choice = _Choice(evaluation)
    scores: dict[str, Score] = {}
    for part, label in LABELS.items():
        numbers = evaluation.parts[part]
        if not len(numbers):
            continue
        for ending, by_caption in evaluation.judge_scores(part, choice.captions).items():
            scores |= choice.scores(numbers, by_caption, f"{label}{ending}")
    return scores


def retrieval_in_chinese(evaluation: Evaluation) -> dict[str, Score]:
    """The same for drawings from Chinese captions, with the same images, candidate captions and judges."""
    choice = _Choice(evaluation)
    scores: dict[str, Score] = {}
    for part, label in LABELS.items():
        chinese = {int(i): chinese_caption(evaluation.dataset[int(i)]["captions"]) for i in evaluation.parts[part]}
        prompts = {i: caption for i, caption in chinese.items() if caption is not None}
        if not prompts:
            continue
        images = evaluation.draw(list(prompts.values()))
        by_caption = evaluation.ask_judges(images, choice.captions, compute_features(images))
        scores |= choice.scores(np.array(list(prompts)), by_caption, f"{label} in Chinese")
    return scores


class _Choice:
    """All first captions of a set, from which a judge chooses that of an image.

    The captions of identical images count as one, and so does a caption that several images share.
    """

    def __init__(self, evaluation: Evaluation):
        self.captions = list(dict.fromkeys(evaluation.caption(i) for i in range(len(evaluation.dataset))))
        self.groups, self.group_of = _caption_groups(evaluation, self.captions)
        self.duplicates = evaluation.duplicates

    def scores(self, numbers: np.ndarray, by_caption: np.ndarray, label: str) -> dict[str, Score]:
        """Retrieval of records `numbers`, from each judge's scores `(J, N, len(captions))` of their drawings."""
        by_group = np.stack([by_caption[:, :, columns].max(2) for columns in self.groups], axis=2)
        own = by_group[:, np.arange(len(numbers)), [self.group_of[int(self.duplicates[i])] for i in numbers]]
        place = (by_group >= own[:, :, None]).sum(2) - 1  # ties count against the model
        return {f"retrieval at {k}, {label}": panel_score(place < k) for k in (1, 5)}


def _caption_groups(evaluation: Evaluation, captions: list[str]) -> tuple[list[list[int]], dict[int, int]]:
    """Groups of captions of the same image, as columns, and the group of each image by its first record."""
    column = {caption: k for k, caption in enumerate(captions)}
    columns: dict[int, set[int]] = {}
    for i, first in enumerate(evaluation.duplicates):
        columns.setdefault(int(first), set()).add(column[evaluation.caption(i)])
    groups = list(dict.fromkeys(map(frozenset, columns.values())))
    number = {group: k for k, group in enumerate(groups)}
    return [list(group) for group in groups], {first: number[frozenset(group)] for first, group in columns.items()}
