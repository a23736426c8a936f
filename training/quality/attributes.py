"""OpenMoji's held-out combinations: of profession, skin tone and gender, and of colour and thing."""

import numpy as np

from sfumato.training.data.sources.openmoji import GENDERS, main_colour, read_tone, split_colour, split_tone
from sfumato.training.quality.evaluation import Evaluation
from sfumato.training.quality.statistics import Score, mean_score


def attributes(evaluation: Evaluation) -> dict[str, Score]:
    """Skin tone by pixels; profession and gender by the judge among all captions of that tone.

    Some images are the same for two captions, such as a man and a person walking; either one is right then.
    """
    numbers = evaluation.parts["combination"]
    if not len(numbers):
        return {}
    captions = [evaluation.caption(i) for i in range(len(evaluation.dataset))]
    of_tone: dict[str | None, list[int]] = {}
    for k, caption in enumerate(captions):
        if caption.split(" ")[0] in GENDERS:
            of_tone.setdefault(split_tone(caption)[0], []).append(k)
    by_ending = evaluation.judge_scores("combination", captions)
    images = {"": evaluation.of("combination", evaluation.drawings), " by true images": evaluation.real(numbers)}
    scores: dict[str, Score] = {}
    for ending, part_images in images.items():
        tone_right, rest_right = [], []
        for image, row, i in zip(part_images, by_ending[ending], numbers):
            tone = split_tone(evaluation.caption(i))[0]
            nearest = of_tone[tone][int(row[of_tone[tone]].argmax())]
            tone_right.append(read_tone(image) == tone)
            rest_right.append(evaluation.duplicates[nearest] == evaluation.duplicates[i])
        scores[f"skin tone of held-out combinations{ending}"] = mean_score(tone_right)
        scores[f"profession and gender of held-out combinations{ending}"] = mean_score(rest_right)
        scores[f"held-out combinations wholly right{ending}"] = mean_score(np.array(tone_right) & np.array(rest_right))
    return scores


def pairs(evaluation: Evaluation) -> dict[str, Score]:
    """Colour by pixels; the thing by the judge among all captions that begin with that colour."""
    numbers = evaluation.parts["pair"]
    if not len(numbers):
        return {}
    captions = [evaluation.caption(i) for i in range(len(evaluation.dataset))]
    of_colour: dict[str | None, list[int]] = {}
    for k, caption in enumerate(captions):
        of_colour.setdefault(split_colour(caption)[0], []).append(k)
    by_ending = evaluation.judge_scores("pair", captions)
    images = {"": evaluation.of("pair", evaluation.drawings), " by true images": evaluation.real(numbers)}
    scores: dict[str, Score] = {}
    for ending, part_images in images.items():
        colour_right, thing_right = [], []
        for image, row, i in zip(part_images, by_ending[ending], numbers):
            colour = split_colour(evaluation.caption(i))[0]
            nearest = of_colour[colour][int(row[of_colour[colour]].argmax())]
            colour_right.append(main_colour(image, reach=60.0) == colour)
            thing_right.append(evaluation.duplicates[nearest] == evaluation.duplicates[i])
        scores[f"colour of held-out pairs{ending}"] = mean_score(colour_right)
        scores[f"thing of held-out pairs{ending}"] = mean_score(thing_right)
        scores[f"held-out pairs wholly right{ending}"] = mean_score(np.array(colour_right) & np.array(thing_right))
    return scores
