#!/usr/bin/env python3
"""Fine-tune the base model on the pairs, compare it with the base on held-out queries, and save it.  (step 2 of 4)

    1. prepare_finetuning_data.py   documents        -> fine_tuning_data/
    2. run_finetuning.py            fine_tuning_data -> fine_tuned_model/<name>/
    3. generate_embeddings.py       documents, model -> embeddings/
    4. semantic_search.py           embeddings       -> answers

    python run_finetuning.py
    python run_finetuning.py --base-model packaged --epochs 2 --max-steps 200
    python run_finetuning.py --evaluate-only
    python run_finetuning.py --questions queries.txt

The model folder is written whole and swapped in; the one before stays beside it as <name>.previous. It holds the
Sentence Transformers format (safetensors), onnx/model.onnx (token ids in, normalised embeddings out: what steps 3 and
4 use), evaluation.json, report.html and a model card. Printed: base against fine-tuned on held-out queries, and last

    VERDICT improved nDCG@10 0.412 -> 0.533 (+0.121, 95% CI +0.090..+0.151, 212 queries)
"""

import argparse
import array
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import sqlite3
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

import config
from config import (
    UserError,
    command_for,
    duration,
    previous,
    printable,
    remove,
    replacing,
    restore_previous,
    sync,
)
from prepare_finetuning_data import (
    CHART_COLOURS,
    ESCAPE,
    NO_MODEL,
    UNSPACED,
    WINDOW_FILES,
    WORD,
    Pair,
    Passage,
    Query,
    add_document_options,
    chart,
    check_model,
    find_answers,
    find_documents,
    find_model,
    fold,
    language,
    load_tokenizer,
    module_folders,
    plain_text,
    read_corpus,
    read_pairs,
    read_passages,
    read_queries,
    read_test_queries,
    render,
    sha256_of,
    shingles,
    shortened,
    template_key,
    warn,
)

# ------------------------------------------------------------------------------------------- the model


def load_model(folder: Path, device: str | None):
    """Load a SentenceTransformer from a folder that check_model accepts: safetensors only, no code of the model's.

    Weights stored in half precision are trained and saved in float32. A prompt that the model would put before every
    text is left out: the ONNX form has none.
    """
    from sentence_transformers import SentenceTransformer
    from transformers import logging

    if logging.get_verbosity() == logging.ERROR:  # see config.set_verbosity
        logging.disable_progress_bar()
    try:
        model = SentenceTransformer(
            str(check_model(folder)),
            device=device,
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True, "dtype": "float32"},
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder} can not be loaded ({str(error).splitlines()[0]}); copy or make it again") from None
    model.default_prompt_name = None
    return model


def has_bfloat16(device: str) -> bool:
    """Tell whether a kind of device multiplies matrices in bfloat16 by itself, which takes two thirds of the time."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return device == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def in_bfloat16(model):
    """Return the context in which the model's matrices are multiplied in bfloat16 where its device has that."""
    import torch

    kind = model.device.type
    return torch.autocast(kind, torch.bfloat16, enabled=has_bfloat16(kind))


def embed(model, texts: list[str], **settings) -> np.ndarray:
    """Return the normalised embeddings of texts, float32, in rows; settings: those of SentenceTransformer.encode."""
    with in_bfloat16(model):
        return model.encode(texts, normalize_embeddings=True, **settings)


def mend_tokenizer(model, texts: list[str]) -> list[str]:
    """Make the tokenizer normalise a letter to its plain form (ı to i) where that saves a tenth of the tokens.

    An English WordPiece vocabulary holds "##ı" as a letter of its own and breaks words at it, so the model sees little
    of "kayıtlı" and much of "kayitli"; a multilingual vocabulary is left as it is. The rule is saved in tokenizer.json,
    so that whatever loads the model applies it.

    Returns:
        the letters.
    """
    from tokenizers import normalizers

    backend = model.tokenizer.backend_tokenizer

    def tokens(of: list[str]) -> int:
        return sum(sum(one.attention_mask) for one in backend.encode_batch(of, add_special_tokens=False))

    words = dict.fromkeys(word for text in texts for word in text.split() if not word.isascii())
    rules = {}
    for letter in sorted(set("".join(words))):
        if letter.isalpha() and not letter.isascii() and fold(letter).isascii():
            plain = fold(letter).upper() if letter.isupper() else fold(letter)
            own = list(itertools.islice((word for word in words if letter in word), 500))
            if len(own) >= 20 and tokens([word.replace(letter, plain) for word in own]) < 0.9 * tokens(own):
                rules[letter] = plain
    if rules:
        replacements = itertools.starmap(normalizers.Replace, rules.items())
        backend.normalizer = normalizers.Sequence([*replacements, *filter(None, [backend.normalizer])])
    return list(rules)


# ----------------------------------------------------------------------------------- held-out evaluation


