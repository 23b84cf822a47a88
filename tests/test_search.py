"""Searching: the answers, the command line, the prompt, and the functions that people import."""

import argparse
import ast
import contextlib
import json
import math
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY, error_line, exit_status, run_script, sample_texts, write_documents

import config
import generate_embeddings
import run_finetuning
import semantic_search
from config import UserError
from run_finetuning import QueryWord, query_words, standard_scores
from semantic_search import USUAL_NEARNESS, Request, relevance, search, share, split_needs

MODES = ["semantic", "keyword", "hybrid", "task"]
RESULT_KEYS = {
    *("rank", "score", "relevance", "id", "source_file", "also_in", "near_copies"),
    *("heading", "chunk_index", "start_line", "end_line", "text"),
}
TASK_KEYS = {"needs", "documents", "entry"}


@pytest.fixture
def ask(chain, capsys):
    """Search the small project with main, whatever the relevance; return the exit status and the results."""

    def run(query: str, mode: str = "hybrid", top_k: int = 5, *options):
        arguments = ["--json", "--mode", mode, "--top-k", top_k, "--index-dir", chain.index]
        status = exit_status(semantic_search.main, [*arguments, "--min-relevance", 0, *options, "--", query])
        printed = capsys.readouterr()
        if status == 2:
            return status, error_line(printed.err)
        (line,) = printed.out.splitlines()
        answer = json.loads(line)
        assert answer.keys() == {"query", "mode", "relevant", "results"} | (TASK_KEYS if mode == "task" else set())
        assert (answer["query"], answer["mode"], answer["relevant"]) == (query, mode, status == 0)
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
        assert result.keys() == RESULT_KEYS | ({"needs"} if mode == "task" else set())
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
    arguments = ["--json", "--min-relevance", "0", "--index-dir", tmp_path / "i", "kapaklar"]
    assert exit_status(semantic_search.main, arguments) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    (one,) = [result for result in results if "kapaklar" in result["text"]]
    assert sorted([one["source_file"], *one["also_in"]]) == ["a.md", "b.md"]


def test_a_long_task_finds_passages_for_each_of_its_needs(ask):
    task = "Bütçedeki donanım kalemini gözden geçir. Yedek parça payını yaz.\n- Explain how a release is rolled back."
    found = {name for name, _ in keys_of(ask(task, "task", 6)[1])}
    assert {"Planlama/butce.md", "Docs/deployment.md"} <= found


def test_a_task_is_split_at_lines_sentence_ends_and_semicolons_with_short_pieces_joined():
    task = (
        "- **Raporu** incele ve değerlendir. Kısa not.\n- Mimari açıdan sonuçları yaz\n\n"
        + "Bir görev daha var burada.\n" * 99
    )
    needs = split_needs(task)
    assert needs[0].startswith("Raporu incele ve değerlendir. Kısa not")
    assert needs[1].startswith("Mimari açıdan sonuçları yaz")
    assert len(needs) == semantic_search.MAX_NEEDS
    assert split_needs("Lisans risklerini listele. Write unit tests; then tell us how; soon.") == [
        "Lisans risklerini listele.",
        "Write unit tests;",
        "then tell us how; soon.",
    ]


def test_a_sentence_wrapped_into_lines_is_one_need_and_lines_without_marks_are_one_each():
    wrapped = "Raporu baştan sona incele ve\nmimari açıdan değerlendir. Sonra\nherkese gönder.\nBütçeyi yeniden onaylat"
    assert split_needs(wrapped) == [
        "Raporu baştan sona incele ve mimari açıdan değerlendir.",
        "Sonra herkese gönder.",
        "Bütçeyi yeniden onaylat",
    ]
    items = ["raporu baştan sona incele", "testleri hemen yaz", "bütçeyi yeniden onaylat"]
    assert split_needs("\n".join(items)) == items
    assert split_needs("- " + "\n  ve sonra\n- ".join(items)) == [
        f"{items[0]} ve sonra",
        f"{items[1]} ve sonra",
        items[2],
    ]


def test_short_items_of_a_list_are_needs_of_their_own():
    items = ["CORS", "rate limiting", "bake cakes", "graceful shutdown"]
    assert split_needs("\n".join(f"- {item}" for item in items)) == items
    numbered = ["Logları temizle", "Kek pişir", "Docker güncelle"]
    assert split_needs("\n".join(f"{number}. {item}" for number, item in enumerate(numbered, 1))) == numbered
    assert split_needs("Needed:\n- CORS\n- rate limiting") == ["Needed: CORS", "rate limiting"]
    assert split_needs("Write the report.\n- **Öncelik:** P1") == ["Write the report. Öncelik: P1"]


def test_each_row_of_a_table_is_one_need_and_its_header_is_none():
    table = "| Görev ID | Görev |\n|---|:-:|\n| KM-1 | Vanayı kapat; bekle. Sonra aç |\n| KM-2 | Debiyi ölç |"
    assert split_needs(f"Yarına kadar bitecekler:\n\n{table}\n\nRaporu herkese gönder") == [
        "Yarına kadar bitecekler:",
        "Görev ID: KM-1; Görev: Vanayı kapat; bekle. Sonra aç",
        "Görev ID: KM-2; Görev: Debiyi ölç",
        "Raporu herkese gönder",
    ]
    assert split_needs("Görev | süre\n--- | ---\nKurulum; deneme | 3 gün\nTest | 2 gün\n\nSonra raporu yaz") == [
        "Görev: Kurulum; deneme; süre: 3 gün",
        "Görev: Test; süre: 2 gün",
        "Sonra raporu yaz",
    ]


def test_standard_scores_have_mean_0_and_deviation_1_and_equal_ones_are_0():
    scores = standard_scores({1: 1.0, 2: 2.0, 3: 3.0})
    assert sum(scores.values()) == pytest.approx(0)
    assert sum(score**2 for score in scores.values()) == pytest.approx(3)
    assert standard_scores({1: 5.0, 2: 5.0}) == {1: 0.0, 2: 0.0}
    assert standard_scores({}) == {}


@pytest.mark.parametrize("mode", ["semantic", "keyword", "hybrid", "task"])
def test_more_results_leave_the_first_as_they_are(index_of, monkeypatch, mode):
    texts = [" ".join(text.split()) for text in sample_texts()]
    cut = [text[start : start + 120] for text in texts for start in range(0, min(len(text), 3000), 120)]
    index = index_of({"a.md": "\n\n".join(f"# {place}\n\n{text}" for place, text in enumerate(cut))}, {})
    for module in (run_finetuning, semantic_search):
        monkeypatch.setattr(module, "CANDIDATES", 20)
    queries = [text[:60] for text in cut[::40]]
    several = ["\n".join(f"- {text[:40]}" for text in cut[start : start + 500 : 90]) for start in range(5, 400, 15)]
    for query in queries + several * (mode == "task"):
        few, many = (search(index, query, Request(mode, count))["results"] for count in (10, 200))
        assert keys_of(many[:10]) == keys_of(few) and len(many) > 20
        assert [one["score"] for one in many] == sorted((one["score"] for one in many), reverse=True)


def test_passages_that_hold_parts_of_a_name_keep_their_scores_however_many_are_asked_for():
    texts = [
        *(f"kayıt 001 ve {place}" for place in range(230)),
        *(f"uzun sistem kaydı {place} daha" * 3 for place in range(260)),
    ]
    index = run_finetuning.write_keywords(":memory:", (((), text) for text in texts))
    words = query_words(index, "AG-001 sistem")
    (few, held), (many, held_of_many) = (run_finetuning.keyword_scores(index, words, count) for count in (200, 400))
    assert held == held_of_many > 0 and few == {place: many[place] for place in few} and any(few.values())


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


# -------------------------------------------------------------------------------------- relevance, reasons


@pytest.mark.parametrize(
    ("query", "relevant"),
    [
        ("yedek parça için ayrılan pay ne kadar?", True),
        ("how is a failed release rolled back?", True),
        ("görev takibi", True),
        ("KM-2.1", True),
        ("refreshToken", True),
        ("KM-9.9", False),
        ("Osmanlı padişahı hangi yılda tahta çıktı?", False),
        ("which enzyme inhibits tumour growth in mice?", False),
        ("😀🚰", False),
    ],
)
@pytest.mark.parametrize("mode", ["keyword", "hybrid"])
def test_what_the_documents_do_not_tell_of_is_not_found(meant, capsys, query, relevant, mode):
    assert exit_status(semantic_search.main, ["--mode", mode, "--index-dir", meant.index, query]) == int(not relevant)
    assert (capsys.readouterr().out == "nothing relevant found\n") == (not relevant)


