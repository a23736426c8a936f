"""Losses, which noise levels are trained and how much each counts: pure functions."""

import math

import torch


def sample_timesteps(u: torch.Tensor, snr: torch.Tensor, kind: str, mean: float = 0.0, std: float = 2.0) -> torch.Tensor:
    """Turn uniform numbers into timesteps.

    Args:
        u: `(B,)` in [0, 1).
        snr: signal-to-noise ratio of every timestep, `(T,)`, falling.
        kind: `uniform` over timesteps; or `normal`: log-SNR from N(mean, std), cut to the schedule's range, as an
            importance sampling of noise levels (Karras et al. 2022, section 5, arXiv 2206.00364).
        mean, std: of the log-SNR in nats.

    Returns:
        `(B,)` int64 in [0, T).
    """
    if kind == "uniform":
        return (u * len(snr)).long().clamp(max=len(snr) - 1)
    log_snr = snr.clamp(min=1e-20).log()
    # Uniform numbers between the two ends' quantiles give the normal cut to the range of the schedule.
    low, high = (torch.special.ndtr((end - mean) / std) for end in (log_snr[-1], log_snr[0]))
    wanted = mean + std * torch.special.ndtri((low + (high - low) * u.to(snr)).clamp(1e-6, 1 - 1e-6))
    return torch.searchsorted(-log_snr, -wanted).clamp(max=len(snr) - 1)


def loss_weight(snr: torch.Tensor, prediction_type: str, kind: str, gamma: float = 5.0, floor: float = 0.0) -> torch.Tensor:
    """Weight of each sample's mean squared error, `(B,)`.

    `unit`: 1 on whatever the network predicts. `min_snr`: min(SNR, gamma) on x_0, which is min(SNR, gamma) / SNR on
    eps, min(SNR, gamma) / (SNR + 1) on v (Hang et al. 2023, section 3.4, arXiv 2303.09556) and min(SNR, gamma) / (1 +
    sqrt(SNR))^2 on the velocity of flow matching, whose x_0 is x_t - sigma v, sigma = 1 / (1 + sqrt(SNR)). `floor` is ours: at
    least so much on x_0 however low the SNR, since that is where the layout of a picture is decided.
    """
    if kind == "unit":
        return torch.ones_like(snr)
    clipped = snr.clamp(floor, gamma)
    if prediction_type == "flow_prediction":
        return clipped / (1 + snr.sqrt()) ** 2
    return clipped / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]


def weighted_mse(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of weight * mean squared error, in float32; inputs `(B, C, H, W)`, weight `(B,)`."""
    error = (prediction.float() - target.float()).square()
    return (weight.float() * error.flatten(1).mean(1)).mean()


def autoencoder_loss(
    rebuilt: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor, pixels: torch.Tensor, kl_weight: float, sharpness: float
) -> torch.Tensor:
    """Mean squared error + kl_weight * KL(N(mean, exp(logvar)) || N(0, 1)) for each latent number, in float32.

    `sharpness` times the mean absolute error of the differences of neighbouring pixels is added: a squared error alone
    blurs edges (after the gradient difference loss; Mathieu et al. 2016, arXiv 1511.05440).
    """
    rebuilt, pixels, mean, logvar = (x.float() for x in (rebuilt, pixels, mean, logvar))
    error = rebuilt - pixels
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.square().mean() + kl_weight * kl + sharpness * edges


def lr_scale(step: int, fraction_done: float, warmup_steps: int, decay: str) -> float:
    """Factor on the learning rate: linear warm-up in steps, then decay by the fraction of steps or minutes done."""
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    left = max(0.0, 1.0 - fraction_done)
    if decay == "constant":
        return warm
    if decay == "linear":
        return warm * left
    return warm * 0.5 * (1 - math.cos(left * math.pi))
