"""How good the search is, and how fast: cold, warm, and against SentenceTransformer, FAISS and JSON.

    python tests/bench_search.py --questions tests/sample_questions.jsonl --others everyday.jsonl
    python tests/bench_search.py --index-dir embeddings
    python tests/bench_search.py --index-dir embeddings --passages 200000    # a made-up index of that many, too

A question is a line {"query": "…", "gold": [{"file": "plan.md", "contains": "words of the answer"}]}; of the others,
which the documents do not answer, the query will do. Printed by mode: nDCG@10 of the first right result, how many of
the questions find something relevant (MIN_RELEVANCE), and how many of the others do not.

Cold: a fresh process for one query, the median of five. Warm: one process, a query a line through a pipe, the median
of all queries after the first. The times hold for this machine and this moment; the ratios are what to compare.
"""

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import config
from generate_embeddings import Index, commit, load_index
from prepare_finetuning_data import find_model, words_of

MODES = ("keyword", "semantic", "hybrid")
PLAIN_SEARCH = """
import json, sys
import faiss
from sentence_transformers import SentenceTransformer
model, vectors, passages, query = sys.argv[1:]
index, rows = faiss.read_index(vectors), json.load(open(passages, encoding="utf-8"))["passages"]
scores, places = index.search(SentenceTransformer(model).encode([query], normalize_embeddings=True), 5)
print(json.dumps([rows[place] for place in places[0]]))
"""


def seconds(command: list) -> float:
    """Return how long a process takes."""
    started = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True)
    assert done.returncode in (0, 1), done.stderr.decode()
    return time.perf_counter() - started


def search_command(index_dir: Path, mode: str) -> list:
    return [sys.executable, REPOSITORY / "semantic_search.py", "--json", "--index-dir", index_dir, "--mode", mode]


