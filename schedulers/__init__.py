from inspect import signature
from typing import cast

from sfumato.schedulers.scheduling_sfumato_ddpm import SfumatoDDPMScheduler
from sfumato.schedulers.scheduling_sfumato_flow import SfumatoFlowScheduler

__all__ = ["SfumatoDDPMScheduler", "SfumatoFlowScheduler", "training_scheduler"]


def training_scheduler(scheduler) -> SfumatoDDPMScheduler | SfumatoFlowScheduler:
    """The noise levels that the model of any sampler was trained with, as one of our schedulers."""
    if isinstance(scheduler, SfumatoDDPMScheduler | SfumatoFlowScheduler):
        return scheduler
    config = scheduler.config
    if config.get("prediction_type") == "flow_prediction" or type(scheduler).__name__.startswith("FlowMatch"):
        shift = config.get("flow_shift", config.get("shift", 1.0))
        return SfumatoFlowScheduler(num_train_timesteps=config.num_train_timesteps, shift=shift)
    trained = (config.get("_sfumato") or {}).get("trained", {})  # a sampler may draw with levels other than the trained ones
    levels = {name: trained[name] for name in ("trained_betas", "rescale_betas_zero_snr") if name in trained}
    known = signature(SfumatoDDPMScheduler.__init__).parameters  # without settings specific to the sampler
    config = {key: value for key, value in {**config, **levels}.items() if key in known or key.startswith("_")}
    return cast(SfumatoDDPMScheduler, SfumatoDDPMScheduler.from_config(config))
