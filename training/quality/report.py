"""How good a model is: the whole report, with its protocol, its confidence intervals and its sheets."""

from accelerate import Accelerator
from PIL import Image

from sfumato.pipelines import SfumatoPipeline
from sfumato.registries import metrics_for
from sfumato.training.config.rules import named_source
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import ArraySet
from sfumato.training.quality.evaluation import Evaluation, Plan
from sfumato.training.quality.features import DEFAULT, load_extractor
from sfumato.training.quality.judge import NUM_JUDGES
from sfumato.training.quality.judged import judged_records
from sfumato.training.quality.likelihood import check_has_bound
from sfumato.training.quality.statistics import JACKKNIFE_PARTS, Score


def report(
    pipe: SfumatoPipeline, config: Config, dataset: ArraySet, accelerator: Accelerator, plan: Plan
) -> tuple[dict[str, Score], str, dict[str, Image.Image]]:
    """All metrics of a model on a set of images: scores by name, the protocol, and the sheets by file name.

    Raises:
        ValueError: something cannot be measured; raised before anything is drawn.
    """
    if dataset.codec is None:
        for extractor in {DEFAULT, plan.extractor}:
            load_extractor(extractor)
    if plan.bits:
        check_has_bound(pipe)
    if dataset.has_several_sizes or len(dataset.select("train")) < 2:
        raise ValueError("evaluation needs at least two training images, all of one size")
    evaluation = Evaluation(pipe, config, dataset, accelerator, plan)
    scores: dict[str, Score] = {}
    for metric in metrics_for(named_source(config), objects=dataset.codec is not None).values():
        if metric.option is None or getattr(plan, metric.option):
            scores |= {metric.label.format(name): score for name, score in metric.compute(evaluation).items()}
    if not scores:
        raise ValueError("no metric knows what these captions ask for, so there is nothing to measure")
    return scores, protocol(evaluation), evaluation.sheets


def protocol(evaluation: Evaluation) -> str:
    """How the figures were measured, in a few sentences."""
    if evaluation.dataset.codec is not None:
        v = evaluation.config.validation
        captions = len({evaluation.caption(i) for i in judged_records(evaluation)})
        return (
            f"{evaluation.plan.count} objects for {captions} held-out captions, each as often as the data have it, "
            f"{type(evaluation.pipe.scheduler).__name__}, {v.num_inference_steps} steps, guidance {v.guidance_scale}, "
            f"seeds from {v.seed} on; judged by the codec's program, nothing corrected. ± is half a 95% confidence interval."
        )
    v, counts = evaluation.config.validation, {name: len(part) for name, part in evaluation.parts.items()}
    held_out = ("held_out", "held_out_combination", "held_out_pair")
    left_out = sum(len(evaluation.dataset.select(split)) - len(evaluation.unseen(split)) for split in held_out)
    guider = "" if v.guider == "cfg" else f" ({v.guider})"
    guider += "" if v.guidance_interval == [0.0, 1.0] else " in {:g} to {:g} of the steps".format(*v.guidance_interval)
    words = {"held_out": "held-out", "combination": "held-out-combination", "pair": "held-out-pair"}
    drawn = ", ".join(f"{n} of {words.get(name, name)}" for name, n in counts.items() if n)
    bits = (
        " Bits per dimension are an upper bound over all noise levels; storing pixels as they are takes 8, and a model whose "
        "noise levels are chosen for what the eye sees needs more, since it does not train the finest ones."
    )
    return (
        f"One image for each of the first captions of {drawn} images, "
        f"{type(evaluation.pipe.scheduler).__name__}, {v.num_inference_steps} steps, guidance {v.guidance_scale}{guider}, "
        f"seeds from {v.seed} on. "
        "Captions with the same image count as one, and held-out images that are also trained under another caption "
        f"are left out ({left_out}). "
        f"{NUM_JUDGES} judges: retrieval is their mean, and a combination is correct when most of them say so. "
        "Their spread is part of the interval of retrieval. "
        f"Features by {evaluation.plan.extractor}; FD, KID and the nearest training images are of all "
        f"{len(evaluation.dataset.select('train')):,} training images; precision, recall, density and coverage of those "
        "whose captions are drawn. "
        "± is half a 95% confidence interval: Student's for means over images, Wilson's for shares, and for FD and KID "
        f"the jackknife over {JACKKNIFE_PARTS} parts of the drawings. FD is larger for few images than for many."
        + (bits if evaluation.plan.bits else "")
    )
