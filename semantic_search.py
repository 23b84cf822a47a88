#!/usr/bin/env python3
"""Search the target documents by meaning, by words, by both, or for what a task needs.  (step 4 of 4)

    1. prepare_finetuning_data.py   documents        -> fine_tuning_data/
    2. run_finetuning.py            fine_tuning_data -> fine_tuned_model/<name>/
    3. generate_embeddings.py       documents, model -> embeddings/
    4. semantic_search.py           embeddings       -> answers

    python semantic_search.py "görevler nasıl takip edilir?"
    python semantic_search.py --mode task --top-k 8 "CUDA PoC raporunu incele ve mimari açıdan değerlendir"
    python semantic_search.py                            # a prompt; an empty line ends it
    python semantic_search.py --json < queries.txt       # one query a line, one JSON object a line

From Python, each returns a list of dicts with score, id, source_file, chunk_index, text and more, best first:

    from semantic_search import semantic_search, keyword_search, hybrid_search, get_contextual_assistance_for_task
    for result in semantic_search("görevler nasıl takip edilir?", 5):
        print(result["score"], result["source_file"], result["text"])

Exit status: 0 something was found, 1 nothing was, 2 an error, 130 Ctrl-C.
"""

import argparse
import functools
import json
import math
import re
import shutil
import sys
import textwrap
from pathlib import Path

import config
from config import UserError
from generate_embeddings import Index, Superseded, load_index
from prepare_finetuning_data import plain_text, sentences, warn
from run_finetuning import combined_scores, keyword_scores

CANDIDATES = 200  # passages that each of the two arms puts up for the hybrid search
MAX_QUERY_CHARS = 20_000
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # a document must not steer the terminal
MAX_NEEDS = 16  # pieces that a long task description is searched in

# ---------------------------------------------------------------------------------------- scores of passages


def semantic_scores(index: Index, query: str, count: int) -> dict[int, float]:
    """Return the cosine similarity of the `count` nearest passages, by place in index.passages."""
    scores, places = index.vectors.search(index.encoder.encode([query]), min(count, len(index.passages)))
    return {int(place): float(score) for place, score in zip(places[0], scores[0], strict=True) if place >= 0}


def hybrid_scores(index: Index, query: str, count: int, semantic_weight: float) -> dict[int, float]:
    """Return combined_scores of the best `count` passages of each arm, by place in index.passages."""
    words = keyword_scores(index.keywords, query, count)
    vector = index.encoder.encode([query])
    scores, places = index.vectors.search(vector, min(count, len(index.passages)))
    meaning = {int(place): float(score) for place, score in zip(places[0], scores[0], strict=True) if place >= 0}
    if lost := [place for place in words if place not in meaning]:
        meaning |= zip(lost, (index.vectors.reconstruct_batch(lost) @ vector[0]).tolist(), strict=True)
    background = index.sample_vectors @ vector[0]
    return combined_scores(meaning, words, float(background.mean()), float(background.std()), semantic_weight)


def task_scores(index: Index, task: str, count: int, semantic_weight: float) -> dict[int, float]:
    """Return the hybrid scores of a task description, searched whole and need by need.

    A model reads only its window of a long text, and one vector blurs several needs: each passage gets its score for
    the whole description and half its best one for a single need.
    """
    whole = hybrid_scores(index, task, count, semantic_weight)
    needs = split_needs(task)
    if len(needs) < 4:  # two or three sentences are one need more often than not
        return whole
    best: dict[int, float] = {}
    for need in needs:
        for place, score in hybrid_scores(index, need, count, semantic_weight).items():
            best[place] = max(best.get(place, -math.inf), score)
    floor = min(whole.values(), default=0.0)
    return {place: whole.get(place, floor) + score / 2 for place, score in best.items()}


def split_needs(task: str) -> list[str]:
    """Cut a task description into its lines and sentences, short ones joined to the one before."""
    pieces: list[str] = []
    for line in task.splitlines():
        for sentence in sentences(plain_text(line)):
            if pieces and len(sentence.split()) < 4:
                pieces[-1] += " " + sentence
            else:
                pieces.append(sentence)
    return pieces[:MAX_NEEDS]


# -------------------------------------------------------------------------------------------- the answers


def search(index: Index, query: str, mode: str, top_k: int, semantic_weight: float) -> list[dict]:
    """Return the best top_k passages as dicts, best first; passages with one text are one result with also_in.

    score: cosine similarity (semantic), BM25 (keyword), or the standard score of both made a number from 0 to 1
    (hybrid, task).

    Raises:
        UserError: the query is empty.
    """
    if not query.strip():
        raise UserError('the query is empty; give some words, such as: python semantic_search.py "who reviews a task?"')
    if len(query) > MAX_QUERY_CHARS:
        warn(f"only the first {MAX_QUERY_CHARS:,} of the query's {len(query):,} characters are searched")
        query = query[:MAX_QUERY_CHARS]
    while True:
        try:
            return make_results(index, all_scores(index, query, mode, top_k, semantic_weight), top_k)
        except Superseded:  # newer indexes were committed since this one was opened, and its files removed
            index.reopen()


def all_scores(index: Index, query: str, mode: str, top_k: int, semantic_weight: float) -> dict[int, float]:
    """Return the scores of the passages that the mode puts up, by place in index.passages."""
    candidates = min(max(CANDIDATES, 2 * top_k), len(index.passages))
    if mode == "semantic":
        return semantic_scores(index, query, candidates)
    if mode == "keyword":
        return keyword_scores(index.keywords, query, candidates)
    score = task_scores if mode == "task" else hybrid_scores
    combined = score(index, query, candidates, semantic_weight)
    return {place: 1 / (1 + math.exp(-value)) for place, value in combined.items()}


