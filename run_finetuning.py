#!/usr/bin/env python3
"""Fine-tune the base model on the pairs, compare it with the base on held-out queries, and save it.  (step 2 of 4)

    1. prepare_finetuning_data.py   documents        -> fine_tuning_data/
    2. run_finetuning.py            fine_tuning_data -> fine_tuned_model/<name>/
    3. generate_embeddings.py       documents, model -> embeddings/
    4. semantic_search.py           embeddings       -> answers

    python run_finetuning.py
    python run_finetuning.py --base-model packaged --epochs 2 --max-steps 200
    python run_finetuning.py --evaluate-only

The model folder is written whole and swapped in; the one before stays beside it as <name>.previous. It holds the
Sentence Transformers format (safetensors), onnx/model.onnx (token ids in, normalised embeddings out: what steps 3 and
4 use), evaluation.json and a model card. Printed: base against fine-tuned on the held-out queries, and last

    VERDICT improved nDCG@10 0.412 -> 0.533 (+0.121, 95% CI +0.090..+0.151, 212 queries)
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import random
import re
import sqlite3
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
from config import UserError, remove, replacing, restore_previous
from prepare_finetuning_data import (
    CorpusPassage,
    Pair,
    Query,
    check_model,
    find_model,
    fold,
    load_tokenizer,
    read_corpus,
    read_pairs,
    read_queries,
    sha256_of,
    warn,
)

# ------------------------------------------------------------------------------------------- the model


def load_model(folder: Path, device: str | None):
    """Load a SentenceTransformer from a folder that check_model accepts: safetensors only, no code of the model's."""
    quiet_libraries()
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(
            str(check_model(folder)),
            device=device,
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder} can not be loaded ({str(error).splitlines()[0]}); copy or make it again") from None


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and notes off the screen; this script has its own."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=DeprecationWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def mend_tokenizer(model, texts: list[str]) -> list[str]:
    """Have the tokenizer read a letter by its plain form (ı as i) where words get a tenth fewer tokens.

    An English WordPiece vocabulary holds "##ı" as a letter of its own and breaks words at it, so the model sees little
    of "kayıtlı" and much of "kayitli"; a multilingual vocabulary is left as it is. The rule is saved in tokenizer.json,
    so that whatever loads the model applies it.

    Returns:
        the letters.
    """
    from tokenizers import normalizers

    backend = model.tokenizer.backend_tokenizer
    words: dict[str, dict[str, None]] = {}
    for word in (word for text in texts for word in text.split() if not word.isascii()):
        for letter in sorted(set(word)):
            if letter.isalpha() and fold(letter).isascii() and len(words.setdefault(letter, {})) < 500:
                words[letter][word] = None

    def tokens(of: list[str]) -> int:
        return sum(sum(one.attention_mask) for one in backend.encode_batch(of, add_special_tokens=False))

    rules = {
        letter: fold(letter).upper() if letter.isupper() else fold(letter)
        for letter in sorted(words)
        if not letter.isascii()
    }
    mended = [
        letter
        for letter, plain in rules.items()
        if len(words[letter]) >= 20
        and tokens([word.replace(letter, plain) for word in words[letter]]) < 0.9 * tokens(list(words[letter]))
    ]
    if mended:
        replacements = [normalizers.Replace(letter, rules[letter]) for letter in mended]
        backend.normalizer = normalizers.Sequence([*replacements, *filter(None, [backend.normalizer])])
    return mended


# ----------------------------------------------------------------------------------- held-out evaluation


