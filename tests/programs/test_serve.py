"""vit_predict.py --serve, by HTTP in this process and, if there is one, by a real browser."""

import base64
import http.client
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import zlib

import pytest
from browser import needs_chromium, scroll_widths, shown
from helpers import ROOT, save_tiny_vit, write_image
from PIL import Image

import vit_predict
from vit.classify import Classifier, Found
from vit.serve import MOST_BYTES, Server

NAMES = dict(enumerate(["ant", "<b>bee</b>", "<b>cat</b>", "dog", "emu", "fly"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    labels = {name: i for i, name in NAMES.items()}
    save_tiny_vit(root / "model", labels=6, id2label=NAMES, label2id=labels)
    for i in range(2):
        write_image(root / f"{i}.png", i, i)
    return root


@pytest.fixture(scope="module")
def classifier(folder):
    return Classifier(str(folder / "model"))


@pytest.fixture
def server(classifier):
    server = Server(classifier, "a <i>model</i>", 0)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server, method="POST", path="/classify", body=None, **headers):
    """-> status, answer: JSON or text"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    is_json = answer.headers["Content-Type"].startswith("application/json")
    return answer.status, json.loads(text) if is_json else text


def test_an_image_gets_what_the_classifier_says(server, folder):
    (expected,) = server.classifier.predict([Found(folder / "0.png")], 5, 1)
    status, answer = ask(server, body=(folder / "0.png").read_bytes())
    assert status == 200
    assert [(one["label"], one["probability"]) for one in answer["predictions"]] == expected.best
    assert len(expected.best) == 5


def huge_png() -> bytes:
    """A few bytes whose header says 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_bad_image_is_named_and_the_next_one_is_answered(server, folder):
    good = (folder / "1.png").read_bytes()
    bad = {
        b"no image": "cannot be read: is no image, or of an unknown format",
        good[:100]: "cannot be read: ",
        huge_png(): "cannot be read: ",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "cannot be read: is of format EPS",
    }
    for encoded, problem in bad.items():
        status, answer = ask(server, body=encoded)
        assert status == 200 and answer["problem"].startswith(problem), answer
        assert "predictions" in ask(server, body=good)[1]


def test_an_image_of_many_pixels_is_not_decoded(server, monkeypatch):
    monkeypatch.setattr("vit.serve.MOST_PIXELS", 10**6)
    encoded = io.BytesIO()
    Image.new("L", (1001, 1000)).save(encoded, "PNG")
    assert "has 1001 x 1000 pixels, more than 1 M" in ask(server, body=encoded.getvalue())[1]["problem"]


def test_an_error_of_the_model_is_an_answer(server, folder, monkeypatch):
    monkeypatch.setattr(server.classifier, "predict", lambda *_: 1 / 0)
    status, answer = ask(server, body=(folder / "0.png").read_bytes())
    assert status == 500 and answer["problem"] == "cannot be classified: division by zero"
    monkeypatch.undo()
    assert ask(server, body=(folder / "0.png").read_bytes())[0] == 200


@pytest.mark.parametrize("length", [MOST_BYTES + 1, 0, -1])
def test_what_is_too_large_or_empty_is_not_read(server, length):
    status, answer = ask(server, **{"Content-Length": str(length)})
    assert status == 413 and answer["problem"].startswith(f"the file has {length} bytes, allowed")
    assert ask(server, "GET", "/")[0] == 200


def test_a_request_without_its_length_is_refused(server):
    assert ask(server, **{"Transfer-Encoding": "chunked"})[0] == 411
    assert ask(server, **{"Content-Length": "many"})[0] == 411


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # whose name was made to point to 127.0.0.1
        {"Host": "127.0.0.1.evil.example:8000"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
def test_pages_of_others_are_refused(server, folder, headers):
    body = (folder / "0.png").read_bytes()
    for method, path in (("GET", "/"), ("POST", "/classify")):
        status, answer = ask(server, method, path, body, **headers)
        assert status == 403 and answer["problem"].endswith("this page is for 127.0.0.1 only")


def test_the_names_of_this_machine_are_accepted_with_any_port(server, folder):
    body = (folder / "0.png").read_bytes()
    for host in ("127.0.0.1:1", "localhost:9000", "localhost"):
        assert ask(server, body=body, Host=host, Origin=f"http://{host}")[0] == 200


def test_the_page_is_whole_and_escaped(server):
    status, page = ask(server, "GET", "/")
    assert status == 200 and "<h1>a &lt;i&gt;model&lt;/i&gt;</h1>" in page
    assert "http:" not in page and "https:" not in page and "src=" not in page
    assert ask(server, "GET", "/etc/passwd")[0] == ask(server, "POST", "/", b"x")[0] == 404


def test_the_address_is_of_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"


@needs_chromium
def test_a_browser_shows_what_is_dropped_pasted_and_chosen(server, folder, tmp_path):
    server.page = server.page.replace("</script>", give_script(folder) + "</script>")
    page = shown(f"http://127.0.0.1:{server.server_port}/", 10000)
    assert ">4 images</p>" in page
    assert page.count('class="bar"') == 3 * 5
    assert "&lt;b&gt;" in page and "<b>bee</b>" not in page and "<b>cat</b>" not in page
    places = [page.index(f">{name}<") for name in ("chosen.png", "pasted.png", "&lt;0&gt;.png", "1.png")]
    assert places == sorted(places)  # the newest first, those of one drop in their order
    assert "cannot be read: is no image" in page
    assert all(found <= width for width, found in scroll_widths(page, tmp_path).items())


def give_script(folder) -> str:
    """Drops an image and a file that is none on the page, pastes an image, and chooses one."""
    content = {"image": (folder / "0.png").read_bytes(), "none": b"no image"}
    texts = {name: base64.b64encode(value).decode() for name, value in content.items()}
    return (
        """
    function files(...given) {
      const transfer = new DataTransfer();
      for (const [name, text] of given)
        transfer.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name));
      return transfer;
    }
    const data = DATA;
    const dropped = files(["<0>.png", data.image], ["1.png", data.none]);
    document.dispatchEvent(new DragEvent("drop", {dataTransfer: dropped, cancelable: true}));
    const pasted = files(["pasted.png", data.image]);
    document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: pasted}));
    input.files = files(["chosen.png", data.image]).files;
    input.dispatchEvent(new Event("change"));
    """
    ).replace("DATA;", json.dumps(texts) + ";")


def test_ctrl_c_ends_the_program_with_a_line_and_nothing_is_written(folder):
    before = sorted(folder.rglob("*"))
    words = [sys.executable, str(ROOT / "vit_predict.py"), "--model", "model", "--serve", "0"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=folder, **streams) as program:
        address = program.stdout.readline()
        port = int(address.split("/")[2].partition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/classify", (folder / "0.png").read_bytes())
        assert "predictions" in json.loads(connection.getresponse().read())
        os.kill(program.pid, signal.SIGINT)
        out, err = program.communicate(timeout=60)
    assert (program.returncode, out, err) == (0, "stopped\n", "")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--serve", "0", "--export", "onnx"], "--export with --serve: takes no images, and stands alone"),
        (["images", "--serve"], "--serve: takes no images, and stands alone"),
        (["--serve", "65536"], "--serve 65536: must be a port from 0 to 65535"),
        (["--serve", "here"], "argument --serve: invalid int value: 'here'"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        vit_predict.main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_taken_port_is_one_line(server, folder, capsys):
    with pytest.raises(SystemExit) as end:
        vit_predict.main(["--model", str(folder / "model"), "--serve", str(server.server_port)])
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    taken = f"error: --serve {server.server_port}: Address already in use"
    assert line == f"{taken}; name another port, such as --serve 0"