class HeldOut:
    """Queries with the passages they are searched in, and the ranks a model gives their answers.

    right: every passage that answers a query, where several do; its positive is one of them.
    keyed: heading path and text of each passage as the keyword index has them; by default all is text.
    """

    def __init__(
        self,
        queries: list[Query],
        passages: list[str],
        right: Sequence[Sequence[str]] = (),
        keyed: Sequence[tuple[Sequence[str], str]] = (),
    ):
        self.queries, self.passages = queries, passages
        self.keyed = keyed or [((), text) for text in passages]
        places = {text: place for place, text in enumerate(passages)}
        if lost := [query for query in queries if query.positive not in places]:
            raise UserError(
                f"corpus.tsv lacks the answer to {lost[0].query[:60]!r}; run prepare_finetuning_data.py again"
            )
        self.answers = [[places[text] for text in own] for own in right or [[query.positive] for query in queries]]
        self.base: np.ndarray | None = None  # the base's similarities and its pieces_per_word, once it has searched
        self.pieces = math.inf

    def part(self, queries: list[Query], max_passages: int, seed: int) -> "HeldOut":
        """Return some of the queries, searched in their answers and other passages, max_passages in all if they fit."""
        wanted = {query.positive for query in queries}
        others = [text for text in self.passages if text not in wanted]
        random.Random(seed).shuffle(others)
        kept = wanted | set(others[: max(0, max_passages - len(wanted))])
        return HeldOut(queries, [text for text in self.passages if text in kept])

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self.queries, self.passages)).encode()).hexdigest()

    def vectors(self, model, texts: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the normalised embeddings of the queries, or of other texts, and of the passages, float32, in rows."""
        show = sys.stderr.isatty() and len(self.passages) > 1000
        size = 8 if model.device.type == "cpu" else 32  # small batches hold less padding; a GPU is faster with more
        encode = functools.partial(embed, model, batch_size=size, show_progress_bar=show)
        return encode(texts or [query.query for query in self.queries]), encode(self.passages)

    def similarities(self, model) -> np.ndarray:
        """Return each query's cosine similarity to every passage, float32 of shape (queries, passages)."""
        if not self.queries:
            return np.zeros((0, len(self.passages)), dtype=np.float32)
        queries, passages = self.vectors(model)
        return queries @ passages.T

    def search_with_base(self, model) -> None:
        """Note what the base model finds, and into how many pieces it cuts a word (language_share)."""
        self.base, self.pieces = self.similarities(model), pieces_per_word(model, self.passages)

    def first(self, scores: np.ndarray, count: int = 3) -> list[str]:
        """Return the passages that a query's scores put first."""
        return [self.passages[place] for place in np.argsort(-scores, kind="stable")[:count]]

    def ranks(self, scores: np.ndarray) -> np.ndarray:
        """Return each query's rank of its best answer, behind wrong ones as good, 0 if not among the first ten.

        Shape (queries,).
        """
        of_answers = [row[places] for row, places in zip(scores, self.answers, strict=True)]
        own = np.array([one.max() for one in of_answers])
        ranks = (scores >= own[:, None]).sum(axis=1) - [(one == one.max()).sum() - 1 for one in of_answers]
        return np.where((ranks <= 10) & np.isfinite(own), ranks, 0)

    @functools.cached_property
    def words(self) -> list[tuple[list["QueryWord"], dict[int, float], float]]:
        """Each query's words, its keyword scores, and how much of it one passage holds."""
        index = write_keywords(":memory:", self.keyed)
        found = [query_words(index, query.query) for query in self.queries]
        return [(words, *keyword_scores(index, words, CANDIDATES)) for words in found]

    def keyword_matrix(self) -> np.ndarray:
        """Return the keyword scores like similarities, -inf where no word of the query is found."""
        scores = np.full((len(self.queries), len(self.passages)), -np.inf)
        for row, (_, own, _) in zip(scores, self.words, strict=True):
            row[list(own)] = list(own.values())
        return scores

    def hybrid_matrix(self, similarities: np.ndarray, semantic_weight: float) -> np.ndarray:
        """Return the scores of hybrid search like similarities, -inf where a passage is no candidate."""
        scores = np.full(similarities.shape, -np.inf)
        for row, own, (words, by_words, held) in zip(scores, similarities, self.words, strict=True):
            nearest = np.argsort(-own, kind="stable")[:CANDIDATES]
            meaning = {int(place): float(own[place]) for place in [*nearest, *by_words]}
            weight = weight_for_query(weight_for_few_words(semantic_weight, words), held)
            combined = combined_scores(meaning, by_words, float(own.mean()), float(own.std()), weight)
            row[list(combined)] = list(combined.values())
        return scores


def watcher(watched: HeldOut, store: Path):
    """Return the watched queries as a Sentence Transformers evaluator of nDCG@10.

    Its second metric says which checkpoint to keep: the last that is as good as the best before it (is_as_good), since
    a few queries can not tell checkpoints apart and the later ones have learnt more. The best is kept in the file
    store, for a training that goes on after a kill.
    """
    from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

    class Watcher(SentenceEvaluator):
        primary_metric = "preferred"

        def __call__(self, model, output_path=None, epoch=-1, steps=-1) -> dict[str, float]:
            own = gains(watched.ranks(watched.similarities(model)))["nDCG@10"]
            best = np.array(read_json(store).get("best", own))
            if own.mean() >= best.mean():
                with replacing(store) as temporary:
                    temporary.write_text(json.dumps({"best": own.tolist()}), encoding="utf-8")
            return {"ndcg@10": float(own.mean()), "preferred": steps if is_as_good(own, best) else 0}

    return Watcher()


def is_as_good(own: np.ndarray, best: np.ndarray) -> bool:
    """Tell whether own is within a standard error of best, a higher mean over the same queries.

    The one-standard-error rule (Breiman et al., 1984) keeps a few lucky queries from deciding.
    """
    return float((best - own).mean()) <= float((best - own).std()) / math.sqrt(len(own))


def gains(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Per-query nDCG@10, MRR@10 and Recall@10 where each query has one answer (Järvelin and Kekäläinen, 2002)."""
    found = ranks > 0
    safe = np.where(found, ranks, 1)
    return {
        "nDCG@10": np.where(found, 1 / np.log2(safe + 1), 0.0),
        "MRR@10": np.where(found, 1 / safe, 0.0),
        "Recall@10": found.astype(float),
    }


def confidence_interval(differences: np.ndarray, seed: int, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of paired differences by bootstrap (Efron, 1979; Sakai, SIGIR 2006)."""
    rng = np.random.default_rng(seed)
    means = [differences[rng.integers(0, len(differences), len(differences))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


SHOWN = 3  # passages of each model, for every query of --questions
MIN_QUERIES = 30  # fewer can not tell two models apart
DECIDING, CHOOSING = slice(0, None, 2), slice(1, None, 2)  # the halves of the held-out queries


def compare(queries: list[Query], base: np.ndarray, tuned: np.ndarray, kept_base: bool, seed: int) -> dict:
    """Compare two models' ranks for the same queries: means, an interval, by kind and language, and the verdict."""
    if not queries:
        return {"verdict": "unknown", "queries": 0, "queries_needed": MIN_QUERIES}
    before, after = gains(base), gains(tuned)
    differences = after["nDCG@10"] - before["nDCG@10"]
    low, high = confidence_interval(differences, seed)
    verdict = "kept-base" if kept_base else "improved" if low > 0 else "worse" if high < 0 else "unchanged"
    if len(queries) < MIN_QUERIES and not kept_base:
        verdict = "unknown"
    needed = queries_needed(differences)
    kinds, languages = [query.strategy for query in queries], [language(query.positive) for query in queries]
    order = np.argsort(-differences, kind="stable")
    return {
        "verdict": verdict,
        "queries": len(queries),
        "queries_needed": needed if verdict == "unknown" or (needed or 0) > len(queries) else None,
        "base": {name: float(values.mean()) for name, values in before.items()},
        "fine_tuned": {name: float(values.mean()) for name, values in after.items()},
        "difference": float(differences.mean()),
        "interval_95": [low, high],
        "wins": int((differences > 0).sum()),
        "losses": int((differences < 0).sum()),
        "nDCG@10_by_kind": by_group(kinds, before["nDCG@10"], after["nDCG@10"]),
        "nDCG@10_by_language": by_group(languages, before["nDCG@10"], after["nDCG@10"]),
        "differences": [round(float(value), 4) for value in differences],
        "most_gained": [as_row(queries[i], base[i], tuned[i]) for i in order[:10] if differences[i] > 0],
        "most_lost": [as_row(queries[i], base[i], tuned[i]) for i in order[::-1][:10] if differences[i] < 0],
    }


def by_group(names: list[str], before: np.ndarray, after: np.ndarray) -> dict[str, dict]:
    """Return the number of queries and both models' means for each name."""
    table = {}
    for name in sorted(set(names)):
        own = np.array([one == name for one in names])
        table[name] = {
            "queries": int(own.sum()),
            "base": float(before[own].mean()),
            "fine_tuned": float(after[own].mean()),
        }
    return table


def as_row(query: Query, base: int, tuned: int) -> dict:
    return {**query._asdict(), "base_rank": int(base), "fine_tuned_rank": int(tuned)}


def queries_needed(differences: np.ndarray) -> int | None:
    """Return about how many queries would tell a difference as large as this one from chance (a paired z test).

    Of held-out queries, those are meant that decide, the half. None: there is no difference.
    """
    mean, deviation = float(differences.mean()), float(differences.std())
    return max(MIN_QUERIES, math.ceil((1.96 * deviation / mean) ** 2)) if abs(mean) > 1e-9 else None


def print_comparison(result: dict, quiet: bool = False, summary: str = "") -> None:
    """Print base against fine-tuned, the summary of the run, and the verdict, a line for programs."""
    if result["queries"] and not quiet:
        print_details(result)
    if summary:
        print(summary)
    if not result["queries"]:
        print(
            f"VERDICT unknown: no queries whose answer is known, of which {MIN_QUERIES} are needed to decide;"
            " add documents or questions"
        )
        return
    low, high = result["interval_95"]
    base, tuned = (result[name]["nDCG@10"] for name in ("base", "fine_tuned"))
    print(
        f"VERDICT {result['verdict']} nDCG@10 {base:.3f} -> {tuned:.3f}"
        f" ({result['difference']:+.3f}, 95% CI {low:+.3f}..{high:+.3f}, {result['queries']} queries)"
    )


def print_details(result: dict) -> None:
    """Print the means, by kind, language and mode, and the queries that gained and lost most."""
    base, tuned = result["base"], result["fine_tuned"]
    print(f"{'':<28}{'base':>10}{'fine-tuned':>12}")
    for name, value in base.items():
        print(f"{name + ' (semantic)':<28}{value:>10.3f}{tuned[name]:>12.3f}")
    for table in ("kind", "language"):
        for name, row in result[f"nDCG@10_by_{table}"].items():
            label = f"  {table} {name} ({row['queries']})"
            print(f"{label:<28}{row['base']:>10.3f}{row['fine_tuned']:>12.3f}")
    for mode, row in result.get("nDCG@10_by_mode", {}).items():
        print(f"{'nDCG@10 (' + mode + ')':<28}{row['base']:>10.3f}{row['fine_tuned']:>12.3f}")
    print(f"{result['wins']} queries better, {result['losses']} worse, {result['queries']} in all")
    for words, rows in (("gained", result["most_gained"][:3]), ("lost", result["most_lost"][:3])):
        for row in rows:
            ranks = " -> ".join(str(row[name] or "beyond 10") for name in ("base_rank", "fine_tuned_rank"))
            print(f"  {words} most: {shortened(row['query'], 80)!r} rank {ranks}")
    if result["verdict"] in ("unknown", "unchanged") and result["queries_needed"]:
        needed = f"about {result['queries_needed']:,} would: add documents or questions"
        print(f"{result['queries']} queries can not tell the models apart; {needed}")


def search_figures(judged: HeldOut, tuned: np.ndarray, seed: int) -> tuple[dict, dict]:
    """Fit hybrid search's weight on the choosing half; return it, and nDCG@10 by search mode on the deciding half.

    tuned: similarities of the judged queries and passages.
    """
    if len(judged.queries) < MIN_QUERIES:
        return {}, {}
    weight = fitted_weight(language_share(judged), judged.pieces)
    return {"semantic_weight": weight}, figures_by_mode(judged, (judged.base, tuned), weight, DECIDING, seed)


def figures_by_mode(
    searched: HeldOut, similarities: Sequence[np.ndarray], weight: float, part: slice, seed: int
) -> dict[str, dict]:
    """Return part of the queries' nDCG@10 by words, and by both with the base's and the tuned model's similarities."""
    matrices = [searched.keyword_matrix(), *(searched.hybrid_matrix(own, weight) for own in similarities)]
    keyword, before, after = (gains(searched.ranks(own)[part])["nDCG@10"] for own in matrices)
    return {
        "keyword": dict.fromkeys(("base", "fine_tuned"), float(keyword.mean())),
        "hybrid": {
            "base": float(before.mean()),
            "fine_tuned": float(after.mean()),
            "interval_95": list(confidence_interval(after - before, seed)),
        },
    }


def language_share(judged: HeldOut) -> float | None:
    """Return the base's nDCG@10 as a share of keyword search's, or None where keyword search finds nothing.

    It tells how well the base knows the documents' main language, by the choosing half of the queries in it without
    those for terms; with several languages, the queries are too few to tell them apart. Queries differ in how literal
    they are: a base that cuts hardly any word in pieces knows the language from half of what words find on.
    """
    languages = Counter(language(text) for text in judged.passages)
    main = max(sorted(languages), key=languages.get, default="")
    by_base, by_words = (gains(judged.ranks(scores))["nDCG@10"] for scores in (judged.base, judged.keyword_matrix()))
    choosing = [(place, judged.queries[place]) for place in range(len(judged.queries))[CHOOSING]]
    worded = [place for place, one in choosing if one.strategy != "term" and language(one.positive) == main]
    found = by_words[worded].sum()
    share = float(by_base[worded].sum() / found) if found else None
    if share is not None and share >= 0.5 and judged.pieces < WHOLE_WORDS:
        return max(share, KNOWS_LANGUAGE)
    return share


def knows_language(judged: HeldOut) -> bool:
    """Tell whether the base knows the documents' language, and the held-out queries do not tell enough without that.

    Enough held-out questions of people's show by themselves what was learnt, in whatever language; those accepted as
    they were suggested repeat their passage's words like other made-up queries.
    """
    asked = sum(query.strategy == "question" for query in judged.queries)
    return asked < MIN_QUERIES and (language_share(judged) or 0) >= KNOWS_LANGUAGE


def pieces_per_word(model, texts: list[str]) -> float:
    """Return into how many tokens the model's tokenizer cuts a word on average ("fertility"; Rust et al., ACL 2021)."""
    encoded = model.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    words = sum(len(set(one.word_ids) - {None}) for one in encoded)
    return sum(sum(one.attention_mask) for one in encoded) / max(1, words)


def fitted_weight(share: float | None, pieces: float) -> float:
    """Return hybrid search's weight of the meaning for a language_share and the base's pieces_per_word.

    The weight that is best for made-up queries is not the one for people's: they repeat their passage's words, which is
    also what training teaches. How well the base knows the language tells what to expect of it for words that the
    passage does not repeat. From KNOWS_LANGUAGE on, this part of the share came nearest to the best weights for
    people's questions to English documents, and 0.5 for those to Turkish ones with a multilingual base, which cuts
    words; below it, 0.1 was never far from the best on four sets of Turkish ones.
    """
    if share is None:
        return DEFAULT_SEMANTIC_WEIGHT
    if share < KNOWS_LANGUAGE:
        return FOREIGN_SEMANTIC_WEIGHT
    return round(min(0.95 * share, 0.85 if pieces < WHOLE_WORDS else 0.5), 2)


# ----------------------------------------------------------------------------- scores by words, and by both

LETTERS = rf"[^\W_{UNSPACED}]+"
# A run of letters of a script without spaces; a word, KM-2.1, src/main.py, *.alt.
WORD_OR_NAME = re.compile(rf"[{UNSPACED}]+|(?:(?<![\w.])\*?\.)?{LETTERS}(?:[._/#:@+-]+{LETTERS})*")
IS_UNSPACED = re.compile(f"[{UNSPACED}]")
CODE_LETTERS = re.compile(r"\A[^\W\d]{3,}(?=\d)")  # of FSTWRN004
CAMEL = re.compile(r"(?<=[a-zçğıöşü0-9])(?=[A-ZÇĞİÖŞÜ])")
ENDING = re.compile(r"(?<=\w)(?<!\b[cdjlmnstCDJLMNST])['’][^\W_]+")  # API'nin, don't; not l'utilisateur
MAX_QUERY_WORDS = 64
CANDIDATES = 200  # passages that each of the two arms puts up for the hybrid search
DEFAULT_SEMANTIC_WEIGHT = 0.3  # where none was fitted
FOREIGN_SEMANTIC_WEIGHT = 0.1  # where the base does not know the documents' language
KNOWS_LANGUAGE = 2 / 3  # the language_share from which on a base knows the documents' language
WHOLE_WORDS = 1.5  # pieces_per_word: an English vocabulary has 1.1 to 1.3 in English documents, 2.0 to 2.6 in Turkish
MAX_POSTINGS = 20_000  # beyond, a query's commonest words are left out: they tell least and take nearly all the time
PREFIX_LETTERS = 6  # Turkish hangs its endings on the stem: the first letters are nearly always the stem
FIRST_LETTERS = 4  # what a stem shares with its forms in whatever ending
HEADS = ">"  # before a name that a heading begins with; in no word or name
LAST_LETTER = "\U0010ffff"  # comes after whatever words begin with
FUNCTION_WORDS = """
ne neden nasıl nedir neler nelerdir hangi hangisi kim kimdir kimin kimler kaç nerede nereden nereye niçin niye mi mı mu
mü midir mıdır mudur ve veya ya da de ile için bir bu şu o olarak olan ama ancak ise ki diye gibi var yok what
which who whom whose when where why how is are was were be been do does did can could should would will a an the of in
on at by for with from to and or not it its this that these those i my me we our us you your there have has had
"""
# Answers seldom repeat a question's. They count as typed, with or without Turkish letters: "is" is none of "iş", work.
FUNCTION_FORMS = {form for word in FUNCTION_WORDS.split() for form in (word, fold(word))} - {"su"}  # water; of "şu"


def words_and_names(text: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield each word or name of a text as it stands, the folded name ("" for a plain word), and its folded words."""
    for word in WORD_OR_NAME.findall(ENDING.sub(" ", ESCAPE.sub("", text))):
        yield word, *folded_name_and_words(word)


@functools.lru_cache(maxsize=1 << 17)
def folded_name_and_words(word: str) -> tuple[str, tuple[str, ...]]:
    """Return a word's folded name, "" where it is a plain word, and the folded words that it is made of."""
    if IS_UNSPACED.match(word):  # pairs of letters stand in for the words, as in Lucene's CJKBigramFilter
        return "", tuple(fold(word[start : start + 2]) for start in range(max(1, len(word) - 1)))
    words = tuple(fold(part) for part in WORD.findall(CAMEL.sub(" ", word)))
    is_name = len(words) > 1 or word[0] in "*."
    name = re.sub(r"(?<![a-z0-9])v(?=\d)", "", re.sub(r"[\W_]+", "-", fold(word)))  # v1.7.1 is 1.7.1
    return name if is_name else "", words


def keyword_terms(text: str) -> tuple[list[str], list[str]]:
    """Return the folded words of a text, whole names such as km-2-1 among them, and the words cut to their stems.

    The stem of a code's letters is among them, too, so that "worker" finds "worker3", and "worker4" does not.
    """
    exact: list[str] = []
    stems: list[str] = []
    for _, name, words in words_and_names(text):
        exact += [name, *words] if name else words
        for word in words:
            stems += [stem_of(word), *(stem_of(letters) for letters in CODE_LETTERS.findall(word))]
    return exact, stems


def stem_of(word: str) -> str:
    """Return the first letters of a word; of a code, such as "worker3", all: its number tells it from others."""
    return word if any(map(str.isdigit, word)) else word[:PREFIX_LETTERS]


class Keywords:
    """Which passages hold a term, and how often: an inverted index in SQLite.

    Table postings(term, passages, stems, exact): how many passages hold it, and their places (uint32, in order), once
    for each time that they do as a stem or in a heading, and as a whole word or name. Table lengths(terms): how many
    each passage has (uint32).
    """

    def __init__(self, database: sqlite3.Connection):
        self.database = database
        lengths = np.frombuffer(database.execute("SELECT terms FROM lengths").fetchone()[0], np.uint32)
        self.lengths = lengths / max(1, lengths.mean())  # as parts of the usual one

    def holders(self, beginning: str, end: str) -> int:
        """Return the number of passages with a term from `beginning` to `end`; terms of one passage count each."""
        rows = self.database.execute("SELECT sum(passages) FROM postings WHERE term BETWEEN ? AND ?", (beginning, end))
        return rows.fetchone()[0] or 0

    def longer_names(self, name: str) -> list[tuple[int, bytes]]:
        """Return how many passages hold each name that ends in "-name", and their places as in the table."""
        query = "SELECT passages, stems, exact FROM postings WHERE term LIKE ? AND term NOT LIKE ?"
        rows = self.database.execute(query, (f"_%-{name}", f"{HEADS}%"))
        return [(passages, stems + exact) for passages, stems, exact in rows]

    def places_and_counts(self, column: str, beginning: str, end: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the passages that hold a term from `beginning` to `end`, and how often."""
        rows = self.database.execute(f"SELECT {column} FROM postings WHERE term BETWEEN ? AND ?", (beginning, end))
        return np.unique(np.frombuffer(b"".join(row[0] for row in rows), np.uint32), return_counts=True)

    def matches(self, word: "QueryWord") -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        """Yield passages, term frequencies and credit (1 or less) for each way of holding a query's word, best first.

        A word counts as a stem, and half as much as it stands; a name at the beginning of a heading counts once more. A
        long word is faintly held by passages with its first letters, for stems are as short as "görev" and end in other
        letters with an ending ("takip", "takibi").
        """
        if word.kind == "ending":
            longer = b"".join(places for _, places in self.longer_names(word.term))
            yield *np.unique(np.frombuffer(longer, np.uint32), return_counts=True), 1.0
            return
        end = word.term + LAST_LETTER * (word.kind == "beginning")
        yield *self.places_and_counts("stems", word.term, end), 1.0
        places, counts = self.places_and_counts("exact", word.word, word.word)
        yield places, counts / 2, 1.0
        if word.kind == "name":
            yield *self.places_and_counts("stems", HEADS + word.term, HEADS + word.term), 1.0
        elif word.weight and len(word.word) >= PREFIX_LETTERS:
            first = word.word[:FIRST_LETTERS]
            if self.holders(first, first + LAST_LETTER) <= MAX_POSTINGS:
                places, counts = self.places_and_counts("stems", first, first + LAST_LETTER)
                yield places, 0.15 * counts, 0.5

    def bm25(self, places: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return BM25 (Robertson and Zaragoza, 2009) of a term in the passages that hold it.

        The constants are those of SQLite's FTS5, and so are the values.
        """
        k1, b, total = 1.2, 0.75, len(self.lengths)
        rarity = max(1e-6, math.log((total - len(places) + 0.5) / (len(places) + 0.5)))
        return rarity * counts * (k1 + 1) / (counts + k1 * (1 - b + b * self.lengths[places]))


def write_keywords(path: Path | str, passages: Iterable[tuple[Sequence[str], str]]) -> Keywords:
    """Write the keyword index of (heading path, text) passages to a new file, or to ":memory:"."""
    stems, exact = (defaultdict(functools.partial(array.array, "I")) for _ in range(2))
    holders: Counter[str] = Counter()
    lengths = array.array("I")
    for place, (headings, text) in enumerate(passages):
        words, own_stems = keyword_terms(text)
        own_stems += heading_terms(headings)
        lengths.append(len(words) + len(own_stems))
        for postings, terms in ((stems, own_stems), (exact, words)):
            for term in terms:
                postings[term].append(place)
        holders.update(dict.fromkeys(own_stems + words).keys())
    database = sqlite3.connect(path)
    with database:
        database.execute("PRAGMA journal_mode=OFF")
        database.execute("CREATE TABLE lengths(terms BLOB)")
        database.execute("INSERT INTO lengths VALUES (?)", (lengths.tobytes(),))
        database.execute("CREATE TABLE postings(term TEXT, passages INTEGER, stems BLOB, exact BLOB)")
        rows = ((term, holders[term], stems[term].tobytes(), exact[term].tobytes()) for term in sorted(holders))
        database.executemany("INSERT INTO postings VALUES (?, ?, ?, ?)", rows)
        database.execute("CREATE UNIQUE INDEX terms ON postings(term, passages)")
    return Keywords(database)


def heading_terms(headings: Sequence[str]) -> list[str]:
    """Return the stems of a passage's headings and, three times, their names and which name each begins with."""
    terms = keyword_terms(" ".join(headings))[1]
    for heading in headings:
        names = [name for _, name, _ in words_and_names(heading)]
        terms += 3 * [name for name in names if name]
        terms += [HEADS + name for name in names[:1] if name] * 3  # "KM-2.1: …", its entry, before what mentions it
    return terms


class QueryWord(NamedTuple):
    """A word or name of a query as the keyword index knows it.

    term: a whole folded name, a word cut to its stem, the letters that words of the index begin with, or the end of
    longer IDs (kind).
    passages: how many hold it. weight: what finding it tells, the log of all passages over those that hold it (Spärck
    Jones, 1972); 0 for the parts of a name.
    """

    word: str
    term: str
    kind: str  # "name", "stem", "beginning" or "ending"
    passages: int
    weight: float

    def is_in(self, exact: set[str], stems: set[str]) -> bool:
        """Tell whether a passage with these keyword_terms holds it; a name's parts are the stems of "DevOps"."""
        if self.word in exact:
            return True
        if self.kind == "beginning":
            return any(stem.startswith(self.term) for stem in stems)
        if self.kind == "ending":
            return any(name.endswith(f"-{self.term}") for name in exact)
        return self.kind == "stem" and self.term in stems

    def is_nearly_in(self, stems: set[str]) -> bool:
        """Tell whether such a passage holds a word whose stem differs in its last letter alone, as by an ending."""
        long = self.kind == "stem" and len(self.term) == PREFIX_LETTERS and self.term.isalpha()
        return long and any(stem.startswith(self.term[:-1]) for stem in stems)


def query_words(index: Keywords, query: str) -> list[QueryWord]:
    """Return the first MAX_QUERY_WORDS distinct words of a query, less its function words if it has others."""
    words: dict[str, tuple[str, str, int, bool]] = {}
    function_words: set[str] = set()
    for as_typed, name, parts in itertools.islice(dict.fromkeys(words_and_names(query)), MAX_QUERY_WORDS):
        as_one, is_id = False, any(map(str.isdigit, as_typed))
        name, kind, holders = known_name(index, name, is_id) if name else ("", "", 0)
        if name and name not in parts:  # not ".close()", which is a word
            # A name that the documents hold is one thing, and so is an ID; of other words in one, each may stand alone.
            as_one = is_id or holders > 0
            words[name] = (name, kind, holders, as_one)
        for part in parts:
            words.setdefault(part, (*stem_or_beginning(index, part), not as_one))
            if (part if name else as_typed.replace("İ", "i").lower()) in FUNCTION_FORMS:
                function_words.add(part)
    total = len(index.lengths)
    found = [
        QueryWord(word, term, kind, holders, math.log((total + 1) / (min(holders, total) + 0.5)) if counts else 0.0)
        for word, (term, kind, holders, counts) in words.items()
    ]
    return [word for word in found if word.word not in function_words] or found


def known_name(index: Keywords, name: str, is_id: bool) -> tuple[str, str, int]:
    """Return what a name is looked up by, its kind, and how many passages hold it.

    That is the name without its dot where more hold that ("setErrorHandler" for ".setErrorHandler()"), and of an ID
    that none holds the longer ones that end in it ("AG-MIM-MICROSERV-001" for "MICROSERV-001").
    """
    holders = index.holders(name, name)
    plain = name.removeprefix("-")
    if not is_id and plain != name and (more := index.holders(plain, plain)) > holders:
        return plain, "name", more
    if is_id and not holders and not name.replace("-", "").isdigit() and (longer := index.longer_names(name)):
        return name, "ending", sum(passages for passages, _ in longer)
    return name, "name", holders


def stem_or_beginning(index: Keywords, word: str) -> tuple[str, str, int]:
    """Return what a word is looked up by, its kind, and how many passages hold it.

    A short word is shorter than a stem with its ending, so that whatever begins with it counts ("görevi" for "görev");
    of three letters, where the index lacks the word itself. Where it lacks the stem of a longer one, a letter less has
    to do ("linux" of "linuxta").
    """
    stem = stem_of(word)
    holders = index.holders(stem, stem)
    beginnings = [stem] * (len(word) in (4, 5) or (len(word) == 3 and not holders))
    beginnings += [stem[:-1]] * (len(stem) >= PREFIX_LETTERS - 1 and stem.isalpha() and not holders)
    for beginning in beginnings:
        if longer := index.holders(beginning, beginning + LAST_LETTER):
            return beginning, "beginning", longer
    return stem, "stem", holders


def keyword_scores(index: Keywords, words: list[QueryWord], count: int) -> tuple[dict[int, float], float]:
    """Return the scores of the passages with the best BM25 for a query's words, by their place; higher is better.

    A score is BM25 times the share of the words' weight that the passage holds, like the coordination factor of early
    versions of Lucene: in a long description, many of its words come before a rare one that stands there by chance.
    Beyond the first CANDIDATES no score is higher than theirs, so that more results leave the first as they are.
    The second value is the largest share, 1 where nothing is known of it.
    """
    rarest = sorted(words, key=lambda word: word.passages)
    postings = itertools.accumulate(word.passages for word in rarest)
    unknown = sum(not word.passages for word in rarest)
    words = rarest[: max(unknown + 2, sum(so_far <= MAX_POSTINGS for so_far in postings))]
    scores, share, holds = np.zeros((3, len(index.lengths)))
    for number, word in enumerate(words, 1):
        for places, counts, part in index.matches(word):
            scores[places] += index.bm25(places, counts)
            share[places] += part * word.weight * (holds[places] != number)
            holds[places] = number
    best = np.flatnonzero(scores)
    if len(best) > count:
        best = best[scores[best] >= np.partition(scores[best], -count)[-count]]
    best = best[np.argsort(-scores[best], kind="stable")][:count]
    scores, share = scores[best], share[best]
    if not share[:CANDIDATES].any():  # they hold but parts of a name that no passage holds whole
        return dict(zip(best.tolist(), scores.tolist(), strict=True)), 1.0
    share /= sum(word.weight for word in words)
    scores *= share
    scores[CANDIDATES:] = np.minimum(scores[CANDIDATES:], scores[:CANDIDATES].min())
    return dict(zip(best.tolist(), scores.tolist(), strict=True)), float(share[:CANDIDATES].max())


def weight_for_few_words(fitted: float, words: list[QueryWord]) -> float:
    """Return a fitted semantic weight, or less where a query has but one or two words that the documents hold.

    It was fitted on sentences and headings; of a word or two, which passages hold them tells more than the meaning.
    """
    known = sum(word.weight > 0 and word.passages > 0 for word in words)
    return min(fitted, 0.3 * known) if known else fitted


def weight_for_query(semantic_weight: float, held: float) -> float:
    """Return the semantic weight for a query; held: the largest share of the query's words that one passage holds.

    The words count by that share: standard scores tell which passage holds more of them, not that none holds many, as
    of a question in other words than the documents'.
    """
    return semantic_weight / (semantic_weight + (1 - semantic_weight) * held)


def combined_scores(
    meaning: dict[int, float], words: dict[int, float], mean: float, deviation: float, semantic_weight: float
) -> dict[int, float]:
    """Return the weighted sum of both standard scores for each passage of meaning, which holds all of words.

    The mean and deviation of the similarities are those over all passages, or a sample, so that a query which nothing
    is near to leaves the order to its words; a passage that holds none of the words has the keyword score 0. Both arms
    are given best first: those of the keyword scores are those of each arm's first CANDIDATES, which others do not come
    before, so that the order is the same however many results are asked for.
    """
    first_words = dict(itertools.islice(words.items(), CANDIDATES))
    pool = dict.fromkeys([*itertools.islice(meaning, CANDIDATES), *first_words])
    words = {place: (first_words if place in pool else words).get(place, 0.0) for place in meaning}
    words = standard_scores(words, pool)
    scores = {
        place: semantic_weight * (meaning[place] - mean) / (deviation or 1.0) + (1 - semantic_weight) * words[place]
        for place in meaning
    }
    lowest = min((scores[place] for place in pool), default=0.0)
    return {place: score if place in pool else min(score, lowest) for place, score in scores.items()}


def standard_scores(scores: dict[int, float], pool: Iterable[int] | None = None) -> dict[int, float]:
    """Return scores less their mean, in units of their deviation; pool: the places that these are of, or all."""
    counted = [scores[place] for place in (scores if pool is None else pool)]
    mean = sum(counted) / max(1, len(counted))
    deviation = math.sqrt(sum((score - mean) ** 2 for score in counted) / max(1, len(counted))) or 1.0
    return {place: (score - mean) / deviation for place, score in scores.items()}


# ---------------------------------------------------------------------------------------------- training


def usable_pairs(pairs: list[Pair], loss: str, model) -> list[Pair]:
    """Return the pairs that the loss can use; for triplets, negatives are mined with the model where they are missing.

    Raises:
        UserError: there are none.
    """
    with_negative = [pair for pair in pairs if pair.negative]
    if loss == "triplet":
        with_negative += mine_negatives([pair for pair in pairs if not pair.negative], model)
        if not with_negative:
            raise UserError("no hard negatives were found for these pairs; use --loss mnrl or more documents")
        return with_negative
    if 0 < len(with_negative) < len(pairs):
        warn(f"{len(with_negative)} of {len(pairs)} pairs have a negative; --loss mnrl uses them when all have one")
    return pairs


def training_columns(pairs: list[Pair]) -> dict[str, list[str]]:
    """Return the columns that the losses read, the negatives only where all pairs have one."""
    columns = {"anchor": [pair.anchor for pair in pairs], "positive": [pair.positive for pair in pairs]}
    if all(pair.negative for pair in pairs):
        columns["negative"] = [pair.negative for pair in pairs]
    return columns


LABELLED = ("question", "suggested")  # strategies of pairs that a person has written or accepted


def plan_rows(pairs: list[Pair], epochs: int, question_weight: int, max_unlabelled: int, seed: int) -> list[int]:
    """Return the rows to train on: those that no person labelled once an epoch, but max_unlabelled at most in all.

    Labelled questions come question_weight times an epoch, without a limit. Unlabelled pairs teach the documents'
    words in about a hundred steps; from then on the search gets worse while the loss falls.
    """
    rng = random.Random(seed)
    labelled = [row for row, pair in enumerate(pairs) if pair.strategy in LABELLED]
    unlabelled = [row for row, pair in enumerate(pairs) if pair.strategy not in LABELLED]
    rounds = (rng.sample(unlabelled, len(unlabelled)) for _ in range(epochs))
    return [
        *itertools.islice(itertools.chain.from_iterable(rounds), max_unlabelled),
        *labelled * epochs * question_weight,
    ]


def apart_keys(pairs: list[Pair]) -> list[frozenset[str]]:
    """Return the keys of each pair; two pairs with a common key might hold right answers to each other's anchor.

    A key is the section, a text, the heading with its numbers blanked (documents that fill in one template), or one of
    the three smallest shingle hashes of a text, which near-copies share (bottom-k sketch; Broder, 1997). Of the last
    two kinds, one that more than a twentieth of the pairs hold tells nothing: dates as headings, or a title.
    """
    certain, likely = [], []
    for pair in pairs:
        section = {f"{pair.source_file}#{pair.section}"} if pair.section else set()
        certain.append({f"={fold(pair.anchor)}", f"={fold(pair.positive)}"} | section)
        sketches = (sorted(shingles(text))[:3] for text in pair[:2])
        heading = {f"#{template_key(pair.section.rpartition(' > ')[2])}"} if pair.section else set()
        likely.append({f"~{one}" for sketch in sketches for one in sketch} | heading)
    holders = Counter(one for keys in likely for one in keys)
    usual = max(8, len(pairs) / 20)
    return [
        frozenset(sure | {one for one in keys if holders[one] <= usual})
        for sure, keys in zip(certain, likely, strict=True)
    ]


def plan_batches(
    rows: list[int], keys: list[frozenset[str]], batch_size: int, count: int, seed: int
) -> list[list[int]]:
    """Return `count` batches of rows, going round the rows in random orders; no two rows of a batch share a key.

    A row that does not fit into a batch goes into the next; what fits into none until a round ends waits for another.
    """
    rng = random.Random(seed)
    waiting: list[int] = []
    plan = []
    while len(plan) < count:
        batch: list[int] = []
        taken: set[str] = set()
        passed: list[int] = []
        fresh = False
        while len(batch) < batch_size and (waiting or not fresh):  # all rows together need not make a full batch
            if not waiting:
                waiting, passed, fresh = rng.sample(rows, len(rows)), [], True
            row = waiting.pop()
            if taken.isdisjoint(keys[row]):
                batch.append(row)
                taken |= keys[row]
            else:
                passed.append(row)
        waiting += passed[::-1]
        plan.append(batch)
    return plan


def dealt_out(batches: list[list[int]]) -> list[list[int]]:
    """Return the rows that each process takes of each batch in turn: as many, and at least one."""
    parts = processes()
    return [rows[rank : len(rows) // parts * parts : parts] or rows[:1] for rows in batches for rank in range(parts)]


def mine_negatives(pairs: list[Pair], model) -> list[Pair]:
    """Return the pairs that the model finds a hard negative for, with it.

    A negative may come to no more than 95 % of its positive's similarity, lest it be a right answer (NV-Retriever;
    Moreira et al., 2024), and has no key in common with its pair (apart_keys).
    """
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    if not pairs:
        return []
    rows = Dataset.from_dict({"anchor": [pair.anchor for pair in pairs], "positive": [pair.positive for pair in pairs]})
    mined = mine_hard_negatives(
        rows, model, num_negatives=5, range_max=400, relative_margin=0.05, output_format="triplet", verbose=False
    )
    keys = dict(zip(((pair.anchor, pair.positive) for pair in pairs), apart_keys(pairs), strict=True))
    of_text: dict[str, frozenset[str]] = {}
    for (_, positive), own in keys.items():
        of_text[positive] = of_text.get(positive, frozenset()) | own
    by_texts = {(pair.anchor, pair.positive): pair for pair in pairs}
    found = []
    for row in mined:
        texts = (row["anchor"], row["positive"])
        if texts in by_texts and keys[texts].isdisjoint(of_text[row["negative"]]):  # the hardest comes first
            found.append(by_texts.pop(texts)._replace(negative=row["negative"]))
    print(f"{len(found):,} of {len(pairs):,} pairs have a hard negative, and are trained on", file=sys.stderr)
    return found


def make_loss(loss: str, model, processes: int = 1):
    """Return the loss object: in-batch negatives (mnrl) or triplets with a cosine margin of 0.2."""
    import torch
    from sentence_transformers.sentence_transformer.losses import (
        MultipleNegativesRankingLoss,
        TripletDistanceMetric,
        TripletLoss,
    )
    from sentence_transformers.util import cos_sim

    @functools.wraps(cos_sim)
    def in_float32(anchors, texts):  # bfloat16 would round the similarities to 0.004
        with torch.autocast(anchors.device.type, enabled=False):
            return cos_sim(anchors.float(), texts.float())

    if loss == "mnrl":
        return MultipleNegativesRankingLoss(model, similarity_fct=in_float32, gather_across_devices=processes > 1)
    return TripletLoss(model, distance_metric=TripletDistanceMetric.COSINE, triplet_margin=0.2)


def seconds_per_step(model, loss, columns: dict[str, list[str]], rows: list[int], batch_size: int) -> float:
    """Measure a training step of this machine on some of the rows that are trained on, without changing the model."""
    took = []
    for start in range(3):
        started = time.perf_counter()
        batch = (rows[start :: max(3, len(rows) // batch_size)] or rows)[:batch_size]  # of all kinds of pairs
        features = [model.preprocess([column[row] for row in batch]) for column in columns.values()]
        features = [{k: v.to(model.device) if hasattr(v, "to") else v for k, v in one.items()} for one in features]
        with in_bfloat16(model):
            value = loss(features, None)
        value.backward()
        took.append(time.perf_counter() - started)
    model.zero_grad()
    return sorted(took)[1] * 1.1  # the median, and the optimizer's share


def train(
    model,
    columns: dict[str, list[str]],
    batches: list[list[int]],
    watched: HeldOut,
    deadline: float,
    options: argparse.Namespace,
) -> dict:
    """Train on the batches, watching the held-out queries four times; the model ends as the best checkpoint seen.

    An interrupted training of the same kind is gone on with (see claim_workspace). No step begins after the deadline,
    in seconds of time.perf_counter, whatever the plan was.

    Returns:
        history: dicts with step, loss and nDCG@10; steps: how many were taken; kept_step: the one whose weights it has.
    """
    from datasets import Dataset
    from safetensors import SafetensorError
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    steps = len(batches) // processes()
    # The card's example, set here lest the trainer draw its own and print about it.
    model.model_card_data.widget = [{"source_sentence": columns["anchor"][0], "sentences": columns["positive"][:3]}]
    trainer = trainer_of(batches)(
        model,
        training_arguments(options, steps, bool(watched.queries), model.device.type),
        Dataset.from_dict(columns),
        loss=make_loss(options.loss, model, processes()),
        evaluator=watcher(watched, workspace(options.model_dir) / "best.json") if watched.queries else None,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(progress_callback(steps, deadline))
    checkpoint = last_checkpoint(workspace(options.model_dir))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # PyTorch's writer of files
            raise
        folder, reason = options.model_dir.parent, str(error).splitlines()[0]
        raise UserError(f"{folder} can not be written to ({reason}); make room or name another --model-dir") from None
    kept = str(trainer.state.best_model_checkpoint or f"-{trainer.state.global_step}").rpartition("-")[2]
    history = history_of(trainer.state.log_history)
    return {"history": history, "steps": trainer.state.global_step, "kept_step": int(kept)}


def trainer_of(batches: list[list[int]]) -> type:
    """Return the library's trainer as a class that trains on these batches in their order, in bfloat16 if it can."""
    from sentence_transformers import SentenceTransformerTrainer

    class Trainer(SentenceTransformerTrainer):
        def get_batch_sampler(self, *args, **kwargs):
            return batches  # a list will do, and tells no batch size, by which accelerate would drop shorter ones

        def compute_loss(self, model, *args, **kwargs):
            with in_bfloat16(self.model):  # the library's own setting leaves its mark on the model that is saved
                return super().compute_loss(model, *args, **kwargs)

    return Trainer


def training_arguments(options: argparse.Namespace, steps: int, watching: bool, device: str):
    """Return the trainer's settings: warm-up, linear decay, and the best of four checkpoints kept."""
    from sentence_transformers import SentenceTransformerTrainingArguments
    from transformers.utils import is_torch_tf32_available

    every = max(1, -(-steps // 4))
    return SentenceTransformerTrainingArguments(
        output_dir=str(workspace(options.model_dir)),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=steps // 10,  # a first step of such has the learning rate 0
        seed=options.seed,
        eval_strategy="steps" if watching else "no",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=watching,
        metric_for_best_model="eval_preferred" if watching else None,
        logging_steps=every,
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=device == "cpu",
        tf32=is_torch_tf32_available() or None,  # True is an error where there is none
        ddp_backend=("nccl" if device == "cuda" else "gloo") if processes() > 1 else None,
    )


# ------------------------------------------------------------------ going on after a kill, several processes


COMPLETE = "complete"  # the file that marks a checkpoint written to its end


@contextlib.contextmanager
def locked(lock: Path, work: str) -> Iterator[None]:
    """Hold a lock file; the system frees a dead process's. work: what this process is doing, for those that come.

    Raises:
        UserError: another process holds it.
    """
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    holder = lock.with_name(f"{lock.name}-holder")
    try:
        with FileLock(lock, timeout=0):
            try:
                holder.write_text(str(os.getpid()), encoding="utf-8")
                yield
            finally:
                for path in (holder, lock):
                    with contextlib.suppress(OSError):  # Windows removes a lock only when it is free
                        path.unlink()
    except Timeout:
        process = "another process"
        with contextlib.suppress(OSError):
            process = f"process {holder.read_text(encoding='utf-8')}"
        raise UserError(f"{process} is {work} at this moment; run again when it is done") from None


def workspace(model_dir: Path) -> Path:
    """Return the folder of the checkpoints: beside the model's, and gone when that is saved."""
    return model_dir.with_name(f".{model_dir.name}.training")


def claim_workspace(folder: Path, identity: str, fresh: bool) -> int:
    """Make the folder ready for a run with this identity; return the steps planned by an interrupted one, or 0.

    identity: a hash of data, base model and settings; what another kind of run has left is removed.
    """
    left = read_json(folder / "run.json")
    checkpoint = last_checkpoint(folder)
    if checkpoint and left.get("identity") == identity and not fresh:
        for path in sorted(folder.glob("checkpoint-*")):
            if not is_complete(path):  # cut short by the kill, or damaged since
                remove(path)
        done = checkpoint.name.rpartition("-")[2]
        found = f"found an interrupted training: going on after step {done} of {left['steps']} (--fresh starts over)"
        print(found, file=sys.stderr)
        return left["steps"]
    if checkpoint:
        found = "" if fresh else "found an interrupted training of other data or settings: "
        print(f"{found}starting over", file=sys.stderr)
    remove(folder)
    write_workspace(folder, identity, 0)
    return 0


def write_workspace(folder: Path, identity: str, steps: int) -> None:
    """Note which training the folder belongs to, and its planned steps (0 before they are known)."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "run.json") as temporary:
        temporary.write_text(json.dumps({"identity": identity, "steps": steps}), encoding="utf-8")


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is complete."""
    newest_first = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))
    return next(filter(is_complete, newest_first), None)


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end (see progress_callback) and is as it was then."""
    mark = checkpoint / COMPLETE
    return mark.exists() and mark.read_text(encoding="utf-8", errors="replace") == checksums_of(checkpoint)


def checksums_of(checkpoint: Path) -> str:
    """Return the SHA-256 of each file of a checkpoint, a line each."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE)
    return "".join(f"{sha256_of(path)} {path.relative_to(checkpoint)}\n" for path in files)


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def join_processes() -> None:
    """Under torchrun, let the processes find each other, each with a device of its own."""
    if processes() > 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def from_first_process(value):
    """Return the first process's value in every process; the others wait for it."""
    if processes() > 1:
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]
    return value


def progress_callback(steps: int, deadline: float):
    """Return a callback: a bar with ETA on a terminal, a line on stderr at each look at the held-out set.

    It ends the training at the deadline, in seconds of time.perf_counter, with a last look and checkpoint.
    """
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            hidden = None if state.is_world_process_zero else True
            self.bar = tqdm(total=steps, initial=state.global_step, desc="training", unit="step", disable=hidden)

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(state.global_step - self.bar.n)
            if state.global_step < steps and from_first_process(time.perf_counter() > deadline):
                control.should_training_stop = control.should_save = control.should_log = True
                control.should_evaluate = args.eval_strategy != "no"
            control.should_log |= control.should_evaluate  # the last look need not be a whole quarter

        def on_save(self, args, state, control, **kwargs):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero:
                for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                    sync(path)
                (folder / COMPLETE).write_text(checksums_of(folder), encoding="utf-8")  # a kill before leaves none

        def on_evaluate(self, args, state, control, **kwargs):
            """Print loss and nDCG@10 above the bar."""
            row = {"loss": float("nan"), "nDCG@10": float("nan")} | history_of(state.log_history)[-1]
            if state.is_world_process_zero:
                line = (
                    f"step {state.global_step}/{steps}: loss {row['loss']:.3f}, held-out nDCG@10 {row['nDCG@10']:.3f}"
                )
                self.bar.write(line, file=sys.stderr)

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()
            if state.global_step < steps and state.is_world_process_zero:
                print(f"the time is over after step {state.global_step} (config.MAX_TRAINING_MINUTES)", file=sys.stderr)

    return Progress()


def history_of(log_history: list[dict]) -> list[dict]:
    """Return the trainer's log as one dict a step: step, loss, held-out nDCG@10."""
    names = {"loss": "loss", "eval_ndcg@10": "nDCG@10"}
    history: dict[int, dict] = {}
    for entry in log_history:
        row = history.setdefault(entry["step"], {"step": entry["step"]})
        row |= {name: entry[key] for key, name in names.items() if key in entry}
    return [row for row in history.values() if len(row) > 1]


def choose_weights(model, base_weights: dict, choosing: HeldOut) -> tuple[float, dict[float, float]]:
    """Set the model to the best mixture of base and tuned weights; return its alpha and every alpha's nDCG@10.

    Weights between the two often search better than either (WiSE-FT; Wortsman et al., CVPR 2022). Where alpha 0, the
    base, has the highest mean, it is taken; else the largest alpha that is_as_good as the best.
    """
    if not choosing.queries:
        return 1.0, {}
    tuned_weights = {name: value.clone() for name, value in model.state_dict().items()}
    by_alpha = {}
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        mix_weights(model, base_weights, tuned_weights, alpha)
        by_alpha[alpha] = gains(choosing.ranks(choosing.similarities(model)))["nDCG@10"]
    best = max(by_alpha, key=lambda alpha: (by_alpha[alpha].mean(), -alpha))
    if best:
        best = max(alpha for alpha, own in by_alpha.items() if is_as_good(own, by_alpha[best]))
    mix_weights(model, base_weights, tuned_weights, best)
    return best, {alpha: float(own.mean()) for alpha, own in by_alpha.items()}


def mix_weights(model, base_weights: dict, tuned_weights: dict, alpha: float) -> None:
    """Set the model to the weights that lie the part alpha of the way from the base's to the tuned ones."""
    mixed = {
        name: base_weights[name].lerp(value, alpha) if value.is_floating_point() else value
        for name, value in tuned_weights.items()
    }
    model.load_state_dict(mixed)


def spread_out(model, judged: HeldOut, watched: HeldOut, pairs: list[Pair], power: float) -> tuple[np.ndarray, bool]:
    """Weigh tokens by rarity and partly whiten the model's vectors; return its similarities, and whether this was kept.

    Its tokens count by their rarity (weigh_tokens), and a last linear layer undoes in part that the texts crowd into
    few directions of a general model (spreading), which training narrows little: together they gain about as much again
    as the training. Then directions in which anchors are far from their own positives, as a heading is from any
    paragraph, count for less, half as strongly: within-class covariance normalization (Hatch, Kajarekar and Stolcke,
    Interspeech 2006). Where the watched queries, those that choose, find clearly less by all this, the model stays as
    it was.
    """
    if len(judged.queries) < MIN_QUERIES:
        return judged.similarities(model), False
    before, modules = gains(watched.ranks(watched.similarities(model)))["nDCG@10"], list(model)
    weigh_tokens(model, judged.passages)
    queries, passages = judged.vectors(model)
    matrix = spreading(passages, power)
    matrix = matrix @ spreading(pair_differences(model, pairs) @ matrix, power / 2)
    add_linear(model, matrix)
    if not is_as_good(gains(watched.ranks(watched.similarities(model)))["nDCG@10"], before):
        keep_modules(model, modules)
        return judged.similarities(model), False
    queries, passages = (own / np.linalg.norm(own, axis=1)[:, None] for own in (queries @ matrix, passages @ matrix))
    return queries @ passages.T, True


def keep_modules(model, modules: list) -> None:
    """Remove all other modules from the model."""
    for place in reversed(range(len(model))):
        if model[place] not in modules:
            del model[place]


def weigh_tokens(model, texts: list[str], smoothing: float = 0.003) -> None:
    """Have mean pooling weigh each token by smoothing / (smoothing + its share of the texts' tokens).

    This is smooth inverse frequency (Arora, Liang and Ma, ICLR 2017), in the library's WordWeights module. A model that
    does not take the mean of its tokens, or weighs them already, is left as it is.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights

    pooled = (isinstance(module, Pooling) and module.pooling_mode == "mean" for module in model)
    place = next((place for place, is_mean in enumerate(pooled) if is_mean), None)
    if place is None or any(isinstance(module, WordWeights) for module in model):
        return
    backend = model.tokenizer.backend_tokenizer
    encoded = backend.encode_batch(texts)  # padded where the model has been used before
    counts = Counter(token for one in encoded for token, own in zip(one.tokens, one.attention_mask, strict=True) if own)
    weights = {token: smoothing / (smoothing + count / counts.total()) for token, count in sorted(counts.items())}
    vocabulary = [backend.id_to_token(number) or "" for number in range(max(backend.get_vocab().values()) + 1)]
    model.insert(place, WordWeights(vocabulary, weights).to(model.device))


def pair_differences(model, pairs: list[Pair]) -> np.ndarray:
    """Return the normalised embeddings of the anchors less those of their positives, in rows."""
    texts = [pair.anchor for pair in pairs] + [pair.positive for pair in pairs]
    vectors = embed(model, texts, show_progress_bar=False)
    return vectors[: len(pairs)] - vectors[len(pairs) :]


def spreading(vectors: np.ndarray, power: float, ridge: float = 0.1) -> np.ndarray:
    """Return the symmetric matrix that lessens how unevenly vectors, a row each, fill their directions; of shape
    (dimensions, dimensions).

    power 1 is whitening (Su et al., "Whitening Sentence Representations", 2021), 0 changes nothing; in between, what
    the model has learnt to tell apart keeps counting for more. ridge: a share of the mean variance that is added to
    each direction, for those that few vectors tell of.
    """
    variances, directions = np.linalg.eigh(vectors.T @ vectors / len(vectors))
    variances = variances + ridge * variances.mean()
    return ((directions * (variances / variances.mean()) ** (-power / 2)) @ directions.T).astype(np.float32)


def add_linear(model, matrix: np.ndarray) -> None:
    """Multiply the model's sentence embeddings by a matrix, from the right, before it normalises them if it does."""
    import torch
    from sentence_transformers.base.modules import Dense, Normalize

    size = len(matrix)
    weight = torch.from_numpy(matrix.T.copy())  # a linear layer multiplies by its weight's transpose
    layer = Dense(size, size, False, torch.nn.Identity(), init_weight=weight).to(model.device)
    model.insert(len(model) - isinstance(model[-1], Normalize), layer)


POWER = 0.5  # of spreading
SPREAD_PAIRS = 500  # how many pairs tell by what anchors differ from their positives; more tell no better
CAUTIOUS_ALPHA = 0.5  # the most for a base that knows the language, or without a clear gain
CAUTIOUS_POWER = {"known language": 0.125, "no clear gain": 0.25}  # what the base knows of a language is to stay


def step_back(model, base_folder: Path, alpha: float) -> float:
    """Limit the share of the trained weights to CAUTIOUS_ALPHA; return the alpha that the model then has.

    A project's own headings and sentences teach little where the base knows the language well, and spoil questions
    that are asked in quite other words, which no held-out query shows.
    """
    cautious = min(alpha, CAUTIOUS_ALPHA)
    base_weights = load_model(base_folder, model.device).state_dict()
    mix_weights(model, base_weights, model.state_dict(), cautious / alpha if alpha else 1.0)
    return cautious


# ------------------------------------------------------------------------------------------- the report

PLAIN_NAMES = {
    "semantic": "by meaning (semantic)",
    "keyword": "by words (keyword)",
    "hybrid": "by both (hybrid)",
    "heading": "headings",
    "sentence": "sentences",
    "term": "IDs and terms",
    "question": "people's questions",
    "suggested": "suggested questions",
    "tr": "Turkish",
    "en": "English",
    "other": "other language",
}


def report_page(evaluation: dict, folder: Path) -> str:
    """Return the report.html of a model's folder: what evaluation.json tells programs, for a person who was not there.

    Where trained weights were rejected, their comparison with the base is shown, not that of the base with itself.
    """
    result = evaluation["rejected"] or evaluation["comparison"]
    history, alphas = evaluation["history"], evaluation["nDCG@10_by_alpha"]
    charts, modes, groups = {}, {}, {}
    if result["queries"]:
        semantic = {model: result[model]["nDCG@10"] for model in ("base", "fine_tuned")}
        modes = {"semantic": semantic | {"interval_95": result["interval_95"]}} | result["nDCG@10_by_mode"]
        modes = {PLAIN_NAMES[mode]: row for mode, row in modes.items()}
        groups = result["nDCG@10_by_kind"] | result["nDCG@10_by_language"]
        groups = {PLAIN_NAMES.get(group, group): row for group, row in groups.items()}
        moved = f"{result['wins']} of {result['queries']} queries gained, {result['losses']} lost"
        charts = {
            "modes": chart("modes", f"nDCG@10 {told(modes)}", functools.partial(draw_pairs, modes), 2.1),
            "groups": chart("groups", f"nDCG@10 {told(groups)}", functools.partial(draw_pairs, groups), 2.6),
            "differences": chart("differences", moved, functools.partial(draw_differences, result["differences"])),
        }
    label = f"Loss and held-out nDCG@10 at steps {', '.join(str(row['step']) for row in history)}"
    charts["history"] = chart("history", label, functools.partial(draw_history, history, alphas), 3.2, panels=2)
    tables = {"modes": modes, "groups": groups, "plain_names": PLAIN_NAMES}
    about = {"name": folder.name, "following": index_command(folder)}
    return render("report.html", evaluation=evaluation, result=result, charts=charts, **about, **tables)


def index_command(folder: Path, document_options: Sequence[str] = ()) -> str:
    """Return the command that indexes the documents with the model in a folder."""
    usual = config.FINE_TUNED_MODEL_DIR / config.MODEL_NAME
    command = printable(shlex.join(["python", "generate_embeddings.py", *document_options]))
    return command_for(command, "--model", folder, usual)


def told(rows: dict[str, dict]) -> str:
    return ", ".join(f"{name}: {row['base']:.3f} to {row['fine_tuned']:.3f}" for name, row in rows.items())


def draw_pairs(rows: dict[str, dict], axes) -> None:
    """Draw base and fine-tuned of each row on one line, with the interval of their difference where there is one."""
    places = range(len(rows))
    ends = [[row[model] for row in rows.values()] for model in ("base", "fine_tuned")]
    axes.hlines(places, *ends, color=CHART_COLOURS["line"], linewidth=3)
    for place, row in zip(places, rows.values(), strict=True):
        if interval := row.get("interval_95"):
            axes.hlines(place, *(row["base"] + limit for limit in interval), color=CHART_COLOURS["tuned"], linewidth=1)
    axes.plot(ends[0], places, "o", color=CHART_COLOURS["base"], fillstyle="none", label="base")
    axes.plot(ends[1], places, "D", color=CHART_COLOURS["tuned"], markersize=5, label="fine-tuned")
    axes.set_yticks(places, list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("nDCG@10")
    axes.grid(axis="x")
    axes.figure.legend(loc="outside upper right", ncols=2)


def draw_differences(differences: list[float], axes) -> None:
    """Draw how many queries gained and lost how much."""
    counts, edges = np.histogram(differences, np.linspace(-1.05, 1.05, 22))
    middles = (edges[:-1] + edges[1:]) / 2
    colours = [CHART_COLOURS["bad" if middle < -0.01 else "good" if middle > 0.01 else "base"] for middle in middles]
    axes.bar(middles, counts, width=0.085, color=colours)
    axes.set_xlabel("difference in nDCG@10")
    axes.set_ylabel("queries")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")


def draw_history(history: list[dict], alphas: dict[float, float], axes) -> None:
    """Draw the loss, and below it nDCG@10 of the watched queries with the base's as a dashed line."""
    for name, colour, panel in (("loss", "base", axes[0]), ("nDCG@10", "tuned", axes[1])):
        points = [(row["step"], row[name]) for row in history if name in row]
        panel.plot(*zip(*points, strict=True), "o-", color=CHART_COLOURS[colour], markersize=4) if points else None
        panel.set_ylabel(name)
        panel.grid(axis="y")
    if 0.0 in alphas:
        axes[1].axhline(alphas[0.0], color=CHART_COLOURS["base"], linestyle="--", linewidth=1)
    axes[1].set_xlabel("step")
    axes[1].xaxis.get_major_locator().set_params(integer=True)


# ------------------------------------------------------------------------------------------- saving, ONNX


def save_model(model, folder: Path, evaluation: dict, texts: list[str]) -> None:
    """Swap the model into folder whole: Sentence Transformers format, ONNX, evaluation.json, report.html, card.

    Raises:
        UserError: ONNX and PyTorch disagree on an embedding of texts by more than 1e-3 cosine; nothing is replaced.
    """
    with replacing(folder) as temporary:
        save_with_onnx(model, temporary, texts)
        # A class such as BertTokenizer would build its own rules when it is loaded; this one reads tokenizer.json's.
        settings = read_json(temporary / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
        (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        (temporary / "evaluation.json").write_text(
            json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (temporary / "report.html").write_text(report_page(evaluation, folder), encoding="utf-8")
        card = temporary / "README.md"
        text = re.sub(r"WordWeights\(\{.*\}\)", "WordWeights", card.read_text(encoding="utf-8"))  # every token's weight
        text = text.replace("sentence_transformers_model_id", folder.name)
        text += render("model_card.md", evaluation=evaluation, folder=folder.name)
        card.write_text(text, encoding="utf-8")


def save_with_onnx(model, folder: Path, texts: list[str]) -> None:
    """Write a model in the Sentence Transformers format and as ONNX, which must agree on texts.

    Raises:
        UserError: they do not, or there is no room.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(str(folder), safe_serialization=True)
        for weights in sorted(folder.rglob("*.safetensors")):  # which the library lets nobody else read
            shutil.copymode(folder / "config.json", weights)
        export_onnx(model, folder, texts)
    except (RuntimeError, SafetensorError) as error:  # where others raise an OSError
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder.parent} can not be written to ({reason}); make room or name another place") from None


def export_onnx(model, folder: Path, texts: list[str]) -> None:
    """Write folder/onnx/model.onnx, the whole pipeline: token ids in, normalised sentence embeddings out.

    The weights lie beside it in a file that ONNX Runtime maps into memory: a multilingual vocabulary takes a second to
    be read, of which a query needs a few lines.
    """
    import onnx
    import torch

    class Pipeline(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            features = self.model({"input_ids": input_ids, "attention_mask": attention_mask})
            return torch.nn.functional.normalize(features["sentence_embedding"], dim=1)

    example = model.preprocess(["an example", "a longer example, so that the shapes differ"])
    path, weights = folder / "onnx" / "model.onnx", folder / "onnx" / "model.onnx_data"
    path.parent.mkdir()
    device = model.device
    # Attention written out is a tenth faster in ONNX Runtime than PyTorch's one operation for it taken apart.
    model.transformers_model.set_attn_implementation("eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of branches that do not depend on the input's shape
        torch.onnx.export(
            Pipeline().cpu().eval(),
            (example["input_ids"].cpu(), example["attention_mask"].cpu()),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
            dynamic_axes={name: {0: "batch", 1: "tokens"} for name in ("input_ids", "attention_mask")},
            opset_version=17,
            dynamo=False,
        )
        onnx.save_model(onnx.load(path), path, save_as_external_data=True, location=weights.name)
        shutil.copymode(path, weights)  # which the library lets nobody else read
        wanted = model.encode(texts, normalize_embeddings=True)
    model.to(device)
    worst = float((wanted * Encoder(folder).encode(texts)).sum(axis=1).min())
    if not worst >= 1 - 1e-3:  # nor if it is not a number
        raise UserError(f"ONNX and PyTorch disagree (cosine {worst:.4f}), so nothing is saved; try another base model")


class Encoder:
    """A model folder's ONNX pipeline: what the index and the search embed with; needs no torch.

    cut: returns the token IDs of each of some texts; None: as the folder's tokenizer. threads: what a single batch runs
    on, such as a query; many run at once on one each, which is faster. The vectors do not depend on it.

    Raises:
        UserError: the folder lacks a file or holds a damaged one.
    """

    def __init__(self, folder: Path, cut: Callable[[list[str]], list[list[int]]] | None = None, threads: int = 1):
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        # Threads that wait for work in a loop would take the cores from whatever else runs.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            tokenizer = None if cut else load_tokenizer(folder)[0]
            self.cut = cut or (lambda texts: [one.ids for one in tokenizer.encode_batch(texts)])
            self.session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"), settings)
            body = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            inputs, outputs = (
                {one.name for one in end} for end in (self.session.get_inputs(), self.session.get_outputs())
            )
            if inputs != {"input_ids", "attention_mask"} or outputs != {"sentence_embedding"}:
                raise ValueError("its onnx/model.onnx is another pipeline")
        except Exception as error:  # onnxruntime and tokenizers raise bare Exceptions
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder} can not be loaded ({reason}); run run_finetuning.py again") from None
        self.padding_id = body.get("pad_token_id") or 0

    def encode(self, texts: list[str], batch_tokens: int = 256) -> np.ndarray:
        """Return the normalised embeddings of texts: float32, shape (len(texts), dimensions).

        Small batches stay in a core's cache: one of 256 tokens is a tenth faster than one of 1,024.
        """
        encoded = self.cut(texts)
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)

        def run(batch: np.ndarray) -> np.ndarray:
            """Return the embeddings of the texts in these places."""
            ids = np.full((len(batch), lengths[batch[-1]]), self.padding_id, dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, place in enumerate(batch):
                ids[row, : lengths[place]] = encoded[place]
                mask[row, : lengths[place]] = 1
            return self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0]

        batches = list(batches_of_similar_length(lengths, batch_tokens))
        workers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # torchrun sets it
        with ThreadPoolExecutor(workers) as pool:
            each = pool.map if len(batches) > 1 else map  # a query need not wait for a thread to start
            outputs = np.concatenate(list(each(run, batches)))
        vectors = np.empty_like(outputs)
        vectors[np.concatenate(batches)] = outputs
        return vectors


def batches_of_similar_length(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Yield the places of texts, shortest first, in batches of at most batch_tokens tokens with their padding."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > batch_tokens:
            yield order[start:end]
            start = end


def model_fingerprint(folder: Path) -> str:
    """Return the SHA-256 over weights, tokenizer and configuration: what decides a text's embedding."""
    digest = hashlib.sha256()
    names = ("*.safetensors", "modules.json", "config.json", "tokenizer.json", *WINDOW_FILES, "onnx/model.onnx*")
    paths = {path for name in names for path in folder.glob(name)}
    paths |= {path for module in module_folders(folder) for path in module.glob("*") if path.is_file()}
    for path in sorted(paths):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------- main


def read_json(path: Path) -> dict:
    """Return the object in a JSON file, or {} where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def plan_steps(rows: int, seconds: float, budget_seconds: float, options: argparse.Namespace) -> int:
    """Return the number of training steps: once through the rows, or --max-steps, cut to the time that is left."""
    wanted = options.max_steps or -(-rows // (options.batch_size * processes()))
    steps = max(1, min(wanted, int(budget_seconds / seconds)))
    note = f" of {wanted} (config.MAX_TRAINING_MINUTES)" if steps < wanted else ""
    pairs = options.batch_size * processes()
    print(f"{steps} steps{note} of {pairs} pairs, about {duration(steps * seconds)}", file=sys.stderr)
    return steps


def search_with_base(model, judged: HeldOut, watched: HeldOut, model_dir: Path) -> float:
    """Search with the base in the first process; return the seconds that evaluation will take.

    Counted are the corpus, SPREAD_PAIRS and twice the watched passages, for the spreading, and all this again where the
    model may yet step back; the watched passages nine times cut as in training (four checkpoints, five mixtures); and
    the corpus again for an installed model that was compared on other queries (worse_than_installed).
    """
    if not is_first_process():
        return 0.0
    print(f"searching {len(judged.passages):,} passages for {len(judged.queries)} held-out queries", file=sys.stderr)
    started = time.perf_counter()
    judged.search_with_base(model)
    encoded = model.tokenizer.backend_tokenizer.encode_batch(watched.passages)
    tokens = np.array([sum(one.attention_mask) for one in encoded])
    cut = np.minimum(tokens, config.TRAINING_TOKENS).sum() / max(1, tokens.sum())
    took = 1.2 * (time.perf_counter() - started)  # a fifth more for saving, and in case the machine gets busier
    times = 1 if knows_language(judged) else 2
    texts = (2 * times + 9 * cut) * len(watched.passages) + times * SPREAD_PAIRS
    installed = read_json(model_dir / "evaluation.json")
    again = (model_dir / "modules.json").exists() and known_ranks(judged, installed) is None
    seconds = took * (times + again + texts / max(1, len(judged.passages)))
    print(f"evaluation will take about {duration(seconds)}, besides the training:", file=sys.stderr)
    return seconds


SETTINGS = ("loss", "epochs", "batch_size", "learning_rate", "max_steps", "seed")  # options that decide a training


def run_identity(options: argparse.Namespace, base_folder: Path) -> str:
    """Return a hash of all that a training depends on: an interrupted one goes on only where it is the same."""
    names = ("training_data.tsv", "evaluation_data.tsv", "corpus.tsv")
    parts = [sha256_of(options.data_dir / name) for name in names] + [getattr(options, name) for name in SETTINGS]
    parts += [config.TRAINING_TOKENS, config.QUESTION_WEIGHT, config.MAX_UNLABELLED_STEPS, config.WATCHED_PASSAGES]
    parts += [config.MAX_TRAINING_MINUTES, processes(), model_fingerprint(base_folder)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def check_options(options: argparse.Namespace) -> None:
    """Refuse numbers that make no sense, and to put a model in the place of something else."""
    whole = {"epochs": (1, 100), "batch_size": (2, 65_536), "max_steps": (0, 10**9), "seed": (0, 2**32 - 1)}
    for name, (low, high) in whole.items():
        if not (isinstance(value := getattr(options, name), int) and low <= value <= high):
            raise UserError(f"--{name.replace('_', '-')} {value!r} is no whole number from {low} to {high}")
    for name in ("MAX_UNLABELLED_STEPS", "QUESTION_WEIGHT"):
        config.check_number(name, 0)
    if options.loss not in ("mnrl", "triplet"):  # argparse looks at options only, not at config.LOSS
        raise UserError(f"config.LOSS is {options.loss!r}; set it to mnrl or triplet")
    if not 0 < options.learning_rate <= 1:
        raise UserError(f"--learning-rate {options.learning_rate} is not above 0 and at most 1; try {2e-5}")
    target, base = options.model_dir.resolve(), options.base_model or config.BASE_MODEL
    if not options.model_dir.name:
        raise UserError(f"--model-dir {options.model_dir} has no name of its own; name a folder in it")
    if Path(base).expanduser().resolve() in (target, previous(target)):
        raise UserError(
            f"the base model {base} is the --model-dir too, or its predecessor; name another folder for one of them"
            " (--base-model, config.BASE_MODEL)"
        )
    for folder in (target, previous(target)):
        if folder.exists() and not (folder / "modules.json").exists() and (folder.is_file() or any(folder.iterdir())):
            raise UserError(f"{folder} holds something else than a model; name another --model-dir")


def fine_tune(
    model, pairs: list[Pair], watched: HeldOut, planned: int, deadline: float, identity: str, options
) -> dict:
    """Train the model in place and mix its weights with the base's; return what evaluation.json tells of that.

    planned: the steps of the interrupted run that is gone on with, or 0. deadline: see train.
    """
    from importlib import metadata

    mended = mend_tokenizer(model, [text for pair in pairs for text in pair[:2]])
    pairs = usable_pairs(pairs, options.loss, model)
    columns = training_columns(pairs)
    max_unlabelled = config.MAX_UNLABELLED_STEPS * options.batch_size
    rows = plan_rows(pairs, options.epochs, config.QUESTION_WEIGHT, max_unlabelled, options.seed)
    if not rows:
        raise UserError("nothing to train on: config.MAX_UNLABELLED_STEPS or QUESTION_WEIGHT is 0; set it higher")
    base_weights = {name: value.clone() for name, value in model.state_dict().items()}
    window, model.max_seq_length = model.max_seq_length, min(model.max_seq_length, config.TRAINING_TOKENS)
    if is_first_process() and not planned:
        step_seconds = seconds_per_step(model, make_loss(options.loss, model), columns, rows, options.batch_size)
        print(f"{len(pairs):,} pairs, {len(rows):,} times trained on", file=sys.stderr)
        planned = plan_steps(len(rows), step_seconds, deadline - time.perf_counter(), options)
        write_workspace(workspace(options.model_dir), identity, planned)
    batch_size, steps = options.batch_size * processes(), from_first_process(planned)
    together = plan_batches(rows, apart_keys(pairs), batch_size, steps, options.seed)
    if options.loss == "mnrl" and max(map(len, together)) == 1 and is_first_process():
        warn("no two pairs may share a batch, so that nothing is learnt; give documents with more headings")
    trained = train(model, columns, dealt_out(together), watched, deadline, options)
    alpha, alphas = choose_weights(model, base_weights, watched) if is_first_process() else (1.0, {})
    model.max_seq_length = window
    return {
        "format": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {name: getattr(options, name) for name in SETTINGS} | {"training_tokens": config.TRAINING_TOKENS},
        "letters_read_plainly": mended,
        "pairs": len(pairs),
        "batch_pairs": max(map(len, together)),
        **trained,
        "trained_on": sorted({pair.source_file for pair in pairs}),
        "alpha": alpha,
        "nDCG@10_by_alpha": alphas,
        "versions": {name: metadata.version(name) for name in ("sentence-transformers", "transformers", "torch")},
        "machine": machine(model.device),
    }


def machine(device) -> str:
    """Return what a training ran on; device: a torch.device."""
    system = f"{platform.platform()}, {os.cpu_count()} CPUs, {processes()} x {device}"
    return system + ", training in bfloat16" * has_bfloat16(device.type)


def refuse_lesser_base(options: argparse.Namespace, note: str | None) -> None:
    """A model tuned from the stand-in must not take the place of one tuned from the configured base."""
    installed = read_json(options.model_dir / "evaluation.json").get("base", {})
    if note and installed and not installed.get("note") and installed.get("used") != "packaged" and not options.force:
        raise UserError(
            f"{options.model_dir} was tuned from {installed['used']}, and the packaged model would stand in for"
            f" {config.BASE_MODEL} now; --force replaces it, --model-dir DIR saves elsewhere"
        )


def was_trained_on(queries: list[Query], evaluation: dict) -> np.ndarray:
    """Tell of each query whether the model of this evaluation.json was trained on the document it is about."""
    trained_on = set(evaluation.get("trained_on", []))
    return np.array([query.source_file in trained_on for query in queries], dtype=bool)


def known_ranks(queries: HeldOut, evaluation: dict) -> list[int] | None:
    """Return the ranks that an evaluation.json has of these very queries and passages."""
    held_out = evaluation.get("held_out", {})
    return held_out["ranks"] if held_out.get("fingerprint") == queries.fingerprint() else None


def worse_than_installed(ranks: np.ndarray, judged: HeldOut, model_dir: Path) -> str | None:
    """Return by how much the model in model_dir beats these ranks on the same queries, or None if it does not.

    Only queries about documents count that it was not trained on.
    """
    if not judged.queries or not (model_dir / "modules.json").exists():
        return None
    installed = read_json(model_dir / "evaluation.json")
    try:
        check_model(model_dir)
        others = known_ranks(judged, installed)
        if others is None:
            print("searching them with the installed model", file=sys.stderr)
            others = judged.ranks(judged.similarities(load_model(model_dir, config.DEVICE)))
    except UserError:  # a damaged one may be replaced
        return None
    fair = ~was_trained_on(judged.queries, installed)[DECIDING]
    if not fair.any():
        return None
    new, old = (float(gains(own)["nDCG@10"][DECIDING][fair].mean()) for own in (ranks, np.array(others)))
    return f"nDCG@10 {old:.3f} for the installed model, {new:.3f} for this one" if new < old else None


def judge(judged: HeldOut, tuned: np.ndarray, kept_base: bool, options: argparse.Namespace) -> dict:
    """Return what evaluation.json keeps of the tuned model's similarities: comparison with the base, weight, ranks."""
    ranks = [judged.ranks(scores) for scores in (judged.base, tuned)]
    halves = [own[DECIDING] for own in ranks]
    comparison = compare(judged.queries[DECIDING], *halves, kept_base, options.seed)
    search, by_mode = search_figures(judged, tuned, options.seed)
    for row in comparison.get("most_gained", []) + comparison.get("most_lost", []):
        place = judged.queries.index(Query(*(row[name] for name in Query._fields)))
        row |= {"base_first": judged.first(judged.base[place]), "fine_tuned_first": judged.first(tuned[place])}
    return {
        "comparison": comparison | {"nDCG@10_by_mode": by_mode},
        "search": search,
        "held_out": {"fingerprint": judged.fingerprint(), "ranks": ranks[1].tolist()},
    }


def settle(
    model,
    base_folder: Path,
    judged: HeldOut,
    watched: HeldOut,
    pairs: list[Pair],
    evaluation: dict,
    options: argparse.Namespace,
) -> np.ndarray:
    """Spread the model's vectors, pulled back towards the base where that is safer; return its similarities."""
    pairs = random.Random(options.seed).sample(pairs, min(SPREAD_PAIRS, len(pairs)))
    trained = list(model)
    reason = "known language" if knows_language(judged) else None
    if not reason:
        tuned, spread = spread_out(model, judged, watched, pairs, POWER)
        halves = (judged.ranks(scores)[CHOOSING] for scores in (judged.base, tuned))
        verdict = compare(judged.queries[CHOOSING], *halves, False, options.seed)["verdict"]
        reason = None if verdict == "improved" else "no clear gain"
    if reason:
        print(f"staying near the base: {reason}", file=sys.stderr)
        keep_modules(model, trained)
        evaluation["alpha"] = step_back(model, base_folder, evaluation["alpha"])
        tuned, spread = spread_out(model, judged, watched, pairs, CAUTIOUS_POWER[reason])
    evaluation |= {"stepped_back": reason, "spread": spread}
    return tuned


def decide(judged: HeldOut, tuned: np.ndarray, kept_base: bool, options: argparse.Namespace) -> dict:
    """Return what judge returns; where the tuned model is worse, that of the base, with the other under "rejected"."""
    result = judge(judged, tuned, kept_base, options) | {"rejected": None}
    if result["comparison"]["verdict"] == "worse":
        worse = result["comparison"]
        if not options.quiet:
            print("the fine-tuned model searches worse, so the base is kept:")
            print_details(worse)
        result = judge(judged, judged.base, True, options) | {"rejected": worse}
        result |= {"alpha": 0.0, "spread": False, "letters_read_plainly": []}
    return result


def load_base_and_saved(options: argparse.Namespace) -> tuple:
    """Return the base that the saved model was tuned from, or --base-model, and the saved one; whether it is kept."""
    if not options.model_dir.is_dir():
        raise UserError(NO_MODEL.format(options.model_dir))
    saved = load_model(options.model_dir, config.DEVICE)
    evaluation = read_json(options.model_dir / "evaluation.json")
    tuned_from = evaluation.get("base", {}).get("used")
    name = options.base_model or tuned_from
    if not name:
        file = options.model_dir / "evaluation.json"
        raise UserError(f"{file} does not tell what the model was tuned from; name it with --base-model")
    base = load_model(find_model(name, fallback=False)[0], config.DEVICE)
    kept_base = evaluation.get("comparison", {}).get("verdict") == "kept-base" and name == tuned_from
    return base, saved, kept_base


def read_held_out(options: argparse.Namespace) -> tuple[HeldOut, HeldOut]:
    """Return what the models are compared on, all queries, and what is watched while training, those that choose."""
    held_out = HeldOut(read_queries(options.data_dir), [row.passage for row in read_corpus(options.data_dir)])
    judged = held_out.part(held_out.queries, config.EVALUATION_PASSAGES, options.seed)
    return judged, held_out.part(held_out.queries[CHOOSING], config.WATCHED_PASSAGES, options.seed)


def evaluate_saved(options: argparse.Namespace) -> dict:
    """Compare the saved model with its base on the held-out queries, on the half that decides."""
    judged, _ = read_held_out(options)
    trained = was_trained_on(judged.queries, read_json(options.model_dir / "evaluation.json"))
    if trained.any():
        warn(
            f"{trained.sum()} of the {len(trained)} held-out queries are about documents that the saved model was"
            " trained on: of these, a verdict says little"
        )
    base, saved, kept_base = load_base_and_saved(options)
    judged.search_with_base(base)
    return judge(judged, judged.similarities(saved), kept_base, options)["comparison"]


def read_asked(options: argparse.Namespace) -> tuple[list[str], dict[str, list[Passage]], list[Passage]]:
    """Return a file's distinct queries, the passages that answer some of them by folded query, and all passages."""
    asked = read_test_queries(options.questions)
    paths = find_documents(options.documents_root, options.documents or config.TARGET_DOCUMENTS)
    passages = read_passages(options.documents_root, paths, config.MAX_PASSAGE_CHARS, config.MAX_DOCUMENT_MB)
    answers: dict[str, list[Passage]] = defaultdict(list)
    given = [(place, one) for place, one in asked if one.passage.strip()]
    for text, passage in find_answers(given, passages, options.documents_root):
        answers[fold(text)].append(passage)
    texts: dict[str, str] = {}
    for _, one in asked:
        texts.setdefault(fold(text := " ".join(one.question.split())), text)
    distinct = {passage.model_text: passage for passage in reversed(passages)}
    return list(texts.values()), answers, list(distinct.values())


def evaluate_questions(options: argparse.Namespace) -> dict:
    """Print what the saved model and its base find first for each query of a file; compare them on those with answers.

    All passages of the documents are searched.
    """
    texts, answers, passages = read_asked(options)
    known = [place for place, text in enumerate(texts) if fold(text) in answers]
    firsts = [(texts[place], answers[fold(texts[place])][0]) for place in known]
    answered = [Query(text, passage.model_text, "question", passage.source_file) for text, passage in firsts]
    right = [[one.model_text for one in answers[fold(texts[place])]] for place in known]
    keyed = [(passage.heading, passage.text) for passage in passages]
    searched = HeldOut(answered, [passage.model_text for passage in passages], right, keyed)
    warn_of_trained(answered, options.data_dir)
    base, saved, kept_base = load_base_and_saved(options)
    vectors = [searched.vectors(model, texts) for model in (base, saved)]
    scores = [queries @ passages.T for queries, passages in vectors]
    for place, text in enumerate(texts) if not options.quiet else ():
        marked = {passage.model_text for passage in answers.get(fold(text), [])}
        print_side_by_side(text, [own[place] for own in scores], passages, marked)
    scores = [own[known] for own in scores]
    result = compare(answered, *map(searched.ranks, scores), kept_base, options.seed)
    if answered:
        search = read_json(options.model_dir / "evaluation.json").get("search", {})
        weight = search.get("semantic_weight", DEFAULT_SEMANTIC_WEIGHT)
        result["nDCG@10_by_mode"] = figures_by_mode(searched, scores, weight, slice(None), options.seed)
    return result


def warn_of_trained(queries: list[Query], data_dir: Path) -> None:
    """Say how many of a person's queries were trained on: of these, a verdict says little."""
    with contextlib.suppress(UserError):  # no training data at hand
        trained = {fold(pair.anchor) for pair in read_pairs(data_dir) if pair.strategy in LABELLED}
        if count := sum(fold(query.query) in trained for query in queries):
            warn(f"{count} of the {len(queries)} queries with an answer are trained on ({data_dir}/training_data.tsv)")


def print_side_by_side(query: str, scores: list[np.ndarray], passages: list[Passage], answers: set[str]) -> None:
    """Print the passages that two models find first for a query, each with its rank in the other's list.

    answers: what a model reads of the passages that answer, which are marked.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    orders = [np.argsort(-own, kind="stable") for own in scores]
    ranks = [np.argsort(order, kind="stable") + 1 for order in orders]
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
    for name in ("base", "fine-tuned"):
        table.add_column(name, ratio=1, overflow="fold")
    for places in zip(*(order[:SHOWN] for order in orders), strict=True):
        cells = []
        for place, own, other in zip(places, ranks, reversed(ranks), strict=True):
            passage = passages[place]
            mark = "✓ " if passage.model_text in answers else ""
            where = printable(f"{passage.source_file}:{passage.start_line}")
            text = printable(shortened(plain_text(passage.text), 150))
            cells.append(Text(f"{own[place]}. (other: {other[place]}.) {mark}{where}\n{text}"))
        table.add_row(*cells)
    console.print(Text(printable(query), style="bold"), table, "")


def tune(options: argparse.Namespace, started: float) -> None:
    """Train, evaluate, save and tell; started: when the script was, in seconds of time.perf_counter."""
    judged, watched = read_held_out(options)
    pairs = read_pairs(options.data_dir)
    if {pair.source_file for pair in pairs} & {query.source_file for query in judged.queries}:  # of a killed run, say
        raise UserError(
            f"the training pairs and the held-out queries in {options.data_dir} do not belong together;"
            " run prepare_finetuning_data.py again"
        )
    wanted = options.base_model or config.BASE_MODEL
    base_folder, note = find_model(wanted, fallback=options.base_model is None)
    if note:
        warn(note)
    refuse_lesser_base(options, note)
    join_processes()
    identity = run_identity(options, base_folder)
    planned = claim_workspace(workspace(options.model_dir), identity, options.fresh) if is_first_process() else 0
    model = load_model(base_folder, config.DEVICE)
    evaluation_seconds = search_with_base(model, judged, watched, options.model_dir)
    deadline = started + config.MAX_TRAINING_MINUTES * 60 - evaluation_seconds
    evaluation = fine_tune(model, pairs, watched, planned, deadline, identity, options)
    if not is_first_process():
        return
    tuned = settle(model, base_folder, judged, watched, pairs, evaluation, options)
    kept_base = evaluation["alpha"] == 0 and not evaluation["letters_read_plainly"] and not evaluation["spread"]
    result = decide(judged, tuned, kept_base, options)
    if result["rejected"]:
        model = load_model(base_folder, config.DEVICE)
    if kept_base or result["rejected"]:
        evaluation["trained_on"] = []
    data = read_json(options.data_dir / "data_report.json")
    document_options = data.pop("document_options", [])  # where they lie is nobody else's business
    data["other_documents"] = bool(document_options)
    evaluation |= result | {
        "base": {"wanted": wanted, "used": "packaged" if note else wanted, "note": note},
        "data": data,
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }
    finish(model, evaluation, judged, document_options, options)


def finish(
    model, evaluation: dict, judged: HeldOut, document_options: Sequence[str], options: argparse.Namespace
) -> None:
    """Save the model unless the installed one searches better; print the comparison.

    The checkpoints of one that is not saved stay, so that --force need not train again.
    """
    better = worse_than_installed(np.array(evaluation["held_out"]["ranks"]), judged, options.model_dir)
    if better and not options.force:
        summary = (
            f"not saved, the installed model searches better: {better}; --force replaces it, going on from the"
            f" checkpoints in {workspace(options.model_dir)}"
        )
    else:
        save_model(model, options.model_dir, evaluation, judged.passages[:64])
        following = index_command(options.model_dir, document_options)
        remove(workspace(options.model_dir))
        summary = (
            f"wrote {options.model_dir} in {duration(60 * evaluation['minutes'])}; report.html there shows what was"
            f" gained; next: {following}"
        )
    print_comparison(evaluation["comparison"], options.quiet, summary)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's options, with the defaults of config.py."""
    parser = argparse.ArgumentParser(
        description="Fine-tune the base model on the pairs, compare it with the base, and save it.",
        epilog="examples:\n  python run_finetuning.py\n"
        "  python run_finetuning.py --base-model packaged --max-steps 200",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data-dir", type=Path, default=config.FINE_TUNING_DATA_DIR, help="(config.FINE_TUNING_DATA_DIR)"
    )
    parser.add_argument(
        "--model-dir",
        type=Path,
        default=config.FINE_TUNED_MODEL_DIR / config.MODEL_NAME,
        help="folder the model is saved to (config.FINE_TUNED_MODEL_DIR / config.MODEL_NAME)",
    )
    parser.add_argument("--base-model", metavar="NAME_OR_PATH", help="or 'packaged' (config.BASE_MODEL)")
    parser.add_argument("--loss", choices=["mnrl", "triplet"], default=config.LOSS, help="(config.LOSS)")
    parser.add_argument("--epochs", type=int, default=config.EPOCHS, help="(config.EPOCHS)")
    parser.add_argument("--batch-size", type=int, default=config.BATCH_SIZE, help="(config.BATCH_SIZE)")
    parser.add_argument("--learning-rate", type=float, default=config.LEARNING_RATE, help="(config.LEARNING_RATE)")
    parser.add_argument("--max-steps", type=int, default=0, metavar="N", help="stop after N steps of BATCH_SIZE pairs")
    parser.add_argument("--seed", type=int, default=config.SEED, help="(config.SEED)")
    parser.add_argument(
        "--evaluate-only", action="store_true", help="compare the saved model with the base; save nothing"
    )
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="show what the saved model and the base find first for your own test queries and task descriptions, one a"
        " line, and compare them where a tab and the passage that answers follow; save nothing",
    )
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on with an interrupted run")
    parser.add_argument(
        "--force", action="store_true", help="replace a model that searches better or was tuned from a better base"
    )
    add_document_options(parser)
    config.add_verbosity(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the script with these arguments, by default the command line's."""
    options = build_parser().parse_args(argv)
    config.set_verbosity(options)
    started = time.perf_counter()
    check_options(options)
    restore_previous(options.model_dir)
    if options.questions or options.evaluate_only:
        result = evaluate_questions(options) if options.questions else evaluate_saved(options)
        print_comparison(result, options.quiet)
        return
    lock = options.model_dir.with_name(f".{options.model_dir.name}.lock")
    with locked(lock, f"training {options.model_dir}") if is_first_process() else contextlib.nullcontext():
        tune(options, started)


if __name__ == "__main__":
    config.run(main)
