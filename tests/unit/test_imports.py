"""Who imports whom: every module of vit/ imports lower levels only, and never a file of the top level."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

LEVELS = {
    # L0: the standard library alone, or Triton
    0: "console files disk layout presets validate versions patches parallel.plugins report.tables "
    "attention_triton layer_triton",
    # L1: what the machine, a name or a setting is
    1: "settings config system hub environment modules muon attention_kernel layer_kernels data.dataset "
    "patches.colossalai_cpu patches.colossalai_legacy patches.colossalai_gemini "
    "patches.colossalai_imports patches.torch_kernels checksums watch "
    "report.reading pages tracking parallel.reduction",
    # L2: process group, optimizer, and reading and transforming images
    2: "parser distributed optim model_variants initial_weights config_settings sweep_plan data.transforms "
    "data.leaves data.cifar10 data.prepared data.splits data.image_files data.summary "
    "patches.transformers_vit model_folder report.card report.charts report.sweep_tables report.classes "
    "report.tables_page parallel.lora",
    # L3: models, sources, schedules, and the forms of parallelism
    3: "signals step_graph patches.colossalai_zero schedule flops data.gpu_augment data.pixels "
    "data.folders data.processor data.decoded_copy data.duplicates parallel.plain parallel.boosted "
    "parallel.mesh patches.transformers_layers predictions report.class_charts report.benchmark_charts "
    "report.accuracy report.sweep checkpoint_files run_lock flags calibration",
    # L4: batches, a train step, a checkpoint
    4: "model step classify checkpoint sweep data.loaders data.decode data.image_tables parallel.fsdp "
    "parallel.mesh_train parallel.policy report.benchmark report.page peers",
    # L5: a boosted model, the folder of a run
    5: "run_folder benchmark parallel.boost data.sources explain onnx_export serve",
    # L6: the training loop, and all checks of settings
    6: "trainer output_checks checks resolve data.hf_datasets",
}
# Inside a level: the checks are in several files, and `resolve` calls them.
SAME_LEVEL = {("vit.checks", "vit.output_checks"), ("vit.resolve", "vit.checks")}
# The table of plugins is read without torch; a plugin's own code is imported when the plugin is built.
WHEN_BUILT = {
    ("vit.parallel.plugins", "vit.parallel.plain"),
    ("vit.parallel.plugins", "vit.parallel.fsdp"),
    ("vit.parallel.plugins", "vit.parallel.policy"),
}
# Packages whose __init__.py is empty
EMPTY = {"vit", "vit.data", "vit.parallel", "vit.report"}
WITHOUT_TORCH = "vit.report.sweep, vit.report.benchmark, vit.report.accuracy, vit.settings, vit.config"
WITHOUT_TORCH += ", vit.parallel.plugins, args"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted((ROOT / "vit").rglob("*.py"))}
LEVEL_OF = {f"vit.{name}": level for level, names in LEVELS.items() for name in names.split()}
TOP_LEVEL = {path.stem for path in ROOT.glob("*.py")}


def imports(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports, also inside functions, but not for annotations alone."""
    tree = ast.parse(path.read_text())
    for_annotations = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_annotations:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else node.module


def test_every_module_has_a_level():
    assert set(LEVEL_OF) == set(FILES) - EMPTY
    assert not any(FILES[name].read_text().strip() for name in EMPTY)


@pytest.mark.parametrize("module", sorted(set(FILES) - EMPTY))
def test_imports_point_to_lower_levels(module):
    own = LEVEL_OF[module]
    for imported in set(imports(FILES[module])):
        assert imported.partition(".")[0] not in TOP_LEVEL, f"{module} imports {imported} of the top level"
        if imported in LEVEL_OF and imported != module and (module, imported) not in SAME_LEVEL | WHEN_BUILT:
            level = LEVEL_OF[imported]
            assert level < own, f"{module} (L{own}) imports {imported} (L{level})"


def test_same_level_imports_exist():
    for module, imported in SAME_LEVEL | WHEN_BUILT:
        assert imported in set(imports(FILES[module])), f"({module}, {imported}) is no exception any more"


def test_programs_are_not_imported():
    """Only args.py and data.py are modules; the other files of the top level are programs."""
    for path in ROOT.glob("*.py"):
        imported = {name.partition(".")[0] for name in imports(path)} & TOP_LEVEL
        assert imported <= {"args", "data"}, f"{path.name} imports {imported}"


def test_reports_and_settings_need_no_torch():
    code = f"import sys, {WITHOUT_TORCH}; sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_settings_are_checked_without_torch_where_there_is_no_gpu(tmp_path):
    """As before each launch. With a driver that shows no GPU, and without one."""
    code = (
        "import sys, args; args.parse_finetune(['--model_name_or_path', 'vit-demo', '--dataset', 'drawn'])\n"
    )
    code += "sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        **dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True),
    )
    assert done.returncode == 0, done.stderr
