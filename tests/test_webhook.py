"""An address of the web is told how a run ended, whoever is there; and step 0 is drawn where it is asked for."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny

from sfumato.training.config.load import load_config
from sfumato.training.engine import requests, webhook
from sfumato.training.train import main


@pytest.fixture
def listener():
    """A server on this machine, and what was posted to it."""
    heard = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook/secret", heard
    server.shutdown()


def test_the_end_of_a_run_is_told_and_the_address_stays_secret(tmp_path, listener):
    address, heard = listener
    path = tiny.config_file(tmp_path, train={"max_steps": 2, "webhook": address}, validation={"at_start": True})
    assert main([str(path)]) == 0
    (told,) = heard
    assert told["run"] == "run" and told["exit_code"] == 0 and told["step"] == 2 and told["text"] == told["content"]
    assert told["text"].startswith("run is done at step 2")
    shared = [file for file in (tmp_path / "run" / "pipeline").rglob("*") if file.suffix in (".yaml", ".json", ".md", ".py")]
    assert shared and not any("hook/secret" in file.read_text() for file in shared)
    assert (tmp_path / "run" / "samples" / "step-00000000.png").is_file(), "the grid of noise"
    # Started again it is done already, and says so to nobody.
    assert main([str(path), "checkpoint.resume=auto"]) == 0 and len(heard) == 1


def test_a_stop_is_told_too_and_nobody_there_is_no_failure(tmp_path, listener, capsys):
    address, heard = listener
    path = tiny.config_file(tmp_path, train={"max_steps": 50, "webhook": address}, checkpoint={"every_steps": None})
    import sfumato.training.loop as loop

    run = loop.prepare(load_config(path))
    requests.ask(tmp_path / "run", "stop")
    from sfumato.training.train import finish_training

    assert finish_training(run) == 130
    assert heard[-1]["exit_code"] == 130 and "was stopped at step" in heard[-1]["text"]
    nobody = ["train.webhook=http://127.0.0.1:9/", f"output_dir={tmp_path}/other", "train.max_steps=1"]
    assert main([str(path), *nobody]) == 0
    assert "train.webhook could not be notified" in capsys.readouterr().err
    for odd in ("http://127.0.0.1:abc/x", "http://127.0.0.1/with a space"):
        assert "could not be notified" in (webhook.tell(odd, tmp_path, 0, 1, 1.0) or "")


@pytest.mark.parametrize("address", ["ftp://a.example/x", "file:///etc/passwd", "javascript:1", "https://", "a.example"])
def test_an_address_of_another_kind_is_refused(tmp_path, address):
    with pytest.raises(ValueError, match="train.webhook"):
        load_config(tiny.config_file(tmp_path, train={"webhook": address}))
