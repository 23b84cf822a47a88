#!/usr/bin/env python3
"""Embed every passage of the target documents and write the search index.  (step 3 of 4)

    1. prepare_finetuning_data.py   documents        -> fine_tuning_data/
    2. run_finetuning.py            fine_tuning_data -> fine_tuned_model/<name>/
    3. generate_embeddings.py       documents, model -> embeddings/
    4. semantic_search.py           embeddings       -> answers

    python generate_embeddings.py
    python generate_embeddings.py --documents-root ~/project --documents 'docs/**/*.md' --model packaged
    python generate_embeddings.py --check        # is the index current? changes nothing
    python generate_embeddings.py --restore      # go back to the index before

Only passages that are new are embedded; the others keep their vectors. Files written to config.INDEX_DIR:
    metadata.json            the commit mark, replaced last and in one step; names the files that belong to it
    embeddings-<id>.index    FAISS, inner product of normalised vectors; vector i is passages[i] of metadata.json
    keywords-<id>.sqlite     SQLite FTS5 over folded words; rowid i + 1 is passages[i]
    metadata-<id>.json       an earlier index kept as a backup, with its two files (config.INDEX_BACKUPS)
    encoder-<fingerprint>/   the ONNX form of a model whose own folder has none (a base model)

metadata.json: {"checksum": SHA-256 of all lines below the first, "format": 2, "id", "created", "documents_root",
"max_passage_chars", "passage_count", "documents": {source_file: [bytes, modified in ns, SHA-256]}, "model": {"name",
"folder" relative to the index, "fingerprint", "onnx": [bytes, modified in ns, SHA-256]}, "search": {"semantic_weight"}
(as the model's evaluation.json has it, or {}), "dimensions", "files": {"embeddings" or "keywords": [name, bytes,
SHA-256]}, "passages": [{"id", "source_file", "also_in": [other files with the same text], "heading": [path],
"chunk_index", "start_line", "end_line", "text", "hash"}, one a line]}
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shutil
import sqlite3
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import orjson
from filelock import FileLock, Timeout
from tqdm import tqdm

import config
from config import UserError, remove, replacing, restore_previous
from prepare_finetuning_data import (
    Passage,
    add_document_options,
    find_documents,
    find_model,
    read_passages,
    sha256_of,
    text_for_model,
)
from run_finetuning import Encoder, export_onnx, load_model, model_fingerprint, read_json, write_keywords

FORMAT = 2
METADATA = "metadata.json"

# ----------------------------------------------------------------------------------------- the passages


def distinct_passages(passages: list[Passage]) -> list[dict]:
    """Return metadata records, one for each distinct text under one heading path, with the other files that have it."""
    records: dict[str, dict] = {}
    for passage in passages:
        digest = hashlib.sha256("\n".join([*passage.heading, passage.text]).encode()).hexdigest()[:32]
        record = records.get(digest)
        if record is None:
            records[digest] = {
                "id": digest[:16],
                "source_file": passage.source_file,
                "also_in": [],
                "heading": list(passage.heading),
                "chunk_index": passage.chunk_index,
                "start_line": passage.start_line,
                "end_line": passage.end_line,
                "text": passage.text,
                "hash": digest,
            }
        elif passage.source_file not in (record["source_file"], *record["also_in"]):
            record["also_in"].append(passage.source_file)
    return list(records.values())


# ------------------------------------------------------------------------------------------ the encoder


def prepare_encoder(folder: Path, fingerprint: str, index_dir: Path) -> dict:
    """Return where the ONNX form of a model is, exporting it into the index folder if the model has none."""
    if not onnx_file(folder).is_file():
        source, folder = folder, index_dir / f"encoder-{fingerprint[:12]}"
        if not folder.is_dir():
            model = load_model(source, "cpu")
            with replacing(folder) as temporary:
                model.save_pretrained(str(temporary), safe_serialization=True)
                export_onnx(model, temporary, ["a short text", "bir başka, biraz daha uzun metin"])
                remove(temporary / "model.safetensors")  # the ONNX file holds the weights
    return {"folder": os.path.relpath(folder.resolve(), index_dir.resolve()), "onnx": file_state(onnx_file(folder))}


def onnx_file(folder: Path) -> Path:
    return folder / "onnx" / "model.onnx"


def file_state(path: Path) -> list:
    """Return [bytes, modified in ns, SHA-256] of a file."""
    return [path.stat().st_size, path.stat().st_mtime_ns, sha256_of(path)]


def file_changed(path: Path, state: list) -> bool:
    """Tell whether a file differs from its recorded state; its content is read only where size and time leave doubt."""
    try:
        now = path.stat()
    except OSError:
        return True
    return now.st_size != state[0] or (now.st_mtime_ns != state[1] and sha256_of(path) != state[2])


def load_encoder(model: dict, index_dir: Path) -> Encoder:
    """Load the encoder an index was made with; model is the record of it in metadata.json.

    Raises:
        UserError: the model is gone or has changed since, so that its vectors and the index's do not belong together.
    """
    folder = index_dir / model["folder"]
    restore_previous(folder)
    if file_changed(onnx_file(folder), model["onnx"]):
        raise UserError(
            f"the model {model['name']} is gone or has changed since {index_dir} was made;"
            " run generate_embeddings.py again (keyword search still works: --mode keyword)"
        )
    return Encoder(folder, threads=1)


# -------------------------------------------------------------------------------------------- the vectors

EMBED_AT_ONCE = 512  # passages; after each lot an interrupted run can go on


def embed(records: list[dict], known: dict[str, np.ndarray], model: dict, index_dir: Path) -> tuple[np.ndarray, int]:
    """Return the vectors of all records, float32 of shape (records, dimensions), and how many were not known.

    known: vectors by hash, from the index before. Long runs leave what they have in unfinished-*.npz for the next.
    """
    known = known | unfinished_vectors(index_dir, model)
    missing = [record for record in records if record["hash"] not in known]
    if missing:
        encoder = Encoder(index_dir / model["folder"])
        missing.sort(key=lambda record: len(record["text"]))
    with tqdm(total=len(missing), desc="embedding", unit="passage", disable=None) as bar:
        for start in range(0, len(missing), EMBED_AT_ONCE):
            part = missing[start : start + EMBED_AT_ONCE]
            vectors = encoder.encode([text_for_model(record["heading"], record["text"]) for record in part])
            hashes = [record["hash"] for record in part]
            known |= zip(hashes, vectors, strict=True)
            if len(missing) > EMBED_AT_ONCE:
                name = f"unfinished-{model['fingerprint'][:12]}-{hashes[0]}.npz"
                with replacing(index_dir / name) as temporary, temporary.open("wb") as file:
                    np.savez(file, hashes=np.array(hashes), vectors=vectors)
            bar.update(len(part))
    return np.stack([known[record["hash"]] for record in records]), len(missing)


def known_vectors(index_dir: Path, model: dict) -> dict[str, np.ndarray]:
    """Return the vectors of the index before by passage hash, if the same model made them."""
    with contextlib.suppress(UserError):
        before = load_index(index_dir)
        if before.header["model"]["fingerprint"] == model["fingerprint"]:
            vectors = before.vectors.reconstruct_n(0, len(before.passages))
            return {record["hash"]: vector for record, vector in zip(before.passages, vectors, strict=True)}
    return {}


def unfinished_vectors(index_dir: Path, model: dict) -> dict[str, np.ndarray]:
    """Return what an interrupted run has embedded with the same model, by hash."""
    vectors: dict[str, np.ndarray] = {}
    for path in sorted(index_dir.glob(f"unfinished-{model['fingerprint'][:12]}-*.npz")):
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(path) as lot:
            vectors |= zip(lot["hashes"].tolist(), lot["vectors"], strict=True)
    if vectors:
        print(f"going on from an interrupted run: {len(vectors)} passages are embedded already", file=sys.stderr)
    return vectors


def write_vectors(path: Path, vectors: np.ndarray) -> None:
    """Write a FAISS index for exact inner-product search."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(path))


