"""The index is killed, starved of disk, damaged and fought over; every search answers from one complete index.

The processes that are killed are forked from a server that has the libraries loaded, so that a run takes a fraction of
a second; they run the real scripts, and die by SIGKILL.
"""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DOCUMENTS, REPOSITORY, exit_status, write_documents

import config
import generate_embeddings
import semantic_search
from generate_embeddings import load_index
from prepare_finetuning_data import text_for_model
from run_finetuning import Encoder, load_model, save_model

MODES = ["semantic", "keyword", "hybrid", "task"]
FILE_EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.listdir",
    "sqlite3.connect",
    "shutil.copyfile",
}


@pytest.fixture(scope="module")
def server():
    """Processes forked from one that has loaded what the scripts load."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "test_index_safety", "faiss", "onnxruntime", "sentence_transformers"])
    return context


def child(work, output, kill_at: int | None, file_limit: int | None, backups: int) -> None:
    """Run work() as a script's guard does and print into a pipe; with kill_at, die at that file operation."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    config.INDEX_BACKUPS = backups
    events = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal events
        if event in FILE_EVENTS:
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.addaudithook(watch)
    try:
        config.run(work)
    finally:
        os.write(2, f"\nevents {events}\n".encode())


class Script:
    """One of the scripts' mains with its arguments, to be sent to a process."""

    def __init__(self, main, arguments):
        self.main, self.arguments = main, [str(argument) for argument in arguments]

    def __call__(self):
        return self.main(self.arguments)


class Saving:
    """run_finetuning.py's saving of a model that is a little different each time."""

    def __init__(self, chain, folder: Path, number: int):
        self.base, self.folder, self.number = chain.base, folder, number
        self.evaluation = json.loads((chain.model / "evaluation.json").read_text(encoding="utf-8"))

    def __call__(self):
        model = load_model(self.base, "cpu")
        model.get_submodule("0").auto_model.pooler.dense.bias.data += self.number
        save_model(model, self.folder, self.evaluation, ["bir metin", "a second text"])


def start(server, work, kill_at=None, file_limit=None, backups=2):
    """Start work in a process of its own; return the process and the pipe that it prints into."""
    output, end = server.Pipe(duplex=False)
    process = server.Process(target=child, args=(work, end, kill_at, file_limit, backups))
    process.start()
    end.close()
    return process, output


def finish(process, output) -> SimpleNamespace:
    """Wait for a process; return its exit status, what it printed and how many file operations it took."""
    printed = b""
    while part := os.read(output.fileno(), 65536):
        printed += part
    process.join(120)
    printed = printed.decode(errors="replace")
    events = re.search(r"^events (\d+)$", printed, re.M)
    return SimpleNamespace(status=process.exitcode, printed=printed, events=int(events[1]) if events else None)


def run(server, work, kill_after=None, **limits) -> SimpleNamespace:
    """Run work in a process of its own, killed after some seconds or at a file operation."""
    started = time.perf_counter()
    process, output = start(server, work, **limits)
    if kill_after is not None:
        process.join(kill_after)
        os.kill(process.pid, signal.SIGKILL) if process.is_alive() else None
    done = finish(process, output)
    done.seconds = time.perf_counter() - started
    return done


@pytest.fixture
def place(tmp_path, chain):
    """A project whose every document names its version, and the arguments to build its index."""
    root, index = tmp_path / "project", tmp_path / "index"
    model = shutil.copytree(chain.model, tmp_path / "model")
    write_version(root, 0)
    arguments = ["--documents-root", root, "--documents", "**/*.md", "--model", model, "--index-dir", index]
    assert exit_status(generate_embeddings.main, arguments) == 0
    build = Script(generate_embeddings.main, arguments)
    return SimpleNamespace(root=root, index=index, model=model, build=build)


def write_version(root: Path, version: int) -> None:
    """Write the documents, a sentence with the version in each; every third goes missing in odd versions."""
    for place, (name, text) in enumerate(sorted(DOCUMENTS.items())):
        if place % 3 == 0 and version % 2:
            (root / name).unlink(missing_ok=True)
        else:
            write_documents(root, {name: f"{text}\n## Sürüm\n\nBu belge sürüm{version} olarak {place} yazıldı.\n"})


def version_of(index_dir: Path) -> int:
    """Return the version that an index holds, after a check that all of its parts belong together."""
    index = load_index(index_dir)
    versions = {int(number) for one in index.passages for number in re.findall(r"sürüm(\d+)", one["text"])}
    assert len(versions) == 1
    (version,) = versions
    assert index.vectors.ntotal == len(index.passages) == index.header["passage_count"]
    texts = [text_for_model(one["heading"], one["text"]) for one in index.passages]
    vectors = index.vectors.reconstruct_n(0, len(texts))
    assert np.allclose(index.encoder.encode(texts), vectors, atol=1e-5)
    places, _ = index.keywords.places_and_counts("exact", f"surum{version}", f"surum{version}")
    assert places.tolist() == [at for at, one in enumerate(index.passages) if f"sürüm{version}" in one["text"]]
    sources = {one["source_file"] for one in index.passages}
    assert sources <= set(index.header["documents"])
    return version


