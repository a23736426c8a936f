import logging

__version__ = "0.2.0"

# For each image processor of Stable Diffusion, transformers logs that torchvision is missing; nothing here needs it.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
