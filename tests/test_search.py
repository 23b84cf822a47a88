"""Searching: the answers, the command line, the prompt, and the functions that people import."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, error_line, exit_status, run_script, write_documents

import config
import generate_embeddings
import semantic_search
from run_finetuning import standard_scores
from semantic_search import share, split_needs

MODES = ["semantic", "keyword", "hybrid", "task"]
RESULT_KEYS = {
    *("rank", "score", "id", "source_file", "also_in"),
    *("heading", "chunk_index", "start_line", "end_line", "text"),
}


@pytest.fixture
def ask(chain, capsys):
    """Search the small project with the script's main; return the exit status and the results."""

    def run(query: str, mode: str = "hybrid", top_k: int = 5):
        arguments = ["--json", "--mode", mode, "--top-k", top_k, "--index-dir", chain.index, "--", query]
        status = exit_status(semantic_search.main, arguments)
        printed = capsys.readouterr()
        if status == 2:
            return status, error_line(printed.err)
        (line,) = printed.out.splitlines()
        answer = json.loads(line)
        assert answer.keys() == {"query", "mode", "results"} and (answer["query"], answer["mode"]) == (query, mode)
        return status, answer["results"]

    return run


def keys_of(results: list[dict]) -> list[tuple]:
    return [(result["source_file"], result["chunk_index"]) for result in results]