def answers(index_dir: Path, capsys) -> int:
    """Search in every mode with the real script; return the version that the answers come from."""
    capsys.readouterr()
    for mode in MODES:
        arguments = ["--json", "--mode", mode, "--top-k", "50", "--index-dir", str(index_dir), "sürüm belge yazıldı"]
        assert exit_status(semantic_search.main, arguments) == 0
    printed = capsys.readouterr()
    versions = {int(number) for number in re.findall(r"sürüm(\d+)", printed.out)}
    assert len(versions) == 1
    return versions.pop()


def moments(total: float, count: int) -> list[float]:
    return [total * (place + 0.5) / count for place in range(count)]


# ------------------------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("by", ["time", "file operation"])
def test_a_build_killed_at_any_moment_leaves_the_old_index_or_the_new_one(server, place, capsys, by):
    write_version(place.root, 1)
    whole = run(server, place.build)  # the first pays for the server's start
    assert whole.status == 0, whole.printed
    write_version(place.root, 2)
    whole = run(server, place.build)
    assert whole.status == 0 and version_of(place.index) == 2
    current, killed, committed = 2, 0, 0
    total = whole.seconds if by == "time" else whole.events
    for version, moment in enumerate(moments(total, 40), 3):
        write_version(place.root, version)
        limit = {"kill_after": moment} if by == "time" else {"kill_at": max(1, round(moment))}
        done = run(server, place.build, **limit)
        assert done.status in (0, -signal.SIGKILL), done.printed
        killed += done.status != 0
        found = version_of(place.index)
        assert found in ((current, version) if done.status else (version,))
        assert answers(place.index, capsys) == found
        committed += found == version and done.status != 0
        current = found
    assert killed >= (15 if by == "time" else 40)  # the clock's moments may fall behind the end of a quick run
    assert by == "time" or 0 < committed < killed
    write_version(place.root, version + 1)
    assert run(server, place.build).status == 0 and version_of(place.index) == version + 1
    assert not [path.name for path in place.index.iterdir() if path.name.endswith(".new")]
    assert len(list(place.index.glob("embeddings-*"))) == 3


