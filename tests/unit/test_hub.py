"""What goes to the HuggingFace hub: the card's metadata, and the upload to a hub on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard

from vit.hub import reachable, upload
from vit.report.card import model_card


def rows(accuracy: float) -> list[dict]:
    measured = {"average_loss": 0.1234567, "accuracy": accuracy, "images": 133}
    epoch = {
        "kind": "epoch",
        "epoch": 1,
        "best": True,
        "train_loss": 0.5,
        "images_per_second": 10.0,
        "seconds": 2.0,
    }
    run = {
        "kind": "run",
        "versions": {"torch": "2.5.1"},
        "hardware": "CPU, 2 cores",
        "layout": "1 process",
        "date": "2026-01-01",
        "data": {"images_of_class": {"train": {"a": 3, "b": 1}}, "largest_class": {}, "notes": []},
    }
    return [run, epoch | measured, {"kind": "test", "epoch": 1, **measured, "images": 128}]


def test_card_metadata_is_what_the_hub_reads():
    settings = {"model_name_or_path": "google/vit-base-patch16-224", "dataset": "AI-Lab-Makerere/beans"}
    card = ModelCard(model_card(rows(0.984375), settings, ["a", "b"]))
    assert card.data.base_model == "google/vit-base-patch16-224" and card.data.datasets == [
        "AI-Lab-Makerere/beans"
    ]
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-classification"
    found = {result.metric_type: result for result in card.data.eval_results}
    assert found["accuracy"].metric_value == 0.984375 and found["loss"].metric_value == 0.123457
    assert (
        found["accuracy"].dataset_type == "AI-Lab-Makerere/beans"
        and found["accuracy"].dataset_split == "test"
    )


def test_an_endpoint_that_is_no_address_does_not_answer(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    assert not reachable.__wrapped__(5)


def test_names_of_folders_on_this_machine_stay_out_of_the_metadata(tmp_path):
    folder = tmp_path / "leaves"
    folder.mkdir()
    settings = {"model_name_or_path": str(folder), "dataset": str(folder)}
    metadata = model_card(rows(0.5), settings, ["a", "b"]).split("---")[1]
    assert str(tmp_path) not in metadata and "base_model" not in metadata
    assert ModelCard(model_card(rows(0.5), settings, ["a"])).data.eval_results[0].dataset_type == "leaves"


@pytest.mark.parametrize("part", [{"fold": "1/5"}, {"max_eval_samples": 64}])
def test_parts_of_a_split_are_no_result_of_it(part):
    settings = {"model_name_or_path": "google/vit-base-patch16-224", "dataset": "AI-Lab-Makerere/beans"}
    text = model_card(
        rows(0.984375), settings | dict.fromkeys(("fold", "max_eval_samples")) | part, ["a", "b"]
    )
    card = ModelCard(text)
    assert card.data.datasets == ["AI-Lab-Makerere/beans"] and card.data.eval_results is None
    metadata, told = text.split("---", 2)[1:]
    assert "model-index" not in metadata and "0.98" not in metadata and "accuracy 0.9844" in told


@pytest.mark.parametrize("tested", [False, True])
def test_a_part_held_out_of_train_is_no_split_of_the_set(tested):
    found = rows(0.75)[: 2 + tested]
    found[0] |= {"held_out": True}
    card = ModelCard(model_card(found, {"model_name_or_path": "a/vit", "dataset": "a/leaves"}, ["a", "b"]))
    assert "Held-out part of the training split (133 images)" in card.text
    assert [result.dataset_split for result in card.data.eval_results or []] == ["test", "test"] * tested


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        status, answer = 200, {}
        if self.server.refuses:
            status, answer = (
                403,
                {"error": "You don't have the rights to create a model under this namespace"},
            )
        elif self.path == "/api/repos/create":
            answer = {"url": f"http://{self.headers['Host']}/me/leaves"}
        elif "/preupload/" in self.path:
            answer = {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
            }
        elif "/commit/" in self.path:
            answer = {"commitUrl": "https://huggingface.co/me/leaves/commit/0", "commitOid": "0"}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status != 200:
            self.send_header("X-Error-Message", answer["error"])
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.refuses = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    # huggingface_hub read its environment when it was imported
    import huggingface_hub

    class Api(huggingface_hub.HfApi):
        def __init__(self):
            super().__init__(endpoint=address, token="hf_ours")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()


@pytest.fixture
def result(tmp_path):
    (tmp_path / "checkpoints" / "00001_epoch_1_image_0").mkdir(parents=True)
    (tmp_path / "checkpoints" / "00001_epoch_1_image_0" / "state.pt").write_text("large")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    return tmp_path


def test_result_is_uploaded_without_its_checkpoints(server, result, capsys):
    upload(result, "me/leaves")
    paths = [path for path, _, _ in server.asked]
    assert paths[0] == "/api/repos/create" and any("/me/leaves/commit/main" in path for path in paths)
    committed = next(body for path, body, _ in server.asked if "/commit/" in path).decode()
    assert "config.json" in committed and "README.md" in committed and "state.pt" not in committed
    assert {token for _, _, token in server.asked} == {"Bearer hf_ours"}
    assert "uploaded to" in capsys.readouterr().out


def test_refused_upload_keeps_the_result_and_says_how_to_go_on(server, result, capsys):
    server.refuses = True
    with pytest.raises(SystemExit) as end:
        upload(result, "me/leaves")
    told = capsys.readouterr().err
    assert end.value.code == 1 and told.count("\n") == 1
    assert "403" in told and f"huggingface-cli upload me/leaves {result}" in told
    assert (result / "config.json").exists()
