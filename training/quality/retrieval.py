"""Whether drawings show their captions, by the judges."""

import numpy as np

from sfumato.training.quality.evaluation import Evaluation
from sfumato.training.quality.statistics import Score, panel_score

LABELS = {"train": "training captions", "held_out": "held-out captions"}


def retrieval(evaluation: Evaluation) -> dict[str, Score]:
    """How often a judge finds an image's own caption first, or among the first five, of all captions of the set; the mean
    over judges.

    The captions of images that are the same count as one, and so does a caption that several images have.
    """
    captions = list(dict.fromkeys(evaluation.caption(i) for i in range(len(evaluation.dataset))))
    groups, group_of = _caption_groups(evaluation, captions)
    scores: dict[str, Score] = {}
    for part, label in LABELS.items():
        numbers = evaluation.parts[part]
        if not len(numbers):
            continue
        for ending, by_caption in evaluation.judge_scores(part, captions).items():
            by_group = np.stack([by_caption[:, :, columns].max(2) for columns in groups], axis=2)
            own = by_group[:, np.arange(len(numbers)), [group_of[int(evaluation.duplicates[i])] for i in numbers]]
            place = (by_group >= own[:, :, None]).sum(2) - 1  # ties count against the model
            scores[f"retrieval at 1, {label}{ending}"] = panel_score(place < 1)
            scores[f"retrieval at 5, {label}{ending}"] = panel_score(place < 5)
    return scores


def _caption_groups(evaluation: Evaluation, captions: list[str]) -> tuple[list[list[int]], dict[int, int]]:
    """Groups of captions of the same image, as columns, and the group of each image by its first record."""
    column = {caption: k for k, caption in enumerate(captions)}
    columns: dict[int, set[int]] = {}
    for i, first in enumerate(evaluation.duplicates):
        columns.setdefault(int(first), set()).add(column[evaluation.caption(i)])
    groups = list(dict.fromkeys(map(frozenset, columns.values())))
    number = {group: k for k, group in enumerate(groups)}
    return [list(group) for group in groups], {first: number[frozenset(group)] for first, group in columns.items()}