def test_restoring_killed_at_any_moment_leaves_the_current_index_or_the_one_before(server, place):
    for version in (1, 2):
        write_version(place.root, version)
        assert run(server, place.build).status == 0
    kept = shutil.copytree(place.index, place.index.with_name("kept"))
    restore = Script(generate_embeddings.main, ["--index-dir", place.index, "--restore"])
    events = run(server, restore).events
    assert version_of(place.index) == 1
    found = set()
    for moment in range(1, events + 1, max(1, events // 15)):
        shutil.rmtree(place.index)
        shutil.copytree(kept, place.index)
        assert run(server, restore, kill_at=moment).status == -signal.SIGKILL
        found.add(version_of(place.index))
    assert found == {1, 2}


@pytest.mark.slow
def test_saving_a_model_killed_at_any_moment_leaves_search_with_the_index_s_model(server, place, chain, capsys):
    for _ in range(2):  # the second one has a <name>.previous to replace, as all later ones have
        whole = run(server, Saving(chain, place.model, 0))
        assert whole.status == 0, whole.printed
    assert run(server, place.build).status == 0
    written = 0
    # The last file operations swap the folders; how many there are differs a little from run to run.
    last = range(whole.events - 18, whole.events + 1, 2)
    killed = 0
    for number, moment in enumerate([*moments(whole.events - 20, 10), *last], 1):
        for leftover in place.model.parent.glob(".*.new"):
            shutil.rmtree(leftover)  # else its removal, too, counts as file operations
        done = run(server, Saving(chain, place.model, number), kill_at=max(1, round(moment)))
        assert done.status in (0, -signal.SIGKILL), done.printed
        killed += done.status != 0
        assert version_of(place.index) == answers(place.index, capsys) == 0
        config.restore_previous(place.model)
        Encoder(place.model)
        load_model(place.model, "cpu")
        written += run(server, place.build).printed.count("the model changed")
    assert killed >= 15 and 0 < written < 15
    assert run(server, Saving(chain, place.model, 99)).status == 0
    assert version_of(place.index) == 0
    assert not list(place.model.parent.glob(".*.new"))


# ----------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_is_one_line_and_leaves_the_old_index(server, place, capsys):
    sizes = sorted(path.stat().st_size for path in place.index.iterdir())
    write_version(place.root, 1)
    refused = 0
    for limit in [0, *(size * part // 8 for size in sizes for part in (1, 4, 7))]:
        done = run(server, place.build, file_limit=limit)
        errors = [line for line in done.printed.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in done.printed
        assert (done.status, len(errors)) in ((2, 1), (0, 0)), done.printed
        refused += done.status == 2
        assert version_of(place.index) == answers(place.index, capsys) == (0 if done.status else 1)
        if done.status == 0:
            break
    assert refused >= 5
    assert run(server, place.build).status == 0 and version_of(place.index) == 1


def test_a_full_disk_while_a_model_is_saved_leaves_the_model(server, place, chain):
    Saving(chain, saved := place.model.parent / "saved", 1)()
    sizes = [path.stat().st_size for path in saved.rglob("*") if path.is_file()]
    for limit in (0, max(sizes) // 2, max(sizes) - 1):
        done = run(server, Saving(chain, place.model, 1), file_limit=limit)
        assert done.status == 2 and "Traceback" not in done.printed, done.printed
        assert version_of(place.index) == 0


# --------------------------------------------------------------------------------------- writers and readers


def read_for(index_dir: Path, seconds: float, log: Path) -> None:
    """Search again and again, each time as a new process would; write what went wrong."""
    wrong = []
    until = time.monotonic() + seconds
    count = 0
    while time.monotonic() < until:
        for mode in MODES:
            index = load_index(index_dir)
            time.sleep(0.01)  # so that indexes are committed between the opening of one and its use
            results = semantic_search.search(index, "sürüm belge yazıldı", semantic_search.Request(mode, 50))["results"]
            versions = {number for one in results for number in re.findall(r"sürüm(\d+)", one["text"])}
            count += 1
            if len(versions) != 1:
                wrong.append([mode, sorted(versions)])
    log.write_text(json.dumps({"count": count, "wrong": wrong}), encoding="utf-8")


@pytest.mark.slow
def test_two_writers_and_ten_readers_for_a_minute_see_whole_indexes_only(server, place, tmp_path):
    logs = [tmp_path / f"reader{number}" for number in range(10)]
    readers = [server.Process(target=read_for, args=(place.index, 60, log)) for log in logs]
    for reader in readers:
        reader.start()
    version = 0
    while any(reader.is_alive() for reader in readers):
        version += 1
        write_version(place.root, version)
        for done in [finish(*writer) for writer in [start(server, place.build, backups=0) for _ in range(2)]]:
            assert done.status in (0, 2) and "Traceback" not in done.printed, done.printed
            assert (done.status == 2) == ("is writing" in done.printed), done.printed
    assert version >= 3
    for reader, log in zip(readers, logs, strict=True):
        assert reader.exitcode == 0
        seen = json.loads(log.read_text(encoding="utf-8"))
        assert seen["count"] > 0 and seen["wrong"] == []
    assert version_of(place.index) == version


# ------------------------------------------------------------------------------------ several processes embed


def torchrun(*arguments) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    return [*command, str(REPOSITORY / "generate_embeddings.py"), *map(str, arguments)]


def test_two_processes_write_the_same_index_as_one(tmp_path, chain):
    root = write_documents(tmp_path / "project", {"a.md": many_passages(1400)})
    arguments = ["--documents-root", root, "--documents", "*.md", "--model", chain.model, "--index-dir"]
    assert exit_status(generate_embeddings.main, [*arguments, tmp_path / "one"]) == 0
    done = subprocess.run(torchrun(*arguments, tmp_path / "two"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = load_index(tmp_path / "one"), load_index(tmp_path / "two")
    assert list(one.passages) == list(two.passages) and len(one.passages) == 1400
    assert one.header["files"]["embeddings"][2] == two.header["files"]["embeddings"][2]
    again = subprocess.run(torchrun(*arguments, tmp_path / "two"), capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "is current" in again.stdout


def many_passages(count: int) -> str:
    words = ["bir", "iki", "üç", "dört", "beş", "altı", "yedi", "sekiz", "dokuz", "on"]
    paragraphs = (f"## {n}\n\nParagraf {n} {' '.join(words[int(c)] for c in str(n * 7919))}\n" for n in range(count))
    return "# Yeni\n\n" + "\n".join(paragraphs)


def test_a_process_that_dies_ends_the_run_with_an_error_and_the_old_index_stays(place):
    write_documents(place.root, {"yeni.md": many_passages(40_000)})
    before = place.index.joinpath("metadata.json").read_bytes()
    launcher = subprocess.Popen(
        torchrun(*place.build.arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until = time.monotonic() + 90
    while not list(place.index.glob("unfinished-*")) and launcher.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    (second,) = (pid for pid in children_of(launcher.pid) if environment_of(pid).get("RANK") == "1")
    os.kill(second, signal.SIGKILL)
    printed, _ = launcher.communicate(timeout=90)
    assert launcher.returncode != 0, printed
    assert place.index.joinpath("metadata.json").read_bytes() == before
    assert version_of(place.index) == 0


def children_of(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in path.read_text().split()]


def environment_of(process: int) -> dict[str, str]:
    entries = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
