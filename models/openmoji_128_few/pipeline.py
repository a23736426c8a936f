# Written by Sfumato 0.2.0, Apache-2.0.

"""The noise-level mathematics of denoising diffusion: schedules, conversions, posterior, training target.

Self-contained on purpose (torch, numpy and diffusers only): this file travels inside shared model folders.
"""

from typing import cast

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (diffusers' loader looks for the name)

# The schedules that the stock DDPMScheduler lacks, with their parameters.
SCHEDULES = {
    "cosine": {"s": 0.008},
    "chen_sigmoid": {"start": -3.0, "end": 3.0, "tau": 1.0},
    "hang_laplace": {"mu": 0.0, "b": 0.5},
    "shifted_cosine": {"resolution": 64, "base_resolution": 64},
}
STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
MAX_BETA = 0.999


def alpha_bar(schedule: str, t: np.ndarray, **params: float) -> np.ndarray:
    """Signal share abar(t) of a continuous schedule; `t` is in [0, 1], where 0 is data and 1 is noise.

    - `cosine` (s): Nichol and Dhariwal 2021, eq. 17 (arXiv 2102.09672).
    - `chen_sigmoid` (start, end, tau): Chen 2023, section 2 (arXiv 2301.10972). Not the stock `sigmoid`, which is GeoDiff's.
    - `hang_laplace` (mu, b): log-SNR of t-quantiles of a Laplace distribution; Hang et al. 2024 (arXiv 2407.03297).
    - `shifted_cosine` (resolution, base_resolution): cosine log-SNR plus 2 log(base_resolution / resolution), so that
      large images get more noise; Hoogeboom et al. 2023, eq. 3 (arXiv 2301.11093).
    """
    p = {**SCHEDULES[schedule], **params}
    with np.errstate(divide="ignore", over="ignore"):
        if schedule == "cosine":
            value = np.cos((t + p["s"]) / (1 + p["s"]) * np.pi / 2) ** 2
            return value / np.cos(p["s"] / (1 + p["s"]) * np.pi / 2) ** 2
        if schedule == "chen_sigmoid":
            start, end, here = (
                1 / (1 + np.exp(-x / p["tau"])) for x in (p["start"], p["end"], t * (p["end"] - p["start"]) + p["start"])
            )
            return (end - here) / (end - start)
        if schedule == "hang_laplace":
            log_snr = p["mu"] - p["b"] * np.sign(0.5 - t) * np.log(1 - 2 * abs(t - 0.5))
        else:
            log_snr = -2 * np.log(np.tan(np.pi * t / 2)) + 2 * np.log(p["base_resolution"] / p["resolution"])
        return 1 / (1 + np.exp(-log_snr))


class SfumatoDDPMScheduler(DDPMScheduler):
    """`DDPMScheduler` with more noise schedules, all conversions, and a config that keeps the schedule it was built with.

    The betas of any schedule are written to `trained_betas`, so that `Other.from_config(this.config)` uses them, in memory
    and through disk, for every diffusers scheduler that takes `trained_betas`. What stock classes do not know (the
    schedule's parameters and notes of the trainer) is kept under one key, `_sfumato`.

    Args:
        beta_schedule: a stock name (`linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid`, `laplace`) or one of
            ours (`cosine`, `chen_sigmoid`, `hang_laplace`, `shifted_cosine`; see `alpha_bar`).
        schedule_params: parameters of one of our schedules, by name.
        rescale_betas_zero_snr: make the last step pure noise (Lin et al. 2024, Algorithm 1, arXiv 2305.08891). The stored
            betas are not rescaled; every scheduler rescales them itself.

    The other arguments are those of `DDPMScheduler`.

    Raises:
        ValueError: unknown schedule or parameter, or epsilon prediction with zero terminal SNR, where it is undefined.
    """

    @register_to_config
    def __init__(  # noqa: PLR0913 - the signature is that of diffusers
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        schedule_params: dict | None = None,
    ):
        notes = {}
        if beta_schedule not in STOCK_SCHEDULES and beta_schedule not in SCHEDULES:
            raise ValueError(
                f"unknown beta_schedule {beta_schedule!r}; choose one of {', '.join((*STOCK_SCHEDULES, *SCHEDULES))}"
            )
        if unknown := set(schedule_params or {}) - set(SCHEDULES.get(beta_schedule, {})):
            raise ValueError(
                f"beta_schedule {beta_schedule!r} has no parameter {', '.join(sorted(unknown))}; "
                f"it takes {', '.join(SCHEDULES.get(beta_schedule, {})) or 'none'}"
            )
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"unknown prediction_type {prediction_type!r}; use one of {', '.join(PREDICTION_TYPES)}")
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "epsilon prediction is undefined at zero terminal SNR (x_T holds no trace of x_0); "
                "use prediction_type='v_prediction' or 'sample', or rescale_betas_zero_snr=False"
            )
        if trained_betas is None and beta_schedule in SCHEDULES:
            notes = {
                "beta_schedule": beta_schedule,
                "schedule_params": {**SCHEDULES[beta_schedule], **(schedule_params or {})},
            }
            levels = alpha_bar(
                beta_schedule, np.arange(num_train_timesteps + 1) / num_train_timesteps, **(schedule_params or {})
            )
            trained_betas = np.minimum(1 - levels[1:] / np.maximum(levels[:-1], 1e-12), MAX_BETA)
        if trained_betas is None:  # a stock schedule: let the stock class compute it, without rescaling
            stock: dict = {"beta_start": beta_start, "beta_end": beta_end, "beta_schedule": beta_schedule}
            betas = DDPMScheduler(num_train_timesteps=num_train_timesteps, **stock).betas.tolist()
        else:
            betas = list(trained_betas)
        # Nine significant digits are exact in float32.
        trained_betas = [float(f"{float(beta):.9g}") for beta in betas]
        stock_arguments: dict = {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "trained_betas": trained_betas,
            "variance_type": variance_type,
            "clip_sample": clip_sample,
            "prediction_type": prediction_type,
            "thresholding": thresholding,
            "dynamic_thresholding_ratio": dynamic_thresholding_ratio,
            "clip_sample_range": clip_sample_range,
            "sample_max_value": sample_max_value,
            "timestep_spacing": timestep_spacing,
            "steps_offset": steps_offset,
            "rescale_betas_zero_snr": rescale_betas_zero_snr,
        }
        super().__init__(**stock_arguments)
        self._ends_in_noise = float(self.alphas_cumprod[-1]) == 0  # a Python bool, so that checking it needs no GPU sync
        # With _use_default_values empty, an in-memory swap carries every value, as a swap through disk does.
        config = {**self.config, "trained_betas": trained_betas, "_use_default_values": [], "_sfumato": notes}
        config.pop("schedule_params")
        self._internal_dict = FrozenDict(config)

    def signal_and_noise(self, t: torch.Tensor | int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply `like`; t = -1 is clean data."""
        t = torch.as_tensor(t, device=like.device)
        exact = torch.promote_types(like.dtype, torch.float32)
        abar = torch.where(t < 0, 1.0, self.alphas_cumprod.to(like.device, exact)[t.clamp(min=0)])
        abar = abar.reshape(-1, *[1] * (like.ndim - 1))
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def _threshold_sample(self, sample: torch.Tensor) -> torch.Tensor:
        """Thresholding at 1 is clipping to [-1, 1], so the quantile, which costs a sort, does not matter."""
        return sample.clamp(-1, 1) if self.config["sample_max_value"] == 1 else super()._threshold_sample(sample)

    def capped_betas(self, max_sigma: float) -> list[float] | None:
        """Betas whose noise sigma = sqrt((1 - abar) / abar) ends at `max_sigma`; None if it never exceeds that.

        The levels beyond it, which differ only in traces of the image too faint to use, are spread evenly below it.
        """
        abar = self.alphas_cumprod.double().numpy()
        with np.errstate(divide="ignore"):
            sigma = np.sqrt((1 - abar) / abar)
        beyond = sigma > max_sigma
        if not beyond.any():
            return None
        first = int(np.argmax(beyond))
        before = sigma[first - 1] if first else 0.0
        sigma[first:] = before + (max_sigma - before) * np.arange(1, len(sigma) - first + 1) / (len(sigma) - first)
        abar = 1 / (1 + sigma**2)
        return [float(f"{beta:.9g}") for beta in 1 - abar / np.concatenate([[1.0], abar[:-1]])]

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio abar_t / (1 - abar_t) at timesteps `t` of any shape; 0 at a zero-SNR end."""
        abar = self.alphas_cumprod.to(t.device)[t]
        return abar / (1 - abar)

    def convert(
        self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | int, source: str, target: str
    ) -> torch.Tensor:
        """Convert one kind of prediction to another, given the noisy sample; Salimans and Ho 2022, appendix D.

        Args:
            output: the prediction, `(B, C, H, W)`, of kind `source`.
            x_t: the noisy sample, `(B, C, H, W)`.
            t: timesteps, `(B,)` or one integer.
            source, target: `epsilon`, `sample` (x_0) or `v_prediction` (sqrt(abar) eps - sqrt(1 - abar) x_0).

        Raises:
            ValueError: an unknown kind, or x_0 or v requested from eps where the SNR is zero.
        """
        for kind in (source, target):
            if kind not in PREDICTION_TYPES:
                raise ValueError(f"unknown prediction type {kind!r}; use one of {', '.join(PREDICTION_TYPES)}")
        if source == target:
            return output
        signal, noise = self.signal_and_noise(t, x_t)
        if source == "v_prediction":
            x_0, eps = signal * x_t - noise * output, noise * x_t + signal * output
        elif source == "sample":
            x_0, eps = output, (x_t - signal * output) / noise
        else:
            if self._ends_in_noise and (signal == 0).any():
                raise ValueError("x_0 cannot be recovered from eps where the SNR is zero; use v_prediction or sample")
            x_0, eps = (x_t - noise * output) / signal, output
        return {"sample": x_0, "epsilon": eps, "v_prediction": signal * eps - noise * x_0}[target]

    @property
    def prediction_type(self) -> str:
        """What the network predicts: `epsilon`, `sample` or `v_prediction`."""
        return self.config["prediction_type"]

    def training_levels(self) -> torch.Tensor:
        """The timesteps used in training, `(num_train_timesteps,)`, from least to most noise."""
        return torch.arange(self.config["num_train_timesteps"])

    def denoised(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | int) -> torch.Tensor:
        """The x_0 that a prediction implies, `(B, C, H, W)`; see `convert`."""
        return self.convert(output, x_t, torch.as_tensor(t).long(), self.prediction_type, "sample")

    def training_target(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network should output, according to `prediction_type`; all `(B, C, H, W)`, `t` is `(B,)`."""
        if self.config["prediction_type"] == "epsilon":
            return noise
        if self.config["prediction_type"] == "sample":
            return x_0
        return self.get_velocity(x_0, noise, cast(torch.IntTensor, t))

    def posterior(
        self, x_0: torch.Tensor, x_t: torch.Tensor, s: torch.Tensor | int, t: torch.Tensor | int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `(B, C, H, W)` and variance `(B, 1, 1, 1)` of q(x_s | x_t, x_0) for s < t.

        Ho et al. 2020, eq. 6-7 (arXiv 2006.11239), for any pair s < t: beta is 1 - abar_t / abar_s, so skipping steps
        is exact. `s` = -1 stands for clean data, where the variance is 0.

        Raises:
            ValueError: s is not smaller than t.
        """
        if bool((torch.as_tensor(s) >= torch.as_tensor(t)).any()):
            raise ValueError(f"the posterior q(x_s | x_t, x_0) needs s < t, got s={s} and t={t}")
        return self._posterior(x_0, x_t, s, t)

    def _posterior(
        self, x_0: torch.Tensor, x_t: torch.Tensor, s: torch.Tensor | int, t: torch.Tensor | int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`posterior` for timesteps known to be in order; on a GPU, checking that would force a synchronisation."""
        signal_t, noise_t = self.signal_and_noise(t, x_t)
        signal_s, noise_s = self.signal_and_noise(s, x_t)
        alpha = (signal_t / signal_s) ** 2
        beta = 1 - alpha
        mean = signal_s * beta / noise_t**2 * x_0 + alpha.sqrt() * noise_s**2 / noise_t**2 * x_t
        return mean, noise_s**2 / noise_t**2 * beta

    def log_variance(self, t: torch.Tensor, like: torch.Tensor, learned: torch.Tensor | None = None) -> torch.Tensor:
        """Log-variance of p(x_{t-1} | x_t) by `variance_type`: `(B, 1, 1, 1)`, or `(B, C, H, W)` if it is `learned`.

        `fixed_small` is the posterior variance, `fixed_large` is beta_t; `learned_range` interpolates between their logarithms
        as `learned`, the second half of the network's output, goes from -1 to 1 (Nichol and Dhariwal 2021, equation 15, arXiv
        2102.09672). At t = 0, where the posterior variance is 0, that of t = 1 is used.
        """
        small = self._posterior(like, like, t.clamp(min=1) - 1, t.clamp(min=1))[1].log()
        signal_t, signal_s = self.signal_and_noise(t, like)[0], self.signal_and_noise(t - 1, like)[0]
        large = (1 - (signal_t / signal_s) ** 2).log()
        kind = self.config["variance_type"]
        if kind == "learned_range":
            if learned is None:
                raise ValueError("a learned variance needs the second half of the network's output")
            share = (learned + 1) / 2
            return share * large + (1 - share) * small
        fixed = {"fixed_small": small, "fixed_small_log": small, "fixed_large": large, "fixed_large_log": large}
        if kind not in fixed:
            raise ValueError(f"the variational bound needs variance_type learned_range or a fixed one, got {kind!r}")
        return fixed[kind]

    def bound_term(self, output: torch.Tensor, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """One term of the variational bound for each sample, `(B,)`, in bits per dimension (Ho et al. 2020, equation 5).

        For t > 0 it is the Kullback-Leibler divergence of p(x_{t-1} | x_t) from the posterior; at t = 0 the negative
        log-likelihood of x_0, for images with 256 levels in [-1, 1]. The bound is the sum over all t plus `prior_term`.

        Args:
            output: the network's output, `(B, C, H, W)`; with a learned variance `(B, 2 C, H, W)`.
            x_0, x_t: `(B, C, H, W)`.
            t: `(B,)`.
        """
        output, learned = output.split(x_0.shape[1], dim=1) if output.shape[1] == 2 * x_0.shape[1] else (output, None)
        guess = self.denoised(output, x_t, t)
        if self.config["thresholding"] or self.config["clip_sample"]:
            guess = guess.clamp(-1, 1)
        true_mean, true_variance = self._posterior(x_0, x_t, t - 1, t)
        mean, log_variance = self._posterior(guess, x_t, t - 1, t)[0], self.log_variance(t, x_t, learned)
        true_log = true_variance.clamp(min=1e-30).log()
        apart = (true_mean - mean).square() / log_variance.exp()
        divergence = 0.5 * (log_variance - true_log + (true_log - log_variance).exp() - 1 + apart)
        first = (t == 0).reshape(-1, 1, 1, 1)
        nats = torch.where(first, -discrete_log_likelihood(x_0, mean, log_variance), divergence)
        return nats.flatten(1).mean(1) / np.log(2)

    def prior_term(self, x_0: torch.Tensor) -> torch.Tensor:
        """The divergence of q(x_T | x_0) from standard normal noise, `(B,)`, in bits per dimension."""
        signal, noise = self.signal_and_noise(self.config["num_train_timesteps"] - 1, x_0)
        nats = 0.5 * (noise**2 + (signal * x_0) ** 2 - 1 - 2 * noise.log())
        return nats.flatten(1).mean(1) / np.log(2)


def discrete_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Log-probability under N(mean, exp(log_variance)) of the bin of `x`, 256 levels in [-1, 1]; Ho et al. 2020, eq. 13.

    The outermost bins extend to infinity.
    """
    scale = (-0.5 * log_variance).exp()
    above, below = ((x - mean + side / 255) * scale for side in (1, -1))
    inside = torch.special.ndtr(above) - torch.special.ndtr(below)
    # Far out, both are 0 or 1 in floating point; use the density times the bin width there.
    density = -0.5 * ((x - mean) * scale).square() - 0.5 * (log_variance + np.log(2 * np.pi)) + np.log(2 / 255)
    middle = torch.where(inside > 1e-5, inside.clamp(min=1e-30).log(), density)
    return torch.where(
        x < -0.999, torch.special.log_ndtr(above), torch.where(x > 0.999, torch.special.log_ndtr(-below), middle)
    )


"""Flow matching: straight paths between images and noise, and the velocity along them.

Self-contained on purpose (torch, numpy and diffusers only): this file travels inside shared model folders.
"""

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

UNSUPPORTED_SETTINGS = (
    "invert_sigmas", "shift_terminal", "stochastic_sampling", "use_beta_sigmas", "use_dynamic_shifting",
    "use_exponential_sigmas", "use_karras_sigmas",
)  # fmt: skip


class SfumatoFlowScheduler(FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` with what training needs and with the methods that UNet pipelines call.

    x_t = (1 - sigma) x_0 + sigma eps with sigma = t / num_train_timesteps, where t goes from 0 (the image) to that number
    (noise); the network predicts the velocity eps - x_0 (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv
    2209.03003; the objective of Stable Diffusion 3, arXiv 2403.03206). Arguments as for the stock class.
    """

    init_noise_sigma = 1.0
    prediction_type = "flow_prediction"

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """The sample itself: the network is trained on x_t as it is."""
        return sample

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, **more):
        """As in the stock class, but evenly from 1 - 1 / num_train_timesteps to 0, like diffusers' other flow samplers.

        The stock class spends its last step, at the same cost, between 1 / num_train_timesteps and 0.
        """
        if sigmas is None and more.get("timesteps") is None and num_inference_steps is not None:
            sigmas = np.linspace(1 - 1 / self.config["num_train_timesteps"], 0, num_inference_steps + 1)[:-1].tolist()
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, **more)  # pyright: ignore[reportArgumentType]

    def _sigma(self, t: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
        t = torch.as_tensor(t, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        return (t / self.config["num_train_timesteps"]).reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)

    def signal_and_noise(self, t: torch.Tensor | float, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """1 - sigma and sigma at timesteps `t`, shaped to multiply `like`."""
        sigma = self._sigma(t, like)
        return 1 - sigma, sigma

    def training_levels(self) -> torch.Tensor:
        """The timesteps used in training, `(num_train_timesteps + 1,)`, from the image to noise."""
        return torch.arange(self.config["num_train_timesteps"] + 1)

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio ((1 - sigma) / sigma)^2 at timesteps `t` of any shape; infinite at 0."""
        sigma = t / self.config["num_train_timesteps"]
        return ((1 - sigma) / sigma) ** 2

    def add_noise(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t at timesteps `t`, `(B,)`."""
        sigma = self._sigma(t, x_0)
        return (1 - sigma) * x_0 + sigma * noise

    def training_target(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity dx_t / dsigma = eps - x_0, `(B, C, H, W)`."""
        return noise - x_0

    def denoised(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """The x_0 that a prediction implies: x_t - sigma (eps - x_0)."""
        return x_t - self._sigma(t, x_t) * output

    def to_stock(self, cls: type = DPMSolverMultistepScheduler, **settings):
        """The same path for diffusers' solvers that support flow matching, with which `StableDiffusionPipeline` can draw.

        DPM-Solver++ of order 1, the default, takes Euler's steps: with x_0 = x_t - sigma_t v, its
        x_s = sigma_s / sigma_t x_t + (alpha_s - alpha_t sigma_s / sigma_t) x_0 is x_t + (sigma_s - sigma_t) v.
        """
        odd = [name for name in UNSUPPORTED_SETTINGS if self.config.get(name)]
        if odd:
            raise ValueError(f"no stock sampler for UNets supports these flow matching settings: {', '.join(odd)}")
        settings = settings or {"solver_order": 1}
        steps, shift = self.config["num_train_timesteps"], self.config["shift"]
        flow = {"prediction_type": self.prediction_type, "use_flow_sigmas": True, "flow_shift": shift}
        # The offset changes nothing here, but StableDiffusionPipeline requires it.
        return cls(num_train_timesteps=steps, steps_offset=1, **flow, **settings)


"""Checks on a stranger's folder before it is opened: no pickles, no absurd sizes.

Self-contained on purpose (torch, safetensors, diffusers and transformers only): this file travels inside shared model folders.
"""

import importlib
import json
from collections.abc import Set
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
UNREAD = [f"*{suffix}" for suffix in PICKLES]  # files of a Hub repository that are not downloaded
MAX_TIMESTEPS, MAX_SAMPLE_SIZE = 100_000, 1024
PARTS = (
    "vae", "text_encoder", "unet", "scheduler", "safety_checker", "image_encoder", "controlnet",
    "low_res_scheduler", "guider", "tokenizer", "feature_extractor", "motion_adapter",
)  # fmt: skip
MODELS = {  # (library and class as model_index.json names them) -> module
    ("diffusers", "UNet2DConditionModel"): "diffusers",
    ("diffusers", "ControlNetModel"): "diffusers",
    ("diffusers", "UNetMotionModel"): "diffusers",
    ("diffusers", "MotionAdapter"): "diffusers",
    ("diffusers", "AutoencoderKL"): "diffusers",
    ("diffusers", "AutoencoderTiny"): "diffusers",
    ("diffusers", "AsymmetricAutoencoderKL"): "diffusers",
    ("transformers", "CLIPTextModel"): "transformers",
    ("transformers", "CLIPTextModelWithProjection"): "transformers",
    ("transformers", "CLIPVisionModelWithProjection"): "transformers",
    ("stable_diffusion", "StableDiffusionSafetyChecker"): "diffusers.pipelines.stable_diffusion.safety_checker",
}


def check_folder(folder: str | Path, skip: Set[str] = frozenset()) -> None:
    """Reject a pipeline folder that would unpickle objects or fill the memory when it is opened.

    Remote code needs no check here: diffusers runs none without `trust_remote_code=True`.

    Args:
        folder: a folder in Stable Diffusion's format.
        skip: parts that are not opened, since the caller provides others.

    Raises:
        ValueError: weights that exist only as a pickle, are damaged, or do not match the size that a config asks for.
    """
    folder = Path(folder)
    index = _read(folder / "model_index.json")
    for name in PARTS:
        part, entry = folder / name, index.get(name)
        if name in skip or not part.is_dir() or not isinstance(entry, list) or not all(isinstance(w, str) for w in entry):
            continue
        check_part(part, (entry[0], entry[-1]))


def check_part(part: Path, entry: tuple[str, str]) -> None:
    """Like `check_folder`, for the folder of one model; `entry` is its library and class.

    Raises:
        ValueError: as for `check_folder`; or something in it is not a regular file and could block forever when it is read.
    """
    odd = [path.name for path in part.iterdir() if not path.is_file() and not path.is_dir()]
    if odd:
        raise ValueError(f"{part / odd[0]} is not a plain file")
    safe = list(part.glob("*.safetensors"))
    pickles = [path.name for path in part.iterdir() if path.suffix.lower() in PICKLES]
    if pickles and not safe:
        raise ValueError(
            f"{part} holds its weights only as {pickles[0]}, a pickle, which can run code when opened; only safetensors "
            "files are opened. Convert it where its code can do no harm, or ask its author to"
        )
    for listing in part.glob("*.safetensors.index*.json"):
        shards = _read(listing).get("weight_map", {})
        odd = [str(f) for f in (shards.values() if isinstance(shards, dict) else ["?"]) if not _is_shard(f)]
        if odd:
            raise ValueError(f"{listing} names {odd[0]!r}, which is not a safetensors file beside it")
    if (part / "scheduler_config.json").is_file():
        steps = _read(part / "scheduler_config.json").get("num_train_timesteps", 1000)
        if not isinstance(steps, int) or not 0 < steps <= MAX_TIMESTEPS:
            raise ValueError(f"{part}: num_train_timesteps={steps!r}; at most {MAX_TIMESTEPS} are allowed")
    if safe and (part / "config.json").is_file():
        _check_size(part, entry, safe)


def _is_shard(name) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _read(path: Path) -> dict:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a plain file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged")
    return content


def _check_size(part: Path, entry: tuple[str, str], files: list[Path]) -> None:
    """Compare what the config would build, on torch's meta device, with the stored weights."""
    if entry not in MODELS:
        raise ValueError(f"{part} is a {'.'.join(entry)}, which is not a part of a model in this format")
    shapes = {}
    for path in files:  # variants repeat names
        try:
            with safe_open(path, "pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    config = _read(part / "config.json")
    if depth := find_depth(config, max(len(shapes), 100)):  # first, since a model that is too deep cannot even be sketched
        raise ValueError(f"{part}: its config asks for {depth}, its weights hold {len(shapes):,} tensors")
    if max(_numbers(config.get("sample_size"))) > MAX_SAMPLE_SIZE:
        raise ValueError(f"{part}: sample_size={config['sample_size']!r}; at most {MAX_SAMPLE_SIZE} is opened")
    cls = getattr(importlib.import_module(MODELS[entry]), entry[1])
    try:
        with torch.device("meta"):
            diffusers_model = hasattr(cls, "load_config")
            sketch = cls.from_config(config) if diffusers_model else cls(cls.config_class.from_dict(config))
    except Exception as error:
        raise ValueError(f"{part}: its config does not describe a {entry[1]}: {error}") from error
    wanted = sum(parameter.numel() for parameter in sketch.parameters())
    if wanted > 1.5 * stored + 10_000:
        raise ValueError(f"{part}: its config asks for {wanted:,} parameters, its weights hold {stored:,}; it is not opened")


def find_depth(config: dict, limit: int) -> str | None:
    """The setting that asks for more than `limit` layers, alone or multiplied with the others; None if there is none."""
    product, queue = 1, [config]
    while queue:
        for key, value in queue.pop().items():
            if isinstance(value, dict):
                queue.append(value)
            elif isinstance(value, list) and len(value) > limit:
                return f"{len(value):,} {key}"
            elif "layers" in key:
                product *= max(1, *_numbers(value))
                if product > limit:
                    return f"{product:,} layers ({key})"
    return None


def _numbers(value) -> list[int]:
    """The integers in nested lists, and 0."""
    if isinstance(value, list):
        return [0] + [number for item in value for number in _numbers(item)]
    return [0, value] if isinstance(value, int) else [0]


"""One interpretation of every image file in training, calls and commands: upright, sRGB, 8 bits per channel, on white.

Self-contained on purpose (numpy and PIL only): this file travels inside shared model folders.
"""

from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
# Formats whose 16-bit files Pillow opens with 32 bits.
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")


class UnsupportedImage(ValueError):
    """An image whose values are ambiguous; the message says why."""


def to_8_bits(image: Image.Image, channels: int, notes: set[str] | None = None) -> Image.Image:
    """Convert an image of any mode to 8-bit grey, RGB or RGBA: upright, in sRGB, on white unless `channels` is 4.

    The range follows the file format: of 16 bits the upper eight are used, and floats must lie in [0, 1]. No image is scaled
    by its own contents.

    Args:
        channels: 1 is grey, 3 RGB, 4 RGBA.
        notes: receives what was unusual about the image, such as a palette.

    Raises:
        UnsupportedImage: 32-bit integers, floats outside [0, 1], or a mode that cannot be converted.
    """
    notes = set() if notes is None else notes
    if image.getexif().get(0x0112, 1) != 1:
        notes.add("turned upright")
        image = ImageOps.exif_transpose(image)
    image = _scale(image, notes)
    image = _to_srgb(image, notes)
    if image.mode not in ("RGB", "L"):
        notes.add(f"converted from {image.mode}")
    try:
        if image.mode in TRANSPARENT or "transparency" in image.info:
            image = image.convert("RGBA")
            if channels != 4:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(MODES[channels])
    except ValueError as error:
        raise UnsupportedImage(f"mode {image.mode} is not read; save it as RGB") from error


def _scale(image: Image.Image, notes: set[str]) -> Image.Image:
    """Convert images with more than 8 bits to 8 bits."""
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in SIXTEEN_BIT_FORMATS):
        notes.add("16 bits scaled to 8")
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "I":
        raise UnsupportedImage("integers of 32 bits, whose range is not known; save it with 8 or 16")
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UnsupportedImage("float values outside of [0, 1]; scale them, all images by the same factor")
        notes.add("float values in [0, 1]")
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    return image


def _to_srgb(image: Image.Image, notes: set[str]) -> Image.Image:
    """Convert colours from the profile in the file to sRGB, as image viewers do."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        given, srgb = (ImageCms.ImageCmsProfile(each) for each in (BytesIO(profile), ImageCms.createProfile("sRGB")))
        if _same_colours(given.profile, srgb.profile):
            return image
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        plain = image.convert("RGB") if alpha else image
        done = ImageCms.profileToProfile(plain, given, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.add("unreadable colour profile, ignored")
        return image
    if done is None:
        return image
    notes.add("colours converted to sRGB")
    if alpha:
        done.putalpha(alpha)
    return done


def _same_colours(given, srgb) -> bool:
    """Whether a profile is sRGB under one of its many names."""
    named = "srgb" in (given.profile_description or "").lower()
    primaries = [(getattr(p, f"{name}_colorant") or (np.nan,))[0] for p in (given, srgb) for name in ("red", "green", "blue")]
    values = np.array([np.resize(primary, 3) for primary in primaries], float)
    return named and bool(np.allclose(values[:3], values[3:], atol=0.01))


"""The arguments of a pipeline call: checked before anything is computed; images and masks are turned into tensors.

Self-contained on purpose (torch, numpy, PIL and diffusers only): this file travels inside shared model folders.
"""

import functools
import re
import threading
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils import logging
from PIL import Image


logger = logging.get_logger(__name__)

CAPTION_WORDS = "caption_words"  # key in the tokenizer's settings: all words of the training captions


_TOKENIZING = threading.Lock()


def tokenize(tokenizer, text: str | list[str], **settings):
    """`tokenizer(text, **settings)`, one thread at a time: padding and truncation are state that all callers share."""
    with _TOKENIZING:
        return tokenizer(text, **settings)


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning about a prompt once per process, since the same prompt is often drawn many times."""
    logger.warning(message)


def split_words(text: str) -> list[str]:
    """The words of a text in lower case; single characters for scripts without spaces between words."""
    return re.findall(r"[\u2e80-\u9fff]|[^\W\d_\u2e80-\u9fff]+", text.lower())


def warn_of_unknown_words(tokenizer, prompts: list[str]) -> None:
    """Warn of words that are in no training caption; does nothing if the tokenizer does not list the caption words."""
    listed = tokenizer.init_kwargs.get(CAPTION_WORDS)
    known = {word for word in listed if isinstance(word, str)} if isinstance(listed, list) else set()
    unknown = dict.fromkeys(word for prompt in prompts for word in split_words(prompt) if word not in known)
    if known and unknown:
        words = ", ".join(repr(word) for word in list(unknown)[:10])
        has = "that are in no caption this model was trained on"
        warn_once(f"Words of the prompts {has}: {words}. The model can only guess what they mean.")


@dataclass(frozen=True, kw_only=True)
class CallInputs:
    """The arguments of a pipeline call that are checked, as in `SfumatoPipeline.__call__` with the sizes filled in."""

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    image: object
    mask_image: object
    strength: float | None
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float | None
    num_images_per_prompt: int
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    output_type: str
    callback_tensors: list[str]
    num_resamples: int
    noise_level: int | None
    control_image: object
    control_scale: object = 1.0
    callback: object = None
    cross_attention_kwargs: object = None


def check_inputs(pipe, call: CallInputs) -> None:
    """Reject wrong types, sizes and ranges before anything is computed.

    Raises:
        TypeError, ValueError: the message names the value, what is allowed and what to do.
    """
    num_images = _check_prompts(pipe, call) * call.num_images_per_prompt
    _check_steps_and_size(pipe, call)
    _check_guidance(pipe, call)
    _check_generator(call, num_images)
    if call.latents is not None:
        factor = pipe.vae_scale_factor
        _check_floats("latents", call.latents)
        expected = (num_images, pipe.vae.config.latent_channels, call.height // factor, call.width // factor)
        if tuple(call.latents.shape) != expected:
            raise ValueError(f"`latents` must have shape {expected}, got {tuple(call.latents.shape)}")
    _check_images(pipe, call)
    _check_conditions(pipe, call)
    output_types = ["pil", "np", "pt", "latent"]
    if pipe.codec is not None:
        output_types.append("decoded")
    if call.output_type not in output_types:
        raise ValueError(f"`output_type` must be one of {output_types}, got {call.output_type!r}")
    if call.callback is not None and not callable(call.callback):
        raise TypeError(f"`callback_on_step_end` must be a function, got {type(call.callback).__name__}")
    if call.cross_attention_kwargs is not None and not isinstance(call.cross_attention_kwargs, dict):
        raise TypeError(f"`cross_attention_kwargs` must be a dict, got {type(call.cross_attention_kwargs).__name__}")
    names = call.callback_tensors
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`callback_on_step_end_tensor_inputs` must be a list of names, got {names!r}")
    if unknown := [k for k in call.callback_tensors if k not in pipe._callback_tensor_inputs]:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` may name {pipe._callback_tensor_inputs}, found {unknown}")


def _check_floats(name: str, value, ndim: int = 4) -> None:
    """Reject anything but a dense tensor of finite floats with `ndim` dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.device.type == "meta" or not value.is_floating_point():
        raise TypeError(f"`{name}` must be a dense tensor of floats, got {value.dtype}, {value.layout}, on {value.device}")
    if value.ndim != ndim or not value.numel():
        raise ValueError(f"`{name}` must have {ndim} dimensions and values, got the shape {tuple(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"`{name}` contains values that are not finite")


def _check_embeds(pipe, call: CallInputs) -> None:
    """Reject embeddings that the network cannot read, or that do not match the unconditional ones."""
    width = pipe.unet.config.cross_attention_dim
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if (value := getattr(call, name)) is not None:
            _check_floats(name, value, 3)
            if isinstance(width, int) and value.shape[-1] != width:
                raise ValueError(f"`{name}` must have the width that the network reads, {width}, got {value.shape[-1]}")
    positive, negative = call.prompt_embeds, call.negative_prompt_embeds
    if positive is None and negative is None:
        return
    if positive is not None and negative is not None:
        if positive.shape != negative.shape and negative.shape != (1, *positive.shape[1:]):
            raise ValueError(
                f"`prompt_embeds` {tuple(positive.shape)} and `negative_prompt_embeds` "
                f"{tuple(negative.shape)} must have the same shape"
            )
        return
    if pipe.text_encoder is None:
        if positive is None or call.guidance_scale != 1:
            given, missing = ("negative_prompt_embeds", "prompt_embeds")[:: 1 if positive is None else -1]
            raise ValueError(f"without a text encoder, `{given}` also needs `{missing}`, or `guidance_scale`=1")
        return
    length = min(pipe.tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings)
    name, given = ("prompt_embeds", positive) if positive is not None else ("negative_prompt_embeds", negative)
    other = "negative_prompt_embeds" if positive is not None else "prompt_embeds"
    if given is not None and given.shape[1] != length and call.guidance_scale != 1:
        raise ValueError(
            f"`{name}` has {given.shape[1]} tokens, but the text encoder's own output has {length}; "
            f"pass `{other}` of {given.shape[1]} tokens too"
        )


def _is_count(value) -> bool:
    """Whether a value is an integer of at least 1; True does not count."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_prompts(pipe, call: CallInputs) -> int:
    """Check prompts and embeddings; return the number of prompts."""
    for name, text in (("prompt", call.prompt), ("negative_prompt", call.negative_prompt)):
        if text is not None and not isinstance(text, str):
            if not isinstance(text, list) or not all(isinstance(item, str) for item in text):
                raise TypeError(f"`{name}` must be a string or a list of strings, got {type(text).__name__}: {text!r}")
            if not text:
                raise ValueError(f"`{name}` is an empty list; pass at least one string ('' for no condition)")
    if (call.prompt is None) == (call.prompt_embeds is None):
        raise ValueError("pass exactly one of `prompt` and `prompt_embeds`")
    if call.negative_prompt is not None and call.negative_prompt_embeds is not None:
        raise ValueError("pass at most one of `negative_prompt` and `negative_prompt_embeds`")
    _check_embeds(pipe, call)
    if call.prompt_embeds is not None:
        batch_size = len(call.prompt_embeds)
    else:
        batch_size = 1 if isinstance(call.prompt, str) else len(call.prompt or ())
    if isinstance(call.negative_prompt, list) and len(call.negative_prompt) != batch_size:
        raise ValueError(
            f"{len(call.negative_prompt)} negative prompts for {batch_size} prompts; pass one string, or one for each prompt"
        )
    steered = call.negative_prompt_embeds is not None or any(call.negative_prompt or ())
    if steered and getattr(pipe.guider, "weak", None) is not None:
        raise ValueError("autoguidance steers away from a weaker model, not from a negative prompt; leave it out")
    if not _is_count(call.num_images_per_prompt):
        value = call.num_images_per_prompt
        raise ValueError(f"`num_images_per_prompt` must be a whole number of at least 1, got {value!r}")
    return batch_size


def _check_steps_and_size(pipe, call: CallInputs) -> None:
    steps, trained_steps = call.num_inference_steps, pipe.scheduler.config.num_train_timesteps
    if not _is_count(steps):
        raise ValueError(f"`num_inference_steps` must be a whole number of at least 1, got {steps!r}")
    if steps > trained_steps:
        raise ValueError(f"`num_inference_steps`={steps} is more than the {trained_steps} steps the model was trained with")
    factor = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    for name, value in (("height", call.height), ("width", call.width)):
        if not isinstance(value, int) or not 0 < value <= MAX_SIDE or value % pipe.vae_scale_factor:
            multiple = f"a positive multiple of {pipe.vae_scale_factor} pixels, at most {MAX_SIDE}"
            raise ValueError(f"`{name}` must be {multiple}, got {value!r}")
        if value % factor:
            logger.warning(f"`{name}`={value} is not a multiple of {factor}; the UNet pads internally, which may be visible.")


def _check_guidance(pipe, call: CallInputs) -> None:
    scale = call.guidance_scale
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"`guidance_scale` must be a number, got {type(scale).__name__}: {scale!r}")
    if not 0 <= scale <= MAX_GUIDANCE:
        raise ValueError(f"`guidance_scale` must be finite, at least 0 and at most {MAX_GUIDANCE}, got {scale}")
    settings = {"guidance_scale"} if pipe.guider is None else set(pipe.guider.config)
    second = {"perturbed_guidance_scale", "skip_layer_guidance_scale", "seg_guidance_scale"} & settings
    if scale == 1 and second:
        raise ValueError(f"{type(pipe.guider).__name__} works on top of plain guidance: `guidance_scale` must not be 1")
    if "guidance_scale" not in settings:
        raise ValueError(f"{type(pipe.guider).__name__} takes no `guidance_scale`; set up `pipe.guider` instead")


def _check_generator(call: CallInputs, num_images: int) -> None:
    generator = call.generator
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(f"{len(generator)} generators for {num_images} images; pass one, or one for each image")
    if generator is not None and not all(
        isinstance(g, torch.Generator) for g in (generator if isinstance(generator, list) else [generator])
    ):
        raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}")


def _check_images(pipe, call: CallInputs) -> None:
    strength = call.strength
    if call.mask_image is not None and call.image is None:
        raise ValueError("`mask_image` says which part of `image` to redraw; pass `image` too")
    if call.image is None and strength is not None:
        raise ValueError("`strength` says how much of `image` to redraw; pass `image` too")
    if strength is not None:
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1:
            raise ValueError(f"`strength` must be a number above 0 and at most 1, got {strength!r}")
        if round(strength * call.num_inference_steps) < 1:
            raise ValueError(f"`strength`={strength} of {call.num_inference_steps} steps leaves no step to take; raise either")
    if not _is_count(call.num_resamples):
        raise ValueError(f"`num_resamples` must be a whole number of at least 1, got {call.num_resamples!r}")
    if call.num_resamples > 1:
        if call.mask_image is None:
            raise ValueError("`num_resamples` is for inpainting; pass `image` and `mask_image`")
        if not isinstance(pipe.scheduler, (DDPMScheduler, DDIMScheduler)):
            raise ValueError(f"`num_resamples` needs a DDPM or DDIM scheduler, not {type(pipe.scheduler).__name__}")


def _check_conditions(pipe, call: CallInputs) -> None:
    """Check the arguments that upscaling models and ControlNets need and that other models do not take."""
    scale = call.control_scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= MAX_GUIDANCE:
        raise ValueError(f"`controlnet_conditioning_scale` must be a number, at most {MAX_GUIDANCE}, got {scale!r}")
    if (pipe.controlnet is None) != (call.control_image is None):
        missing = "has no ControlNet; leave `control_image` out" if pipe.controlnet is None else "needs `control_image`"
        raise ValueError(f"this model {missing}")
    if pipe.reads != "low_res":
        if call.noise_level is not None:
            raise ValueError("`noise_level` is for upscaling models; leave it out")
        return
    if pipe.low_res_scheduler is None:
        raise ValueError("this upscaling model has no low_res_scheduler; it needs one such as DDPMScheduler")
    if call.image is None or call.mask_image is not None or call.strength is not None:
        raise ValueError("an upscaling model takes `image`, the smaller image, and neither `mask_image` nor `strength`")
    limit, level = pipe.config.max_noise_level, call.noise_level
    if level is not None and not (type(level) is int and level == 0 or _is_count(level) and level <= limit):
        raise ValueError(f"`noise_level` must be a whole number from 0 to {limit}, got {level!r}")


MAX_SIDE = 32768
MAX_GUIDANCE = 1000  # beyond this, half precision overflows and nothing is drawn
# Largest value of each integer type whose range is unambiguous.
RANGES = {torch.uint8: 255, torch.uint16: 65535, torch.bool: 1}


def _stack(name: str, value, one_has: int) -> torch.Tensor:
    """An array, a tensor or a list of them as one float tensor with a batch dimension; uint8, uint16 and bool in [0, 1]."""
    parts = value if isinstance(value, list) else [value]
    tensors = []
    for part in parts:
        if not isinstance(part, (np.ndarray, torch.Tensor)):
            raise TypeError(f"`{name}` must contain PIL images, arrays or tensors, got {type(part).__name__}")
        try:
            tensor = torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else part
        except TypeError as error:
            raise TypeError(f"`{name}` is an array of {part.dtype}, not of numbers") from error
        if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.numel():
            raise ValueError(f"`{name}` must be a dense tensor with values; this one is empty, sparse or has no data")
        if tensor.dtype not in RANGES and not tensor.is_floating_point():
            raise ValueError(f"`{name}` has {tensor.dtype}, whose range is unknown; pass uint8, uint16 or float in [0, 1]")
        tensor = tensor.float() / RANGES.get(tensor.dtype, 1)
        if isinstance(part, np.ndarray) and tensor.ndim >= 3:  # channels last, as everywhere in diffusers
            tensor = tensor.movedim(-1, -3)
        tensors.append(tensor.float() if tensor.ndim == one_has + 1 else tensor.float()[None])
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        raise ValueError(f"`{name}` contains images of several sizes: {[tuple(t.shape[1:]) for t in tensors]}")
    return torch.cat(tensors)


def _eight_bits(image: Image.Image, channels: int, name: str) -> Image.Image:
    try:
        return to_8_bits(image, channels)
    except UnsupportedImage as error:
        raise ValueError(f"`{name}`: {error}") from error


def _fit_batch(name: str, tensor: torch.Tensor, batch_size: int, num_images_per_prompt: int) -> torch.Tensor:
    if len(tensor) not in (1, batch_size):
        raise ValueError(f"{len(tensor)} images in `{name}` for {batch_size} prompts; pass one, or one for each prompt")
    return tensor.expand(batch_size, *tensor.shape[1:]).repeat_interleave(num_images_per_prompt, dim=0)


def to_pixels(
    image,
    channels: int,
    height: int,
    width: int,
    batch_size: int = 1,
    num_images_per_prompt: int = 1,
    *,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
    name: str = "image",
) -> torch.Tensor:
    """`image` as `(B, C, height, width)` in [-1, 1].

    Args:
        image: PIL images of any mode (see `images.to_8_bits`), resized if needed; arrays `(H, W, C)` or tensors `(C, H, W)`,
            uint8, uint16 or float in [0, 1], with or without a batch dimension; or a list of them.
        channels: C; 1 is grey, 3 RGB, 4 RGBA.
        resample: how PIL images are resized.
        name: the argument's name, for error messages.

    Raises:
        TypeError, ValueError: another type or size, values out of range, or neither one image nor one for each prompt.
    """
    parts = image if isinstance(image, list) else [image]
    if all(isinstance(part, Image.Image) for part in parts):
        sized = [_eight_bits(part, channels, name) for part in parts]
        sized = [p if p.size == (width, height) else p.resize((width, height), resample) for p in sized]
        image = [np.asarray(part).reshape(height, width, channels) for part in sized]
    pixels = _stack(name, image, one_has=3)
    if tuple(pixels.shape[1:]) != (channels, height, width):
        raise ValueError(
            f"`{name}` must be {channels} x {height} x {width}, got {tuple(pixels.shape[1:])}; or pass a PIL image"
        )
    if not (torch.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"`{name}` must contain values from 0 to 1 (or be uint8 or uint16)")
    return _fit_batch(name, pixels * 2 - 1, batch_size, num_images_per_prompt)


def to_mask(
    mask, height: int, width: int, batch_size: int = 1, num_images_per_prompt: int = 1, *, channels: int = 1
) -> torch.Tensor:
    """`mask` as `(B, 1, height, width)` in [0, 1]: 1 is redrawn, 0 is kept, values between are blended.

    Args:
        mask: PIL images, which are resized if needed; arrays or tensors `(H, W)` or `(1, H, W)` (arrays `(H, W, 1)`), bool,
            uint8, uint16 or float in [0, 1], with or without a batch dimension; or a list of them.
        channels: those of a model that draws arrays. The mask may have as many, for example to select the frames of a clip
            that are to be drawn; the result then has them too.

    Raises:
        TypeError, ValueError: as for `to_pixels`.
    """
    parts = mask if isinstance(mask, list) else [mask]
    if all(isinstance(part, Image.Image) for part in parts):
        sized = [_eight_bits(part, 1, "mask_image") for part in parts]
        sized = [p if p.size == (width, height) else p.resize((width, height), Image.Resampling.BOX) for p in sized]
        mask = [np.asarray(part)[..., None] for part in sized]
    parts = mask if isinstance(mask, list) else [mask]
    flat = [part[..., None] if isinstance(part, np.ndarray) and part.ndim == 2 else part for part in parts]
    flat = [part[None] if isinstance(part, torch.Tensor) and part.ndim == 2 else part for part in flat]
    values = _stack("mask_image", flat, one_has=3)
    if tuple(values.shape[1:]) not in ((1, height, width), (channels, height, width)):
        raise ValueError(f"`mask_image` must be {height} x {width}, got {tuple(values.shape[1:])}; or pass a PIL image")
    if not (torch.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError("`mask_image` must contain values from 0 (keep) to 1 (redraw)")
    if values.max() == 0:
        logger.warning("`mask_image` is 0 everywhere, so no part of `image` is redrawn. White (1) marks what to redraw.")
    return _fit_batch("mask_image", values, batch_size, num_images_per_prompt)


def pad_for_outpainting(image: Image.Image, left=0, top=0, right=0, bottom=0) -> tuple[Image.Image, Image.Image]:
    """A larger image and its mask, for `pipe(prompt, image=image, mask_image=mask, height=..., width=...)`.

    Args:
        image: the image to continue beyond its edges.
        left, top, right, bottom: pixels to add; they repeat the nearest edge, and the mask marks them to be redrawn.
    """
    if min(left, top, right, bottom) < 0:
        raise ValueError(f"the number of pixels to add must not be negative, got {(left, top, right, bottom)}")
    values = np.asarray(image)
    more = [(top, bottom), (left, right)]
    mask = np.pad(np.zeros(values.shape[:2], np.uint8), more, constant_values=255)
    return Image.fromarray(np.pad(values, more + [(0, 0)] * (values.ndim - 2), mode="edge")), Image.fromarray(mask)


"""What a network reads besides the noisy latents and the text: a mask and the image around it, or a smaller image.

Self-contained on purpose (torch, numpy, PIL and diffusers only): this file travels inside shared model folders.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

UPSCALERS_SCALE = 0.08333  # StableDiffusionUpscalePipeline sets every VAE's scaling factor to this


def image_channels(vae) -> int:
    """Number of channels of the images that a VAE encodes; `ConsistencyDecoderVAE` has another name for it."""
    return vae.config.get("in_channels") or vae.config.encoder_in_channels


def codec_facts(unet) -> dict | None:
    """The facts in a UNet's config about the codec of its arrays, see `pipelines.codecs`; None for a model of images."""
    own = unet.config.get("_sfumato") if unet is not None else None
    return own.get("codec") if isinstance(own, dict) else None


def extra_input_kind(unet, vae) -> str | None:
    """What the UNet reads besides the noisy latents: `masks` (and masked images) as in Stable Diffusion's inpainting,
    `low_res` (a smaller image) as in its upscaling, or None for nothing.
    """
    if unet is None or vae is None:
        return None
    more = unet.config.in_channels - vae.config.latent_channels
    if more == image_channels(vae) and (unet.config.class_embed_type or unet.config.num_class_embeds):
        return "low_res"
    return "masks" if more == vae.config.latent_channels + 1 else None


def x0_estimator(scheduler):
    """What a network with self-conditioning reads besides the noise: the x_0 of its last prediction, zeros at first (Chen
    et al. 2022, arXiv 2208.04202). Returns a function of prediction, x_t and t, the first two `(B, C, h, w)`.
    """
    config = scheduler.config
    abar, kind = scheduler.alphas_cumprod, config.prediction_type
    clip = config.get("clip_sample") or config.get("thresholding")

    def estimated(output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = abar.to(x_t.device, torch.float32)[t.long()].reshape(-1, 1, 1, 1)  # in half precision the last value would be 0
        dtype = x_t.dtype
        output = output[:, : x_t.shape[1]].float()
        x_t = x_t.float()
        if kind == "epsilon":
            output = (x_t - (1 - a).sqrt() * output) / a.sqrt()
        elif kind == "v_prediction":
            output = a.sqrt() * x_t - (1 - a).sqrt() * output
        return (output.clamp(-1, 1) if clip else output).to(dtype)

    return estimated


def encode_image(vae, pixels: torch.Tensor) -> torch.Tensor:
    """The unscaled latents `(B, C, h, w)` of pixels `(B, C, H, W)` in [-1, 1]; works with any autoencoder of diffusers."""
    encoded = vae.encode(pixels)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


def default_size(pipe, image) -> tuple[int, int]:
    """Height and width in pixels if a call names none: those of training.

    Upscaling follows the small image, or the first of a list: an array or tensor already has the size of the latents, and so
    does a PIL image unless the VAE is the identity, as in the stock pipeline. With pixels, a PIL image whose shorter side is
    below the trained size is enlarged to it.
    """
    first = image[0] if isinstance(image, list) and image else image
    factor, trained = pipe.vae_scale_factor, pipe.trained_size
    if extra_input_kind(pipe.unet, pipe.vae) != "low_res":
        return trained
    if isinstance(first, Image.Image):
        times = factor if factor > 1 else max(1, min(trained) / min(first.size))
        turned = first.getexif().get(0x0112, 1) >= 5  # stored on its side, see `images.to_8_bits`
        width, height = (side * times for side in (first.size[::-1] if turned else first.size))
    elif isinstance(first, torch.Tensor) and first.ndim >= 3:
        height, width = (side * factor for side in first.shape[-2:])
    elif isinstance(first, np.ndarray) and first.ndim >= 3:
        height, width = (side * factor for side in first.shape[-3:-1])
    else:
        return trained
    return round(height / factor) * factor, round(width / factor) * factor


def check_upscaling(vae) -> None:
    """Raise ValueError for a VAE with which `StableDiffusionUpscalePipeline` would draw other images or fail."""
    if vae.config.scaling_factor != UPSCALERS_SCALE or vae.post_quant_conv is None:
        raise ValueError(
            f"stock upscaling takes a VAE with scaling_factor {UPSCALERS_SCALE}; see autoencoders.set_scaling_factor"
        )


def renoise(scheduler, x_s: torch.Tensor, s: torch.Tensor, t: torch.Tensor, generator) -> torch.Tensor:
    """Go back up from timestep `s` to `t` with fresh noise: sqrt(a) x_s + sqrt(1 - a) eps, where a = abar_t / abar_s."""
    a = (scheduler.alphas_cumprod[t] / scheduler.alphas_cumprod[s]).to(x_s)
    return a.sqrt() * x_s + (1 - a).sqrt() * randn_tensor(x_s.shape, generator, x_s.device, x_s.dtype)


def inpainting_condition(vae, pixels: torch.Tensor | None, mask: torch.Tensor | None, noise: torch.Tensor) -> torch.Tensor:
    """What an inpainting UNet reads besides the noise, `(B, 1 + C, h, w)`: the mask, 1 where to draw, and the masked image.

    Args:
        pixels, mask: `(B, 3, H, W)` in [-1, 1] and `(B, 1, H, W)`. Without a mask, everything is drawn.
        noise: `(B, C, h, w)`.
    """
    if mask is None or pixels is None:
        size = [side * 2 ** (len(vae.config.block_out_channels) - 1) for side in noise.shape[-2:]]
        mask, pixels = noise.new_ones(len(noise), 1, *size), noise.new_zeros(len(noise), image_channels(vae), *size)
    mask = (mask >= 0.5).to(noise)
    masked_latents = encode_image(vae, pixels * (1 - mask)) * vae.config.scaling_factor
    return torch.cat([F.interpolate(mask, masked_latents.shape[-2:]), masked_latents], dim=1)


def low_res_condition(scheduler, pixels: torch.Tensor, level: torch.Tensor | int, generator=None) -> torch.Tensor:
    """Add noise of the timesteps `level`, one or `(B,)`, to a small image `(B, 3, h, w)`, so that an upscaling network does
    not trust it too much (noise conditioning augmentation; Ho et al. 2022, arXiv 2106.15282, section 4).
    """
    noise = randn_tensor(pixels.shape, generator, pixels.device, pixels.dtype)
    return scheduler.add_noise(pixels, noise, torch.as_tensor(level, device=pixels.device).reshape(-1))


"""The model in diffusers' own classes: the stock pipeline of its kind and the stock scheduler.

This file travels inside shared model folders.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import diffusers
from diffusers import DDPMScheduler, DiffusionPipeline
from transformers.utils import logging as transformers_logging


# The class that `model_index.json` names for a model that no stock pipeline can draw: that in the folder's own pipeline.py.
REMOTE_CLASS = ["pipeline", "SfumatoPipeline"]


def stock_pipeline(pipe) -> DiffusionPipeline:
    """The same model as a stock pipeline, sharing all weights: `StableDiffusionPipeline`, or the one for inpainting, upscaling
    or ControlNets.

    Raises:
        ValueError: no stock pipeline can draw it, because the model reads its own estimate.
    """
    if pipe.reads == "estimate":
        raise ValueError("no stock pipeline supports self-conditioning; open this model with SfumatoPipeline")
    return stock_parts(pipe)


def stock_parts(pipe) -> DiffusionPipeline:
    """`stock_pipeline`, or for a model that no stock pipeline can draw, one that holds the same parts."""
    parts = {**pipe.components, "scheduler": stock_scheduler(pipe.scheduler)}
    if hasattr(pipe.unet, "to_stock"):  # clips, see `pipelines.motion`
        unet, adapter = pipe.unet.to_stock()
        parts |= {"vae": pipe.vae.vae, "unet": unet, "motion_adapter": adapter}
        kept = (
            "vae",
            "text_encoder",
            "tokenizer",
            "unet",
            "motion_adapter",
            "scheduler",
            "feature_extractor",
            "image_encoder",
        )
        return diffusers.AnimateDiffPipeline(**{name: parts[name] for name in kept})
    parts["unet"] = getattr(pipe.unet, "unet", pipe.unet)  # unwrap a network that another runtime runs
    guider, low_res, controlnet = (parts.pop(name) for name in ("guider", "low_res_scheduler", "controlnet"))
    if pipe.reads == "low_res":
        check_upscaling(pipe.vae)
        del parts["image_encoder"]
        parts |= {"low_res_scheduler": low_res, "max_noise_level": pipe.config.max_noise_level}
        return diffusers.StableDiffusionUpscalePipeline(**parts)
    parts["requires_safety_checker"] = pipe.config.requires_safety_checker
    if controlnet is not None:
        return diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=controlnet)
    name = "StableDiffusionInpaintPipeline" if pipe.reads == "masks" else "StableDiffusionPipeline"
    return getattr(diffusers, name)(**parts)


@contextmanager
def quiet_transformers():
    """Hide the progress bars of transformers, "Loading weights" and "Writing model shards", which last about a second."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def check_no_lora(pipe) -> None:
    """Raise ValueError for a pipeline with a LoRA beside its weights, which a folder of full weights would lose or corrupt."""
    for name in ("unet", "text_encoder"):
        part = getattr(pipe, name)
        if part is not None and any("lora_" in key for key, _ in part.named_parameters()):
            raise ValueError(
                f"a LoRA is loaded beside the weights of `{name}`, which such a folder cannot hold: first run "
                "`pipe.fuse_lora(); pipe.unload_lora_weights()` to save both as one, or save it with `pipe.save_lora_weights`"
            )


def stock_scheduler(scheduler):
    """The sampler as a diffusers class that stock pipelines can draw with."""
    if isinstance(scheduler, SfumatoFlowScheduler):
        return scheduler.to_stock()
    cls = DDPMScheduler if isinstance(scheduler, SfumatoDDPMScheduler) else type(scheduler)
    # A copy, since StableDiffusionPipeline edits its scheduler's config and turns clip_sample off. Thresholding at 1.0
    # clips in exactly the same way and is left alone.
    config = dict(scheduler.config)
    if config.get("clip_sample") and config.get("clip_sample_range", 1.0) == 1.0 and "thresholding" in config:
        config.update(clip_sample=False, thresholding=True, sample_max_value=1.0)
    return cls.from_config(config)


def write_class(pipe, folder) -> None:
    """In the saved folder of a model that no stock pipeline can draw, name the class that can."""
    if pipe.reads == "estimate":
        path = Path(folder) / "model_index.json"
        index = {**json.loads(path.read_text(encoding="utf-8")), "_class_name": REMOTE_CLASS, "self_conditioning": True}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


"""One guided prediction of the network: which passes it takes, how they run and what their inputs are.

Self-contained on purpose (torch and diffusers only): this file travels inside shared model folders.
"""

import functools
import math
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.utils import logging

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class NetworkInputs:
    """What a network reads besides noise, time and text.

    Attributes:
        class_labels: `(B,)`, the noise level of the small image of an upscaling model.
        control: `(B, C, H, W)` in [0, 1], the map that a ControlNet follows.
        control_scale: how strongly it follows the map.
        attention: `cross_attention_kwargs` of the UNet.
        guidance: `(B, D)`, the guidance scale as input of a distilled network; see `guidance_embedding`.
    """

    class_labels: torch.Tensor | None = None
    control: torch.Tensor | None = None
    control_scale: float = 1.0
    attention: dict | None = None
    guidance: torch.Tensor | None = None


@dataclass
class CallState:
    """What a pipeline call counts and finds out along the way.

    Attributes:
        num_passes: network passes so far.
        one_by_one: whether the passes of one step did not fit into memory as one batch.
        num_timesteps: steps of the scheduler.
        guidance_scale: that of the guider; 1 if it has none.
        guided: whether an unconditional prediction is needed.
        guidance_ended: whether a callback has ended guidance.
        cross_attention_kwargs: those of the call.
    """

    num_passes: int = 0
    one_by_one: bool = False
    num_timesteps: int = 0
    guidance_scale: float = 1.0
    guided: bool = False
    guidance_ended: bool = False
    cross_attention_kwargs: dict | None = None


@dataclass(frozen=True, kw_only=True)
class Embeds:
    """Text as the network reads it, each `(B, L, D)`; `negative` is None without guidance."""

    positive: torch.Tensor
    negative: torch.Tensor | None = None


@dataclass
class Turn:
    """Which thread is using a scheduler or a network, since both keep state while drawing."""

    lock: Any = field(default_factory=threading.Lock)
    thread: int | None = None


_TURNS: WeakKeyDictionary = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def one_at_a_time(call: Callable) -> Callable:
    """Make pipeline calls in several threads wait for each other if they share a scheduler or a network.

    Raises (from the call):
        RuntimeError: the same thread is already drawing with one of them, because the call comes from a callback.
    """

    @functools.wraps(call)
    def wait_and_call(pipe, *arguments, **named):
        me = threading.get_ident()
        with _TURNS_LOCK:
            shared = {id(each): _TURNS.setdefault(each, Turn()) for each in (pipe.scheduler, pipe.unet) if each is not None}
        if any(turn.thread == me for turn in shared.values()):
            raise RuntimeError("a callback may not draw with the pipeline that called it; give it one of its own")
        with ExitStack() as stack:
            for _, turn in sorted(shared.items()):
                stack.enter_context(turn.lock)
                turn.thread = me
                stack.callback(setattr, turn, "thread", None)
            return call(pipe, *arguments, **named)

    return wait_and_call


def build_guider(cls: type, **settings) -> BaseGuidance:
    """Build a guider of diffusers without its warning that guiders are experimental: the versions we tested are pinned."""

    def is_other(record) -> bool:
        return "experimental" not in str(record.msg)

    guider_logger = logging.get_logger("diffusers.guiders.guider_utils")
    guider_logger.addFilter(is_other)
    try:
        return cls(**settings)
    finally:
        guider_logger.removeFilter(is_other)


def guidance_width(unet) -> int | None:
    """Width of the embedding of the guidance scale that a distilled network reads; None for any other network."""
    return unet.config.get("time_cond_proj_dim")


def guidance_embedding(scale: torch.Tensor, width: int) -> torch.Tensor:
    """Embed guidance scales `(B,)` for a distilled network, `(B, width)`: sines and cosines of 1000 (scale - 1).

    Like `StableDiffusionPipeline.get_guidance_scale_embedding`, which only works on the CPU.
    """
    frequencies = torch.exp(torch.arange(width // 2, device=scale.device) * (-math.log(10000.0) / (width // 2 - 1)))
    angles = 1000.0 * (scale.float() - 1)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def guided_prediction(
    pipe,
    guider: BaseGuidance,
    latents: torch.Tensor,
    t: torch.Tensor,
    *,
    embeds: Embeds,
    inputs: NetworkInputs,
    state: CallState,
) -> torch.Tensor:
    """The guided prediction, `(B, C, h, w)`: the guider says which passes are needed and combines them.

    The passes run as one batch. They run one after another if the guider changes the network between passes or has a `weak`
    model for the second, or once a batch has not fitted into memory.
    """
    # Before diffusers 0.36 this was called prepare_inputs.
    prepare: Callable = getattr(guider, "prepare_inputs_from_block_state", guider.prepare_inputs)
    pair = SimpleNamespace(cond=embeds.positive, uncond=embeds.negative)
    passes = prepare(pair, {"encoder_hidden_states": ("cond", "uncond")})
    state.num_passes += len(passes)
    weak = getattr(guider, "weak", None)
    batchable = type(guider).prepare_models is BaseGuidance.prepare_models and weak is None
    if batchable and not state.one_by_one:
        context = torch.cat([each.encoder_hidden_states for each in passes])
        try:
            output = run_network(pipe.unet, pipe.controlnet, latents, t, context, inputs)
            for each, part in zip(passes, output.chunk(len(passes))):
                guider.prepare_models(pipe.unet)
                each.noise_pred = part
            return guider(passes)[0]
        except torch.OutOfMemoryError:
            if len(passes) == 1:
                raise
            logger.warning("The guidance passes do not fit into memory as one batch; from here on they run one by one.")
            state.one_by_one = True
    for i, each in enumerate(passes):
        guider.prepare_models(pipe.unet)
        model = weak if weak is not None and i > 0 else pipe
        try:
            each.noise_pred = run_network(model.unet, model.controlnet, latents, t, each.encoder_hidden_states, inputs)
        finally:  # or the network would stay changed for everyone who shares it
            guider.cleanup_models(pipe.unet)
    return guider(passes)[0]


def weak_embeds(pipe, weak, prompt, prompt_embeds, device) -> torch.Tensor:
    """The prompt as a weaker model's text encoder encodes it; the model is moved to this one's device and precision."""
    for part in filter(None, (weak.unet, weak.text_encoder, weak.controlnet)):
        part.to(device, pipe.unet.dtype)
    return weak.encode_prompt(prompt, device, 1, False, prompt_embeds=prompt_embeds)[0]


def run_network(
    unet, controlnet, latents: torch.Tensor, t: torch.Tensor, context: torch.Tensor, inputs: NetworkInputs | None = None
) -> torch.Tensor:
    """The network's prediction for each row of `context`, which has one or more rows for each of `latents`."""
    times = len(context) // len(latents)
    more = {}
    inputs = inputs or NetworkInputs()
    latents = latents.repeat(times, 1, 1, 1)
    if inputs.class_labels is not None:
        more["class_labels"] = inputs.class_labels.repeat(times)
    if inputs.control is not None:
        hint = inputs.control.repeat(times, 1, 1, 1)
        down, mid = controlnet(latents, t, context, hint, inputs.control_scale, return_dict=False)
        more |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    if inputs.attention is not None:
        more["cross_attention_kwargs"] = inputs.attention
    if inputs.guidance is not None:
        more["timestep_cond"] = inputs.guidance.to(latents.dtype).repeat(times, 1)
    return unet(latents, t, context, **more, return_dict=False)[0]


"""Text to image, image to image, inpainting, upscaling, control; any guider and scheduler of diffusers, over stock parts.

Self-contained on purpose (torch, diffusers, transformers, and those of our modules that `export.joined_source` joins): this
file travels inside shared model folders.
"""

import copy
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer


logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """The image that a call changes, and where it is changed.

    Attributes:
        pixels: `(B, C, H, W)` in [-1, 1]; None if the call starts from noise alone.
        mask: `(B, 1, H, W)` in [0, 1], 1 where to redraw; None means everywhere.
        x_0, latent_mask: the same in latent space.
    """

    pixels: Any = None
    mask: torch.Tensor | None = None
    x_0: Any = None
    latent_mask: torch.Tensor | None = None


def _located(source: str) -> str:
    """The folder of the model that `source` names if sfumato is installed, otherwise `source` itself."""
    try:
        return importlib.import_module("sfumato.pipelines.locate").locate_pipeline(source)
    except (ModuleNotFoundError, ValueError):  # diffusers reports what is wrong, or the Hub has it
        return source


class SfumatoPipeline(DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin):
    """Draws images from text with a UNet, a CLIP text encoder, a VAE and any diffusers scheduler and guider.

    `SfumatoPipeline.from_pretrained(folder)` opens any folder in Stable Diffusion's format, whoever made it, and
    `save_pretrained` writes that format: stock classes only, so that loading it does not need `sfumato`.

    Args:
        vae: turns latents into images; the identity in pixel models.
        text_encoder, tokenizer: turn prompts into `(B, L, D)` embeddings.
        unet: predicts the quantity that the scheduler's `prediction_type` names.
        scheduler: stock `DDPMScheduler` and `FlowMatchEulerDiscreteScheduler` are converted to ours; others stay as they are.
        guider: how conditional and unconditional predictions are combined; `ClassifierFreeGuidance` if None.
        low_res_scheduler, max_noise_level: for upscaling models, how noise is added to the small image, and how much at most.
        controlnet: makes the network follow a map, such as an edge map (Zhang et al. 2023, arXiv 2302.05543).
        safety_checker, feature_extractor, image_encoder, requires_safety_checker: not used, but kept for the Stable Diffusion
            folders that have them, so that saving loses nothing.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder"]
    _optional_components += ["guider", "low_res_scheduler", "controlnet"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(  # noqa: PLR0913 - the signature is that of diffusers
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: Union[UNet2DConditionModel, UNetMotionModel],  # noqa: UP007  (the form that diffusers 0.35 understands)
        scheduler: KarrasDiffusionSchedulers,
        guider: Optional[BaseGuidance] = None,  # noqa: UP045  (the same)
        safety_checker: Optional[object] = None,  # noqa: UP045
        feature_extractor: Optional[object] = None,  # noqa: UP045
        image_encoder: Optional[object] = None,  # noqa: UP045
        requires_safety_checker: bool = False,
        low_res_scheduler: Optional[object] = None,  # noqa: UP045
        controlnet: Optional[object] = None,  # noqa: UP045
        max_noise_level: int = 350,
        self_conditioning: bool = False,
    ):
        super().__init__()
        if type(unet).__name__ == "UNetMotionModel":  # clips
            unet, vae = importlib.import_module("sfumato.pipelines.motion").as_clips(unet, vae)
        if safety_checker is not None:
            logger.warning("SfumatoPipeline does not run the safety checker that comes with this model.")
        ours = {DDPMScheduler: SfumatoDDPMScheduler, FlowMatchEulerDiscreteScheduler: SfumatoFlowScheduler}
        stock: Any = scheduler
        if type(stock) in ours:
            scheduler = ours[type(stock)].from_config(stock.config)
        # StableDiffusionPipeline sets this on every scheduler; without it a saved model would not draw the same images.
        given: Any = scheduler
        if given is not None and given.config.get("steps_offset", 1) != 1:
            scheduler = type(given).from_config(given.config, steps_offset=1)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            guider=guider,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            low_res_scheduler=low_res_scheduler,
            controlnet=controlnet,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker, max_noise_level=max_noise_level,
            self_conditioning=self_conditioning,
        )  # fmt: skip
        self._call = CallState()
        self._interrupt = False
        if controlnet is not None and self.reads:
            raise ValueError(f"a ControlNet cannot be combined with a UNet that reads {self.reads}")
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Open a folder or Hub repository in Stable Diffusion's format, the newest model of a run folder, or a
        packaged model such as `openmoji_128`. Arguments as for `DiffusionPipeline`.

        Only safetensors files are opened, and no code from the folder is run.

        Raises:
            ValueError: see `trust.check_folder`.
        """
        folder: str = _located(str(pretrained_model_name_or_path))
        kwargs.setdefault("use_safetensors", True)
        if not os.path.isdir(folder):
            folder = str(cls.download(folder, **kwargs))
            for name in ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision"):
                kwargs.pop(name, None)
        check_folder(folder, skip=set(kwargs))
        try:
            with quiet_transformers():
                return super().from_pretrained(folder, **kwargs)
        except (OSError, torch.OutOfMemoryError):  # missing files or memory: diffusers' own error, not a fault of the folder
            raise
        except Exception as error:  # an odd config can raise nearly anything
            raise ValueError(f"{folder} cannot be opened: {type(error).__name__}: {error}") from error

    def save_pretrained(self, save_directory, **kwargs):
        """Save in Stable Diffusion's format: stock classes only, so that plain diffusers opens it. (A model with
        self-conditioning is opened by this class only; `export_pipeline` puts its code into the folder.)

        The guider is not saved, since it belongs to the call and not to the weights. Arguments as for `DiffusionPipeline`.

        Raises:
            ValueError: a LoRA is loaded beside the weights.
        """
        check_no_lora(self)
        with quiet_transformers():
            stock_parts(self).save_pretrained(save_directory, **kwargs)
        write_class(self, save_directory)

    def to_stock(self) -> DiffusionPipeline:
        """The same model as the stock pipeline of its kind, sharing all weights; see `stock.stock_pipeline`."""
        return stock_pipeline(self)

    @classmethod
    def _dict_from_json_file(cls, *args, **kwargs):
        """As in diffusers, but a folder that names its own `pipeline.py` is opened by this class; that code does not run."""
        config = super()._dict_from_json_file(*args, **kwargs)
        if config.get("_class_name") == REMOTE_CLASS:
            config["_class_name"] = cls.__name__
        if config.get("_class_name") == "AnimateDiffPipeline":  # its UNet already contains the whole adapter
            config.pop("motion_adapter", None)
        return config

    def _embed(self, text: list[str], device) -> torch.Tensor:
        """Encode prompts as embeddings `(len(text), L, D)`; warns of text that is cut off and of unknown words."""
        warn_of_unknown_words(self.tokenizer, text)
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        ids = tokenize(
            self.tokenizer, text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        for prompt, full in zip(text, tokenize(self.tokenizer, text, verbose=False).input_ids):
            if len(full) > length:
                cut = self.tokenizer.decode(full[length - 1 : -1])
                warn_once(f"The prompt {prompt[:60]!r} is longer than {length - 2} tokens; this part was cut off: {cut}")
        return self.text_encoder(ids.to(device))[0]

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode prompts and negative prompts.

        Returns:
            Two tensors `(B * num_images_per_prompt, L, D)`; the second is None without classifier-free guidance.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompt_embeds = self._embed([prompt] if isinstance(prompt, str) else list(prompt or ()), device)
        batch_size = prompt_embeds.shape[0]
        dtype = self.unet.dtype if self.text_encoder is None else self.text_encoder.dtype
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            negative_prompt_embeds = None
        else:
            if negative_prompt_embeds is None:
                negative = [negative_prompt or ""] if not isinstance(negative_prompt, list) else negative_prompt
                negative_prompt_embeds = self._embed(negative, device)
            if negative_prompt_embeds.shape[0] == 1:
                negative_prompt_embeds = negative_prompt_embeds.expand(batch_size, -1, -1)
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

    def prepare_noise(self, num_images, height, width, dtype, device, generator, latents=None) -> torch.Tensor:
        """Standard normal noise `(num_images, C, h, w)`, or `latents` if given."""
        factor = self.vae_scale_factor
        shape = (num_images, self.vae.config.latent_channels, height // factor, width // factor)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            if hasattr(self.vae, "frames"):  # AnimateDiff's noise has the frames inside the channels
                latents = latents.unflatten(1, (-1, self.vae.frames)).transpose(1, 2).flatten(1, 2)
        return latents.to(device, dtype)

    def prepare_image(self, image, mask_image, size: tuple[int, int], batch: tuple[int, int], dtype) -> "SourceImage":
        """The image and the mask passed to a call, in pixels and in latent space.

        `size` is (height, width); `batch` is the number of prompts and the number of images for each.
        """
        device = self._execution_device
        pixels = to_pixels(image, image_channels(self.vae), *size, *batch).to(device, dtype)
        channels = 1 if self.codec is None else image_channels(self.vae)
        mask = None if mask_image is None else to_mask(mask_image, *size, *batch, channels=channels).to(device, dtype)
        x_0 = encode_image(self.vae, pixels) * self.vae.config.scaling_factor
        latent_mask = None if mask is None else F.interpolate(mask, x_0.shape[-2:], mode="area")
        return SourceImage(pixels=pixels, mask=mask, x_0=x_0, latent_mask=latent_mask)

    @property
    def trained_size(self) -> tuple[int, int]:
        """Height and width of the training images, in pixels."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def reads(self) -> str | None:
        """What the UNet reads besides the noisy latents: `masks`, `low_res`, `estimate` or None; see `conditions`."""
        return "estimate" if self.config["self_conditioning"] else extra_input_kind(self.unet, self.vae)

    @property
    def codec(self) -> Any:
        """The codec that turns the arrays that the model draws into objects, such as molecules; None if it draws images or if
        sfumato is not installed.
        """
        facts = codec_facts(self.unet)
        try:
            return importlib.import_module("sfumato.pipelines.codecs").open_codec(facts) if facts else None
        except ModuleNotFoundError:
            return None

    def prepare_guider(self, guidance_scale: float | None) -> tuple[BaseGuidance, object | None]:
        """A fresh guider for a call, so that no state (step, momentum) leaks into the next, and its weaker model."""
        weak = getattr(self.guider, "weak", None)
        guider = copy.deepcopy(self.guider, {id(weak): weak}) or build_guider(ClassifierFreeGuidance)
        if guidance_width(self.unet) is not None:  # distilled: the scale is an input of the network
            if self.guider is not None and not isinstance(self.guider, ClassifierFreeGuidance):
                raise ValueError(f"the guidance scale is an input of this model, which takes no {type(self.guider).__name__}")
            guider._enabled = False
        if guidance_scale is not None:
            setattr(guider, "guidance_scale", float(guidance_scale))  # noqa: B010  (a field of most guiders)
        return guider, weak

    def prepare_low_res(
        self, image, noise_level: int | None, size, batch, generator, dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For upscaling: the smaller image with noise added, `(B, C, h, w)`, and the level of that noise, `(B,)`."""
        level = min(20, self.config["max_noise_level"]) if noise_level is None else noise_level
        height, width = (side // self.vae_scale_factor for side in size)
        channels, device = image_channels(self.vae), self._execution_device
        small = to_pixels(image, channels, height, width, *batch, resample=Image.Resampling.BICUBIC).to(device, dtype)
        noisy = low_res_condition(self.low_res_scheduler, small, level, generator)
        return noisy, torch.full((len(small),), level, device=device)

    def prepare_control(self, control_image, size, batch, dtype) -> torch.Tensor:
        """The map that the ControlNet follows, `(B, C, H, W)` in [0, 1]."""
        channels = self.controlnet.config.conditioning_channels
        hint = to_pixels(control_image, channels, *size, *batch, name="control_image")
        return (hint / 2 + 0.5).to(self._execution_device, dtype)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents `(B, C, h, w)` to images `(B, C, H, W)`, roughly in [-1, 1]."""
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]

    def add_noise(self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Add `noise` to `x_0` at the level of timestep `t`, in the scheduler's own scale."""
        return self.scheduler.add_noise(x_0, noise, t.reshape(1).expand(len(x_0)))

    def predict(
        self,
        guider: BaseGuidance,
        latents: torch.Tensor,
        t: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        inputs: NetworkInputs | None = None,
    ) -> torch.Tensor:
        """One guided prediction, `(B, C, h, w)`; see `guided.guided_prediction`.

        Only DDPM can use a learned variance, the second half of the output; other samplers get the first half.
        """
        embeds = Embeds(positive=prompt_embeds, negative=negative_prompt_embeds)
        output = guided_prediction(self, guider, latents, t, embeds=embeds, inputs=inputs or NetworkInputs(), state=self._call)
        return output if isinstance(self.scheduler, DDPMScheduler) else output[:, : self.vae.config.latent_channels]

    @property
    def num_passes(self) -> int:
        """Network passes for each image of the last call: two per step with guidance, one outside its interval."""
        return self._call.num_passes

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current call; 1 if the guider has none."""
        return self._call.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        """Set by diffusers' callbacks to end guidance: at 1 or below, the rest of the call runs without it."""
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._call.guidance_scale = value
        self._call.guidance_ended = value <= 1

    @property
    def cross_attention_kwargs(self) -> dict | None:
        """Those of the current call, such as `{"scale": 0.5}` for the strength of a LoRA."""
        return self._call.cross_attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `pipe._interrupt`, after which the call takes no further step."""
        return self._interrupt

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current call needs an unconditional prediction."""
        return self._call.guided

    @property
    def num_timesteps(self) -> int:
        """Number of scheduler steps of the current call."""
        return self._call.num_timesteps

    @torch.no_grad()
    @one_at_a_time
    def __call__(  # noqa: C901, PLR0913 - the signature is that of diffusers
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: object | None = None,
        mask_image: object | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        num_resamples: int = 1,
        noise_level: int | None = None,
        control_image: object | None = None,
        controlnet_conditioning_scale: float = 1.0,
        cross_attention_kwargs: dict | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw images from text; with `image`, change an image; with `mask_image`, redraw a part of it; or upscale `image`.

        Args:
            prompt, negative_prompt: one string or a list; the empty string means no condition.
            image: the image to start from or to redraw in part; for an upscaling model, the smaller image. See
                `inputs.to_pixels`.
            mask_image: where to redraw `image`: 1 is redrawn, 0 is kept bit for bit; see `inputs.to_mask`.
            strength: how far `image` is taken back towards noise, above 0 and at most 1; 0.8 by default, 1 with a mask.
            height, width: in pixels; the size that the model was trained at by default.
            num_inference_steps: network evaluations (times two with guidance).
            guidance_scale: overrides the guider's own for this call (Ho and Salimans 2022, arXiv 2207.12598, in the form
                uncond + scale * (cond - uncond)); 1 means no guidance.
            num_images_per_prompt: images for each prompt.
            generator: one for the batch, or one for each image, which then does not depend on the others in the batch.
            latents: starting noise `(B * num_images_per_prompt, C, h, w)`, standard normal.
            prompt_embeds, negative_prompt_embeds: `(B, L, D)`, in place of text.
            output_type: `pil`; `np` `(B, H, W, 3)` in [0, 1]; `pt` `(B, 3, H, W)` in [0, 1]; `latent`; for a model with a
                codec, `decoded`: a list of the objects that its arrays stand for.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, t, tensors)` after each step; may return replacements.
            callback_on_step_end_tensor_inputs: which tensors it is passed.
            num_resamples: with a mask, how many times each step is taken; all but the last are undone by noise, so that the
                redrawn part fits the rest (RePaint with jumps of one step; Lugmayr et al. 2022, arXiv 2201.09865).
            noise_level: timestep whose noise an upscaling model adds to `image` (default 20); more invents more detail.
            control_image, controlnet_conditioning_scale: the map that the ControlNet follows, given like `image`; its weight.
            cross_attention_kwargs: passed to the UNet; `{"scale": 0.5}` sets the strength of a LoRA.

        A callback may set `pipe._interrupt = True`, after which no further step is taken. Calls from several threads that
        share a scheduler or a network wait for each other.

        Raises:
            TypeError, ValueError: see `inputs.check_inputs`.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        trained = default_size(self, image)
        height = trained[0] if height is None else height
        width = trained[1] if width is None else width
        size = (height, width)
        check_inputs(
            self,
            CallInputs(
                prompt=prompt,
                negative_prompt=negative_prompt,
                image=image,
                mask_image=mask_image,
                strength=strength,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                output_type=output_type,
                callback_tensors=callback_on_step_end_tensor_inputs,
                num_resamples=num_resamples,
                noise_level=noise_level,
                control_image=control_image,
                control_scale=controlnet_conditioning_scale,
                callback=callback_on_step_end,
                cross_attention_kwargs=cross_attention_kwargs,
            ),
        )

        guider, weak = self.prepare_guider(guidance_scale)
        self._call = state = CallState(
            guidance_scale=getattr(guider, "guidance_scale", 1.0),
            guided=guider._enabled and guider.num_conditions > 1,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        self._interrupt = False
        device = self._execution_device
        if weak is not None:
            negative_prompt_embeds = weak_embeds(self, weak, prompt, prompt_embeds, device)
        positive, negative_prompt_embeds = self.encode_prompt(
            prompt, device, num_images_per_prompt, state.guided, negative_prompt, prompt_embeds, negative_prompt_embeds
        )
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps, dtype = self.scheduler.timesteps, positive.dtype
        batch = (len(positive) // num_images_per_prompt, num_images_per_prompt)

        # What the network reads besides noise and text. Its noise is drawn before the starting noise, as in stock pipelines.
        condition = None
        labels = None
        control = None
        if self.reads == "low_res":
            condition, labels = self.prepare_low_res(image, noise_level, size, batch, generator, dtype)
        if control_image is not None:
            control = self.prepare_control(control_image, size, batch, dtype)
        told = None
        if (width_told := guidance_width(self.unet)) is not None:
            told = guidance_embedding(torch.full((len(positive),), state.guidance_scale, device=device), width_told)
            if negative_prompt and any([negative_prompt] if isinstance(negative_prompt, str) else negative_prompt):
                warn_once("A negative prompt has no effect on this model: its guidance scale is an input of the network.")
        inputs = NetworkInputs(
            class_labels=labels,
            control=control,
            control_scale=controlnet_conditioning_scale,
            attention=cross_attention_kwargs,
            guidance=told,
        )

        noise = self.prepare_noise(len(positive), height, width, dtype, device, generator, latents)
        x: torch.Tensor = noise * self.scheduler.init_noise_sigma
        source = SourceImage()
        if image is not None and self.reads != "low_res":
            source = self.prepare_image(image, mask_image, size, batch, dtype)
            strength = (0.8 if source.mask is None else 1.0) if strength is None else strength
            if strength < 1:
                begin = (num_inference_steps - round(strength * num_inference_steps)) * self.scheduler.order
                timesteps = timesteps[begin:]
                if hasattr(self.scheduler, "set_begin_index"):
                    self.scheduler.set_begin_index(begin)
                x = self.add_noise(source.x_0, noise, timesteps[0])
        estimate = None
        if self.reads == "masks":
            condition = inpainting_condition(self.vae, source.pixels, source.mask, noise)
        elif self.reads == "estimate":
            condition, estimate = torch.zeros_like(noise), x0_estimator(self.scheduler)
        state.num_timesteps = len(timesteps)
        # Deterministic samplers take no generator.
        taken = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {name: value for name, value in (("generator", generator), ("eta", 0.0)) if name in taken}

        progress: Any = self.progress_bar
        with progress(total=len(timesteps) // self.scheduler.order) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                last = i == len(timesteps) - 1
                for again in reversed(range(1 if last else num_resamples)):
                    guider.set_state(step=i, num_inference_steps=len(timesteps), timestep=t)
                    x_t = self.scheduler.scale_model_input(x, t)
                    model_input = x_t if condition is None else torch.cat([x_t, condition], dim=1)
                    output = self.predict(guider, model_input, t, positive, negative_prompt_embeds, inputs)
                    condition = estimate(output, x_t, t) if estimate else condition
                    x = self.scheduler.step(output, t, x, **step_kwargs, return_dict=False)[0]
                    if source.latent_mask is not None and self.reads != "masks":
                        original = source.x_0 if last else self.add_noise(source.x_0, noise, timesteps[i + 1])
                        x = source.latent_mask * x + (1 - source.latent_mask) * original
                    if again:
                        x = renoise(self.scheduler, x, timesteps[i + 1], t, generator)
                if callback_on_step_end is not None:
                    tensors: dict[str, Any] = {
                        "latents": x,
                        "prompt_embeds": positive,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    requested = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, requested) or {}
                    x, positive = tensors["latents"], tensors["prompt_embeds"]
                    negative_prompt_embeds = tensors["negative_prompt_embeds"]
                    if len(positive) != len(x):
                        raise ValueError(f"the callback returned {len(positive)} `prompt_embeds` for {len(x)} images")
                    guider._enabled = guider._enabled and not state.guidance_ended
                if (i + 1) % self.scheduler.order == 0 or last:
                    progress_bar.update()

        if not x.isfinite().all():
            logger.warning("The result is not finite: the weights are damaged, or half precision has overflowed.")
        images: Any = x
        if output_type != "latent":
            images = self.decode_latents(x)
            if source.mask is not None:
                images = source.mask * images + (1 - source.mask) * source.pixels
            if self.codec is not None and output_type in ("pil", "decoded"):
                arrays: Any = self.image_processor.postprocess(images, output_type="np")
                images = [self.codec.decode(array) for array in arrays]
                if output_type == "pil":
                    images = [Image.fromarray(self.codec.picture(thing)) for thing in images]
            else:
                images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
