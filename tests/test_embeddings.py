"""Building, refreshing, checking and restoring the index; what happens to it when something goes wrong."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import (
    error_line,
    exit_status,
    lock_held,
    sample_texts,
    start_script,
    wait_until,
    write_documents,
)

import config
import generate_embeddings
import semantic_search
from generate_embeddings import embed, load_index
from prepare_finetuning_data import load_tokenizer, read_document, text_for_model
from run_finetuning import keyword_terms, write_keywords

MODES = ["semantic", "keyword", "hybrid", "task"]


@pytest.fixture
def built(project, tmp_path, chain, capsys):
    """An index of the small project, its own copy of the model, and short ways to run the two scripts."""
    model = shutil.copytree(chain.model, tmp_path / "model")
    index = tmp_path / "index"
    documents = ["--documents-root", project, "--documents", "**/*.md"]

    def build(*more):
        status = exit_status(
            generate_embeddings.main, [*documents, "--index-dir", index, *(more or ("--model", model))]
        )
        return status, capsys.readouterr()

    def manage(action):
        return exit_status(generate_embeddings.main, ["--index-dir", index, action]), capsys.readouterr()

    def search(query, mode="hybrid"):
        arguments = ["--json", "--mode", mode, "--top-k", "50", "--min-relevance", "0", "--index-dir", index, query]
        status = exit_status(semantic_search.main, arguments)
        printed = capsys.readouterr()
        return status, json.loads(printed.out)["results"] if status < 2 else error_line(printed.err)

    assert build()[0] == 0
    return SimpleNamespace(project=project, model=model, index=index, build=build, manage=manage, search=search)


def embedded(printed) -> int:
    return int(re.search(r"(\d+) embedded", printed.out)[1])


def snapshot(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def the_file(built, pattern: str) -> Path:
    (path,) = built.index.glob(pattern)
    return path


def latest(built) -> str:
    return load_index(built.index).header["files"]["embeddings"][0]


def flip_byte(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x10
    path.write_bytes(content)


def change(built, name="Planlama/butce.md", old="Sekiz yüz", new="Dokuz yüz") -> None:
    path = built.project / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def built_multilingual(built, tiny_multilingual_model):
    assert built.build("--model", tiny_multilingual_model)[0] == 0
    return built


# -------------------------------------------------------------------------------------------- what is written


def test_metadata_keeps_its_contract(built):
    content = (built.index / "metadata.json").read_bytes()
    first, _, body = content.partition(b"\n")
    whole = json.loads(content)
    assert whole["checksum"] == f"{zlib.crc32(body):08x}" and whole["checksum"].encode() in first
    assert whole["format"] == generate_embeddings.FORMAT and whole["dimensions"] == 32
    assert whole["passage_count"] == len(whole["passages"]) == content.count(b'"start_line"')
    assert len(content.splitlines()) == 2 + len(whole["passages"]) + 1
    assert whole["documents_root"] == str(built.project.resolve())
    assert set(whole["documents"]) == {
        path.relative_to(built.project).as_posix() for path in built.project.rglob("*.md")
    }
    for name, size, checksum in whole["files"].values():
        content = (built.index / name).read_bytes()
        assert (len(content), f"{zlib.crc32(content):08x}") == (size, checksum)
    assert set(whole["files"]) == {"embeddings", "keywords"}
    assert (built.index / whole["model"]["folder"]).resolve() == built.model.resolve()
    for passage in whole["passages"]:
        keys = ["id", "source_file", "also_in", "heading", "chunk_index", "start_line", "end_line", "text", "hash"]
        assert list(passage) == keys
        assert (built.project / passage["source_file"]).is_file()
    assert len({passage["id"] for passage in whole["passages"]}) == len(whole["passages"])
    (copied,) = (passage for passage in whole["passages"] if passage["also_in"])
    assert (copied["source_file"], copied["also_in"]) == ("Docs/lisans_notu_kopya.md", ["Ofis/lisans_notu.md"])


def test_vector_i_is_the_normalised_embedding_of_passage_i(built):
    index = load_index(built.index)
    vectors = index.vectors.reconstruct_n(0, index.vectors.ntotal)
    assert vectors.shape == (len(index.passages), 32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    texts = [text_for_model(passage["heading"], passage["text"]) for passage in index.passages]
    assert np.allclose(index.encoder.encode(texts), vectors, atol=1e-4)


def test_keyword_terms_are_folded_words_whole_names_and_stems():
    exact, stems = keyword_terms("Görevlendirme: KM-2.1, refreshToken ve src/main.py")
    assert {"gorevlendirme", "km-2-1", "refreshtoken", "refresh", "token", "src-main-py", "km"} <= set(exact)
    assert {"gorevl", "refres", "token"} <= set(stems)


def test_bm25_of_a_term_is_the_one_that_sqlite_computes():
    texts = [line for text in sample_texts() for line in text.splitlines() if line.strip()]
    index = write_keywords(":memory:", (((), text) for text in texts))
    database = sqlite3.connect(":memory:")
    database.execute("CREATE VIRTUAL TABLE keywords USING fts5(exact, stems, tokenize=\"unicode61 tokenchars '-'\")")
    rows = ((row, *map(" ".join, keyword_terms(text))) for row, text in enumerate(texts))
    database.executemany("INSERT INTO keywords(rowid, exact, stems) VALUES (?, ?, ?)", rows)
    terms = sorted({term for text in texts for term in keyword_terms(text)[0] if term.isascii()})[::20]
    assert len(terms) > 50
    for term in terms:
        query = "SELECT rowid, -bm25(keywords) FROM keywords WHERE keywords MATCH ? ORDER BY rowid"
        wanted = dict(database.execute(query, (f'exact: "{term}"',)).fetchall())
        places, counts = index.places_and_counts("exact", term, term)
        assert places.tolist() == list(wanted) and index.holders(term, term) >= len(wanted)
        assert np.allclose(index.bm25(places, counts), list(wanted.values()))


# ------------------------------------------------------------------------------------------------- refreshing


def test_a_second_run_says_current_and_changes_nothing(built):
    before = snapshot(built.index)
    status, printed = built.build()
    assert status == 0 and "is current" in printed.out
    assert snapshot(built.index) == before


def test_only_the_passages_of_a_changed_document_are_embedded_again(built):
    old = load_index(built.index)
    change(built)
    status, printed = built.build()
    assert status == 0 and embedded(printed) == 1
    assert "butce.md" in printed.err
    new = load_index(built.index)
    assert any("Dokuz yüz" in passage["text"] for passage in new.passages)
    assert not any("Sekiz yüz" in passage["text"] for passage in new.passages)
    vectors = {passage["hash"]: old.vectors.reconstruct(i) for i, passage in enumerate(old.passages)}
    for i, passage in enumerate(new.passages):
        if passage["hash"] in vectors:
            assert np.array_equal(vectors[passage["hash"]], new.vectors.reconstruct(i))


def test_a_document_that_is_only_touched_leaves_the_index_current(built):
    path = built.project / "Planlama" / "butce.md"
    path.write_bytes(path.read_bytes())
    assert "is current" in built.build()[1].out


def test_headings_and_texts_that_join_to_the_same_words_are_two_passages(built):
    text = "# Plan\n\nRelease\nDone by Friday.\n\n## Release\n\nDone by Friday.\n"
    (built.project / "plan.md").write_text(text, encoding="utf-8")
    assert built.build()[0] == 0
    found = [one for one in load_index(built.index).passages if one["source_file"] == "plan.md"]
    assert [(one["heading"], one["start_line"]) for one in found] == [(["Plan"], 3), (["Plan", "Release"], 8)]


def test_passages_that_the_scripts_read_otherwise_than_before_are_embedded_again(built, monkeypatch):
    monkeypatch.setattr(generate_embeddings, "scripts_digest", lambda: "of a later version")
    status, printed = built.build()
    assert status == 0 and embedded(printed) == 0
    monkeypatch.setattr(generate_embeddings, "scripts_digest", lambda: "of one more")
    monkeypatch.setattr("prepare_finetuning_data.plain_text", lambda markdown: markdown.replace("*", ""))
    status, printed = built.build()
    assert status == 0 and embedded(printed) > 0


def test_a_document_that_changes_while_it_is_read_is_read_again_by_the_next_run(built, monkeypatch):
    path = built.project / "Planlama" / "butce.md"
    change(built)

    def read_in_the_middle_of_a_change(document, max_mb):
        change(built, old="Dokuz", new="Onbir")
        text = read_document(document, max_mb)
        change(built, old="Onbir", new="Dokuz")
        return text

    monkeypatch.setattr(generate_embeddings, "read_document", read_in_the_middle_of_a_change)
    assert built.build()[0] == 0
    monkeypatch.undo()
    assert "Dokuz" in path.read_text(encoding="utf-8")
    assert built.build()[0] == 0
    found = built.search("yüz algılayıcı ihalede")[1]
    assert any("Dokuz" in one["text"] for one in found) and not any("Onbir" in one["text"] for one in found)
    assert "is current" in built.build()[1].out


def test_a_document_that_goes_after_it_changed_while_it_was_read_is_gone_from_the_next_index(built, monkeypatch):
    path = built.project / "Planlama" / "butce.md"
    change(built)

    def touched(document, max_mb):
        text = read_document(document, max_mb)
        os.utime(document)
        return text

    monkeypatch.setattr(generate_embeddings, "read_document", touched)
    assert built.build()[0] == 0
    monkeypatch.undo()
    path.unlink()
    assert load_index(built.index).changed_documents() == ["Planlama/butce.md"]
    assert "1 documents removed" in built.build()[1].err
    assert not any(one["source_file"] == "Planlama/butce.md" for one in built.search("yüz algılayıcı ihalede")[1])


def test_a_moved_folder_of_documents_that_a_link_leads_to_tells_what_is_new(built):
    moved = built.project.rename(built.project.with_name("moved"))
    built.project.symlink_to(moved)
    (moved / "yeni.md").write_text("# Yeni\n\nBu belge yenidir.\n", encoding="utf-8")
    assert load_index(built.index).changed_documents() == ["yeni.md"]


def test_a_model_that_is_swapped_while_documents_are_embedded_ends_the_build(built, monkeypatch):
    change(built)
    before = snapshot(built.index)

    def swapped(*arguments):
        with config.replacing(built.model) as temporary:
            shutil.copytree(built.model, temporary)
            flip_byte(temporary / "model.safetensors", 0.5)
        return embed(*arguments)

    monkeypatch.setattr(generate_embeddings, "embed", swapped)
    status, printed = built.build()
    assert status == 2 and "was changed meanwhile" in error_line(printed.err)
    assert {name: before[name] for name in before if name != ".lock-holder"}.items() <= snapshot(built.index).items()


def test_a_moved_paragraph_keeps_its_vector_and_gets_its_new_lines(built):
    path = built.project / "Planlama" / "butce.md"
    path.write_text("\n\n\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert embedded(built.build()[1]) == 0
    (result,) = (one for one in built.search("algılayıcı ihale", "keyword")[1] if "ihalede" in one["text"])
    assert "Sekiz yüz" in path.read_text(encoding="utf-8").split("\n")[result["start_line"] - 1]


def test_a_deleted_document_disappears_from_every_mode(built):
    assert any(one["source_file"] == "Planlama/butce.md" for one in built.search("bütçe donanım")[1])
    (built.project / "Planlama" / "butce.md").unlink()
    status, printed = built.build()
    assert status == 0 and embedded(printed) == 0
    for mode in MODES:
        status, results = built.search("bütçe donanım ölçüm", mode)
        assert results and "Planlama/butce.md" not in {one["source_file"] for one in results}


def test_a_deleted_original_leaves_its_copy_as_the_source(built):
    (built.project / "Docs" / "lisans_notu_kopya.md").unlink()
    assert built.build()[0] == 0
    (first, *_) = built.search("kopyalanamaz", "keyword")[1]
    assert (first["source_file"], first["also_in"]) == ("Ofis/lisans_notu.md", [])


def test_another_passage_length_or_model_builds_the_index_anew(built, monkeypatch, tiny_model):
    monkeypatch.setattr(config, "MAX_PASSAGE_CHARS", 100)
    status, printed = built.build()
    assert status == 0 and "MAX_PASSAGE_CHARS" in printed.err
    status, printed = built.build("--model", tiny_model)
    assert status == 0 and "the model changed" in printed.err
    assert embedded(printed) == len(load_index(built.index).passages)


def test_a_model_without_an_onnx_form_gets_one_in_the_index_folder(built, tiny_model):
    before = snapshot(tiny_model)
    assert built.build("--model", tiny_model)[0] == 0
    assert snapshot(tiny_model) == before
    (encoder,) = built.index.glob("encoder-*")
    assert (encoder / "onnx" / "model.onnx").is_file() and not list(encoder.glob("*.safetensors"))
    assert built.search("bütçe", "semantic")[0] == 0
    assert "is current" in built.build("--model", tiny_model)[1].out


def test_a_refresh_gives_the_same_records_as_a_build_from_nothing(built, tmp_path):
    """Copies come and go, and change places with their originals; only what changed is cut again."""
    root, glossary = built.project, built.project / "Docs" / "glossary.md"
    steps = [
        lambda: write_documents(root, {"a/first.md": glossary.read_text(encoding="utf-8")}),  # a copy before it
        lambda: write_documents(root, {"z/last.md": "Önce.\n\n" + glossary.read_text(encoding="utf-8")}),
        lambda: (root / "a" / "first.md").unlink(),  # the original's own place counts again
        lambda: glossary.rename(root / "Docs" / "sözlük.md"),  # moved
        lambda: change(built),
        lambda: (root / "Docs" / "lisans_notu_kopya.md").write_text("# Başka\n\nBaşka bir metin.\n", encoding="utf-8"),
        lambda: write_documents(root, {"Ofis/twice.md": "# A\n\nAynı metin.\n\n# A\n\nAynı metin.\n"}),
    ]
    for number, step in enumerate(steps):
        step()
        assert built.build()[0] == 0
        assert built.build("--model", built.model, "--index-dir", tmp_path / str(number))[0] == 0
        refreshed, anew = load_index(built.index), load_index(tmp_path / str(number))
        assert list(refreshed.passages) == list(anew.passages)
        assert refreshed.header["documents"] == anew.header["documents"]


def test_a_search_says_in_one_line_that_documents_have_changed_since(built, capsys):
    arguments = ["--json", "--mode", "keyword", "--index-dir", str(built.index), "bütçe"]
    assert exit_status(semantic_search.main, arguments) == 0
    assert capsys.readouterr().err == ""
    change(built)
    (built.project / "Docs" / "glossary.md").unlink()
    path = built.project / "Planlama" / "mimari.md"
    path.write_bytes(path.read_bytes())  # only touched
    assert exit_status(semantic_search.main, arguments) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "older than 2 of its documents" in line and COMMAND.search(line)


def test_a_search_says_that_documents_were_added_where_the_index_looks_for_them(built, tmp_path, capsys):
    arguments = ["--json", "--mode", "keyword", "--index-dir", str(built.index), "bütçe"]
    write_documents(built.project, {"Yeni/çok yeni.md": "# Yeni\n\nYeni bir belge.\n", "Yeni/image.svg": "<svg/>"})
    write_documents(tmp_path, {"outside.md": "# Outside\n\nNot of the project.\n"})
    (built.project / "Yeni" / "link.md").symlink_to(tmp_path / "outside.md")
    assert exit_status(semantic_search.main, arguments) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "older than 1 of its documents (Yeni/çok yeni.md)" in line and COMMAND.search(line)
    (built.project / "Yeni" / "\x1b[31mred\n.md").write_text("# Kırmızı\n\nBir belge.\n", encoding="utf-8")
    assert exit_status(semantic_search.main, arguments) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "older than 2" in line and "\x1b" not in line
    (built.project / "Yeni" / "\x1b[31mred\n.md").unlink()
    assert built.build()[0] == 0
    capsys.readouterr()
    assert exit_status(semantic_search.main, arguments) == 0
    assert capsys.readouterr().err == ""


def test_other_globs_for_the_same_documents_are_taken_over_and_their_order_does_not_count(built):
    model = ["--model", built.model]
    assert built.build(*model, "--documents", "*/*.md")[0] == 0
    status, printed = built.build(*model, "--documents", "*/*.md", "--documents", "/**/*.md", "--check")
    assert status == 0 and "is current" in printed.out
    status, printed = built.build(*model, "--check")
    assert status == 1 and "the globs of the documents changed" in printed.out


def test_a_document_whose_name_is_not_utf8_is_skipped_and_not_asked_for_again(built, capsys):
    path = built.project / "Docs" / os.fsdecode(b"\xff.md")
    try:
        path.write_text("# A\n\nSome text of a document.\n", encoding="utf-8")
    except OSError:
        pytest.skip("this file system keeps to UTF-8")
    status, printed = built.build()
    assert status == 0 and "not UTF-8" in printed.err
    assert load_index(built.index).changed_documents() == []


# ---------------------------------------------------------------------------------------------- FAISS indexes


@pytest.mark.parametrize("factory", ["Flat", "HNSW8,Flat", "IVF4,Flat", "SQ8", "PCA16,IVF4,Flat"])
def test_any_faiss_index_is_built_searched_and_refreshed(built, monkeypatch, factory):
    exact = [one["id"] for one in built.search("yüz algılayıcı ihalede", "semantic")[1]][:3]
    monkeypatch.setattr(config, "FAISS_INDEX", factory)
    status, printed = built.build()
    assert status == 0 and "config.FAISS_INDEX changed" in printed.err and embedded(printed) == 0
    assert set(exact) <= {one["id"] for one in built.search("yüz algılayıcı ihalede", "semantic")[1]}
    change(built)
    status, printed = built.build()
    kept = factory in ("Flat", "HNSW8,Flat", "IVF4,Flat")
    assert embedded(printed) == (1 if kept else len(load_index(built.index).passages))
    for mode in MODES:
        assert any("Dokuz yüz" in one["text"] for one in built.search("yüz algılayıcı ihalede", mode)[1])


@pytest.mark.parametrize("factory", ["nonsense", "", "IVF9999,Flat", "IDMap,Flat", "PQ5"])
def test_a_faiss_index_that_can_not_be_is_one_line_and_leaves_the_old_one(built, monkeypatch, factory):
    before = snapshot(built.index)
    monkeypatch.setattr(config, "FAISS_INDEX", factory)
    status, printed = built.build()
    assert status == 2 and f"config.FAISS_INDEX {factory!r}" in error_line(printed.err)
    assert {name: digest for name, digest in before.items() if ".lock" not in name}.items() <= snapshot(
        built.index
    ).items()


def test_many_passages_are_searched_approximately_and_found_nearly_as_well(tmp_path, monkeypatch):
    import faiss

    monkeypatch.setattr(generate_embeddings, "EXACT_PASSAGES", 1000)
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((50, 24))
    vectors = (centres[rng.integers(0, 50, 8000)] + 0.6 * rng.standard_normal((8000, 24))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert generate_embeddings.write_vectors(tmp_path / "a.index", vectors, "auto")
    index = faiss.read_index(str(tmp_path / "a.index"))
    assert 1 < index.nprobe < index.nlist
    queries = vectors[::40] + 0.2 * rng.standard_normal((200, 24)).astype(np.float32)
    exact = faiss.knn(queries, vectors, 10, faiss.METRIC_INNER_PRODUCT)[1]
    found = index.search(queries, 10)[1]
    assert np.mean([np.isin(one, other).mean() for one, other in zip(exact, found, strict=True)]) >= 0.98
    assert np.array_equal(index.reconstruct_batch(np.arange(8000)), vectors)


def test_half_precision_gives_nearly_the_same_vectors(chain):
    from run_finetuning import Encoder, load_model

    texts = ["gece boruda kaçak olduğunu nasıl anlıyoruz?", "a short text", "görev takibi"]
    vectors = generate_embeddings.half_precision(load_model(chain.model, "cpu"))(texts)
    assert vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (vectors * Encoder(chain.model).encode(texts)).sum(axis=1).min() > 0.999


# --------------------------------------------------------------------------------------------------- backups


def test_backups_are_kept_listed_and_restored(built, monkeypatch):
    monkeypatch.setattr(config, "INDEX_BACKUPS", 2)
    first = snapshot(built.index)
    for number in range(1, 4):
        change(built, old="Sekiz" if number == 1 else f"Sayı{number - 1}", new=f"Sayı{number}")
        assert built.build()[0] == 0
    for pattern in ("metadata*.json", "embeddings-*.index", "keywords-*.sqlite"):
        assert len(list(built.index.glob(pattern))) == 3
    assert not set(snapshot(built.index)) & {name for name in first if name.startswith("embeddings-")}
    status, printed = built.manage("--list-backups")
    assert status == 0 and len(printed.out.splitlines()) == 3
    assert re.fullmatch(r"(\S+ +\d+ passages +[\d.]+ MB  .*\n){3}", printed.out)

    for wanted in ("Sayı2", "Sayı1"):
        status, printed = built.manage("--restore")
        assert status == 0 and "restored" in printed.out
        for mode in MODES:
            assert any(wanted in one["text"] for one in built.search("yüz algılayıcı ihalede", mode)[1])
    status, printed = built.manage("--restore")
    assert status == 2 and "no usable backup" in error_line(printed.err)
    assert built.search("bütçe")[0] == 0


def test_no_backups_are_kept_where_none_are_wanted(built, monkeypatch):
    monkeypatch.setattr(config, "INDEX_BACKUPS", 0)
    change(built)
    assert built.build()[0] == 0
    assert len(list(built.index.glob("metadata*.json"))) == 1 == len(list(built.index.glob("embeddings-*")))
    assert built.search("bütçe")[0] == 0


def test_restore_passes_over_a_damaged_backup(built):
    for old, new in (("Sekiz", "Dokuz"), ("Dokuz", "Onbir")):
        change(built, old=old, new=new)
        assert built.build()[0] == 0
    newest = max(built.index.glob("metadata-*.json"))
    newest.write_bytes(newest.read_bytes()[:100])
    status, printed = built.manage("--restore")
    assert status == 0 and newest.name in printed.err
    assert any("Sekiz" in one["text"] for one in built.search("yüz algılayıcı ihalede")[1])


def test_restore_passes_over_a_backup_whose_model_is_gone(built, tiny_model):
    before = snapshot(built.model)
    for _ in range(2):  # the second time, the first model is not there beside it any more
        with config.replacing(built.model) as temporary:
            shutil.copytree(tiny_model, temporary)
    assert before.keys() != snapshot(built.model).keys()
    assert built.build()[0] == 0
    current = snapshot(built.index)
    status, printed = built.manage("--restore")
    assert status == 2 and "is gone or has changed" in printed.err and "--restore" not in printed.err
    assert snapshot(built.index) == current
    assert built.search("bütçe", "semantic")[0] == 0


def test_a_backup_that_lacks_a_file_takes_no_good_ones_place(built, monkeypatch):
    monkeypatch.setattr(config, "INDEX_BACKUPS", 2)
    for old, new in (("Sekiz", "Dokuz"), ("Dokuz", "Onbir")):
        change(built, old=old, new=new)
        assert built.build()[0] == 0
    max(one for one in built.index.glob("embeddings-*") if one.name != latest(built)).unlink()
    change(built, old="Onbir", new="Oniki")
    assert built.build()[0] == 0
    for wanted in ("Onbir", "Sekiz"):
        assert built.manage("--restore")[0] == 0
        assert any(wanted in one["text"] for one in built.search("yüz algılayıcı ihalede")[1])


def test_restore_without_a_backup_names_the_command_for_the_same_documents(built, tmp_path):
    status, printed = built.manage("--restore")
    line = error_line(printed.err)
    assert status == 2 and f"--documents-root {built.project}" in line and f"--model {built.model}" in line
    nowhere = tmp_path / "nowhere"
    assert exit_status(generate_embeddings.main, ["--index-dir", nowhere, "--restore"]) == 2
    assert not nowhere.exists()


def test_an_index_that_names_files_of_other_folders_is_refused(built, tmp_path):
    theirs = tmp_path / "theirs.json"
    theirs.write_text("{}", encoding="utf-8")
    (built.index / "metadata-x").mkdir()
    current = built.index / "metadata.json"
    header, passages = generate_embeddings.read_metadata(current)
    header |= {"id": "x/../../theirs"}
    del header["checksum"], header["header_checksum"], header["passages"]
    generate_embeddings.write_metadata(current, header, list(passages))
    status, line = built.search("bütçe")
    assert status == 2 and "damaged" in line
    change(built)
    assert built.build()[0] == 0
    assert theirs.read_text(encoding="utf-8") == "{}"


def test_what_an_index_says_of_itself_does_not_steer_the_terminal(built):
    current = built.index / "metadata.json"
    header, passages = generate_embeddings.read_metadata(current)
    header["model"]["name"] = "evil\x1b]0;title\x07"
    del header["checksum"], header["header_checksum"], header["passages"]
    generate_embeddings.write_metadata(current, header, list(passages))
    status, printed = built.manage("--list-backups")
    assert status == 0 and "evil" in printed.out and "\x1b" not in printed.out


def test_a_file_that_goes_between_its_check_and_its_opening_belongs_to_a_superseded_index(built, monkeypatch):
    monkeypatch.setattr(config, "INDEX_BACKUPS", 0)
    index = load_index(built.index)
    change(built)
    assert built.build()[0] == 0
    unchecked = lambda folder, header, kind: folder / header["files"][kind][0]
    monkeypatch.setattr(generate_embeddings, "checked_file", unchecked)
    for part in ("vectors", "keywords"):
        with pytest.raises(generate_embeddings.Superseded):
            getattr(index, part)


def test_backups_are_listed_where_the_index_itself_is_damaged(built):
    change(built)
    assert built.build()[0] == 0
    (built.index / "metadata.json").write_text("{", encoding="utf-8")
    status, printed = built.manage("--list-backups")
    assert status == 0 and len(printed.out.splitlines()) == 1 and "--restore" in printed.err


def test_a_damaged_backup_does_not_stop_a_build(built):
    change(built)
    assert built.build()[0] == 0
    (backup,) = built.index.glob("metadata-*.json")
    backup.write_text("{", encoding="utf-8")
    change(built, old="Dokuz", new="Onbir")
    status, printed = built.build()
    assert status == 0, printed.err
    assert any("Onbir" in one["text"] for one in built.search("yüz algılayıcı ihalede")[1])


def test_files_of_others_survive_in_the_index_folder_and_around_it(built):
    (built.index / "notes.txt").write_text("mine", encoding="utf-8")
    (built.index / "folder").mkdir()
    (built.index / "folder" / "embeddings-x.index").write_text("mine", encoding="utf-8")
    own_names = ["metadata-notes.json", "keywords-list.sqlite", "encoder-thesis", "unfinished-novel.npz"]
    for name in own_names:
        (built.index / name).write_text("mine", encoding="utf-8")
    outside = {path: snapshot(path) for path in (built.project, built.model)}
    for number in range(4):
        change(built, old="Sekiz" if number == 0 else f"Sayı{number - 1}", new=f"Sayı{number}")
        outside[built.project] = snapshot(built.project)
        assert built.build()[0] == 0
    assert built.manage("--restore")[0] == 0
    assert all((built.index / name).is_file() for name in own_names)
    assert (built.index / "notes.txt").is_file() and (built.index / "folder" / "embeddings-x.index").is_file()
    assert {path: snapshot(path) for path in outside} == outside
    assert {path.name for path in built.index.parent.iterdir()} == {"project", "model", "index"}


# ----------------------------------------------------------------------------------------------------- --check


def test_check_tells_by_its_exit_code_whether_the_index_is_current_and_changes_nothing(built):
    before = snapshot(built.index)
    status, printed = built.build("--model", built.model, "--check")
    assert status == 0 and "is current" in printed.out
    change(built)
    (built.project / "new.md").write_text("Yeni belge.\n", encoding="utf-8")
    (built.project / "Docs" / "glossary.md").unlink()
    status, printed = built.build("--model", built.model, "--check")
    assert status == 1
    for words in ("not current", "new.md", "butce.md", "glossary.md"):
        assert words in printed.out
    assert snapshot(built.index) == before


def test_check_without_an_index_creates_none(built, tmp_path):
    status, printed = built.build("--model", built.model, "--check", "--index-dir", tmp_path / "other")
    assert status == 1 and "no index" in printed.out
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------------------------------------------- damage

COMMAND = re.compile(r"run python generate_embeddings\.py|run run_finetuning\.py")


DAMAGES = [(damage, place) for damage in ("flip", "cut") for place in (0.0, 0.3, 0.6, 0.99)] + [("gone", 0.0)]


@pytest.mark.parametrize(("damage", "place"), DAMAGES)
@pytest.mark.parametrize("pattern", ["metadata.json", "embeddings-*.index", "keywords-*.sqlite"])
def test_a_damaged_file_is_noticed_by_the_search_that_needs_it_and_mended_by_the_next_build(
    built, pattern, place, damage
):
    path = the_file(built, pattern)
    if damage == "flip":
        flip_byte(path, place)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * place)])
    for mode in MODES:
        needed = ("metadata", "keywords") if mode == "keyword" else ("",)
        status, line = built.search("bütçe donanım", mode)
        if path.name.startswith(needed):
            assert status == 2 and COMMAND.search(line), (mode, line)
        else:
            assert status == 0
    status, printed = built.build()
    assert status == 0 and "is current" not in printed.out
    for mode in MODES:
        assert built.search("bütçe donanım", mode)[0] == 0


@pytest.mark.parametrize("key", ["id", "model", "files", "passage_count", "checksum", "format"])
def test_a_flipped_bit_in_a_key_of_the_header_is_damage_and_mended(built, key):
    change(built)
    assert built.build()[0] == 0
    path = built.index / "metadata.json"
    whole = path.read_bytes()
    place = whole.index(b'"%s": ' % key.encode()) + 1
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    status, line = built.search("bütçe", "keyword")
    assert status == 2 and COMMAND.search(line)
    assert built.manage("--list-backups")[0] == 0
    assert built.build()[0] == 0
    assert built.search("bütçe", "keyword")[0] == 0


def test_a_flipped_bit_in_a_backups_header_leaves_builds_and_the_list_of_backups_alone(built):
    change(built)
    assert built.build()[0] == 0
    backup = the_file(built, "metadata-*.json")
    backup.write_bytes(backup.read_bytes().replace(b'"id"', b'"ie"'))
    assert built.manage("--list-backups")[0] == 0
    change(built, old="Dokuz yüz", new="On")
    assert built.build()[0] == 0


def test_a_damaged_encoder_of_the_index_is_noticed_and_exported_again(built, tiny_model):
    assert built.build("--model", tiny_model)[0] == 0
    for name in ("onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json"):
        path = the_file(built, "encoder-*") / name
        times = path.stat()
        flip_byte(path, 0.5)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        status, line = built.search("bütçe", "semantic")
        assert status == 2 and COMMAND.search(line)
        assert built.build("--model", tiny_model, "--check")[0] == 1
        assert built.build("--model", tiny_model)[0] == 0
        assert built.search("bütçe", "semantic")[0] == 0


def test_an_index_below_the_documents_adds_none_to_them(built, tiny_model):
    arguments = ["--model", tiny_model, "--index-dir", built.project / "index"]
    assert built.build(*arguments)[0] == 0
    status, printed = built.build(*arguments)
    assert status == 0 and "is current" in printed.out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive"])
def test_a_damaged_rest_of_an_interrupted_run_is_passed_over(built, content):
    fingerprint = load_index(built.index).header["model"]["fingerprint"][:12]
    (built.index / f"unfinished-{fingerprint}-x.npz").write_bytes(content)
    change(built)
    assert built.build()[0] == 0
    assert not list(built.index.glob("unfinished-*"))


def test_a_damaged_index_takes_no_good_backups_place(built, monkeypatch):
    monkeypatch.setattr(config, "INDEX_BACKUPS", 1)
    change(built)
    assert built.build()[0] == 0
    flip_byte(built.index / "metadata.json", 0.98)
    assert built.build()[0] == 0
    assert built.manage("--restore")[0] == 0
    assert any("Sekiz yüz" in one["text"] for one in built.search("algılayıcı ihalede")[1])


def test_an_index_that_can_not_be_read_is_not_called_damaged(built):
    (built.index / "metadata.json").unlink()
    (built.index / "metadata.json").mkdir()
    status, line = built.search("bütçe", "keyword")
    assert status == 2 and "metadata.json: Is a directory" in line and "damaged" not in line


def test_an_index_folder_that_is_a_file_is_not_called_damaged(built, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for action in ("--list-backups", "--restore", "--check"):
        status, printed = built.build("--model", built.model, "--index-dir", file, action)
        assert status == 2 and "damaged" not in error_line(printed.err)


def test_of_several_processes_one_restores(built, monkeypatch):
    change(built)
    assert built.build()[0] == 0
    before = snapshot(built.index)
    monkeypatch.setenv("RANK", "1")
    assert built.manage("--restore")[0] == 0 and snapshot(built.index) == before
    monkeypatch.setenv("RANK", "0")
    assert built.manage("--restore")[0] == 0 and snapshot(built.index) != before


def test_a_copy_left_by_a_kill_before_the_commit_is_no_step_back(built):
    for old, new in (("Sekiz yüz", "Dokuz yüz"), ("Dokuz yüz", "On bin")):
        change(built, old=old, new=new)
        assert built.build()[0] == 0
    current = load_index(built.index).header["id"]
    shutil.copy(built.index / "metadata.json", built.index / f"metadata-{current}.json")
    for amount in ("Dokuz yüz", "Sekiz yüz"):
        assert built.manage("--restore")[0] == 0
        assert any(amount in one["text"] for one in built.search("algılayıcı ihalede")[1])
    assert built.manage("--restore")[0] == 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [("INDEX_BACKUPS", -1), ("INDEX_BACKUPS", None), ("MAX_PASSAGE_CHARS", 0), ("MAX_DOCUMENT_MB", "20")],
)
def test_a_setting_that_makes_no_sense_is_one_line_and_changes_nothing(built, monkeypatch, setting, value):
    change(built)
    before = snapshot(built.index)
    monkeypatch.setattr(config, setting, value)
    status, printed = built.build()
    assert status == 2 and f"config.{setting}" in error_line(printed.err)
    assert snapshot(built.index) == before


def test_a_kind_of_index_with_which_faiss_crashes_is_refused(built, monkeypatch):
    (built.project / "more.md").write_text("\n\n".join(f"## {n}\n\nMetin {n}." for n in range(60)), encoding="utf-8")
    monkeypatch.setattr(config, "FAISS_INDEX", "IVF2,PQ4x4fs")
    status, printed = built.build()
    assert status == 2 and "config.FAISS_INDEX" in error_line(printed.err)
    assert built.search("bütçe")[0] == 0


@pytest.mark.parametrize("content", ["{}", "[]", "null", "{]", '{"format": 1}', '"format"', "\x00", "{}\n{}\n"])
def test_json_that_is_no_metadata_is_one_line_and_exit_code_2(built, content):
    (built.index / "metadata.json").write_text(content, encoding="utf-8")
    status, line = built.search("bütçe", "keyword")
    assert status == 2 and COMMAND.search(line)
    assert built.build()[0] == 0
    assert built.search("bütçe", "keyword")[0] == 0


def test_a_document_skipped_for_its_size_is_indexed_once_the_limit_is_raised(built, monkeypatch):
    large = built.project / "large.md"
    large.write_text("# Büyük\n\n" + "Zürafalar uzun boyunludur.\n\n" * 300, encoding="utf-8")
    monkeypatch.setattr(config, "MAX_DOCUMENT_MB", large.stat().st_size / 2e6)
    status, printed = built.build()
    documents = int(re.search(r"(\d+) documents", printed.out)[1])
    assert status == 0 and not built.search("zürafalar", "keyword")[1]
    monkeypatch.setattr(config, "MAX_DOCUMENT_MB", 20)
    status, printed = built.build()
    assert status == 0 and "config.MAX_DOCUMENT_MB changed" in printed.err
    assert f"{documents + 1} documents" in printed.out
    assert built.search("zürafalar", "keyword")[1][0]["source_file"] == "large.md"


def test_a_model_with_an_onnx_file_of_its_publishers_gets_one_of_ours(built, tiny_model, tmp_path):
    import torch

    class Body(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return (input_ids * attention_mask).float()

    folder = shutil.copytree(tiny_model, tmp_path / "published")
    (folder / "onnx").mkdir()
    ones = torch.ones((1, 4), dtype=torch.int64)
    torch.onnx.export(
        Body(),
        (ones, ones),
        str(folder / "onnx" / "model.onnx"),
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"],
        dynamo=False,
    )
    assert built.build("--model", folder)[0] == 0
    assert list(built.index.glob("encoder-*"))
    assert built.search("bütçe", "semantic")[0] == 0


def test_an_index_of_another_format_version_is_built_anew(built):
    path = built.index / "metadata.json"
    path.write_bytes(path.read_bytes().replace(b'"format": %d' % generate_embeddings.FORMAT, b'"format": 0'))
    status, line = built.search("bütçe", "keyword")
    assert status == 2 and "format 0" in line and COMMAND.search(line)
    assert built.build()[0] == 0
    assert built.search("bütçe", "keyword")[0] == 0


def test_a_damaged_index_can_be_restored_to_the_one_before(built):
    change(built)
    assert built.build()[0] == 0
    (built.index / "metadata.json").write_text("{", encoding="utf-8")
    assert "--restore" in built.search("bütçe")[1]
    assert built.manage("--restore")[0] == 0
    assert any("Sekiz yüz" in one["text"] for one in built.search("yüz algılayıcı ihalede")[1])


def test_a_damaged_index_without_backups_is_answered_with_the_command_that_builds_it(built):
    (built.index / "metadata.json").write_text("{", encoding="utf-8")
    line = built.search("bütçe")[1]
    assert "generate_embeddings.py" in line and "--restore" not in line


# ------------------------------------------------------------------------------- the model behind the index


def test_keywords_answer_when_the_model_is_gone_and_semantic_search_says_so(built):
    shutil.rmtree(built.model)
    assert built.search("bütçe", "keyword")[0] == 0
    status, line = built.search("bütçe", "semantic")
    assert status == 2 and COMMAND.search(line) and "--mode keyword" in line
    for mode in ("hybrid", "task"):
        assert built.search("bütçe", mode)[0] == 0
    status, printed = built.build()
    assert status == 2 and str(built.model) in error_line(printed.err)
    assert built.search("bütçe", "keyword")[0] == 0


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_a_changed_or_lost_onnx_file_is_noticed_by_the_search_and_by_the_next_build(built, damage, name):
    path = built.model / "onnx" / name
    if damage == "flip":
        flip_byte(path, 0.7)
    else:
        path.unlink()
    status, line = built.search("bütçe", "semantic")
    assert status == 2 and COMMAND.search(line)
    assert "is current" not in built.build()[1].out


def test_another_model_in_the_same_folder_is_noticed_and_the_index_built_anew(built, tiny_multilingual_model, tmp_path):
    from run_finetuning import load_model, save_model

    model = load_model(tiny_multilingual_model, "cpu")
    evaluation = json.loads((built.model / "evaluation.json").read_text(encoding="utf-8"))
    save_model(model, built.model, evaluation, ["bir metin", "a second text"])
    shutil.rmtree(config.previous(built.model))
    status, line = built.search("bütçe", "semantic")
    assert status == 2 and COMMAND.search(line)
    status, printed = built.build()
    assert status == 0 and "the model changed" in printed.err
    assert embedded(printed) == len(load_index(built.index).passages)
    assert built.search("bütçe", "semantic")[0] == 0


@pytest.mark.parametrize("name", ["onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json", "config.json"])
def test_a_damaged_encoder_in_the_index_folder_is_noticed_and_made_again(built, tiny_model, name):
    assert built.build("--model", tiny_model)[0] == 0
    flip_byte(the_file(built, "encoder-*") / name, 0.5)
    status, line = built.search("bütçe", "semantic")
    assert status == 2 and COMMAND.search(line)
    status, printed = built.build("--model", tiny_model)
    assert status == 0 and embedded(printed) == 0
    assert built.search("bütçe", "semantic")[0] == 0


def test_an_encoder_lost_from_the_index_folder_is_made_again(built, tiny_model):
    assert built.build("--model", tiny_model)[0] == 0
    shutil.rmtree(the_file(built, "encoder-*"))
    assert built.search("bütçe", "semantic")[0] == 2
    assert built.build("--model", tiny_model)[0] == 0
    assert built.search("bütçe", "semantic")[0] == 0


# --------------------------------------------------------------------------- the vocabulary of a multilingual model


def write_unigram_tokenizer(folder: Path, normalizer) -> list[str]:
    """Write a tokenizer with thousands of overlapping pieces and a window of 40 tokens; return texts to cut."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    draw = random.Random(5)
    lines = [line for text in sample_texts() for line in text.splitlines() if line.strip()]
    words = sorted({"▁" + word for line in lines for word in line.split()})
    found = {word[a:b] for word in words for a in range(len(word)) for b in range(a + 1, a + 6)}
    pieces = [(piece, draw.uniform(-12, -4)) for piece in sorted(found) if draw.random() < 0.6]
    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    rarest = ("zzzzz", -40.0)  # what an unknown character costs is reckoned from the lowest score
    tokenizer = Tokenizer(models.Unigram([*special, *pieces, rarest], 3))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens([*(name for name, _ in special), AddedToken("<mask>", lstrip=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    letters = sorted(set("".join(lines)))
    random_texts = ["".join(draw.choices([*letters, " ", "♥", "語"], k=draw.randint(1, 300))) for _ in range(200)]
    odd = [
        "",
        " ",
        "♥♥ kayıt 🎉🎉",
        "日本語",
        "<mask> <s>a</s>b <mask> c",
        "e\u0301 ﬁ ①",
        "a\0b",
        "\t\n x",
        "x" * 3000,
        "<unk>",
    ]
    return [*odd, *random_texts, *draw.sample(lines, 300), "\n".join(lines[:200])]


@pytest.mark.parametrize("normalized", [False, True])
def test_a_query_is_cut_as_the_whole_tokenizer_cuts_it(tmp_path, normalized):
    from tokenizers import normalizers

    rules = normalizers.Sequence([normalizers.Replace("ı", "i"), normalizers.NFKC()]) if normalized else None
    texts = write_unigram_tokenizer(tmp_path, rules)
    wanted = [one.ids for one in load_tokenizer(tmp_path)[0].encode_batch(texts)]
    assert max(map(len, wanted)) == 40 and any(3 in ids for ids in wanted)
    model = {"fingerprint": "0" * 64, "folder": "."}
    size, _ = generate_embeddings.prepare_pieces(model, tmp_path)
    path = generate_embeddings.pieces_file(tmp_path, model)
    assert path.stat().st_size == size
    assert generate_embeddings.QueryTokenizer(path)(texts) == wanted


def test_a_search_with_a_multilingual_model_does_not_load_the_whole_vocabulary(built_multilingual, monkeypatch):
    index = load_index(built_multilingual.index)
    vectors = index.vectors.reconstruct_n(0, len(index.passages))
    monkeypatch.setattr("run_finetuning.load_tokenizer", None)
    texts = [text_for_model(passage["heading"], passage["text"]) for passage in index.passages]
    assert np.allclose(index.encoder.encode(texts), vectors, atol=1e-4)
    assert built_multilingual.search("bütçe", "semantic")[0] == 0


def test_the_vocabulary_is_written_once_for_a_model_and_goes_with_it(built_multilingual, monkeypatch):
    built = built_multilingual
    path = the_file(built, "pieces-*.sqlite")
    written = path.stat().st_mtime_ns
    change(built)
    assert built.build("--model", load_index(built.index).header["model"]["name"])[0] == 0
    assert path.stat().st_mtime_ns == written and load_index(built.index).header["model"]["pieces"]
    monkeypatch.setattr(config, "INDEX_BACKUPS", 0)
    assert built.build()[0] == 0
    assert not list(built.index.glob("pieces-*")) and load_index(built.index).header["model"]["pieces"] is None


@pytest.mark.parametrize("damage", [flip_byte, lambda path, _: path.unlink()])
def test_a_damaged_or_lost_vocabulary_changes_no_answer_and_is_written_again(
    built_multilingual, tiny_multilingual_model, damage
):
    built = built_multilingual
    answer = built.search("bütçe", "semantic")
    damage(the_file(built, "pieces-*.sqlite"), 0.6)
    assert built.search("bütçe", "semantic") == answer
    assert built.build("--model", tiny_multilingual_model, "--check")[0] == 1
    status, printed = built.build("--model", tiny_multilingual_model)
    assert status == 0 and embedded(printed) == 0 and "vocabulary" in printed.err
    assert built.build("--model", tiny_multilingual_model, "--check")[0] == 0
    assert built.search("bütçe", "semantic") == answer


# --------------------------------------------------------------------------------------- killed, and two at once


def test_a_build_that_is_killed_leaves_the_old_index_and_the_next_run_goes_on(tmp_path, chain, capsys):
    words = ["bir", "iki", "üç", "dört", "beş", "altı", "yedi", "sekiz", "dokuz", "on"]
    paragraphs = (f"## {n}\n\nParagraf {n} {' '.join(words[int(c)] for c in str(n * 7919))}\n" for n in range(8000))
    root = write_documents(tmp_path / "root", {"a.md": "# Eski\n\nEski belge.\n"})
    index = tmp_path / "index"
    arguments = ["--documents-root", root, "--documents", "*.md", "--model", chain.model, "--index-dir", index]
    assert exit_status(generate_embeddings.main, arguments) == 0
    write_documents(root, {"b.md": "# Yeni\n\n" + "\n".join(paragraphs)})

    process = start_script("generate_embeddings.py", *arguments)
    killed = wait_until(lambda: list(index.glob("unfinished-*.npz")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert killed and process.returncode == -signal.SIGKILL

    assert [passage["text"] for passage in load_index(index).passages] == ["Eski belge."]
    search = ["--json", "--index-dir", index, "eski belge"]
    assert exit_status(semantic_search.main, search) == 0
    capsys.readouterr()
    assert exit_status(generate_embeddings.main, arguments) == 0
    printed = capsys.readouterr()
    done = int(re.search(r"interrupted run: (\d+) passages", printed.err)[1])
    assert done >= generate_embeddings.EMBED_AT_ONCE
    assert done + embedded(printed) == 8000
    assert len(load_index(index).passages) == 8001
    assert not list(index.glob("unfinished-*")) and not list(index.glob(".*.new"))


def test_a_second_build_at_the_same_time_ends_at_once_and_names_the_first(built):
    with lock_held(built.index / ".lock") as process:
        before = snapshot(built.index)
        change(built)
        status, printed = built.build()
        assert status == 2 and str(process) in error_line(printed.err)
        assert snapshot(built.index) == before
        assert built.search("bütçe")[0] == 0
    assert built.build()[0] == 0


def test_documents_without_text_leave_the_old_index(built, tmp_path):
    root = write_documents(tmp_path / "bare", {"a.md": "<!-- only a comment -->\n", "b.md": "---\ntitle: X\n---\n"})
    before = snapshot(built.index)
    arguments = ["--documents-root", root, "--documents", "*.md", "--model", built.model]
    status, printed = built.build(*arguments)
    assert status == 2 and "no text" in error_line(printed.err)
    assert {name: digest for name, digest in snapshot(built.index).items() if not name.startswith(".lock")} == {
        name: digest for name, digest in before.items() if not name.startswith(".lock")
    }