def read_questions(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_answer(result: dict, question: dict) -> bool:
    """Tell whether a result is right: of the answer's file, and one of the two holds most of the other's words."""
    files, words = [result["source_file"], *result["also_in"]], words_of(result["text"])
    texts = [words_of(gold["contains"]) for gold in question["gold"] if gold["file"] in files]

    def shared(wanted: tuple[str, ...]) -> bool:
        runs, others = ({one[i : i + 3] for i in range(max(1, len(one) - 2))} for one in (words, wanted))
        return len(runs & others) >= 0.6 * min(len(runs), len(others))

    return any(f" {' '.join(one)} " in f" {' '.join(words)} " or shared(one) for one in texts if one and words)


def answers(index_dir: Path, mode: str, questions: list[dict]) -> list[dict]:
    """Return what the search prints for each question: its first ten results."""
    command = [str(part) for part in [*search_command(index_dir, mode), "--top-k", 10]]
    lines = "".join(" ".join(question["query"].split()) + "\n" for question in questions)
    done = subprocess.run(command, input=lines, capture_output=True, encoding="utf-8")
    assert done.returncode in (0, 1), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def ranks(found: list[dict], questions: list[dict]) -> list[int | None]:
    """Return the rank of the first right result of each question, None where the first ten are wrong."""
    right = (
        (result["rank"] for result in one["results"] if is_answer(result, question))
        for one, question in zip(found, questions, strict=True)
    )
    return [next(own, None) for own in right]


def report_found(index_dir: Path, questions: list[dict], others: list[dict]) -> None:
    """Print how well each mode answers the questions, and tells those that have no answer here."""
    print(f"{len(questions)} questions, {len(others)} others, {index_dir}")
    print(f"  {'mode':<10}{'nDCG@10':>9}{'relevant':>10}{'others not':>12}")
    for mode in (*MODES, "task"):
        own, foreign = (answers(index_dir, mode, rows) for rows in (questions, others))
        gain = sum(1 / math.log2(rank + 1) for rank in ranks(own, questions) if rank) / len(questions)
        relevant = sum(one["relevant"] for one in own) / len(questions)
        refused = f"{sum(not one['relevant'] for one in foreign) / len(others):.0%}" if others else "–"
        print(f"  {mode:<10}{gain:>9.3f}{relevant:>10.0%}{refused:>12}")


def cold(index_dir: Path, query: str) -> dict[str, float]:
    """Return the median seconds of a fresh process, by mode; the modes take turns."""
    runs = [{mode: seconds([*search_command(index_dir, mode), query]) for mode in MODES} for _ in range(5)]
    return {mode: statistics.median(run[mode] for run in runs) for mode in MODES}


def warm(index_dir: Path, queries: list[str]) -> dict[str, float]:
    """Return the median seconds of a query through a pipe, by mode."""
    medians = {}
    for mode in MODES:
        command = [str(part) for part in search_command(index_dir, mode)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            took = []
            for query in queries:
                started = time.perf_counter()
                process.stdin.write(query.encode() + b"\n")
                process.stdin.flush()
                process.stdout.readline()
                took.append(time.perf_counter() - started)
            process.stdin.close()
        medians[mode] = statistics.median(took[1:])
    return medians


def plain_search(index: Index, query: str) -> float:
    """Return the median seconds of a fresh process that searches in the usual way."""
    model = find_model(index.header["model"]["name"], fallback=False)[0]
    vectors = index.folder / index.header["files"]["embeddings"][0]
    command = [sys.executable, "-c", PLAIN_SEARCH, model, vectors, index.folder / "metadata.json", query]
    return statistics.median(seconds(command) for _ in range(3))


def make_large_index(index: Index, folder: Path, count: int) -> None:
    """Write an index of `count` passages: those of an index again and again, a fourth of their words exchanged."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    records = list(index.passages)
    words = [word for record in records for word in record["text"].split()]
    made = []
    for number, record in zip(range(count), itertools.cycle(records), strict=False):
        text = record["text"].split(" ")
        for place in rng.choices(range(len(text)), k=len(text) // 4 + 1):
            text[place] = rng.choice(words)
        made.append(record | {"id": f"{number:016x}", "hash": f"{number:032x}", "text": " ".join(text)})
    vectors = index.vectors.reconstruct_n(0, len(records))[np.arange(count) % len(records)]
    vectors += noise.normal(0, 0.03, vectors.shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    model = index.header["model"]
    folder.mkdir(parents=True)
    relative = os.path.relpath((index.folder / model["folder"]).resolve(), folder.resolve())
    kept = {
        name: index.header[name] for name in ("documents_root", "globs", "max_passage_chars", "documents", "search")
    }
    made_up = {"passage_count": count, "faiss_index": "auto", "model": model | {"folder": relative}}
    header = kept | made_up
    commit(folder, header, made, vectors, backups=0)


def report(index_dir: Path, queries: list[str], plain: float | None) -> None:
    """Print cold and warm times by mode, and how many times faster than the plain search the cold ones are."""
    print(f"{len(load_index(index_dir).passages):,} passages in {index_dir}")
    print(f"  {'mode':<10}{'cold':>9}{'faster by':>11}{'warm':>11}{'cold/warm':>11}")
    warm_seconds = warm(index_dir, queries)
    for mode, one in cold(index_dir, queries[0]).items():
        ratio = f"{plain / one:.1f}×" if plain else "–"
        per_query = warm_seconds[mode]
        print(f"  {mode:<10}{one:>7.2f} s{ratio:>11}{1000 * per_query:>8.1f} ms{one / per_query:>10.0f}×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--index-dir", type=Path, default=config.INDEX_DIR)
    parser.add_argument("--passages", type=int, default=0, metavar="N", help="measure a made-up index of N, too")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="measure what these find instead of the time")
    parser.add_argument("--others", type=Path, metavar="FILE", help="questions that have no answer here")
    parser.add_argument("--queries", type=int, default=200, metavar="N", help="sent through the pipe")
    options = parser.parse_args()
    if options.others and not options.questions:
        parser.error("--others needs --questions")
    if options.questions:
        others = read_questions(options.others) if options.others else []
        return report_found(options.index_dir, read_questions(options.questions), others)
    index = load_index(options.index_dir)
    texts = [" ".join(passage["text"].split()[:8]) for passage in index.passages]
    queries = random.Random(1).sample(texts, min(options.queries, len(texts)))
    plain = plain_search(index, queries[0])
    print(f"SentenceTransformer, FAISS and JSON in a fresh process: {plain:.2f} s")
    report(options.index_dir, queries, plain)
    if options.passages:
        with tempfile.TemporaryDirectory() as folder:
            make_large_index(index, Path(folder) / "index", options.passages)
            report(Path(folder) / "index", queries, None)


if __name__ == "__main__":
    main()
