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
