"""README.md, docs/ and the notebook: every command is accepted, every relative link exists, every cell runs.

Commands are those of code blocks, and inline code that is a whole command. A shell script runs with a
stand-in for Python that records what the script would start; that is then checked in this process, as on a
machine with eight GPUs. Nothing is trained but by the notebook's cells, with few images.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forks import in_fork
from helpers import write_folder
from readme_world import EXPORTED, pretend_eight_gpus, write_world

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launcher" / "launch.sh"
NOTEBOOK = ROOT / "notebooks" / "finetune_vit_colab.ipynb"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# links into these are checked as soon as the folder is there
TO_COME = [name for name in ("vit", "results/beans_folds") if not (ROOT / name).exists()]

# ---------------------------------------- reading the pages

ASSIGNMENT = re.compile(r"[A-Z_]+=")
PROGRAM = re.compile(r"(.*/)?(python|torchrun|bash)$")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def split_command(line: str) -> tuple[dict[str, str], list[str]] | None:
    """(variables, words) of a line that starts a program of this repository; None of any other line."""
    try:
        words = shlex.split(line.lstrip("!"), comments=True)
    except ValueError:  # text with an apostrophe
        return None
    variables = {}
    while words and ASSIGNMENT.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    starts = len(words) > 1 and PROGRAM.match(words[0])
    if not starts or not any(re.search(r"\.(py|sh)$", word) or word == "pytest" for word in words[1:]):
        return None
    return variables, words


def commands() -> list[tuple[str, str]]:
    """(page, line) of every command, each line once."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += [code for code in re.findall(r"`([^`\n]+)`", without_code(text)) if "..." not in code]
        for line in lines:
            if split_command(line):
                found.setdefault(re.sub(r"\s+#.*", "", line.strip()), page.name)
    return [(page, line) for line, page in found.items()]


def links() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", without_code(page.read_text())):
            if not target.startswith(("http:", "https:", "mailto:")):
                found.append((page.relative_to(ROOT).as_posix(), target))
    return found


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---------------------------------------- running a command


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("readme"))


def run_here(script: Path, argv: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """A program in this process. -> (exit status, what it printed)"""
    monkeypatch.setattr(sys, "argv", [str(script), *argv])
    status = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def check_sweep(argv: list[str]) -> None:
    """sweep.py has no --check; its plan checks every run."""
    from args import finetune_settings
    from vit.sweep_plan import plan_runs, read_arguments

    assert plan_runs(*read_arguments(argv), finetune_settings)


def check_benchmark(argv: list[str], monkeypatch, capsys) -> None:
    """benchmark.py, with its launches only checked."""
    import vit.benchmark
    from args import benchmark_cases

    launched = []

    def launch(words: list[str]) -> int:
        cases, _, problems = benchmark_cases(words)
        assert cases and not problems, problems
        launched.append(words)
        return 0

    monkeypatch.setattr(vit.benchmark, "launch", launch)
    monkeypatch.setattr(vit.benchmark, "benchmark_report", lambda folder: None)  # of no rows
    status, printed = run_here(ROOT / "benchmark.py", argv, monkeypatch, capsys)
    assert status == 0 and launched, printed


def check_program(script: str, argv: list[str], world: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    name = Path(script).name
    if name == "sweep.py":
        return check_sweep(argv)
    if name == "benchmark.py":
        return check_benchmark(argv, monkeypatch, capsys)
    if name == "prepare_images.py":  # small images, a new folder
        argv = [str(world / "path/to/birds") if arg.endswith("/imagenet") else arg for arg in argv]
        argv = [str(tmp_path / "prepared") if arg.endswith("/prepared") else arg for arg in argv] + [
            "--processes",
            "1",
        ]
    if name in ("vit_train_demo.py", "train.py", "vit_benchmark.py"):
        if not {"--check", "--help"} & set(argv):
            argv = [*argv, "--check"]
    monkeypatch.setattr("vit.serve.serve", lambda server: server.server_close())  # not until Ctrl-C
    status, printed = run_here(ROOT / name, argv, monkeypatch, capsys)
    if status and re.search("pip install (onnx|wandb|mlflow)", printed):
        return  # a library that is not installed for the tests
    if name == "report.py":  # with no runs it says so, and does not ask for another command
        assert status == 0 or "holds no" in printed, printed
        return
    assert status == 0, printed


def started_by(
    words: list[str], variables: dict[str, str], world: Path, tmp_path: Path
) -> list[tuple[dict[str, str], list[str]]]:
    """What a shell script starts: (the variables that it exports, the words after Python)."""
    record = tmp_path / "record"
    environment = (
        os.environ | variables | {"INSTALL": "0", "PYTHON": str(world / "python"), "RECORD": str(record)}
    )
    done = subprocess.run(
        ["bash", str(ROOT / words[1]), *words[2:]], env=environment, capture_output=True, text=True
    )
    assert record.exists(), done.stderr
    calls = [call.split("\0") for call in record.read_text().split("\0END\0")[:-1]]
    count = len(EXPORTED)
    return [(dict(zip(EXPORTED, call)), call[count:]) for call in calls]


@pytest.fixture(scope="module")
def prepared(world) -> None:
    """/path/to/prepared, made of /path/to/imagenet."""
    target = world / "path/to/prepared"
    command = [
        sys.executable,
        str(ROOT / "prepare_images.py"),
        str(world / "path/to/imagenet"),
        str(target),
        "--size",
        "8",
    ]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("page, line", commands(), ids=[f"{page}: {line}" for page, line in commands()])
def test_command_is_accepted(page, line, world, tmp_path, monkeypatch, capsys, request):
    if "/path/to/prepared" in line and "prepare_images" not in line:
        request.getfixturevalue("prepared")
    if not re.search("vit_predict|vit_explain", line):  # which compute
        pretend_eight_gpus(world, monkeypatch)
    here = tmp_path / "here"
    if re.search(r"output_model|leaf", line):
        shutil.copytree(world / "used", here)
    else:
        here.mkdir()
    (here / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(here)
    variables, words = split_command(line.replace("/path/to/", f"{world}/path/to/"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if words[0] == "bash":
        script = ROOT / words[1]
        subprocess.run(["bash", "-n", str(script)], check=True)
        known = script.read_text() + LAUNCH.read_text()
        unknown = [name for name in variables if not re.search(rf"\b{name}\b", known)]
        assert not unknown, f"{script.name} knows no such variable"
        if script.name in ("test_ci.sh", "matrix.sh"):
            return
        for exported, (program, *argv) in started_by(words, variables, world, tmp_path):
            for name, value in exported.items():
                monkeypatch.setenv(name, value)
            check_program(program, argv, world, tmp_path, monkeypatch, capsys)
        return
    if "pytest" in words:
        assert (ROOT / words[-1]).exists()
        return
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, argv = words[at], words[at + 1 :]
    if words[0].endswith("torchrun"):
        options = dict(word.lstrip("-").split("=", 1) for word in words[1:at])
        argv += ["--world_size", str(int(options.get("nnodes", 1)) * int(options["nproc_per_node"]))]
    check_program(script, argv, world, tmp_path, monkeypatch, capsys)


def test_best_recipe_gives_way_to_what_the_user_sets(world, tmp_path):
    from args import finetune_settings

    words = ["bash", "run_demo.sh", "--image_size", "64"]
    variables = {"RECIPE": "best", "EPOCH": "3", "MODEL": "vit-demo", "DATASET": "drawn", "GPUNUM": "1"}
    *_, (_, (_, *argv)) = started_by(words, variables, world, tmp_path)
    settings, problems, _ = finetune_settings(argv)
    chosen = (settings.plugin, settings.preset, settings.learning_rate, settings.mixup)
    assert not problems and chosen == ("torch_ddp", "fast", 2e-4, 0.2) and settings.augment
    assert (settings.num_epoch, settings.image_size) == (3, 64)


def test_unknown_recipe_ends_before_anything_starts(tmp_path):
    command = ["bash", str(ROOT / "run_demo.sh")]
    done = subprocess.run(command, env=os.environ | {"RECIPE": "good"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "launch: RECIPE=good: must be none or best\n")


# ---------------------------------------- links and form


@pytest.mark.parametrize("page, target", links(), ids=[f"{page} -> {target}" for page, target in links()])
def test_link_exists(page, target):
    path, _, anchor = target.partition("#")
    linked = ((ROOT / page).parent / path).resolve() if path else ROOT / page
    inside = linked.relative_to(ROOT).as_posix()
    if not linked.exists() and any(name.split("/")[0] == inside.split("/")[0] for name in TO_COME):
        pytest.skip(f"{inside} is not there yet")
    assert linked.exists()
    assert not anchor or anchor in anchors(linked)


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 110


# ---------------------------------------- the notebook


def run_program(script: str, argv: list[str]) -> None:
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")


def test_notebook_cells_run(world, tmp_path, monkeypatch):
    """On the CPU with vit-demo. What run_demo.sh would launch runs in one process each."""
    import colossalai.booster.plugin  # noqa: F401  before the forks
    import transformers.models.vit.modeling_vit  # noqa: F401

    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    folder = tmp_path / "vit"
    folder.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name != "output_model":
            (folder / entry.name).symlink_to(entry)
    images = write_folder(tmp_path / "images", {"train": 40, "validation": 12, "test": 12})
    environment = {
        "VIT_FOLDER": folder,
        "FLAGS": "--max_train_samples 32",
        "PY": sys.executable,
        "MPLBACKEND": "Agg",
        "DATASET": images,
        "OWN_IMAGES": images,
        "INSTALL": "0",
        "EPOCH": "1",
        "BS": "8",
        "GPUNUM": "1",
        "MODEL": "vit-demo",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    for name in ("PRESET", "PLUGIN", "OUTPUT_PATH", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "auto")  # the cells set the first three; taken back afterwards
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)  # taken back too
    log, started = tmp_path / "log", []

    def shell(line: str) -> None:
        if not line.startswith("bash run_demo.sh"):
            subprocess.run(["bash", "-c", line], check=True)
            return
        record = tmp_path / f"record_{len(started)}"
        variables = os.environ | {"PYTHON": str(world / "python"), "RECORD": str(record)}
        subprocess.run(["bash", "-c", line], env=variables, capture_output=True)
        [call] = record.read_text().split("\0END\0")[:-1]
        program, *argv = call.split("\0")[len(EXPORTED) :]
        argv = [arg for arg in argv if arg != "--check"]
        del argv[argv.index("--world_size") : argv.index("--world_size") + 2]
        started.append(argv)
        assert in_fork(lambda: run_program(program, argv), log) == 0, log.read_text()

    names = {"shell": shell, "__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = re.sub(
                r"^(\s*)!(.*)$",
                lambda m: f"{m[1]}shell({m[2]!r})",
                "".join(cell["source"]),
                flags=re.MULTILINE,
            )
            exec(compile(source, cell["id"], "exec"), names)
    assert len(started) == 4  # the plan, two plugins, own images
    assert [len(names["predictions"]), (folder / "export" / "checkpoints").exists()] == [6, False]
    assert (folder / "export.zip").exists()
    shutil.rmtree(folder)
