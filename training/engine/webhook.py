"""Report to a web address how a run ended."""

import http.client
import json
import urllib.request
from pathlib import Path

ENDS = ("is done", "failed", "could not go on", "diverged", "found no room to save", "is done, but was not pushed")
SECONDS = 10.0


def tell(address: str, output_dir: Path, code: int, step: int, seconds: float) -> str | None:
    """Post a JSON object about a run that ended: `text` and `content`, a sentence for Slack and Discord, and facts.

    Args:
        code: the exit code of the trainer.
        seconds: training time.

    Returns:
        Why the address could not be notified; None if it was.
    """
    end = ENDS[code] if code < len(ENDS) else "was stopped"
    sentence = f"{output_dir.name} {end} at step {step:,}, after {seconds / 60:.0f} minutes"
    told = {"text": sentence, "content": sentence, "run": output_dir.name, "exit_code": code, "step": step, "seconds": seconds}
    header = {"Content-Type": "application/json", "User-Agent": "sfumato"}
    request = urllib.request.Request(address, json.dumps(told).encode(), header)
    try:
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"train.webhook could not be notified: {error}"
    return None
