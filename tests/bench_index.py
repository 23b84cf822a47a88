#!/usr/bin/env python3
"""Measure the index: speed of embedding, of refreshing, and how it grows.  Prints tables; compare within one run only.

    python tests/bench_index.py                                  # everything, on the sample project; 100,000 passages
    python tests/bench_index.py encoding refresh --documents ~/project --model packaged
    python tests/bench_index.py growth --passages 10000 100000 1000000

encoding: passages a second of generate_embeddings.py's encoder against SentenceTransformer.encode, taken in turns.
refresh:  a full build, nothing changed, --check, one document edited; seconds, ratio to the full build, peak memory.
growth:   made-up documents through the real scripts, with a bag-of-words stand-in for the model (384 dimensions, words
          of a topic near each other), since embedding a million passages with a real one takes hours on a CPU.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import config
from generate_embeddings import (
    EMBED_AT_ONCE,
    Index,
    encoding_function,
    load_index,
    prepare_encoder,
    write_vectors,
)
from prepare_finetuning_data import find_documents, find_model, read_passages
from run_finetuning import load_model, model_fingerprint
from semantic_search import Request, search


class Run(NamedTuple):
    seconds: float
    peak_mib: float
    output: str


MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""  # the system's own figure, ru_maxrss, counts the memory of the process that started this one


def run(script: str, *arguments, status: int = 0) -> Run:
    """Run a script in a process of its own; return its wall time, its peak resident memory and what it printed."""
    command = [sys.executable, "-X", "importtime", "-c", MEASURED, REPOSITORY / script, *arguments]
    started = time.perf_counter()
    done = subprocess.run([*map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, cwd=REPOSITORY)
    seconds = time.perf_counter() - started
    output = done.stderr.decode(errors="replace")
    if done.returncode != status:
        sys.exit(f"{script} ended with {done.returncode}:\n{output[-2000:]}")
    return Run(seconds, int(re.search(r"VmHWM:\s*(\d+) kB", output)[1]) / 1024, output)


def imports_torch(output: str) -> bool:
    return re.search(r"^import time:.*\| +torch$", output, re.M) is not None


# --------------------------------------------------------------------------------------------- embedding


def measure_encoding(documents: Path, patterns: list[str], model: str, sample: int, workspace: Path) -> None:
    """Print passages a second of both on the device that they choose, each the best of three turns."""
    source, _ = find_model(model, fallback=False)
    record = prepare_encoder(source, model_fingerprint(source), workspace)
    plain = load_model(source, config.DEVICE)
    encode = encoding_function(source, workspace / record["folder"], config.DEVICE)
    passages = read_passages(documents, find_documents(documents, patterns), config.MAX_PASSAGE_CHARS, 20)
    texts = [passage.model_text for passage in random.Random(7).sample(passages, min(sample, len(passages)))]
    texts.sort(key=len)
    lots = [texts[start : start + EMBED_AT_ONCE] for start in range(0, len(texts), EMBED_AT_ONCE)]
    took: dict[str, list[float]] = {"SentenceTransformer.encode": [], "generate_embeddings.py": []}
    for _ in range(3):
        started = time.perf_counter()
        plainly = plain.encode(texts, show_progress_bar=False)
        took["SentenceTransformer.encode"].append(time.perf_counter() - started)
        started = time.perf_counter()
        vectors = np.concatenate([encode(lot) for lot in lots])
        took["generate_embeddings.py"].append(time.perf_counter() - started)
    cosines = (plainly / np.linalg.norm(plainly, axis=1, keepdims=True) * vectors).sum(axis=1)
    print(f"\nembedding {len(texts)} passages, {os.cpu_count()} cores, {plain.device}\n")
    print("| | passages/s | ratio |\n|---|---|---|")
    for name, seconds in took.items():
        ratio = min(took["SentenceTransformer.encode"]) / min(seconds)
        print(f"| {name} | {len(texts) / min(seconds):.1f} | {ratio:.2f} |")
    print(f"\nworst cosine between the two: {cosines.min():.7f}")


# -------------------------------------------------------------------------------------------- refreshing


def measure_refresh(documents: Path, patterns: list[str], model: str, workspace: Path) -> None:
    """Print what each kind of run takes on a copy of the documents."""
    root = Path(shutil.copytree(documents, workspace / "documents"))
    paths = find_documents(root, patterns)
    arguments = ["--documents-root", root, "--model", model, "--index-dir", workspace / "index"]
    for pattern in patterns:
        arguments += ["--documents", pattern]
    runs = {"full build": run("generate_embeddings.py", *arguments)}
    runs["nothing changed"] = run("generate_embeddings.py", *arguments)
    runs["--check"] = run("generate_embeddings.py", *arguments, "--check")
    edited = max(paths, key=lambda path: path.stat().st_size)
    edited.write_text(edited.read_text(encoding="utf-8") + "\n## Ek\n\nYeni eklenen bir paragraf.\n", encoding="utf-8")
    runs["one document edited"] = run("generate_embeddings.py", *arguments)
    print(f"\n{len(paths)} documents, {len(load_index(workspace / 'index').passages):,} distinct passages\n")
    print("| | seconds | full build takes × as long | peak MiB | imports torch |\n|---|---|---|---|---|")
    for name, one in runs.items():
        ratio = runs["full build"].seconds / one.seconds
        torch = "yes" if imports_torch(one.output) else "no"
        print(f"| {name} | {one.seconds:.2f} | {ratio:.0f} | {one.peak_mib:.0f} | {torch} |")


# ------------------------------------------------------------------------------------------------ growth

TOPICS, WORDS_OF_TOPIC, DIMENSIONS = 500, 60, 384


def topic_words() -> list[list[str]]:
    """Return made-up words, a list for each topic."""
    draw = random.Random(11)
    syllables = [first + vowel for first in "bcdfghklmnprstvyz" for vowel in "aeıioöuü"]
    words: dict[str, None] = {}
    while len(words) < TOPICS * WORDS_OF_TOPIC:
        words["".join(draw.choices(syllables, k=draw.randint(3, 4)))] = None
    return [list(words)[start::TOPICS] for start in range(TOPICS)]


def made_up_text(draw: random.Random, words: list[list[str]], topic: int, length: int) -> str:
    """Return words, most of one topic and the others of any."""
    return " ".join(draw.choice(words[topic if draw.random() < 0.8 else draw.randrange(TOPICS)]) for _ in range(length))


def write_documents(folder: Path, count: int, words: list[list[str]]) -> None:
    """Write documents of a hundred passages each; one topic to ten passages."""
    draw = random.Random(12)
    for number in range(count // 100):
        sections = []
        topics = [draw.randrange(TOPICS) for _ in range(10)]
        for place in range(100):
            topic = topics[place // 10]
            sections.append(f"## {words[topic][0]} {place}\n\n{made_up_text(draw, words, topic, 25)}.\n")
        path = folder / f"{number // 100:03}" / f"{number:05}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(sections), encoding="utf-8")


def write_stand_in_model(folder: Path, words: list[list[str]]) -> None:
    """Write a model folder whose ONNX pipeline is the normalised mean of its words' vectors."""
    from onnx import TensorProto, helper, numpy_helper, save
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    rng = np.random.default_rng(13)
    centres = rng.standard_normal((TOPICS, DIMENSIONS))
    vocabulary = {"[PAD]": 0, "[UNK]": 1}
    table = [np.zeros(DIMENSIONS), rng.standard_normal(DIMENSIONS)]
    for topic, group in enumerate(words):
        for word in group:
            vocabulary[word] = len(table)
            table.append(0.7 * centres[topic] + rng.standard_normal(DIMENSIONS))
    table = np.array(table, dtype=np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Cast", ["attention_mask"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["floats", "last"], ["mask"]),
        helper.make_node("Mul", ["words", "mask"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "second"], ["sum"], keepdims=0),
        helper.make_node("LpNormalization", ["sum"], ["sentence_embedding"], axis=1, p=2),
    ]
    constants = {"table": table, "last": np.array([2]), "second": np.array([1])}
    integers = [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "t"]) for name in
                ("input_ids", "attention_mask")]  # fmt: skip
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["b", DIMENSIONS])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "bag_of_words", integers, [output], tensors)
    (folder / "onnx").mkdir(parents=True)
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "onnx/model.onnx"
    )
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"pad_token_id": 0, "max_position_embeddings": 128}))
    save_file({"table": table[:1]}, folder / "model.safetensors")


