"""Losses, which noise levels are trained and how much each counts: pure functions."""

import math

import torch
import torch.nn.functional as F


def sample_timesteps(u: torch.Tensor, snr: torch.Tensor, kind: str, mean: float = 0.0, std: float = 2.0) -> torch.Tensor:
    """Turn uniform numbers into timesteps.

    Args:
        u: `(B,)` in [0, 1).
        snr: signal-to-noise ratio of every timestep, `(T,)`, decreasing.
        kind: `uniform` over timesteps; or log-SNR, truncated to the schedule's range: `normal` (Karras et al. 2022,
            section 5, arXiv 2206.00364; on flow matching, where log-SNR is -2 logit(sigma), it is the logit-normal of Esser
            et al. 2024, arXiv 2403.03206), or `laplace`, whose peak is sharper (Hang et al. 2024, arXiv 2407.03297).
        mean, std: of the log-SNR in nats, before truncation. Laplace's scale is std / sqrt(2).

    Returns:
        `(B,)` int64 in [0, T).
    """
    if kind == "uniform":
        return (u * len(snr)).long().clamp(max=len(snr) - 1)
    log_snr = snr.clamp(1e-20, 1e20).log()
    if kind == "normal":
        cdf, quantile = torch.special.ndtr, torch.special.ndtri
    else:
        cdf = lambda x: torch.where(x < 0, 0.5 * (x / 0.5**0.5).exp(), 1 - 0.5 * (-x / 0.5**0.5).exp())  # noqa: E731
        quantile = lambda p: -(0.5**0.5) * (p - 0.5).sign() * (1 - 2 * (p - 0.5).abs()).log()  # noqa: E731
    # Uniform numbers between the two ends' quantiles give the distribution truncated to the schedule's range.
    low, high = (cdf((end - mean) / std) for end in (log_snr[-1], log_snr[0]))
    wanted = mean + std * quantile((low + (high - low) * u.to(snr)).clamp(1e-6, 1 - 1e-6))
    return torch.searchsorted(-log_snr, -wanted).clamp(max=len(snr) - 1)


def loss_weight(
    snr: torch.Tensor,
    prediction_type: str,
    kind: str,
    *,
    gamma: float = 5.0,
    floor: float = 0.0,
    p2_gamma: float = 1.0,
    sigma_data: float = 0.5,
) -> torch.Tensor:
    """Weight of each sample's mean squared error, `(B,)`.

    `unit` is 1 on whatever the network predicts. The others give the same loss whatever it predicts; as weights on x_0:

    - `min_snr`: min(SNR, gamma) (Hang et al. 2023, section 3.4, arXiv 2303.09556). `floor` is ours: a lower bound
      however low the SNR, since the layout of an image is decided there.
    - `soft_min_snr`: SNR gamma / (SNR + gamma) (Crowson et al. 2024, arXiv 2401.11605).
    - `p2`: SNR / (1 + SNR)^p2_gamma (Choi et al. 2022, equation 8 with k = 1, arXiv 2204.00227).
    - `edm`: SNR + 1 / sigma_data^2 (Karras et al. 2022, table 1, arXiv 2206.00364).
    - `debiased`: sqrt(SNR) (Yu et al. 2023, arXiv 2310.08442).

    On eps the weight is that divided by SNR, on v by SNR + 1, and on the velocity of flow matching, whose x_0 is
    x_t - sigma v with sigma = 1 / (1 + sqrt(SNR)), by (1 + sqrt(SNR))^2.
    """
    if kind == "unit":
        return torch.ones_like(snr)
    snr = snr.clamp(1e-20, 1e20)  # so that nothing is 0 / 0 at either end
    on_x_0 = {
        "min_snr": lambda: snr.clamp(floor, gamma),
        "soft_min_snr": lambda: gamma / (1 + gamma / snr),
        "p2": lambda: snr / (1 + snr) ** p2_gamma,
        "edm": lambda: snr + sigma_data**-2,
        "debiased": snr.sqrt,
    }[kind]()
    on = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr), "flow_prediction": (1 + snr.sqrt()) ** 2}
    return on_x_0 / on[prediction_type]


