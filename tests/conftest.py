"""The environment of all tests, shared inputs, and one launch per process count for everything that needs
processes.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# for the tests and for the scripts that they start
_paths = [
    ROOT,
    *(ROOT / folder for folder in ("tests", "tests/distributed", "tests/programs", "results/scripts")),
]
sys.path[:0] = map(str, _paths)
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, _paths), *filter(None, [os.environ.get("PYTHONPATH")])])

VISIBLE_GPUS = os.environ.get(
    "CUDA_VISIBLE_DEVICES"
)  # for test_gpu.py, which starts processes that may see them

# Before any library reads them: no GPU, no file in the user's caches, one thread (two processes share two
# cores).
_caches = tempfile.TemporaryDirectory(prefix="vit-tests-")
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HOME=f"{_caches.name}/hf", XDG_CACHE_HOME=f"{_caches.name}/xdg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# no compiler processes beside the tests: vit.distributed.import_libraries
os.environ.setdefault("TORCH_WARM_POOL", "0")
# fp32 is the default without a GPU, whatever the CPU: see vit.system.cpu_has_bf16
os.environ.setdefault("VIT_DISABLE_PATCHES", "cpu_attention")
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "HF_HUB_OFFLINE"):
    os.environ.pop(_name, None)

from vit.console import silence_libraries

silence_libraries()

import pytest
import torch
from golden import checkpoints
from helpers import COUNTS, save_tiny_vit, write_folder

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Print a failure at once: a suite that is stopped at its limit would take the reasons along."""
    report = yield
    if report.failed:
        terminal = item.config.pluginmanager.get_plugin("terminalreporter")
        title = f"{report.nodeid} ({report.when}, {report.duration:.1f} s)"
        terminal.write_line(f"\n{title}\n{report.longreprtext[-3000:]}")
    return report


