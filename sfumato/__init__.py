import logging

__version__ = "0.2.0"

# transformers says for each image processor of Stable Diffusion that torchvision is missing, which nothing here needs.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
