"""The commands as a user calls them; bad input is one line, exit code 2, and nothing written."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from finetune_jax import cli
from finetune_jax import config as config_module
from finetune_jax import train as loop
from finetune_jax.config import Config, field_paths, from_dict, load_recipe, to_dict
from finetune_jax.errors import UserError
from finetune_jax.limits import validate
from tests import tiny

LONG = "x" * 300
"""More than a name of a file may have."""


def call(*words):
    """(exit code) of a command in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    return stop.value.code


def write_recipe(folder):
    tiny.write_texts(folder / "texts")
    file = folder / "recipe.py"
    file.write_text(
        "from pathlib import Path\n"
        "from tests import tiny\n"
        "def get_config():\n"
        "    return tiny.text_config(Path(__file__).parent / 'texts', epochs=1)\n"
    )
    return file


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trained once; each test gets a copy."""
    folder = tmp_path_factory.mktemp("trained")
    assert call("train", "--config", write_recipe(folder), "--workdir", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def run(tmp_path, trained):
    return shutil.copytree(trained, tmp_path / "run")


def close(figures):
    """Equal to 1e-6; the confusion matrix exactly."""
    return {n: pytest.approx(v, abs=1e-6) if isinstance(v, float) else v for n, v in figures.items()}


def test_train_evaluate_predict_export(tmp_path, recipe, run, capsys):
    assert call("evaluate", "--model", run, "--split", "test") == 0
    from_run = json.loads(capsys.readouterr().out)
    result = json.loads((run / "result.json").read_text())
    assert from_run == close(result["metrics"]["test"])

    assert call("evaluate", "--model", run, "--evaluation.batch-size", "4", "--data.batching", "padded") == 0
    assert json.loads(capsys.readouterr().out) == close(from_run), "overrides keep the run's own config"

    assert call("export", "--run", run, "--output", tmp_path / "hf", "--verify") == 0
    said = capsys.readouterr().out
    assert "largest logit difference: 0" in said
    assert (
        call("evaluate", "--model", tmp_path / "hf", "--config", recipe, "--output", tmp_path / "m.json") == 0
    )
    assert json.loads((tmp_path / "m.json").read_text()) == close(from_run)

    rows = [{"text": "the cat sat"}, {"text": "ann ran to rome"}, {"text": ""}]
    tiny.write_jsonl(tmp_path / "in.jsonl", rows)
    for model in (run, tmp_path / "hf"):
        out = tmp_path / "out.jsonl"
        assert (
            call("predict", "--model", model, "--input", tmp_path / "in.jsonl", "--output", out, "--logits")
            == 0
        )
        made = [json.loads(line) for line in out.read_text().splitlines()]
        assert [set(row) for row in made] == [{"label", "score", "scores", "logits"}] * 3
        assert all(row["score"] == max(row["scores"].values()) for row in made)
        assert all(sum(row["scores"].values()) == pytest.approx(1) for row in made)


def test_a_begun_run_needs_only_its_folder(run, capsys):
    assert call("train", "--workdir", run) == 0
    assert "is complete: 4 updates are done" in capsys.readouterr().err


def test_overrides_and_python_module(tmp_path, recipe):
    done = subprocess.run(
        [sys.executable, "-m", "finetune_jax", "train", "--config", str(recipe), "--workdir", str(tmp_path / "r"),
         "--optim.learning-rate", "0.5", "--train.steps=2", "--train.no-tensorboard", "--data.batching", "buckets", "--model.freeze", "embeddings", "pooler"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert config["optim"]["learning_rate"] == 0.5
    assert config["train"]["steps"] == 2
    assert config["data"]["batching"] == "buckets"
    assert config["train"]["tensorboard"] is False
    assert config["model"]["freeze"] == ["embeddings", "pooler"]


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help(command, capsys):
    assert call(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"finetune-jax {command}" in text
    if command == "train":
        assert "--optim.learning-rate" in text
        assert "Peak of the schedule" in text


def test_doctor(capsys):
    assert call("doctor") == 0
    assert "jax 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--optim.learning-rat", "1"],
            "unknown option --optim.learning-rat; did you mean --optim.learning-rate?",
        ),
        (["--optim.learning-rate", "fast"], "could not convert string to float: 'fast'"),
        (["--optim.name", "adam"], "invalid choice 'adam'"),
        (["--optim.learning-rate", "-1"], "optim.learning-rate is -1.0, must be above 0"),
        (["--train.batch-size", "0"], "train.batch-size is 0, must be at least 1"),
        (["--data.workers", "-1"], "data.workers is -1, must be at least 0"),
        (
            ["--data.workers", "2"],
            "data.workers 2 is for images, texts are made by data.threads; leave it out",
        ),
        (["--train.batch-size", "10", "--train.accumulation", "3"], "not divisible by train.accumulation 3"),
        (["--data.max-length", "65"], "data.max-length 65 is over the model's 64 positions; lower it"),
        (["--data.path", "/nowhere"], "/nowhere"),
        (["--data.columns", "text", "sentence"], "sentence"),
        (
            ["--data.batching", "padded", "--train.batch-size", "12"],
            "train.batch-size 12 does not divide by 8",
        ),
        (["--mesh.tensor", "3"], "mesh"),
        (["--model.freeze", "no_such_parameter"], "regex 'no_such_parameter' matches no parameter"),
        (["--model.freeze", "("], "regex '(' does not compile"),
        (["--model.freeze", "."], "leaves nothing to train"),
        (["--model.family", "resnet"], "does not go with model family resnet"),
        (["--model.pretrained", "no/such-model"], "no/such-model"),
        (["--model.pretrained", "package:no_such_package/model"], "no_such_package"),
        (["--model.tokenizer", "/nowhere"], "/nowhere"),
        (["--evaluation.metric", "f2"], "evaluation.metric f2 is not among this task's metrics"),
        (["--task.class-weights", "yes", "1"], "missing ['no']"),
        (["--model.hf-config", '{"hidden_act": "gelo"}'], "hidden_act"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, message, tmp_path, recipe, capsys):
    code = call("train", "--config", recipe, "--workdir", tmp_path / "run", *words)
    said = capsys.readouterr().err.strip()
    assert code == 2, said
    assert message in said
    assert said.count("\n") == 0
    assert said.startswith("finetune-jax: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "the cat", "label": "maybe"}', "maybe"),
        ('{"text": "the cat"}', "label"),
        ("{not json", "61"),
    ],
)
def test_bad_rows_name_their_place(row, message, tmp_path, recipe, capsys):
    file = tmp_path / "texts/train.jsonl"
    name = "validation" if "maybe" in row else "train"
    file = tmp_path / f"texts/{name}.jsonl"
    file.write_text(file.read_text() + row + "\n")
    assert call("train", "--config", recipe, "--workdir", tmp_path / "run") == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert said.count("\n") == 0
    assert file.name in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', "{"], "in.jsonl:2: not JSON"),
        (['{"words": "a"}'], "in.jsonl:1: field 'text' must be text, fields are ['words']"),
        (['["a"]'], "in.jsonl:1: a line must be a JSON object"),
        (['{"text": "a"}', '{"text_a": "a", "text_b": "b"}'], "in.jsonl:2: fields differ from"),
        ([b"\xff".decode("latin-1")], "in.jsonl:1: not UTF-8 at byte 0"),
        (
            ['{"text": "the cat \\ud800"}'],
            "in.jsonl:1: text holds half a surrogate pair at character 8; mend the escape",
        ),
        (['{"text": "a", "id": ' + "1" * 5000 + "}"], "in.jsonl:1: not JSON: Exceeds the limit"),
    ],
)
def test_bad_prediction_input(lines, message, run, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    (tmp_path / "out.jsonl").write_text("mine")
    assert (
        call("predict", "--model", run, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
        == 2
    )
    said = capsys.readouterr().err.strip()
    assert message in said
    assert said.count("\n") == 0
    assert (tmp_path / "out.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["trian"],
            "there is no command trian; commands are train, evaluate, predict, export, sweep, range-test, soup, checkpoint, plan, doctor; did you mean train?",
        ),
        (["train", "--workdir", "x", "--config", "configs/no.py"], "configs/no.py does not exist"),
        (["train"], "workdir"),
        (["export", "--run", "/nowhere", "--output", "/nowhere/output"], "/nowhere is not a run folder"),
        (["predict", "--model", "/nowhere"], "/nowhere"),
        (["predict", "--model", "{run}", "--step", "3"], "no checkpoint of step 3"),
        (["predict", "--model", "{run}", "--input", "/nowhere"], "input /nowhere does not exist"),
        (["predict", "--model", "{run}", "--input", "{run}"], "is a folder, not a file of lines"),
        (
            ["predict", "--model", "m", "--adapters", "a", "x", "a", "y"],
            "--adapters names a more than once; name each once",
        ),
        (
            ["train", "--workdir", "x", "--optim.rates", "head", "10", "pooler", "1", "head", "5"],
            "--optim.rates names head more than once",
        ),
        (
            ["evaluate", "--model", "{run}", "--evaluation.batch-size", "0"],
            "evaluation.batch-size is 0, must be at least 1",
        ),
        (
            ["evaluate", "--model", "{run}", "--data.max-length", "4"],
            "data.max-length is 4, must be at least 8",
        ),
        (
            ["evaluate", "--model", "{run}", "--data.text.word-dropout", "0.1"],
            "evaluate does not read --data.text.word-dropout",
        ),
        (
            ["range-test", "--workdir", "x", "--train.steps", "9"],
            "range-test does not read --train.steps: its own --lowest, --highest and --steps",
        ),
        (
            ["range-test", "--workdir", "x", "--optim.warmup-steps=9"],
            "range-test does not read --optim.warmup-steps=9",
        ),
        (["plan", "--target", "v5e:1x1", "--examples", "0"], "--examples is 0, must be at least 1"),
        (
            ["plan", "--target", "v5e:1x1", "--examples", "9", "--labels", "-3"],
            "--labels is -3, must be at least 1",
        ),
        (
            ["plan", "--target", "v5e:1x1", "--examples", "9", "--tokens", "999"],
            "--tokens is 999, of which data.max-length 128 leaves less",
        ),
        (["plan", "--target", "v5e:1x1", "--tokens", "9"], "--tokens and --labels go with --examples"),
        (["evaluate", "--model", "{run}", "--splt", "test"], "unknown option --splt; did you mean --split?"),
        (["export", "--run", "{run}", "--output", "{run}"], "exists already"),
        *[
            ([*words, "{run}/.."], "holds run folders and is none itself; name one, such as ")
            for words in (
                ["export", "--output", "o", "--run"],
                ["predict", "--model"],
                ["evaluate", "--model"],
                ["checkpoint", "list"],
                ["soup", "--output", "o", "--runs", "{run}"],
            )
        ],
        (
            ["train", "--workdir", "x", "--model.pretrained", "{run}"],
            "is a run folder; finetune-jax export makes a Hugging Face folder of it",
        ),
        (["predict", "--model", "{run}", "--batch-size", "0"], "--batch-size is 0, must be at least 1"),
        (
            ["evaluate", "--model", "{run}", "--model.dtype", "bfloat16"],
            "evaluate does not read --model.dtype: a model is measured as it was made; leave it out",
        ),
        (["predict", "--model", "{run}/model", "--step", "2"], "--step 2 is of a run folder, and "),
        (["evaluate", "--model", "{run}", "--seed=1"], "evaluate does not read --seed=1"),
        (
            ["train", "--workdir", "x", "--model.hf-config", "[1]"],
            '--model.hf-config [1] is no JSON object such as {"hidden_dropout_prob": 0.2}',
        ),
        (["train", "--workdir", "x", "--optim.lr", "1"], "did you mean --optim.learning-rate?"),
        (["train", "--workdir", "x", "--optim.rates", "a"], "it takes pairs, a name and its value each"),
        (
            ["train", "--workdir", "x", "--train.tensorboard", "False"],
            "a switch takes no value: it is on as --peft.dora, off as --peft.no-dora",
        ),
        (
            [
                "train",
                "--workdir",
                "x",
                "--model.family",
                "resnet",
                "--task.name",
                "image_classification",
                "--data.batching",
                "buckets",
            ],
            "data.batching buckets is for family bert",
        ),
        (["train", "--workdir", "x", "--data.image.size", "8"], "data.image.size is for pixels"),
        (
            ["train", "--workdir", "x", "--optim.weight-decay", "-1"],
            "optim.weight-decay is -1.0, must be from 0 to 1000",
        ),
        (["train", "--workdir", "x", "--model.revision", "v1"], "model.revision v1 is of a checkpoint"),
        (
            ["train", "--workdir", "x", "--data.name", "glue/sst2"],
            "data.name glue/sst2 is for tfds and support_desk, data.source is files; leave one of them out",
        ),
        (
            ["train", "--workdir", "x", "--data.source", "digits", "--data.bad-records", "skip"],
            "data.bad-records skip is for files, data.source is digits; leave one of them out",
        ),
        (
            ["train", "--workdir", "x", "--data.max-bad-records", "5"],
            "data.max-bad-records 5 is for data.bad-records skip; set that, or leave it out",
        ),
        (
            ["train", "--workdir", "x", "--data.split-seed", "5"],
            "data.split-seed 5 is for what is drawn",
        ),
        (
            ["predict", "--model", "{run}", "--output", "/nowhere/out.jsonl"],
            "output /nowhere/out.jsonl cannot be written",
        ),
        # What no disk has a name for, and what is there and cannot be read.
        (["predict", "--model", "{run}", "--input", "~nobody_here/x"], "input ~nobody_here/x does not exist"),
        (["predict", "--model", "{run}", "--input", LONG], f"{LONG} cannot be reached: File name too long"),
        (["predict", "--model", "{run}", "--input", "/proc/self/mem"], "input /proc/self/mem cannot be read"),
        (["predict", "--model", "{run}", "--output", LONG], f"{LONG} cannot be reached: File name too long"),
        (["predict", "--model", "~nobody_here/x"], "there is no folder ~nobody_here/x"),
        (["predict", "--model", LONG], f"{LONG} cannot be reached: File name too long"),
        (["train", "--workdir", "x", "--config", LONG], f"{LONG} cannot be reached: File name too long"),
        (["evaluate", "--model", "{run}", "--data.path", "~nobody_here/x"], "~nobody_here/x does not exist"),
        (["evaluate", "--model", "{run}", "--data.path", LONG], f"{LONG} cannot be reached"),
        (["evaluate", "--model", "{run}", "--data.test", LONG], f"data.test: no file '{LONG}'"),
        (
            [
                "evaluate",
                "--model",
                "{run}",
                "--data.path",
                "/proc/self/mem",
                "--data.format",
                "jsonl",
                "--split",
                "train",
            ],
            "/proc/self/mem cannot be read: Input/output error",
        ),
        (
            ["evaluate", "--model", "{run}", "--output", "/nowhere/out.json"],
            "output /nowhere/out.json cannot be written",
        ),
    ],
)
def test_bad_commands(words, message, run, capsys):
    assert call(*[word.replace("{run}", str(run)) for word in words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert said.count("\n") == 0


def test_words_of_a_prediction_are_looked_at(tmp_path, capsys):
    """As those of the data are."""
    config = tiny.config_of("token", tmp_path, steps=1)
    loop.train(config, tmp_path / "run")
    for words, message in (
        ('["\\ud800", "cat"]', "in.jsonl:1: token 1 holds half a surrogate pair at character 0"),
        ('["a", ""]', "in.jsonl:1: token 2 is empty; leave it out"),
    ):
        (tmp_path / "in.jsonl").write_text(f'{{"tokens": {words}}}\n')
        assert call("predict", "--model", tmp_path / "run", "--input", tmp_path / "in.jsonl") == 2
        assert message in capsys.readouterr().err


def test_odd_images_of_a_prediction_name_their_line(tmp_path, capsys):
    loop.train(tiny.config_of("image", tmp_path, steps=1), tmp_path / "run")
    (tmp_path / "torn.png").write_bytes(b"no image")
    lines = tmp_path / "in.jsonl"
    for name, message in (
        ("~nobody_here/cat.jpg", "in.jsonl:1: there is no image ~nobody_here/cat.jpg"),
        (LONG, f"in.jsonl:1: there is no image {LONG}"),
        (
            str(tmp_path / "torn.png"),
            f"in.jsonl:1: {tmp_path / 'torn.png'}: not a readable JPEG or PNG image\n",
        ),
    ):
        lines.write_text(json.dumps({"image": name}) + "\n")
        assert call("predict", "--model", tmp_path / "run", "--input", lines) == 2
        assert message in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_the_first_line(run, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "the cat"}\n', encoding="utf-8-sig")
    assert call("predict", "--model", run, "--input", tmp_path / "in.jsonl") == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("no", "yes")


def test_lines_come_through_a_pipe(run, tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"text": "the cat"}\n',))
    writer.start()
    assert call("predict", "--model", run, "--input", pipe) == 0
    writer.join()
    assert json.loads(capsys.readouterr().out)["label"] in ("no", "yes")


def test_a_recipe_that_fails_is_named(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"bad.py fails: ZeroDivisionError"):
        load_recipe(str(file))
    file.write_text("def get_config():\n    return {}\n")
    with pytest.raises(UserError, match="returned dict, not Config"):
        load_recipe(str(file))
    file.write_text(
        "from finetune_jax.config import *\ndef get_config():\n    return Config(train=TrainConfig(batch_size='many'))\n"
    )
    with pytest.raises(UserError, match=r"train.batch-size.*'many'"):
        load_recipe(str(file))


def test_fields_of_the_hf_config_are_added_to_the_recipes(tmp_path):
    """Who changes one of them means the others to stay."""
    file = tmp_path / "recipe.py"
    file.write_text(
        "from finetune_jax.config import *\ndef get_config():\n"
        "    return Config(model=ModelConfig(hf_config={'hidden_size': 32, 'hidden_dropout_prob': 0.1}))\n"
    )
    words = [
        "train",
        "--workdir",
        "x",
        "--config",
        str(file),
        "--model.hf-config",
        '{"hidden_dropout_prob": 0}',
    ]
    found = cli.parse(words).overrides
    assert found.model.hf_config == {"hidden_size": 32, "hidden_dropout_prob": 0}


@pytest.mark.parametrize("rule", ["─", "-"])
def test_the_line_of_a_box_that_a_terminal_cannot_draw(rule):
    edge, side = ("╭", "│") if rule == "─" else (" ", " ")
    box = [f"{edge}{rule} Title {rule * 9}", *([] if rule == "─" else [rule * 18])]
    box += [
        f"{side} invalid choice {side}",
        f"{side} 'x' {side}",
        f"{side} {rule * 12} {side}",
        f"{side} For help {side}",
    ]
    assert cli.one_line("\n".join(box)) == "invalid choice 'x'"


def test_every_recipe_of_the_project_is_valid():
    from pathlib import Path

    recipes = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
    assert len(recipes) >= 9
    for file in recipes:
        config = load_recipe(str(file))
        assert validate(config) == config
        assert from_dict(to_dict(config), "again") == config
        text = file.read_text(encoding="utf-8")
        assert f"configs/{file.name}" in text
        assert "Expected:" in text


def test_each_field_has_a_meaning():
    """A string stands behind each field of config.py; tyro shows it as the help."""
    tree = ast.parse(inspect.getsource(config_module))
    for found in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "Config"):
        body = [node for node in found.body if not isinstance(node, ast.Assign)][1:]  # without the docstring
        for field, meaning in zip(body[::2], body[1::2], strict=True):
            assert isinstance(field, ast.AnnAssign), ast.unparse(field)
            assert isinstance(meaning, ast.Expr), f"{found.name}: {ast.unparse(field)}"
    assert "optim.learning-rate" in field_paths()
    assert "data.image.size" in field_paths()


def test_an_unknown_saved_field_is_named():
    with pytest.raises(UserError, match=r"run: optim.learning-rat"):
        from_dict({"optim": {"learning_rat": 1}}, "run")
    assert validate(Config()) == Config()


def test_logits_of_predictions_are_the_models(run, tmp_path):
    """In the input's order, whatever is packed with what."""
    from finetune_jax.opening import open_model
    from finetune_jax.predict import predict

    job, weights = open_model(str(run))
    rows = [{"text": " ".join(words)} for words in tiny.sentences(30, 5)]
    together = predict(job, weights, rows, logits=True)
    for row, made in list(zip(rows, together, strict=True))[::7]:
        alone = predict(job, weights, [row], logits=True)[0]
        np.testing.assert_allclose(made["logits"], alone["logits"], atol=1e-5)
    assert predict(job, weights, []) == []