def test_a_passage_that_holds_all_of_a_short_query_is_relevant_however_common_its_word_is():
    common = QueryWord("gorev", "gorev", "stem", 500, math.log(1001 / 500.5))
    held, other = ({"gorevi"}, {"gorev", "plan"}), ({"plan"}, {"plan"})
    without_model = (USUAL_NEARNESS, 1000)
    assert relevance([common], *held, *without_model) > 0.5 > relevance([common], *other, *without_model)
    unknown = [QueryWord(name, name, "stem", 0, math.log(2002)) for name in ("kuantu", "dolani", "deneyi")]
    assert relevance([common, *unknown], *held, *without_model) < 0.5


def test_each_part_of_the_relevance_counts():
    words = [QueryWord(name, name[:6], "stem", 3, 5.0) for name in ("secildi", "lisans", "neden")]
    holding = ({"lisans"}, {"lisans"})
    usual = relevance(words, *holding, 0.2, 2000)
    assert relevance(words, {"lisans"}, {"lisans", "secilm"}, 0.2, 2000) > usual  # another ending
    assert relevance(words, {"lisans"}, {"lisans", "neden"}, 0.2, 2000) > usual
    assert relevance(words, *holding, 0.4, 2000) > usual > relevance(words, *holding, 0.0, 2000)
    assert relevance(words, *holding, 0.2, 200_000) < usual  # by chance
    assert relevance([words[0]._replace(weight=9.0), *words[1:]], *holding, 0.2, 2000) < usual  # a rarer one lacks
    assert relevance(words, set(), {"secilm"}, 0.2, 2000) == relevance(words, set(), set(), 0.2, 2000)
    assert relevance([], set(), set(), 1.0, 2000) == 0
    all_but_one, all_held = ({"lisans", "neden", "secild"} - own for own in ({"neden"}, set()))
    gained = [relevance(words, held, held, 0.05, 2000) for held in ({"lisans"}, all_but_one, all_held)]
    assert gained[2] > 0.5 > gained[1] > gained[0]  # all words held outweigh that the meaning is far


def test_a_name_that_is_held_tells_as_much_as_the_words_in_it():
    unknown = [QueryWord(word, word[:6], "stem", 0, 8.0) for word in ("dilde", "yazilacak")]
    name = QueryWord("os-integration-service", "os-integration-service", "name", 40, 4.0)
    word = QueryWord("integration", "integr", "stem", 40, 4.0)
    held = ({"os-integration-service", "os", "integration", "service"}, {"os", "integr", "servic"})
    of_name, of_word = (relevance([one, *unknown], *held, USUAL_NEARNESS, 5000) for one in (name, word))
    assert of_name > 2 * of_word


def test_nearness_tells_more_where_the_base_knows_the_documents_language(index_of):
    words = [QueryWord(name, name[:6], "stem", 3, 5.0) for name in ("secildi", "lisans", "neden")]
    holding = ({"lisans"}, {"lisans"})
    (less, more), (known_less, known_more) = (
        [relevance(words, *holding, nearness, 2000, known) for nearness in (0.1, 0.4)] for known in (False, True)
    )
    assert known_less < less and more < known_more
    index = index_of({"a.md": "# Depo\n\nAnahtar depoda durur.\n"})
    scored = semantic_search.score_passages(index, "anahtar rafta", Request("hybrid", 5))
    found = []
    for weight in (0.2, 0.8):
        index.header["search"] = {"semantic_weight": weight}
        without_model = scored._replace(cosines={})
        found.append([semantic_search.relevances(index, [one], 0) for one in (scored, without_model)])
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]  # by words alone it is one and the same


def test_a_pasted_log_line_does_not_hide_what_a_question_finds(ask):
    question = "gece debisi yükselirse alarm nasıl verilir"
    log = " 2031-04-17T03:12:44 requestId=8f3ab21c traceparent=4bf92f3577b34da6 upstream=10.42.7.19:8443 status=429"
    for mode in ("keyword", "hybrid"):
        assert ask(question, mode, 3)[0] == ask(question + log, mode, 3)[0] == 0, mode


@pytest.mark.parametrize("query", ["kiM", "nE", "iS", "backUp", "rollingBack", "rollingBackBackups", "KM-99.7", "x-1"])
def test_a_name_that_no_passage_holds_whole_is_searched_by_its_parts(ask, query):
    status, results = ask(query, "keyword", 5)
    assert status in (0, 1)
    assert not results or results[0]["score"] > 0
    if query.startswith("rollingBack"):
        assert results[0]["source_file"] == "Docs/deployment.md"


def test_results_stay_in_json_when_none_is_relevant(meant, capsys):
    arguments = ["--json", "--index-dir", meant.index, "Osmanlı padişahı hangi yılda tahta çıktı?"]
    assert exit_status(semantic_search.main, arguments) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["results"] and not answer["relevant"]
    assert all(0 <= result["relevance"] < config.MIN_RELEVANCE for result in answer["results"])


def test_function_words_change_nothing(ask):
    assert keys_of(ask("yedek parça", "keyword")[1]) == keys_of(ask("bu yedek parça nedir ve neden var?", "keyword")[1])


def test_a_word_whose_ending_stands_in_its_first_letters_is_found(ask):
    assert "nb-iot" in ask("NB-IoT'ta", "keyword")[1][0]["text"].lower()
    assert "bearer token" in ask("tokenda", "keyword")[1][0]["text"]


def test_a_short_word_finds_its_forms_and_comes_first_itself(index_of):
    texts = {"a.md": "# A\n\nTestler yarın yapılır.\n", "b.md": "# B\n\nSavaşı kaybettiler.\n"}
    index = index_of(texts | {"c.md": "# C\n\nBir savaş çıktı, ama kimse bilmiyor.\n"})
    for query, wanted in (("test", ["a.md"]), ("savaş", ["c.md", "b.md"]), ("savas", ["c.md", "b.md"])):
        results = semantic_search.search(index, query, Request("keyword", 5))["results"]
        assert [result["source_file"] for result in results] == wanted


def test_a_stem_that_ends_in_another_letter_is_found_after_the_word_itself(index_of):
    texts = {"a.md": "# A\n\nGörevlerin takip edildiği pano.\n", "b.md": "# B\n\nSayaçların takibi geceleri yapılır.\n"}
    index = index_of(texts | {"c.md": "# C\n\nVanalar yarın değişecek.\n"})
    results = semantic_search.search(index, "takibi", Request("keyword", 5))["results"]
    assert [result["source_file"] for result in results] == ["b.md", "a.md"]


def test_names_with_an_ending_before_a_stroke_are_marked_where_they_stand(index_of, capsys):
    text = "# Ayar\n\nAPI'nin/REST'in adresi ayar dosyasındadır; O'nyong-nyong adresi de oradadır.\n"
    index = index_of({"a.md": text})
    options = ["--mode", "keyword", "--min-relevance", "0", "--index-dir", index.folder, "adres ayar dosyası"]
    assert exit_status(semantic_search.main, options) == 0
    assert "API'nin/REST'in adresi" in capsys.readouterr().out
    (word,) = (word for word in semantic_search.query_words(index.keywords, "adresi"))
    assert [text[slice(*span)] for span in semantic_search.matches([word], text)] == ["adresi", "adresi"]


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("su kaybı", ["su", "kaybi"]),
        ("İş bölümü", ["is", "bolumu"]),
        ("müdür onayı", ["mudur", "onayi"]),
        ("shoulder straps", ["shoulder", "straps"]),
        ("ŞU pompa NEDİR", ["pompa"]),
        ("what is a pump", ["pump"]),
        ("nasil calisir", ["calisir"]),
    ],
)
def test_a_word_that_only_looks_like_a_function_word_is_searched(index_of, query, kept):
    index = index_of({"a.md": "# Su\n\nSu kaybı iş bölümünde müdürün onayıyla ölçülür.\n"})
    assert [word.word for word in semantic_search.query_words(index.keywords, query)] == kept


def test_unknown_words_do_not_hide_a_word_that_very_many_passages_hold(monkeypatch):
    monkeypatch.setattr(run_finetuning, "MAX_POSTINGS", 50)
    index = run_finetuning.write_keywords(":memory:", (((), f"proje belge{n}") for n in range(100)))
    for query in ("proje", "zzgq proje", "zzgq wvxk proje"):
        words = run_finetuning.query_words(index, query)
        assert run_finetuning.keyword_scores(index, words, 10)[0], query


def test_a_word_behind_a_shortened_article_is_found_and_marked(index_of):
    text = "# Guide\n\nL'administrateur vérifie l’utilisateur avant d'ouvrir la vanne.\n"
    index = index_of({"a.md": text, "b.md": "# Sayaç\n\nSayaçların takibi geceleri yapılır.\n"})
    for query, form in (("utilisateur", "utilisateur"), ("l'administrateur", "administrateur"), ("d’ouvrir", "ouvrir")):
        (result,) = semantic_search.search(index, query, Request("keyword", 5))["results"]
        assert result["source_file"] == "a.md", query
        words = semantic_search.query_words(index.keywords, query)
        assert form in [text[slice(*span)] for span in semantic_search.matches(words, text)], query


