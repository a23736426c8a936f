"""A motion adapter in a frozen text-to-image model: its images become the frames of clips (AnimateDiff)."""

from dataclasses import asdict

from sfumato.training.config.schema import Config
from sfumato.training.models.denoiser import ModelNeeds
from sfumato.training.tasks.protocol import TaskContext, check_not_sharded
from sfumato.training.tasks.settings import MotionConfig
from sfumato.training.tasks.text_to_image import TextToImage


class Motion(TextToImage):
    """Layers that connect frames in the frozen 2D model of `init_from` (Guo et al. 2023, arXiv 2307.04725).

    The folder opens in diffusers' `AnimateDiffPipeline`.
    """

    @classmethod
    def model_needs(cls, config: Config) -> ModelNeeds:
        """Motion modules."""
        return ModelNeeds(motion=asdict(config.section(MotionConfig)))

    def __init__(self, context: TaskContext):
        check_not_sharded(context)
        super().__init__(context)