class HeldOut:
    """The held-out queries with the passages they are searched in, and the ranks a model gives their answers."""

    def __init__(self, queries: list[Query], corpus: list[CorpusPassage]):
        self.queries = queries
        self.passages = [row.passage for row in corpus]
        places = {text: place for place, text in enumerate(self.passages)}
        if lost := [query for query in queries if query.positive not in places]:
            raise UserError(
                f"corpus.tsv lacks the answer to {lost[0].query[:60]!r}; run prepare_finetuning_data.py again"
            )
        self.answers = [places[query.positive] for query in queries]

    def halves(self, max_watched: int, seed: int) -> "tuple[HeldOut, HeldOut]":
        """Return the half that decides, searched in all passages, and the half that is watched to choose weights.

        The watched half is searched in max_watched passages, its own answers among them, to keep training short.
        """
        queries = self.queries[1::2]
        wanted = {query.positive for query in queries}
        others = [text for text in self.passages if text not in wanted]
        random.Random(seed).shuffle(others)
        kept = wanted | set(others[: max(0, max_watched - len(wanted))])
        watched = [CorpusPassage(text, "") for text in self.passages if text in kept]
        corpus = [CorpusPassage(text, "") for text in self.passages]
        return HeldOut(self.queries[0::2], corpus), HeldOut(queries, watched)

    def evaluator(self):
        """Return the queries as an InformationRetrievalEvaluator."""
        from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

        return InformationRetrievalEvaluator(
            queries={str(i): query.query for i, query in enumerate(self.queries)},
            corpus={str(i): text for i, text in enumerate(self.passages)},
            relevant_docs={str(i): {str(answer)} for i, answer in enumerate(self.answers)},
            map_at_k=[10],
            name="held-out",
            write_csv=False,
            write_predictions=True,
            show_progress_bar=sys.stderr.isatty(),
        )

    def ranks(self, model) -> np.ndarray:
        """Return each query's rank of its answer from 1 on, 0 where it is not among the first ten. Shape (queries,)."""
        if not self.queries:
            return np.zeros(0, dtype=np.int64)
        with tempfile.TemporaryDirectory() as folder:
            self.evaluator()(model, output_path=folder)
            (predictions,) = Path(folder).glob("*.jsonl")
            found = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
        ranks = np.zeros(len(self.queries), dtype=np.int64)
        for one in found:
            place = int(one["query_id"])
            ids = [result["corpus_id"] for result in one["results"]]
            if str(self.answers[place]) in ids:
                ranks[place] = ids.index(str(self.answers[place])) + 1
        return ranks


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


def compare(queries: list[Query], base: np.ndarray, tuned: np.ndarray, kept_base: bool, seed: int) -> dict:
    """Compare two models' ranks for the same queries: means, an interval, by kind of query, and the verdict."""
    if not queries:
        return {"verdict": "unknown", "queries": 0}
    before, after = gains(base), gains(tuned)
    differences = after["nDCG@10"] - before["nDCG@10"]
    low, high = confidence_interval(differences, seed)
    verdict = "kept-base" if kept_base else "improved" if low > 0 else "worse" if high < 0 else "unchanged"
    by_kind = {}
    for kind in sorted({query.strategy for query in queries}):
        of_kind = np.array([query.strategy == kind for query in queries])
        means = [float(table["nDCG@10"][of_kind].mean()) for table in (before, after)]
        by_kind[kind] = {"queries": int(of_kind.sum()), "base": means[0], "fine_tuned": means[1]}
    return {
        "verdict": verdict,
        "queries": len(queries),
        "base": {name: float(values.mean()) for name, values in before.items()},
        "fine_tuned": {name: float(values.mean()) for name, values in after.items()},
        "difference": float(differences.mean()),
        "interval_95": [low, high],
        "wins": int((differences > 0).sum()),
        "losses": int((differences < 0).sum()),
        "nDCG@10_by_kind": by_kind,
    }


def print_comparison(result: dict) -> None:
    """Print base against fine-tuned; the last line is for programs."""
    if not result["queries"]:
        print("VERDICT unknown: no held-out queries; give prepare_finetuning_data.py more documents")
        return
    print(f"{'held-out queries':<22}{'base':>10}{'fine-tuned':>12}")
    for name, value in result["base"].items():
        print(f"{name:<22}{value:>10.3f}{result['fine_tuned'][name]:>12.3f}")
    for kind, row in result["nDCG@10_by_kind"].items():
        label = f"  nDCG@10 {kind} ({row['queries']})"
        print(f"{label:<22}{row['base']:>10.3f}{row['fine_tuned']:>12.3f}")
    print(f"{result['wins']} queries better, {result['losses']} worse, {result['queries']} in all")
    low, high = result["interval_95"]
    print(
        f"VERDICT {result['verdict']} nDCG@10 {result['base']['nDCG@10']:.3f} -> {result['fine_tuned']['nDCG@10']:.3f}"
        f" ({result['difference']:+.3f}, 95% CI {low:+.3f}..{high:+.3f}, {result['queries']} queries)"
    )