def test_words_of_scripts_without_spaces_are_found_and_marked(index_of):
    manual = "# 用户手册\n\n## {}\n\n{}\n"
    texts = {
        "a.md": manual.format(
            "插件管理", "插件可以扩展系统的功能。要启用插件，请打开设置页面。每个插件都可以单独配置。"
        ),
        "b.md": manual.format("备份与恢复", "系统每天凌晨三点自动备份数据库。如果使用npm，可以执行安装命令。"),
        "c.md": "# ガイド\n\nパスワードを忘れた場合は、再設定用のリンクを送信できます。\n",
        "d.md": "# คู่มือ\n\nผู้ดูแลระบบเท่านั้นที่สามารถกู้คืนข้อมูลได้\n",
        "e.md": "# मार्गदर्शिका\n\nपासवर्ड बदलने के लिए सेटिंग्स पृष्ठ खोलें।\n",
    }
    index = index_of(texts)
    queries = {
        "a.md": ["启用插件"],
        "b.md": ["数据库备份", "npm安装"],
        "c.md": ["パスワードを忘れた"],
        "d.md": ["กู้คืนข้อมูล"],
    }
    for file, own in (queries | {"e.md": ["पासवर्ड बदलें"]}).items():
        for query in own:
            best = search(index, query, Request("keyword", 5))["results"][0]
            assert best["source_file"] == file and best["relevance"] > 0.5, query
    for query, text, marked in (
        ("启用插件", "要启用插件，npm", ["启用", "用插", "插件"]),
        ("KM-2.1 插件", "任务KM-2.1已完成。插件", ["KM-2.1", "插件"]),
    ):
        spans = semantic_search.matches(query_words(index.keywords, query), text)
        assert [text[slice(*span)] for span in spans] == marked
    assert "km-2-1" in run_finetuning.keyword_terms("任务KM-2.1已完成。")[0]
    assert not search(index, "天气预报怎么样", Request("keyword", 5, None, 0.5))["relevant"]


def test_a_long_text_without_spaces_is_cut_anywhere():
    shown = semantic_search.excerpt("漏水" * 400, [], 60)
    assert shown.startswith("漏水漏水") and 25 <= len(shown) <= 30  # each takes two columns
    assert semantic_search.excerpt("bir iki " * 100, [], 30) == "bir iki bir iki bir iki bir …"
    assert len(semantic_search.excerpt("Python " + "漏水" * 400, [], 60)) >= 25


def test_an_excerpt_from_the_end_of_a_text_keeps_its_last_word(index_of):
    index = index_of({"a.md": "# A\n\nZürafalar uzundur.\n"})
    words = semantic_search.query_words(index.keywords, "zürafalar")
    text = "Bir iki üç dört. " * 10 + "Zürafalar uzundur."
    assert semantic_search.excerpt(text, words, 60) == "… Bir iki üç dört. Bir iki üç dört. Zürafalar uzundur."


def test_an_excerpt_begins_at_a_sentence_of_a_script_that_sets_no_spaces_between_them(index_of):
    index = index_of({"a.md": "# A\n\n漏水を検出します。\n"})
    words = semantic_search.query_words(index.keywords, "漏水")
    text = "設定画面を開きます。" * 30 + "漏水を検出します。"
    assert re.match("… 設定画面を開きます。.*漏水を検出", semantic_search.excerpt(text, words, 60))
    assert semantic_search.excerpt("保存を押します" * 30 + "。漏水を検出します。", words, 60) == "… 漏水を検出します。"


def test_a_need_without_spaces_is_shown_by_its_beginning(index_of, capsys):
    index = index_of({"a.md": "# A\n\n漏水を検出します。\n"})
    task = "漏水を検出する箱の電池を交換し記録を保存します" * 12 + "。保存を押します。"
    exit_status(semantic_search.main, ["--mode", "task", "--min-relevance", "0", "--index-dir", index.folder, task])
    out = capsys.readouterr().out
    assert re.search(r"^1. \s*漏水を検出する箱の電池を交換し", out, re.M) and "\n2. 保存を押します。\n" in out


def test_the_functions_for_importers_answer_in_every_thread(chain, monkeypatch):
    monkeypatch.setattr(config, "INDEX_DIR", chain.index)
    monkeypatch.setattr(config, "MIN_RELEVANCE", 0.0)
    semantic_search.default_index.cache_clear()
    queries = ["yedek parça", "backups", "gece parlaklık", "errors"] * 4
    for function in (semantic_search.hybrid_search, semantic_search.get_contextual_assistance_for_task):
        alone = [function(query) for query in queries]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(function, queries)) == alone
    semantic_search.default_index.cache_clear()


def test_a_mode_that_config_misspells_is_refused(chain, monkeypatch, capsys):
    monkeypatch.setattr(config, "SEARCH_MODE", "Hybrid")
    assert exit_status(semantic_search.main, ["--index-dir", chain.index, "yedek"]) == 2
    assert "config.SEARCH_MODE is 'Hybrid'" in error_line(capsys.readouterr().err)


def test_a_task_with_more_needs_than_are_searched_says_so(chain, capsys):
    task = " ".join(f"Bütçe için {number}. belge hazırlanır." for number in range(semantic_search.MAX_NEEDS + 1))
    assert exit_status(semantic_search.main, ["--mode", "task", "--json", "--index-dir", chain.index, task]) in (0, 1)
    assert f"only the first {semantic_search.MAX_NEEDS} of" in capsys.readouterr().err


def test_whole_words_rank_above_words_with_the_same_beginning(index_of):
    index = index_of({"a.md": "# A\n\nKutular planlamaya alındı.\n", "b.md": "# B\n\nKutular planlama ile alındı.\n"})
    results = semantic_search.search(index, "planlama", Request("keyword", 5))["results"]
    assert [result["source_file"] for result in results] == ["b.md", "a.md"]


def test_many_words_of_a_long_query_come_before_a_rare_one_that_is_repeated(index_of):
    filler = {f"{i}.md": f"# Konu {i}\n\nDepo, bakım, plan ve rapor burada da geçiyor.\n" for i in range(8)}
    many = "# Bir\n\nDepo için bakım planı hazırlanır, sonra rapor yazılır; burada da geçiyor.\n"
    index = index_of(filler | {"rare.md": "# İki\n\nKantar, kantar, kantar, kantar.\n", "many.md": many})
    query = "depo bakım planı ve raporu hazırla, kantar dahil"
    results = semantic_search.search(index, query, Request("keyword", 3))["results"]
    assert results[0]["source_file"] == "many.md"
    assert "rare.md" in [result["source_file"] for result in results]


def test_an_explanation_adds_up(ask):
    for result in ask("yedek parça zürafa", "hybrid", 5, "--explain")[1]:
        values = result["explain"]
        weight = values["semantic_weight"]
        combined = weight * values["standard_cosine"] + (1 - weight) * values["standard_keyword"]
        assert combined == pytest.approx(values["combined"], abs=0.001)
        assert result["score"] == pytest.approx(1 / (1 + math.exp(-combined)), abs=0.001)
    first = ask("yedek parça zürafa", "hybrid", 5, "--explain")[1][0]["explain"]
    assert (first["found"], first["missing"]) == (["yedek", "parca"], ["zurafa"])


def test_an_explanation_of_a_task_names_the_need_and_the_score_that_the_result_has(ask):
    task = "Gece debisini ölç. Yedeği geri yükle. Bütçeyi onaylat. Roll back a failed release. Raporu teslim et."
    status, results = ask(task, "task", 5, "--explain")
    assert status == 0 and results
    for result in results:
        values = result["explain"]
        assert 0 <= values["need"] < 5
        assert result["score"] == pytest.approx(1 / (1 + math.exp(-values["total"])), abs=0.001)


def test_the_fitted_weight_of_the_index_is_used_unless_config_names_one(index_of, monkeypatch, capsys):
    index = index_of(None, search={"semantic_weight": 0.55})
    assert index.header["search"] == {"semantic_weight": 0.55}
    query = ["--json", "--explain", "--min-relevance", "0", "--index-dir", index.folder, "yedek parça"]
    for configured, used in ((None, 0.55), (0.1, 0.1), (0.9, 0.9)):
        monkeypatch.setattr(config, "SEMANTIC_WEIGHT", configured)
        assert exit_status(semantic_search.main, query) == 0
        assert json.loads(capsys.readouterr().out)["results"][0]["explain"]["semantic_weight"] == used


