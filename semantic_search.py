#!/usr/bin/env python3
"""Search the target documents by meaning, by words, by both, or for what a task needs.  (step 4 of 4)

    1. prepare_finetuning_data.py   documents        -> fine_tuning_data/
    2. run_finetuning.py            fine_tuning_data -> fine_tuned_model/<name>/
    3. generate_embeddings.py       documents, model -> embeddings/
    4. semantic_search.py           embeddings       -> answers

    python semantic_search.py "görevler nasıl takip edilir?"
    python semantic_search.py --mode task --top-k 8 "CUDA PoC raporunu incele ve mimari açıdan değerlendir"
    python semantic_search.py --mode task KM-2.1         # what helps with a task that the documents define
    python semantic_search.py --compare embeddings_base "görev takibi"
    python semantic_search.py --compare embeddings_base --html comparison.html < queries.txt    # a page to judge on
    python semantic_search.py                            # a prompt; :help tells its commands, Ctrl-D ends it
    python semantic_search.py --json < queries.txt       # one query a line, one JSON object a line

One JSON object: {"query", "mode", "relevant": does one of the first five results come to --min-relevance, or what
covers a need of a task, "results": [{"rank", "score", "relevance", "id", "source_file", "also_in": [files with the same
text], "near_copies": ["file:line"], "heading", "chunk_index", "start_line", "end_line", "text"}]}; --context and
--explain add "context" and "explain" to a result. --mode task adds "needs": [{"text", "covered_by": [{"source_file",
"start_line", "relevance"}]}], "documents": [{"source_file", "needs", "results": [ranks]}], "entry" (the task's own
passage, or null), and to each result "needs", the places of those needs that it covers. --compare adds "other":
{"index_dir", "relevant", "results"} and to each result "other_rank".

From Python, each returns the list of results, best first:

    from semantic_search import semantic_search, keyword_search, hybrid_search, get_contextual_assistance_for_task
    for result in semantic_search("görevler nasıl takip edilir?", 5):
        print(result["score"], result["source_file"], result["text"])

Exit status: 0 something relevant was found, 1 nothing was, 2 an error, 130 Ctrl-C.
"""

import argparse
import atexit
import contextlib
import functools
import heapq
import itertools
import json
import math
import numbers
import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

import config
from config import UserError, printable, replacing
from generate_embeddings import Index, Superseded, build_command, is_there, load_index
from prepare_finetuning_data import LIST_MARK, TABLE_RULE, composed, plain_text, render, sentences, warn
from run_finetuning import (
    CANDIDATES,
    IS_UNSPACED,
    MAX_QUERY_WORDS,
    QueryWord,
    combined_scores,
    keyword_scores,
    keyword_terms,
    query_words,
    standard_scores,
    weight_for_few_words,
    weight_for_query,
    words_and_names,
)

MODES = ("semantic", "keyword", "hybrid", "task")
MAX_QUERY_CHARS = 20_000
MAX_NEEDS = 32  # pieces that a long task description is searched in
COPIES_AMONG = 50  # how many more of the best passages are looked through for copies of those shown
JUDGED = 5  # the first results, which decide whether anything relevant was found

# ---------------------------------------------------------------------------------------- scores of passages


class Request(NamedTuple):
    """How to search; semantic_weight None: the one fitted for the index."""

    mode: str
    top_k: int
    semantic_weight: float | None = None
    min_relevance: float = 0.0
    context: int = 0
    explain: bool = False


class Scored(NamedTuple):
    """The scores of one query, by place in index.passages; ranking is what the results are ordered by.

    mean, deviation: of the query's cosines with Index.sample_vectors. Without a model there are no cosines.
    """

    words: list[QueryWord]
    cosines: dict[int, float]
    keyword: dict[int, float]
    ranking: dict[int, float]
    semantic_weight: float
    mean: float = 0.0
    deviation: float = 1.0


@functools.cache
def can_embed(index: Index, index_id: str) -> bool:
    """Tell whether the index's model is at hand; say it once where it is not. Reopened, an index has another ID."""
    try:
        return index.encoder is not None
    except Superseded:  # the newer index may have its model
        raise
    except UserError as error:
        warn(f"searching by words alone: {error}")
        return False


def score_passages(index: Index, query: str, request: Request) -> Scored:
    """Score the best passages of each arm that the mode uses; without a model, hybrid search goes by words alone."""
    count = min(max(CANDIDATES, 2 * request.top_k), len(index.passages))
    embeds = request.mode == "semantic" or (request.mode != "keyword" and can_embed(index, index.header["id"]))
    words = query_words(index.keywords, query)
    keyword, held = keyword_scores(index.keywords, words, count)
    if not embeds:
        standard = standard_scores(keyword, itertools.islice(keyword, CANDIDATES))
        return Scored(words, {}, keyword, keyword if request.mode == "keyword" else standard, 0.0)
    vector = index.encoder.encode([query])
    scores, places = index.vectors.search(vector, count)
    order = np.lexsort((places[0], -scores[0]))  # of equal ones FAISS gives the last first
    cosines = {int(places[0][i]): float(scores[0][i]) for i in order if places[0][i] >= 0}
    lost = [place for place in keyword if place not in cosines and request.mode != "semantic"]
    if lost:
        cosines |= zip(lost, cosines_of(index.vectors.reconstruct_batch(lost), vector[0]).tolist(), strict=True)
    background = cosines_of(index.sample_vectors, vector[0])
    mean, deviation = float(background.mean()), float(background.std()) or 1.0
    if request.mode == "semantic":
        return Scored(words, cosines, keyword, cosines, 1.0, mean, deviation)
    weight = request.semantic_weight
    if weight is None:
        weight = weight_for_few_words(index.semantic_weight, words)
    weight = weight_for_query(weight, held)
    ranking = combined_scores(cosines, keyword, mean, deviation, weight)
    return Scored(words, cosines, keyword, ranking, weight, mean, deviation)


