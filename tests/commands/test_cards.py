"""What goes beside packed weights: a card, what the original's folder says of its use, and the way to the hub."""

import base64
import http.server
import json
import threading

import pytest
import yaml
from typer.testing import CliRunner

from marlin_cli.api import AnsweringModel, ContinuingModel
from marlin_cli.cli import app
from marlin_cli.commands.hub import check_push, push
from marlin_cli.errors import OutputError, UsageError
from marlin_cli.ops.device import choose_device
from marlin_cli.quantization.card import MOST_CARRIED_BYTES, carried_files
from tests.small_networks import ANSWERING, CONTINUING, random_weights


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    ContinuingModel(random_weights(CONTINUING["megabyte"]), choose_device("cpu")).save(folder)
    return folder


def quantize(*arguments):
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def parts_of(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_was_done_and_how_to_load_it(model, tmp_path):
    quantize(model, "-o", tmp_path / "packed")
    head, body = parts_of((tmp_path / "packed" / "README.md").read_text())
    assert head["library_name"] == "mlx" and head["pipeline_tag"] == "text-generation" and "base_model" not in head
    assert {"marlin", "megabyte", "nvfp4", "mxfp8"} <= set(head["tags"])
    assert "method mse" in body and "| global | nvfp4 |" in body and "mx.quantized_matmul" in body
    assert "What it costs" not in body


def test_names_stay_text_in_a_card(model, tmp_path):
    named = model.rename(tmp_path / "<b>[x](y)`z`")
    quantize(named, "-o", tmp_path / "packed")
    body = parts_of((tmp_path / "packed" / "README.md").read_text())[1]
    assert "# \\<b>\\[x\\](y)\\`z\\`, packed\n" in body and "[x](y)" not in body and "`<b>" not in body


def test_a_method_out_of_a_file_stays_text_in_a_card(model, tmp_path):
    quantize(model, "-o", tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["marlin"]["method"] = "\x1b[31m\n# <b>more"
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    ContinuingModel.from_pretrained(tmp_path / "packed", device="cpu").save(tmp_path / "copy")
    text = (tmp_path / "copy" / "README.md").read_text()
    assert "\x1b" not in text and "\n# <b>" not in text and "# \\<b>more" in text


def test_licence_and_settings_of_generation_are_carried(model, tmp_path):
    (model / "README.md").write_text("---\nlicense: cc-by-4.0\nlanguage: [cs, en]\nsecret: no\n---\n# A model\n")
    (model / "LICENSE.txt").write_text("as you like")
    (model / "generation_config.json").write_text("{}")
    (model / "notes.txt").write_text("mine")
    for steps in ([], ["--sequential", "--sequential-bytes", "1k"]):
        quantize(model, "-o", tmp_path / "packed", "--overwrite", *steps)
        names = {file.name for file in (tmp_path / "packed").iterdir()}
        assert names == {"config.json", "model.safetensors", "README.md", "LICENSE.txt", "generation_config.json"}
        head, _ = parts_of((tmp_path / "packed" / "README.md").read_text())
        assert (head["license"], head["language"], "secret" in head) == ("cc-by-4.0", ["cs", "en"], False)


@pytest.mark.parametrize("card", ["---\n- : {\n---\n", "---\nlicense: {a: 1}\n---\n", "no head", "---\nlicense: mit"])
def test_a_card_that_cannot_be_read_is_no_failure(model, tmp_path, card):
    (model / "README.md").write_text(card)
    quantize(model, "-o", tmp_path / "packed")
    head, _ = parts_of((tmp_path / "packed" / "README.md").read_text())
    assert head.get("license") in (None, "mit")


def test_large_files_and_those_of_other_folders_are_left(model, tmp_path):
    (model / "LICENSE").write_bytes(bytes(MOST_CARRIED_BYTES + 1))
    (model / "NOTICE").mkdir()
    (tmp_path / "LICENSE").write_text("of something else")
    (tmp_path / "model.pt").touch()
    assert carried_files(model) == carried_files(tmp_path / "model.pt") == {}


def test_the_base_is_named_where_it_came_from_the_hub(model, tmp_path, monkeypatch):
    monkeypatch.setattr("marlin_cli.checkpoints.location._fetch", lambda repository, name: model)
    quantize("hf:owner/name", "-o", tmp_path / "packed")
    head, body = parts_of((tmp_path / "packed" / "README.md").read_text())
    assert (head["base_model"], head["base_model_relation"]) == ("owner/name", "quantized")
    assert body.startswith("\n# owner/name, packed\n")


def test_measured_costs_stand_in_the_card(model, tmp_path, monkeypatch):
    monkeypatch.setattr("marlin_cli.commands.measured_card.SCORED_BYTES", 400)
    result = quantize(model, "-o", tmp_path / "packed", "--measure")
    _, body = parts_of((tmp_path / "packed" / "README.md").read_text())
    cost = body.partition("## What it costs\n\n")[2].partition("\n")[0]
    assert cost.startswith("On ") and "more +" in cost.replace("more -", "more +") and "KL 0." in cost
    assert cost in result.stderr


def test_a_model_that_answers_has_a_card_too(tmp_path):
    AnsweringModel(random_weights(ANSWERING["byt5"]), choose_device("cpu")).save(tmp_path / "model")
    quantize(tmp_path / "model", "-o", tmp_path / "packed")
    assert parts_of((tmp_path / "packed" / "README.md").read_text())[0]["pipeline_tag"] == "text2text-generation"


def test_every_writer_of_a_folder_gives_it_a_card(model, tmp_path):
    head, body = parts_of((model / "README.md").read_text())  # of save
    assert head["tags"] == ["marlin", "mlx", "byte-level", "megabyte"] and "A MegaByte over bytes" in body
    assert "packed as the table" not in body
    (model / "NOTICE").write_text("of its makers")
    quantize(model, "-o", tmp_path / "packed", "--bits", "4")
    quantize(tmp_path / "packed", "-o", tmp_path / "plain", "--dequantize")
    head, body = parts_of((tmp_path / "plain" / "README.md").read_text())
    assert "from `packed`, with 16-bit weights." in body and body.startswith("\n# packed, unpacked\n")
    assert (tmp_path / "plain" / "NOTICE").read_text() == "of its makers"


def test_an_exported_folder_says_its_own_form(tmp_path):
    AnsweringModel(random_weights(ANSWERING["byt5"]), choose_device("cpu")).save(tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text("as you like")
    quantize(tmp_path / "model", "-o", tmp_path / "packed", "--export", "compressed-tensors", "--bits", "4", "--wo-bits", "4")
    head, body = parts_of((tmp_path / "packed" / "README.md").read_text())
    assert "nvfp4" in head["tags"] and "in the form of compressed-tensors" in body and "mlx-lm's convention" not in body
    assert (tmp_path / "packed" / "LICENSE").is_file()


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for: weights go to a store of large files, the rest with the commit."""

    def do_POST(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuses:
            return self._answer(403, {"error": "not yours"})
        if self.path == "/api/repos/create":
            return self._answer(200, {"url": f"{self.server.here}/owner/name", "id": "owner/name"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            ways = [{"path": file["path"], "uploadMode": way_of(file["path"]), "shouldIgnore": False} for file in files]
            return self._answer(200, {"files": ways})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [{**each, **self.server.says(each["oid"])} for each in json.loads(body)["objects"]]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        assert "/commit/" in self.path
        for line in body.splitlines():
            document = json.loads(line)
            if document["key"] == "file":
                self.server.files[document["value"]["path"]] = base64.b64decode(document["value"]["content"])
            if document["key"] == "lfsFile":
                self.server.files[document["value"]["path"]] = self.server.stored[document["value"]["oid"]]
        commit = f"{self.server.here}/owner/name/commit/abc"
        return self._answer(200, {"commitUrl": commit, "commitOid": "abc", "hookOutput": ""})

    def do_PUT(self):
        self.server.stored[self.path[1:]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, {})

    def do_GET(self):
        if self.server.refuses:
            return self._answer(403, {"error": "not yours"})
        self._answer(200, {"id": "owner/name", "sha": "0" * 40, "siblings": [], "private": False, "tags": []})

    def _answer(self, code, document):
        data = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def way_of(name):
    return "lfs" if name.endswith(".safetensors") else "regular"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # which nothing here speaks
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.asked, server.files, server.stored, server.refuses = [], {}, {}, False
    server.here = f"http://127.0.0.1:{server.server_port}"
    server.says = lambda oid: {"actions": {"upload": {"href": f"{server.here}/{oid}"}}}
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.here)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_all_files_of_the_folder_are_sent(hub, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    push(tmp_path, "owner/name", token="hf_mine")
    assert hub.files == {"config.json": b"{}", "README.md": b"a card", "model.safetensors": bytes(range(256))}
    assert hub.asked[0] == ("/api/repos/create", "Bearer hf_mine")
    assert "commit/abc" in capsys.readouterr().err


def test_what_the_hub_refuses_is_said_in_a_line(hub, tmp_path):
    hub.refuses = True
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"--push owner/name: the hub did not take .*, which stays there: .*403"):
        push(tmp_path, "owner/name", token="hf_mine")


def test_weights_that_find_no_room_are_said_in_a_line(hub, tmp_path):
    hub.says = lambda oid: {"error": {"code": 422, "message": "no room"}}
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(OutputError, match="--push owner/name: the hub did not take .*, which stays there: .*no room"):
        push(tmp_path, "owner/name", token="hf_mine")


def test_what_is_no_hub_is_said_in_a_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeHub, "do_POST", lambda self: self._answer(200, ["a page of somebody else"]))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"which stays there: it answered as no hub does \(TypeError: list indices"):
        push(tmp_path, "owner/name", token="hf_mine")


def test_without_a_token_nothing_is_packed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    result = CliRunner().invoke(app, ["quantize", str(model), "-o", str(tmp_path / "packed"), "--push", "owner/name"])
    assert isinstance(result.exception, UsageError) and "needs a token of yours" in str(result.exception)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("name", ["name", "a/b/c", "/name", "owner/", "../x", ""])
def test_what_is_no_repository_is_refused(name):
    with pytest.raises(UsageError, match="is no owner/name"):
        check_push(name)
