"""Parts of pretrained models: from a whole pipeline, or from a folder or repository with that part alone."""

from safetensors import SafetensorError


def load_part(cls: type, key: str, source: str, part: str, **arguments):
    """The model `part` of a whole pipeline, or of a folder or repository with that model alone; and whether it is whole.

    Only safetensors are opened: a pickle can run code.

    Raises:
        ValueError: neither is there; names the setting `key`.
    """
    try:
        return cls.from_pretrained(source, subfolder=part, use_safetensors=True, **arguments), True
    except (OSError, ValueError, SafetensorError) as error:
        try:
            return cls.from_pretrained(source, use_safetensors=True, **arguments), False
        except (OSError, ValueError, SafetensorError):
            raise ValueError(f"{key}={source!r} cannot be opened: {str(error).strip().splitlines()[0]}") from error