def cosines_of(vectors: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return np.einsum("ij,j->i", vectors, vector)  # for so few, waking the threads of @ takes longer than the product


USUAL_NEARNESS = 0.15  # stands in for a model's
# What counts towards the relevance: nearness, the share of the words held, their number, whether all are, the number of
# passages, and the constant; the second where the model's base knows the documents' language.
RELEVANCE = (12.5, 3.05, 3.24, 4.1, -0.2, -5.75)
RELEVANCE_KNOWN = (24.0, 4.5, 2.4, 7.0, -0.8, -2.8)


def relevance(
    words: list[QueryWord], exact: set[str], stems: set[str], nearness: float, passages: int, known: bool = False
) -> float:
    """Return the probability that the passage with these keyword_terms has to do with the query of these words.

    It was fitted by logistic regression on people's questions to eight sets of documents with their tuned models
    (Turkish planning, regulations and history, English abstracts and software), each against the questions to ten
    sets; those to documents of a near subject counted for a fifth, and so did words and pairs of words drawn from each
    set. A query stood by the likeliest of its first five passages. The number of passages counts for less than fitted,
    and the constant is that by which nine tenths of the planning documents' own questions come to 0.5, or of the
    English software's where the language is known. README.md tells how far it holds.

    A name that is held counts as the words it is made of, up to four. Of a query of more words than any of those had,
    more are held by chance: beyond twelve, a word held counts for less.

    nearness: the query's cosine with the passage, less its mean cosine with passages in general: vectors that lie all
    in one direction, as a language's do that the model does not know, tell nothing.
    passages: the number that the index has; in more of them, more is found by chance.
    known: whether the nearness is that of a model whose base knows the documents' language, which tells twice as much.
    A query without words has 0.
    """
    weight = sum(word.weight for word in words)
    if not weight:
        return 0.0
    words = [word for word in words if word.weight]
    held = [word for word in words if word.is_in(exact, stems)]
    near = [word for word in words if word not in held and word.is_nearly_in(stems)] if held else []
    coverage = (sum(word.weight for word in held) + sum(word.weight for word in near) / 2) / weight
    in_names = sum(min(3, word.term.strip("-").count("-")) for word in held if word.kind == "name")
    number = (len(held) + in_names + len(near) / 2) * min(1.0, 12 / len(words)) ** 0.5
    all_held = coverage > 0.99  # a query of a word or two that stand there, whatever its meaning
    counted = (nearness, coverage, math.log1p(number), all_held, math.log(passages), 1.0)
    weights = RELEVANCE_KNOWN if known else RELEVANCE
    return 1 / (1 + math.exp(-sum(one * value for one, value in zip(weights, counted, strict=True))))


def relevances(index: Index, searches: list[Scored], place: int) -> list[float]:
    """Return how relevant a passage is to each of the queries, from 0 to 1."""
    exact, stems = passage_terms(index.passages[place])
    values = []
    for one in searches:
        nearness, known = USUAL_NEARNESS, False
        if one.cosines:  # a passage that is no candidate is no nearer than those that are
            nearness = (one.cosines[place] if place in one.cosines else min(one.cosines.values())) - one.mean
            known = index.knows_language
        values.append(relevance(one.words, exact, stems, nearness, len(index.passages), known))
    return values


def passage_terms(passage: dict) -> tuple[set[str], set[str]]:
    """Return the keyword_terms of a passage and its headings: whole words and names, and stems."""
    exact, stems = keyword_terms(". ".join([*passage["heading"], passage["text"]]))
    return set(exact), set(stems)


# -------------------------------------------------------------------------------------------- the answers


def search(index: Index, query: str, request: Request) -> dict:
    """Return the answer to a query, in the form that the module's docstring gives.

    score: cosine similarity (semantic), that of keyword_scores (keyword), or the standard score of both made a number
    from 0 to 1 (hybrid, task); relevance: the probability that the passage has to do with the query.

    Raises:
        UserError: the query is empty, or semantic search lacks the index's model.
    """
    query = composed(query.encode(errors="replace").decode())  # some bytes of a pipe are no UTF-8
    check_request(request)
    if not query.strip():
        raise UserError('the query is empty; give some words, such as: python semantic_search.py "who reviews a task?"')
    if len(query) > MAX_QUERY_CHARS:
        warn(f"only the first {MAX_QUERY_CHARS:,} of the query's {len(query):,} characters are searched")
    searched = query[:MAX_QUERY_CHARS]
    if request.mode in ("keyword", "hybrid") and len(set(words_and_names(searched))) > MAX_QUERY_WORDS:
        warn(f"only the first {MAX_QUERY_WORDS} words of the query are looked up; --mode task searches whole texts")
    while True:
        try:
            return {"query": query, "mode": request.mode} | find(index, searched, request)
        except Superseded:  # newer indexes were committed since this one was opened, and its files removed
            index.reopen()


def check_request(request: Request) -> None:
    """Refuse numbers that make no sense, whether options, config.py or an importer gave them."""
    weight, count = request.semantic_weight, request.top_k
    if weight is not None and not (isinstance(weight, numbers.Real) and 0 <= weight <= 1):
        raise UserError(f"the weight of the meaning is {weight!r}; it goes from 0 to 1 (config.SEMANTIC_WEIGHT)")
    if not isinstance(count, numbers.Integral) or count < 1:
        raise UserError(f"{count!r} is no number of results; the least is 1 (--top-k, config.TOP_K)")


def find(index: Index, query: str, request: Request) -> dict:
    """Return what search adds to the query and the mode."""
    judged = request._replace(top_k=max(request.top_k, JUDGED))
    if request.mode == "task":
        answer = assist(index, query, judged)
    else:
        scored = score_passages(index, query, request)
        results = make_results(index, scored.ranking, [scored], judged)
        answer = {"relevant": is_relevant(results, request), "results": results}
    return first_results(answer, request.top_k)


def first_results(answer: dict, count: int) -> dict:
    """Return an answer with its first results alone, and a task's documents as these have them."""
    results = answer["results"][:count]
    documents = {"documents": by_document(results)} if "needs" in answer else {}
    return answer | {"results": results} | documents


def is_relevant(results: list[dict], request: Request) -> bool:
    return any(result["relevance"] >= request.min_relevance for result in results[:JUDGED])


def make_results(index: Index, ranking: dict[int, float], searches: list[Scored], request: Request) -> list[dict]:
    """Return the top_k distinct passages of a ranking; copies and near-copies are named by the best of them."""
    results: dict[str, dict] = {}
    word_sets: list[tuple[dict, set[str]]] = []
    looked_through = 0  # since the last result was found
    for place, score in sorted(ranking.items(), key=operator.itemgetter(1), reverse=True):
        looked_through += len(results) == request.top_k
        if looked_through > COPIES_AMONG:
            break
        passage = index.passages[place]
        text = passage["text"]
        if text in results:
            add_place(results[text], passage)
            continue
        words = set(text.split())
        original = next((result for result, others in word_sets if are_near_copies(words, others)), None)
        if original:
            original["near_copies"].append(f"{passage['source_file']}:{passage['start_line']}")
        elif len(results) < request.top_k:
            results[text] = make_result(index, place, len(results) + 1, score, searches, request)
            word_sets.append((results[text], words))
    return list(results.values())


def add_place(result: dict, passage: dict) -> None:
    """Add to a result where else its text stands: other files to also_in, more places in one file to near_copies."""
    named = [result["source_file"], *result["also_in"]]
    if passage["source_file"] in named:
        result["near_copies"].append(f"{passage['source_file']}:{passage['start_line']}")
    result["also_in"] += [file for file in [passage["source_file"], *passage["also_in"]] if file not in named]


def are_near_copies(words: set[str], others: set[str], min_shared: float = 0.8) -> bool:
    """Tell whether two texts share nearly all their words and every number: rows of a table differ by an ID alone."""
    shared = len(words & others)
    if shared < min_shared * (len(words) + len(others) - shared) or len(words) < 8:
        return False
    return not any(map(str.isdigit, "".join(words ^ others)))


def make_result(index: Index, place: int, rank: int, score: float, searches: list[Scored], request: Request) -> dict:
    """Return one result; searches: what its relevance is judged by, the query or a task's needs."""
    passage = index.passages[place]
    judged = relevances(index, searches, place)
    shown = 1 / (1 + math.exp(-score)) if request.mode in ("hybrid", "task") else score
    result = {"rank": rank, "score": round(shown, 6), "relevance": round(max(judged), 4)}
    result |= {name: passage[name] for name in ("id", "source_file", "also_in")} | {"near_copies": []}
    result |= {"heading": " > ".join(passage["heading"])}
    result |= {name: passage[name] for name in ("chunk_index", "start_line", "end_line", "text")}
    if request.mode == "task":
        result["needs"] = [need for need, value in enumerate(judged) if value >= request.min_relevance]
    if request.context:
        result["context"] = neighbours(index, place, request.context)
    if request.explain:
        need = judged.index(max(judged))
        result["explain"] = explain(index, place, searches[need])
        if len(searches) > 1:
            result["explain"] |= {"need": need, "total": round(score, 4)}
    return result


def neighbours(index: Index, place: int, count: int) -> list[dict]:
    """Return up to `count` passages before and after one in its document; copies that stand elsewhere are left out."""
    here = index.passages[place]
    around = range(max(0, place - count), min(len(index.passages), place + count + 1))
    return [
        {name: passage[name] for name in ("chunk_index", "start_line", "end_line", "text")}
        for passage in (index.passages[other] for other in around if other != place)
        if passage["source_file"] == here["source_file"] and abs(passage["chunk_index"] - here["chunk_index"]) <= count
    ]


def explain(index: Index, place: int, scored: Scored) -> dict:
    """Return what a result's score is made of: each arm's own score, its standard score, and the words found.

    In keyword mode "standard_keyword" and "combined" are the keyword score itself.
    """
    exact, stems = passage_terms(index.passages[place])
    found = [word.word for word in scored.words if word.is_in(exact, stems)]
    cosine, weight, combined = scored.cosines.get(place), scored.semantic_weight, scored.ranking.get(place)
    similarity = by_words = None
    if cosine is not None:
        similarity = (cosine - scored.mean) / scored.deviation
    if weight == 1:  # semantic search ranks by the cosine itself
        combined = similarity
    elif combined is not None:
        by_words = (combined - weight * (similarity or 0.0)) / (1 - weight)
    values = {
        "cosine": cosine,
        "standard_cosine": similarity,
        "keyword": scored.keyword.get(place, 0.0),
        "standard_keyword": by_words,
        "semantic_weight": weight,
        "combined": combined,
    }
    rounded = {name: value if value is None else round(value, 4) for name, value in values.items()}
    return rounded | {"found": found, "missing": [word.word for word in scored.words if word.word not in found]}


# ------------------------------------------------------------------------------------ help for a task


def assist(index: Index, task: str, request: Request) -> dict:
    """Return the results for a task description or for the ID of a task that the documents define.

    A model reads only its window of a long text, and one vector blurs several needs: from four needs on, each passage
    gets its score for the whole description and half its best one for a single need, if it is a candidate of any.
    """
    entry, own_places = find_entry(index, task)
    text = entry["text"] if entry else task
    needs = split_needs(text)
    by_needs = len(needs) >= 4  # two or three sentences are one need more often than not
    usual = request._replace(top_k=1)  # the same candidates, however many results are asked for
    whole = score_passages(index, plain_text(text) if entry else text, usual if by_needs else request)
    by_need = [score_passages(index, need, usual) for need in needs] if len(needs) > 1 else [whole]
    ranking = whole.ranking
    if by_needs:
        best: dict[int, float] = {}
        for scored in by_need:
            for place, score in scored.ranking.items():
                best[place] = max(best.get(place, -math.inf), score)
        floor = min(whole.ranking.values(), default=0.0)
        ranking = {place: whole.ranking.get(place, floor) + score / 2 for place, score in best.items()}
    results = make_results(index, without(ranking, own_places), by_need, request)
    covered = [covered_by(index, without(scored.ranking, own_places), scored, request) for scored in by_need]
    return {
        "relevant": is_relevant(results, request) or any(covered),
        "entry": entry,
        "needs": [{"text": need, "covered_by": places} for need, places in zip(needs, covered, strict=True)],
        "results": results,
    }


def by_document(results: list[dict]) -> list[dict]:
    """Return the documents of a task's results, best first, with the needs they cover and their results' ranks."""
    documents: dict[str, dict] = {}
    for result in results:
        name = result["source_file"]
        one = documents.setdefault(name, {"source_file": name, "needs": [], "results": []})
        one["needs"] = sorted({*one["needs"], *result["needs"]})
        one["results"].append(result["rank"])
    return list(documents.values())


def without(ranking: dict[int, float], places: set[int]) -> dict[int, float]:
    return {place: score for place, score in ranking.items() if place not in places}


def split_needs(task: str) -> list[str]:
    """Cut a task description at its lines, sentence ends and semicolons.

    Pieces of one or two words between spaces are joined to the one before, but for items of a list without a colon
    ("- CORS").
    """
    pieces: list[str] = []
    for part in split_lines(task):
        text = plain_text(part)
        clauses = (re.split(r"(?<=;)\s+", sentence) for sentence in sentences(text))
        start = True
        lines = part.split("\n")
        is_row = bool(text) and header_of(lines, len(lines) - 1) is not None
        for piece in [text] if is_row else itertools.chain.from_iterable(clauses):
            is_item = start and bool(LIST_MARK.match(part)) and ":" not in piece
            is_short = len(piece.split()) < 3 and not IS_UNSPACED.search(piece)
            if pieces and is_short and not (is_item and not pieces[-1].endswith(":")):
                pieces[-1] += " " + piece
            else:
                pieces.append(piece)
            start = False
    if len(pieces) > MAX_NEEDS:
        warn(
            f"only the first {MAX_NEEDS} of the task's {len(pieces)} needs are searched; give the others by themselves"
        )
    return pieces[:MAX_NEEDS] or [task]


def split_lines(text: str) -> list[str]:
    """Return the lines of a text: those that a sentence was wrapped into as one, each row under its table's header."""
    parts, header, lines = [""], "", text.splitlines()
    for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        if "|" in line and "|" in following and TABLE_RULE.fullmatch(following):
            header = f"{line}\n{following}\n"
        elif "|" in line and header:
            parts += [header + line] * (not TABLE_RULE.fullmatch(line))
        else:
            header = ""
            if goes_on(parts[-1], line):
                parts[-1] += f"\n{line}"
            else:
                parts.append(line)
    return parts


def goes_on(before: str, line: str) -> bool:
    """Tell whether a line continues the sentence before it; lower-case lines in a row are items without marks."""
    end = before.rstrip("*_`\"'”)] \t")[-1:]
    if LIST_MARK.match(line) or not begins_small(line) or not (end.isalnum() or end == ","):
        return False
    return bool(LIST_MARK.match(before)) or not (begins_small(before) or before.lstrip().startswith("#"))


def begins_small(line: str) -> bool:
    return line.lstrip(" \t*_`\"'“(")[:1].islower()


def covered_by(index: Index, ranking: dict[int, float], scored: Scored, request: Request) -> list[dict]:
    """Return the passages that cover a need, best first, one a document: the relevant ones of its first few."""
    found: dict[str, dict] = {}
    for place in heapq.nlargest(JUDGED, ranking, key=ranking.get):
        passage = index.passages[place]
        (value,) = relevances(index, [scored], place)
        if value >= request.min_relevance:
            source = {"source_file": passage["source_file"], "start_line": passage["start_line"]}
            found.setdefault(passage["source_file"], source | {"relevance": round(value, 4)})
    return list(found.values())


def find_entry(index: Index, task: str) -> tuple[dict | None, set[int]]:
    """Return the documents' own entry for a task ID such as KM-2.1 and the places of its passages, if task is one.

    The entry that counts is the longest of the sections whose heading begins with the ID (4), then of those whose
    heading names it first (3), the rows and items that begin with it (2), the paragraphs that do (1), what mentions it.
    """
    names = [name for _, name, _ in words_and_names(task)]
    if len(names) != 1 or not names[0] or not any(map(str.isdigit, names[0])):
        return None, set()
    entries, walked = [], set()
    for place in keyword_scores(index.keywords, query_words(index.keywords, task), CANDIDATES)[0]:
        passage = index.passages[place]
        for depth, title in enumerate(passage["heading"], 1):
            if (place, depth) not in walked and first_name(title) == names[0]:
                places = section_of(index, place, depth)
                walked |= {(other, depth) for other in places}
                texts = [title, *(index.passages[one]["text"] for one in places)]
                entries.append((4 if begins_with(title, names[0]) else 3, "\n".join(texts), places))
        entries.append((*lines_about(passage["text"], names[0]), [place]))
    _, text, places = max(entries, key=lambda entry: (entry[0], len(entry[1])), default=(0, "", []))
    if not text:
        return None, set()
    first = index.passages[places[0]]
    return {"source_file": first["source_file"], "start_line": first["start_line"], "text": text}, set(places)


def first_name(line: str) -> str:
    return next((name for _, name, _ in words_and_names(line) if name), "")


def begins_with(line: str, name: str) -> bool:
    """Tell whether the first word of a line, after its mark and number, is a name."""
    words = words_and_names(LIST_MARK.sub("", line))
    return next((one for word, one, _ in words if one == name or not word.isdecimal()), "") == name


def section_of(index: Index, place: int, depth: int) -> list[int]:
    """Return the places of the passages that stand under the first `depth` headings of one, in its document."""
    here = index.passages[place]

    def is_in(other: int) -> bool:
        passage = index.passages[other]
        return passage["source_file"] == here["source_file"] and passage["heading"][:depth] == here["heading"][:depth]

    before = itertools.takewhile(is_in, range(place - 1, -1, -1))
    return [*reversed(list(before)), *itertools.takewhile(is_in, range(place, len(index.passages)))]


def lines_about(text: str, name: str) -> tuple[int, str]:
    """Return find_entry's rank of a passage's best line about a name, and that line with its header or sub-items."""
    lines = text.split("\n")
    names = [[one for _, one, _ in words_and_names(line)] for line in lines]
    ranks = {number: 0 for number, own in enumerate(names) if name in own}
    if not ranks:
        return 0, ""
    for number in ranks:
        if begins_with(lines[number], name):
            is_item = LIST_MARK.match(lines[number]) or header_of(lines, number) is not None
            ranks[number] = 2 if is_item else 1
    start = max(ranks, key=ranks.get)
    if (table := header_of(lines, start)) is not None:
        return ranks[start], "\n".join([*lines[table : table + 2], lines[start]])

    def belongs(line: str) -> bool:
        if ranks[start] == 1:  # a paragraph, to the next line that begins with an ID
            return bool(line.strip()) and not any(map(str.isdigit, next(words_and_names(line), ("", ""))[1]))
        return ranks[start] > 0 and (not line.strip() or indent(line) > indent(lines[start]))

    following = itertools.takewhile(belongs, lines[start + 1 :])
    return ranks[start], "\n".join([lines[start], *following]).rstrip()


def header_of(lines: list[str], number: int) -> int | None:
    """Return the place of the header of the table that a line is a row of, or None where it is of none."""
    while number > 1 and "|" in lines[number]:
        number -= 1
        if "|" in lines[number] and TABLE_RULE.fullmatch(lines[number]) and "|" in lines[number - 1]:
            return number - 1
    return None


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


# ----------------------------------------------------------------------------------- functions for importers


@functools.cache
def default_index() -> Index:
    return load_index(config.INDEX_DIR)


one_at_a_time = threading.Lock()


def search_default(query: str, mode: str, k: int | None, semantic_weight: float | None = None) -> list[dict]:
    request = Request(mode, config.TOP_K if k is None else k, semantic_weight, config.MIN_RELEVANCE)
    with one_at_a_time:  # an index is opened bit by bit, and goes over to a newer one while it is searched
        return search(default_index(), query, request)["results"]


def semantic_search(query: str, k: int | None = None) -> list[dict]:
    """Return the k passages nearest in meaning, from the index in config.INDEX_DIR (k: config.TOP_K by default)."""
    return search_default(query, "semantic", k)


def keyword_search(query: str, k: int | None = None) -> list[dict]:
    """Return the k passages that fit the query's words and names best."""
    return search_default(query, "keyword", k)


def hybrid_search(
    query: str, k: int | None = None, semantic_weight: float | None = None, keyword_weight: float | None = None
) -> list[dict]:
    """Return the k best passages by meaning and words together; the weights count in proportion to each other."""
    return search_default(query, "hybrid", k, share(semantic_weight, keyword_weight))


def get_contextual_assistance_for_task(task_description: str, k: int | None = None) -> list[dict]:
    """Return the k passages most helpful for a task or a task ID; a long description is searched need by need.

    The results are those of `--mode task --json`; what it tells of needs and documents, search() returns too.
    """
    return search_default(task_description, "task", k, config.SEMANTIC_WEIGHT)


def share(semantic_weight: float | None, keyword_weight: float | None) -> float | None:
    if semantic_weight is None:
        return config.SEMANTIC_WEIGHT if keyword_weight is None else max(0.0, 1 - keyword_weight)
    total = semantic_weight + (1 - semantic_weight if keyword_weight is None else keyword_weight)
    return semantic_weight / total if total > 0 else config.SEMANTIC_WEIGHT


# ------------------------------------------------------------------------------------------ the terminal

EXCERPT_LINES = 3
INDENT = 3
SEARCHED_DEEPER = 50  # ranks to which the other index of --compare is searched, to tell a move from a loss


def make_console():
    """Return what prints for people: colour on a terminal (not with NO_COLOR), 100 columns and no colour on a pipe.

    A terminal narrower than 20 columns gets lines of 20.
    """
    from rich.console import Console

    class Printer(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with the status for "nothing relevant found"
            raise BrokenPipeError

    columns = max(shutil.get_terminal_size().columns, 20) if sys.stdout.isatty() else 100
    return Printer(width=columns, highlight=False, markup=False, emoji=False)


def openable(index: Index, source_file: str) -> str:
    """Return a document's path as terminals and editors open it: from the current folder, or absolute if outside."""
    path = Path(index.header["documents_root"]) / source_file
    if not is_there(path):  # the documents have moved since
        return source_file
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def location(index: Index, source_file: str, line: int) -> str:
    """Return file:line for the screen."""
    return printable(f"{openable(index, source_file)}:{line}")


def marked(text: str, words: list[QueryWord], style: str = ""):
    """Return a text for the console with the query's words and names marked."""
    from rich.text import Text

    shown = Text(text, style)
    for start, end in matches(words, text):
        shown.stylize("bold yellow", start, end)
    return shown


def matches(words: list[QueryWord], text: str) -> list[tuple[int, int]]:
    """Return where the query's words and names stand in a text, as (start, end)."""
    names = {word.term for word in words if word.kind == "name"}
    single = [word for word in words if word.weight and word.kind != "name"]
    spans, end = [], 0
    for as_typed, name, _ in words_and_names(text):
        start = text.index(as_typed, end)
        end = start + len(as_typed)
        terms = [set(one) for one in keyword_terms(as_typed)]
        if IS_UNSPACED.match(as_typed):
            held = (re.finditer(re.escape(composed(word.word)), as_typed) for word in single)
            spans += sorted((start + one.start(), start + one.end()) for one in itertools.chain.from_iterable(held))
        elif name in names or any(word.is_in(*terms) for word in single):
            spans.append((start, end))
    return spans


def excerpt(text: str, words: list[QueryWord], room: int) -> str:
    """Return the part of a text, from a sentence's start, that holds most of the query's words in `room` columns."""
    from rich.cells import cell_len

    text = printable(plain_text(text))
    if cell_len(text) <= room:
        return text
    room = room * len(text) // cell_len(text)  # in characters; wide ones take two columns
    spans = matches(words, text)
    starts, end = [], 0
    for sentence in sentences(text):
        starts.append(text.index(sentence, end))
        end = starts[-1] + len(sentence)
    start = max(starts, key=lambda one: (sum(one <= begin and end <= one + room - 4 for begin, end in spans), -one))
    shown = "… " * (start > 0) + text[start:]
    if len(shown) <= room:
        return shown
    kept = shown[: room - 2]
    words_kept = kept.rpartition(" ")[0]
    return (words_kept if len(words_kept) > room / 2 else kept) + " …"  # where spaces are rare, it is cut anywhere


def print_result(console, index: Index, result: dict, words: list[QueryWord]) -> None:
    """Print one result: file:line, heading path, the passage with the query's words marked, where else it stands."""
    from rich.text import Text

    place = location(index, result["source_file"], result["start_line"])
    relevance_shown = (f"  relevance {result['relevance']:.2f}", "dim")
    console.print(Text.assemble((f"{result['rank']}. ", "bold"), (place, "cyan"), relevance_shown), soft_wrap=True)
    room = EXCERPT_LINES * (console.width - INDENT)
    parts = [marked(printable(result["heading"]), words, "dim")]
    around = sorted([*result.get("context", []), result], key=lambda passage: passage["chunk_index"])
    for passage in around:
        if passage is result:
            parts.append(marked(excerpt(result["text"], words, room), words))
        else:
            parts.append(Text(f"{passage['start_line']}: {excerpt(passage['text'], [], room)}", "dim"))
    if "explain" in result:
        parts.append(Text(explanation(result["explain"]), "dim"))
    for line in itertools.chain.from_iterable(part.wrap(console, console.width - INDENT) for part in parts if part):
        line.rstrip()
        console.print(Text(" " * INDENT) + line, soft_wrap=True)
    copies = {
        "also in": [openable(index, file) for file in result["also_in"]],
        "nearly the same in": [location(index, *place.rsplit(":", 1)) for place in result["near_copies"]],
    }
    for what, places in copies.items():
        if places:  # in one line, so that each can be opened
            told = printable(f"{what} {', '.join(places)}")
            console.print(" " * INDENT + told, style="dim", soft_wrap=True)
    console.print()


def explanation(values: dict) -> str:
    """Return an explanation in words."""
    meaning, weight = values["cosine"], values["semantic_weight"]
    parts = []
    if meaning is not None:
        parts.append(f"{weight:.2f} × meaning {values['standard_cosine']:.2f} (cosine {meaning:.3f})")
    if weight < 1:
        by_words = "" if values["standard_keyword"] is None else f" {values['standard_keyword']:.2f}"
        parts.append(f"{1 - weight:.2f} × words{by_words} (keyword score {values['keyword']:.2f})")
    total = "" if values["combined"] is None else f" = {values['combined']:.3f}"
    if "need" in values:
        total += f" for need {values['need'] + 1}, {values['total']:.3f} for the whole description"
    found, missing = (", ".join(values[name]) or "none" for name in ("found", "missing"))
    return f"{' + '.join(parts)}{total}; words found: {found}; not found: {missing}"


def print_answer(console, index: Index, answer: dict) -> None:
    """Print an answer for people; the results of a task with several needs stand under these and by document."""
    texts = [need["text"] for need in answer.get("needs", [])] or [answer["query"]]
    words = [word for text in texts for word in query_words(index.keywords, text)]
    if answer.get("entry"):
        print_needs(console, index, answer)
    if not answer["relevant"]:
        print("nothing relevant found")
        if answer["results"]:
            best = max(result["relevance"] for result in answer["results"][:JUDGED])
            print(f"(the nearest has relevance {best:.2f}; --min-relevance 0 shows it)", file=sys.stderr)
        return
    if answer["mode"] != "task" or (len(answer["needs"]) == 1 and not answer["entry"]):
        for result in answer["results"]:
            print_result(console, index, result, words)
        return
    if not answer["entry"]:
        print_needs(console, index, answer)
    for document in answer["documents"]:
        covers = ", ".join(str(need + 1) for need in document["needs"]) or "none of the needs by itself"
        name = printable(document["source_file"])
        console.print(f"{name}  covers {covers}", style="bold", soft_wrap=True)
        for rank in document["results"]:
            print_result(console, index, answer["results"][rank - 1], words)


def print_needs(console, index: Index, answer: dict) -> None:
    """Print what a task needs and where each need is covered, or that nothing covers it."""
    if answer["entry"]:
        entry = answer["entry"]
        place = location(index, entry["source_file"], entry["start_line"])
        console.print(f"{printable(answer['query'])} is described in {place}", soft_wrap=True)
    for number, need in enumerate(answer["needs"], 1):
        console.print(f"{number}. {excerpt(need['text'], [], 2 * console.width)}")
        places = [location(index, source["source_file"], source["start_line"]) for source in need["covered_by"][:3]]
        for place in places or ["nothing here covers it"]:
            console.print(" " * INDENT + place, style="cyan" if places else "yellow", soft_wrap=True)
    console.print()


# ----------------------------------------------------------------------------------------- two indexes


def compare(index: Index, other: Index, query: str, request: Request) -> dict:
    """Return the answer of one index with the other's; each result has its rank in the other's, searched deeper."""
    deeper = request._replace(top_k=max(request.top_k, SEARCHED_DEEPER))
    answer, second = (search(one, query, deeper) for one in (index, other))
    firsts = [first_results(one, request.top_k) for one in (answer, second)]
    left = with_other_ranks(firsts[0]["results"], second["results"])
    right = with_other_ranks(firsts[1]["results"], answer["results"])
    told = {"index_dir": str(other.folder), "relevant": second["relevant"], "results": right}
    return firsts[0] | {"results": left, "other": told}


def with_other_ranks(results: list[dict], others: list[dict]) -> list[dict]:
    """Return results with the rank of the first of the others that has the same text, or a near-copy of it."""
    word_sets = [(other, set(other["text"].split())) for other in others]
    ranks = {other["text"]: other["rank"] for other in others}
    found = []
    for result in results:
        words, copies = set(result["text"].split()), set(result["near_copies"])
        near = (
            other["rank"]
            for other, its_words in word_sets
            if are_near_copies(words, its_words) or not copies.isdisjoint(other["near_copies"])
        )
        found.append(result | {"other_rank": ranks.get(result["text"]) or next(near, None)})
    return found


def print_comparison(console, indexes: tuple[Index, Index], answer: dict, words: list[QueryWord]) -> None:
    """Print two indexes' results side by side: where each stands in the other list, and what only one found."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 1, 0), expand=True)
    for index in indexes:
        table.add_column(printable(str(index.folder)), ratio=1, overflow="fold")
    columns = []
    for index, results in zip(indexes, (answer["results"], answer["other"]["results"]), strict=True):
        cells = []
        for result in results:
            text = excerpt(result["text"], words, 2 * (console.width // 2 - INDENT))
            place = location(index, result["source_file"], result["start_line"])
            head = ((f"{result['rank']}. ", "bold"), (f"{move(result)}  ", "magenta"), (place, "cyan"))
            cells.append(Text.assemble(*head, "\n", marked(text, words)))
        columns.append(cells)
    for row in itertools.zip_longest(*columns, fillvalue=Text("")):
        table.add_row(*row)
    console.print(table)
    if not answer["relevant"]:
        print("nothing relevant found on the left")
    same = sum((result["other_rank"] or math.inf) <= len(columns[1]) for result in answer["results"])
    right = sum((result["other_rank"] or math.inf) > len(columns[0]) for result in answer["other"]["results"])
    print(f"{same} in both lists, {len(columns[0]) - same} only on the left, {right} only on the right")


def move(result: dict) -> str:
    """Return how a result's rank differs from that in the other index."""
    if result["other_rank"] is None:
        return "only here"
    difference = result["other_rank"] - result["rank"]
    return "same rank" if not difference else f"{'▲' if difference > 0 else '▼'}{abs(difference)}"


def write_comparison(path: Path, index: Index, queries: Iterable[str], request: Request, other: Path) -> list[dict]:
    """Write two indexes' results for the queries as a page on which a person marks what is relevant; return them.

    The page exports the marks as lines of questions.tsv (prepare_finetuning_data.Question).

    Raises:
        UserError: there are no queries.
    """
    from tqdm import tqdm

    wanted = [query for query in map(str.strip, queries) if query]
    if not wanted:
        raise UserError("--html needs queries: give one, or one a line through a pipe: --html FILE < queries.txt")
    shown = tqdm(wanted, "searching", unit="query", disable=None, delay=2)
    answers = [compare(index, load_other(other), query, request) for query in shown]
    names = [str(index.folder), str(other)]
    page = render("comparison.html", answers=answers, names=names, mode=request.mode, move=move)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"wrote {path} with {len(answers)} queries; open it in a browser, mark the passages and export them;")
    print("next: python prepare_finetuning_data.py")
    return answers


# ---------------------------------------------------------------------------------------------- the prompt

HELP = """:mode {modes}   how to search, now {mode}
:k N       how many results, now {k}
:open N    open result N of the last answer in $EDITOR
:help      this; an empty line or Ctrl-D ends, Ctrl-C stops a search"""


def answer_query(index: Index, query: str, request: Request, options: argparse.Namespace) -> dict:
    """Search, print, and return the answer; an empty line among many has no results."""
    if not query.strip() and not options.query:
        nothing = {"relevant": False, "results": []}
        answer = {"query": query, "mode": request.mode} | nothing
        answer |= {"needs": [], "documents": [], "entry": None} if request.mode == "task" else {}
        answer |= {"other": {"index_dir": str(options.compare)} | nothing} if options.compare else {}
    elif options.compare:
        answer = compare(index, load_other(options.compare), query, request)
    else:
        answer = search(index, query, request)
    if options.json:
        print(json.dumps(answer, ensure_ascii=False), flush=True)
    elif "other" in answer:
        indexes = (index, load_other(options.compare))
        print_comparison(make_console(), indexes, answer, query_words(index.keywords, answer["query"]))
    else:
        print_answer(make_console(), index, answer)
    return answer


load_other = functools.cache(load_index)


def piped_queries(shown: bool) -> Iterator[str]:
    """Yield the lines of a pipe; shown: print each before it is searched, so that the answers can be told apart."""
    for line in sys.stdin.buffer:
        query = line.decode(errors="replace").removeprefix("\ufeff").rstrip("\r\n")  # a byte order mark
        if shown:
            print(f"search> {printable(query)}", flush=True)
        yield query


def prompt(index: Index, request: Request, options: argparse.Namespace, errors: TextIO | None = None) -> bool:
    """Answer line by line until an empty line or Ctrl-D; tell whether anything relevant was found.

    errors: where errors are printed, by default stderr, which --quiet silences.
    """
    found, results = False, []
    remember_lines(index.folder / ".search-history")
    while True:
        try:
            line = input("search> " if sys.stdout.isatty() else "").strip()  # a file holds the answers alone
        except EOFError:
            print(file=sys.stderr)
            return found
        except KeyboardInterrupt:  # of a line half typed; Ctrl-D ends the prompt
            print(file=sys.stderr)
            continue
        except UnicodeDecodeError:  # typed in another encoding than the terminal's
            print("error: the line is not UTF-8; type it again", file=errors or sys.stderr)
            continue
        if not line:
            return found
        try:
            if line.startswith(":"):
                request = command(index, line, request, results)
            else:
                answer = answer_query(index, line, request, options)
                found = found or answer["relevant"]
                results = answer["results"] if answer["relevant"] else []  # those that are on the screen
        except UserError as error:
            print(f"error: {printable(str(error))}", file=errors or sys.stderr)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


def remember_lines(path: Path) -> None:
    """Have the prompt remember its lines in a file, where the system has readline and the folder may be written."""
    with contextlib.suppress(ImportError, OSError):
        import readline

        readline.parse_and_bind("tab: self-insert")  # no completion
        readline.set_history_length(1000)
        path.touch()
        readline.read_history_file(path)
        atexit.register(save_lines, path)


def save_lines(path: Path) -> None:
    import readline

    with contextlib.suppress(OSError):  # its folder may be gone meanwhile
        readline.write_history_file(path)


def command(index: Index, line: str, request: Request, results: list[dict]) -> Request:
    """Carry out a command of the prompt; return the request as it is from then on."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == ":help":
        print(HELP.format(modes="|".join(MODES), mode=request.mode, k=request.top_k))
    elif name == ":mode" and value in MODES:
        return request._replace(mode=value)
    elif name == ":k" and value.isdecimal() and int(value):
        return request._replace(top_k=int(value))
    elif name == ":open" and value.isdecimal() and 1 <= int(value) <= len(results):
        open_in_editor(index, results[int(value) - 1])
    else:
        raise UserError(f"{line!r} is no command that can be carried out here; :help lists them")
    return request


def open_in_editor(index: Index, result: dict) -> None:
    """Open a result's file at its line in $VISUAL or $EDITOR."""
    try:
        editor = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "")
    except ValueError as error:
        raise UserError(f"EDITOR can not be read ({error}); set it anew, for example: export EDITOR=nano") from None
    if not editor:
        raise UserError("EDITOR is not set; set it, for example: export EDITOR=nano")
    path, line = Path(index.header["documents_root"]) / result["source_file"], int(result["start_line"])
    if not is_there(path):
        raise UserError(f"{path} is gone; run {build_command(index.folder, index.header)}")
    # The path is absolute: to an editor, a file whose name begins with "+" or "-" would be a command.
    is_code = Path(editor[0]).stem in ("code", "codium", "cursor")
    place = ["--goto", f"{path}:{line}"] if is_code else [f"+{line}", str(path)]
    try:
        subprocess.run([*editor, *place], check=False)
    except OSError as error:
        raise UserError(f"{editor[0]} can not be started ({error.strerror}); set EDITOR to another one") from None


