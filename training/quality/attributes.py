"""OpenMoji's held-out combinations: of profession, skin tone and gender, and of colour and thing."""

from collections.abc import Callable
from functools import partial

import numpy as np

from sfumato.training.data.sources.openmoji import GENDERS, main_colour, read_tone, split_colour, split_tone
from sfumato.training.quality.evaluation import Evaluation
from sfumato.training.quality.statistics import Score, mean_score


def attributes(evaluation: Evaluation) -> dict[str, Score]:
    """Skin tone, read off the pixels; profession and gender, by a majority of the judges, among all captions of that tone.

    Some images are the same for two captions, such as a man and a person walking; then either caption is correct.
    """
    return _halves(
        evaluation,
        "combination",
        kind="held-out combinations",
        names=("skin tone of", "profession and gender of"),
        word_of=lambda caption: split_tone(caption)[0],
        word_in=read_tone,
        counts=lambda caption: caption.split(" ")[0] in GENDERS,
    )


def pairs(evaluation: Evaluation) -> dict[str, Score]:
    """Colour, read off the pixels; the thing, by a majority of the judges, among all captions that begin with that colour."""
    return _halves(
        evaluation,
        "pair",
        kind="held-out pairs",
        names=("colour of", "thing of"),
        word_of=lambda caption: split_colour(caption)[0],
        word_in=partial(main_colour, reach=60.0),
    )


def _halves(
    evaluation: Evaluation,
    part: str,
    *,
    kind: str,
    names: tuple[str, str],
    word_of: Callable[[str], str | None],
    word_in: Callable[[np.ndarray], str | None],
    counts: Callable[[str], bool] = lambda caption: True,
) -> dict[str, Score]:
    """For a part's images: one word of the caption, read off the pixels, and the rest, judged among all captions with it.

    Args:
        kind: what the scores' names call the captions; `names`, those of the two halves, come before it.
        word_of: gives the word in a caption; `word_in` gives the one that an image shows.
        counts: whether the judge may choose a caption.
    """
    numbers = evaluation.parts[part]
    if not len(numbers):
        return {}
    captions = [evaluation.caption(i) for i in range(len(evaluation.dataset))]
    alike: dict[str | None, list[int]] = {}
    for k, caption in enumerate(captions):
        if counts(caption):
            alike.setdefault(word_of(caption), []).append(k)
    by_ending = evaluation.judge_scores(part, captions)
    images = {"": evaluation.of(part, evaluation.drawings), " by true images": evaluation.real(numbers)}
    scores: dict[str, Score] = {}
    for ending, part_images in images.items():
        word_right, rest_right = [], []
        for k, (image, i) in enumerate(zip(part_images, numbers)):
            word = word_of(captions[i])
            rivals = np.array(alike[word])
            nearest = rivals[by_ending[ending][:, k, rivals].argmax(1)]
            word_right.append(word_in(image) == word)
            rest_right.append((evaluation.duplicates[nearest] == evaluation.duplicates[i]).mean() > 0.5)
        scores[f"{names[0]} {kind}{ending}"] = mean_score(word_right)
        scores[f"{names[1]} {kind}{ending}"] = mean_score(rest_right)
        scores[f"{kind} wholly right{ending}"] = mean_score(np.array(word_right) & np.array(rest_right))
    return scores
