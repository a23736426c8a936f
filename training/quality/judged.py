"""A model's objects judged by their codec: a program compares them with the words of held-out captions."""

from collections.abc import Iterable

import numpy as np

from sfumato.pipelines.codecs import Codec
from sfumato.training.data.array_set import to_unit
from sfumato.training.quality.drawing import draw_images
from sfumato.training.quality.evaluation import Evaluation
from sfumato.training.quality.statistics import Score, mean_score

MAX_TRUE = 256


def judged(evaluation: Evaluation) -> dict[str, Score]:
    """Judge `plan.count` objects for the captions of evenly chosen held-out (else training) records, word by word.

    If the judge does not find all true objects of these captions correct, as their arrays are stored, its figures for them
    are given too: no drawing can be expected to do better.
    """
    dataset, count = evaluation.dataset, evaluation.plan.count
    chosen = judged_records(evaluation)
    chosen = [chosen[i * len(chosen) // count % len(chosen)] for i in range(count)]
    captions, codec = [evaluation.caption(i) for i in chosen], evaluation.pipe.codec
    if not _scores(codec, [to_unit(dataset.image(chosen[0]))], captions[:1]):  # the judge knows nothing that captions ask for
        return {}
    drawn = draw_images(evaluation.pipe, captions, evaluation.config.validation, evaluation.accelerator, batch_size=128)
    true = [to_unit(dataset.image(i)) for i in chosen[:MAX_TRUE]]
    scores = _scores(codec, drawn, captions)
    best = _scores(codec, true, captions)
    below = {f"{name} by true objects": score for name, score in best.items() if score.value < 1}
    return scores | below


def judged_records(evaluation: Evaluation) -> np.ndarray:
    """The numbers of held-out records, or of all training records if none are held out."""
    held_out = evaluation.dataset.select("held_out")
    return held_out if len(held_out) else evaluation.dataset.select("train")


def _scores(codec: Codec, arrays: Iterable[np.ndarray], captions: list[str]) -> dict[str, Score]:
    right = [codec.judge(codec.decode(array), caption) for array, caption in zip(arrays, captions)]
    return {name: mean_score([each[name] for each in right]) for name in right[0]}
