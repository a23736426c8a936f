"""How good a model is: the whole report, with its protocol, its confidence intervals and its pictures."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from sfumato import figures
from sfumato.pipelines import SfumatoPipeline
from sfumato.training.config.schema import Config
from sfumato.training.data.array_set import PictureSet
from sfumato.training.data.sources import openmoji
from sfumato.training.data.sources.shapes import evenly_spaced
from sfumato.training.quality import drawing, memorisation, obedience
from sfumato.training.quality.distances import (
    distances,
    frechet_distance,
    gaussian,
    kernel_distance,
    kernel_within,
    manifold_scores,
)
from sfumato.training.quality.features import DEFAULT, features, load_extractor, reference_features
from sfumato.training.quality.judge import Judge, first_duplicates, train_judge
from sfumato.training.quality.likelihood import bits_per_dim, check_has_bound
from sfumato.training.quality.statistics import PARTS, Score, jackknife_score, mean

GENDERS = ("man", "woman", "person")


@dataclass
class Plan:
    """What is measured: `count` captions of training pictures and as many held-out ones as there are, up to it."""

    count: int = 512
    extractor: str = DEFAULT
    diverse: int = 16  # captions that are drawn several times
    repeats: int = 8  # how often
    bits: int = 0  # pictures whose bits per dimension are bounded, and at how many noise levels each
    bits_levels: int = 100


def set_distances(pictures: PictureSet, made: np.ndarray, cache_dir: str) -> dict[str, float]:
    """FD and KID of drawn pictures `(N, H, W, C)` uint8 to all training pictures."""
    train, seen = reference_features(pictures, DEFAULT, cache_dir)[pictures.select("train")], features(made)
    return {"FD": frechet_distance(train, seen), "KID": kernel_distance(train, seen)}


class Evaluation:
    """Draws what is needed once, over all processes, and measures it. `report` is what others call."""

    def __init__(self, pipe: SfumatoPipeline, config: Config, pictures: PictureSet, accelerator: Accelerator, plan: Plan):
        for extractor in {DEFAULT, plan.extractor}:
            load_extractor(extractor)
        if plan.bits:
            check_has_bound(pipe)
        if pictures.several_sizes or len(pictures.select("train")) < 2:
            raise ValueError("evaluation needs at least two training pictures, all of one size")
        self.config, self.pictures, self.accelerator, self.plan = config, pictures, accelerator, plan
        self.pipe = pipe
        train, held_out = pictures.select("train"), self.unseen("held_out")
        train, held_out = (part[evenly_spaced(len(part), plan.count)] for part in (train, held_out))
        combined = self.unseen("held_out_combination")
        combined = [i for i in combined if openmoji.tone_of(self.caption(i))[0] and self.caption(i).split(" ")[0] in GENDERS]
        self.parts = {"train": train, "held_out": held_out, "combination": np.array(combined, np.int64)}
        self.numbers = np.concatenate(list(self.parts.values())).astype(np.int64)
        self.made = self.drawn([self.caption(i) for i in self.numbers])
        self.seen = self.looked_at(self.made, plan.extractor)
        self.reference = reference_features(pictures, plan.extractor, config.data.cache_dir)

    @cached_property
    def alike(self) -> np.ndarray:
        """See `same_pictures`."""
        return first_duplicates(self.pictures)

    def unseen(self, split: str) -> np.ndarray:
        """Records of a held-out split whose picture is not trained under another caption."""
        numbers = self.pictures.select(split)
        return numbers[~np.isin(self.alike[numbers], self.alike[self.pictures.select("train")])] if len(numbers) else numbers

    def caption(self, i: int) -> str:
        """The first caption of record i."""
        return self.pictures[int(i)]["captions"][0]

    def true(self, numbers: np.ndarray) -> np.ndarray:
        """The pictures of records, `(N, H, W, C)` uint8."""
        return np.stack([self.pictures.picture(int(i)) for i in numbers])

    def drawn(self, captions: list[str]) -> np.ndarray:
        """One picture a caption, `(N, H, W, C)` uint8."""
        return figures.to_arrays(drawing.draw_images(self.pipe, captions, self.config.validation, self.accelerator))

    def looked_at(self, made: np.ndarray, extractor: str) -> np.ndarray:
        """Features of drawn pictures, each process its share."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = features(made[rank::world], extractor) if len(made[rank::world]) else []
        pairs = gather_object(list(zip(range(rank, len(made), world), mine)))
        return np.stack([row for _, row in sorted(pairs, key=lambda pair: pair[0])])

    def of(self, part: str, values: np.ndarray) -> np.ndarray:
        """The rows of `values` that belong to a part of what was drawn."""
        start = sum(len(self.parts[name]) for name in list(self.parts)[: list(self.parts).index(part)])
        return values[start : start + len(self.parts[part])]

    def distances(self) -> dict[str, Score]:
        """FD and KID to all training pictures, and precision, recall, density and coverage against as many as are drawn."""
        train, made = self.reference[self.pictures.select("train")], self.of("train", self.seen)
        whole, within = gaussian(train), kernel_within(train)
        found = {
            "FD": jackknife_score(lambda x: frechet_distance(whole, x), made),
            "KID": jackknife_score(lambda x: kernel_distance(train, x, within), made),
        }
        values = manifold_scores(self.reference[self.parts["train"]], made, k=min(5, len(made) - 1))
        return found | {name: mean(v) for name, v in values.items()}

    def judged(self, judge: Judge, part: str, captions: list[str]) -> dict[str, np.ndarray]:
        """The judge's scores of a part's drawings, and of its true pictures, by what a figure's name ends in.

        What is known of their features already is not computed again.
        """
        numbers, own = self.parts[part], self.plan.extractor == DEFAULT
        true = self.true(numbers)
        return {
            "": judge.scores(self.of(part, self.made), captions, self.of(part, self.seen) if own else None),
            " by true pictures": judge.scores(true, captions, np.array(self.reference[numbers]) if own else None),
        }

    def retrieval(self, judge: Judge) -> dict[str, Score]:
        """How often the judge finds a picture's own caption first, or among the first five, of all captions of the set.

        The captions of pictures that are the same count as one, and so does a caption that several pictures have.
        """
        captions = list(dict.fromkeys(self.caption(i) for i in range(len(self.pictures))))
        column, columns, found = {caption: k for k, caption in enumerate(captions)}, {}, {}
        for i, first in enumerate(self.alike):
            columns.setdefault(int(first), set()).add(column[self.caption(i)])
        groups = {alike: k for k, alike in enumerate(dict.fromkeys(map(frozenset, columns.values())))}
        place_of = {first: groups[frozenset(alike)] for first, alike in columns.items()}
        for part, what in (("train", "training captions"), ("held_out", "held-out captions")):
            numbers = self.parts[part]
            if not len(numbers):
                continue
            for name, scores in self.judged(judge, part, captions).items():
                scores = np.stack([scores[:, list(alike)].max(1) for alike in groups], axis=1)
                own = scores[np.arange(len(numbers)), [place_of[int(self.alike[i])] for i in numbers]]
                place = (scores >= own[:, None]).sum(1) - 1  # what cannot be told apart comes before
                found[f"retrieval at 1, {what}{name}"] = mean(place < 1)
                found[f"retrieval at 5, {what}{name}"] = mean(place < 5)
        return found

    def attributes(self, judge: Judge) -> dict[str, Score]:
        """OpenMoji's held-out combinations: skin tone by pixels; profession and gender by the judge among all of that tone.

        Some pictures are the same for two captions, such as a man and a person walking; either one is right then.
        """
        numbers = self.parts["combination"]
        if not len(numbers):
            return {}
        captions = [self.caption(i) for i in range(len(self.pictures))]
        true = self.true(numbers)
        found, of_tone = {}, {}
        for k, caption in enumerate(captions):
            if caption.split(" ")[0] in GENDERS:
                of_tone.setdefault(openmoji.tone_of(caption)[0], []).append(k)
        judged = self.judged(judge, "combination", captions)
        for name, shown in (("", self.of("combination", self.made)), (" by true pictures", true)):
            tones, others, scores = [], [], judged[name]
            for picture, row, i in zip(shown, scores, numbers):
                tone = openmoji.tone_of(self.caption(i))[0]
                tones.append(openmoji.read_tone(picture) == tone)
                others.append(self.alike[of_tone[tone][int(row[of_tone[tone]].argmax())]] == self.alike[i])
            found[f"skin tone of held-out combinations{name}"] = mean(tones)
            found[f"profession and gender of held-out combinations{name}"] = mean(others)
            found[f"held-out combinations wholly right{name}"] = mean(np.array(tones) & np.array(others))
        return found

    def diversity(self) -> dict[str, Score]:
        """Mean distance in features between drawings of one caption, beside that between training pictures."""
        train = self.pictures.select("train")
        chosen = train[evenly_spaced(len(train), self.plan.diverse)]
        captions = [self.caption(i) for i in chosen for _ in range(self.plan.repeats)]
        seen = self.looked_at(self.drawn(captions), self.plan.extractor).reshape(len(chosen), self.plan.repeats, -1)

        def spread(x):
            return distances(x, x)[np.triu_indices(len(x), 1)].mean()

        return {
            "diversity: distance between drawings of one caption": mean([spread(x) for x in seen]),
            "distance between training pictures": Score(float(spread(self.reference[self.parts["train"]]))),
        }

    def memorised(self) -> tuple[dict[str, Score], Image.Image]:
        """See `memorisation.memorisation`; and twelve drawings of training captions, from the nearest to the farthest.

        A training caption asks for its training picture; a held-out one does not, so what it gets tells copying apart. Its
        baseline are the true pictures of the same captions.
        """
        train = self.pictures.select("train")
        new = np.concatenate([self.parts["held_out"], self.parts["combination"]])
        blocks = (self.true(train[k : k + 512]) for k in range(0, len(train), 512))
        shown, seen = np.concatenate([self.made, self.true(new)]), np.concatenate([self.seen, self.reference[new]])
        near, which = memorisation.nearest_training(shown, seen, blocks, self.reference[train])
        near, near_true, which = near[: len(self.made)], near[len(self.made) :], self.of("train", train[which])
        others = near_true[: len(self.parts["held_out"])] if len(self.parts["held_out"]) else near_true
        scores, new_near = {}, near[len(self.parts["train"]) :]
        for what, drawn, unseen in (("", self.of("train", near), others), (", held-out captions", new_near, near_true)):
            for name, values in memorisation.memorisation(drawn, unseen).items():
                scores[f"{name}{what}"] = mean(values) if np.ndim(values) else Score(values)
        made, cells = self.of("train", self.made), []
        apart = self.of("train", near)[:, 1]
        for i in np.argsort(apart)[evenly_spaced(len(apart), 12)]:
            cells.append((made[i], self.caption(self.parts["train"][i])))
            for space, k in zip(("pixels", "features"), which[i]):
                cells.append((self.pictures.picture(int(k)), f"{space}: {self.caption(k)}"))
        shown, told = zip(*cells)
        return scores, figures.grid([figures.to_pil(picture) for picture in shown], list(told))

    def bits(self) -> dict[str, Score]:
        """Bits per dimension of held-out and of training pictures, at most."""
        found = {}
        for part in ("held_out", "train"):
            numbers = self.parts[part][evenly_spaced(len(self.parts[part]), self.plan.bits)]
            if len(numbers):
                told = bits_per_dim(self.pipe, self.true(numbers), [self.caption(i) for i in numbers], self.plan.bits_levels)
                found[f"bits per dimension, {part.replace('_', '-')}"] = mean(told["each"])
        return found

    def protocol(self) -> str:
        """How the figures came about, in some sentences."""
        v, counts = self.config.validation, {name: len(part) for name, part in self.parts.items()}
        held_out = ("held_out", "held_out_combination")
        left_out = sum(len(self.pictures.select(split)) - len(self.unseen(split)) for split in held_out)
        guider = "" if v.guider == "cfg" else f" ({v.guider})"
        guider += "" if v.guidance_interval == [0.0, 1.0] else " in {:g} to {:g} of the steps".format(*v.guidance_interval)
        drawn = ", ".join(f"{n} of {name.replace('_', '-')}" for name, n in counts.items() if n)
        bits = (
            " Bits per dimension are an upper bound over all noise levels; a plain copy takes 8, and a model whose levels are "
            "chosen for what the eye sees needs more, since it leaves the finest ones untrained."
        )
        return (
            f"One picture for each of the first captions of {drawn.replace('combination', 'held-out-combination')} pictures, "
            f"{type(self.pipe.scheduler).__name__}, {v.num_inference_steps} steps, guidance {v.guidance_scale}{guider}, "
            f"seeds {v.seed} and on. "
            "Captions whose pictures are the same count as one, and held-out pictures that are trained under another caption "
            f"are left out ({left_out}). "
            f"Features by {self.plan.extractor}; FD, KID and the nearest training pictures are of all "
            f"{len(self.pictures.select('train')):,} training pictures; precision, recall, density and coverage of those "
            "whose captions are drawn. "
            "± is half a 95% confidence interval: Student's of means over pictures, Wilson's of shares, and for FD and KID "
            f"the jackknife over {PARTS} parts of what is drawn. FD of few pictures is above that of many."
            + (bits if self.plan.bits else "")
        )


def report(
    pipe: SfumatoPipeline, config: Config, pictures: PictureSet, accelerator: Accelerator, plan: Plan
) -> tuple[dict[str, Score], str, Image.Image | None]:
    """All that can be measured of a model on a picture set: scores by name, the protocol, and the memorisation sheet."""
    run = Evaluation(pipe, config, pictures, accelerator, plan)
    scores = run.distances()
    if config.data.name == "shapes":
        obeyed = obedience.evaluate_shapes(run.pipe, config, accelerator)
        scores |= {f"obedience, {name}": mean(right) for name, right in obeyed.items()}
    else:
        judge = train_judge(pictures, config.data.cache_dir)
        scores |= run.retrieval(judge)
        scores |= run.attributes(judge) if config.data.name == "openmoji" else {}
    scores |= run.diversity()
    picture = None
    if len(run.parts["held_out"]) + len(run.parts["combination"]):
        memorised, picture = run.memorised()
        scores |= memorised
    if plan.bits:
        scores |= run.bits()
    return scores, run.protocol(), picture