# ------------------------------------------------------------------------------ the index on disk, written


@contextlib.contextmanager
def locked(index_dir: Path) -> Iterator[None]:
    """Hold the index folder's lock; the system frees a dead process's.

    Raises:
        UserError: another process holds it.
    """
    index_dir.mkdir(parents=True, exist_ok=True)
    holder = index_dir / ".lock-holder"
    try:
        with FileLock(index_dir / ".lock", timeout=0):
            holder.write_text(str(os.getpid()), encoding="utf-8")
            yield
    except Timeout:
        process = holder.read_text(encoding="utf-8") if holder.exists() else "unknown"
        raise UserError(f"process {process} is writing {index_dir} at this moment; run again when it is done") from None


def commit(index_dir: Path, header: dict, records: list[dict], vectors: np.ndarray, backups: int) -> dict:
    """Write a complete new index and make it the current one in a single step; return its header.

    Files that nothing names yet come first, the backup of the old metadata.json next, metadata.json last; only then
    are older backups removed. A crash at any moment leaves the old index or the new one.
    """
    identity = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    files = {
        "embeddings": index_dir / f"embeddings-{identity}.index",
        "keywords": index_dir / f"keywords-{identity}.sqlite",
    }
    with replacing(files["embeddings"]) as temporary:
        write_vectors(temporary, vectors)
    with replacing(files["keywords"]) as temporary:
        write_keywords(temporary, ((" ".join(record["heading"]), record["text"]) for record in records)).close()
    header = {"format": FORMAT, "id": identity, "created": datetime.now(UTC).isoformat(timespec="seconds"), **header}
    header["dimensions"] = int(vectors.shape[1])
    header["files"] = {kind: [path.name, path.stat().st_size, sha256_of(path)] for kind, path in files.items()}
    current = index_dir / METADATA
    with contextlib.suppress(UserError, FileNotFoundError):
        before = read_header(current)
        with replacing(index_dir / f"metadata-{before['id']}.json") as temporary:
            shutil.copyfile(current, temporary)
    with replacing(current) as temporary:
        write_metadata(temporary, header, records)
    prune(index_dir, backups)
    return header


