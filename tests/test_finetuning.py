"""Training, the verdict, and what is saved when things go right and wrong."""

import argparse
import functools
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, error_line, exit_status, lock_held, start_script, wait_until
from sentence_transformers.base.modules import Dense

import config
import generate_embeddings
import run_finetuning
from config import UserError
from generate_embeddings import load_index
from prepare_finetuning_data import (
    CorpusPassage,
    Pair,
    Query,
    load_tokenizer,
    packaged_model,
    plain_text,
    read_corpus,
    read_pairs,
    read_queries,
    write_tsv,
)
from run_finetuning import Encoder, HeldOut, compare, confidence_interval, gains, load_model, model_fingerprint
from semantic_search import Request, search

VERDICT = re.compile(
    r"VERDICT (improved|unchanged|kept-base|worse|unknown) nDCG@10 ([\d.]+) -> ([\d.]+)"
    r" \(([+-][\d.]+), 95% CI ([+-][\d.]+)\.\.([+-][\d.]+), (\d+) queries\)"
)
TEXTS = ["Kısa.", "Gece debisi yükselirse alarm verilir.", "The collector runs as one container. " * 30, "KM-2.1", ""]


def snapshot(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def train(data: Path, model_dir: Path, base: Path | str, *more) -> int:
    training = ["--data-dir", data, "--model-dir", model_dir, "--base-model", base, "--batch-size", 8, "--max-steps", 2]
    return exit_status(run_finetuning.main, [*training, *more])


def evaluation_of(model_dir: Path) -> dict:
    return json.loads((model_dir / "evaluation.json").read_text(encoding="utf-8"))


@pytest.fixture
def installed(chain, tmp_path) -> Path:
    """A copy of the fine-tuned model that a test may replace."""
    return shutil.copytree(chain.model, tmp_path / "models" / "tuned")


@pytest.fixture
def unjudged(chain, tmp_path) -> Path:
    """The small project's data without held-out queries, so that the trained weights are saved whatever they find."""
    data = shutil.copytree(chain.data, tmp_path / "unjudged")
    write_tsv(data / "evaluation_data.tsv", [], Query._fields)
    return data


# ---------------------------------------------------------------------------------------- the saved model


def assert_same_embeddings(folder: Path, texts: list[str]) -> None:
    from sentence_transformers import SentenceTransformer

    by_torch = SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True)
    encoder = Encoder(folder)
    by_onnx = encoder.encode(texts)
    assert by_onnx.shape == (len(texts), 32) and by_onnx.dtype == np.float32
    assert (by_torch * by_onnx).sum(axis=1).min() > 0.999
    assert np.allclose(np.linalg.norm(by_onnx, axis=1), 1, atol=1e-4)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    assert np.allclose(alone, by_onnx, atol=1e-4), "a text's embedding depends on its batch"
    assert load_tokenizer(folder)[1] == 128
    assert not list(folder.rglob("*.bin"))


def test_the_saved_model_gives_the_same_embeddings_with_sentence_transformers_and_without(chain):
    assert_same_embeddings(chain.model, TEXTS + [row.passage for row in read_corpus(chain.data)])


def test_a_model_of_the_multilingual_shape_is_tuned_and_saved_the_same_way(chain, tmp_path, tiny_multilingual_model):
    assert train(chain.data, tmp_path / "model", tiny_multilingual_model) == 0
    assert_same_embeddings(tmp_path / "model", TEXTS + [row.passage for row in read_corpus(chain.data)])
    modules = json.loads((tmp_path / "model" / "modules.json").read_text(encoding="utf-8"))
    assert [row["type"].rpartition(".")[2] for row in modules][:2] == ["Transformer", "Pooling"]
    assert "Normalize" not in str(modules), "no Normalize module is added"


def changed_copy(model: Path, folder: Path, change) -> Path:
    """Return a copy of a model that change has been applied to as a SentenceTransformer."""
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(model), device="cpu")
    change(loaded)
    loaded.save_pretrained(str(folder))
    return folder


def test_a_base_in_half_precision_or_with_a_prompt_of_its_own_gives_a_model_that_can_be_used(
    chain, unjudged, tmp_path, tiny_model
):
    def with_prompt(model):
        model.prompts, model.default_prompt_name = {"query": "query: "}, "query"

    for name, change in (("half", lambda model: model.half()), ("prompt", with_prompt)):
        base = changed_copy(tiny_model, tmp_path / name, change)
        for data in (chain.data, unjudged):
            assert train(data, tmp_path / f"{name}-tuned", base, "--force") == 0
            assert_same_embeddings(tmp_path / f"{name}-tuned", TEXTS)
        assert model_fingerprint(tmp_path / f"{name}-tuned") != model_fingerprint(base)


@pytest.mark.parametrize("able", [True, False])
def test_a_model_trained_in_bfloat16_is_saved_in_float32_and_the_report_tells(
    unjudged, tmp_path, tiny_model, able, monkeypatch
):
    from safetensors.torch import load_file

    taken = {"gelu": set(), "logsumexp": set()}  # what they are given, of the layers and of the loss

    def noting(name, function, values, *args, **more):
        taken[name].add(values.dtype)
        return function(values, *args, **more)

    monkeypatch.setattr(run_finetuning, "has_bfloat16", lambda device: able)
    for module, name in ((torch.nn.functional, "gelu"), (torch, "logsumexp")):
        monkeypatch.setattr(module, name, functools.partial(noting, name, getattr(module, name)))
    assert train(unjudged, tmp_path / "model", tiny_model) == 0
    assert (torch.bfloat16 in taken["gelu"]) == able and taken["logsumexp"] == {torch.float32}
    assert {one.dtype for one in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.float32}
    assert ("bfloat16" in evaluation_of(tmp_path / "model")["machine"]) == able
    assert ("bfloat16" in (tmp_path / "model" / "report.html").read_text(encoding="utf-8")) == able
    assert_same_embeddings(tmp_path / "model", TEXTS)


def test_a_saved_models_weights_may_be_read_by_whom_its_other_files_may_and_its_card_is_short(installed):
    weights = sorted(installed.rglob("*.safetensors"))
    assert weights and {path.stat().st_mode for path in weights} == {(installed / "config.json").stat().st_mode}
    card = (installed / "README.md").read_text(encoding="utf-8")
    assert len(card) < 40_000 and "[PAD]" not in card and "sentence_transformers_model_id" not in card


def test_tokens_are_weighed_only_where_their_mean_is_taken(tiny_model, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights

    def pool_first(model):
        model[1] = Pooling(32, "cls")

    for folder, weighed in ((changed_copy(tiny_model, tmp_path / "cls", pool_first), False), (tiny_model, True)):
        model = load_model(folder, "cpu")
        run_finetuning.weigh_tokens(model, TEXTS)
        assert any(isinstance(module, WordWeights) for module in model) == weighed


def test_spreading_takes_the_root_of_how_unevenly_vectors_fill_their_directions():
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(3000, 6)) * np.sqrt([100, 10, 1, 1, 1, 0.1]) @ np.linalg.qr(rng.normal(size=(6, 6)))[0]

    def variances(own: np.ndarray) -> np.ndarray:
        return np.linalg.eigvalsh(own.T @ own / len(own))

    before = variances(vectors)
    half, whole = (variances(vectors @ run_finetuning.spreading(vectors, power, ridge=0)) for power in (0.5, 1.0))
    assert half / half[0] == pytest.approx(np.sqrt(before / before[0]), rel=1e-3)
    assert whole == pytest.approx(whole.mean(), rel=1e-3)
    assert run_finetuning.spreading(vectors, 0.0) == pytest.approx(np.eye(6), abs=1e-5)
    few = run_finetuning.spreading(vectors[:2], 0.5)
    assert np.linalg.cond(few) < 10, "directions of which two vectors tell nothing are not blown up"


