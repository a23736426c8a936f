from sfumato.pipelines.export import export_pipeline
from sfumato.pipelines.pipeline_sfumato import SfumatoPipeline
from sfumato.schedulers import SfumatoDDPMScheduler  # diffusers' loader takes classes from modules that are imported

__all__ = ["SfumatoDDPMScheduler", "SfumatoPipeline", "export_pipeline"]
