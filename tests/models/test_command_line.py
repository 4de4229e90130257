import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from models import recipes
from models.__main__ import COMMANDS as COMMAND_NAMES
from models.__main__ import OPTIONS as OPTION_NAMES
from models.__main__ import THINGS, _typo
from models.activations import ACTIVATIONS
from models.attacks import ATTACKS
from models.cli import main, parser
from models.commands import looking
from models.data import DATA
from models.networks import NETWORKS
from models.study import plan
from models.support.arguments import fraction, integer, radius
from models.training.methods import METHODS
from models.training.schedules import SCHEDULES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "value"), [("0.2", 0.2), ("51/255", 0.2), ("8/255", 8 / 255), ("1e-3", 0.001), (" 1 / 4 ", 0.25)]
)
def test_fractions(text: str, value: float) -> None:
    assert fraction(text) == value


@pytest.mark.parametrize("text", ["", "x", "1/0", "1/2/3", "nan", "inf", "__import__('os')", "2**3", "0x1", "1/"])
def test_what_is_no_fraction(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"wanted a number such as 0\.2 or a fraction such as 51/255"):
        fraction(text)


def test_ranges() -> None:
    assert integer(0)("0") == 0
    assert radius("255/255") == 1
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 9, got 10"):
        integer(1, 9)("10")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "300/255"], "argument --eps: wanted a value in [0, 1], the range of the images, got 300/255"),
        (["--eps", "half"], "argument --eps: wanted a number such as 0.2 or a fraction"),
        (["--epochs", "0"], "argument --epochs: wanted a whole number from 1 to"),
        (["--seed", "-1"], "argument --seed: wanted a whole number from 0 to"),
        (["--width", "2.5"], "argument --width: wanted a whole number, got '2.5'"),
        (["--lr", "0"], "argument --lr: wanted a number above 0, got 0"),
        (["--threads", "0"], "argument --threads: wanted a whole number from 1"),
        (["--train", "4500"], "--train 4500 and --test 1000 make more than the 5000 images there are"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_wrong_options_are_explained(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--out", str(tmp_path / "run"), *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_errors_are_one_line_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "holds files of something else" in error
    assert error.count("\n") == 1


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--out", "--seed", "--epochs", "--eps", "--restart", "--threads", "(default: 0.2)"):
        assert option in shown


def test_missing_package_is_explained() -> None:
    code = "import sys, runpy; sys.modules['rich'] = None; runpy.run_module('models', run_name='__main__')"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: python -m models needs the package rich; run `pip install 'kafops[models]'`"


COMMANDS = [
    pytest.param(line, id=f"{page.name}: {line}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for line in re.sub(r"\\\n\s*", "", page.read_text()).splitlines()  # a line may go on behind a backslash
    if line.startswith("python -m models ")
]


def test_the_documents_show_commands() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_documents_exist(line: str) -> None:
    options = parser().parse_args(shlex.split(line, comments=True)[3:])
    for name, load in (("recipe", recipes.load), ("study", plan.load)):
        if isinstance(given := getattr(options, name, None), str):
            load(given)
    if options.run.__module__ == "models.commands.recipe" and options.name is not None:
        recipes.load(options.name)


def module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m models` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "models", *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("evalute runs/kaf", ": error: there is no command 'evalute'; did you mean evaluate?"),
        ("train run --metod fast", " train: error: there is no option --metod; did you mean --method?"),
        ("train run --lr 0.1 --ep=1", " train: error: there is no option --ep; did you mean --eps?"),
        ("study tuned6k", " study: error: unknown study 'tuned6k'; did you mean tuned5k?"),
        ("recipe thesis-vg --epochs 1", " recipe: error: unknown recipe 'thesis-vg'; did you mean thesis-vgg?"),
        ("train run --method pdg", " train: error: unknown method 'pdg'; did you mean pgd?"),
        ("train run --network=lihgt:width=2", " train: error: unknown network 'lihgt'; did you mean light?"),
        (
            "evaluate run --attacks pgd-50-10:step=0.1,loss=ce,autoatack",
            " evaluate: error: unknown attack 'autoatack'; did you mean autoattack?",
        ),
        (
            "gradients --activations kaff relu",
            " gradients: error: unknown activation 'kaff'; did you mean kaf or kaf_free or kaf_rq?",
        ),
        ("study x --qqq", " study: error: there is no option --qqq; see python -m models study --help"),
    ],
)
def test_typos_are_answered_without_torch(arguments: str, answer: str) -> None:
    code = f"import sys, runpy; sys.modules['torch'] = None; sys.argv[1:] = {arguments.split()}; "
    code += "runpy.run_module('models', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"python -m models{answer}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        "train run --data mnist5k:train=400, --network resnet20:form=post,width=8 --method=n-fgsm:k=2 --lr 0.1",
        "train run --data webdataset:path=/data/a:b,c --activation kwta:per=channel,ratio",
        "evaluate run --attacks pgd-50-10:step=2/255,loss=margin,fgsm,cw:l2=0.5,autoattack --data-root x",
        "gradients --activations kaf nothing --networks resnet20 --method",
        "bounds run --attack pgd:steps=20, --eps 0.1",
    ],
)
def test_what_may_be_right_is_left_to_the_parser(arguments: str) -> None:
    assert _typo(*arguments.split()) is None


def test_all_names_are_known_without_torch() -> None:
    there = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert tuple(sorted(there)) == COMMAND_NAMES
    options = {o for command in there.values() for action in command._actions for o in action.option_strings}
    assert tuple(sorted(o for o in options if o.startswith("--"))) == tuple(f"--{name}" for name in OPTION_NAMES)
    registries = {registry.kind: registry for registry in (ACTIVATIONS, ATTACKS, DATA, METHODS, NETWORKS, SCHEDULES)}
    every = {kind: {*registry.names, *registry._aliases} for kind, registry in registries.items()}
    assert {kind: set(names) for kind, names in THINGS.items()} == {k.removesuffix(" set"): n for k, n in every.items()}


def test_a_terminal_that_has_no_greek_gets_question_marks() -> None:
    done = module("recipes", "wong-fast", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "Wong" in done.stdout


def test_recipe_says_where_the_folder_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipe", "thesis-vgg", "runs/my vgg"])
    assert "the folder is an option here: --out 'runs/my vgg'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["[kaf] seed 0", "[/kaf]"])
def test_brackets_in_paths_are_no_markup(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / name
    options = "--fake-data --data digits --network light:width=2 --batch-size 2048 --epochs 1 --watch-steps 0"
    assert main(["train", str(run), *options.split(), "--no-tensorboard"]) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert f"Done on made-up images: {run}".replace(" ", "") in shown.replace(" ", "")
    options = "--which latest --attacks fgsm --images 20 --check-images 0"
    assert main(["evaluate", str(run), *options.split()]) == 0
    shown = capsys.readouterr().out
    assert "On made-up images" in shown
    assert shown.index("fgsm: ") < shown.index("95 % interval")
    assert looking.labels([run]) == [f"{run.name} (made-up images)"]
