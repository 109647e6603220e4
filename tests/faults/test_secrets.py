"""Tokens and passwords that a machine has in its environment stay there."""

import base64
import http.server
import os
import subprocess
import sys
import threading

import jax
import pytest

from finetune_jax import train as loop
from finetune_jax.errors import UserError
from finetune_jax.export import export
from finetune_jax.writers import say
from tests import tiny

SECRETS = {
    "HF_TOKEN": "hf_QmVyZ2VuYnJvZXRjaGVu",
    "HUGGING_FACE_HUB_TOKEN": "hf_WmltdHN0ZXJuZQ",
    "AWS_SECRET_ACCESS_KEY": "wJalrFictionalKeyOfTheTests",
    "WANDB_API_KEY": "0123456789abcdefOfTheTests",
    "HTTPS_PROXY": "http://someone:hunter2OfTheTests@127.0.0.1:1",
}
VALUES = [*SECRETS.values(), "hunter2OfTheTests", "endpointPasswordOfTheTests"]


def files_with_secrets(folder):
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found += [(path.name, secret) for secret in VALUES if secret.encode() in content]
    return found


def test_a_run_and_its_export_hold_none(tmp_path, monkeypatch, capfd):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    config = tiny.text_config(tiny.write_texts(tmp_path / "texts"), steps=2)
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    export(tmp_path / "run", tmp_path / "hf", step="best", verify=True)
    (tmp_path / "planted").write_text(SECRETS["HF_TOKEN"])
    assert files_with_secrets(tmp_path) == [("planted", SECRETS["HF_TOKEN"])], "the search itself finds one"
    out = "".join(capfd.readouterr())
    assert not [secret for secret in VALUES if secret in out]


def test_errors_and_lines_are_cleaned(monkeypatch, capsys):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    text = f"{SECRETS['AWS_SECRET_ACCESS_KEY']} at {SECRETS['HTTPS_PROXY']} and hf_AbCdEfGhIjKlMnOp, not a@b or x://y/z@w"
    clean = "$AWS_SECRET_ACCESS_KEY at http://***@127.0.0.1:1 and hf_***, not a@b or x://y/z@w"
    assert str(UserError(text)) == clean
    say(text)
    assert capsys.readouterr().err == clean + "\n"


@pytest.mark.parametrize("status", [401, 500])
def test_a_hub_that_refuses_a_token_is_told_of_without_it(status, tmp_path):
    """A stand-in for the hub on this machine, reached by a name with a password in it."""
    received = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def refuse(self):
            received.append(self.headers.get("Authorization", ""))
            self.send_response(status)
            self.send_header("X-Error-Message", f"the token {SECRETS['HF_TOKEN']} will not do")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = refuse  # noqa: N815

        def log_message(self, format, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_address[1]}"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "HF_TOKEN": SECRETS["HF_TOKEN"],
        "HF_ENDPOINT": f"http://someone:endpointPasswordOfTheTests@{address}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    words = ["train", "--workdir", str(tmp_path / "run"), "--model.pretrained", "someone/private-bert"]
    words += ["--data.path", str(tiny.write_texts(tmp_path / "texts"))]
    done = subprocess.run(
        [sys.executable, "-m", "finetune_jax", *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    server.shutdown()
    server.server_close()
    basic = base64.b64encode(b"someone:endpointPasswordOfTheTests").decode()
    assert any(SECRETS["HF_TOKEN"] in header or basic in header for header in received), (
        "it was asked, with the secret"
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("finetune-jax:")]
    assert "someone/private-bert" in line
    said = done.stdout + done.stderr
    assert not [secret for secret in (*VALUES, basic) if secret in said], said
    assert not (tmp_path / "run").exists()
