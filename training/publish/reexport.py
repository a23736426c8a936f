"""Write an opened model again: with other weight files, in half precision, or with a second model added."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from sfumato.pipelines import SfumatoPipeline, export_pipeline
from sfumato.pipelines.cascade import UPSCALER
from sfumato.pipelines.export import CARRIED_FILES, WeightFiles
from sfumato.pipelines.trust import UNREAD
from sfumato.training.models.state_files import has_state, raw_weights


def reexport(
    model: str,
    folder: str,
    *,
    variants: Sequence[str] = (),
    max_shard_size: str = "10GB",
    upscaler: str | None = None,
    half: bool = False,
) -> Path:
    """Write a pipeline folder or Hub id as a shareable folder; arguments as for `export_pipeline` and `WeightFiles`.

    Raises:
        ValueError: see `export_pipeline`.
    """
    source, raw = model, None
    if not Path(model).is_dir():
        patterns = [*CARRIED_FILES, "samples/*.png", f"{UPSCALER}/*"]
        source = snapshot_download(model, allow_patterns=patterns, ignore_patterns=UNREAD)
    if "raw" in variants:
        run = Path(model).parent
        near = [run, *sorted((run / "checkpoints").glob("step-*"), reverse=True)]
        raw = next((raw_weights(path) for path in near if has_state(path)), None)
    weights = WeightFiles(variants=variants, raw=raw, max_shard_size=max_shard_size, half=half)
    return export_pipeline(SfumatoPipeline.from_pretrained(model), folder, weights=weights, source=source, upscaler=upscaler)
