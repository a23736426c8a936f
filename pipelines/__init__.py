"""Pipeline, export, and choices by name. Modules that need torch are imported on first access."""

import importlib

_HOMES = {
    "SfumatoDDPMScheduler": "sfumato.schedulers",  # also here, since diffusers' loader looks beside the pipeline
    "Cascade": "sfumato.pipelines.cascade",
    "SfumatoPipeline": "sfumato.pipelines.pipeline_sfumato",
    "export_pipeline": "sfumato.pipelines.export",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