def test_the_fitted_weight_counts_for_less_where_a_query_has_but_a_word_or_two(index_of):
    index = index_of(None, search={"semantic_weight": 0.85})
    for query, weight in (("bütçe", 0.3), ("yedek parça", 0.6), ("yedek zürafa", 0.3)):
        words = query_words(index.keywords, query)
        assert run_finetuning.weight_for_few_words(index.semantic_weight, words) == pytest.approx(weight), query
    words = query_words(index.keywords, "görevler her sabah panoda takip edilir")
    assert run_finetuning.weight_for_few_words(index.semantic_weight, words) == 0.85


def test_a_code_is_not_found_by_another_with_the_same_letters(index_of):
    index = index_of(
        {"a.md": "# A\n\nFSTWRN001 is a warning.\n", "b.md": "# B\n\nworker3 stands still, worker31 runs.\n"}
    )

    def found(query: str) -> list[str]:
        return [one["source_file"] for one in search(index, query, Request("keyword", 5, min_relevance=0.5))["results"]]

    assert found("FSTWRN001") == ["a.md"] and found("worker3") == ["b.md"]
    assert found("FSTWRN") == ["a.md"] and found("workers") == ["b.md"]  # the letters alone find all of them
    assert not search(index, "FSTWRN999", Request("hybrid", 5, min_relevance=0.5))["relevant"]


@pytest.mark.parametrize(
    ("query", "file"),
    [
        (".setErrorHandler()", "a.md"),
        ("MICROSERV-001", "b.md"),
        ("PLAN-002", "b.md"),
        ("v1.7.1", "c.md"),
        ("2.0.3", "c.md"),
        (".close()", "a.md"),
    ],
)
def test_a_name_is_found_without_its_dot_an_id_by_its_end_and_a_version_with_and_without_v(index_of, query, file):
    index = index_of(
        {
            "a.md": "# Server\n\n## setErrorHandler\n\nCalled when a route throws. To close it, wait.\n",
            "b.md": "# Görevler\n\n- AG-MIM-MICROSERV-001: Servis sınırlarını çiz.\n\n## AG-PLAN-002\n\nPlan yap.\n",
            "c.md": "# Changes\n\nIn 1.7.1 a leak was mended, in v2.0.3 another.\n",
            "d.md": "# Başka\n\nBambaşka bir metin burada durur.\n",
        }
    )
    for mode in ("keyword", "hybrid"):
        answer = search(index, query, Request(mode, 5, min_relevance=0.5))
        assert answer["relevant"] and answer["results"][0]["source_file"] == file, mode
    for made_up in ("MICROSERV-701", "v9.9.9"):
        assert not search(index, made_up, Request("hybrid", 5, min_relevance=0.5))["relevant"]


def test_a_long_text_about_something_else_is_not_relevant_by_the_words_it_holds_by_chance():
    words = [QueryWord(f"w{number}", f"w{number}", "stem", 5, 3.0) for number in range(60)]
    some = {word.term for word in words[:7]}
    of_sixty, of_twelve = (relevance(own, some, some, USUAL_NEARNESS, 1000) for own in (words, words[:12]))
    assert of_sixty < 0.5 < of_twelve


@pytest.mark.parametrize("mode", ["keyword", "hybrid", "semantic", "task"])
def test_whether_something_relevant_was_found_does_not_depend_on_how_many_results_are_shown(meant, capsys, mode):
    for query in ("görev takibi", "yumurta nasıl haşlanır", "kim gözden geçirir", "release"):
        found = set()
        for top_k in (1, 2, 5, 50):
            arguments = ["--json", "--mode", mode, "--top-k", top_k, "--index-dir", meant.index, query]
            found.add(exit_status(semantic_search.main, arguments))
            assert len(json.loads(capsys.readouterr().out)["results"]) <= top_k
        assert len(found) == 1, query


def test_a_task_is_judged_by_its_first_five_results_however_many_are_shown(chain, monkeypatch):
    index, task = (
        generate_embeddings.load_index(chain.index),
        "Pil ömrünü ölç. Yedek parça al. Bütçeyi yaz. Testi çalıştır.",
    )
    fourth = search(index, task, Request("task", 5))["results"][3]["id"]
    monkeypatch.setattr(semantic_search, "covered_by", lambda *_: [])

    def only_the_fourth(index, searches, place):
        return [0.9 if index.passages[place]["id"] == fourth else 0.1 for _ in searches]

    monkeypatch.setattr(semantic_search, "relevances", only_the_fourth)
    for top_k in (1, 3, 5, 20):
        answer = search(index, task, Request("task", top_k, min_relevance=0.5))
        assert answer["relevant"] and len(answer["results"]) <= top_k, top_k
        shown = [result["rank"] for result in answer["results"]]
        assert sorted(rank for document in answer["documents"] for rank in document["results"]) == shown


def test_words_count_by_how_much_of_the_query_one_passage_holds(index_of):
    index = index_of(None, search={"semantic_weight": 0.4})
    weights = []
    for query in ("yedek parça", "yedek parça zürafa", "yedek parça zürafa suaygırı timsah gergedan", "zürafa"):
        results = semantic_search.search(index, query, Request("hybrid", 3, explain=True))["results"]
        weights.append(results[0]["explain"]["semantic_weight"])
    assert weights[0] == weights[-1] == 0.4 < weights[1] < weights[2] < 1  # no word of the last one is known


def test_an_index_of_one_passage_can_be_searched(index_of):
    index = index_of({"a.md": "# A\n\nTestler yarın yapılır.\n"})
    assert len(semantic_search.search(index, "testler", Request("hybrid", 3))["results"]) == 1
    assert semantic_search.search(index, "testler", Request("keyword", 3, min_relevance=0.5))["relevant"]


@pytest.fixture
def index_of(tmp_path, chain, capsys):
    """Index documents (the small project's own for None) with a copy of the small model."""

    def build(documents: dict[str, str] | None, search: dict | None = None):
        shutil.copytree(chain.model, tmp_path / "model")
        if search is not None:
            evaluation = json.loads((tmp_path / "model" / "evaluation.json").read_text(encoding="utf-8"))
            (tmp_path / "model" / "evaluation.json").write_text(json.dumps(evaluation | {"search": search}))
        root = write_documents(tmp_path / "root", documents)
        arguments = ["--documents-root", root, "--documents", "**/*.md", "--model", tmp_path / "model"]
        assert exit_status(generate_embeddings.main, [*arguments, "--index-dir", tmp_path / "index"]) == 0
        capsys.readouterr()
        return generate_embeddings.load_index(tmp_path / "index")

    return build


def test_a_missing_model_refuses_semantic_search_alone(index_of, capsys):
    index = index_of(None)
    arguments = ["--json", "--index-dir", index.folder, "yedek parça"]
    assert exit_status(semantic_search.main, ["--mode", "keyword", *arguments]) == 0
    by_words = keys_of(json.loads(capsys.readouterr().out)["results"])
    (index.folder.parent / "model" / "onnx" / "model.onnx").unlink()
    assert exit_status(semantic_search.main, ["--mode", "semantic", *arguments]) == 2
    assert "run python generate_embeddings.py" in error_line(capsys.readouterr().err)
    for mode in ("hybrid", "task", "keyword"):
        assert exit_status(semantic_search.main, ["--mode", mode, *arguments]) == 0
        printed = capsys.readouterr()
        assert keys_of(json.loads(printed.out)["results"])[:3] == by_words[:3]
        assert printed.err.count("by words alone") == (mode != "keyword")


