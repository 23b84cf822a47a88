#!/usr/bin/env python3
"""Measure what pairs and what training make the best search.  Prints a table; compare within one run only.

    python tests/bench_training.py pairs                  # each strategy alone; on the sample project's 101 questions
    python tests/bench_training.py recipe                 # one thing changed at a time: loss, rate, batch and such
    python tests/bench_training.py pairs --documents ~/project --questions questions.jsonl --only sentence term

A question is a line {"query": "…", "gold": [{"file": "plan.md", "contains": "words of the answer"}]}: a passage of that
file which holds these words, or lies within them, is right. Each model is trained --steps steps by run_finetuning.py's
own functions on what prepare_finetuning_data.py makes of the documents without the held-out ones. The figures are
nDCG@10 by meaning of the first right passage, after the training and with the vectors' directions spread (spreading).
"""

import argparse
import contextlib
import io
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import config
import prepare_finetuning_data as prepare
import run_finetuning as finetuning
from run_finetuning import POWER, HeldOut, gains, load_model, spreading


class Variant(NamedTuple):
    """What differs from the default recipe."""

    strategies: tuple[str, ...] = tuple(config.PAIR_STRATEGIES)
    batch_size: int = config.BATCH_SIZE
    learning_rate: float = config.LEARNING_RATE
    steps: float = 1.0  # times --steps
    tokens: int = config.TRAINING_TOKENS
    loss: str = "mnrl"
    make_loss: Callable | None = None
    frozen: str = ""  # parameters whose name holds this are not trained
    apart: bool = True  # no two pairs of one section, template or near-copy in a batch
    alike: bool = False  # batches of pairs of similar length, which need less padding


def mnrl(**settings):
    def make(loss, model, processes=1):
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        return MultipleNegativesRankingLoss(model, **settings)

    return make


def cached(loss, model, processes=1):
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    return CachedMultipleNegativesRankingLoss(model, mini_batch_size=32)


