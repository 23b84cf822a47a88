"""The options of the four scripts, and what they do when they are called wrongly."""

import os
import pty
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY, error_line, run_code, run_script

import config
from prepare_finetuning_data import read_corpus, read_pairs

DOCUMENTS = {"--documents-root": "DOCUMENTS_ROOT", "--documents": "TARGET_DOCUMENTS"}
OPTIONS = {
    "prepare_finetuning_data.py": DOCUMENTS
    | {"--data-dir": "FINE_TUNING_DATA_DIR", "--strategy": "PAIR_STRATEGIES", "--seed": "SEED"}
    | dict.fromkeys(["--report", "--suggest-questions", "--question-endpoint", "--question-model"]),
    "run_finetuning.py": DOCUMENTS
    | {
        "--data-dir": "FINE_TUNING_DATA_DIR",
        "--model-dir": "MODEL_NAME",
        "--base-model": "BASE_MODEL",
        "--loss": "LOSS",
        "--epochs": "EPOCHS",
        "--batch-size": "BATCH_SIZE",
        "--learning-rate": "LEARNING_RATE",
        "--max-steps": None,
        "--seed": "SEED",
        "--evaluate-only": None,
        "--questions": None,
        "--fresh": None,
        "--force": None,
    },
    "generate_embeddings.py": DOCUMENTS
    | {"--model": "MODEL_NAME", "--index-dir": "INDEX_DIR", "--check": None, "--restore": None, "--list-backups": None},
    "semantic_search.py": {"--mode": "SEARCH_MODE", "--top-k": "TOP_K", "--min-relevance": "MIN_RELEVANCE"}
    | {
        "--context": None,
        "--explain": None,
        "--compare": None,
        "--html": None,
        "--json": None,
        "--index-dir": "INDEX_DIR",
    },
}


@pytest.mark.parametrize("script", OPTIONS)
def test_help_names_every_option_with_its_setting_and_imports_nothing_heavy(script):
    code = (
        "import runpy, sys\nsys.argv[0] = sys.argv[1]\ndel sys.argv[1]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(REPOSITORY / script), "--help"],
        capture_output=True,
        encoding="utf-8",
        cwd=REPOSITORY,
    )
    assert done.returncode == 0
    options = dict(re.findall(r"^  (--[a-z-]+)(.*(?:\n   .*)*)", done.stdout, re.M))
    for option, setting in OPTIONS[script].items():
        assert option in options
        assert setting is None or (f"config.{setting}" in options[option] and hasattr(config, setting)), option
    assert not set(options) - OPTIONS[script].keys(), "options that are not in the contract"
    heavy = {"torch", "sentence_transformers", "transformers", "faiss", "onnxruntime", "datasets", "huggingface_hub"}
    assert not heavy & set(done.stderr.split())


@pytest.mark.parametrize("script", OPTIONS)
def test_wrong_usage_ends_with_exit_code_2_and_no_traceback(script):
    for arguments in (["--no-such-option"], ["--seed", "x"], ["--top-k"]):
        done = run_script(script, *arguments)
        assert done.returncode == 2
        assert done.stdout == "" and "Traceback" not in done.stderr
        assert "usage:" in done.stderr or (script == "semantic_search.py" and "is no option" in done.stderr)


def test_every_setting_of_config_is_read_by_a_script():
    sources = "".join((REPOSITORY / name).read_text(encoding="utf-8") for name in OPTIONS)
    text = (REPOSITORY / "config.py").read_text(encoding="utf-8").partition("nothing to edit below")[0]
    settings = set(re.findall(r"^([A-Z_]+) = ", text, re.M)) - {"BASE_DIR"}
    assert len(settings) > 20
    assert not {name for name in settings if f"config.{name}" not in sources}


def run_main(code: str, **environment) -> subprocess.CompletedProcess:
    return run_code(f"import config, os, signal, sys\ndef main():\n    {code}\nconfig.run(main)", **environment)


@pytest.mark.parametrize(
    ("code", "status", "line"),
    [
        ("return None", 0, ""),
        ("return 1", 1, ""),
        ("raise config.UserError('wrong, do this')", 2, "error: wrong, do this\n"),
        (
            "signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT)",
            130,
            "interrupted; what was there before is unchanged\n",
        ),
        (
            "raise OSError(28, 'No space left on device', 'x.tsv')",
            2,
            "error: x.tsv: No space left on device; make room",
        ),
    ],
)
def test_the_exit_code_tells_what_happened(code, status, line):
    done = run_main(code)
    assert done.returncode == status
    assert done.stderr.startswith(line) and (line or not done.stderr)


def test_a_mistake_of_the_program_shows_its_traceback():
    done = run_main("return {}['key']")
    assert done.returncode == 2 and "KeyError" in done.stderr, "1 would say that a search found nothing"


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_the_shell_closed_is_no_fault(redirection, tmp_path):
    script = f"'{sys.executable}' prepare_finetuning_data.py -q --data-dir '{tmp_path / 'data'}' {redirection}"
    done = subprocess.run(script, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr
    assert read_pairs(tmp_path / "data") and read_corpus(tmp_path / "data")


@pytest.mark.parametrize("encoding", ["cp1254", "iso-8859-9", "ascii", "cp1254:strict"])
def test_what_is_printed_into_a_pipe_is_utf8(encoding):
    code = "print('ş → ▲ 漏'); print('ş ▲', file=sys.stderr)"
    done = run_main(code, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ş → ▲ 漏\n", "ş ▲\n")


def test_what_a_terminal_can_not_show_is_replaced():
    ours, theirs = pty.openpty()
    code = "import config\nconfig.run(lambda: print('ç ▲'))"
    environment = os.environ | {"PYTHONIOENCODING": "cp1254"}
    done = subprocess.run([sys.executable, "-c", code], stdout=theirs, cwd=REPOSITORY, env=environment)
    os.close(theirs)
    assert done.returncode == 0 and os.read(ours, 100).split() == ["ç".encode("cp1254"), b"?"]
    os.close(ours)


def test_a_folder_that_may_not_be_written_is_one_line(project, tmp_path):
    (tmp_path / "data").write_text("a file stands in the way", encoding="utf-8")
    done = run_script(
        "prepare_finetuning_data.py",
        *("--documents-root", project, "--documents", "**/*.md", "--data-dir", tmp_path / "data"),
    )
    assert done.returncode == 2
    assert str(tmp_path / "data") in error_line(done.stderr)


def test_a_command_names_a_folder_that_config_does_not():
    usual = config.INDEX_DIR
    assert config.command_for("python search.py", "--index-dir", usual, usual) == "python search.py"
    told = config.command_for("python search.py", "--index-dir", "my index", usual)
    assert told == "python search.py --index-dir 'my index'"


def test_a_script_tells_the_next_one_where_it_wrote(tmp_path):
    done = run_script("prepare_finetuning_data.py", "--data-dir", tmp_path / "data")
    assert done.stdout.endswith(f"next: python run_finetuning.py --data-dir {tmp_path / 'data'}\n")
