"""The figures by which recipes are compared, of pictures drawn for the training captions of a set."""

import numpy as np

from sfumato.training.evaluation import grid  # noqa: F401  (for those who import this)
from sfumato.training.features import features, frechet_distance, gaussian, kernel_distance
from sfumato.training.judge import train_judge
from sfumato.training.quality import reference_features


class Yardstick:
    """FD, KID, retrieval and the mean distance to the caption's own picture, over the training captions of `pictures`."""

    def __init__(self, pictures, cache_dir: str):
        self.numbers = pictures.select("train")
        self.captions = [pictures[int(i)]["captions"][0] for i in self.numbers]
        self.true = reference_features(pictures, "efficientnet-lite0", cache_dir)[self.numbers]
        self.whole, self.judge = gaussian(self.true), train_judge(pictures, cache_dir)

    def figures(self, made: list) -> dict[str, float]:
        """`made`: a picture for each of `captions`, in their order."""
        made = np.stack([np.asarray(picture) for picture in made])
        seen = features(made)
        scores = self.judge.scores(made, self.captions, seen)
        own = scores[np.arange(len(made)), [self.captions.index(caption) for caption in self.captions]]
        return {
            "FD": round(frechet_distance(self.whole, seen), 3),
            "KID": round(kernel_distance(self.true, seen), 5),
            "retrieval": round(float(np.mean((scores > own[:, None]).sum(1) < 1)), 4),
            "distance": round(float(np.linalg.norm(seen - self.true, axis=1).mean()), 4),
        }
