"""Open an exported folder with plain diffusers, in a process that never imports sfumato, and draw a grid.

python -m benchmarks.common.open_with_stock FOLDER GRID.png [PROMPT ...]
"""

import sys

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image


def main() -> None:
    """Run the benchmark; see above."""
    folder, out, *prompts = sys.argv[1:]
    prompts = prompts or [
        "red heart", "blue heart", "yellow heart", "green circle", "purple square", "red apple",
        "blue book", "soccer ball", "grinning face", "full moon", "pink heart", "green book",
    ]  # fmt: skip

    pipe = DiffusionPipeline.from_pretrained(folder)
    images = pipe(
        prompts,
        num_inference_steps=30,
        guidance_scale=1.5,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
    ).images
    assert "sfumato" not in sys.modules
    large = [image.resize((128, 128), Image.Resampling.NEAREST) for image in images]
    columns = 6 if len(large) % 6 == 0 else len(large)
    make_image_grid(large, rows=len(large) // columns, cols=columns).save(out)
    print(f"{type(pipe).__name__} drew {', '.join(prompts)}: {out}")
    print("Try it:")
    print("  from diffusers import DiffusionPipeline")
    print(f"  DiffusionPipeline.from_pretrained({folder!r})({prompts[0]!r}, guidance_scale=1.5).images[0].save('out.png')")


if __name__ == "__main__":
    main()