# ------------------------------------------------------------------- scores by words (SQLite FTS5), and by both

WORD_OR_NAME = re.compile(r"[^\W_]+(?:[._/#:@+-]+[^\W_]+)*")
WORD_PART = re.compile(r"[^\W_]+")
CAMEL = re.compile(r"(?<=[a-zçğıöşü0-9])(?=[A-ZÇĞİÖŞÜ])")
MAX_QUERY_WORDS = 64
PREFIX_LETTERS = 6  # Turkish hangs its endings on the stem: the first letters are nearly always the stem


def keyword_terms(text: str) -> tuple[list[str], list[str]]:
    """Return the folded words of a text, whole names such as km-2.1 among them, and the words cut to their stems."""
    exact: list[str] = []
    stems: list[str] = []
    for match in WORD_OR_NAME.finditer(text):
        parts = WORD_PART.findall(CAMEL.sub(" ", match[0]))
        if len(parts) > 1:
            exact.append(re.sub(r"[\W_]+", "-", fold(match[0])))
        for part in map(fold, parts):
            exact.append(part)
            stems.append(part[:PREFIX_LETTERS])
    return exact, stems


def write_keywords(path: Path | str, passages: Iterable[tuple[str, str]]) -> sqlite3.Connection:
    """Write the FTS5 table keywords(heading, stems, exact) of (heading, text) passages; rowid i + 1 is passage i."""
    database = sqlite3.connect(path)
    with database:
        database.execute("PRAGMA journal_mode=OFF")
        database.execute(
            "CREATE VIRTUAL TABLE keywords USING fts5(heading, stems, exact, content='',"
            " tokenize=\"unicode61 remove_diacritics 0 tokenchars '-'\")"
        )
        database.executemany(
            "INSERT INTO keywords(rowid, heading, stems, exact) VALUES (?, ?, ?, ?)", keyword_rows(passages)
        )
        database.execute("INSERT INTO keywords(keywords) VALUES ('optimize')")
    return database


def keyword_rows(passages: Iterable[tuple[str, str]]) -> Iterator[tuple[int, str, str, str]]:
    for row, (heading, text) in enumerate(passages, 1):
        exact, stems = keyword_terms(text)
        yield row, " ".join(keyword_terms(heading)[1]), " ".join(stems), " ".join(exact)


def keyword_scores(database: sqlite3.Connection, query: str, count: int) -> dict[int, float]:
    """Return the BM25 scores (SQLite FTS5; higher is better) of the best passages, by their place."""
    exact, stems = (list(dict.fromkeys(words))[:MAX_QUERY_WORDS] for words in keyword_terms(query))
    if not exact:
        return {}
    stems_match, exact_match = (" OR ".join(f'"{word}"' for word in words) for words in (stems, exact))
    rows = database.execute(
        "SELECT rowid, -rank FROM keywords WHERE keywords MATCH ? ORDER BY rank LIMIT ?",
        (f"{{heading stems}}: ({stems_match}) OR exact: ({exact_match})", count),
    )
    return {row - 1: score for row, score in rows}


def combined_scores(
    meaning: dict[int, float], words: dict[int, float], mean: float, deviation: float, semantic_weight: float
) -> dict[int, float]:
    """Return the weighted sum of both standard scores for each passage of meaning, which holds all of words.

    The mean and deviation of the similarities are those over the whole index, so that a query which nothing is near
    to leaves the order to its words; a passage that holds none of the words has the keyword score 0.
    """
    words = standard_scores({place: words.get(place, 0.0) for place in meaning})
    return {
        place: semantic_weight * (meaning[place] - mean) / (deviation or 1.0) + (1 - semantic_weight) * words[place]
        for place in meaning
    }


def standard_scores(scores: dict[int, float]) -> dict[int, float]:
    mean = sum(scores.values()) / max(1, len(scores))
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores.values()) / max(1, len(scores))) or 1.0
    return {place: (score - mean) / deviation for place, score in scores.items()}


# ---------------------------------------------------------------------------------------------- training