def crowded(count: int, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors of queries and their answers which two strong and noisy directions make alike."""
    rng = np.random.default_rng(1)
    scales = np.array([30.0] * 2 + [1.0] * 30)  # two directions say most and tell the texts apart least
    own = rng.normal(size=(count, 32)) * scales
    both = (own + rng.normal(scale=noise, size=own.shape) * scales**1.5, own)
    return tuple((one / np.linalg.norm(one, axis=1, keepdims=True)).astype(np.float32) for one in both)


def give_vectors(monkeypatch, queries: np.ndarray, passages: np.ndarray) -> None:
    """Have each model embed the held-out texts as these vectors, which its last linear layer, if any, multiplies."""

    def vectors(held_out, model):
        layers = [module.linear.weight.detach().numpy().T for module in model if isinstance(module, Dense)]
        own = (functools.reduce(np.matmul, layers, one) for one in (queries, passages))
        return tuple(one / np.linalg.norm(one, axis=1, keepdims=True) for one in own)

    monkeypatch.setattr(HeldOut, "vectors", vectors)
    monkeypatch.setattr(run_finetuning, "pair_differences", lambda model, pairs: queries - passages)


def corpus_of(count: int) -> HeldOut:
    return HeldOut(queries_of(count), [f"answer {i}" for i in range(count)])


@pytest.mark.parametrize("base", ["tiny_model", "tiny_multilingual_model"])
def test_a_model_whose_vectors_crowd_is_spread_and_saved_with_the_layers(base, request, tmp_path, monkeypatch):
    model = load_model(request.getfixturevalue(base), "cpu")
    size = 2 * run_finetuning.MIN_QUERIES
    held_out = corpus_of(size)
    queries, passages = crowded(size, 0.5)
    give_vectors(monkeypatch, queries, passages)
    scores, spread = run_finetuning.spread_out(model, held_out, held_out, [], 0.5)
    ranks = [held_out.ranks(own) for own in (queries @ passages.T, scores)]
    assert spread and gains(ranks[1])["nDCG@10"].mean() > gains(ranks[0])["nDCG@10"].mean()
    assert np.allclose(scores, held_out.similarities(model), atol=1e-5), "the layer does what was judged"
    run_finetuning.save_with_onnx(model, tmp_path / "model", TEXTS)
    assert_same_embeddings(tmp_path / "model", TEXTS)
    saved = load_model(tmp_path / "model", "cpu")
    assert np.allclose(saved.encode(TEXTS), model.encode(TEXTS), atol=1e-5)
    for kind in ("WordWeights", "Dense"):
        fingerprint = model_fingerprint(tmp_path / "model")
        layer = next((tmp_path / "model").glob(f"*_{kind}")) / "model.safetensors"
        layer.write_bytes(layer.read_bytes()[:-1] + b"\1")
        assert model_fingerprint(tmp_path / "model") != fingerprint


@pytest.mark.parametrize("base", ["tiny_model", "tiny_multilingual_model"])
def test_tokens_count_by_their_rarity_in_the_documents(base, request):
    model = load_model(request.getfixturevalue(base), "cpu")
    texts = ["görev görev görev rapor", "görev KM-2.1", "rapor"]
    encoded = model.tokenizer.backend_tokenizer.encode_batch(texts)
    tokens = [token for one in encoded for token in one.tokens]
    features = model.preprocess(texts)
    states = model[0](dict(features))["token_embeddings"].detach()
    weights = torch.tensor(
        [
            [0.003 / (0.003 + tokens.count(token) / len(tokens)) for token in one]
            for one in (model.tokenizer.convert_ids_to_tokens(row) for row in features["input_ids"])
        ]
    )
    weights = (weights * features["attention_mask"])[..., None]
    wanted = torch.nn.functional.normalize((states * weights).sum(dim=1), dim=1)
    plain = model.encode(texts, normalize_embeddings=True)
    run_finetuning.weigh_tokens(model, texts)
    weighted = model.encode(texts, normalize_embeddings=True)
    assert np.allclose(weighted, wanted, atol=1e-5) and not np.allclose(weighted, plain, atol=1e-3)
    run_finetuning.weigh_tokens(model, texts)
    assert np.allclose(model.encode(texts, normalize_embeddings=True), weighted), "once, however often a model is tuned"


def test_directions_in_which_anchors_are_far_from_their_positives_count_for_less(tiny_model, monkeypatch):
    model = load_model(tiny_model, "cpu")
    pairs = [Pair(f"question {i}", f"answer {i} of many", "", "sentence", "a.md") for i in range(50)]
    differences = run_finetuning.pair_differences(model, pairs)
    anchors, positives = (model.encode([pair[side] for pair in pairs], normalize_embeddings=True) for side in (0, 1))
    assert np.allclose(differences, anchors - positives, atol=0.02)  # of bfloat16, where the machine has it
    even = np.tile(np.eye(32, dtype=np.float32), (2, 1))  # vectors that crowd nowhere
    give_vectors(monkeypatch, even, even)
    monkeypatch.setattr(run_finetuning, "pair_differences", lambda model, pairs: differences)
    assert run_finetuning.spread_out(model, corpus_of(64), corpus_of(64), pairs, 0.5)[1]
    matrix = next(module.linear.weight.detach().numpy().T for module in model if isinstance(module, Dense))
    _, directions = np.linalg.eigh(differences.T @ differences)
    lengths = np.linalg.norm(directions.T @ matrix, axis=1)
    assert lengths[-1] < 0.8 * lengths[0] and np.argmin(lengths) == 31
    assert np.all(np.diff(lengths) < 1e-3), "the farther, the less"


def test_vectors_stay_as_they_are_where_the_held_out_queries_would_lose_or_are_few(tiny_model, monkeypatch):
    def spread(count: int, vectors: tuple[np.ndarray, np.ndarray]) -> bool:
        give_vectors(monkeypatch, *vectors)
        scores, done = run_finetuning.spread_out(model, corpus_of(count), corpus_of(count), [], 0.5)
        assert np.allclose(scores, corpus_of(count).similarities(model), atol=1e-5)
        return done

    model = load_model(tiny_model, "cpu")
    modules = list(model)
    assert not spread(run_finetuning.MIN_QUERIES - 1, crowded(run_finetuning.MIN_QUERIES - 1, 0.5))
    # The answers differ in their strongest direction alone; all the others hold noise, which spreading raises.
    rng = np.random.default_rng(2)
    passages = np.zeros((60, 32), dtype=np.float32)
    angles = np.linspace(0, np.pi / 2, 60)
    passages[:, 0], passages[:, 1] = np.cos(angles), np.sin(angles)
    queries = passages.copy()
    passages[:, 2:] += rng.normal(scale=0.003, size=(60, 30))
    queries[:, 2:] += rng.normal(scale=0.003, size=(60, 30))
    assert not spread(60, (queries, passages))
    assert list(model) == modules


def test_the_model_card_and_evaluation_json_tell_how_the_model_was_made(chain):
    evaluation = evaluation_of(chain.model)
    assert evaluation["base"] == {"wanted": str(chain.base), "used": str(chain.base), "note": None}
    assert evaluation["settings"]["batch_size"] == 8 and evaluation["settings"]["max_steps"] == 5
    assert evaluation["steps"] == 5 and [row["step"] for row in evaluation["history"]] == [2, 4, 5]
    assert all({"loss", "nDCG@10"} <= row.keys() for row in evaluation["history"])
    report = json.loads((chain.data / "data_report.json").read_text(encoding="utf-8"))
    del report["document_options"]
    assert evaluation["data"] == report | {"other_documents": True}
    card = (chain.model / "README.md").read_text(encoding="utf-8")
    assert f"On {evaluation['comparison']['queries']} held-out queries" in card


def test_the_last_line_printed_and_evaluation_json_give_one_verdict(chain):
    found = VERDICT.fullmatch(chain.printed.splitlines()[-1])
    told = evaluation_of(chain.model)["comparison"]
    assert found[1] == told["verdict"] and int(found[7]) == told["queries"] > 0
    wanted = (told["base"]["nDCG@10"], told["fine_tuned"]["nDCG@10"], told["difference"], *told["interval_95"])
    assert [float(found[place]) for place in range(2, 7)] == pytest.approx(wanted, abs=6e-4)


def test_evaluate_only_repeats_the_verdict_and_changes_no_file(chain, installed, capsys):
    arguments = ["--data-dir", chain.data, "--model-dir", installed, "--base-model", chain.base, "--evaluate-only"]
    before = snapshot(installed.parent)
    assert exit_status(run_finetuning.main, arguments) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert snapshot(installed.parent) == before
    told = evaluation_of(installed)["comparison"]
    assert VERDICT.fullmatch(line)[1] == told["verdict"]
    assert f"nDCG@10 {told['base']['nDCG@10']:.3f} -> {told['fine_tuned']['nDCG@10']:.3f} " in line


def test_evaluate_only_compares_with_the_base_that_the_model_was_tuned_from(chain, installed, capsys):
    arguments = ["--data-dir", chain.data, "--model-dir", installed, "--evaluate-only"]
    assert exit_status(run_finetuning.main, arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == chain.printed.splitlines()[-1]


def test_evaluate_only_without_a_model_is_one_line(chain, tmp_path, capsys):
    arguments = ["--data-dir", chain.data, "--model-dir", tmp_path / "none", "--base-model", chain.base]
    assert exit_status(run_finetuning.main, [*arguments, "--evaluate-only"]) == 2
    assert str(tmp_path / "none") in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["folder", "previous folder", "file"])
def test_what_is_no_model_is_never_replaced_by_one(chain, tmp_path, capsys, kind):
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("mine", encoding="utf-8")
    else:
        folder = target if kind == "folder" else target.with_name("precious.previous")
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine", encoding="utf-8")
    before = snapshot(tmp_path)
    assert train(chain.data, target, chain.base) == 2
    assert "--model-dir" in error_line(capsys.readouterr().err)
    assert snapshot(tmp_path) == before


def ask_models(chain, model_dir: Path, path: Path, lines: str, *more) -> int:
    path.write_bytes(lines.encode())
    documents = ["--documents-root", chain.documents, "--documents", "**/*.md"]
    arguments = ["--questions", path, "--model-dir", model_dir, "--base-model", chain.base, *documents, *more]
    return exit_status(run_finetuning.main, [str(argument) for argument in arguments])


def test_own_queries_are_shown_side_by_side_and_compared_where_the_answer_is_known(chain, installed, tmp_path, capsys):
    answer = "The database is dumped every night at two o'clock."
    question = "the database is dumped every night at two"
    lines = f"question\tpassage\n{question}\t{answer}\nbir görevi planla ve raporla\n\nnerede?\tno.md:3\n"
    before = snapshot(installed.parent)
    assert ask_models(chain, installed, tmp_path / "queries.tsv", lines) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("question\t")] == []
    queries = [question, "bir görevi planla ve raporla", "nerede?"]
    assert [line for line in out.splitlines() if line in queries] == queries
    assert len(re.findall(r"1\. \(other: \d+\.\)", out)) == 6  # the first of both models, three times
    assert re.fullmatch(r"VERDICT (unknown|kept-base) nDCG@10 .*, 1 queries\)", out.splitlines()[-1])
    assert "✓ Docs/deployment.md:" in out
    assert "no.md:3" in err and "queries.tsv:5" in err
    assert snapshot(installed.parent) == before


def test_own_queries_that_were_trained_on_are_counted_in_a_warning(chain, installed, tmp_path, capsys):
    data = shutil.copytree(chain.data, tmp_path / "data")
    answer = "The database is dumped every night at two o'clock."
    write_tsv(data / "training_data.tsv", [Pair("When is it dumped?", answer, "", "question", "a.md")], Pair._fields)
    lines = f"when is it dumped?\t{answer}\nhow often is it dumped?\t{answer}\n"
    assert ask_models(chain, installed, tmp_path / "queries.tsv", lines, "--data-dir", data) == 0
    assert "1 of the 2 queries with an answer are trained on" in capsys.readouterr().err


def test_own_queries_without_answers_are_shown_without_a_comparison(chain, installed, tmp_path, capsys):
    assert ask_models(chain, installed, tmp_path / "queries.txt", "\ufeffgece yedeği\r\nwho reviews?\r\n") == 0
    out = capsys.readouterr().out
    assert "gece yedeği" in out.splitlines() and "who reviews?" in out.splitlines()
    assert out.splitlines()[-1].startswith("VERDICT unknown: no queries whose answer is known")
    assert ask_models(chain, installed, tmp_path / "queries.txt", "gece yedeği\n", "-q") == 0
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"question\tpassage\n", b"\xff\xfe", b"\ta.md:3\n", None])
def test_a_file_of_own_queries_that_holds_none_is_one_line(chain, installed, tmp_path, capsys, content):
    path = tmp_path / "queries.txt"
    if content is not None:
        path.write_bytes(content)
    arguments = ["--questions", path, "--model-dir", installed, "--base-model", chain.base]
    assert exit_status(run_finetuning.main, arguments) == 2
    assert str(path) in error_line(capsys.readouterr().err)


def test_the_same_seed_trains_the_same_weights_and_another_seed_others(chain, unjudged, tmp_path):
    for name, seed in (("a", 42), ("b", 42), ("c", 7)):
        assert train(unjudged, tmp_path / name, chain.base, "--seed", seed) == 0
    a, b, c = (model_fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c != model_fingerprint(chain.base) != a


def test_own_queries_with_several_answers_count_by_the_one_found_first(chain, installed, tmp_path, capsys):
    answer = "The database is dumped every night at two o'clock."
    other = "Clients must treat unknown fields as harmless, because new ones are added without notice."
    question = "The database is dumped every night"
    for lines in (
        f"{question}\t{answer}\n{question.upper()}\t{other}\n",
        f"{question}\t{other}\n{question}\t{answer}\n",
    ):
        assert ask_models(chain, installed, tmp_path / "queries.tsv", lines) == 0
        out = capsys.readouterr().out
        assert VERDICT.fullmatch(out.splitlines()[-1])[2] == "1.000" and "1 queries" in out.splitlines()[-1]


def test_own_queries_are_compared_by_words_and_by_both_as_the_search_finds_their_answers(chain, tmp_path, capsys):
    asked = {
        "gece yarısından sonra parlaklık": "Gece yarısından sonra parlaklık yüzde kırka iner.",
        "how is a failed release rolled back?": "A failed release is rolled back by pointing",
        "eski ölçümler ne olur": "Sunucu gelen ölçümleri zaman damgasıyla saklar.",
        "errors and what they are like": "Errors are JSON objects with the fields",
        "the parts that are spare": "Sekiz yüz algılayıcı tek ihalede alınır.",
    }
    lines = "".join(f"{query}\t{answer}\n" for query, answer in asked.items())
    assert ask_models(chain, chain.model, tmp_path / "queries.tsv", lines) == 0
    out = capsys.readouterr().out
    index = load_index(chain.index)
    for mode in ("keyword", "hybrid"):
        found = [search(index, query, Request(mode, 10))["results"] for query in asked]
        right = [
            next((one["rank"] for one in results if plain_text(one["text"]).startswith(answer)), 0)
            for results, answer in zip(found, asked.values(), strict=True)
        ]
        wanted = gains(np.array(right))["nDCG@10"].mean()
        printed = re.search(rf"^nDCG@10 \({mode}\) +(0\.\d+) +(0\.\d+)$", out, re.M)
        assert float(printed[2]) == pytest.approx(wanted, abs=6e-4), mode
        assert 0 < wanted < 1


def test_of_several_answers_the_best_counts_and_the_others_do_not_stand_before_it():
    queries = [Query("a", "one", "question", "a.md"), Query("b", "two", "question", "a.md")]
    held_out = HeldOut(queries, ["one", "two", "three", "four"], [["one", "two"], ["two"]])
    assert held_out.ranks(np.array([[5, 5, 1, 1], [5, 5, 5, 1]])).tolist() == [1, 3]
    assert held_out.ranks(np.array([[1, 4, 4, 5], [1, -np.inf, 1, 1]])).tolist() == [3, 0]


def test_documents_shown_beside_queries_do_not_steer_the_terminal(chain, installed, tmp_path, capsys):
    (chain_copy := tmp_path / "documents").mkdir()
    (chain_copy / "a.md").write_text("# A\n\nThe dump \x1b]0;title\x07 is written.\n", encoding="utf-8")
    (tmp_path / "queries.txt").write_text("dump \x1b[2J\n", encoding="utf-8")
    arguments = ["--questions", tmp_path / "queries.txt", "--model-dir", installed, "--base-model", chain.base]
    assert exit_status(run_finetuning.main, [*arguments, "--documents-root", chain_copy, "--documents", "*.md"]) == 0
    out = capsys.readouterr().out
    assert "is written" in out and "\x1b" not in out


def test_what_was_trained_on_is_told_by_evaluate_only_and_does_not_shield_the_installed_model(
    chain, installed, monkeypatch, capsys
):
    arguments = ["--data-dir", chain.data, "--model-dir", installed, "--base-model", chain.base, "--evaluate-only"]
    evaluation = evaluation_of(installed)
    judged = HeldOut(read_queries(chain.data), [row.passage for row in read_corpus(chain.data)])
    files = sorted({query.source_file for query in judged.queries[run_finetuning.DECIDING]})
    ranks = np.zeros(len(judged.queries), dtype=int)
    evaluation["held_out"] = {"fingerprint": judged.fingerprint(), "ranks": [1] * len(ranks)}
    for trained_on, better in (([], True), (files, False)):
        (installed / "evaluation.json").write_text(json.dumps(evaluation | {"trained_on": trained_on}))
        assert bool(run_finetuning.worse_than_installed(ranks, judged, installed)) == better
        assert exit_status(run_finetuning.main, arguments) == 0
        assert ("was trained on" in capsys.readouterr().err) != better
    (installed / "evaluation.json").write_text(json.dumps(evaluation | {"trained_on": []}))
    weights = installed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert run_finetuning.worse_than_installed(ranks, judged, installed) is None


@pytest.mark.parametrize(
    ("more", "named"),
    [(["--seed", "-1"], "--seed"), (["--model-dir", "."], "--model-dir"), (["--epochs", "0"], "--epochs")],
)
def test_options_that_make_no_sense_are_one_line(chain, tmp_path, capsys, monkeypatch, more, named):
    monkeypatch.chdir(tmp_path)
    assert train(chain.data, tmp_path / "model", chain.base, *more) == 2
    assert named in error_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_setting_of_the_loss_that_makes_no_sense_is_one_line(chain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(config, "LOSS", "MNRL")
    assert train(chain.data, tmp_path / "model", chain.base) == 2
    assert "config.LOSS" in error_line(capsys.readouterr().err)


def test_a_training_that_runs_is_not_gone_on_with_by_another(chain, installed, capsys):
    with lock_held(installed.parent / f".{installed.name}.lock") as process:
        before = snapshot(installed.parent)
        for more in ([], ["--fresh"]):
            assert train(chain.data, installed, chain.base, *more) == 2
            assert f"process {process} is training" in error_line(capsys.readouterr().err)
        assert snapshot(installed.parent) == before
    assert train(chain.data, installed, chain.base, "--max-steps", "2") == 0  # the dead process's lock is free


def test_a_full_disk_at_a_checkpoint_is_one_line(chain, installed, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    before = snapshot(installed)
    monkeypatch.setattr(torch, "save", full)
    assert train(chain.data, installed, chain.base) == 2
    assert "make room" in error_line(capsys.readouterr().err)
    assert snapshot(installed) == before


def test_triplets_are_mined_where_the_pairs_have_no_negative(chain, tmp_path):
    assert train(chain.data, tmp_path / "model", chain.base, "--loss", "triplet") == 0
    assert evaluation_of(tmp_path / "model")["pairs"] > 0
    pairs = [Pair("the anchor", "the positive", "the negative", "heading", "a.md")]
    model = load_model(chain.base, "cpu")
    assert run_finetuning.usable_pairs(pairs, "triplet", model) == run_finetuning.usable_pairs(pairs, "mnrl", model)
    columns = {"anchor": ["the anchor"], "positive": ["the positive"], "negative": ["the negative"]}
    assert run_finetuning.training_columns(pairs) == columns
    assert list(run_finetuning.training_columns([pairs[0]._replace(negative=""), *pairs])) == ["anchor", "positive"]


@pytest.mark.parametrize("count", [4, 5, 10])
def test_few_pairs_have_their_negatives_too(tiny_model, count):
    texts = [" ".join(f"w{place}{number}" for number in range(8)) for place in range(count)]
    pairs = [Pair(text, f"{text} son", "", "heading", f"{place}.md") for place, text in enumerate(texts)]
    assert len(run_finetuning.mine_negatives(pairs, load_model(tiny_model, "cpu"))) == count


def test_a_mined_negative_stays_below_95_percent_of_its_positives_similarity(chain, capsys):
    from prepare_finetuning_data import read_pairs

    model = load_model(chain.base, "cpu")
    pairs = read_pairs(chain.data)
    mined = run_finetuning.mine_negatives(pairs, model)
    assert mined
    assert f"{len(mined)} of {len(pairs)} pairs have a hard negative" in capsys.readouterr().err
    anchors, positives, negatives = (
        model.encode([pair[column] for pair in mined], normalize_embeddings=True) for column in range(3)
    )
    sections = {pair.positive: pair.section for pair in pairs}
    assert all(sections[pair.negative] != pair.section for pair in mined)
    right, wrong = (anchors * positives).sum(axis=1), (anchors * negatives).sum(axis=1)
    assert (wrong <= 0.95 * right + 1e-4).all()


def test_data_without_held_out_queries_trains_and_says_that_the_verdict_is_unknown(chain, unjudged, tmp_path, capsys):
    assert train(unjudged, tmp_path / "model", chain.base, "--learning-rate", "0.001") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("VERDICT unknown")
    assert model_fingerprint(tmp_path / "model") != model_fingerprint(chain.base), "training changes the weights"
    assert evaluation_of(tmp_path / "model")["comparison"]["verdict"] == "unknown"


# ------------------------------------------------------------------------------------ what was there before


def fallback_to(monkeypatch, folder: Path) -> None:
    """Have the configured base model missing, with a small one in the place of the packaged model."""
    monkeypatch.setattr(config, "BASE_MODEL", "nobody/no-such-model")
    monkeypatch.setattr(run_finetuning, "find_model", lambda *_, **__: (folder, "wanted nobody/no-such-model"))


def test_a_model_tuned_from_the_fallback_replaces_one_from_the_configured_base_only_by_force(
    chain, installed, monkeypatch, capsys
):
    fallback_to(monkeypatch, chain.base)
    arguments = ["--data-dir", chain.data, "--model-dir", installed, "--batch-size", 8, "--max-steps", 1]
    before = snapshot(installed)
    assert exit_status(run_finetuning.main, arguments) == 2
    assert "--force" in error_line(capsys.readouterr().err)
    assert snapshot(installed) == before

    assert exit_status(run_finetuning.main, [*arguments, "--force"]) == 0
    told = evaluation_of(installed)["base"]
    assert told == {"wanted": "nobody/no-such-model", "used": "packaged", "note": "wanted nobody/no-such-model"}
    assert "wanted nobody/no-such-model" in (installed / "README.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert exit_status(run_finetuning.main, arguments) == 0, "the fallback may replace itself"
    assert "wanted nobody/no-such-model" in capsys.readouterr().err


def test_the_model_before_is_kept_beside_the_new_one_and_only_that(chain, installed):
    before = snapshot(installed)
    assert train(chain.data, installed, chain.base) == 0
    assert snapshot(config.previous(installed)) == before
    assert {path.name for path in installed.parent.iterdir()} == {"tuned", "tuned.previous"}


def test_a_replaced_folder_keeps_one_predecessor_and_a_failed_block_changes_nothing(tmp_path):
    for number in (1, 2, 3):
        with config.replacing(tmp_path / "made") as temporary:
            temporary.mkdir()
            (temporary / "number").write_text(str(number), encoding="utf-8")
    with pytest.raises(ZeroDivisionError), config.replacing(tmp_path / "made") as temporary:
        temporary.mkdir()
        raise ZeroDivisionError
    numbers = {path.name: (path / "number").read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert numbers == {"made": "3", "made.previous": "2"}


def test_a_swap_cut_in_half_is_undone_by_the_next_run(chain, installed, capsys):
    before = snapshot(installed)
    installed.rename(config.previous(installed))
    arguments = ["--data-dir", chain.data, "--model-dir", installed, "--base-model", chain.base, "--evaluate-only"]
    assert exit_status(run_finetuning.main, arguments) == 0
    assert snapshot(installed) == before


def test_a_save_whose_onnx_form_disagrees_leaves_the_old_model(chain, installed, monkeypatch, capsys):
    before = snapshot(installed)
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, *more: encode(self, texts, *more)[:, ::-1])
    assert train(chain.data, installed, chain.base) == 2
    assert "ONNX and PyTorch disagree" in error_line(capsys.readouterr().err)
    assert snapshot(installed) == before


def test_a_model_whose_weights_are_no_numbers_is_never_saved(chain, installed):
    import torch

    before = snapshot(installed.parent)
    model = load_model(chain.base, "cpu")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    evaluation = {"base": {"note": None}, "comparison": {"queries": 0, "verdict": "unknown"}}
    with pytest.raises(UserError):
        run_finetuning.save_model(model, installed, evaluation, TEXTS)
    assert snapshot(installed.parent) == before


def kill_after_a_checkpoint(chain, model_dir: Path, data: Path | None = None) -> None:
    arguments = [
        "--data-dir",
        data or chain.data,
        "--model-dir",
        model_dir,
        "--base-model",
        chain.base,
        "--batch-size",
        8,
    ]
    process = start_script("run_finetuning.py", *arguments, "--max-steps", 120)
    folder = run_finetuning.workspace(model_dir)
    reached = wait_until(lambda: list(folder.glob(f"*/{run_finetuning.COMPLETE}")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert reached and process.returncode == -signal.SIGKILL


def test_training_that_is_killed_leaves_the_old_model_and_the_next_run_goes_on(
    chain, unjudged, installed, tmp_path, capsys
):
    before = snapshot(installed)
    kill_after_a_checkpoint(chain, installed, unjudged)
    assert snapshot(installed) == before
    half = run_finetuning.workspace(installed) / "checkpoint-119"  # as a kill in the middle of writing leaves it
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert train(unjudged, installed, chain.base, "--max-steps", 120, "--force") == 0
    printed = capsys.readouterr()
    assert re.search(r"going on after step (30|60|90) of 120", printed.err) and "going on" not in printed.out
    assert snapshot(config.previous(installed)) == before
    assert {path.name for path in installed.parent.iterdir()} == {"tuned", "tuned.previous"}
    assert train(unjudged, tmp_path / "straight", chain.base, "--max-steps", 120) == 0
    folders = (installed, tmp_path / "straight", chain.base)
    gone_on, straight, base = (load_model(folder, "cpu").encode(TEXTS) for folder in folders)
    assert np.allclose(gone_on, straight, atol=1e-4), "going on ends where an undisturbed run ends"
    assert not np.allclose(gone_on, base, atol=1e-2)


def test_a_damaged_checkpoint_is_not_gone_on_with(chain, installed, capsys):
    kill_after_a_checkpoint(chain, installed)
    for path in run_finetuning.workspace(installed).glob("checkpoint-*/optimizer.pt"):
        path.write_bytes(path.read_bytes()[:-7])
    assert train(chain.data, installed, chain.base, "--max-steps", 120, "--force") == 0
    assert "going on" not in capsys.readouterr().out
    assert not run_finetuning.workspace(installed).exists()


@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooling/config.json", run_finetuning.COMPLETE])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
def test_a_checkpoint_is_complete_when_its_files_are_as_they_were_written(tmp_path, name, damage):
    older, newer = (tmp_path / f"checkpoint-{step}" for step in (90, 120))
    for checkpoint in (older, newer):
        (checkpoint / "1_Pooling").mkdir(parents=True)
        for file in ("model.safetensors", "1_Pooling/config.json"):
            (checkpoint / file).write_bytes(b"weights")
        (checkpoint / run_finetuning.COMPLETE).write_text(run_finetuning.checksums_of(checkpoint), encoding="utf-8")
    assert run_finetuning.last_checkpoint(tmp_path) == newer
    damage(newer / name)
    assert run_finetuning.last_checkpoint(tmp_path) == older
    damage(older / name)
    assert run_finetuning.last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", '{"identity": 3}'])
def test_a_damaged_note_of_an_interrupted_training_starts_it_over(tmp_path, content, monkeypatch):
    monkeypatch.setattr(run_finetuning, "is_complete", lambda checkpoint: True)
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    assert run_finetuning.claim_workspace(tmp_path, "identity", fresh=False) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("more", "said"), [(["--fresh"], "starting over"), (["--seed", "7"], "other data or settings")]
)
def test_a_killed_training_is_not_gone_on_with_when_told_so_or_when_it_was_another(
    chain, installed, capsys, more, said
):
    kill_after_a_checkpoint(chain, installed)
    assert train(chain.data, installed, chain.base, "--force", *more) == 0
    assert said in capsys.readouterr().err
    assert not run_finetuning.workspace(installed).exists()


@pytest.mark.parametrize("more", [["--evaluate-only"], ["--questions", "queries.txt"]])
def test_a_model_that_is_not_there_yet_is_one_error_with_the_command_that_makes_it(chain, tmp_path, capsys, more):
    (tmp_path / "queries.txt").write_text("gece yedeği\n", encoding="utf-8")
    more = [str(tmp_path / word) if word.endswith(".txt") else word for word in more]
    documents = ["--documents-root", chain.documents, "--documents", "**/*.md", "--data-dir", chain.data]
    arguments = [*more, *documents, "--model-dir", tmp_path / "model", "--base-model", chain.base]
    assert exit_status(run_finetuning.main, arguments) == 2
    line = error_line(capsys.readouterr().err)
    assert str(tmp_path / "model") in line and "run python run_finetuning.py" in line
    assert exit_status(generate_embeddings.main, [*documents[:4], "--model", tmp_path / "model"]) == 2
    assert "run python run_finetuning.py" in error_line(capsys.readouterr().err)


def test_one_pair_and_one_epoch_are_trained_on_and_none_at_all_is_one_error(
    chain, unjudged, tmp_path, monkeypatch, capsys
):
    pair = Pair("the anchor", "the positive", "the negative", "heading", "a.md")
    write_tsv(unjudged / "training_data.tsv", [pair], Pair._fields)
    assert train(unjudged, tmp_path / "model", chain.base, "--epochs", 1, "--learning-rate", 0.01) == 0
    assert "no two pairs may share a batch" in capsys.readouterr().err
    weights, before = (load_model(folder, "cpu").state_dict() for folder in (tmp_path / "model", chain.base))
    assert any(not torch.equal(weights[name], before[name]) for name in before), "the only step is a step"
    monkeypatch.setattr(config, "MAX_UNLABELLED_STEPS", 0)
    assert train(unjudged, tmp_path / "other", chain.base, "--fresh") == 2
    assert "MAX_UNLABELLED_STEPS" in error_line(capsys.readouterr().err)
    monkeypatch.setattr(config, "MAX_UNLABELLED_STEPS", -1)
    assert train(unjudged, tmp_path / "other", chain.base) == 2
    assert "config.MAX_UNLABELLED_STEPS is -1" in error_line(capsys.readouterr().err)


def test_the_next_command_names_the_documents_that_the_pairs_were_made_of_and_the_model_folder_does_not(chain):
    told = re.search(r"next: python generate_embeddings\.py (.*)", chain.printed)[1]
    documents = ["--documents-root", str(chain.documents.resolve()), "--documents", "**/*.md"]
    assert shlex.split(told) == [*documents, "--model", str(chain.model)]
    for name in ("evaluation.json", "README.md", "report.html"):
        assert str(chain.documents) not in (chain.model / name).read_text(encoding="utf-8")


def test_training_and_held_out_data_of_two_runs_are_refused(chain, tmp_path, capsys):
    shutil.copytree(chain.data, tmp_path / "data")
    pairs = read_pairs(chain.data)
    of_held_out = pairs[0]._replace(source_file=read_queries(chain.data)[0].source_file)
    write_tsv(tmp_path / "data" / "training_data.tsv", [*pairs, of_held_out], Pair._fields)
    assert train(tmp_path / "data", tmp_path / "model", chain.base) == 2
    assert "run prepare_finetuning_data.py again" in error_line(capsys.readouterr().err)
    assert not (tmp_path / "model").exists()


def test_a_table_of_empty_lines_has_no_rows(unjudged, chain, tmp_path, capsys):
    path = unjudged / "training_data.tsv"
    path.write_text(path.read_text(encoding="utf-8").split("\n")[0] + "\n\n", encoding="utf-8")
    assert train(unjudged, tmp_path / "model", chain.base) == 2
    assert f"{path} has no rows" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("rows", [[[7]], [[1, 2, 3]], [[1, 2], [3, 4], [5]]])
def test_two_processes_have_as_many_pairs_of_each_batch_and_at_least_one(monkeypatch, rows):
    monkeypatch.setenv("WORLD_SIZE", "2")
    dealt = run_finetuning.dealt_out(rows)
    assert len(dealt) == 2 * len(rows)
    for own, first, second in zip(rows, dealt[::2], dealt[1::2], strict=True):
        assert len(first) == len(second) > 0 and {*first, *second} <= {*own}


def test_a_longer_time_limit_plans_an_interrupted_training_anew(chain, monkeypatch):
    options = run_finetuning.build_parser().parse_args(["--data-dir", str(chain.data)])
    before = run_finetuning.run_identity(options, chain.base)
    assert run_finetuning.run_identity(options, chain.base) == before
    monkeypatch.setattr(config, "MAX_TRAINING_MINUTES", 600)
    assert run_finetuning.run_identity(options, chain.base) != before


def test_a_base_in_the_place_of_the_model_or_of_its_predecessor_is_refused(chain, installed, monkeypatch, capsys):
    shutil.copytree(installed, installed.with_name(f"{installed.name}.previous"))
    before = snapshot(installed.parent)
    for base in (installed, f"{installed}.previous"):
        assert train(chain.data, installed, base) == 2
        line = error_line(capsys.readouterr().err)
        assert f"the base model {base} is" in line and "--base-model" in line
    monkeypatch.setattr(config, "BASE_MODEL", str(installed))
    assert exit_status(run_finetuning.main, ["--data-dir", chain.data, "--model-dir", installed]) == 2
    assert "the base model" in error_line(capsys.readouterr().err)
    assert snapshot(installed.parent) == before


def test_a_model_that_does_not_tell_its_base_is_compared_with_a_named_one_alone(chain, installed, capsys):
    path = installed / "evaluation.json"
    path.write_text(path.read_text(encoding="utf-8")[:200], encoding="utf-8")
    arguments = ["--data-dir", chain.data, "--model-dir", installed, "--evaluate-only"]
    assert exit_status(run_finetuning.main, arguments) == 2
    assert f"{path} does not tell" in (line := error_line(capsys.readouterr().err)) and "--base-model" in line
    assert exit_status(run_finetuning.main, [*arguments, "--base-model", chain.base]) == 0


def test_two_processes_train_one_model_and_the_first_writes_it(chain, tmp_path):
    arguments = [REPOSITORY / "run_finetuning.py", "--data-dir", chain.data, "--model-dir", tmp_path / "model"]
    # Of this corpus no batch of 32 is full, since few pairs may stand together; they are trained on all the same.
    arguments += ["--base-model", chain.base, "--batch-size", 16, "--max-steps", 4]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("VERDICT") == 1
    assert "2 x cpu" in evaluation_of(tmp_path / "model")["machine"]
    assert evaluation_of(tmp_path / "model")["history"][-1]["step"] == 4
    assert_same_embeddings(tmp_path / "model", TEXTS)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


# ------------------------------------------------------------------------------------------------- batches


def test_no_batch_holds_two_pairs_of_one_section_template_or_near_copy(chain):
    words = ["".join(letters) for letters in itertools.product("abcd", "eiou", "klmn")]
    copy = " ".join(words)
    pairs = [Pair(f"anchor {word}", f"{word} is told", "", "x", f"{word}.md", f"Plan > {word}") for word in words]
    pairs += [Pair(f"a{i}", f"p{i}", "", "x", "one.md", "One > Section") for i in range(5)]
    pairs += [Pair(f"b{i}", f"q{i}", "", "x", f"t{i}.md", f"Sprint {i} > Results of sprint {i}") for i in range(5)]
    pairs += [Pair(f"c{i}", f"{copy} and ending {i}", "", "x", f"n{i}.md", f"Copy > Of {words[i]}") for i in range(5)]
    keys, rows = run_finetuning.apart_keys(pairs), list(range(len(pairs)))
    plan = run_finetuning.plan_batches(rows, keys, 8, 30, 1)
    assert [len(batch) for batch in plan] == [8] * 30
    for batch in plan:
        kinds = [pairs[row].anchor[0] for row in batch if len(pairs[row].anchor) == 2]
        assert len(kinds) == len(set(kinds))
    assert {row for batch in plan for row in batch} == set(rows)
    assert plan == run_finetuning.plan_batches(rows, keys, 8, 30, 1)
    assert plan != run_finetuning.plan_batches(rows, keys, 8, 30, 2)


def test_pairs_that_all_share_a_section_still_make_batches():
    keys = [frozenset({"section"})] * 5
    assert [len(batch) for batch in run_finetuning.plan_batches(list(range(5)), keys, 4, 3, 1)] == [1, 1, 1]


def test_labelled_questions_are_trained_on_more_often_and_without_the_limit():
    kinds = ["question", "suggested"] + ["heading"] * 10
    pairs = [Pair(f"a{i}", f"p{i}", "", kind, "a.md") for i, kind in enumerate(kinds)]
    times = Counter(run_finetuning.plan_rows(pairs, 3, 4, 15, 1))
    assert times[0] == times[1] == 12
    assert sum(times[row] for row in range(2, 12)) == 15 and {times[row] for row in range(2, 12)} == {1, 2}
    assert Counter(run_finetuning.plan_rows(pairs, 3, 4, 1000, 1))[5] == 3


# ------------------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "0"),
        ("--batch-size", "1"),
        ("--batch-size", "0"),
        ("--max-steps", "-1"),
        ("--learning-rate", "-1"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "inf"),
    ],
)
def test_an_option_out_of_range_is_one_line(chain, tmp_path, capsys, option, value):
    assert train(chain.data, tmp_path / "model", chain.base, f"{option}={value}") == 2
    assert option in error_line(capsys.readouterr().err)
    assert not (tmp_path / "model").exists()


def test_data_that_is_missing_or_does_not_belong_together_is_one_line(chain, tmp_path, capsys):
    assert train(tmp_path / "none", tmp_path / "model", chain.base) == 2
    assert "prepare_finetuning_data.py" in error_line(capsys.readouterr().err)
    data = shutil.copytree(chain.data, tmp_path / "data")
    write_tsv(data / "corpus.tsv", [CorpusPassage("other text", "a.md")], CorpusPassage._fields)
    assert train(data, tmp_path / "model", chain.base) == 2
    assert "corpus.tsv" in error_line(capsys.readouterr().err)


# ---------------------------------------------------------------------------------------------- the verdict


def test_gains_of_known_ranks():
    table = gains(np.array([1, 2, 3, 10, 0]))
    assert table["nDCG@10"] == pytest.approx([1, 1 / np.log2(3), 0.5, 1 / np.log2(11), 0])
    assert table["MRR@10"] == pytest.approx([1, 0.5, 1 / 3, 0.1, 0])
    assert table["Recall@10"].tolist() == [1, 1, 1, 1, 0]


def test_where_two_models_find_the_same_no_number_of_queries_is_said_to_tell_them_apart(capsys):
    ranks = np.array([1, 0] * 40)
    result = compare(queries_of(80), ranks, ranks, False, 1)
    assert result["verdict"] == "unchanged" and result["queries_needed"] is None
    skewed = compare(queries_of(30), np.array([3] * 25 + [1, *[5] * 4]), np.array([2] * 25 + [0, *[5] * 4]), False, 1)
    assert skewed["verdict"] == "unchanged" and skewed["queries_needed"] is None
    ranks = np.arange(100) % 10 + 1
    assert compare(queries_of(100), ranks, ranks[::-1], False, 1)["queries_needed"] is None
    run_finetuning.print_comparison(result)
    assert "would" not in capsys.readouterr().out


def test_the_confidence_interval_holds_the_mean_and_narrows_with_more_queries():
    rng = np.random.default_rng(0)
    few, many = rng.normal(0.1, 0.3, 50), rng.normal(0.1, 0.3, 5000)
    low, high = confidence_interval(few, 1)
    assert low < few.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * few.std() / np.sqrt(50), rel=0.1)
    assert np.subtract(*confidence_interval(many, 1)[::-1]) < (high - low) / 5
    assert confidence_interval(few, 1) == (low, high)
    assert confidence_interval(np.zeros(9), 1) == (0.0, 0.0)


def queries_of(count: int) -> list[Query]:
    return [Query(f"query {i}", f"answer {i}", ("heading", "term")[i % 2], "a.md") for i in range(count)]


@pytest.mark.parametrize(
    ("base", "tuned", "kept_base", "verdict"),
    [
        ([2] * 40, [1] * 40, False, "improved"),
        ([1] * 40, [2] * 40, False, "worse"),
        ([1, 2] * 20, [2, 1] * 20, False, "unchanged"),
        ([0] * 40, [0] * 40, False, "unchanged"),
        ([1] * 40, [1] * 40, True, "kept-base"),
    ],
)
def test_the_verdict_on_known_ranks(base, tuned, kept_base, verdict):
    result = compare(queries_of(40), np.array(base), np.array(tuned), kept_base, 1)
    assert result["verdict"] == verdict
    before, after = gains(np.array(base))["nDCG@10"], gains(np.array(tuned))["nDCG@10"]
    assert result["difference"] == pytest.approx(after.mean() - before.mean())
    assert (result["wins"], result["losses"]) == ((after > before).sum(), (after < before).sum())
    assert result["nDCG@10_by_kind"]["term"] == {
        "queries": 20,
        "base": pytest.approx(before[1::2].mean()),
        "fine_tuned": pytest.approx(after[1::2].mean()),
    }


def test_the_ranks_of_a_model_are_those_of_its_cosines(chain):
    corpus = read_corpus(chain.data)[:20]
    queries = [Query(row.passage[:40], row.passage, "sentence", row.source_file) for row in corpus[:12]]
    model = load_model(chain.base, "cpu")
    passages, asked = (
        model.encode(texts, normalize_embeddings=True)
        for texts in ([row.passage for row in corpus], [query.query for query in queries])
    )
    scores = asked @ passages.T
    wanted = [int((scores[i] >= scores[i, i]).sum()) for i in range(len(queries))]
    held_out = HeldOut(queries, [row.passage for row in corpus])
    ranks = held_out.ranks(held_out.similarities(model))
    assert ranks.tolist() == [rank if rank <= 10 else 0 for rank in wanted]


def test_a_part_of_the_held_out_queries_keeps_their_answers_among_as_many_passages_as_asked():
    queries = queries_of(9)
    corpus = [f"answer {i}" for i in range(9)] + [f"other {i}" for i in range(50)]
    deciding, choosing = queries[run_finetuning.DECIDING], queries[run_finetuning.CHOOSING]
    assert len(deciding) == 5 and len(choosing) == 4 and not set(deciding) & set(choosing)
    for part, size in ((HeldOut(queries, corpus).part(choosing, 20, 1), 20), (HeldOut(queries, corpus), 59)):
        assert len(part.passages) == size
        assert [part.passages[place] for (place,) in part.answers] == [query.positive for query in part.queries]


def judged_models(monkeypatch, chain, tmp_path, before: float, after: float, looks: int = 2) -> Path:
    """Data with 80 held-out queries whose answers the base finds with chance `before`, a tuned model with `after`.

    looks: at the watched queries, one for each of train()'s steps.
    """
    data = shutil.copytree(chain.data, tmp_path / "data")
    corpus = [CorpusPassage(f"answer {i}", "a.md") for i in range(80)]
    write_tsv(data / "corpus.tsv", corpus, CorpusPassage._fields)
    write_tsv(data / "evaluation_data.tsv", queries_of(80), Query._fields)
    chances = iter([before, *[before] * looks, *[after] * 20])

    def similarities(held_out, model):
        scores = np.random.default_rng(1).random((len(held_out.queries), len(held_out.passages))).astype(np.float32)
        found = np.random.default_rng(2).random(len(held_out.queries)) < next(chances)
        scores[np.arange(len(found)), np.ravel(held_out.answers)] = np.where(found, 2.0, -1.0)
        return scores

    monkeypatch.setattr(HeldOut, "similarities", similarities)
    monkeypatch.setattr(run_finetuning, "choose_weights", lambda *_: (1.0, {}))
    monkeypatch.setattr(run_finetuning, "spread_out", lambda model, judged, *_: (judged.similarities(model), False))
    return data


def test_a_model_that_searches_worse_than_the_base_is_not_shipped(chain, tmp_path, monkeypatch, capsys):
    data = judged_models(monkeypatch, chain, tmp_path, 0.9, 0.2)
    assert train(data, tmp_path / "model", chain.base) == 0
    printed = capsys.readouterr().out
    assert "the base is kept" in printed and VERDICT.search(printed.splitlines()[-1])[1] == "kept-base"
    texts = ["Gece debisi yükselirse alarm verilir.", "KM-2.1"]
    kept, base = (load_model(folder, "cpu").encode(texts) for folder in (tmp_path / "model", chain.base))
    assert np.array_equal(kept, base)
    told = evaluation_of(tmp_path / "model")
    assert told["alpha"] == 0 and not told["spread"] and told["rejected"]["verdict"] == "worse"


def test_the_time_of_a_second_search_is_kept_free_only_where_the_model_may_yet_step_back(
    chain, tmp_path, monkeypatch, capsys
):
    judged = HeldOut(queries_of(80), [f"answer {i}" for i in range(80)])
    model = load_model(chain.base, "cpu")
    seconds = []
    for share in (0.3, 0.7):
        clock = iter([0.0, 10.0])
        monkeypatch.setattr(run_finetuning.time, "perf_counter", lambda clock=clock: next(clock))
        monkeypatch.setattr(run_finetuning, "language_share", lambda judged, share=share: share)
        monkeypatch.setattr(HeldOut, "similarities", lambda held_out, model: np.eye(80, dtype=np.float32))
        seconds.append(run_finetuning.search_with_base(model, judged, judged, tmp_path / "none"))
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(run_finetuning.time, "perf_counter", lambda: next(clock))
    seconds.append(run_finetuning.search_with_base(model, judged, judged, chain.model))  # compared on other queries
    capsys.readouterr()
    once = 12 * (3 + run_finetuning.SPREAD_PAIRS / 80)  # the corpus and twice the watched passages, which are the same
    assert seconds == pytest.approx([2 * once + 12 * 9, once + 12 * 9, once + 12 * 10])


@pytest.mark.parametrize(
    ("before", "after", "kind", "share", "reason", "powers"),
    [
        (0.3, 0.9, "heading", 0.3, None, [0.5]),
        (0.3, 0.9, "heading", 0.7, "known language", [0.125]),
        (0.3, 0.9, "question", 0.7, None, [0.5]),
        (0.3, 0.9, "suggested", 0.7, "known language", [0.125]),
        (0.5, 0.52, "question", 0.3, "no clear gain", [0.5, 0.25]),
    ],
)
def test_the_model_stays_near_a_base_that_knows_the_language_and_where_no_gain_is_clear(
    chain, tmp_path, monkeypatch, capsys, before, after, kind, share, reason, powers
):
    data = judged_models(monkeypatch, chain, tmp_path, before, after)
    used = []

    def spread_out(model, judged, watched, pairs, power):
        used.append(power)
        return judged.similarities(model), False

    monkeypatch.setattr(run_finetuning, "spread_out", spread_out)
    write_tsv(data / "evaluation_data.tsv", [one._replace(strategy=kind) for one in queries_of(80)], Query._fields)
    monkeypatch.setattr(run_finetuning, "language_share", lambda judged: share)
    assert train(data, tmp_path / "model", chain.base) == 0
    verdict = VERDICT.search(capsys.readouterr().out.splitlines()[-1])[1]
    assert verdict == ("improved" if after == 0.9 else "unchanged")
    told = evaluation_of(tmp_path / "model")
    assert used == powers and told["stepped_back"] == reason
    assert told["alpha"] == (run_finetuning.CAUTIOUS_ALPHA if reason else 1)
    assert_same_embeddings(tmp_path / "model", TEXTS)
    report = (tmp_path / "model" / "report.html").read_text(encoding="utf-8")
    assert ("the base is to stay" in report) == bool(reason)


def test_the_model_steps_back_before_it_is_rejected_where_it_clearly_finds_less(chain, tmp_path, monkeypatch):
    data, used = judged_models(monkeypatch, chain, tmp_path, 0.9, 0.1), []

    def spread_out(model, judged, watched, pairs, power):
        used.append(power)
        return judged.similarities(model), False

    monkeypatch.setattr(run_finetuning, "spread_out", spread_out)
    monkeypatch.setattr(run_finetuning, "language_share", lambda judged: 0.3)
    assert train(data, tmp_path / "model", chain.base) == 0
    assert used == [0.5, 0.25] and evaluation_of(tmp_path / "model")["comparison"]["verdict"] == "kept-base"


def test_stepping_back_mixes_the_weights_with_those_of_the_base(tiny_model):
    base, model = load_model(tiny_model, "cpu"), load_model(tiny_model, "cpu")
    for weights in model.parameters():
        weights.data += 1
    assert run_finetuning.step_back(model, tiny_model, 1.0) == run_finetuning.CAUTIOUS_ALPHA
    for own, before in zip(model.parameters(), base.parameters(), strict=True):
        assert torch.allclose(own, before + 0.5, atol=1e-5)
    assert run_finetuning.step_back(model, tiny_model, 0.0) == 0


def test_a_damaged_installed_model_is_replaced(chain, tmp_path, monkeypatch):
    installed = shutil.copytree(chain.model, tmp_path / "model")
    with (installed / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    data = judged_models(monkeypatch, chain, tmp_path, 0.2, 0.9)  # other queries than it was judged on
    assert train(data, installed, chain.base) == 0
    assert_same_embeddings(installed, TEXTS)


def test_a_model_worse_than_the_installed_one_replaces_it_only_by_force(chain, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    for chance, more, replaced in ((0.9, [], True), (0.6, [], False), (0.6, ["--force"], True), (0.8, [], True)):
        with monkeypatch.context() as patch:
            shutil.rmtree(tmp_path / "data", ignore_errors=True)
            data = judged_models(patch, chain, tmp_path, 0.2, chance, looks=0 if more else 2)
            before = snapshot(model) if model.exists() else {}
            assert train(data, model, chain.base, *more) == 0
        printed, told = capsys.readouterr()
        assert ("not saved" in printed) != replaced and (snapshot(model) != before) == replaced, chance
        assert ("going on after step" in told) == bool(more)  # what was not saved is not trained again
        assert run_finetuning.workspace(model).exists() != replaced
        assert VERDICT.search(printed.splitlines()[-1])[1] == "improved"


def test_the_comparison_shows_kinds_languages_modes_and_the_biggest_changes(chain, tmp_path, monkeypatch, capsys):
    data = judged_models(monkeypatch, chain, tmp_path, 0.2, 0.9)
    assert train(data, tmp_path / "model", chain.base) == 0
    printed = capsys.readouterr().out
    for words in ("kind ", "language ", "(keyword)", "(hybrid)", "gained most: 'query", "rank beyond 10 -> 1"):
        assert words in printed, words
    evaluation = evaluation_of(tmp_path / "model")
    assert set(evaluation["comparison"]["nDCG@10_by_mode"]) == {"keyword", "hybrid"}
    assert 0 <= evaluation["search"]["semantic_weight"] <= 1
    assert len(evaluation["held_out"]["ranks"]) == 80


def test_too_few_queries_say_so_with_the_number_needed(capsys):
    result = compare(queries_of(8), np.zeros(8, int), np.ones(8, int), False, 1)
    run_finetuning.print_comparison(result)
    printed = capsys.readouterr().out.splitlines()
    assert result["verdict"] == "unknown"
    assert "8 queries can not tell" in printed[-2] and "about 30 would" in printed[-2]
    assert printed[-1].startswith("VERDICT unknown nDCG@10 0.000 -> 1.000")


def test_meaning_weighs_by_what_the_base_finds_of_what_words_find_and_little_in_a_foreign_language(monkeypatch):
    size = 80
    corpus = [f"answer {i}" for i in range(size)]

    def scores(found: range) -> np.ndarray:
        return np.where(np.isin(np.arange(size), found)[:, None], np.eye(size), 1 - np.eye(size))

    def weight(kinds: list[str], by_base: range, by_words: range, pieces: float = 2.0) -> float:
        queries = [one._replace(strategy=kind) for one, kind in zip(queries_of(size), kinds, strict=True)]
        monkeypatch.setattr(HeldOut, "keyword_matrix", lambda self: scores(by_words))
        judged = HeldOut(queries, corpus)
        judged.base, judged.pieces = scores(by_base), pieces
        return run_finetuning.fitted_weight(run_finetuning.language_share(judged), pieces)

    sentences, half = ["sentence"] * size, range(40)
    weights = [weight(sentences, range(count), half) for count in (0, 10, 20, 40, 60)]
    assert weights == pytest.approx([0.1, 0.1, 0.1, 0.5, 0.5], abs=0.006)
    assert weight(["sentence"] * 40 + ["term"] * 40, range(20, 80), range(80)) == 0.1
    whole_words = [weight(sentences, range(count), half, pieces=1.2) for count in (10, 20, 24, 40)]
    assert whole_words == pytest.approx([0.1, 0.633, 0.633, 0.85], abs=0.006)
    for kinds, by_words in ((sentences, range(0)), (["term"] * size, half)):
        assert weight(kinds, half, by_words) == run_finetuning.DEFAULT_SEMANTIC_WEIGHT
    nothing = HeldOut([], corpus)
    nothing.base = np.zeros((0, size))
    monkeypatch.undo()
    assert run_finetuning.language_share(nothing) is None


def test_a_vocabulary_leaves_the_words_of_its_own_language_whole():
    backend = load_tokenizer(packaged_model())[0]
    model = argparse.Namespace(tokenizer=argparse.Namespace(backend_tokenizer=backend))
    english = ["Each file in the folder needs to follow the pattern.", "Restart the server."]
    turkish = ["Görevlerin takibi haftalık olarak yapılır.", "Sunucuyu yeniden başlatın."]
    pieces, more = (run_finetuning.pieces_per_word(model, texts) for texts in (english, turkish))
    assert pieces < 1.3 < run_finetuning.WHOLE_WORDS < 1.9 < more


def test_how_well_the_base_knows_the_language_is_told_by_the_main_one(monkeypatch):
    texts = [f"the valve {i} is opened" if i % 4 == 1 else f"{i} numaralı vana açılır ve kapanır" for i in range(80)]
    queries = [Query(f"query {i}", text, "sentence", "a.md") for i, text in enumerate(texts)]
    judged = HeldOut(queries, texts)
    english = np.array([text.startswith("the") for text in texts])
    monkeypatch.setattr(HeldOut, "keyword_matrix", lambda self: np.eye(80))
    for found, share in ((english, 0), (~english, 1)):
        judged.base = np.where(found[:, None], np.eye(80), 1 - np.eye(80))
        assert run_finetuning.language_share(judged) == share


def test_an_answer_that_is_not_in_the_corpus_is_an_error():
    with pytest.raises(UserError, match=r"corpus\.tsv"):
        HeldOut(queries_of(2), ["answer 0"])


def test_the_schedule_is_cut_to_the_time_that_is_left(capsys):
    options = argparse.Namespace(max_steps=0, batch_size=10)
    assert run_finetuning.plan_steps(195, 1.0, 1000.0, options) == 20
    assert run_finetuning.plan_steps(195, 1.0, 7.5, options) == 7
    assert "7 steps of 20 (config.MAX_TRAINING_MINUTES)" in capsys.readouterr().err
    assert run_finetuning.plan_steps(195, 1.0, -5.0, options) == 1
    assert run_finetuning.plan_steps(195, 1.0, 1000.0, argparse.Namespace(max_steps=3, batch_size=10)) == 3


@pytest.mark.parametrize("watching", [True, False])
def test_a_training_that_turns_out_slower_than_planned_ends_in_time(chain, tmp_path, monkeypatch, capsys, watching):
    data = shutil.copytree(chain.data, tmp_path / "data")
    if not watching:
        write_tsv(data / "evaluation_data.tsv", [], Query._fields)
    monkeypatch.setattr(config, "MAX_TRAINING_MINUTES", 0)
    monkeypatch.setattr(run_finetuning, "plan_steps", lambda *_: 30)
    assert train(data, tmp_path / "model", chain.base) == 0
    assert "the time is over after step 1 (config.MAX_TRAINING_MINUTES)" in capsys.readouterr().err
    told = evaluation_of(tmp_path / "model")
    assert told["steps"] == told["history"][-1]["step"] == 1
    assert_same_embeddings(tmp_path / "model", TEXTS)


def test_a_vocabulary_that_knows_turkish_letters_is_left_as_it_is(tiny_multilingual_model):
    model = run_finetuning.load_model(tiny_multilingual_model, "cpu")
    texts = [path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "tests/sample_project").rglob("*.md"))]
    assert run_finetuning.mend_tokenizer(model, texts) == []


@pytest.mark.parametrize("killed_after", [None, 1, 2, 3])
def test_a_later_checkpoint_is_kept_unless_it_is_clearly_worse(monkeypatch, tmp_path, killed_after):
    rng = np.random.default_rng(1)
    looks = [np.full(60, 0.3), np.full(60, 0.5), np.full(60, 0.5) + rng.normal(-0.005, 0.1, 60), np.full(60, 0.2)]
    told = iter(looks)
    monkeypatch.setattr(run_finetuning, "gains", lambda ranks: {"nDCG@10": next(told)})
    held_out = HeldOut(queries_of(2), [f"answer {i}" for i in range(2)])
    monkeypatch.setattr(held_out, "similarities", lambda model: np.zeros((2, 2)), raising=False)
    watch, preferred = run_finetuning.watcher(held_out, tmp_path / "best.json"), []
    for look in range(len(looks)):
        if look == killed_after:
            watch = run_finetuning.watcher(held_out, tmp_path / "best.json")
        preferred.append(watch(None, steps=30 * (look + 1))["preferred"])
    assert preferred == [30, 60, 90, 0]


def test_a_model_that_gives_every_text_the_same_vector_finds_nothing():
    held_out = HeldOut(queries_of(20), [f"answer {i}" for i in range(20)])
    assert not held_out.ranks(np.ones((20, 20))).any()