def test_a_search_that_is_stopped_while_it_goes_over_to_a_newer_index_leaves_the_old_one_whole(index_of, monkeypatch):
    index = index_of(None)
    before = dict(vars(index))
    monkeypatch.setattr(generate_embeddings, "read_metadata", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        index.reopen()
    assert vars(index) == before


@pytest.mark.parametrize("searched_before", [False, True])
def test_an_index_renewed_under_an_open_search_with_another_model_embeds_again(index_of, capsys, searched_before):
    index = index_of(None)
    moved = (index.folder.parent / "model").rename(index.folder.parent / "moved")
    request = Request("hybrid", 1, explain=True)
    if searched_before:
        assert semantic_search.search(index, "yedek", request)["results"][0]["explain"]["cosine"] is None
    root = index.header["documents_root"]
    build = ["--documents-root", root, "--documents", "**/*.md", "--model", moved, "--index-dir", index.folder]
    assert exit_status(generate_embeddings.main, build) == 0
    if searched_before:
        index.reopen()
    capsys.readouterr()
    assert semantic_search.search(index, "yedek", request)["results"][0]["explain"]["cosine"] is not None
    assert capsys.readouterr().err == ""


def test_a_query_without_a_known_word_has_the_order_of_its_meaning(ask):
    assert keys_of(ask("xyzzy qwertz")[1]) == keys_of(ask("xyzzy qwertz", "semantic")[1])


def test_near_copies_are_one_result_but_rows_that_differ_by_a_number_are_not(index_of):
    text = "Kapaklar her bahar kırmızıya boyanır, numaralanır, sayılır ve depodaki {} rafa sırayla dizilir"
    documents = {"a.md": f"# A\n\n{text.format('üst')}.\n", "b.md": f"# B\n\n{text.format('alt')}.\n"}
    documents |= {f"{n}.md": f"# N\n\n{text.format(f'{n}.')}.\n" for n in (1, 2)}
    results = semantic_search.search(index_of(documents), "kapaklar boyanır", Request("keyword", 9))["results"]
    assert len(results) == 3
    assert [len(result["near_copies"]) for result in results if result["source_file"] in ("a.md", "b.md")] == [1]


def test_near_copies_do_not_crowd_out_other_results(index_of):
    minutes = "Toplantı tutanağı ve kararlar bu sayfada durur, imzalayan kişi {} olarak her ay aynı yere yazılır."
    names = [f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrs"]
    documents = {f"tutanak_{name}.md": f"# Tutanak\n\n{minutes.format(name)}\n" for name in names}
    documents |= {f"z{n}.md": f"# Not\n\nBaşka bir konu, {n * 'çok '}uzun, toplantı.\n" for n in range(1, 5)}
    results = semantic_search.search(index_of(documents), "toplantı tutanağı kararlar", Request("keyword", 5))[
        "results"
    ]
    assert len(results) == 5 and len(results[0]["near_copies"]) == len(names) - 1


def test_all_places_of_a_text_and_its_near_copies_are_named_though_the_list_is_full(index_of):
    text = "Kapaklar her bahar kırmızıya boyanır, numaralanır, sayılır ve depodaki {} rafa sırayla dizilir.\n"
    documents = {"a.md": f"# A\n\n{text.format('üst')}\n## B\n\n{text.format('üst')}"}
    index = index_of(documents | {"b.md": f"# C\n\n{text.format('alt')}", "c.md": "# D\n\nKapaklar.\n"})
    (result,) = semantic_search.search(index, "üst kapaklar boyanır", Request("keyword", 1))["results"]
    places = [f"{result['source_file']}:{result['start_line']}", *result["near_copies"]]
    assert sorted(places) == ["a.md:3", "a.md:7", "b.md:3"] and result["also_in"] == []


def test_context_gives_the_passages_around(ask):
    result = ask("Yedek parça payı", "keyword", 1, "--context", 1)[1][0]
    assert [passage["chunk_index"] - result["chunk_index"] for passage in result["context"]] == [-1, 1]
    assert "Toplam bütçe" in result["context"][0]["text"]


# ------------------------------------------------------------------------------------------ help for a task


def test_a_task_shows_which_needs_each_document_covers_and_which_nothing_covers(meant, capsys):
    needs = ["Bütçedeki donanım kalemini ve yedek parça payını yaz.", "Osmanlı padişahlarının tahta çıkışını anlat."]
    needs += ["Explain how a failed release is rolled back.", "Görev takibi toplantısını panoda hazırla."]
    arguments = ["--mode", "task", "--top-k", 4, "--index-dir", meant.index, "\n".join(needs)]
    assert exit_status(semantic_search.main, ["--json", *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [need["text"] for need in answer["needs"]] == needs
    covering = [[source["source_file"] for source in need["covered_by"]] for need in answer["needs"]]
    assert covering[1] == []
    assert (covering[0][0], covering[2][0], covering[3][0]) == (
        "Planlama/butce.md",
        "Docs/deployment.md",
        "Ofis/kullanim_kilavuzu.md",
    )
    listed = [rank for document in answer["documents"] for rank in document["results"]]
    assert sorted(listed) == [result["rank"] for result in answer["results"]]
    budget = next(document for document in answer["documents"] if document["source_file"] == "Planlama/butce.md")
    assert 0 in budget["needs"]
    assert exit_status(semantic_search.main, arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("nothing here covers it") == 1 and f"{meant.documents}/Planlama/butce.md:" in printed


def test_the_id_of_a_task_searches_with_its_entry_and_does_not_return_it(meant, capsys):
    arguments = ["--mode", "task", "--index-dir", meant.index]
    status = exit_status(semantic_search.main, ["--json", *arguments, "KM-2.1"])
    answer = json.loads(capsys.readouterr().out)
    assert status == int(not answer["relevant"])
    assert answer["entry"]["source_file"] == "Planlama/kilometre_taslari.md"
    assert "Sızıntı tahmin modelinin eğitilmesi" in answer["entry"]["text"] and "KM-2.2" not in answer["entry"]["text"]
    assert answer["results"] and not any("| KM-2.1 |" in result["text"] for result in answer["results"])
    exit_status(semantic_search.main, [*arguments, "KM-2.1"])
    assert "KM-2.1 is described in" in capsys.readouterr().out
    assert exit_status(semantic_search.main, ["--json", *arguments, "KM-9.9"]) == 1
    assert json.loads(capsys.readouterr().out)["entry"] is None


def test_the_entry_of_an_id_is_the_section_it_heads_before_lines_that_mention_it(index_of):
    section = "# Plan\n\n## AG-7: Sayaç okuma\n\nSayaçlar gece okunur.\n\n### Adımlar\n\nÖnce vana kapatılır.\n"
    others = "# Liste\n\n- AG-7 bekliyor\n  - sayaç dolabı ve gece nöbeti hazır değil\n- AG-8 bitti\n"
    index = index_of({"plan.md": section, "liste.md": others, "sayac.md": "# Sayaç\n\nGece okunan sayaçlar yazılır.\n"})
    entry, places = semantic_search.find_entry(index, "ag-7")
    assert "Sayaçlar gece okunur." in entry["text"] and "Önce vana kapatılır." in entry["text"]
    assert {index.passages[place]["source_file"] for place in places} == {"plan.md"}
    entry, _ = semantic_search.find_entry(index, "AG-8")
    assert entry["text"].strip() == "- AG-8 bitti"
    assert semantic_search.find_entry(index, "sayaç okuma") == (None, set())


def test_the_row_or_item_that_an_id_begins_is_its_entry_before_what_mentions_it(index_of):
    table = "# Pano\n\n| No | ID | Görev |\n|---|---|---|\n| 1 | AG-4.3 | Klavye |\n| 2 | AG-4.4 | Tablet AG-4.5 |\n"
    remark = "# Not\n\nPano her cuma okunur, en uzun boşluk 26 günle AG-4.4'teydi.\n"
    begun = "# Takılan\n\nAG-4.4 için tabletlerin gelmesi beklenirken hiçbir şey yapılamıyor.\n\n- [ ] AG-4.6 boya\n"
    named = "# Açıklama (AG-4.3, AG-4.4)\n\nTabletler haftaya dağıtılır, klavyeler sonra; AG-4.6 en son.\n"
    index = index_of({"pano.md": table, "not.md": remark, "takilan.md": begun, "aciklama.md": named})
    for name, wanted in (("AG-4.3", "haftaya"), ("AG-4.4", "Tablet"), ("AG-4.5", "Tablet"), ("AG-4.6", "boya")):
        entry, _ = semantic_search.find_entry(index, name)
        assert wanted in entry["text"], name
        assert "okunur" not in entry["text"] and "yapılamıyor" not in entry["text"]


def test_the_entry_of_an_id_is_whole_with_sub_items_wrapped_lines_and_a_table_without_outer_strokes(index_of):
    loose = "# Liste\n\n- **AG-3.1**: Liste görevi\n\n  - vana sök\n\n  - conta tak\n\n- AG-3.2: başka iş\n"
    wrapped = "# Metin\n\nAG-4.1: Kurulum yap ve\nsonra test et.\nAG-4.2: Sil.\n"
    table = "# Pano\n\nID | Görev\n--- | ---\nAG-5.1 | Klavye\nAG-5.2 | Fare\n"
    index = index_of({"liste.md": loose, "metin.md": wrapped, "pano.md": table})
    for name, wanted in (
        ("AG-3.1", "- **AG-3.1**: Liste görevi\n\n  - vana sök\n\n  - conta tak"),
        ("AG-4.1", "AG-4.1: Kurulum yap ve\nsonra test et."),
        ("AG-5.1", "ID | Görev\n--- | ---\nAG-5.1 | Klavye"),
    ):
        assert semantic_search.find_entry(index, name)[0]["text"] == wanted


def test_the_entry_of_an_id_is_its_whole_section_however_long(index_of):
    steps = "".join(f"Adım {number} burada uzun uzun anlatılır. {'Kelime ' * 70}\n\n" for number in range(130))
    index = index_of({"plan.md": f"# Plan\n\n## AG-2.1 Büyük iş\n\n{steps}", "not.md": "# Not\n\nAG-2.1 bekliyor.\n"})
    entry, places = semantic_search.find_entry(index, "AG-2.1")
    assert entry["start_line"] == 5 and "Adım 0 " in entry["text"] and "Adım 129 " in entry["text"]
    assert {index.passages[place]["source_file"] for place in places} == {"plan.md"} and len(places) >= 130


def test_a_name_with_markdowns_backslashes_is_found(index_of):
    index = index_of(
        {"a.md": "# Alan\n\nAlan refresh\\_token ve AG\\-2.1 yenilenir.\n", "b.md": "# B\n\nrefresh; token.\n"}
    )
    for query in ("refresh_token", "AG-2.1"):
        (word,) = [word for word in query_words(index.keywords, query) if word.kind == "name"]
        assert word.passages == 1


# ------------------------------------------------------------------------------------------------ two indexes


def test_a_query_that_begins_with_a_dash_gets_a_line_that_tells_how_to_search_for_it(chain, capsys):
    assert exit_status(semantic_search.main, ["--index-dir", chain.index, "--no-cache"]) == 2
    assert "--no-cache is no option" in (line := error_line(capsys.readouterr().err)) and " -- your query" in line
    assert exit_status(semantic_search.main, ["--index-dir", chain.index, "--mode", "keyword", "--", "--bütçe"]) == 0


def test_words_on_both_sides_of_an_option_are_one_query(chain, capsys):
    arguments = ["yedek", "--mode", "keyword", "--index-dir", chain.index, "parça", "payı", "--json"]
    assert exit_status(semantic_search.main, arguments) == 0
    assert json.loads(capsys.readouterr().out)["query"] == "yedek parça payı"


def test_a_byte_order_mark_is_no_part_of_a_piped_query(chain):
    done = run_script("semantic_search.py", "--json", "--index-dir", chain.index, stdin="\ufeffbütçe\n")
    assert json.loads(done.stdout)["query"] == "bütçe"


@pytest.mark.parametrize(("name", "value"), [("SEMANTIC_WEIGHT", "0.3"), ("TOP_K", 2.5), ("TOP_K", 0)])
def test_a_setting_of_the_search_that_makes_no_sense_is_one_line(chain, monkeypatch, capsys, name, value):
    monkeypatch.setattr(config, name, value)
    assert exit_status(semantic_search.main, ["--index-dir", chain.index, "bütçe"]) == 2
    assert f"{value!r}" in (line := error_line(capsys.readouterr().err)) and f"config.{name}" in line


def test_fewer_than_one_result_is_refused_to_importers_too(chain, monkeypatch):
    monkeypatch.setattr(semantic_search, "default_index", lambda: generate_embeddings.load_index(chain.index))
    with pytest.raises(UserError, match="-1"):
        semantic_search.keyword_search("bütçe", -1)
    assert len(semantic_search.hybrid_search("bütçe", np.int64(2), np.float32(0.5), np.float32(0.5))) == 2


@pytest.mark.parametrize("option", [["--explain"], ["--context", "1"]])
def test_what_a_comparison_on_the_screen_can_not_show_is_refused(chain, capsys, option):
    arguments = ["--index-dir", chain.index, "--compare", chain.index, "--mode", "keyword", "bütçe", *option]
    assert exit_status(semantic_search.main, arguments) == 2
    assert "--json" in error_line(capsys.readouterr().err)
    assert exit_status(semantic_search.main, ["--json", *arguments]) == 0


@pytest.mark.parametrize("gone", ["documents", "the folder above them"])
def test_an_index_whose_documents_may_not_be_looked_at_is_searched(index_of, monkeypatch, capsys, gone):
    """As those in another person's home; the superuser, who may look everywhere, runs many tests."""
    index = index_of(None)
    closed = Path(index.header["documents_root"])
    stat = Path.stat

    def refused(path, **settings):
        if path.is_relative_to(closed) and (gone != "documents" or path != closed):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **settings)

    monkeypatch.setattr(Path, "stat", refused)
    assert exit_status(semantic_search.main, ["--mode", "keyword", "--index-dir", index.folder, "bütçe"]) == 0
    assert "Planlama/butce.md:" in capsys.readouterr().out
    assert (
        "--documents-root" not in generate_embeddings.build_command(index.folder, index.header) or gone == "documents"
    )


def test_two_indexes_are_compared_by_rank(chain, index_of, capsys):
    other = index_of(
        {"butce.md": "# Bütçe\n\n## Donanım\n\nYedek parça için ayrılan pay burada da anlatılır.\n"}
        | {"Planlama/butce.md": (chain.documents / "Planlama" / "butce.md").read_text(encoding="utf-8")}
    )
    arguments = ["--mode", "keyword", "--index-dir", chain.index, "--compare", other.folder, "yedek parça payı"]
    assert exit_status(semantic_search.main, ["--json", *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    both = [(result["id"], result["rank"]) for result in answer["other"]["results"]]
    assert answer["results"][0]["other_rank"] == dict(both)[answer["results"][0]["id"]]
    assert any(result["other_rank"] is None for result in answer["other"]["results"])
    assert exit_status(semantic_search.main, arguments) == 0
    printed = capsys.readouterr().out
    assert "only here" in printed and "in both lists" in printed


def test_a_text_under_another_heading_and_a_near_copy_are_in_both_lists(index_of, chain, tmp_path):
    text = "Kapaklar her bahar kırmızıya boyanır, numaralanır, sayılır ve depodaki {} rafa sırayla dizilir.\n"
    index = index_of({"a.md": f"# Kapak\n\n{text.format('üst')}", "b.md": "# Depo\n\nDepodaki raflar boyanır.\n"})
    documents = {"a.md": f"# Kapak\n\n{text.format('alt')}", "b.md": "# Raf\n\nDepodaki raflar boyanır.\n"}
    root = write_documents(tmp_path / "other", documents | {"c.md": "# Boya\n\nBoyalar depodaki rafta.\n"})
    arguments = ["--documents-root", root, "--documents", "*.md", "--model", chain.model, "--index-dir", tmp_path / "i"]
    assert exit_status(generate_embeddings.main, arguments) == 0
    other = generate_embeddings.load_index(tmp_path / "i")
    answer = semantic_search.compare(index, other, "depodaki kapaklar boyanır", Request("keyword", 5))
    ranks = {result["source_file"]: result["rank"] for result in answer["other"]["results"]}
    assert {one["source_file"]: one["other_rank"] for one in answer["results"]} == {
        n: ranks[n] for n in ("a.md", "b.md")
    }
    only = [result["source_file"] for result in answer["other"]["results"] if result["other_rank"] is None]
    assert only == ["c.md"]


# ---------------------------------------------------------------------------------------------- odd queries


def odd_queries() -> list[str]:
    """500 queries of what goes wrong elsewhere, always the same."""
    pieces = [
        "görev",
        "KM-2.1",
        "😀",
        "👩🏽‍🔧",
        "\x00",
        "\x1b[31m",
        "\u202e",
        "\ufeff",
        "日本語",
        "العربية",
        "ﬁ",
        "İıŞş",
        "e\u0301",
    ]
    pieces += [
        '"',
        "'",
        "*",
        "(",
        ")",
        "^",
        "-",
        "--",
        ":",
        "{a}:",
        "AND",
        "OR",
        "NOT",
        "NEAR(a b, 2)",
        "heading:",
        "+",
    ]
    pieces += [
        "; DROP TABLE keywords; --",
        "' OR 1=1 --",
        "%",
        "_",
        "\\",
        "\\d+(",
        "[a-",
        "(?P<",
        ".*",
        "$",
        "a" * 5000,
    ]
    pieces += [
        "\ud800",
        "\U0010ffff",
        "\u00a0",
        "1e999",
        "-1",
        "../../etc/passwd",
        "<script>",
        "${HOME}",
        "`ls`",
        ":k",
        "|",
    ]
    rng = random.Random(7)
    return [rng.choice(["", " "]).join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(500)]


@pytest.mark.parametrize("mode", MODES)
def test_no_odd_query_ends_in_a_traceback_or_a_wrong_exit_code(chain, mode, capsys):
    index = generate_embeddings.load_index(chain.index)
    options = semantic_search.build_parser().parse_args(["--json", "x"])
    for number, query in enumerate(odd_queries()):
        options.json = number % 5 > 0
        if not query.strip():
            continue
        answer = semantic_search.answer_query(index, query, Request(mode, 3, None, 0.4, 0, True), options)
        printed = capsys.readouterr().out
        if options.json:
            assert json.loads(printed)["relevant"] == answer["relevant"]
        else:
            assert (printed == "nothing relevant found\n") == (not answer["relevant"])
            assert "\x1b" not in printed and "\u202e" not in printed


def test_odd_queries_through_a_pipe_give_a_line_each(chain):
    lines = ["".join(query.split("\n")).encode(errors="surrogatepass") for query in odd_queries()]
    done = subprocess.run(
        [sys.executable, REPOSITORY / "semantic_search.py", "--json", "--index-dir", chain.index],
        input=b"\n".join(lines) + b"\n",
        capture_output=True,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) == 500


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
    assert (
        f"1. {chain.documents}/Docs/lisans_notu_kopya.md:3  relevance" in printed
        and f"also in {chain.documents}/Ofis/lisans_notu.md" in printed
    )
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
    told = f"run python generate_embeddings.py --index-dir {tmp_path / 'none'} first"
    assert told in error_line(capsys.readouterr().err)
    assert not (tmp_path / "none").exists()


def test_the_command_that_mends_an_index_makes_that_index_again(index_of, capsys):
    """Told from its header: without its documents' root it would become an index of other documents."""
    index = index_of(None)
    (index.folder.parent / "model" / "onnx" / "model.onnx").unlink()
    assert exit_status(semantic_search.main, ["--mode", "semantic", "--index-dir", index.folder, "x"]) == 2
    command = re.search(r"run (python generate_embeddings\.py .*) \(keyword", error_line(capsys.readouterr().err))[1]
    options = generate_embeddings.build_parser().parse_args(shlex.split(command)[2:])
    assert options.documents_root == Path(index.header["documents_root"])
    assert options.documents == index.header["globs"]
    assert (options.model, options.index_dir) == (index.header["model"]["name"], index.folder)
    (path,) = index.folder.glob("keywords-*.sqlite")
    path.write_bytes(b"damaged")
    assert exit_status(semantic_search.main, ["--mode", "keyword", "--index-dir", index.folder, "x"]) == 2
    told = re.search(
        r"is damaged; run (python generate_embeddings\.py .*) to build", error_line(capsys.readouterr().err)
    )
    assert generate_embeddings.build_parser().parse_args(shlex.split(told[1])[2:]) == options
    content = (index.folder / "metadata.json").read_bytes()
    (index.folder / "metadata.json").write_bytes(content[:-20])
    assert exit_status(semantic_search.main, ["--mode", "keyword", "--index-dir", index.folder, "x"]) == 2
    assert told[1] in error_line(capsys.readouterr().err)


def test_a_model_given_by_a_relative_path_is_named_by_its_whole_one(index_of, monkeypatch, capsys):
    index = index_of(None)
    monkeypatch.chdir(index.folder.parent)
    build = ["--documents-root", index.header["documents_root"], "--documents", "*/*.md", "--model", "model"]
    assert exit_status(generate_embeddings.main, [*build, "--index-dir", index.folder]) == 0
    assert generate_embeddings.load_index(index.folder).header["model"]["name"] == str(index.folder.parent / "model")


@pytest.mark.parametrize("mode", MODES)
def test_searching_imports_no_torch_and_keyword_search_no_faiss_either(chain, mode):
    code = (
        "import sys, config, semantic_search\n"
        "try:\n    config.run(semantic_search.main)\nfinally:\n    print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--mode", mode, "--min-relevance", "0", "--index-dir", chain.index, "bütçe"],
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


def at_the_prompt(chain, lines: list[str], ending: str = "\n", options: tuple[str, ...] = (), **environment) -> str:
    """Return what a terminal shows when lines are typed at the prompt, each after the answer to the one before."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "semantic_search.py", "--mode", "keyword", "--index-dir", chain.index, *options],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "TERM": "xterm"} | environment,
    )
    os.close(theirs)
    seen = b""
    try:
        for line in [*(f"{line}\n" for line in lines), ending]:
            seen += read_until(ours, b"search> ")
            os.write(ours, line.encode())
        seen += read_until(ours, b"never printed")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"Traceback" not in seen
    return seen.decode()


@pytest.mark.parametrize("ending", ["\n", "  \n", "\x04"])
def test_the_prompt_answers_until_an_empty_line_or_control_d(chain, ending):
    seen = at_the_prompt(chain, ["bütçe"], ending)
    assert "Planlama/butce.md" in seen and "Traceback" not in seen


def test_commands_of_the_prompt_change_how_it_searches_and_open_a_result(chain, tmp_path):
    editor = tmp_path / "editor.py"
    editor.write_text(f"import sys\nopen({str(tmp_path / 'opened')!r}, 'w').write(repr(sys.argv[1:]))")
    lines = [":k 1", "görev", ":mode semantic", ":help", ":open 1", ":open 7", ":mode magic", ":root", "bütçe"]
    seen = at_the_prompt(chain, lines, EDITOR=f"{sys.executable} {editor}", NO_COLOR="1")
    assert "now semantic" in seen and "now 1" in seen and "2. " not in seen
    assert seen.count("error: ") == 3
    opened = (tmp_path / "opened").read_text()
    assert opened.startswith("['+") and str(chain.documents) in opened
    assert "bütçe" in (chain.index / ".search-history").read_text(encoding="utf-8")


def test_a_document_named_like_a_command_of_an_editor_is_opened_as_a_file(index_of, tmp_path):
    editor = tmp_path / "editor.py"
    editor.write_text(f"import sys\nopen({str(tmp_path / 'opened')!r}, 'w').write(repr(sys.argv[1:]))")
    index = index_of({"+!true .md": "# Bütçe\n\nBütçe yılda bir kez, kasım ayında yazılır.\n"})
    seen = at_the_prompt(SimpleNamespace(index=index.folder), ["bütçe", ":open 1"], EDITOR=f"{sys.executable} {editor}")
    line, path = ast.literal_eval((tmp_path / "opened").read_text())
    assert line == "+3" and Path(path).is_absolute() and path.endswith("+!true .md")
    Path(path).unlink()
    seen = at_the_prompt(SimpleNamespace(index=index.folder), ["bütçe", ":open 1"], EDITOR=f"{sys.executable} {editor}")
    assert "is gone; run python generate_embeddings.py" in " ".join(seen.split())


def test_a_line_at_the_prompt_that_is_not_utf_8_is_told_and_the_prompt_goes_on(chain, monkeypatch, capsys):
    lines = iter([UnicodeDecodeError("utf-8", b"\xfc", 0, 1, "invalid"), "bütçe", ""])

    def read(prompt):
        line = next(lines)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    options = argparse.Namespace(query=[], compare=None, json=False)
    index = generate_embeddings.load_index(chain.index)
    assert semantic_search.prompt(index, Request("keyword", 5), options)
    assert "not UTF-8" in capsys.readouterr().err


def test_a_quiet_prompt_still_tells_what_was_wrong(chain):
    seen = at_the_prompt(chain, [":mode magic", "bütçe"], options=("-q",))
    assert seen.count("error: ") == 1 and "is no command" in seen and "Planlama/butce.md" in seen


def test_colour_marks_the_words_on_a_terminal_unless_no_color_is_set(chain):
    assert "\x1b[1;33mbütçe\x1b[0m" in at_the_prompt(chain, ["bütçe"])
    assert "\x1b[1;33m" not in at_the_prompt(chain, ["bütçe"], NO_COLOR="1")


def test_control_c_stops_a_running_search_and_the_prompt_goes_on(chain, monkeypatch, capsys):
    typed = iter(["bütçe", "yedek parça"])
    answers = iter([KeyboardInterrupt, {"relevant": True, "results": []}])

    def answer(*_):
        if (one := next(answers)) is KeyboardInterrupt:
            raise one
        return one

    monkeypatch.setattr("builtins.input", lambda _: next(typed, ""))
    monkeypatch.setattr(semantic_search, "answer_query", answer)
    index = generate_embeddings.load_index(chain.index)
    assert semantic_search.prompt(index, Request("keyword", 5), None)
    assert "stopped" in capsys.readouterr().err


def test_lines_keep_to_the_width_with_wide_letters(index_of, capsys):
    from rich.cells import cell_len

    text = "設定画面で言語を選び保存を押してから再起動します kapak " * 12
    index = index_of({"a.md": f"# 設定の長い見出し {'と説明' * 30}\n\n{text}\n"})
    arguments = ["--mode", "keyword", "--min-relevance", "0", "--index-dir", index.folder, "kapak"]
    assert exit_status(semantic_search.main, arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3 and max(cell_len(line) for line in lines[1:]) <= 100
    assert all(line == line.rstrip() for line in lines)


def test_an_excerpt_of_wide_letters_takes_no_more_lines_than_another():
    from rich.cells import cell_len

    room = 3 * 97
    text = "設定画面で言語を選び保存を押してから再起動します kapak " * 12
    assert room * 0.8 < cell_len(semantic_search.excerpt(text, [], room)) <= room
    narrow = "ayarlar sayfasında dili seçip kaydettikten sonra yeniden başlatın " * 12
    assert room * 0.8 < cell_len(semantic_search.excerpt(narrow, [], room)) <= room


@pytest.mark.parametrize("columns", [1, 3, 40])
def test_a_narrow_terminal_is_written_on(chain, monkeypatch, capsys, columns):
    monkeypatch.setattr(semantic_search.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert semantic_search.make_console().width == max(columns, 20)
    for extra in ([], ["--explain", "--context", "1"], ["--compare", chain.index]):
        arguments = ["--mode", "keyword", "--index-dir", chain.index, *extra, "yedek parça"]
        assert exit_status(semantic_search.main, arguments) == 0
        assert "yedek" in capsys.readouterr().out.lower()


def test_a_long_query_is_told_how_much_of_it_is_looked_up(chain, capsys):
    index = generate_embeddings.load_index(chain.index)
    query = " ".join(f"kelime{number}" for number in range(80)) + " yedek"
    arguments = ["--index-dir", chain.index, query]
    exit_status(semantic_search.main, ["--mode", "keyword", *arguments])
    assert "only the first 64 words" in capsys.readouterr().err
    for mode in ("task", "semantic"):
        exit_status(semantic_search.main, ["--mode", mode, *arguments])
        assert "only the first 64 words" not in capsys.readouterr().err
    for count, told in ((64, False), (65, True)):
        names = " ".join(f"AB-{number}.2-x" for number in range(count))
        exit_status(semantic_search.main, ["--mode", "keyword", "--index-dir", chain.index, names])
        assert ("only the first 64 words" in capsys.readouterr().err) == told, count
        assert len([word for word in query_words(index.keywords, names) if word.kind == "name"]) == 64


def test_a_task_id_with_signs_that_steer_the_terminal_is_printed_without_them(chain, capsys):
    arguments = ["--mode", "task", "--min-relevance", "0", "--index-dir", chain.index, "\u202eKM-2.1\x1b"]
    exit_status(semantic_search.main, arguments)
    out = capsys.readouterr().out
    assert "KM-2.1" in out and "is described in" in out and "\x1b" not in out and "\u202e" not in out


def test_answers_to_piped_queries_stand_below_their_query(chain):
    done = run_script("semantic_search.py", "--mode", "keyword", "--index-dir", chain.index, stdin="bütçe\nKM-2.1\n")
    lines = done.stdout.splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("search> ")]
    assert [lines[number] for number in heads] == ["search> bütçe", "search> KM-2.1"]
    assert all(lines[number + 1].startswith("1. ") for number in heads)


def test_the_place_is_given_from_the_current_folder(chain, capsys, monkeypatch):
    monkeypatch.chdir(chain.documents)
    assert exit_status(semantic_search.main, ["--mode", "keyword", "--index-dir", chain.index, "kopyalanamaz"]) == 0
    assert capsys.readouterr().out.startswith("1. Docs/lisans_notu_kopya.md:3  ")


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


def test_control_c_at_the_prompt_drops_the_line_and_control_d_ends_it(chain):
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
        os.write(ours, b"half a line")
        read_until(ours, b"half a line")
        seen = b""
        for _ in range(20):  # one that comes just before the prompt begins to read is seen after the next
            process.send_signal(signal.SIGINT)
            seen += read_until(ours, b"search> ", 1)
            if b"search> " in seen:
                break
        assert b"search> " in seen and b"Traceback" not in seen
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
        process.wait()
        os.close(ours)


# -------------------------------------------------------------------- what a careful tester came upon


def test_a_code_name_typed_in_another_case_is_found_relevant_and_marked(index_of):
    index = index_of(
        {"a.md": "# Ekip\n\nDevOps ve OpenSearch bu ekipte yürütülür.\n", "b.md": "# Diğer\n\nBahçe işleri.\n"}
    )
    for query in ("devops", "opensearch"):
        answer = semantic_search.search(index, query, Request("keyword", 3, min_relevance=0.5, explain=True))
        (first, *_) = answer["results"]
        assert answer["relevant"] and first["explain"]["missing"] == []
        words = query_words(index.keywords, query)
        assert [first["text"][slice(*span)].lower() for span in semantic_search.matches(words, first["text"])] == [
            query
        ]


def test_by_words_the_entry_of_an_id_comes_before_what_mentions_it(index_of):
    entry = "# Plan\n\n## İlk çeyrek\n\n### KM-9.4: Onay\n\n" + "Belge imzalanır ve arşive kaldırılır. " * 2
    mentions = "# Notlar\n\n## Durum\n\nToplantıda KM-9.4 ele alındı, sonra öteki işlere geçildi.\n"
    others = {f"{number}.md": f"# Belge {number}\n\nBahçe işleri, {number}. hafta.\n" for number in range(60)}
    index = index_of(others | {"plan.md": entry, "notes.md": mentions})
    results = semantic_search.search(index, "KM-9.4", Request("keyword", 2))["results"]
    assert [result["source_file"] for result in results] == ["plan.md", "notes.md"]


def test_letters_with_their_marks_apart_are_found_in_queries_and_documents(index_of):
    apart = unicodedata.normalize("NFD", "# Ofis\n\nŞüpheli işçiler çağrıldı.\n")
    index = index_of({"a.md": apart, "b.md": "# Diğer\n\nBahçe işleri.\n"})
    for query in ("şüpheli işçiler", unicodedata.normalize("NFD", "şüpheli işçiler")):
        answer = semantic_search.search(index, query, Request("keyword", 3, min_relevance=0.5))
        assert answer["relevant"] and answer["results"][0]["source_file"] == "a.md"


def test_a_reader_that_goes_away_is_not_taken_for_nothing_found(chain):
    command = shlex.join(map(str, [sys.executable, REPOSITORY / "semantic_search.py", "--index-dir", chain.index]))
    options = "--mode keyword --top-k 50 --min-relevance 0 görev"
    script = f"for n in 1 2 3 4 5 6; do {command} {options} | true; echo ${{PIPESTATUS[0]}}; done"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert set(done.stdout.split()) <= {"0", "141"}, done
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("mode", ["semantic", "hybrid", "keyword"])
def test_the_explanation_of_each_mode_adds_up(ask, mode):
    for result in ask("bütçe donanım", mode, 3, "--explain", "--min-relevance", "0")[1]:
        values = result["explain"]
        parts = values["semantic_weight"] * (values["standard_cosine"] or 0)
        parts += (1 - values["semantic_weight"]) * (values["standard_keyword"] or 0)
        assert values["combined"] == pytest.approx(parts, abs=2e-3)


@pytest.mark.parametrize("weight", [-1.0, 7.0])
def test_a_weight_that_is_none_is_refused(index_of, weight):
    with pytest.raises(UserError, match="SEMANTIC_WEIGHT"):
        semantic_search.search(index_of({"a.md": "# A\n\nBir metin.\n"}), "metin", Request("hybrid", 3, weight))


def test_half_a_character_in_a_query_from_python_is_passed_over(index_of):
    index = index_of({"a.md": "# A\n\nGörev metni.\n"})
    assert semantic_search.search(index, "görev\ud83d", Request("semantic", 1))["results"]


@pytest.mark.parametrize("more", [["--mode", "task"], ["--compare"]])
def test_an_empty_line_among_queries_has_the_keys_of_every_answer(chain, more):
    arguments = ["--json", "--index-dir", chain.index, *more, *[chain.index] * ("--compare" in more)]
    done = run_script("semantic_search.py", *arguments, stdin="\nbütçe\n")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first.keys() == second.keys()


def test_a_name_of_a_file_does_not_steer_the_terminal(tmp_path, chain, monkeypatch, capsys):
    text = "# A\n\nKırmızı kapaklar her bahar yeniden boyanır.\n"
    root = write_documents(tmp_path / "project", {"a\033[31m\nb.md": text, "b\033[0m.md": text})
    index = tmp_path / "index"
    options = ["--documents-root", root, "--documents", "*.md", "--model", chain.model, "--index-dir", index]
    assert exit_status(generate_embeddings.main, options) == 0
    (root / "a\033[31m\nb.md").write_text(f"{text}\nBoya mavidir.\n", encoding="utf-8")
    assert exit_status(generate_embeddings.main, [*options, "--check"]) == 1
    assert exit_status(semantic_search.main, ["--mode", "keyword", "--index-dir", index, "kapaklar"]) == 0
    printed = capsys.readouterr()
    assert "a [31m b.md" in printed.out and "\033" not in printed.out + printed.err
    lines = iter(["kapaklar", ":open 1", ""])
    (root / "a\033[31m\nb.md").unlink()
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setenv("EDITOR", "true")
    options = argparse.Namespace(query=[], compare=None, json=False)
    assert semantic_search.prompt(generate_embeddings.load_index(index), Request("keyword", 5), options)
    printed = capsys.readouterr()
    assert "b.md is gone" in printed.err and "\033" not in printed.out + printed.err
