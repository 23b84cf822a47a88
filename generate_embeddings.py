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
    keywords-<id>.sqlite     which passages hold a word (run_finetuning.Keywords)
    pieces-<fingerprint>.sqlite  a multilingual model's vocabulary, of which a query needs little (QueryTokenizer)
    metadata-<id>.json       an earlier index kept as a backup, with its files (config.INDEX_BACKUPS)
    encoder-<fingerprint>/   the ONNX form of a model whose own folder has none (a base model)

metadata.json: {"checksum": CRC-32 of all lines below the first, "header_checksum": of the second alone, "format": 7,
"id", "created", "documents_root", "globs", "max_passage_chars", "max_document_mb", "scripts": SHA-256 of the code that
cuts passages and words, "faiss_index": config.FAISS_INDEX, "documents": {source_file: [bytes, modified in ns,
SHA-256]}, "model": {"name", "fingerprint", "folder" relative to the index, "files": {name: [bytes, CRC-32]}, "pieces":
[bytes, CRC-32] or null}, "search": {"semantic_weight"} (as the model's evaluation.json has it, or {}), "passage_count",
"dimensions", "keeps_vectors": whether the FAISS index gives vectors back exactly, "files": {"embeddings" or "keywords":
[name, bytes, CRC-32]}, "passages": [{"id", "source_file", "also_in": [other files with the same text], "heading":
[path], "chunk_index", "start_line", "end_line", "text", "hash"}, one a line]}.

torchrun --nproc-per-node N generate_embeddings.py spreads the embedding over N processes; rank 0 does all the rest.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import sqlite3
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import orjson

import config
from config import UserError, command_for, previous, remove, replacing, restore_previous, sync
from prepare_finetuning_data import (
    WINDOW_FILES,
    Passage,
    add_document_options,
    check_settings,
    cut_passages,
    find_documents,
    find_model,
    has_utf8_name,
    is_document,
    load_tokenizer,
    matches,
    read_document,
    sha256_of,
    text_for_model,
    warn,
)
from run_finetuning import (
    DEFAULT_SEMANTIC_WEIGHT,
    Encoder,
    Keywords,
    is_first_process,
    load_model,
    locked,
    model_fingerprint,
    processes,
    read_json,
    save_with_onnx,
    write_keywords,
)

FORMAT = 7
METADATA = "metadata.json"
ID, FINGERPRINT = "[0-9]" * 8 + "T" + "[0-9]" * 12, "[0-9a-f]" * 12  # in the names of files, for glob

# ----------------------------------------------------------------------------------------- the passages


def distinct_passages(
    documents_root: Path, documents: dict, before: list[dict], documents_before: dict, max_chars: int, max_mb: float
) -> list[dict]:
    """Return a metadata record for each distinct text under one heading path, with the other files that have it.

    Documents that are as they were before keep their records from the index before; only the others are cut.

    Raises:
        UserError: none of the documents holds any text.
    """
    from tqdm import tqdm

    root = documents_root.resolve()
    order = {name: place for place, name in enumerate(documents)}
    unchanged = {name for name, state in documents.items() if documents_before.get(name, [None])[-1] == state[-1]}
    records: dict[str, dict] = {}
    to_cut = documents.keys() - unchanged
    for record in before:
        files = {record["source_file"], *record["also_in"]}
        if files <= unchanged:
            records[record["hash"]] = record
        else:  # where the text stands in its other files is not on record
            to_cut |= files & unchanged
    for name in tqdm(sorted(to_cut, key=order.get), "reading", unit="file", disable=None, leave=False, delay=2):
        text = read_document(root / name, max_mb)
        for passage in cut_passages(text, name, max_chars) if text is not None else ():
            add_passage(records, passage, order)
    if not records:
        raise UserError(f"the documents in {documents_root} hold no text; see the warnings above")
    return sorted(records.values(), key=lambda record: (order[record["source_file"]], record["chunk_index"]))


def add_passage(records: dict[str, dict], passage: Passage, order: dict[str, int]) -> None:
    """Add a passage to the records by hash; the first document that has it is its source, the others its also_in."""
    identity = [passage.heading, passage.text, passage.model_text]  # the last: as this version of the scripts reads it
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    own = {
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
    known = records.setdefault(digest, own)
    first, *others = sorted({passage.source_file, known["source_file"], *known["also_in"]}, key=order.get)
    records[digest] = (known if first == known["source_file"] else own) | {"also_in": others}


# ------------------------------------------------------------------------------------------ the encoder

QUERY_THREADS = 2  # more gain little with so few tokens
ENCODER_FILES = ("onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json", "config.json", *WINDOW_FILES)


def prepare_encoder(folder: Path, fingerprint: str, index_dir: Path) -> dict:
    """Return where the ONNX form of a model is, exporting it into the index folder if the model has none."""
    try:
        Encoder(folder)
    except UserError:  # none, or one of its publisher's that does not go through to the sentence's embedding
        source, folder = folder, index_dir / f"encoder-{fingerprint[:12]}"
        with contextlib.suppress(UserError):
            before = read_header(index_dir / METADATA)["model"]
            if before["fingerprint"] == fingerprint and encoder_is_whole(folder, before):
                return {"folder": before["folder"], "files": before["files"]}
        model = load_model(source, "cpu")
        with replacing(folder) as temporary:
            save_with_onnx(model, temporary, ["a short text", "bir başka, biraz daha uzun metin"])
            remove(temporary / "model.safetensors")  # the ONNX file holds the weights
            remove(temporary / "README.md")  # in a folder of documents it would be one
        remove(previous(folder))
    files = {name: size_and_checksum(folder / name) for name in ENCODER_FILES if (folder / name).exists()}
    try:
        place = os.path.relpath(folder.resolve(), index_dir.resolve())
    except ValueError:  # on two drives of Windows
        place = str(folder.resolve())
    return {"folder": place, "files": files}


def size_and_checksum(path: Path) -> list:
    """Return [bytes, CRC-32] of a file: against damage it does what SHA-256 does, ten times as fast."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, f"{checksum:08x}"]


def is_whole(path: Path, size: int, checksum: str) -> bool:
    """Tell whether a file is there and as it was written."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return size_and_checksum(path) == [size, checksum]
    return False


def encoder_is_whole(folder: Path, model: dict) -> bool:
    return all(is_whole(folder / name, *state) for name, state in model["files"].items())


def load_encoder(header: dict, index_dir: Path) -> Encoder:
    """Load the encoder an index was made with; header: its metadata.json without the passages.

    The model before stands in while a newly tuned one waits for its index. Files are compared after they are read,
    because the folder may be swapped meanwhile.

    Raises:
        UserError: the model is gone or has changed since, so that its vectors and the index's do not belong together.
    """
    model = header["model"]
    folder = index_dir / model["folder"]
    cut = QueryTokenizer(pieces_file(index_dir, model)) if pieces_are_whole(index_dir, model) else None
    for place in (folder, previous(folder)):
        with contextlib.suppress(UserError):
            encoder = Encoder(place, cut, min(QUERY_THREADS, os.cpu_count() or 1))
            if encoder_is_whole(place, model):
                return encoder
    raise UserError(
        f"the model {model['name']} is gone or has changed since {index_dir} was made;"
        f" run {build_command(index_dir, header)} (keyword search still works: --mode keyword)"
    )


def encoding_function(source: Path, folder: Path, device: str | None) -> Callable[[list[str]], np.ndarray]:
    """Return the function that embeds texts: in half precision on a GPU where there is one, else by ONNX Runtime.

    source: the model in the Sentence Transformers format; folder: its ONNX form. device: "cpu", "cuda" or None.
    """
    if device != "cpu" and shutil.which("nvidia-smi"):  # torch takes seconds to import: not without need
        import torch

        if torch.cuda.is_available():
            return half_precision(load_model(source, f"cuda:{os.environ.get('LOCAL_RANK', 0)}"))
    return Encoder(folder).encode


def half_precision(model) -> Callable[[list[str]], np.ndarray]:
    """Return the function that embeds texts with a SentenceTransformer in fp16, whole lots at a time."""
    model.half()

    def encode(texts: list[str]) -> np.ndarray:
        vectors = model.encode(texts, batch_size=EMBED_AT_ONCE, show_progress_bar=False).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return encode


# ------------------------------------------------------------------------------ the tokenizer of a query


def pieces_file(index_dir: Path, model: dict) -> Path:
    return index_dir / f"pieces-{model['fingerprint'][:12]}.sqlite"


def pieces_are_whole(index_dir: Path, model: dict) -> bool:
    """Tell whether a model has a file for QueryTokenizer; without it a search takes longer, and is the same."""
    return bool(model.get("pieces")) and is_whole(pieces_file(index_dir, model), *model["pieces"])


def prepare_pieces(model: dict, index_dir: Path) -> list | None:
    """Write the file that QueryTokenizer reads, where it is of use; return its bytes and CRC-32.

    Tables: pieces(piece, id, score), the vocabulary of a Unigram tokenizer; rules(json, unknown, longest), the
    tokenizer with only the two pieces whose scores decide about unknown characters, the ID of what is unknown, and the
    length of the longest piece. model: as the header of metadata.json has it.
    """
    with contextlib.suppress(UserError):
        before = read_header(index_dir / METADATA)["model"]
        if before["fingerprint"] == model["fingerprint"] and pieces_are_whole(index_dir, before):
            return before["pieces"]
    rules = json.loads(load_tokenizer(index_dir / model["folder"])[0].to_str())
    unigram = rules["model"]
    if unigram["type"] != "Unigram" or unigram["unk_id"] is None or unigram["byte_fallback"]:
        return None  # a vocabulary of another kind is loaded fast
    vocabulary, unknown = unigram["vocab"], unigram["unk_id"]
    unigram |= {"vocab": [vocabulary[unknown], min(vocabulary, key=lambda piece: piece[1])], "unk_id": 0}
    path = pieces_file(index_dir, model)
    with replacing(path) as temporary, contextlib.closing(sqlite3.connect(temporary)) as database, database:
        database.execute("PRAGMA journal_mode=OFF")
        database.execute("CREATE TABLE rules(json TEXT, unknown INTEGER, longest INTEGER)")
        longest = max(len(piece) for piece, _ in vocabulary)
        database.execute("INSERT INTO rules VALUES (?, ?, ?)", (json.dumps(rules), unknown, longest))
        database.execute("CREATE TABLE pieces(piece TEXT PRIMARY KEY, id INTEGER, score REAL) WITHOUT ROWID")
        rows = ((piece, number, score) for number, (piece, score) in enumerate(vocabulary))
        database.executemany("INSERT OR REPLACE INTO pieces VALUES (?, ?, ?)", rows)
    return size_and_checksum(path)


class QueryTokenizer:
    """Cuts texts as a Unigram tokenizer does (Kudo, 2018), reading only those pieces that a text holds.

    A multilingual vocabulary of 250,000 pieces takes 0.8 s to load, of which a query needs some hundred.
    """

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        self.database = open_to_read(path)
        rules, self.unknown, self.longest = self.database.execute("SELECT * FROM rules").fetchone()
        self.tokenizer, rules = Tokenizer.from_str(rules), json.loads(rules)
        self.always = [tuple(piece) for piece in rules["model"]["vocab"]]
        self.special = {token["content"]: token["id"] for token in rules["added_tokens"]}

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Return the token IDs of each text, as many as the model reads."""
        return [self.cut(text) for text in texts]

    def cut(self, text: str) -> list[int]:
        """Return the token IDs of a text; whatever is no part of its words has no bearing on them."""
        words = self.tokens(text, self.always[:1], add_special_tokens=False)  # unknown, each word as a whole
        parts = {
            word[start:end]
            for word in words
            for start in range(len(word))
            for end in range(start + 1, min(start + self.longest, len(word)) + 1)
        }
        query = "SELECT piece, id, score FROM pieces WHERE piece IN (SELECT value FROM json_each(?)) ORDER BY id"
        found = self.database.execute(query, (json.dumps(sorted(parts)),)).fetchall()
        numbers = {piece: number for piece, number, _ in found} | self.special
        tokens = self.tokens(text, self.always + [(piece, score) for piece, _, score in found])
        # A special token may come with the spaces around it.
        return [numbers.get(token, self.special.get(token.strip(), self.unknown)) for token in tokens]

    def tokens(self, text: str, pieces: list[tuple[str, float]], **settings) -> list[str]:
        """Return the tokens of a text with no other pieces than these."""
        from tokenizers import models

        self.tokenizer.model = models.Unigram(pieces, 0)
        return self.tokenizer.encode(text, **settings).tokens


# ------------------------------------------------------------------------------- many processes (torchrun)


@contextlib.contextmanager
def joined_processes() -> Iterator[int]:
    """Join the processes that torchrun has started; yield the rank of this one, 0 where it is alone.

    Raises:
        UserError: one of them died.
    """
    if processes() == 1:
        yield 0
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
        if dist.get_rank() == 0:
            dist.scatter_object_list([None], [None] * dist.get_world_size())  # the work is done
    except RuntimeError as error:
        raise UserError(f"a process of this run died ({str(error).splitlines()[0]}); run again to go on") from None
    finally:
        dist.destroy_process_group()


def encode_for_rank_0(device: str | None) -> None:
    """Embed the lots that rank 0 hands out, until there are no more."""
    import torch.distributed as dist

    encode, job = None, [None]
    while True:
        dist.scatter_object_list(job)
        if job[0] is None:
            return
        source, folder, texts = job[0]
        encode = encode or encoding_function(source, folder, device)
        dist.gather_object(encode(texts) if texts else None)


def encode_lots(
    lots: list[list[dict]], source: Path, folder: Path, device: str | None
) -> Iterator[tuple[list[dict], np.ndarray]]:
    """Yield each lot of records with its vectors, in order; with torchrun, every process embeds one lot in turn."""
    ranks = processes()
    encode = encoding_function(source, folder, device) if lots else None
    for start in range(0, len(lots), ranks):
        round_lots = lots[start : start + ranks]
        texts = [[text_for_model(record["heading"], record["text"]) for record in lot] for lot in round_lots]
        vectors: list[np.ndarray | None] = [None] * ranks
        if ranks == 1:
            vectors[0] = encode(texts[0])
        else:
            import torch.distributed as dist

            texts += [[]] * (ranks - len(texts))  # some have nothing to do in the last round
            dist.scatter_object_list([None], [(source.resolve(), folder.resolve(), own) for own in texts])
            dist.gather_object(encode(texts[0]), vectors)
        yield from zip(round_lots, vectors, strict=False)


# -------------------------------------------------------------------------------------------- the vectors

EMBED_AT_ONCE = 512  # passages; after each lot an interrupted run can go on
EXACT_PASSAGES = 50_000  # up to here "auto" compares a query with every passage (README.md has the measurements)
WANTED_RECALL = 0.995  # of the ten nearest passages, for the sample that an approximate index is tuned on


def embed(
    records: list[dict], known: dict[str, np.ndarray], model: dict, source: Path, index_dir: Path, device: str | None
) -> tuple[np.ndarray, int]:
    """Return the vectors of all records, float32 of shape (records, dimensions), and how many were not known.

    known: vectors by hash. Long runs leave what they have in unfinished-*.npz for the next.
    """
    from tqdm import tqdm

    known = known | unfinished_vectors(index_dir, model)
    missing = sorted((one for one in records if one["hash"] not in known), key=lambda one: len(one["text"]))
    lots = [missing[start : start + EMBED_AT_ONCE] for start in range(0, len(missing), EMBED_AT_ONCE)]
    with tqdm(total=len(missing), desc="embedding", unit="passage", disable=None) as bar:
        for lot, vectors in encode_lots(lots, source, index_dir / model["folder"], device):
            hashes = [record["hash"] for record in lot]
            known |= zip(hashes, vectors, strict=True)
            if len(lots) > 1:
                name = f"unfinished-{model['fingerprint'][:12]}-{hashes[0]}.npz"
                with replacing(index_dir / name) as temporary, temporary.open("wb") as file:
                    np.savez(file, hashes=np.array(hashes), vectors=vectors)
            bar.update(len(lot))
    return np.stack([known[record["hash"]] for record in records], dtype=np.float32), len(missing)


def known_vectors(before: "Index", model: dict) -> dict[str, np.ndarray]:
    """Return the vectors of the index before by passage hash, if the same model made them and they are kept exactly."""
    if before.header["model"]["fingerprint"] != model["fingerprint"]:
        return {}
    if not before.header["keeps_vectors"]:
        print("the index before keeps no exact vectors (config.FAISS_INDEX): all are embedded anew", file=sys.stderr)
        return {}
    with contextlib.suppress(UserError):
        vectors = before.vectors.reconstruct_n(0, len(before.passages))
        return {record["hash"]: vector for record, vector in zip(before.passages, vectors, strict=True)}
    return {}


def unfinished_vectors(index_dir: Path, model: dict) -> dict[str, np.ndarray]:
    """Return what an interrupted run has embedded with the same model, by hash."""
    vectors: dict[str, np.ndarray] = {}
    for path in sorted(index_dir.glob(f"unfinished-{model['fingerprint'][:12]}-*.npz")):
        # A damaged one raises whatever zipfile and NumPy come upon; its passages are embedded once more.
        with contextlib.suppress(Exception), np.load(path) as lot:
            vectors |= zip(lot["hashes"].tolist(), lot["vectors"], strict=True)
    if vectors:
        print(f"going on from an interrupted run: {len(vectors)} passages are embedded already", file=sys.stderr)
    return vectors


def write_vectors(path: Path, vectors: np.ndarray, factory: str) -> bool:
    """Write a FAISS index of the vectors by inner product; tell whether it gives them back exactly.

    factory: a string of faiss.index_factory, or "auto": exact search up to EXACT_PASSAGES, above that an inverted file
    of k-means cells (Sivic and Zisserman, 2003) that keeps the vectors whole.

    Raises:
        UserError: FAISS knows no such index, or can not make one of these vectors, or can not write it.
    """
    import faiss

    faiss.omp_set_num_threads(os.cpu_count() or 1)  # a search in the same process has set it to one
    count, dimensions = vectors.shape
    if factory == "auto":
        factory = "Flat" if count <= EXACT_PASSAGES else f"IVF{2 ** round(math.log2(2 * math.sqrt(count)))},Flat"
    try:
        index = faiss.index_factory(dimensions, factory, faiss.METRIC_INNER_PRODUCT)
        cells = faiss.try_extract_index_ivf(index)
        if isinstance(cells and faiss.downcast_index(cells), faiss.IndexIVFFastScan):
            raise RuntimeError("FAISS crashes when it is asked for a vector of such an index")
        if cells:
            cells.cp.min_points_per_centroid = 1  # no warnings
            cells.cp.max_points_per_centroid = 64  # a quarter of the usual: trained in a quarter of the time
        index.train(vectors)
        index.add(vectors)
        if cells:
            cells.make_direct_map()  # where each vector is, so that it can be had back
        sample = np.linspace(0, count - 1, min(count, 500)).astype(np.int64)
        exact = np.array_equal(index.reconstruct_batch(sample), vectors[sample])
        tune(index, vectors, vectors[sample])
    except RuntimeError as error:
        reason = str(error).split(": ")[-1].strip()
        raise UserError(
            f"config.FAISS_INDEX {factory!r} does not fit {count} passages of {dimensions} dimensions ({reason});"
            ' set it to "auto"'
        ) from None
    with path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    return exact


def tune(index, vectors: np.ndarray, sample: np.ndarray) -> None:
    """Have an approximate index look at more cells or neighbours until it finds WANTED_RECALL of the exact answers.

    The queries are sums of two passages: like a person's they lie between the passages, not on one.
    """
    import faiss

    space = faiss.ParameterSpace()
    space.initialize(index)
    names = {space.parameter_ranges.at(place).name for place in range(space.parameter_ranges.size())}
    setting = next((name for name in ("nprobe", "efSearch") if name in names), None)
    queries = sample + np.roll(sample, 1, axis=0)
    count = min(10, len(vectors))
    exact = faiss.knn(queries, vectors, count, faiss.METRIC_INNER_PRODUCT)[1] if setting else None
    recall, before, value = 0.0, -1.0, 4
    while setting and recall < WANTED_RECALL and recall - before > 0.001:  # a coarse index stops getting better
        space.set_index_parameter(index, setting, value)
        found = index.search(queries, count)[1]
        before, recall = recall, float((exact[:, :, None] == found[:, None, :]).any(axis=2).mean())
        value *= 2


# ------------------------------------------------------------------------------ the index on disk, written


def commit(index_dir: Path, header: dict, records: list[dict], vectors: np.ndarray, backups: int) -> None:
    """Write a complete new index and make it the current one in a single step.

    Files that nothing names yet come first, the backup of the old metadata.json next, metadata.json last; only then
    are older backups removed. A crash at any moment leaves the old index or the new one.
    """
    identity = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    files = {
        "embeddings": index_dir / f"embeddings-{identity}.index",
        "keywords": index_dir / f"keywords-{identity}.sqlite",
    }
    header = {"format": FORMAT, "id": identity, "created": datetime.now(UTC).isoformat(timespec="seconds"), **header}
    header |= {"passage_count": len(records), "dimensions": int(vectors.shape[1])}
    try:
        with replacing(files["embeddings"]) as temporary:
            header["keeps_vectors"] = write_vectors(temporary, vectors, header["faiss_index"])
        with replacing(files["keywords"]) as temporary:
            write_keywords(temporary, ((record["heading"], record["text"]) for record in records)).database.close()
        header["model"] = header["model"] | {"pieces": prepare_pieces(header["model"], index_dir)}
    except (RuntimeError, sqlite3.Error) as error:  # of FAISS and SQLite, where others raise an OSError
        raise UserError(f"{index_dir} can not be written ({error}); make room or name another --index-dir") from None
    header["files"] = {kind: [path.name, *size_and_checksum(path)] for kind, path in files.items()}
    current = index_dir / METADATA
    with contextlib.suppress(UserError, FileNotFoundError):
        before = whole_header(index_dir, current)  # a damaged one takes no good one's place
        with replacing(index_dir / f"metadata-{before['id']}.json") as temporary:
            shutil.copyfile(current, temporary)
    with replacing(current) as temporary:
        write_metadata(temporary, header, records)
    prune(index_dir, backups)


def prune(index_dir: Path, backups: int) -> None:
    """Remove, of the names that this script gives, all that neither the index nor its kept backups use."""
    used: set[str] = set()
    usable = [
        (path, header)
        for path, header in readable_indexes(index_dir)
        if all(has_size(index_dir / name, size) for name, size, _ in header["files"].values())
    ]
    for path, header in usable[: 1 + backups]:
        used.add(path.name)
        used |= {name for name, *_ in header["files"].values()} | {Path(header["model"]["folder"]).name}
        used.add(pieces_file(index_dir, header["model"]).name)
    patterns = (f"metadata-{ID}.json", f"embeddings-{ID}.index", f"keywords-{ID}.sqlite", f"encoder-{FINGERPRINT}")
    patterns += (f"pieces-{FINGERPRINT}.sqlite", f"unfinished-{FINGERPRINT}-*.npz")
    temporaries = (f".{pattern}.*.new" for pattern in ("metadata.json", *patterns))
    for path in sorted(path for pattern in (*patterns, *temporaries) for path in index_dir.glob(pattern)):
        if path.name not in used:
            remove(path)


def is_there(path: Path) -> bool:
    """Tell whether a file or folder is there; one that this person may not look at is as good as none."""
    with contextlib.suppress(OSError):
        return path.exists()
    return False


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def backup_files(index_dir: Path) -> list[Path]:
    """Return the metadata files of the backups, newest first."""
    return sorted(index_dir.glob(f"metadata-{ID}.json"), reverse=True)


def readable_indexes(index_dir: Path) -> list[tuple[Path, dict]]:
    """Return metadata file and header of the index and of its backups, those that can be read, newest first."""
    found: dict[str, tuple[Path, dict]] = {}
    for path in (index_dir / METADATA, *backup_files(index_dir)):
        with contextlib.suppress(UserError):
            header = read_header(path)
            found.setdefault(header["id"], (path, header))  # a commit that did not come leaves a copy of the index
    return list(found.values())


def restore(index_dir: Path) -> dict:
    """Make the newest backup whose files and model are whole the current index; return its header.

    A backup with the current index's id is what a run leaves that was killed just before its commit.
    """
    if not index_dir.is_dir():
        raise UserError(f"no index in {index_dir}; run {build_command(index_dir)} first")
    with locked(index_dir / ".lock", f"writing {index_dir}"):
        current, known = None, [header for _, header in readable_indexes(index_dir)]
        with contextlib.suppress(UserError):
            current = whole_header(index_dir, index_dir / METADATA)["id"]
        for path in backup_files(index_dir):
            try:
                header = whole_header(index_dir, path)
                if header["id"] == current:
                    remove(path)
                    continue
                load_encoder(header, index_dir)
            except UserError as error:
                warn(f"backup {path.name} can not be used: {str(error).split(';')[0]}")
                continue
            path.replace(index_dir / METADATA)
            sync(index_dir)
            prune(index_dir, len(backup_files(index_dir)))
            return header
        command = build_command(index_dir, known[0] if known else None)
        raise UserError(f"{index_dir} holds no usable backup; run {command} to build the index anew")


# --------------------------------------------------------------------------------- the index on disk, read


def write_metadata(path: Path, header: dict, records: list[dict]) -> None:
    """Write metadata.json: the checksums on line 1, the header on line 2, then a passage a line."""
    opening = json.dumps(header, ensure_ascii=False)[1:-1] + ', "passages": [\n'
    checksums = '{"checksum": "%08x", "header_checksum": "%08x",\n'
    header_checksum, checksum = zlib.crc32(opening.encode()), 0
    with path.open("wb") as file:
        file.write((checksums % (checksum, header_checksum)).encode())  # the first in its place until it is known
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        endings = itertools.chain(itertools.repeat(",\n", len(records) - 1), ["\n]}\n"])
        for part in itertools.chain([opening], map("".join, zip(lines, endings, strict=True))):
            content = part.encode()
            checksum = zlib.crc32(content, checksum)
            file.write(content)
        file.seek(0)
        file.write((checksums % (checksum, header_checksum)).encode())


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


def read_header(path: Path) -> dict:
    """Return metadata.json without its passages, reading two lines of it; raises what read_metadata does."""
    return read_metadata(path, header_only=True)[0]


def read_metadata(path: Path, header_only: bool = False) -> tuple[dict, Passages]:
    """Return the header and the passages of metadata.json, or no passages.

    The file is opened once: a commit in the meantime puts another in its place and leaves this one as it is.

    Raises:
        UserError: the file is missing, damaged or of another format.
    """
    try:
        with path.open("rb") as file:
            first, second = file.readline(), file.readline()
            header = orjson.loads(first + second + b"]}")
            if header.get("format") != FORMAT:
                found = f"{path} has format {header.get('format')}, not {FORMAT}"
                raise UserError(f"{found}; run {build_command(path.parent, header)} to build it anew")
            rest = b"" if header_only else file.read()
    except FileNotFoundError:
        raise UserError(f"no index in {path.parent}; run {build_command(path.parent)} first") from None
    except ValueError:
        raise UserError(damaged(path)) from None
    checksum = zlib.crc32(second)
    unharmed = header_only or header.get("checksum") == f"{zlib.crc32(rest, checksum):08x}"
    if header.get("header_checksum") != f"{checksum:08x}" or not names_own_files(header):
        raise UserError(damaged(path))
    if not unharmed:
        raise UserError(damaged(path, header))
    return header, Passages(first + second + rest)


def names_own_files(header: dict) -> bool:
    """Tell whether all files that a header names lie in its folder: somebody else may have made it."""
    names = [f"metadata-{header['id']}.json", *(name for name, *_ in header["files"].values())]
    return all(Path(name).name == name for name in names)


def whole_header(index_dir: Path, path: Path) -> dict:
    """Return the header of metadata.json or of a backup after all of its files have been checked.

    Raises:
        UserError: one of them is missing or damaged.
    """
    header, _ = read_metadata(path)
    for kind in header["files"]:
        checked_file(index_dir, header, kind)
    return header


def damaged(path: Path, header: dict | None = None) -> str:
    """Return the message about a damaged file of an index; header: what is known of it."""
    if backup_files(path.parent):
        return f"{path} is damaged; run {build_command(path.parent)} --restore to go back to the index before"
    return f"{path} is damaged; run {build_command(path.parent, header)} to build it anew"


def build_command(index_dir: Path, header: dict | None = None) -> str:
    """Return the command that builds an index again, with the documents and the model that its header names."""
    header, usual = header or {}, build_parser().parse_args([])
    words = ["python", "generate_embeddings.py"]
    root, globs = header.get("documents_root"), header.get("globs")
    if root and root != str(usual.documents_root.resolve()) and is_there(Path(root)):  # it may have been moved
        words += ["--documents-root", root]
    if globs and globs != wanted_globs(config.TARGET_DOCUMENTS):
        words += [word for glob in globs for word in ("--documents", glob)]
    model = header.get("model", {}).get("name", usual.model)
    if model != usual.model and (is_there(Path(model)) or not Path(model).is_absolute()):
        words += ["--model", model]
    return command_for(shlex.join(words), "--index-dir", index_dir, usual.index_dir)


def wanted_globs(globs: list[str]) -> list[str]:
    return sorted({glob.lstrip("/") for glob in globs})


class Superseded(UserError):
    """An index opened a while ago has lost its files to newer ones: open it again."""


def checked_file(index_dir: Path, header: dict, kind: str) -> Path:
    """Return one of the index's files if it is as it was written."""
    name, size, checksum = header["files"][kind]
    if not is_whole(index_dir / name, size, checksum):
        raise UserError(damaged(index_dir / name, header))
    return index_dir / name


def open_to_read(path: Path) -> sqlite3.Connection:
    """Open a database that nothing changes, for whatever thread."""
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)


class Index:
    """An index opened for search; each part is read when it is first used.

    header: metadata.json without the passages; passages: its records, in the order of the vectors.
    """

    def __init__(self, index_dir: Path):
        self.folder = index_dir
        self.header, self.passages = read_metadata(index_dir / METADATA)

    def reopen(self) -> None:
        """Go over to the index that is current now."""
        self.__dict__ = Index(self.folder).__dict__  # in one step, or not at all

    def open_part(self, kind: str, opener: Callable[[Path], object]):
        """Return what opener makes of one of the index's files, or of the folder for the encoder.

        Raises:
            Superseded: it is gone because newer indexes have been committed since this one was opened.
            UserError: it is damaged.
        """
        try:
            return opener(self.folder if kind == "encoder" else checked_file(self.folder, self.header, kind))
        except (UserError, FileNotFoundError, RuntimeError, sqlite3.Error) as error:
            if read_header(self.folder / METADATA)["id"] != self.header["id"]:
                raise Superseded(f"{self.folder} was built anew meanwhile; search again") from None
            if isinstance(error, UserError):
                raise
            raise UserError(damaged(self.folder / METADATA, self.header)) from None

    @functools.cached_property
    def vectors(self):
        """The FAISS index."""
        import faiss

        faiss.omp_set_num_threads(1)  # one query gains nothing by more, and threads that wait for work take the cores

        def opener(path: Path):
            with path.open("rb") as file:  # FAISS itself can not open "dizin_ğ" on Windows
                return faiss.read_index(faiss.PyCallbackIOReader(file.read))

        return self.open_part("embeddings", opener)

    @functools.cached_property
    def sample_vectors(self) -> np.ndarray:
        """Up to 2,000 vectors spread evenly over the index: how near a query is to passages in general."""
        count = len(self.passages)
        return self.vectors.reconstruct_batch(np.linspace(0, count - 1, min(count, 2000)).astype(np.int64))

    @property
    def semantic_weight(self) -> float:
        """Hybrid search's weight of the meaning that run_finetuning.py has fitted for the index's model."""
        return self.header["search"].get("semantic_weight", DEFAULT_SEMANTIC_WEIGHT)

    @property
    def knows_language(self) -> bool:
        """Whether the model's base knows the documents' language: fitted_weight is 0.5 or more then."""
        return self.semantic_weight >= 0.5

    @functools.cached_property
    def keywords(self) -> Keywords:
        return self.open_part("keywords", lambda path: Keywords(open_to_read(path)))

    @functools.cached_property
    def encoder(self) -> Encoder:
        return self.open_part("encoder", lambda folder: load_encoder(self.header, folder))

    def changed_documents(self) -> list[str]:
        """Return the documents that are new, gone or not as they were; none where the index is used without them."""
        root, known = Path(self.header["documents_root"]).resolve(), self.header["documents"]
        if not is_there(root):
            return []
        found: set[str] = set()
        with contextlib.suppress(OSError):  # a folder that vanishes meanwhile: what else is new is told next time
            found = {path.relative_to(root).as_posix() for glob in self.header["globs"] for path in matches(root, glob)}
        added = [name for name in sorted(found - known.keys()) if can_be_indexed(root / name, root)]
        return added + [name for name, state in known.items() if file_changed(root / name, state)]


def load_index(index_dir: Path) -> Index:
    """Open the index in a folder.

    Raises:
        UserError: there is none, or it is damaged or of another format version.
    """
    return Index(index_dir)


# -------------------------------------------------------------------------------------------------- main


def list_backups(index_dir: Path) -> None:
    """Print the index and its backups, newest first: date, passages, size, model."""
    indexes = readable_indexes(index_dir)
    try:
        whole_header(index_dir, index_dir / METADATA)
    except UserError as error:
        if not indexes:
            raise
        warn(str(error))
    for path, header in indexes:
        megabytes = (sum(length for _, length, _ in header["files"].values()) + path.stat().st_size) / 1e6
        count, model = header["passage_count"], header["model"]["name"]
        line = f"{header['created']}  {count:>8,} passages  {megabytes:>8.1f} MB  {model}"
        print(config.printable(line))


def is_untouched(path: Path, state: list) -> bool:
    with contextlib.suppress(OSError):
        return [path.stat().st_size, path.stat().st_mtime_ns] == state[:2]
    return False


def file_changed(path: Path, state: list) -> bool:
    """Tell whether a file differs from its recorded state; its content is read only where size and time leave doubt."""
    try:
        now = path.stat()
        return now.st_size != state[0] or (now.st_mtime_ns != state[1] and sha256_of(path) != state[2])
    except OSError:
        return True


def document_states(documents_root: Path, paths: list[Path]) -> dict[str, list]:
    """Return [bytes, modified in ns, SHA-256] of each document by its path relative to the root."""
    root = documents_root.resolve()
    states = {}
    for path in paths:
        try:
            state = [path.stat().st_size, path.stat().st_mtime_ns, sha256_of(path)]
            states[path.relative_to(root).as_posix()] = state
        except OSError as error:
            warn(f"{path}: {error.strerror}, skipped")
    return states


def can_be_indexed(path: Path, root: Path) -> bool:
    """Tell whether find_documents and document_states would take up a file that matches a glob."""
    return is_document(path, root) and has_utf8_name(path) and os.access(path, os.R_OK)


def scripts_digest() -> str:
    """Return the SHA-256 of the code that cuts documents into passages and passages into words."""
    here = Path(__file__).parent
    return "".join(sha256_of(here / name)[:16] for name in ("prepare_finetuning_data.py", "run_finetuning.py"))


def current_state(options: argparse.Namespace, globs: list[str], paths: list[Path], source: Path) -> dict:
    """Return what the header of metadata.json is to say of documents, settings, scripts, and the model in `source`."""
    return {
        "globs": wanted_globs(globs),
        "max_passage_chars": config.MAX_PASSAGE_CHARS,
        "max_document_mb": config.MAX_DOCUMENT_MB,
        "faiss_index": config.FAISS_INDEX,
        "documents_root": str(options.documents_root.resolve()),
        "documents": document_states(options.documents_root, paths),
        "scripts": scripts_digest(),
        "model": {"name": model_name(options.model, source), "fingerprint": model_fingerprint(source)},
        "search": read_json(source / "evaluation.json").get("search", {}),
    }


def model_name(given: str, source: Path) -> str:
    """Return a model's name as --model takes it from whatever folder; source: where the model was found."""
    folder = Path(given).expanduser().absolute()
    return str(folder) if folder.resolve() == source.resolve() else given


CUT_BY = {  # what passages depend on beside the documents
    "documents_root": "the documents root",
    "max_passage_chars": "config.MAX_PASSAGE_CHARS",
    "max_document_mb": "config.MAX_DOCUMENT_MB",
    "scripts": "the code of the scripts",
}
REBUILT_FOR = CUT_BY | {
    "faiss_index": "config.FAISS_INDEX",
    "search": "the weights fitted for the search",
    "globs": "the globs of the documents",
}


def reasons_to_build(index_dir: Path, wanted: dict) -> list[str]:
    """Return in plain words how the index on disk differs from what it would hold if it were made now."""
    try:
        before = whole_header(index_dir, index_dir / METADATA)
    except UserError as error:
        return [str(error) if (index_dir / METADATA).exists() else f"no index in {index_dir} yet"]
    found = [f"{words} changed" for key, words in REBUILT_FOR.items() if before[key] != wanted[key]]
    if before["model"]["fingerprint"] != wanted["model"]["fingerprint"]:
        found.append("the model changed")
    elif not encoder_is_whole(index_dir / before["model"]["folder"], before["model"]):
        found.append("the model's ONNX form is gone or changed")
    elif before["model"].get("pieces") and not pieces_are_whole(index_dir, before["model"]):
        found.append("the model's vocabulary in the index is gone or changed")
    old, new = before["documents"], wanted["documents"]
    for words, names in (
        ("added", [name for name in new if name not in old]),
        ("removed", [name for name in old if name not in new]),
        ("changed", [name for name in new if name in old and new[name][2] != old[name][2]]),
    ):
        if names:
            found.append(f"{len(names)} documents {words} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
    return found


def build(index_dir: Path, wanted: dict, source: Path, backups: int, device: str | None) -> dict[str, int]:
    """Make an index as wanted out of what still holds of the one before; return what it counts.

    wanted: what the header of metadata.json is to say; source: the model's folder.
    """
    fingerprint = wanted["model"]["fingerprint"]
    model = wanted["model"] = wanted["model"] | prepare_encoder(source, fingerprint, index_dir)
    known, kept, documents_before = {}, [], {}
    with contextlib.suppress(UserError):
        before = load_index(index_dir)
        known = known_vectors(before, model)
        if all(before.header[key] == wanted[key] for key in CUT_BY):
            kept, documents_before = before.passages, before.header["documents"]
        del before
    root, limits = Path(wanted["documents_root"]), (wanted["max_passage_chars"], wanted["max_document_mb"])
    records = distinct_passages(root, wanted["documents"], kept, documents_before, *limits)
    # What changed while it was read is on record as nothing that a file can be, so that the next run reads it again.
    wanted["documents"] = {
        name: state if is_untouched(root / name, state) else [-1, 0, ""] for name, state in wanted["documents"].items()
    }
    vectors, embedded = embed(records, known, model, source, index_dir, device)
    known.clear()  # a million vectors are 1.5 GB: none is to be held twice while FAISS makes its own copy
    if model_fingerprint(source) != fingerprint:
        raise UserError(f"{source} was changed meanwhile; run again")
    commit(index_dir, wanted, records, vectors, backups)
    documents = {name for record in records for name in (record["source_file"], *record["also_in"])}
    return {"documents": len(documents), "distinct passages": len(records), "embedded": embedded}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's options, with the defaults of config.py."""
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
    config.add_verbosity(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the script with these arguments, by default the command line's; return the exit status."""
    options = build_parser().parse_args(argv)
    config.set_verbosity(options)
    index_dir, started = options.index_dir, time.perf_counter()
    config.check_number("INDEX_BACKUPS", 0)
    check_settings()
    if (options.list_backups or options.restore) and not is_first_process():
        return 0
    if options.list_backups:
        list_backups(index_dir)
        return 0
    if options.restore:
        print(config.printable(f"restored the index of {restore(index_dir)['created']} in {index_dir}"))
        return 0
    with joined_processes() as rank:
        if rank:
            encode_for_rank_0(config.DEVICE)
            return 0
        globs = options.documents or config.TARGET_DOCUMENTS
        paths = find_documents(options.documents_root, globs)
        if not options.check:
            restore_previous(Path(options.model))
        source, _ = find_model(options.model, fallback=False)
        wanted = current_state(options, globs, paths, source)
        reasons = config.printable("; ".join(reasons_to_build(index_dir, wanted)))
        if options.check or not reasons:
            print(f"{index_dir} is " + (f"not current: {reasons}" if reasons else "current"))
            return 1 if reasons else 0
        print(reasons, file=sys.stderr)
        with locked(index_dir / ".lock", f"writing {index_dir}"):
            counts = build(index_dir, wanted, source, config.INDEX_BACKUPS, config.DEVICE)
    seconds = time.perf_counter() - started
    print(f"{', '.join(f'{count} {name}' for name, count in counts.items())}; {config.duration(seconds)}")
    search = 'python semantic_search.py "your question"'
    print(f"wrote {index_dir}; next: {command_for(search, '--index-dir', index_dir, config.INDEX_DIR)}")
    return 0


if __name__ == "__main__":
    config.run(main)
