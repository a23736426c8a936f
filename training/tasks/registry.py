"""The tasks by name."""

from sfumato.training.tasks.autoencoder import Autoencoder
from sfumato.training.tasks.control import Control
from sfumato.training.tasks.inpainting import Inpainting
from sfumato.training.tasks.text_to_image import TextToImage
from sfumato.training.tasks.upscaling import Upscaling

TASKS = {
    "text_to_image": TextToImage,
    "inpainting": Inpainting,
    "upscaling": Upscaling,
    "control": Control,
    "autoencoder": Autoencoder,
}
