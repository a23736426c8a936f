"""How different drawings of one caption are."""

import numpy as np

from sfumato.training.data.array_set import evenly_spaced
from sfumato.training.quality.distances import distances
from sfumato.training.quality.evaluation import Evaluation
from sfumato.training.quality.statistics import Score, mean_score


def diversity(evaluation: Evaluation) -> dict[str, Score]:
    """Mean feature distance between drawings of one caption and, for comparison, between training images."""
    train, plan = evaluation.dataset.select("train"), evaluation.plan
    chosen = train[evenly_spaced(len(train), plan.num_diverse)]
    captions = [evaluation.caption(i) for i in chosen for _ in range(plan.num_repeats)]
    features = evaluation.features_of(evaluation.draw(captions)).reshape(len(chosen), plan.num_repeats, -1)
    return {
        "diversity: distance between drawings of one caption": mean_score([_spread(x) for x in features]),
        "distance between training images": Score(float(_spread(evaluation.reference[evaluation.parts["train"]]))),
    }


def _spread(x: np.ndarray) -> float:
    """Mean distance between different rows."""
    return distances(x, x)[np.triu_indices(len(x), 1)].mean()