def matryoshka(loss, model, processes=1):
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    size = model.get_embedding_dimension()
    return MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), matryoshka_dims=[size, size // 2, size // 4])


def guided(loss, model, processes=1):
    import copy

    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    return GISTEmbedLoss(model, guide=copy.deepcopy(model), temperature=0.05)


DEFAULT = "default"
PAIRS = {name: Variant((name,)) for name in prepare.STRATEGIES} | {
    " + ".join(config.PAIR_STRATEGIES): Variant(),
    "heading + sentence": Variant(("heading", "sentence")),
    "section + sentence": Variant(("section", "sentence")),
    "heading + section + sentence": Variant(("heading", "section", "sentence")),
    "default, batches not kept apart": Variant(apart=False),
    "all": Variant(tuple(prepare.STRATEGIES)),
}
RECIPE = {
    DEFAULT: Variant(),
    "learning rate 2e-5": Variant(learning_rate=2e-5),
    "learning rate 1e-4": Variant(learning_rate=1e-4),
    "batch 16, twice the steps": Variant(batch_size=16, steps=2.0),
    "batch 64, half the steps": Variant(batch_size=64, steps=0.5),
    "gradient caching: batch 128, a quarter of the steps": Variant(batch_size=128, steps=0.25, make_loss=cached),
    "temperature 0.1": Variant(make_loss=mnrl(scale=10.0)),
    "temperature 0.025": Variant(make_loss=mnrl(scale=40.0)),
    "symmetric loss": Variant(
        make_loss=mnrl(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
    ),
    "Matryoshka": Variant(make_loss=matryoshka),
    "GIST, guided by the base": Variant(make_loss=guided),
    "triplets, mined by the 95 % rule": Variant(loss="triplet"),
    "word embeddings frozen": Variant(frozen="word_embeddings"),
    "batches of similar length": Variant(alike=True),
    "64 tokens": Variant(tokens=64),
    "128 tokens": Variant(tokens=128),
}


class Questions:
    """People's questions with the passages they are searched in, and the right ones of each."""

    def __init__(self, path: Path, passages: list[prepare.Passage], limit: int):
        rows = [json.loads(line) for line in path.open(encoding="utf-8")]

        def words_of(text: str) -> str:
            return " ".join(prepare.WORD.findall(prepare.fold(text)))

        texts = list({passage.model_text: passage for passage in passages})
        by_file: dict[str, dict[str, str]] = {}
        for passage in passages:
            by_file.setdefault(passage.source_file, {})[passage.model_text] = words_of(passage.text)
        self.queries, right = [], []
        for row in rows:
            golds = [(gold["file"], words_of(gold["contains"])) for gold in row["gold"]]
            found = {
                text
                for file, words in golds
                for text, own in by_file.get(file, {}).items()
                if words in own or (len(own) > 20 and own in words)
            }
            if found:
                self.queries.append(row["query"])
                right.append(found)
        answers = set().union(*right)
        others = [text for text in texts if text not in answers]
        random.Random(1).shuffle(others)
        kept = answers | set(others[: max(0, limit - len(answers))])
        self.passages = [text for text in texts if text in kept]
        self.right = [[place for place, text in enumerate(self.passages) if text in found] for found in right]

    def score(self, model) -> tuple[float, float]:
        """Return nDCG@10 of the model as it is and with its vectors spread."""
        queries, passages = (
            model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
            for texts in (self.queries, self.passages)
        )
        matrix = spreading(passages, POWER)
        spread = [own @ matrix for own in (queries, passages)]
        return self.ndcg(queries, passages), self.ndcg(*(own / np.linalg.norm(own, axis=1)[:, None] for own in spread))

    def ndcg(self, queries: np.ndarray, passages: np.ndarray) -> float:
        scores = queries @ passages.T
        best = np.array([own[right].max() for own, right in zip(scores, self.right, strict=True)])
        ranks = (scores > best[:, None]).sum(axis=1) + 1
        return float(gains(np.where(ranks <= 10, ranks, 0))["nDCG@10"].mean())


def make_pairs(passages: list[prepare.Passage], variant: Variant) -> list[prepare.Pair]:
    """Return what prepare_finetuning_data.py trains on with the variant's strategies, by its default settings."""
    family = prepare.group_copies(passages)
    templates = prepare.find_templates(passages, family, config.TEMPLATE_DOCUMENTS)
    share, max_queries = config.EVALUATION_SHARE, config.MAX_EVALUATION_QUERIES
    held_out = prepare.split_documents(passages, family, share, max_queries, config.SEED)
    limits = (config.MAX_PAIRS_PER_SECTION, config.SEED)
    return prepare.make_pairs(passages, held_out, templates, list(variant.strategies), *limits)[0]


def trained(variant: Variant, pairs: list[prepare.Pair], steps: int, base: Path, folder: Path):
    """Return the model that the variant makes of the base."""
    options = argparse.Namespace(
        loss=variant.loss,
        batch_size=variant.batch_size,
        learning_rate=variant.learning_rate,
        seed=config.SEED,
        model_dir=folder / "model",
    )
    model = load_model(base, config.DEVICE)
    finetuning.mend_tokenizer(model, [text for pair in pairs for text in pair[:2]])
    pairs = finetuning.usable_pairs(pairs, variant.loss, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not variant.frozen or variant.frozen not in name)
    window, model.max_seq_length = model.max_seq_length, variant.tokens
    rows = finetuning.plan_rows(pairs, config.EPOCHS, 1, steps * variant.batch_size, config.SEED)
    keys = finetuning.apart_keys(pairs) if variant.apart else [frozenset()] * len(pairs)
    batches = finetuning.plan_batches(rows, keys, variant.batch_size, steps, config.SEED)
    if variant.alike:
        batches = of_similar_length(batches, pairs)
    with replaced(variant.make_loss), contextlib.redirect_stderr(io.StringIO()):
        finetuning.train(model, finetuning.training_columns(pairs), batches, HeldOut([], []), math.inf, options)
    model.max_seq_length = window
    return model


def of_similar_length(batches: list[list[int]], pairs: list[prepare.Pair], at_once: int = 8) -> list[list[int]]:
    """Return the batches with the rows of every eight of them exchanged by length."""
    rng, made = random.Random(config.SEED), []
    for start in range(0, len(batches), at_once):
        group = batches[start : start + at_once]
        rows = [row for batch in group for row in batch]
        rows.sort(key=lambda row: len(pairs[row].anchor) + len(pairs[row].positive))
        size = len(group[0])
        made += rng.sample(cut := [rows[at : at + size] for at in range(0, len(rows), size)], len(cut))
    return made


@contextlib.contextmanager
def replaced(make_loss: Callable | None) -> Iterator[None]:
    usual = finetuning.make_loss
    finetuning.make_loss = make_loss or usual
    try:
        yield
    finally:
        finetuning.make_loss = usual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["pairs", "recipe"])
    parser.add_argument("--documents", type=Path, default=REPOSITORY / "tests" / "sample_project")
    parser.add_argument("--questions", type=Path, default=REPOSITORY / "tests" / "sample_questions.jsonl")
    parser.add_argument("--base-model", default="packaged")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--passages", type=int, default=1500, help="searched in, the right ones among them")
    parser.add_argument("--only", nargs="*", help="rows of the table")
    options = parser.parse_args()
    config.set_verbosity(argparse.Namespace(quiet=False, verbose=False))
    paths = prepare.find_documents(options.documents, ["**/*.md"])
    passages = prepare.read_passages(options.documents, paths, config.MAX_PASSAGE_CHARS, config.MAX_DOCUMENT_MB)
    questions = Questions(options.questions, passages, options.passages)
    base, _ = prepare.find_model(options.base_model, fallback=False)
    print(f"{len(questions.queries)} questions, {len(questions.passages)} passages, {options.steps} steps\n")
    print("| | pairs | steps | minutes | trained | and spread |\n|---|---|---|---|---|---|")
    print("| base | | | | {:.3f} | {:.3f} |".format(*questions.score(load_model(base, config.DEVICE))), flush=True)
    variants = PAIRS if options.table == "pairs" else RECIPE
    for name, variant in variants.items():
        if options.only and name not in options.only:
            continue
        pairs = make_pairs(passages, variant)
        if len(pairs) < variant.batch_size:
            print(f"| {name} | {len(pairs)} | | | | |", flush=True)
            continue
        steps = max(1, round(options.steps * variant.steps))
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            model = trained(variant, pairs, steps, base, Path(folder))
            minutes = (time.perf_counter() - started) / 60
        scores = questions.score(model)
        print(f"| {name} | {len(pairs):,} | {steps} | {minutes:.1f} | {scores[0]:.3f} | {scores[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