# --------------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("mode", MODES)
def test_json_answers_keep_their_contract(ask, chain, mode):
    status, results = ask("sızıntı tahmin modeli eğitilmesi", mode, 4)
    assert status == 0 and 0 < len(results) <= 4
    scores = [result["score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert [result["rank"] for result in results] == list(range(1, len(results) + 1))
    for result in results:
        assert result.keys() == RESULT_KEYS
        source = (chain.documents / result["source_file"]).read_text(encoding="utf-8").split("\n")
        there = source[result["start_line"] - 1 : result["end_line"]]
        assert result["text"].split("\n")[-1] == there[-1]
        assert isinstance(result["also_in"], list) and isinstance(result["heading"], str)
        assert isinstance(result["id"], str) and isinstance(result["chunk_index"], int)


@pytest.mark.parametrize("mode", MODES)
def test_a_huge_number_of_results_is_no_error(ask, mode):
    assert ask("görev", mode, 9_000_000_000_000_000_000)[0] == 0


@pytest.mark.parametrize("mode", MODES)
def test_more_results_than_there_are_passages_is_no_error(ask, chain, mode):
    status, results = ask("görev", mode, 5000)
    assert status == 0
    passages = generate_embeddings.load_index(chain.index).passages
    assert len(results) == len({passage["text"] for passage in passages}) or mode == "keyword"


def test_the_scores_of_semantic_search_are_cosines(ask):
    _, results = ask("gece debisi", "semantic", 50)
    assert all(-1.0001 <= result["score"] <= 1.0001 for result in results)


def test_keyword_search_that_finds_nothing_ends_with_exit_code_1(ask):
    assert ask("xyzzyqwerty", "keyword") == (1, [])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("query", ["", " ", "\t\n", "\u3000"])
def test_an_empty_query_is_one_line_and_exit_code_2(ask, query, mode):
    status, line = ask(query, mode)
    assert status == 2 and "empty" in line


@pytest.mark.parametrize("mode", MODES)
def test_a_query_of_a_megabyte_is_answered_with_a_warning(ask, mode, capsys):
    status, results = ask("sızıntı modeli haritada gösterilir " * 30_000, mode)
    assert status == 0 and results


QUERIES = ["😀🚰", "\x00\x01\x1b[31m\x7f", "görev\x00takibi", "ıııı", "\u202eters", "x'; DROP TABLE keywords; --"]
QUERIES += ["AND", '"', "NEAR(", "*", "a OR", "^x", "-", "heading:", "{a}: b", "NOT görev", "(((", '"a', "a* NEAR/2 b"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("query", QUERIES)
def test_no_query_is_taken_for_syntax_or_ends_in_a_traceback(ask, query, mode):
    status, results = ask(query, mode)
    assert status in (0, 1)
    if mode in ("semantic", "hybrid"):
        assert results


@pytest.mark.parametrize(
    ("typed", "plain"),
    [("ışık şiddeti", "isik siddeti"), ("IŞIK ŞİDDETİ", "ışık şiddeti"), ("İSTANBUL", "istanbul"), ("ÖLÇÜM", "olcum")],
)
def test_words_are_found_with_and_without_turkish_letters(ask, typed, plain):
    found = keys_of(ask(typed, "keyword", 20)[1])
    assert found and found == keys_of(ask(plain, "keyword", 20)[1])


def test_a_word_is_found_with_other_endings(ask):
    assert "Ofis/kullanim_kilavuzu.md" in [name for name, _ in keys_of(ask("gözden geçirilmesi", "keyword")[1])]


@pytest.mark.parametrize("query", ["KM-2.1", "km-2.1", "KM-2.1 durumu nedir?", "refreshToken", "NB-IoT"])
def test_a_name_finds_the_passage_that_holds_it_first(ask, query):
    name = query.split()[0]
    for mode in ("keyword", "hybrid"):
        assert name.lower() in ask(query, mode)[1][0]["text"].lower()


def test_one_row_of_many_is_found_by_its_id(tmp_path, chain, capsys):
    rows = "\n".join(
        f"| KM-{n}.{m} | Görev {n * m} için hazırlık ve deneme |" for n in range(1, 9) for m in range(1, 9)
    )
    root = write_documents(tmp_path / "root", {"a.md": f"# Görevler\n\n| ID | Açıklama |\n|---|---|\n{rows}\n"})
    arguments = ["--documents-root", root, "--documents", "*.md", "--model", chain.model, "--index-dir", tmp_path / "i"]
    assert exit_status(generate_embeddings.main, arguments) == 0
    capsys.readouterr()
    for name in ("KM-2.1", "KM-7.8", "km-1.1"):
        arguments = ["--json", "--mode", "keyword", "--index-dir", tmp_path / "i", name]
        assert exit_status(semantic_search.main, arguments) == 0
        (first, *_) = json.loads(capsys.readouterr().out)["results"]
        assert f"| {name.upper()} |" in first["text"]


@pytest.mark.parametrize("mode", MODES)
def test_one_text_in_several_files_is_one_result_that_names_them_all(ask, mode):
    found = [
        result for result in ask("yazılı izin olmadan kopyalanamaz", mode, 50)[1] if "kopyalanamaz" in result["text"]
    ]
    assert len(found) == 1
    files = [found[0]["source_file"], *found[0]["also_in"]]
    assert sorted(files) == ["Docs/lisans_notu_kopya.md", "Ofis/lisans_notu.md"]


def test_one_text_under_two_headings_is_one_result(tmp_path, chain, capsys):
    text = "Bütün kapaklar kırmızıya boyanır ve numaralanır.\n"
    root = write_documents(
        tmp_path / "root", {"a.md": f"# Bir\n\n{text}", "b.md": f"# İki\n\n{text}", "c.md": "# Üç\n\nBoş.\n"}
    )
    arguments = ["--documents-root", root, "--documents", "*.md", "--model", chain.model, "--index-dir", tmp_path / "i"]
    assert exit_status(generate_embeddings.main, arguments) == 0
    capsys.readouterr()
    arguments = ["--json", "--index-dir", tmp_path / "i", "kapaklar"]
    assert exit_status(semantic_search.main, arguments) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    (one,) = [result for result in results if "kapaklar" in result["text"]]
    assert sorted([one["source_file"], *one["also_in"]]) == ["a.md", "b.md"]


def test_a_long_task_finds_passages_for_each_of_its_needs(ask):
    task = "Bütçedeki donanım kalemini gözden geçir. Yedek parça payını yaz.\n- Explain how a release is rolled back."
    found = {name for name, _ in keys_of(ask(task, "task", 6)[1])}
    assert {"Planlama/butce.md", "Docs/deployment.md"} <= found


def test_a_task_is_split_into_its_lines_and_sentences_with_short_ones_joined():
    task = (
        "- **Raporu** incele ve değerlendir. Kısa not.\n- Mimari açıdan sonuçları yaz\n\n"
        + "Bir görev daha var burada.\n" * 99
    )
    needs = split_needs(task)
    assert needs[0].startswith("Raporu incele ve değerlendir. Kısa not")
    assert needs[1].startswith("Mimari açıdan sonuçları yaz")
    assert len(needs) == semantic_search.MAX_NEEDS


def test_standard_scores_have_mean_0_and_deviation_1_and_equal_ones_are_0():
    scores = standard_scores({1: 1.0, 2: 2.0, 3: 3.0})
    assert sum(scores.values()) == pytest.approx(0)
    assert sum(score**2 for score in scores.values()) == pytest.approx(3)
    assert standard_scores({1: 5.0, 2: 5.0}) == {1: 0.0, 2: 0.0}
    assert standard_scores({}) == {}


def test_the_weights_of_hybrid_search_count_in_proportion():
    assert share(None, None) == config.SEMANTIC_WEIGHT
    assert share(0.7, 0.3) == pytest.approx(0.7) == share(7, 3)
    assert share(0.2, None) == pytest.approx(0.2) == pytest.approx(share(None, 0.8))
    assert share(0, 0) == config.SEMANTIC_WEIGHT


@pytest.mark.parametrize("through_a_pipe", [False, True])
def test_bytes_that_are_no_utf8_in_a_query_end_in_no_traceback(chain, through_a_pipe):
    arguments = [sys.executable, REPOSITORY / "semantic_search.py", "--json", "--index-dir", chain.index]
    done = subprocess.run(
        arguments if through_a_pipe else [*arguments, b"b\xfct\xe7e"],
        input=b"b\xfct\xe7e\n",
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},  # strict, as in most people's locales
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode in (0, 1, 2)
    assert done.returncode == 2 or json.loads(done.stdout)["results"]


# -------------------------------------------------------------------------------- functions that are imported


@pytest.fixture
def configured(chain, monkeypatch):
    monkeypatch.setattr(config, "INDEX_DIR", chain.index)
    semantic_search.default_index.cache_clear()
    yield semantic_search
    semantic_search.default_index.cache_clear()


@pytest.mark.parametrize(
    "name", ["semantic_search", "keyword_search", "hybrid_search", "get_contextual_assistance_for_task"]
)
def test_imported_functions_search_the_configured_index_with_k_or_the_configured_number(configured, monkeypatch, name):
    function = getattr(configured, name)
    monkeypatch.setattr(config, "TOP_K", 2)
    assert len(function("görev tamamlandığında raporu")) == 2
    results = function("görev tamamlandığında raporu", 3)
    assert len(results) == 3
    assert {"score", "id", "source_file", "chunk_index", "text"} <= results[0].keys()
    assert function("görev tamamlandığında raporu", k=1) == results[:1]


def test_the_configured_index_is_loaded_once(configured, monkeypatch, tmp_path):
    before = configured.keyword_search("bütçe")
    monkeypatch.setattr(config, "INDEX_DIR", tmp_path / "nowhere")
    assert configured.keyword_search("bütçe") == before


def test_hybrid_search_with_all_weight_on_one_arm_has_that_arms_order(configured):
    query = "yedek parça payı"
    semantic = configured.hybrid_search(query, 5, semantic_weight=1.0)
    assert keys_of(semantic) == keys_of(configured.semantic_search(query, 5))
    keyword = configured.hybrid_search(query, 1, semantic_weight=0.0, keyword_weight=1.0)
    assert keys_of(keyword) == keys_of(configured.keyword_search(query, 1))


# ------------------------------------------------------------------------------------------- the command line


def test_one_query_a_line_comes_through_a_pipe_and_one_answer_a_line_goes_out(chain):
    queries = ["bütçe", "KM-2.1", "rolled back"]
    done = run_script("semantic_search.py", "--json", "--index-dir", chain.index, stdin="\n".join(queries) + "\n")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["query"] for answer in answers] == queries
    assert [answer["results"][0]["source_file"] for answer in answers] == [
        "Planlama/butce.md",
        "Planlama/kilometre_taslari.md",
        "Docs/deployment.md",
    ]


def test_words_without_quotes_are_one_query(chain, capsys):
    arguments = ["--json", "--mode", "keyword", "--index-dir", chain.index, "yedek", "parça"]
    assert exit_status(semantic_search.main, arguments) == 0
    assert json.loads(capsys.readouterr().out)["query"] == "yedek parça"


def test_printed_results_name_file_line_heading_and_copies(chain, capsys):
    arguments = ["--mode", "keyword", "--index-dir", chain.index]
    assert exit_status(semantic_search.main, [*arguments, "kopyalanamaz"]) == 0
    printed = capsys.readouterr().out
    assert "1. Docs/lisans_notu_kopya.md:3" in printed and "also in Ofis/lisans_notu.md" in printed
    assert exit_status(semantic_search.main, [*arguments, "NB-IoT"]) == 0
    assert "   Mimari > Sahadaki kutular\n" in capsys.readouterr().out
    assert exit_status(semantic_search.main, [*arguments, "xyzzyqwerty"]) == 1
    assert capsys.readouterr().out == "nothing relevant found\n"


@pytest.mark.parametrize(
    "arguments", [["--top-k", "0", "x"], ["--top-k", "-1", "x"], ["--top-k", "x", "x"], ["--mode", "magic", "x"]]
)
def test_wrong_usage_ends_with_exit_code_2(chain, capsys, arguments):
    assert exit_status(semantic_search.main, ["--index-dir", chain.index, *arguments]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_folder_without_an_index_is_one_line_that_says_what_to_run(tmp_path, capsys):
    assert exit_status(semantic_search.main, ["--index-dir", tmp_path / "none", "x"]) == 2
    assert "run generate_embeddings.py" in error_line(capsys.readouterr().err)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("mode", MODES)
def test_searching_imports_no_torch_and_keyword_search_no_faiss_either(chain, mode):
    code = (
        "import sys, config, semantic_search\n"
        "try:\n    config.run(semantic_search.main)\nfinally:\n    print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--mode", mode, "--index-dir", chain.index, "bütçe"],
        capture_output=True,
        encoding="utf-8",
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    assert "semantic_search" in loaded
    assert not loaded & {"torch", "transformers", "sentence_transformers", "datasets", "matplotlib"}
    assert bool(loaded & {"faiss", "onnxruntime"}) == (mode != "keyword")


def test_a_reader_that_goes_away_gives_no_traceback(chain):
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "semantic_search.py", "--mode", "keyword", "--json", "--index-dir", chain.index],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(("bütçe\n" * 2000).encode())
    process.stdin.flush()
    assert process.stdout.readline().startswith(b"{")
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) != 0
    assert errors == ""


# ------------------------------------------------------------------------------------------------ the prompt


def read_until(terminal: int, wanted: bytes, seconds: float = 60) -> bytes:
    """Return what comes from a terminal up to the wanted bytes, the end, or the time's end."""
    seen, until = b"", time.monotonic() + seconds
    while wanted not in seen and select.select([terminal], [], [], max(0, until - time.monotonic()))[0]:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
    return seen


@pytest.mark.parametrize("ending", [b"\n", b"  \n", b"\x04"])
def test_the_prompt_answers_until_an_empty_line_or_control_d(chain, ending):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "semantic_search.py", "--mode", "keyword", "--index-dir", chain.index],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    os.close(theirs)
    try:
        assert b"search> " in read_until(ours, b"search> ")
        os.write(ours, "bütçe\n".encode())
        assert b"Planlama/butce.md" in read_until(ours, b"search> ")
        os.write(ours, ending)
        assert b"Traceback" not in read_until(ours, b"never printed")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_json_from_a_prompt_into_a_file_holds_nothing_else(chain, tmp_path):
    ours, theirs = pty.openpty()
    with (tmp_path / "out.json").open("wb") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                REPOSITORY / "semantic_search.py",
                "--json",
                "--mode",
                "keyword",
                "--index-dir",
                chain.index,
            ],
            stdin=theirs,
            stdout=out,
            stderr=subprocess.DEVNULL,
        )
    os.close(theirs)
    try:
        os.write(ours, "bütçe\n\n".encode())
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    (line,) = (tmp_path / "out.json").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["query"] == "bütçe"


def test_control_c_at_the_prompt_ends_with_130_and_no_traceback(chain):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "semantic_search.py", "--mode", "keyword", "--index-dir", chain.index],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background has it ignored
    )
    os.close(theirs)
    try:
        assert b"search> " in read_until(ours, b"search> ")
        for _ in range(20):  # one that comes just before the prompt begins to read is seen after the next
            process.send_signal(signal.SIGINT)
            seen = read_until(ours, b"interrupted", 1)
            if b"interrupted" in seen:
                break
        assert b"Traceback" not in seen + read_until(ours, b"never printed")
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
