from sfumato.schedulers.scheduling_sfumato_ddpm import SfumatoDDPMScheduler

__all__ = ["SfumatoDDPMScheduler"]
