"""Averaged weights: those that are exported, and two tracks from which an average of any length can be made later."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sfumato.files import CannotSave
from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.pipelines.card import remove_figures
from sfumato.pipelines.locate import locate_pipeline
from sfumato.training.models.parameters import local_part, trained_names, trained_parameters, whole_tensor

TRACKS = (0.05, 0.1)  # lengths, as the standard deviation of their profile, as a fraction of the run


class EMA(EMAModel):
    """diffusers' `EMAModel` with the update as one fused pass: shadow <- shadow + (1 - decay) (parameter - shadow).

    The stock update reads and writes every weight twice, which for small models is half of the trainer's overhead per step.
    The averages stay in float32: at a decay of 0.999 or more, an update is below what bfloat16 resolves.

    Args:
        parameters: what is averaged.
        decay: the largest decay, to which it rises as (1 + step) / (10 + step).
        offload: keep the averages on the CPU.
        post_hoc: keep two more averages, by the power functions of `TRACKS` (Karras et al. 2024, arXiv 2312.02696).

    Attributes:
        num_steps: number of optimizer steps averaged in, kept on the device so that counting them waits for nothing.
        tracks: the two averages by the exponent of their profile; empty without `post_hoc`.
    """

    num_steps: torch.Tensor

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float, offload: bool = False, post_hoc: bool = False):
        parameters = list(parameters)
        super().__init__(parameters, decay=decay, foreach=True)
        self.offload = offload
        device = torch.device("cpu") if offload or not parameters else parameters[0].device
        self.num_steps = torch.zeros((), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
        self.tracks = {exponent_of(s): [p.detach().clone() for p in parameters] for s in TRACKS} if post_hoc else {}
        if offload:
            self.to("cpu")
            self.tracks = {gamma: [p.cpu() for p in track] for gamma, track in self.tracks.items()}

    @property
    def optimization_step(self) -> int:
        """`num_steps` on the host, which has to wait for the device."""
        return int(self.num_steps)

    @optimization_step.setter
    def optimization_step(self, value: int) -> None:
        self.num_steps = torch.full_like(self.num_steps, value) if hasattr(self, "num_steps") else torch.tensor(value)

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter], is_finite: torch.Tensor | None = None) -> None:
        """Average in the parameters after an optimizer step; a step that was not finite, by `is_finite` `()`, is ignored."""
        values = [local_part(p.to(self.num_steps.device) if self.offload else p) for p in parameters]
        counts = torch.ones_like(self.num_steps) if is_finite is None else is_finite.to(self.num_steps)
        self.num_steps += counts
        before = self.num_steps - 1  # diffusers' `get_decay`, on the device
        decay = torch.where(before <= 0, 0.0, ((1 + before) / (10 + before)).clamp(max=self.decay))
        self._move(self.shadow_params, values, (1 - decay) * counts)
        for gamma, track in self.tracks.items():  # Karras et al. 2024, equation 2
            self._move(track, values, (1 - (1 - 1 / self.num_steps.clamp(min=1)) ** (gamma + 1)) * counts)

    @staticmethod
    def _move(averages: list[torch.Tensor], values: list[torch.Tensor], share: torch.Tensor) -> None:
        """Move averages towards values by a fraction `share`, `()`, of the way."""
        parts = [local_part(average) for average in averages]
        torch._foreach_lerp_(parts, values, [share.float()] * len(values))


def exponent_of(length: float) -> float:
    """Exponent of the power function t^gamma whose standard deviation over a run of length 1 is `length`; below 0.28.

    From its variance, (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): Karras et al. 2024, equation 126.
    """
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def overlap(t: float, gamma: float, other_t: float, other_gamma: float) -> float:
    """Integral of the product of two averages' profiles, (gamma + 1) tau^gamma / t^(gamma + 1) for tau up to t."""
    least = min(t, other_t)
    share = (least / t) ** gamma * (least / other_t) ** other_gamma * least / (t * other_t)
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * share


def coefficients(snapshots: list[tuple[float, float]], t: float, gamma: float) -> tuple[np.ndarray, float]:
    """Coefficients with which averages kept at steps and with exponents `(t, gamma)` add up as closely as possible to the
    average at step `t` with exponent `gamma`: least squares over the profiles (Karras et al. 2024, section 3.2), where
    the coefficients sum to 1.

    Returns:
        The coefficients, and the fraction of the wanted profile that they miss: the norm of the difference over the profile's.
    """
    count = len(snapshots)
    within, target = np.zeros((count + 1, count + 1)), np.ones(count + 1)
    within[:count, :count] = [[overlap(*a, *b) for b in snapshots] for a in snapshots]
    within[count, :count] = within[:count, count] = 1  # Lagrange's condition on the sum
    target[:count] = [overlap(*a, t, gamma) for a in snapshots]
    shares, whole = np.linalg.lstsq(within, target, rcond=1e-12)[0][:count], overlap(t, gamma, t, gamma)
    missed = shares @ within[:count, :count] @ shares - 2 * shares @ target[:count] + whole
    return shares, float((max(missed, 0) / whole) ** 0.5)