def prune(index_dir: Path, backups: int) -> None:
    """Remove, of the names that this script gives, all that neither the index nor its kept backups use."""
    readable = []
    for path in backup_files(index_dir):
        with contextlib.suppress(UserError):
            readable.append((path, read_header(path)))
    used: set[str] = set()
    for path, header in [(index_dir / METADATA, read_header(index_dir / METADATA)), *readable[:backups]]:
        used.add(path.name)
        used |= {name for name, *_ in header["files"].values()} | {Path(header["model"]["folder"]).name}
    patterns = ("metadata-*.json", "embeddings-*.index", "keywords-*.sqlite", "encoder-*", "unfinished-*.npz", ".*.new")
    for path in sorted(path for pattern in patterns for path in index_dir.glob(pattern)):
        if path.name not in used:
            remove(path)


def backup_files(index_dir: Path) -> list[Path]:
    """Return the metadata files of the backups, newest first."""
    return sorted(index_dir.glob("metadata-*.json"), reverse=True)


def restore(index_dir: Path) -> dict:
    """Make the newest backup whose files are whole the current index; return its header."""
    for path in backup_files(index_dir):
        try:
            header = read_metadata(path)[0]
            for kind in header["files"]:
                checked_file(index_dir, header, kind)
        except UserError as error:
            print(f"warning: backup {path.name} can not be used: {error}", file=sys.stderr)
            continue
        path.replace(index_dir / METADATA)
        prune(index_dir, len(backup_files(index_dir)))
        return header
    raise UserError(f"{index_dir} holds no usable backup; run generate_embeddings.py to build the index anew")


# --------------------------------------------------------------------------------- the index on disk, read


def write_metadata(path: Path, header: dict, records: list[dict]) -> None:
    """Write metadata.json: the checksum on line 1, the header on line 2, then a passage a line."""
    opening = json.dumps(header, ensure_ascii=False).removesuffix("}") + ', "passages": [\n'
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    body = f"{opening}{lines}\n]}}\n".removeprefix("{").encode()
    path.write_bytes(b'{"checksum": "%s",\n' % hashlib.sha256(body).hexdigest().encode() + body)