def torchrun(processes: int, *command, **options) -> subprocess.CompletedProcess:
    """Run a script on several processes; a free port is chosen by torchrun itself."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    return subprocess.run(
        [*launcher, *map(str, command)], text=True, capture_output=True, timeout=900, **options
    )


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """The inputs of all launches, and what they write."""
    root = tmp_path_factory.mktemp("shared")
    write_folder(root / "images", COUNTS)
    save_tiny_vit(root / "model")
    for name, sizes in checkpoints.MODELS.items():
        save_tiny_vit(root / name, **sizes)
    # a photograph that breaks off, in the training and in the validation part
    for split in COUNTS:
        whole = write_folder(root / "damaged", {split: COUNTS[split]}) / split / "red" / "002.png"
        if split != "test":
            whole.write_bytes(whole.read_bytes()[:200])
    return root


@pytest.fixture(scope="session")
def image_folder(shared) -> Path:
    return shared / "images"


@pytest.fixture(scope="session")
def model_folder(shared) -> Path:
    return shared / "model"


LAUNCHES = {1: "one", 2: "two", 4: "four"}  # processes -> the fixture with their results


def processes_of(item) -> int:
    """Processes of the largest launch that a test looks at; 0: of none."""
    names = set(item.fixturenames)
    found = [processes for processes, name in LAUNCHES.items() if name in names]
    if "launched" in names:
        found.append(item.callspec.params.get("processes", 4))
    return max(found, default=0)


def pytest_collection_modifyitems(items):
    """Tests that look at a launch come last: it runs beside the others."""
    items.sort(key=lambda item: processes_of(item) > 0)


@pytest.fixture(scope="session", autouse=True)
def launches(request):
    """The process that launches what the tests of this session look at; see distributed/launches.py."""
    most = max(map(processes_of, request.session.items), default=0)
    if not most:
        yield None
        return
    script = ROOT / "tests" / "distributed" / "launches.py"
    words = [sys.executable, script, request.getfixturevalue("shared"), most]
    running = subprocess.Popen([*map(str, words)], cwd=ROOT, start_new_session=True)
    yield running
    if running.poll() is None:  # the session was stopped; torchrun ends its processes
        os.killpg(running.pid, signal.SIGTERM)
    running.wait()


class Results:
    """What the cases of one launch returned; a case that failed fails the test that asks for it."""

    def __init__(self, processes: int, folder: Path, launches: subprocess.Popen):
        path = folder / f"launch_{processes}.json"
        while True:
            ended = launches.poll() is not None  # asked first: the file is written before
            if path.exists():
                break
            assert not ended, f"there is no {path}, and nothing that will write it"
            time.sleep(0.1)
        results = json.loads(path.read_text())
        self.found, self.failed = results["found"], results["failed"]
        assert not results["outside"], (
            f"the launch with {processes} processes failed outside its cases:\n{results['outside']}"
        )

    def __getitem__(self, case: str):
        if case in self.failed:
            pytest.fail(f"case {case}:\n{self.failed[case]}", pytrace=False)
        return self.found[case]


@pytest.fixture(scope="session")
def one(shared, launches) -> Results:
    return Results(1, shared, launches)


@pytest.fixture(scope="session")
def two(shared, launches) -> Results:
    return Results(2, shared, launches)


@pytest.fixture(scope="session")
def four(shared, launches) -> Results:
    return Results(4, shared, launches)


@pytest.fixture
def launched(request):
    """processes -> the results of that launch."""
    return lambda processes: request.getfixturevalue(LAUNCHES[processes])


# ---- the command line of vit_train_demo.py, on a machine of one's choice


@pytest.fixture
def parse(monkeypatch, tmp_path, image_folder, model_folder):
    """(line, gpus=0, world=1, bf16=True, local=True, without="") -> its settings, checked.

    ``local``: local model and images. ``without``: a package that is not installed.
    """
    import importlib.util

    from args import parse_finetune
    from vit.system import Machine

    monkeypatch.chdir(tmp_path)

    def parse(line="", gpus=0, world=1, bf16=True, local=True, without=""):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr("vit.checks.find_spec", lambda name: None if name == without else find_spec(name))
        monkeypatch.setattr("args.this_machine", lambda: Machine(gpus, has_bf16=bool(gpus and bf16)))
        monkeypatch.setattr("vit.output_checks.room_problem", lambda *_: "")  # whatever else is on this disk
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        words = ["--model_name_or_path", str(model_folder), "--dataset", str(image_folder)] if local else []
        return parse_finetune([*words, "--world_size", str(world), *line.split()])

    return parse


@pytest.fixture
def problems(parse, capsys):
    """The same of a command line that is refused -> the problems that were printed."""

    def problems(line, **machine):
        with pytest.raises(SystemExit) as end:
            parse(line, **machine)
        assert end.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines and all(line.startswith("error: ") for line in lines)
        return [line.removeprefix("error: ") for line in lines]

    return problems


@pytest.fixture
def home(tmp_path) -> Path:
    """The launch files in a folder with an awkward name, and a script to launch there."""
    from launch_cases import make_home

    return make_home(tmp_path)


# ---- runs of train.py, which more than one file looks at


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory) -> Path:
    """A few images in torchvision's form of CIFAR-10."""
    from train_cases import write_cifar

    return write_cifar(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="session")
def train_runs(cifar_folder) -> Path:
    """The folder of all runs of test_train.py."""
    import test_train
    from train_cases import run_all

    return run_all(test_train.__file__, cifar_folder.parent)


@pytest.fixture(scope="session")
def imagenet_tree(tmp_path_factory) -> Path:
    """A small set of ImageNet's shape."""
    from imagenet_shape import write_set

    root = tmp_path_factory.mktemp("imagenet")
    write_set(root / "tree", classes=8, train=120, val=24, side=70)
    return root / "tree"


@pytest.fixture(scope="session")
def imagenet_runs(imagenet_tree) -> Path:
    """The folder of all runs of test_imagenet.py."""
    import test_imagenet
    from train_cases import run_all

    return run_all(test_imagenet.__file__, imagenet_tree.parent)


@pytest.fixture(scope="session")
def mesh_cases(tmp_path_factory) -> dict:
    """What the cases of tensor_parallel_cases.py saw: 2d, 2.5d and 3d layers."""
    from test_tensor_parallel import run_cases

    return run_cases(tmp_path_factory.mktemp("cases"), "--steps", "20")