def measure_growth(count: int, workspace: Path) -> list[str]:
    """Return a row of the table: build, refresh, sizes, query times, recall."""
    words = topic_words()
    write_documents(workspace / "documents", count, words)
    write_stand_in_model(workspace / "model", words)
    arguments = ["--documents-root", workspace / "documents", "--documents", "**/*.md"]
    arguments += ["--model", workspace / "model", "--index-dir", workspace / "index"]
    build = run("generate_embeddings.py", *arguments)
    edited = workspace / "documents" / "000" / "00000.md"
    edited.write_text(edited.read_text(encoding="utf-8") + "\n## ek\n\nYeni bir paragraf.\n", encoding="utf-8")
    refresh = run("generate_embeddings.py", *arguments)
    draw = random.Random(14)
    queries = [made_up_text(draw, words, draw.randrange(TOPICS), 6) for _ in range(200)]
    cold = run("semantic_search.py", "--mode", "semantic", "--index-dir", workspace / "index", queries[0])
    index = load_index(workspace / "index")
    warm = milliseconds(lambda query: search(index, query, Request("semantic", 5)), queries)
    megabytes = sum(path.stat().st_size for path in index_files(workspace / "index", index)) / 1e6
    recall, exact, vectors_seconds = compare_with_exact(index, queries, workspace)
    print(f"{count:,}: build {build.seconds:.0f} s, refresh {refresh.seconds:.0f} s", file=sys.stderr)
    return [
        *(f"{count:,}", type(index.vectors).__name__.removeprefix("Index"), f"{build.seconds:.0f} s"),
        *(f"{vectors_seconds:.0f} s", f"{refresh.seconds:.0f} s", f"{build.peak_mib:.0f} MiB"),
        *(f"{refresh.peak_mib:.0f} MiB", f"{cold.peak_mib:.0f} MiB", f"{megabytes:.0f} MB"),
        *(f"{cold.seconds:.1f} s", f"{warm:.1f} ms", f"{exact:.1f} ms", f"{recall:.3f}"),
    ]


