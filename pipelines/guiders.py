"""Guiders of diffusers 0.42 with their faults corrected; each is tested against its formula."""

from diffusers import guiders


class MagnitudeAwareGuidance(guiders.MagnitudeAwareGuidance):
    """The stock class takes a norm over three dimensions, which fails; here each image is passed to it as one row."""

    def forward(self, pred_cond, pred_uncond=None):
        """Combine the predictions, `(B, C, h, w)`."""
        output = super().forward(pred_cond.flatten(1), None if pred_uncond is None else pred_uncond.flatten(1))
        output["pred"] = output.pred.reshape(pred_cond.shape)
        return output


class AdaptiveProjectedGuidance(guiders.AdaptiveProjectedGuidance):
    """The stock update starts from the unconditional prediction, which keeps what the projection should remove."""

    def forward(self, pred_cond, pred_uncond=None):
        """Combine the predictions, `(B, C, h, w)`, as cond + (scale - 1) update."""
        scale, original = self.guidance_scale, self.use_original_formulation
        self.guidance_scale, self.use_original_formulation = scale - 1, True
        try:
            return super().forward(pred_cond, pred_uncond)
        finally:
            self.guidance_scale, self.use_original_formulation = scale, original


class SmoothedEnergyGuidance(guiders.SmoothedEnergyGuidance):
    """The stock class does not count its passes and therefore never smooths anything."""

    def prepare_models(self, denoiser):
        """Count a pass, and smooth self-attention in the pass meant for it."""
        self._count_prepared += 1
        super().prepare_models(denoiser)
