"""launcher/install.py, through launch.sh: what is installed where."""

import importlib
import json
import shutil
import subprocess
import sys
import textwrap

import pytest
from helpers import ROOT
from launch_cases import call

PIP = """
import json, pathlib, re, sys
site = pathlib.Path(__file__).parent.parent
with open(site / "pip.log", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if "--constraint" in sys.argv:
    kept = pathlib.Path(sys.argv[sys.argv.index("--constraint") + 1])
    (site / "constraints.txt").write_text(kept.read_text())
if (site / "fails").exists() or (site / "no cpu").exists() and "--extra-index-url" in sys.argv:
    sys.exit("ERROR: the registry is on fire")
for word in sys.argv[2:]:
    if match := re.fullmatch(r"([a-z][a-z_-]*)(?:[<=]=([0-9.]+)([+]cpu)?)?", word):
        package = site / f"{match[1].replace('-', '_')}-{match[2] or 1}.dist-info"
        package.mkdir()
        needs = "Requires-Dist: torch<=2.5.1\\nRequires-Dist: fabric\\n" if match[1] == "colossalai" else ""
        head = f"Metadata-Version: 2.1\\nName: {match[1]}\\nVersion: {match[2] or 1}\\n"
        (package / "METADATA").write_text(head + needs)
"""


@pytest.fixture
def empty_environment(tmp_path):
    """An environment without packages, whose pip writes down what it is asked and pretends to do it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "pip").mkdir()
    (site / "pip" / "__main__.py").write_text(textwrap.dedent(PIP))
    return site


def pip_calls(site):
    return [json.loads(line) for line in (site / "pip.log").read_text().splitlines()]


def add_package(site, name, version):
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def install(home, site, **env):
    env = dict(VIRTUAL_ENV=str(site.parents[2]), PYTHON=None, PYTHONPATH=None, INSTALL=None) | env
    return call(home, "install_environment", **env)


def test_install_is_done_once(home, empty_environment):
    first, second = install(home, empty_environment), install(home, empty_environment)
    assert first.returncode == second.returncode == 0, first.stderr
    for_cpu, rest = pip_calls(empty_environment)
    assert for_cpu[-2:] == ["torch==2.5.1+cpu", "torchvision==0.20.1+cpu"]
    assert {"colossalai==0.5.0", "transformers==4.51.3", "pytest==9.2.0"} <= set(rest)
    assert not [word for word in rest if word.startswith("torch")]
    assert "installing" in first.stdout and "installing" not in second.stdout
    assert "colossalai 0.5.0, torch 2.5.1," in second.stdout


def test_install_keeps_the_torch_that_is_there(home, empty_environment):
    add_package(empty_environment, "torch", "2.11.0")
    assert install(home, empty_environment).returncode == 0
    alone, rest = pip_calls(empty_environment)
    assert alone[-2:] == ["--no-deps", "colossalai==0.5.0"]
    assert {"--constraint", "fabric", "torchvision", "transformers==5.24.0"} <= set(rest)
    assert not [word for word in rest if word.startswith(("torch<", "torch=", "colossalai"))]


@pytest.mark.parametrize("version, alone", [("4.51.3", False), ("4.52.4", True), ("5.17.0", True)])
def test_beside_other_transformers_colossalai_is_installed_without_its_requirements(
    home, empty_environment, version, alone
):
    """It requires transformers 4.51.3 exactly, so pip would find no solution."""
    add_package(empty_environment, "transformers", version)
    assert install(home, empty_environment).returncode == 0
    calls = pip_calls(empty_environment)
    assert (["--no-deps", "colossalai==0.5.0"] in [words[-2:] for words in calls]) == alone
    assert not [word for words in calls for word in words if word.startswith("transformers")]


def test_install_keeps_what_is_there_but_not_the_tools_of_a_new_environment(home, empty_environment):
    for name, version in dict(numpy="1.26.4", setuptools="65.5.0", pip="23.2").items():
        add_package(empty_environment, name, version)
    assert install(home, empty_environment).returncode == 0
    assert (empty_environment / "constraints.txt").read_text().split() == ["numpy==1.26.4"]


def test_install_without_a_cpu_build_takes_the_other_one(home, empty_environment):
    (empty_environment / "no cpu").touch()
    done = install(home, empty_environment)
    assert done.returncode == 0 and "no CPU build of torch==2.5.1" in done.stdout
    assert {"colossalai==0.5.0", "torch==2.5.1", "torchvision==0.20.1"} <= set(
        pip_calls(empty_environment)[-1]
    )


def test_newest_versions_are_installed_where_they_are_asked_for(home, empty_environment):
    done = install(home, empty_environment, VERSIONS="newest")
    assert done.returncode == 0 and "transformers 5.24.0" in done.stdout
    assert ["--no-deps", "colossalai==0.5.0"] in [call[-2:] for call in pip_calls(empty_environment)]
    assert "VERSIONS=old is neither" in install(home, empty_environment, VERSIONS="old").stderr


def test_install_is_never_silent_for_long(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "launcher")
    installer = importlib.import_module("install")
    monkeypatch.setattr(installer, "SECONDS_OF_SILENCE", 0.1)
    slow = "import time; print('Downloading torch-2.5.1-cp311.whl (906.4 MB)', flush=True); time.sleep(0.5)"
    assert installer.run([sys.executable, "-c", slow], "packages")[0] == 0
    said = capsys.readouterr().out
    assert "s  torch-2.5.1, 906.4 MB" in said and "still at torch-2.5.1" in said


def test_install_that_fails_says_what_to_do(home, empty_environment):
    (empty_environment / "fails").touch()
    done = install(home, empty_environment)
    assert done.returncode == 1
    assert "the registry is on fire" in done.stderr and "INSTALL=0" in done.stderr
    done = install(home, empty_environment, INSTALL="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_optional_packages_are_asked_for_by_name(home, empty_environment):
    install(home, empty_environment)
    shutil.rmtree(next(empty_environment.glob("pytest-*")))
    assert "installing" not in install(home, empty_environment).stdout
    assert "installing 1 packages" in install(home, empty_environment, NEEDED="pytest").stdout


def test_no_venv_module_is_one_clear_error(home, tmp_path):
    # A python3 that has nothing installed and cannot make environments, as on Debian without python3-venv.
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "python3"
    program.write_text(f'#!/bin/sh\n[ "$1" != -m ] || exit 1\nexec "{sys.executable}" -I -S "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    done = call(home, "install_environment", PYTHON=None, INSTALL=None, PATH=path)
    assert done.returncode == 2
    assert "apt install python3-venv" in done.stderr and done.stderr.count("\n") == 1
    assert not (home / ".venv").exists()


def test_checkout_with_windows_line_endings_has_unix_ones_in_scripts(tmp_path):
    """As git does it on Windows; bash cannot read scripts with others."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git repository")
    copy, windows = tmp_path / "copy", ["-c", "core.autocrlf=true"]
    subprocess.run(["git", "clone", "-q", "--shared", "--no-checkout", ROOT, copy], check=True)
    subprocess.run(["git", *windows, "checkout", "-q", "HEAD", "--", "."], cwd=copy, check=True)
    files = [path for path in copy.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert b"\r\n" in (copy / "README.md").read_bytes()
    scripts = [path for path in files if path.suffix == ".sh" or path.read_bytes().startswith(b"#!")]
    assert copy / "run_demo.sh" in scripts and copy / ".ci" / "run" in scripts
    assert not [path for path in scripts if b"\r" in path.read_bytes()]