class Passages(Sequence):
    """The passages of metadata.json, each parsed when it is asked for: a search shows few of very many."""

    def __init__(self, content: bytes):
        self.content = content
        self.line_ends = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("\n"))

    def __len__(self) -> int:
        return max(0, len(self.line_ends) - 3)  # two lines stand before them and one behind

    def __getitem__(self, place: int) -> dict:
        if not 0 <= place < len(self):
            raise IndexError(place)
        line = self.content[self.line_ends[place + 1] + 1 : self.line_ends[place + 2]]
        return orjson.loads(line.removesuffix(b","))


def read_metadata(path: Path) -> tuple[dict, Passages]:
    """Return the header and the passages of metadata.json.

    Raises:
        UserError: the file is missing, damaged or of another format version.
    """
    header = read_header(path)
    content = path.read_bytes()
    first, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() not in first:
        raise UserError(damaged(path))
    return header, Passages(content)


def read_header(path: Path) -> dict:
    """Return metadata.json without its passages, reading two lines of it."""
    try:
        with path.open("rb") as file:
            opening = file.readline() + file.readline()
        header = orjson.loads(opening + b"]}")
    except FileNotFoundError:
        raise UserError(f"no index in {path.parent}; run generate_embeddings.py first") from None
    except (OSError, ValueError):
        raise UserError(damaged(path)) from None
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {header.get('format')}, not {FORMAT}; run generate_embeddings.py to build it anew"
        )
    return header


def damaged(path: Path) -> str:
    return f"{path} is damaged; run generate_embeddings.py --restore to go back to the index before"


def checked_file(index_dir: Path, header: dict, kind: str) -> Path:
    """Return one of the index's files if it is as it was written."""
    name, size, digest = header["files"][kind]
    path = index_dir / name
    if not path.is_file() or path.stat().st_size != size or sha256_of(path) != digest:
        raise UserError(damaged(path))
    return path


class Index:
    """An index opened for search; each part is read when it is first used.

    header: metadata.json without the passages; passages: its records, in the order of the vectors.
    """

    def __init__(self, index_dir: Path):
        self.folder = index_dir
        self.header, self.passages = read_metadata(index_dir / METADATA)

    @functools.cached_property
    def vectors(self):
        """The FAISS index."""
        import faiss

        faiss.omp_set_num_threads(1)  # one query gains nothing by more, and threads that wait for work take the cores
        index = faiss.read_index(str(checked_file(self.folder, self.header, "embeddings")))
        if index.ntotal != len(self.passages):
            raise UserError(damaged(self.folder / METADATA))
        return index

    @functools.cached_property
    def sample_vectors(self) -> np.ndarray:
        """Up to 2,000 vectors spread evenly over the index: how near a query is to passages in general."""
        count = len(self.passages)
        return self.vectors.reconstruct_batch(np.linspace(0, count - 1, min(count, 2000)).astype(np.int64))

    @functools.cached_property
    def keywords(self) -> sqlite3.Connection:
        path = checked_file(self.folder, self.header, "keywords")
        return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)

    @functools.cached_property
    def encoder(self) -> Encoder:
        return load_encoder(self.header["model"], self.folder)


def load_index(index_dir: Path) -> Index:
    """Open the index in a folder.

    Raises:
        UserError: there is none, or it is damaged or of another format version.
    """
    return Index(index_dir)


# -------------------------------------------------------------------------------------------------- main


def list_backups(index_dir: Path) -> None:
    """Print the index and its backups, newest first: date, passages, size, model."""
    for path in [index_dir / METADATA, *backup_files(index_dir)]:
        header = read_header(path)
        megabytes = (sum(length for _, length, _ in header["files"].values()) + path.stat().st_size) / 1e6
        count, model = header["passage_count"], header["model"]["name"]
        print(f"{header['created']}  {count:>8,} passages  {megabytes:>8.1f} MB  {model}")


def document_states(documents_root: Path, paths: list[Path]) -> dict[str, list]:
    """Return file_state of each document by its path relative to the root."""
    root = documents_root.resolve()
    states = {}
    for path in paths:
        with contextlib.suppress(OSError):
            states[path.relative_to(root).as_posix()] = file_state(path)
    return states