def index_files(folder: Path, index: Index) -> list[Path]:
    return [folder / "metadata.json", *(folder / name for name, *_ in index.header["files"].values())]


def milliseconds(action, queries: list) -> float:
    """Return the median time of an action, after the first few."""
    took = []
    for query in queries:
        started = time.perf_counter()
        action(query)
        took.append(1000 * (time.perf_counter() - started))
    return statistics.median(took[5:])


def compare_with_exact(index: Index, queries: list[str], workspace: Path) -> tuple[float, float, float]:
    """Return recall@10 against exact search, the ms that an exact search takes, and the s that the FAISS file took."""
    import faiss

    vectors = index.vectors.reconstruct_n(0, index.vectors.ntotal)
    embedded = index.encoder.encode(queries)
    found = index.vectors.search(embedded, 10)[1]
    exact = faiss.knn(embedded, vectors, 10, faiss.METRIC_INNER_PRODUCT)[1]
    recall = float((exact[:, :, None] == found[:, None, :]).any(axis=2).mean())
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    one_by_one = milliseconds(lambda vector: flat.search(vector[None], 200), list(embedded))
    started = time.perf_counter()
    write_vectors(workspace / "again.index", vectors, config.FAISS_INDEX)
    return recall, one_by_one, time.perf_counter() - started


def print_growth(rows: list[list[str]]) -> None:
    names = ("passages", "FAISS", "build", "of that FAISS", "one edited", "peak of the build", "of the refresh")
    names += ("of a search", "on disk", "cold query", "warm query", "exact scan", "recall@10")
    print("\n" + "\n".join("| " + " | ".join(row) + " |" for row in [names, ["---"] * len(names), *rows]))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure embedding, refreshing and growth of the index.")
    parser.add_argument("parts", nargs="*", default=["encoding", "refresh", "growth"], help="encoding, refresh, growth")
    parser.add_argument("--documents", type=Path, metavar="DIR", help="every Markdown file below (the sample project)")
    parser.add_argument("--model", default="packaged", metavar="NAME_OR_PATH")
    parser.add_argument("--sample", type=int, default=600, metavar="N", help="passages that are embedded (600)")
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 100_000], metavar="N", help="for growth")
    parser.add_argument("--workspace", type=Path, metavar="DIR", help="where to work; removed after (the system's)")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    documents, patterns = (options.documents or config.DOCUMENTS_ROOT).resolve(), ["**/*.md"]
    rows = []
    for part in options.parts:
        for count in options.passages if part == "growth" else [0]:
            with tempfile.TemporaryDirectory(dir=options.workspace) as folder:
                if part == "encoding":
                    measure_encoding(documents, patterns, options.model, options.sample, Path(folder))
                elif part == "refresh":
                    measure_refresh(documents, patterns, options.model, Path(folder))
                else:
                    rows.append(measure_growth(count, Path(folder)))
    if rows:
        print_growth(rows)


if __name__ == "__main__":
    config.run(main)
