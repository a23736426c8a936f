"""What a model's objects are, judged by their codec: by a program, against the words of held-out captions."""

from sfumato.training.quality.drawing import draw_images
from sfumato.training.quality.evaluation import Evaluation
from sfumato.training.quality.statistics import Score, mean_score


def judged(evaluation: Evaluation) -> dict[str, Score]:
    """`plan.count` objects, spread over the held-out captions (else over those of training), word by word."""
    captions, count = held_out_captions(evaluation), evaluation.plan.count
    captions = [captions[i * len(captions) // count % len(captions)] for i in range(count)]
    codec = evaluation.pipe.codec
    drawn = draw_images(evaluation.pipe, captions, evaluation.config.validation, evaluation.accelerator, batch_size=128)
    right = [codec.judge(codec.decode(array), caption) for array, caption in zip(drawn, captions)]
    return {name: mean_score([each[name] for each in right]) for name in right[0]}


def held_out_captions(evaluation: Evaluation) -> list[str]:
    """The captions of held-out records, each once; of all where none is held out."""
    chosen = evaluation.dataset.select("held_out")
    chosen = chosen if len(chosen) else evaluation.dataset.select("train")
    return list(dict.fromkeys(evaluation.caption(i) for i in chosen))