class LossMoments:
    """Importance sampling of noise levels: each in proportion to the root mean square of its loss (Nichol and Dhariwal 2021,
    equation 18, arXiv 2102.09672), over `num_bins` bins that would be equally frequent without it.

    Attributes:
        moments: running mean of the squared loss in each bin, over about its last ten samples, `(num_bins,)` float64.
        seen: number of samples in each bin so far.
        device: where both are; on a GPU nothing here waits for it.
    """

    def __init__(self, num_bins: int = 64, warm: int = 10, uniform_share: float = 0.01, device: torch.device | str = "cpu"):
        self.warm = warm
        self.uniform_share = uniform_share
        self.device = torch.device(device)
        self.moments = torch.zeros(num_bins, dtype=torch.float64, device=device)
        self.seen = torch.zeros(num_bins, dtype=torch.int64, device=device)

    def density(self) -> torch.Tensor:
        """How often each bin is drawn, relative to without, `(num_bins,)`, mean 1; all 1 until each has been seen enough."""
        root = self.moments.sqrt()
        density = (1 - self.uniform_share) * root / root.mean() + self.uniform_share
        return torch.where((self.seen >= self.warm).all() & self.moments.any(), density, 1.0)

    def warp(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map uniform numbers `(B,)`, on `device`, to the density; also returns the weights 1 / density, with which the mean
        loss stays the same.
        """
        density, count = self.density(), len(self.moments)
        edges = torch.cat([density.new_zeros(1), density.cumsum(0) / count])
        bins = (torch.searchsorted(edges, u.double(), right=True) - 1).clamp(0, count - 1)
        inside = ((u - edges[bins]) / (density[bins] / count)).clamp(0, 1 - 1e-6)
        return (bins + inside) / count, (1 / density[bins]).float()

    def update(self, u: torch.Tensor, losses: torch.Tensor) -> None:
        """Record the losses `(B,)` of samples drawn at `u`, before they are weighted by 1 / density."""
        u, losses = u.to(self.device), losses.to(self.device).double()
        count = len(self.moments)
        bins = (u * count).long().clamp(max=count - 1)  # in float32 the largest u is 1
        is_good = losses.isfinite()
        belongs = ((bins[:, None] == torch.arange(count, device=self.device)) & is_good[:, None]).double()
        number = belongs.sum(0)
        mean = torch.where(is_good, losses.square(), 0.0) @ belongs / number.clamp(min=1)
        self.seen += number.long()
        share = torch.maximum(1 - 0.9**number, number / self.seen.clamp(min=1))
        self.moments += share * (mean - self.moments)

    def state(self) -> dict:
        """As JSON, for a checkpoint."""
        return {"moments": self.moments.tolist(), "seen": self.seen.tolist()}

    def restore(self, state: dict) -> None:
        """Restore `state`."""
        self.moments = torch.tensor(state["moments"], dtype=torch.float64, device=self.device)
        self.seen = torch.tensor(state["seen"], dtype=torch.int64, device=self.device)


def add_offset(noise: torch.Tensor, strength: float, draws: torch.Tensor) -> torch.Tensor:
    """Noise `(B, C, h, w)` with a part that is constant over each channel, so that brightness is noised and learned too
    (N. Guttenberg, "Diffusion with offset noise", 2023); `draws` `(B, C)` standard normal.
    """
    return noise + strength * draws[..., None, None]


def nearest_noise(x_0: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """The one of the candidates `(B, k, C, h, w)` that is nearest to each x_0 `(B, C, h, w)`, which mixes images less (Li et
    al. 2025, arXiv 2505.18521, after the immiscible diffusion of arXiv 2406.12303); by the sample alone, not by its batch.
    """
    apart = (candidates - x_0[:, None]).flatten(2).square().sum(-1)
    return candidates[torch.arange(len(x_0), device=x_0.device), apart.argmin(1)]


def weighted_mse(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weight * mean squared error of each sample, `(B,)` float32; inputs `(B, C, H, W)`, weight `(B,)`."""
    error = (prediction.float() - target.float()).square()
    return weight.float() * error.flatten(1).mean(1)


def autoencoder_loss(
    rebuilt: torch.Tensor,
    mean: torch.Tensor,
    logvar: torch.Tensor,
    pixels: torch.Tensor,
    kl_weight: float,
    sharpness: float,
    thumbnail: float = 0.0,
) -> torch.Tensor:
    """Mean squared error + kl_weight * KL(N(mean, exp(logvar)) || N(0, 1)) for each latent value, in float32.

    `sharpness` times the mean absolute error of the differences of neighbouring pixels is added: a squared error alone
    blurs edges (after the gradient difference loss; Mathieu et al. 2016, arXiv 1511.05440). `thumbnail` times the mean squared
    error between the latents' first channels and the image, averaged down to their size, makes them a small image.
    """
    rebuilt, pixels, mean, logvar = (x.float() for x in (rebuilt, pixels, mean, logvar))
    error = rebuilt - pixels
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    loss = error.square().mean() + kl_weight * kl + sharpness * edges
    if thumbnail:
        small = F.adaptive_avg_pool2d(pixels, (mean.shape[-2], mean.shape[-1]))
        loss = loss + thumbnail * F.mse_loss(mean[:, : pixels.shape[1]], small)
    return loss


def lr_scale(step: int, fraction_done: float, warmup_steps: int, decay: str) -> float:
    """Factor on the learning rate: linear warm-up in steps, then decay by the fraction of steps or minutes done.

    `trapezoid`: constant, then linear to 0 in the last fifth (Hagele et al. 2024, arXiv 2405.18392).
    """
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    left = max(0.0, 1.0 - fraction_done)
    if decay == "constant":
        return warm
    if decay == "trapezoid":
        return warm * min(1.0, 5 * left)
    if decay == "linear":
        return warm * left
    return warm * 0.5 * (1 - math.cos(left * math.pi))
