"""Training, the verdict, and what is saved when things go right and wrong."""

import argparse
import hashlib
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, error_line, exit_status, start_script, wait_until

import config
import run_finetuning
from config import UserError
from prepare_finetuning_data import CorpusPassage, Pair, Query, read_corpus, write_tsv
from run_finetuning import Encoder, HeldOut, compare, confidence_interval, gains, load_model, model_fingerprint

VERDICT = re.compile(
    r"VERDICT (improved|unchanged|kept-base|worse) nDCG@10 ([\d.]+) -> ([\d.]+)"
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
    assert encoder.window == 128
    assert not list(folder.rglob("*.bin"))


def test_the_saved_model_gives_the_same_embeddings_with_sentence_transformers_and_without(chain):
    assert_same_embeddings(chain.model, TEXTS + [row.passage for row in read_corpus(chain.data)])


def test_a_model_of_the_multilingual_shape_is_tuned_and_saved_the_same_way(chain, tmp_path, tiny_multilingual_model):
    assert train(chain.data, tmp_path / "model", tiny_multilingual_model) == 0
    assert_same_embeddings(tmp_path / "model", TEXTS + [row.passage for row in read_corpus(chain.data)])
    modules = json.loads((tmp_path / "model" / "modules.json").read_text(encoding="utf-8"))
    assert len(modules) == 2, "no Normalize module is added"


def test_the_model_card_and_evaluation_json_tell_how_the_model_was_made(chain):
    evaluation = evaluation_of(chain.model)
    assert evaluation["base"] == {"wanted": str(chain.base), "used": str(chain.base), "note": None}
    assert evaluation["settings"]["batch_size"] == 8 and evaluation["settings"]["max_steps"] == 4
    assert evaluation["steps"] == 4 and evaluation["history"][-1]["step"] == 4
    assert {"loss", "nDCG@10"} <= evaluation["history"][-1].keys()
    assert evaluation["data"] == json.loads((chain.data / "data_report.json").read_text(encoding="utf-8"))
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


def test_the_same_seed_trains_the_same_weights(chain, tmp_path):
    for name in ("a", "b"):
        assert train(chain.data, tmp_path / name, chain.base) == 0
    assert model_fingerprint(tmp_path / "a") == model_fingerprint(tmp_path / "b")


def test_triplets_are_mined_where_the_pairs_have_no_negative(chain, tmp_path):
    assert train(chain.data, tmp_path / "model", chain.base, "--loss", "triplet") == 0
    assert evaluation_of(tmp_path / "model")["pairs"] > 0
    pairs = [Pair("the anchor", "the positive", "the negative", "heading", "a.md")]
    model = load_model(chain.base, "cpu")
    columns = run_finetuning.training_columns(pairs, "triplet", model)
    assert columns == {"anchor": ["the anchor"], "positive": ["the positive"], "negative": ["the negative"]}
    assert run_finetuning.training_columns(pairs, "mnrl", model) == columns
    assert list(run_finetuning.training_columns([pairs[0]._replace(negative=""), *pairs], "mnrl", model)) == [
        "anchor",
        "positive",
    ]


def test_a_mined_negative_stays_below_95_percent_of_its_positives_similarity(chain):
    from prepare_finetuning_data import read_pairs

    model = load_model(chain.base, "cpu")
    mined = run_finetuning.mine_negatives(read_pairs(chain.data), model)
    assert mined
    anchors, positives, negatives = (
        model.encode(list(column), normalize_embeddings=True) for column in zip(*mined, strict=True)
    )
    right, wrong = (anchors * positives).sum(axis=1), (anchors * negatives).sum(axis=1)
    assert (wrong <= 0.95 * right + 1e-4).all()


def test_data_without_held_out_queries_trains_and_says_that_the_verdict_is_unknown(chain, tmp_path, capsys):
    data = shutil.copytree(chain.data, tmp_path / "data")
    write_tsv(data / "evaluation_data.tsv", [], Query._fields)
    assert train(data, tmp_path / "model", chain.base, "--learning-rate", "0.001") == 0
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
    before = snapshot(installed.parent)
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, *more: encode(self, texts, *more)[:, ::-1])
    assert train(chain.data, installed, chain.base) == 2
    assert "ONNX and PyTorch disagree" in error_line(capsys.readouterr().err)
    assert snapshot(installed.parent) == before


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


def test_training_that_is_killed_leaves_the_old_model_and_the_next_run_works(chain, installed):
    before = snapshot(installed)
    workspace = installed.with_name(".tuned.training")
    arguments = ["--data-dir", chain.data, "--model-dir", installed, "--base-model", chain.base, "--batch-size", 2]
    process = start_script("run_finetuning.py", *arguments, "--max-steps", 5000)
    killed = wait_until(workspace.exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert killed and process.returncode == -signal.SIGKILL
    assert snapshot(installed) == before
    assert train(chain.data, installed, chain.base) == 0
    assert snapshot(config.previous(installed)) == before
    assert {path.name for path in installed.parent.iterdir()} == {"tuned", "tuned.previous"}


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
    wanted = [1 + int((scores[i] > scores[i, i]).sum()) for i in range(len(queries))]
    ranks = HeldOut(queries, corpus).ranks(model)
    assert ranks.tolist() == [rank if rank <= 10 else 0 for rank in wanted]


def test_the_queries_that_decide_are_not_those_that_choose_the_weights():
    queries = queries_of(9)
    corpus = [CorpusPassage(f"answer {i}", "a.md") for i in range(9)] + [
        CorpusPassage(f"other {i}", "b.md") for i in range(50)
    ]
    deciding, watched = HeldOut(queries, corpus).halves(20, 1)
    assert len(deciding.queries) == 5 and len(watched.queries) == 4
    assert not set(deciding.queries) & set(watched.queries)
    assert len(deciding.passages) == 59 and len(watched.passages) == 20
    for half in (deciding, watched):
        assert [half.passages[place] for place in half.answers] == [query.positive for query in half.queries]


def test_an_answer_that_is_not_in_the_corpus_is_an_error():
    with pytest.raises(UserError, match=r"corpus\.tsv"):
        HeldOut(queries_of(2), [CorpusPassage("answer 0", "a.md")])


def test_the_schedule_is_cut_to_the_time_that_is_left(capsys):
    options = argparse.Namespace(max_steps=0, batch_size=10, epochs=2)
    assert run_finetuning.plan_steps(95, 1.0, 1000.0, options) == 20
    assert run_finetuning.plan_steps(95, 1.0, 7.5, options) == 7
    assert "7 steps of 20 (config.MAX_TRAINING_MINUTES)" in capsys.readouterr().out
    assert run_finetuning.plan_steps(95, 1.0, -5.0, options) == 1
    assert run_finetuning.plan_steps(95, 1.0, 1000.0, argparse.Namespace(max_steps=3, batch_size=10, epochs=2)) == 3


def test_a_vocabulary_that_knows_turkish_letters_is_left_as_it_is(tiny_multilingual_model):
    model = run_finetuning.load_model(tiny_multilingual_model, "cpu")
    texts = [path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "tests/sample_project").rglob("*.md"))]
    assert run_finetuning.mend_tokenizer(model, texts) == []
