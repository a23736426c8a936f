"""Samplers of diffusers without what is wrong in them in 0.42."""

import diffusers


class EulerAncestralDiscreteScheduler(diffusers.EulerAncestralDiscreteScheduler):
    """The stock sampler with its noise levels in double precision.

    Its sigma_down^2 = b^2 - b^2 (a^2 - b^2) / a^2 falls below 0 by rounding where one step leads from a to a b thousands of
    times smaller, and its root is not a number.
    """

    stock_class = diffusers.EulerAncestralDiscreteScheduler

    def set_timesteps(self, num_inference_steps: int, device=None):
        """As the stock class."""
        super().set_timesteps(num_inference_steps, device=device)
        if self.sigmas.device.type != "mps":  # which has no double precision
            self.sigmas = self.sigmas.double()