# -------------------------------------------------------------------------------------------------- main


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's options, with the defaults of config.py."""
    parser = argparse.ArgumentParser(
        description="Search the target documents by meaning, by words, by both, or for what a task needs.",
        epilog='examples:\n  python semantic_search.py "who reviews a finished task?"\n'
        '  python semantic_search.py --mode keyword --top-k 3 "KM-2.1"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "query",
        nargs="*",
        help="one query, behind -- if it begins with a dash; without it, a prompt, or one query a line from a pipe",
    )
    parser.add_argument("--mode", choices=MODES, default=config.SEARCH_MODE, help="(config.SEARCH_MODE)")
    parser.add_argument("--top-k", type=int, default=config.TOP_K, metavar="N", help="results shown (config.TOP_K)")
    parser.add_argument(
        "--min-relevance",
        type=float,
        default=config.MIN_RELEVANCE,
        metavar="X",
        help="from 0 to 1; below it a result counts as not relevant (config.MIN_RELEVANCE)",
    )
    parser.add_argument("--context", type=int, default=0, metavar="N", help="show N passages before and after, too")
    parser.add_argument("--explain", action="store_true", help="show what each score is made of")
    parser.add_argument("--compare", type=Path, metavar="DIR", help="show the results of another index beside these")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="with --compare: write a page to mark what is relevant on"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a query on one line, nothing else on stdout"
    )
    parser.add_argument("--index-dir", type=Path, default=config.INDEX_DIR, metavar="DIR", help="(config.INDEX_DIR)")
    config.add_verbosity(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the script with these arguments, by default the command line's; return the exit status."""
    options, unknown = build_parser().parse_known_args(argv)
    if dashed := [word for word in unknown if word.startswith("-")]:
        command = "python semantic_search.py [options] -- your query"
        raise UserError(f"{dashed[0]} is no option; to search for it, put -- before the query: {command}")
    options.query += unknown  # words behind an option
    errors = sys.stderr
    config.set_verbosity(options)
    if options.mode not in MODES:  # argparse looks at options only, not at config.SEARCH_MODE
        raise UserError(f"config.SEARCH_MODE is {options.mode!r}; set it to {', '.join(MODES[:-1])} or {MODES[-1]}")
    if not 0 <= options.min_relevance <= 1:
        raise UserError(f"--min-relevance {options.min_relevance} is not from 0 to 1")
    if options.html and not options.compare:
        raise UserError("--html needs --compare DIR, the index to compare with")
    if options.html and options.json:
        raise UserError("--html writes a page and --json prints lines; give one of them")
    if options.context < 0:
        raise UserError(f"--context {options.context} is too low; the least is 0")
    if options.compare and not options.json and (options.context or options.explain):
        raise UserError("--compare shows --context and --explain with --json only")
    request = Request(
        options.mode, options.top_k, config.SEMANTIC_WEIGHT, options.min_relevance, options.context, options.explain
    )
    check_request(request)
    index = load_index(options.index_dir)
    if changed := index.changed_documents():
        names = ", ".join(changed[:3]) + ", …" * (len(changed) > 3)
        following = build_command(options.index_dir, index.header)
        warn(f"{options.index_dir} is older than {len(changed)} of its documents ({names}); run {following}")
    piped = piped_queries(shown=not (options.json or options.html))
    if options.html:
        queries = [" ".join(options.query)] if options.query or sys.stdin.isatty() else piped
        found = any(one["relevant"] for one in write_comparison(options.html, index, queries, request, options.compare))
    elif options.query:
        found = answer_query(index, " ".join(options.query), request, options)["relevant"]
    elif sys.stdin.isatty():
        found = prompt(index, request, options, errors)
    else:
        answers = [answer_query(index, line, request, options)["relevant"] for line in piped]
        found = any(answers)
    return 0 if found else 1


if __name__ == "__main__":
    config.run(main)
