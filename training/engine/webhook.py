"""How a run ended, told to an address of the web."""

import json
import urllib.request
from pathlib import Path

ENDS = {0: "is done", 2: "could not go on", 3: "diverged", 4: "found no room to save", 5: "is done, but was not pushed"}
SECONDS = 10.0


def tell(address: str, output_dir: Path, code: int, step: int, seconds: float) -> str | None:
    """Post a JSON object about a run that ended: `text` and `content`, a sentence as Slack and Discord want it, and facts.

    Args:
        code: the exit code of the trainer.
        seconds: of training.

    Returns:
        Why the address could not be told; None where it was.
    """
    sentence = f"{output_dir.name} {ENDS.get(code, 'was stopped')} at step {step:,}, after {seconds / 60:.0f} minutes"
    told = {"text": sentence, "content": sentence, "run": output_dir.name, "exit_code": code, "step": step, "seconds": seconds}
    header = {"Content-Type": "application/json", "User-Agent": "sfumato"}
    request = urllib.request.Request(address, json.dumps(told).encode(), header)
    try:
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except (OSError, ValueError) as error:
        return f"train.webhook could not be told: {error}"
    return None