def post_hoc(folder: Path, length: float) -> dict[str, torch.Tensor]:
    """Weights averaged over the last part of a run, of any `length`, from the snapshots that the run kept in `folder`.

    Args:
        folder: `ema/` of a run with `ema.snapshot_steps`.
        length: standard deviation of the average's profile as a fraction of the run, such as 0.02 to 0.25.

    Raises:
        ValueError: there are no snapshots, or no average can be so long or short.
    """
    files = sorted(folder.glob("step-*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no snapshots; train with ema.snapshot_steps")
    if not 0.005 <= length <= 0.25:
        raise ValueError(f"length={length}: must be in [0.005, 0.25], the fraction of the run that the average spreads over")
    steps = [int(file.stem.removeprefix("step-")) for file in files]
    gammas = [exponent_of(s) for s in TRACKS]
    snapshots = [(float(step), gamma) for step in steps for gamma in gammas]
    shares, missed = coefficients(snapshots, steps[-1], exponent_of(length))
    if missed > 0.1:
        warnings.warn(f"{len(files)} snapshots miss {missed:.0%} of this average; keep more of them", stacklevel=2)
    shares = shares.reshape(len(files), len(gammas))
    total = {}
    for file, row in zip(files, shares):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():
                track, name = key.split("|")
                part = row[TRACKS.index(float(track))] * opened.get_tensor(key).double()
                total[name] = total[name] + part if name in total else part
    return {name: value.float() for name, value in total.items()}


@contextmanager
def averaged_weights(ema: EMA, module: torch.nn.Module) -> Iterator[None]:
    """Inside, the trained parameters of `module` are the averaged ones, and it is in evaluation mode."""
    parameters, training = trained_parameters(module), [part for part in module.modules() if part.training]
    module.eval()  # no dropout while drawing
    raw = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():  # one by one, since sharded tensors have no fused copy
        for parameter, shadow in zip(parameters, ema.shadow_params):
            parameter.copy_(shadow)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, raw):
                parameter.copy_(value)
        for part in training:
            part.training = True


def save_snapshot(output_dir: Path, step: int, module: torch.nn.Module, ema: EMA, main: bool) -> None:
    """Save the tracks of `ema` at a step, in half precision; all processes must call this, and the first one writes."""
    half = {
        f"{length}|{name}": whole_tensor(value).half()
        for length, track in zip(TRACKS, ema.tracks.values())
        for name, value in zip(trained_names(module), track)
    }
    if not main:
        return
    folder = output_dir / "ema"
    try:
        folder.mkdir(exist_ok=True)
        save_file(half, folder / ".new")
        (folder / ".new").replace(folder / f"step-{step:08d}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CannotSave(f"could not save a snapshot in {folder}: {error}; make room and go on") from error


def forget_snapshots(output_dir: Path, step: int) -> None:
    """Remove snapshots of steps after `step`, which are about to be repeated or belong to an older run."""
    for file in (output_dir / "ema").glob("step-*.safetensors"):
        if int(file.stem.removeprefix("step-")) > step:
            file.unlink()


def export_average(run: str, folder: str, length: float) -> Path:
    """Write the model of a run with its weights averaged over another length, from the run's snapshots.

    Args:
        run: the run folder, trained with `ema.snapshot_steps`.
        folder: where to write it.
        length: as for `post_hoc`.

    Raises:
        ValueError: no snapshots, snapshots of another model, or a length that is not possible.
    """
    model = locate_pipeline(run)
    weights, pipe = post_hoc(Path(run) / "ema", length), SfumatoPipeline.from_pretrained(model)
    for part in ("unet", "text_encoder", "controlnet"):
        own = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
        if own and (odd := getattr(pipe, part).load_state_dict(own, strict=False).unexpected_keys):
            raise ValueError(f"the snapshots are of another model: {', '.join(odd[:3])}")
    written = export_pipeline(pipe, folder, source=model)
    remove_figures(written, f"averaged afterwards over {length:g} of the run")
    return written