def reasons_to_build(index_dir: Path, wanted: dict) -> list[str]:
    """Return in plain words how the index on disk differs from what it would hold if it were made now."""
    try:
        before, _ = read_metadata(index_dir / METADATA)
        for kind in before["files"]:
            checked_file(index_dir, before, kind)
    except UserError as error:
        return [str(error) if (index_dir / METADATA).exists() else f"no index in {index_dir} yet"]
    found = []
    for key, words in (("documents_root", "the documents root"), ("max_passage_chars", "config.MAX_PASSAGE_CHARS")):
        if before[key] != wanted[key]:
            found.append(f"{words} changed")
    if before["model"]["fingerprint"] != wanted["model"]["fingerprint"]:
        found.append("the model changed")
    elif file_changed(onnx_file(index_dir / before["model"]["folder"]), before["model"]["onnx"]):
        found.append("the model's ONNX form is gone or changed")
    if before["search"] != wanted["search"]:
        found.append("the weights fitted for the search changed")
    old, new = before["documents"], wanted["documents"]
    for words, names in (
        ("added", [name for name in new if name not in old]),
        ("removed", [name for name in old if name not in new]),
        ("changed", [name for name in new if name in old and new[name][2] != old[name][2]]),
    ):
        if names:
            found.append(f"{len(names)} documents {words} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Embed every passage of the target documents and write the search index.",
        epilog="examples:\n  python generate_embeddings.py\n"
        "  python generate_embeddings.py --model packaged --index-dir embeddings_base",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_document_options(parser)
    parser.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        default=str(config.FINE_TUNED_MODEL_DIR / config.MODEL_NAME),
        help="or 'packaged' (config.FINE_TUNED_MODEL_DIR / config.MODEL_NAME)",
    )
    parser.add_argument("--index-dir", type=Path, default=config.INDEX_DIR, metavar="DIR", help="(config.INDEX_DIR)")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--check", action="store_true", help="tell whether the index is current (exit 1 if not); change nothing"
    )
    actions.add_argument("--restore", action="store_true", help="go back to the index before")
    actions.add_argument("--list-backups", action="store_true", help="show the index and its backups")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    index_dir = options.index_dir
    if options.list_backups:
        list_backups(index_dir)
        return 0
    if options.restore:
        with locked(index_dir):
            print(f"restored the index of {restore(index_dir)['created']} in {index_dir}")
        return 0
    started = time.perf_counter()
    paths = find_documents(options.documents_root, options.documents or config.TARGET_DOCUMENTS)
    if not options.check:
        restore_previous(Path(options.model))
    model_folder, _ = find_model(options.model, config.BASE_MODEL_REVISION, fallback=False)
    wanted = {
        "documents_root": str(options.documents_root.resolve()),
        "max_passage_chars": config.MAX_PASSAGE_CHARS,
        "documents": document_states(options.documents_root, paths),
        "model": {"name": options.model, "fingerprint": model_fingerprint(model_folder)},
        "search": read_json(model_folder / "evaluation.json").get("search", {}),
    }
    reasons = reasons_to_build(index_dir, wanted)
    if options.check or not reasons:
        print(f"{index_dir} is " + ("not current: " + "; ".join(reasons) if reasons else "current"))
        return 1 if reasons else 0
    print("; ".join(reasons), file=sys.stderr)
    with locked(index_dir):
        wanted["model"] |= prepare_encoder(model_folder, wanted["model"]["fingerprint"], index_dir)
        passages = read_passages(options.documents_root, paths, config.MAX_PASSAGE_CHARS, config.MAX_DOCUMENT_MB)
        records = distinct_passages(passages)
        vectors, embedded = embed(records, known_vectors(index_dir, wanted["model"]), wanted["model"], index_dir)
        commit(index_dir, wanted | {"passage_count": len(records)}, records, vectors, config.INDEX_BACKUPS)
    seconds = time.perf_counter() - started
    print(f"{len(paths)} documents, {len(records)} distinct passages, {embedded} embedded; {seconds:.1f} s")
    print(f'wrote {index_dir}; next: python semantic_search.py "your question"')
    return 0


if __name__ == "__main__":
    config.run(main)
