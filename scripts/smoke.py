"""The main job in a minute, without torch: train digits 20 steps in two parts, evaluate, predict, export."""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from finetune_jax import cli


def call(*words: str) -> str:
    """Standard output of a command; its failure is ours."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            cli.main(list(words))
    except SystemExit as stop:
        if stop.code:
            sys.exit(f"finetune-jax {' '.join(words)}: exit code {stop.code}")
    return out.getvalue()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, exported = str(folder / "run"), str(folder / "exported")
        recipe = (
            "train",
            "--config",
            "configs/digits_resnet.py",
            "--workdir",
            run,
            "--data.cache-dir",
            str(folder),
        )
        steps = ("--train.steps", "20", "--checkpoint.every-steps", "10", "--train.log-every", "1")
        from finetune_jax.config import load_recipe
        from finetune_jax.train import Stopped, train

        config = cli.parse([*recipe, *steps]).overrides
        assert load_recipe("configs/digits_resnet.py") != config
        try:
            train(config, run, stop_at=10)
            sys.exit("training did not stop at step 10")
        except Stopped:
            pass
        call("train", "--workdir", run)
        rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        steps_seen = [row["step"] for row in rows if row["kind"] == "train"]
        assert steps_seen == list(range(1, 21)), steps_seen
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "zero.png")
        (folder / "in.jsonl").write_text(json.dumps({"image": str(folder / "zero.png")}) + "\n")
        say = call("export", "--run", run, "--output", exported, "--verify")
        assert "largest logit difference: 0" in say, say
        for model in (run, exported):
            made = json.loads(call("predict", "--model", model, "--input", str(folder / "in.jsonl")))
            assert set(made) == {"label", "score", "scores"}, made
        figures = json.loads(call("evaluate", "--model", run, "--split", "test"))
        assert 0 <= figures["accuracy"] <= 1
    print("smoke: trained, resumed, exported, predicted, evaluated")


if __name__ == "__main__":
    main()
