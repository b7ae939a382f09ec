"""The HuggingFace hub and its local cache: checking what is available, and uploading a result."""

import functools
import http.client
import json
import os
import re
import threading
import urllib.request
from pathlib import Path

from vit.console import exit_with_errors, print_rank0
from vit.files import TRACKED, cache_home
from vit.versions import pickles_are_safe

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


def endpoint() -> str:
    """Address of the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def read_config(folder: Path) -> dict:
    """``config.json`` of a model folder; {} when it is missing or broken."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def is_hub_name(name: str) -> bool:
    """Whether ``name`` has the form of a hub name, owner/name, and is no local path."""
    return HUB_NAME.fullmatch(name) is not None and not name.startswith(".") and not Path(name).exists()


@functools.cache  # one request per process
def reachable(seconds: float = 6) -> bool:
    """Whether the hub answers an HTTP request within ``seconds``, name resolution included."""
    heard = []

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint(), method="HEAD"), timeout=seconds)
            heard.append(True)
        except urllib.error.HTTPError:
            heard.append(True)  # it answered
        except (OSError, ValueError, http.client.HTTPException):  # ValueError: HF_ENDPOINT is no address
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(heard)


def is_online() -> bool:
    """Whether the hub may be used and answers."""
    return os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0", "false") and reachable()


def go_offline_if_possible(names: list, uploads: bool) -> None:
    """Keep transformers and datasets from contacting the hub if that is not needed or does not work.

    Otherwise they retry for minutes where the hub does not answer. Call before they are imported.

    Args:
        names: the models and data sets that come from the hub.
        uploads: whether the result is uploaded.
    """
    if names and not is_online():
        os.environ["HF_HUB_OFFLINE"] = "1"
    elif not names and not uploads:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def is_cached(name: str, kind: str) -> bool:
    """Whether the caches of huggingface_hub or datasets have a copy of a repository.

    ``kind``: "models" or "datasets".
    """
    home = Path(os.environ.get("HF_HOME") or cache_home() / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    copies = [hub / f"{kind}--{name.replace('/', '--')}" / "snapshots"]
    if kind == "datasets":
        copies.append(
            Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets") / name.replace("/", "___").lower()
        )
    return any(copy.is_dir() and any(copy.iterdir()) for copy in copies)


def weights_options() -> dict:
    """Arguments of from_pretrained: pickled weights are read by a torch alone in which they run no code."""
    return {} if pickles_are_safe() else {"use_safetensors": True}


def lacks_safetensors(error: Exception) -> bool:
    """Whether from_pretrained failed because there are pickled weights alone, by its text."""
    return isinstance(error, OSError) and not pickles_are_safe() and "model.safetensors" in str(error)


def upload(folder: Path, repository: str) -> None:
    """Upload an output folder, without its checkpoints, to a model repository of the hub.

    The repository is created if needed. The folder stays. If the upload fails, the program ends with the
    reason and a command to upload it later.
    """
    from huggingface_hub import HfApi

    try:
        url = HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=["checkpoints/**", "tensorboard/**", "wandb/**", TRACKED],
            commit_message="Fine-tuned with Colossal-AI",
        )
    except Exception as error:  # many types: no permission, wrong name, no space, no answer
        reason = str(error).strip().splitlines()[0]
        exit_with_errors(
            f"--push_to_hub {repository}: {reason}. The result is complete in {folder}: "
            f"`huggingface-cli upload {repository} {folder}` uploads it later",
            code=1,
        )
    print_rank0(f"uploaded to {url}")