def make_results(index: Index, scores: dict[int, float], top_k: int) -> list[dict]:
    """Return the top_k distinct texts of the scored passages as results."""
    results: dict[str, dict] = {}
    for place, score in sorted(scores.items(), key=lambda item: (-item[1], item[0])):
        passage = index.passages[place]
        text = passage["text"]
        if text in results:
            also_in, files = results[text]["also_in"], [passage["source_file"], *passage["also_in"]]
            also_in += [file for file in files if file != results[text]["source_file"] and file not in also_in]
        elif len(results) < top_k:
            kept = ("id", "source_file", "chunk_index", "start_line", "end_line", "text")
            results[text] = {"rank": len(results) + 1, "score": round(score, 6)} | {
                name: passage[name] for name in kept
            }
            results[text] |= {"also_in": list(passage["also_in"]), "heading": " > ".join(passage["heading"])}
    return list(results.values())


# ----------------------------------------------------------------------------------- functions for importers


@functools.cache
def default_index() -> Index:
    return load_index(config.INDEX_DIR)


def semantic_search(query: str, k: int | None = None) -> list[dict]:
    """Return the k passages nearest in meaning, from the index in config.INDEX_DIR (k: config.TOP_K by default)."""
    return search(default_index(), query, "semantic", k or config.TOP_K, 1.0)


def keyword_search(query: str, k: int | None = None) -> list[dict]:
    """Return the k passages that fit the query's words and names best."""
    return search(default_index(), query, "keyword", k or config.TOP_K, 0.0)


def hybrid_search(
    query: str, k: int | None = None, semantic_weight: float | None = None, keyword_weight: float | None = None
) -> list[dict]:
    """Return the k best passages by meaning and words together; the weights count in proportion to each other."""
    return search(default_index(), query, "hybrid", k or config.TOP_K, share(semantic_weight, keyword_weight))


def get_contextual_assistance_for_task(task_description: str, k: int | None = None) -> list[dict]:
    """Return the k passages most helpful for a task; a long description is searched need by need."""
    return search(default_index(), task_description, "task", k or config.TOP_K, config.SEMANTIC_WEIGHT)


def share(semantic_weight: float | None, keyword_weight: float | None) -> float:
    if semantic_weight is None:
        return config.SEMANTIC_WEIGHT if keyword_weight is None else max(0.0, 1 - keyword_weight)
    total = semantic_weight + (1 - semantic_weight if keyword_weight is None else keyword_weight)
    return semantic_weight / total if total > 0 else config.SEMANTIC_WEIGHT


# ------------------------------------------------------------------------------------------ the terminal


def print_results(results: list[dict]) -> None:
    """Print results for people: place, score, heading path, the beginning of the text."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
    if not results:
        print("nothing relevant found")
    for result in results:
        print(f"{result['rank']}. {result['source_file']}:{result['start_line']}  ({result['score']:.3f})")
        if result["heading"]:
            print("   " + textwrap.shorten(result["heading"], width - 3, placeholder="…"))
        text = textwrap.shorten(CONTROL.sub("", plain_text(result["text"])), 3 * (width - 3), placeholder=" …")
        print(textwrap.fill(text, width, initial_indent="   ", subsequent_indent="   "))
        if result["also_in"]:
            print("   " + textwrap.shorten(f"also in {', '.join(result['also_in'])}", width - 3, placeholder="…"))
        print()


def answer(index: Index, query: str, options: argparse.Namespace) -> int:
    """Search, print, and return how many results there are; an empty line among many has none."""
    query = query.encode(errors="replace").decode()  # bytes of the command line that are no UTF-8
    empty = not query.strip() and not options.query
    results = [] if empty else search(index, query, options.mode, options.top_k, config.SEMANTIC_WEIGHT)
    if options.json:
        print(json.dumps({"query": query, "mode": options.mode, "results": results}, ensure_ascii=False), flush=True)
    else:
        print_results(results)
    return len(results)


def prompt(index: Index, options: argparse.Namespace) -> int:
    """Answer line by line until an empty line or Ctrl-D."""
    found = 0
    while True:
        try:
            query = input("search> " if sys.stdout.isatty() else "")  # a file holds the answers alone
        except EOFError:
            print(file=sys.stderr)
            return found
        if not query.strip():
            return found
        found += answer(index, query, options)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Search the target documents by meaning, by words, by both, or for what a task needs.",
        epilog='examples:\n  python semantic_search.py "who reviews a finished task?"\n'
        '  python semantic_search.py --mode keyword --top-k 3 "KM-2.1"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("query", nargs="*", help="one query; without it, a prompt, or one query a line from a pipe")
    modes = ["semantic", "keyword", "hybrid", "task"]
    parser.add_argument("--mode", choices=modes, default=config.SEARCH_MODE, help="(config.SEARCH_MODE)")
    parser.add_argument("--top-k", type=int, default=config.TOP_K, metavar="N", help="results shown (config.TOP_K)")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a query on one line, nothing else on stdout"
    )
    parser.add_argument("--index-dir", type=Path, default=config.INDEX_DIR, metavar="DIR", help="(config.INDEX_DIR)")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    if options.top_k < 1:
        raise UserError(f"--top-k {options.top_k} is too low; the least is 1")
    index = load_index(options.index_dir)
    if changed := index.changed_documents():
        warn(f"{options.index_dir} is older than {len(changed)} of its documents; run generate_embeddings.py")
    if options.query:
        found = answer(index, " ".join(options.query), options)
    elif sys.stdin.isatty():
        found = prompt(index, options)
    else:
        lines = (line.decode(errors="replace").rstrip("\r\n") for line in sys.stdin.buffer)
        found = sum(answer(index, line, options) for line in lines)
    return 0 if found else 1


if __name__ == "__main__":
    config.run(main)
