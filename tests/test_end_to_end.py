"""The four scripts in order, as a person runs them on the sample project where the hub does not answer."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench_search import answers, ranks, read_questions

import config

ROOT = Path(__file__).parent.parent
QUESTIONS = read_questions(ROOT / "tests" / "sample_questions.jsonl")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # real training and embedding
SHORT = ("--max-steps", "8")
ALT_LAS = ROOT.parent / "shared" / "documents" / "alt_las"


def run(script: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """The sample project prepared, tuned for a few steps from the packaged model, and indexed."""
    folder = tmp_path_factory.mktemp("chain")
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "", "HF_HOME": str(folder / "home")}
    for script, *arguments in (
        ("prepare_finetuning_data.py", "--data-dir", folder / "data"),
        ("run_finetuning.py", "--data-dir", folder / "data", "--model-dir", folder / "model", *SHORT),
        ("generate_embeddings.py", "--model", folder / "model", "--index-dir", folder / "index"),
    ):
        finished = run(script, *arguments, **offline)
        assert finished.returncode == 0, finished.stderr
        (folder / f"{script}.out").write_text(finished.stdout, encoding="utf-8")
        (folder / f"{script}.err").write_text(finished.stderr, encoding="utf-8")
    return folder


def share_answered(index: Path, mode: str) -> float:
    found = answers(index, mode, QUESTIONS)
    assert [answer["query"] for answer in found] == [question["query"] for question in QUESTIONS]
    return sum(rank is not None for rank in ranks(found, QUESTIONS)) / len(QUESTIONS)


def test_the_verdict_is_the_last_line_and_is_in_evaluation_json(chain):
    last = (chain / "run_finetuning.py.out").read_text(encoding="utf-8").splitlines()[-1]
    pattern = (
        r"VERDICT (\S+) nDCG@10 (0\.\d{3}) -> (0\.\d{3}) \([+-]0\.\d{3}, 95% CI [+-]\S+\.\.[+-]\S+, (\d+) queries\)"
    )
    verdict, base, tuned, queries = re.fullmatch(pattern, last).groups()
    comparison = json.loads((chain / "model" / "evaluation.json").read_text(encoding="utf-8"))["comparison"]
    assert (comparison["verdict"], comparison["queries"]) == (verdict, int(queries))
    assert f"{comparison['base']['nDCG@10']:.3f}" == base
    assert f"{comparison['fine_tuned']['nDCG@10']:.3f}" == tuned


def test_the_stand_in_for_the_configured_base_is_named_on_the_screen_in_the_evaluation_and_in_the_card(chain):
    warnings = (chain / "run_finetuning.py.err").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in warnings if line.startswith("warning: ")]
    base = json.loads((chain / "model" / "evaluation.json").read_text(encoding="utf-8"))["base"]
    assert (base["wanted"], base["used"]) == (config.BASE_MODEL, "packaged")
    assert "Turkish" in line
    assert base["note"] == line.removeprefix("warning: ")
    assert base["note"] in (chain / "model" / "README.md").read_text(encoding="utf-8")


def test_hybrid_search_answers_most_questions_of_the_sample_and_more_than_meaning_alone(chain):
    hybrid = share_answered(chain / "index", "hybrid")
    assert hybrid >= 0.7
    assert hybrid >= share_answered(chain / "index", "semantic")


def test_keyword_and_task_search_answer_most_questions_of_the_sample(chain):
    assert share_answered(chain / "index", "keyword") >= 0.65
    assert share_answered(chain / "index", "task") >= 0.65


def test_the_tuned_model_loads_with_sentence_transformers_alone(chain):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(chain / "model"), device="cpu", local_files_only=True)
    assert model.max_seq_length == 256
    assert model.encode(["gece debisi"]).shape == (1, 384)


def test_a_letter_that_breaks_words_is_read_plainly_by_whatever_loads_the_model(chain):
    from sentence_transformers import SentenceTransformer

    from run_finetuning import Encoder

    assert json.loads((chain / "model" / "evaluation.json").read_text(encoding="utf-8"))["letters_read_plainly"] == [
        "ı"
    ]
    model = SentenceTransformer(str(chain / "model"), device="cpu", local_files_only=True)
    assert model.tokenizer.tokenize("kayıtlı") == model.tokenizer.tokenize("kayitli")
    texts = ["Basınç kaydı kapalı vanada alınır.", "kayıtlı", "Iğdır"]
    both = model.encode(texts, normalize_embeddings=True) * Encoder(chain / "model").encode(texts)
    assert both.sum(axis=1).min() > 0.9999


@pytest.mark.skipif(not ALT_LAS.is_dir(), reason="needs the ALT_LAS documents in ../shared/documents/alt_las")
def test_all_documents_of_a_real_project_can_be_prepared(tmp_path):
    finished = run(
        "prepare_finetuning_data.py", "--documents-root", ALT_LAS, "--documents", "**/*.md", "--data-dir", tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads((tmp_path / "data_report.json").read_text(encoding="utf-8"))
    assert report["documents"] == 525
    assert 9_000 <= report["passages"] <= 13_000
