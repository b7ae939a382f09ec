"""Colossal-AI imports less: 0.9 s of 5 s of processor time at the start of every process."""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager

from vit.patches import disabled, patch

# Imported by Colossal-AI 0.5.0 for LoRA, GaLore and quantization, which this program does not use:
# interface/model.py, checkpoint_io/utils.py, booster/plugin/*.py; nn/optimizer/galore.py, quantization/bnb.py
UNUSED = (
    "peft peft.utils peft.utils.other peft.utils.save_and_load "
    "bitsandbytes bitsandbytes.optim bitsandbytes.optim.optimizer"
).split()


class StandIn(types.ModuleType):
    """A module in which every name is an empty class, of which nothing is an instance."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


@contextmanager
def lean_imports():
    """While Colossal-AI is imported, packages that it does not need here are empty, and nothing is compiled.

    quantization/fp8.py decorates functions with torch.compile, which imports all of torch._inductor; these
    functions then run uncompiled, but without --fp8 nothing calls them. Can go when these imports are lazy.
    """
    if "lean_imports" in disabled():
        yield
        return
    import torch
    import transformers  # noqa: F401 - asks whether peft is installed, and remembers the answer

    names = [name for name in UNUSED if name.partition(".")[0] not in sys.modules]
    compile_function = torch.compile
    sys.modules.update({name: StandIn(name) for name in names})
    torch.compile = lambda model=None, **options: model if model is not None else lambda function: function
    try:
        yield
    finally:
        torch.compile = compile_function
        for name in names:
            del sys.modules[name]


@patch
def silence_colossalai_logger() -> None:
    """Keep Colossal-AI's logger quiet, and fast. Call after colossalai is imported.

    Why: every call walks the Python stack before it looks at the level, milliseconds per step with Gemini.
    Library: logging/logger.py, DistributedLogger, colossalai 0.5.0. Can go when it asks for its level first.
    """
    from colossalai.logging import DistributedLogger

    for level in ("debug", "info", "warning"):
        setattr(DistributedLogger, level, lambda self, *args, **kwargs: None)
