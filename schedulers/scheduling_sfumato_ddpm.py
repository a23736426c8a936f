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
