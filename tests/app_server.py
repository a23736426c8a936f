"""The app, served on a free port of this machine."""

import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

TOKEN = "secret-token"


@contextmanager
def serve(model: Path, runs: Path):
    """The address of the app, without its token."""
    import uvicorn

    from sfumato.app.pages import build

    app = build(str(model), runs=runs, token=TOKEN, host="127.0.0.1", password=None, language="en")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < end, "the app does not start"
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)