def training_columns(pairs: list[Pair], loss: str, model) -> dict[str, list[str]]:
    """Return the columns that the loss reads; for triplets, negatives are mined with the model where they are missing.

    A mined negative may come to no more than 95 % of its positive's similarity, lest it be a right answer
    (NV-Retriever; Moreira et al., 2024).
    """
    rows = {"anchor": [pair.anchor for pair in pairs], "positive": [pair.positive for pair in pairs]}
    with_negative = [pair for pair in pairs if pair.negative]
    if loss == "mnrl" and len(with_negative) == len(pairs):
        return rows | {"negative": [pair.negative for pair in pairs]}
    if loss == "mnrl":
        if with_negative:
            warn(f"{len(with_negative)} of {len(pairs)} pairs have a negative; --loss mnrl uses them when all have one")
        return rows
    without = [pair for pair in pairs if not pair.negative]
    triplets = [pair[:3] for pair in with_negative]
    if without:
        triplets += mine_negatives(without, model)
    if not triplets:
        raise UserError("no hard negatives were found for these pairs; use --loss mnrl or more documents")
    return {name: [row[place] for row in triplets] for place, name in enumerate(("anchor", "positive", "negative"))}


def mine_negatives(pairs: list[Pair], model) -> list[tuple[str, str, str]]:
    """Return (anchor, positive, hard negative) for each pair that the model finds a hard negative for."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    rows = Dataset.from_dict({"anchor": [pair.anchor for pair in pairs], "positive": [pair.positive for pair in pairs]})
    mined = mine_hard_negatives(rows, model, num_negatives=1, range_max=50, relative_margin=0.05, verbose=False)
    return [(row["anchor"], row["positive"], row["negative"]) for row in mined]


def make_loss(loss: str, model):
    """Return the loss object: in-batch negatives (mnrl) or triplets with a cosine margin of 0.2."""
    from sentence_transformers.sentence_transformer.losses import (
        MultipleNegativesRankingLoss,
        TripletDistanceMetric,
        TripletLoss,
    )

    if loss == "mnrl":
        return MultipleNegativesRankingLoss(model)
    return TripletLoss(model, distance_metric=TripletDistanceMetric.COSINE, triplet_margin=0.2)


def seconds_per_step(model, loss, columns: dict[str, list[str]], batch_size: int) -> float:
    """Measure a training step of this machine, without changing the model."""
    took = []
    for start in range(3):
        started = time.perf_counter()
        features = [model.preprocess(column[start::3][:batch_size]) for column in columns.values()]
        features = [{k: v.to(model.device) if hasattr(v, "to") else v for k, v in one.items()} for one in features]
        loss(features, None).backward()
        took.append(time.perf_counter() - started)
    model.zero_grad()
    return sorted(took)[1] * 1.1  # the median, and the optimizer's share


def train(
    model, columns: dict[str, list[str]], watched: HeldOut, options: argparse.Namespace, steps: int
) -> list[dict]:
    """Train for `steps` steps, watching the held-out queries four times; the model ends as the best checkpoint seen.

    Returns:
        the history: dicts with step, loss and nDCG@10.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    workspace = options.model_dir.with_name(f".{options.model_dir.name}.training")
    evaluator = watched.evaluator() if watched.queries else None
    if evaluator:
        evaluator.write_predictions = evaluator.show_progress_bar = False
    # The card's example, set here lest the trainer draw its own and print about it.
    model.model_card_data.widget = [{"source_sentence": columns["anchor"][0], "sentences": columns["positive"][:3]}]
    trainer = SentenceTransformerTrainer(
        model,
        training_arguments(workspace, options, steps, watching=bool(evaluator), on_cpu=model.device.type == "cpu"),
        Dataset.from_dict(columns),
        loss=make_loss(options.loss, model),
        evaluator=evaluator,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(progress_callback(steps))
    remove(workspace)  # of a run that was killed
    try:
        trainer.train()
    finally:
        remove(workspace)
    return history_of(trainer.state.log_history)


def training_arguments(workspace: Path, options: argparse.Namespace, steps: int, watching: bool, on_cpu: bool):
    """Return the trainer's settings: no text twice in a batch, warm-up, and the best of four checkpoints kept."""
    from sentence_transformers import SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers

    every = max(1, -(-steps // 4))
    return SentenceTransformerTrainingArguments(
        output_dir=str(workspace),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=max(1, steps // 10),
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        seed=options.seed,
        eval_strategy="steps" if watching else "no",
        save_strategy="steps" if watching else "no",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=watching,
        metric_for_best_model="eval_held-out_cosine_ndcg@10" if watching else None,
        logging_steps=every,
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=on_cpu,
    )


def progress_callback(steps: int):
    """Return a callback: a bar with ETA on a terminal, a line on stderr at each look at the held-out set."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.bar = tqdm(total=steps, desc="training", unit="step", disable=None)
            self.loss = float("nan")

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.loss = (logs or {}).get("loss", self.loss)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            value = next((v for k, v in (metrics or {}).items() if k.endswith("_cosine_ndcg@10")), float("nan"))
            line = f"step {state.global_step}/{steps}: loss {self.loss:.3f}, held-out nDCG@10 {value:.3f}"
            self.bar.write(line, file=sys.stderr)

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    return Progress()


def history_of(log_history: list[dict]) -> list[dict]:
    """Return the trainer's log as one dict a step: step, loss, held-out nDCG@10."""
    history: dict[int, dict] = {}
    for entry in log_history:
        row = history.setdefault(entry["step"], {"step": entry["step"]})
        if "loss" in entry:
            row["loss"] = entry["loss"]
        for name, value in entry.items():
            if name.endswith("_cosine_ndcg@10"):
                row["nDCG@10"] = value
    return [row for row in history.values() if len(row) > 1]


def choose_weights(model, base_weights: dict, choosing: HeldOut) -> tuple[float, dict[float, float]]:
    """Set the model to the best mixture of base and tuned weights; return its alpha and every alpha's nDCG@10.

    Weights between the two often search better than either (WiSE-FT; Wortsman et al., CVPR 2022); alpha 0 is the base.
    """
    tuned_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def set_alpha(alpha: float) -> None:
        mixed = {
            name: base_weights[name].lerp(value, alpha) if value.is_floating_point() else value
            for name, value in tuned_weights.items()
        }
        model.load_state_dict(mixed)

    if not choosing.queries:
        return 1.0, {}
    scores = {}
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        set_alpha(alpha)
        scores[alpha] = float(gains(choosing.ranks(model))["nDCG@10"].mean())
    best = max(scores, key=lambda alpha: (scores[alpha], -alpha))
    set_alpha(best)
    return best, scores


# ------------------------------------------------------------------------------------------- saving, ONNX


def save_model(model, folder: Path, evaluation: dict, texts: list[str]) -> None:
    """Swap the model into folder whole: Sentence Transformers format, ONNX, evaluation.json, model card.

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
        with (temporary / "README.md").open("a", encoding="utf-8") as card:
            card.write(card_section(evaluation))


def save_with_onnx(model, folder: Path, texts: list[str]) -> None:
    """Write a model in the Sentence Transformers format and as ONNX, which must agree on texts.

    Raises:
        UserError: they do not, or there is no room.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(str(folder), safe_serialization=True)
        export_onnx(model, folder, texts)
    except (RuntimeError, SafetensorError) as error:  # where others raise an OSError
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder.parent} can not be written to ({reason}); make room or name another place") from None


def card_section(evaluation: dict) -> str:
    """Return what the model card adds to Sentence Transformers' own: which base was used, and the verdict."""
    result = evaluation["comparison"]
    lines = ["\n## Fine-tuned on a project's own documents\n"]
    if evaluation["base"]["note"]:
        lines.append(f"Note: {evaluation['base']['note']}.\n")
    if result["queries"]:
        before, after = result["base"]["nDCG@10"], result["fine_tuned"]["nDCG@10"]
        lines.append(
            f"On {result['queries']} held-out queries from documents that training never saw:"
            f" nDCG@10 {before:.3f} for the base, {after:.3f} for this model ({result['verdict']}).\n"
        )
    return "\n".join(lines)


def export_onnx(model, folder: Path, texts: list[str]) -> None:
    """Write folder/onnx/model.onnx, the whole pipeline: token ids in, normalised sentence embeddings out."""
    import torch

    class Pipeline(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            features = self.model({"input_ids": input_ids, "attention_mask": attention_mask})
            return torch.nn.functional.normalize(features["sentence_embedding"], dim=1)

    example = model.preprocess(["an example", "a longer example, so that the shapes differ"])
    (folder / "onnx").mkdir()
    device = model.device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of branches that do not depend on the input's shape
        torch.onnx.export(
            Pipeline().cpu().eval(),
            (example["input_ids"].cpu(), example["attention_mask"].cpu()),
            str(folder / "onnx" / "model.onnx"),
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
            dynamic_axes={name: {0: "batch", 1: "tokens"} for name in ("input_ids", "attention_mask")},
            opset_version=17,
            dynamo=False,
        )
        wanted = model.encode(texts, normalize_embeddings=True)
    model.to(device)
    worst = float((wanted * Encoder(folder).encode(texts)).sum(axis=1).min())
    if not worst >= 1 - 1e-3:  # nor if it is not a number
        raise UserError(f"ONNX and PyTorch disagree (cosine {worst:.4f}), so nothing is saved; try another base model")


class Encoder:
    """A model folder's ONNX pipeline: what the index and the search embed with; needs no torch.

    Raises:
        UserError: the folder lacks a file or holds a damaged one.
    """

    def __init__(self, folder: Path):
        import onnxruntime

        # One thread a batch and several batches at once: faster than several threads in one batch, and a text's
        # vector does not depend on how many there are.
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        try:
            self.tokenizer, self.window = load_tokenizer(folder)
            self.session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"), settings)
            body = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except Exception as error:  # onnxruntime and tokenizers raise bare Exceptions
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder} can not be loaded ({reason}); run run_finetuning.py again") from None
        self.padding_id = body.get("pad_token_id") or 0

    def encode(self, texts: list[str], batch_tokens: int = 1024) -> np.ndarray:
        """Return the normalised embeddings of texts: float32, shape (len(texts), dimensions)."""
        encoded = self.tokenizer.encode_batch(texts)
        lengths = np.array([len(one.ids) for one in encoded], dtype=np.int64)

        def run(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            ids = np.full((len(batch), lengths[batch[-1]]), self.padding_id, dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, place in enumerate(batch):
                ids[row, : lengths[place]] = encoded[place].ids
                mask[row, : lengths[place]] = 1
            return batch, self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0]

        vectors: np.ndarray | None = None
        workers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # torchrun sets it
        with ThreadPoolExecutor(workers) as pool:
            for batch, output in pool.map(run, batches_of_similar_length(lengths, batch_tokens)):
                if vectors is None:
                    vectors = np.empty((len(texts), output.shape[1]), dtype=np.float32)
                vectors[batch] = output
        return vectors if vectors is not None else np.empty((0, 0), dtype=np.float32)


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
    names = ("*.safetensors", "tokenizer.json", "config.json", "modules.json", "1_*/config.json", "onnx/model.onnx")
    for path in sorted(path for name in names for path in folder.glob(name)):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------- main


def read_json(path: Path) -> dict:
    """Return the object in a JSON file, or {} where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def plan_steps(pairs: int, seconds: float, budget_seconds: float, options: argparse.Namespace) -> int:
    """Return the number of training steps: the epochs, cut to --max-steps and to the time that is left."""
    wanted = options.max_steps or -(-pairs // options.batch_size) * options.epochs
    steps = max(1, min(wanted, int(budget_seconds / seconds)))
    note = f" of {wanted} (config.MAX_TRAINING_MINUTES)" if steps < wanted else ""
    print(f"{pairs:,} pairs, {steps} steps{note} of {options.batch_size}, about {steps * seconds / 60:.1f} minutes")
    return steps


def check_options(options: argparse.Namespace) -> None:
    for name, low, high in (("epochs", 1, 100), ("batch_size", 2, 65_536), ("max_steps", 0, 10**9)):
        if not low <= getattr(options, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} is not from {low} to {high}")
    if not 0 < options.learning_rate <= 1:
        raise UserError(f"--learning-rate {options.learning_rate} is not above 0 and at most 1; try {2e-5}")


def fine_tune(model, pairs: list[Pair], watched: HeldOut, budget_seconds: float, options: argparse.Namespace) -> dict:
    """Train the model in place and mix its weights with the base's; return what evaluation.json tells of that."""
    from importlib import metadata

    mended = mend_tokenizer(model, [text for pair in pairs for text in pair[:2]])
    columns = training_columns(pairs, options.loss, model)
    base_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    window, model.max_seq_length = model.max_seq_length, min(model.max_seq_length, config.TRAINING_TOKENS)
    step_seconds = seconds_per_step(model, make_loss(options.loss, model), columns, options.batch_size)
    steps = plan_steps(len(columns["anchor"]), step_seconds, budget_seconds, options)
    history = train(model, columns, watched, options, steps)
    alpha, alphas = choose_weights(model, base_weights, watched)
    model.max_seq_length = window
    settings = ("loss", "epochs", "batch_size", "learning_rate", "max_steps", "seed")
    return {
        "format": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {name: getattr(options, name) for name in settings} | {"training_tokens": config.TRAINING_TOKENS},
        "letters_read_plainly": mended,
        "pairs": len(columns["anchor"]),
        "steps": steps,
        "history": history,
        "alpha": alpha,
        "nDCG@10_by_alpha": alphas,
        "versions": {name: metadata.version(name) for name in ("sentence-transformers", "transformers", "torch")},
        "machine": f"{platform.platform()}, {os.cpu_count()} CPUs, device {model.device}",
    }


def refuse_lesser_base(options: argparse.Namespace, note: str | None) -> None:
    """A model tuned from the stand-in must not take the place of one tuned from the configured base."""
    installed = read_json(options.model_dir / "evaluation.json").get("base", {})
    if note and installed and not installed.get("note") and installed.get("used") != "packaged" and not options.force:
        raise UserError(
            f"{options.model_dir} was tuned from {installed['used']}, which is not at hand now; --force replaces it"
            " with one tuned from the packaged model, --model-dir DIR saves elsewhere"
        )


def evaluate_saved(options: argparse.Namespace, deciding: HeldOut) -> dict:
    """Compare the saved model with the base it was tuned from, or --base-model, on the half that decides."""
    saved = load_model(options.model_dir, config.DEVICE)
    evaluation = read_json(options.model_dir / "evaluation.json")
    name = options.base_model or evaluation.get("base", {}).get("used", config.BASE_MODEL)
    base = load_model(find_model(name, config.BASE_MODEL_REVISION, fallback=False)[0], config.DEVICE)
    kept_base = evaluation.get("comparison", {}).get("verdict") == "kept-base"
    return compare(deciding.queries, deciding.ranks(base), deciding.ranks(saved), kept_base, options.seed)


def build_parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--force", action="store_true", help="replace a model that was tuned from a better base")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    started = time.perf_counter()
    check_options(options)
    restore_previous(options.model_dir)
    held_out = HeldOut(read_queries(options.data_dir), read_corpus(options.data_dir))
    deciding, watched = held_out.halves(config.WATCHED_PASSAGES, options.seed)
    if options.evaluate_only:
        print_comparison(evaluate_saved(options, deciding))
        return
    pairs = read_pairs(options.data_dir)
    wanted = options.base_model or config.BASE_MODEL
    base_folder, note = find_model(wanted, config.BASE_MODEL_REVISION, fallback=options.base_model is None)
    if note:
        warn(note)
    refuse_lesser_base(options, note)
    model = load_model(base_folder, config.DEVICE)
    searched = f"{len(deciding.queries)} held-out queries in {len(deciding.passages):,} passages"
    print(f"searching {searched} with the base model", file=sys.stderr)
    base_ranks = deciding.ranks(model)
    evaluation_seconds = time.perf_counter() - started
    watching_share = 9 * len(watched.passages) / max(1, len(deciding.passages))  # 4 looks, 5 mixtures of weights
    budget_seconds = config.MAX_TRAINING_MINUTES * 60 - (2 + watching_share) * evaluation_seconds
    evaluation = fine_tune(model, pairs, watched, budget_seconds, options)
    kept_base = evaluation["alpha"] == 0 and not evaluation["letters_read_plainly"]
    evaluation |= {
        "comparison": compare(deciding.queries, base_ranks, deciding.ranks(model), kept_base, options.seed),
        "base": {"wanted": wanted, "used": "packaged" if note else wanted, "note": note},
        "data": read_json(options.data_dir / "data_report.json"),
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }
    save_model(model, options.model_dir, evaluation, held_out.passages[:64])
    print(f"took {evaluation['minutes']} minutes; wrote {options.model_dir}; next: python generate_embeddings.py")
    print_comparison(evaluation["comparison"])


if __name__ == "__main__":
    config.run(main)
