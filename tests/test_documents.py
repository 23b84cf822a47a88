"""Reading the target documents and cutting them into passages."""

import os
import re
import subprocess
import sys
import unicodedata

import pytest
from conftest import REPOSITORY, SAMPLE_PROJECT, error_line, exit_status, write_documents

import config
import prepare_finetuning_data as prepare
from config import UserError
from prepare_finetuning_data import cut_passages, find_documents, fold, plain_text, read_document, sentences

MAX_CHARS = 600


def warnings_of(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def document(tmp_path, content: bytes | str, name: str = "a.md"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts_of(markdown: str, max_chars: int = MAX_CHARS) -> list[str]:
    return [passage.text for passage in cut_passages(markdown, "a.md", max_chars)]


# ------------------------------------------------------------------------------------------- find_documents


def test_documents_are_found_once_and_sorted_whatever_globs_match_them(project):
    found = find_documents(project, ["Planlama/*.md", "**/*.md", "Planlama/butce.md"])
    assert found == sorted(set(found))
    assert {path.name for path in found} == {path.name for path in project.rglob("*.md")}


def test_a_glob_without_a_match_is_named_in_a_warning_and_the_rest_goes_on(project, capsys):
    assert len(find_documents(project, ["Docs/*.md", "Yok/*.md"])) == 4
    (line,) = warnings_of(capsys)
    assert "Yok/*.md" in line


def test_documents_of_installed_packages_are_taken_only_where_a_glob_names_their_folder(project):
    ours = find_documents(project, ["**/*.md"])
    for folder in ("node_modules/left-pad", ".venv/lib/site-packages/numpy", ".management"):
        (project / folder).mkdir(parents=True)
        (project / folder / "README.md").write_text("# Read me\n\nInstalled.\n", encoding="utf-8")
    found = find_documents(project, ["**/*.md"])
    assert set(found) - set(ours) == {project.resolve() / ".management" / "README.md"}
    assert len(find_documents(project, ["node_modules/**/*.md"])) == 1


def test_a_glob_finds_names_that_macos_has_decomposed(project):
    name = unicodedata.normalize("NFD", "Görevler.md")
    (project / name).write_text("# Görevler\n\nBir görev.\n", encoding="utf-8")
    assert [path.name for path in find_documents(project, ["Gö*.md"])] == [name]


def test_a_string_in_the_place_of_the_list_of_globs_is_one_line(project):
    with pytest.raises(UserError, match=r"TARGET_DOCUMENTS.*\['\*\*/\*\.md'\]"):
        find_documents(project, "**/*.md")


def test_no_document_at_all_ends_with_exit_code_2(project, tmp_path, capsys):
    arguments = ["--documents-root", project, "--documents", "yok/*.md", "--data-dir", tmp_path / "data"]
    assert exit_status(prepare.main, arguments) == 2
    assert str(project) in error_line(capsys.readouterr().err)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("pattern", ["../*.md", "a/../../*.md", "", "/", ".", "./"])
def test_a_glob_that_leads_out_of_the_root_or_nowhere_is_refused(project, pattern):
    with pytest.raises(UserError, match="glob"):
        find_documents(project, [pattern])


def test_the_attributes_of_a_heading_are_no_part_of_it():
    text = "# Locks ### {: #locks .wide }\n\nA lock.\n\n## Keys {#keys}\n\nA key.\n\n## Sets {a, b}\n\nA set.\n"
    paths = [passage.heading for passage in cut_passages(text, "a.md", 600)]
    assert paths == [("Locks",), ("Locks", "Keys"), ("Locks", "Sets {a, b}")]


def test_a_glob_that_python_can_not_read_is_one_line(project, tmp_path, capsys):
    arguments = ["--documents-root", project, "--documents", "**.md", "--data-dir", tmp_path / "data"]
    status = exit_status(prepare.main, arguments)
    assert status == 0 or "**.md" in error_line(capsys.readouterr().err)


def test_a_documents_root_that_is_no_folder_is_an_error_naming_it(tmp_path):
    with pytest.raises(UserError, match="nirgendwo"):
        find_documents(tmp_path / "nirgendwo", ["*.md"])


def test_a_symbolic_link_out_of_the_root_is_not_followed(project, tmp_path):
    document(tmp_path, "# Gizli\n\nBaşkasının dosyası.\n", "secret.md")
    (tmp_path / "elsewhere").mkdir()
    document(tmp_path / "elsewhere", "# Gizli\n\nBaşkasının klasörü.\n")
    (project / "link.md").symlink_to(tmp_path / "secret.md")
    (project / "folder").symlink_to(tmp_path / "elsewhere")
    (project / "gone.md").symlink_to(tmp_path / "no such file")
    found = find_documents(project, ["**/*.md", "folder/*.md"])
    assert not {path.name for path in found} & {"link.md", "a.md", "gone.md", "secret.md"}


def test_a_directory_named_like_a_document_is_no_document(project):
    (project / "x.md").mkdir()
    assert "x.md" not in {path.name for path in find_documents(project, ["**/*.md"])}


# -------------------------------------------------------------------------------------------- read_document


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("şu ışık".encode("windows-1254"), "not UTF-8 at byte 0"),
        (b"good text \xff\xfe then not", "not UTF-8 at byte 10"),
        (b"", "empty"),
        (b"\xef\xbb\xbf \n\t\n", "empty"),
        (b"text\0with a NUL", "NUL"),
    ],
)
def test_a_document_that_is_no_text_is_skipped_with_one_warning(tmp_path, capsys, content, words):
    assert read_document(document(tmp_path, content), 20) is None
    (line,) = warnings_of(capsys)
    assert words in line and "a.md" in line


def test_a_document_of_50_megabytes_is_skipped_with_one_warning(tmp_path, capsys):
    path = document(tmp_path, b"")
    with path.open("r+b") as file:
        file.truncate(50_000_000)
    assert read_document(path, config.MAX_DOCUMENT_MB) is None
    (line,) = warnings_of(capsys)
    assert "larger than 20 MB" in line


def test_one_bad_document_among_many_costs_only_itself(project, tmp_path, capsys):
    document(project, "kötü".encode("windows-1254"), "bad.md")
    document(project, b"", "nothing.md")
    arguments = ["--documents-root", project, "--documents", "**/*.md", "--data-dir", tmp_path / "data"]
    assert exit_status(prepare.main, arguments) == 0
    assert len([line for line in warnings_of(capsys) if "bad.md" in line or "nothing.md" in line]) == 2
    assert "bad.md" not in (tmp_path / "data" / "corpus.tsv").read_text(encoding="utf-8")


def test_a_file_name_that_is_no_utf8_stops_nothing(project, tmp_path, capsys):
    with open(os.fsencode(project) + b"/g\xf6rev.md", "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write("# Görev\n\nAdı bozuk ama içi sağlam bir belge.\n")
    arguments = ["--documents-root", project, "--documents", "**/*.md", "--data-dir", tmp_path / "data"]
    assert exit_status(prepare.main, arguments) == 0


def test_a_byte_order_mark_and_foreign_line_ends_leave_no_trace(tmp_path):
    assert read_document(document(tmp_path, b"\xef\xbb\xbf# A\r\n\r\nb\rc\n"), 20) == "# A\n\nb\nc\n"
    (passage,) = cut_passages("# A\n\nb\nc\n", "a.md", MAX_CHARS)
    assert (passage.heading, passage.start_line, passage.end_line) == (("A",), 3, 4)


def test_a_document_without_read_permission_is_skipped_with_one_warning(tmp_path):
    path = document(tmp_path, "# Gizli\n\nOkunamaz.\n")
    path.chmod(0)
    code = (
        "import os, pathlib, sys\nimport prepare_finetuning_data as prepare\n"
        "os.setuid(65534) if os.getuid() == 0 else None\n"
        "print(prepare.read_document(pathlib.Path(sys.argv[1]), 20))"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.name.startswith("pytest-"):
            folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, encoding="utf-8", cwd=REPOSITORY, check=True
    )
    assert done.stdout.strip() == "None"
    assert "Permission denied" in done.stderr and done.stderr.count("warning: ") == 1


# ---------------------------------------------------------------------------------------- words and sentences


def test_turkish_words_fold_to_one_form_however_they_are_typed():
    assert {fold(word) for word in ("IŞIK", "ışık", "isik", "ISIK", "Işık", unicodedata.normalize("NFD", "IŞIK"))} == {
        "isik"
    }
    assert {fold(word) for word in ("İSTANBUL", "istanbul", "Istanbul", "ISTANBUL")} == {"istanbul"}
    assert fold("Çağrı Öğütücü") == "cagri ogutucu"


def test_plain_text_has_no_marks_and_reads_items_and_table_rows_as_sentences():
    assert plain_text("**Bold** and _thin_, `code_name` and [a link](http://x.y 'title').") == (
        "Bold and thin, code_name and a link."
    )
    assert plain_text("- [x] done\n- item\n1. first\n\n> said") == "done. item. first. said."
    assert plain_text("<div>inner</div><!-- not\nthis --> a < b.") == "inner a < b."
    table = "| Görev ID | Durum |\n|---|:--:|\n| KM-2.1 | Sürüyor |\n| a \\| b | |"
    assert plain_text(table) == "Görev ID: KM-2.1; Durum: Sürüyor. Görev ID: a | b."


@pytest.mark.parametrize(
    ("markdown", "plain"),
    [
        ("Kablo 3*2,5 mm² ve 10*20 cm", "Kablo 3*2,5 mm² ve 10*20 cm"),
        ("iki üssü on 2**10 eder", "iki üssü on 2**10 eder"),
        ("*1* ve **2**, _ince_", "1 ve 2, ince"),
        ("ekler `_litre`, `*_m3` ve `__proto__`", "ekler _litre, *_m3 ve __proto__"),
        ("`<details>` ile <b>katla</b>", "<details> ile katla"),
        ("```html\n<div>içerik</div>\n```", "<div>içerik</div>"),
        ("bak: [![rozet](a.svg)](b.md) ve [close([done])](c.md#d)", "bak: rozet ve close([done])"),
        ("| **Dikkat:** vana kapalı |\n|---|\n\nsonra", "Dikkat: vana kapalı. sonra."),
        ("| Ad | Yıl |\n|---|---|\n| Oğuz | 1951 |", "Ad: Oğuz; Yıl: 1951"),
        (r"refresh\_token, KM\-2.1 ve 3 \* 4&nbsp;eder, AT&amp;T", "refresh_token, KM-2.1 ve 3 * 4 eder, AT&T"),
        ("`&amp;` ve `\\_` yazılır, ?a=1&copy=2", "&amp; ve \\_ yazılır, ?a=1&copy=2"),
        ("- ```sh\n  run __all__ <b>x</b>\n  ```\n- **kalın** <kbd>Enter</kbd>", "run __all__ <b>x</b>. kalın Enter."),
        ("> ```\n> a\n> ```\n> **son**", "a son"),
        ("```uv sync``` **kurar**", "uv sync kurar"),
    ],
)
def test_names_numbers_and_what_stands_in_code_keep_their_characters(markdown, plain):
    assert plain_text(markdown) == plain


def test_sentences_joined_give_the_text_again_and_abbreviations_end_none():
    text = 'Dr. Ali geldi. Pompa vb. Araçlar hazır! Peki, 3.5 bar? "Evet." Şu da var.'
    pieces = sentences(text)
    assert " ".join(pieces) == text
    assert pieces[:2] == ["Dr. Ali geldi.", "Pompa vb. Araçlar hazır!"]
    assert "Peki, 3.5 bar?" in pieces


# -------------------------------------------------------------------------------------------- cut_passages


def test_headings_are_the_path_of_a_passage_and_never_a_passage():
    found = cut_passages("# A\n\n## B\n\none\n\n### C\n\n## D\n\ntwo\n", "a.md", MAX_CHARS)
    assert [(passage.heading, passage.text) for passage in found] == [(("A", "B"), "one"), (("A", "D"), "two")]
    assert [passage.chunk_index for passage in found] == [0, 1]


@pytest.mark.parametrize(
    ("markdown", "kept"),
    [
        ("Depo taşınıyor, anahtar Ayşe'de kalacak.\n---\n\n## Sonra\n\nBiz.", ["anahtar Ayşe'de"]),
        ("\n".join(f"{'  ' * depth}- düzey{depth} " + "uzun " * 20 for depth in range(16)), ["düzey15"]),
        ('+++\ntitle = "Başlık"\n+++\n\nMetin burada.', ["Metin burada."]),
        ("- ```npm install``` kurar\n- ```npm start``` başlatır", ["install", "başlatır"]),
        ("```uv sync``` kurar.", ["uv sync", "kurar"]),
        ("İlk.\n\n| **Dikkat:** " + "vana kapalıyken pompa çalışmaz " * 22 + "|\n|---|\n\nSon.", ["Dikkat", "Son."]),
    ],
)
def test_nothing_that_is_text_is_lost(markdown, kept):
    found = "\n".join(texts_of(markdown))
    assert all(text in found for text in kept) and "title =" not in found


@pytest.mark.parametrize(
    "front_matter",
    [
        "---\ntitle: 'Kurulum: ilk gün'\ntags: [a]\n---",
        '+++\ntitle = "Kurulum: ilk gün"\n+++',
        '--- \n# of the site\ndate created: 2024-01-02\n"title": Kurulum: ilk gün\ntags: [\n  a\n]\n---',
    ],
)
def test_a_title_in_the_front_matter_heads_the_document_unless_its_heading_says_the_same(front_matter):
    (passage,) = cut_passages(f"{front_matter}\n\n### Açıklama\n\nMetin burada durur.\n", "a.md", MAX_CHARS)
    assert passage.heading == ("Kurulum: ilk gün", "Açıklama")
    text = f"{front_matter}\n# KURULUM: İlk Gün\n\n## Açıklama\n\nMetin burada durur.\n"
    (passage,) = cut_passages(text, "a.md", MAX_CHARS)
    assert passage.heading == ("KURULUM: İlk Gün", "Açıklama")


def test_a_title_that_is_left_empty_is_none():
    for rest in ("author: Ayşe Kaya", "tags:\n  - a"):
        (passage,) = cut_passages(f"---\ntitle:\n{rest}\n---\n\n# Vanalar\n\nVana kapanır.\n", "a.md", MAX_CHARS)
        assert passage.heading == ("Vanalar",)


def test_a_number_that_begins_a_heading_belongs_to_it():
    weeks = "".join(f"## {number}. Hafta\n\nBu hafta {number} vana boyanır.\n\n" for number in (1, 2))
    found = cut_passages(f"---\ntitle: 2. Dünya Savaşı\n---\n# Plan\n\n{weeks}", "a.md", MAX_CHARS)
    assert [passage.heading for passage in found] == [
        ("2. Dünya Savaşı", "Plan", f"{number}. Hafta") for number in (1, 2)
    ]


def test_a_document_of_headings_alone_has_them_as_its_text():
    (passage,) = cut_passages("\n# Arşiv: eski çizimler\n\n## Tarih: 16.05.2025\n", "a.md", MAX_CHARS)
    assert passage.text == "Arşiv: eski çizimler\n\nTarih: 16.05.2025" and passage.start_line == 2
    assert cut_passages("# İçindekiler\n\n- [A](#a)\n", "a.md", MAX_CHARS)[0].text == "İçindekiler"


def test_a_comment_in_indented_code_is_no_heading():
    (passage,) = cut_passages("# Araç\n\n## Kullanım\n\n    pip install x\n\n    # başlat\n    x run\n", "a.md", 600)
    assert passage.heading == ("Araç", "Kullanım") and "# başlat" in passage.text


def test_tables_of_contents_comments_and_image_data_are_no_passages(tmp_path):
    contents = "- [Bir](#bir)\n  - [İki](#iki)\n\n1. [Bir](#bir)\n"
    comment = "<!--\n" + "Eski taslak, artık geçerli değil.\n" * 40 + "-->\n"
    image = "Resim: ![](data:image/png;base64," + "iVBORw0KGgo" * 5000 + "=) altında yazı.\n"
    text = read_document(document(tmp_path, f"# A\n\n{contents}\n{comment}\n{image}\n- [Bir](bir.md)\n"), 20)
    assert texts_of(text) == ["Resim: ![](data:) altında yazı.\n\n- [Bir](bir.md)"]


def test_front_matter_and_rules_are_no_passages_and_shift_no_line():
    assert texts_of(
        "---\ntags:\n- name: a\n  mail: b\n- c\n\n# of the site\ntitle: X\n---\n- one\n- two\n\n---\n\nlast\n"
    ) == ["- one\n- two\n\nlast"]
    found = cut_passages("---\ntitle: X\ntags:\n  - a\n---\n# A\n\none\n\n---\n\ntwo\n", "a.md", MAX_CHARS)
    assert [passage.text for passage in found] == ["one\n\ntwo"]
    assert (found[0].start_line, found[0].end_line) == (8, 12)


def test_a_rule_at_the_beginning_of_a_document_hides_nothing():
    assert texts_of("---\n\nThe first paragraph.\n\n---\n\nThe second one.\n") == [
        "The first paragraph.\n\nThe second one."
    ]
    agenda = "---\nToplantı gündemi: bütçe\n- kablo\n- pil\n---\n\nSon.\n"
    assert "Toplantı gündemi: bütçe" in " ".join(texts_of(agenda))
    assert "once: upon a time" in " ".join(texts_of("---\nonce: upon a time there was no end\n"))
    assert "- one\n- two" in " ".join(texts_of("---\n\n# Title\n\n- one\n- two\n\n---\n\nlast\n"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "---\na: b\n" + "-a: b\n" * 60 + "text\n",
        "---\n" + "a:\n- b\n  c\n\n" * 9_000 + "text\n",
        "vb. Ali geldi, " * 20_000,
        "# " + "<!--" * 20_000,
    ],
)
def test_a_document_made_to_be_slow_is_cut_all_the_same(text):
    assert texts_of(text) or text.startswith("# ")


def test_a_fence_that_is_never_closed_is_kept_to_the_end_of_the_document():
    (text,) = texts_of("# A\n\n```python\nx = 1\n\n# no heading\nlast = 2\n")
    assert "last = 2" in text and "# no heading" in text


def test_a_fence_stays_whole_unless_it_is_too_long():
    short = "```\n" + "a = 1\n\n" * 20 + "```"
    assert short in "".join(texts_of(f"# A\n\nfirst\n\n{short}\n"))
    long = "\n".join(f"line_{number} = {number}" for number in range(200))
    found = texts_of(f"# A\n\n```\n{long}\n```\n")
    assert len(found) > 1 and max(map(len, found)) <= MAX_CHARS
    assert [word for text in found for word in re.findall(r"line_\d+", text)] == re.findall(r"line_\d+", long)


def test_each_piece_of_a_long_fence_is_a_fence():
    lines = "\n".join(f"  value_{number} = compute(__init__({number}))" for number in range(60))
    found = cut_passages(f"# A\n\n- ~~~python x\n{lines}\n  ~~~\n\nSonra **kalın**.\n", "a.md", MAX_CHARS)
    pieces, rest = [passage.text for passage in found[:-1]], found[-1].text
    assert len(pieces) > 2 and all(text.startswith("~~~python x\n") and text.endswith("\n~~~") for text in pieces)
    assert rest.endswith("~~~\n\nSonra **kalın**.") and found[-1].model_text.endswith(" Sonra kalın.")
    assert all(f"__init__({number})" in " ".join(one.model_text for one in found) for number in range(60))
    assert [passage.text.split("value_")[1].split()[0] for passage in found] == [
        str(passage.start_line - 4) for passage in found
    ]


def test_a_ragged_table_loses_no_cell():
    (text,) = texts_of("| A | B |\n|---|---|\n| one |\n| two | three | four |\n")
    assert all(word in text for word in ("one", "two", "three", "four"))
    assert all(word in plain_text(text) for word in ("A: one", "A: two; B: three", "four"))


def test_a_long_table_is_cut_between_rows_and_each_piece_repeats_the_header():
    rows = [f"| KM-{number} | Görevin açıklaması burada durur, sayısı {number} |" for number in range(60)]
    markdown = "# A\n\n| Görev ID | Açıklama |\n|---|---|\n" + "\n".join(rows) + "\n"
    found = cut_passages(markdown, "a.md", MAX_CHARS)
    assert len(found) > 3
    assert all(passage.text.startswith("| Görev ID | Açıklama |\n|---|---|\n") for passage in found)
    assert [row for passage in found for row in passage.text.split("\n")[2:]] == rows
    lines = markdown.split("\n")
    for passage in found:
        assert passage.text.split("\n")[2:] == lines[passage.start_line - 1 : passage.end_line]


def test_a_long_paragraph_is_cut_at_sentence_ends_with_no_piece_beyond_the_limit():
    paragraph = " ".join(f"Bu paragrafın {number}. cümlesi de burada biter." for number in range(100))
    found = texts_of(f"# A\n\n{paragraph}\n")
    assert " ".join(found) == paragraph
    assert all(len(text) <= MAX_CHARS and text.endswith(".") for text in found)


def test_pieces_of_a_long_sentence_name_the_lines_they_stand_on():
    lines = [f"line{number} of a sentence that has no end and goes on" for number in range(40)]
    for passage in cut_passages("# A\n\n" + "\n".join(lines) + "\n", "a.md", MAX_CHARS):
        numbers = [int(number) + 3 for number in re.findall(r"line(\d+) ", passage.text)]
        assert passage.start_line in (numbers[0], numbers[0] - 1) and passage.end_line == numbers[-1]


def test_sentences_that_are_repeated_name_each_their_own_line():
    lines = "Kısa not.\n" * 40
    found = cut_passages(f"# A\n\n{lines}", "a.md", 100)
    assert len(found) > 3
    at = 3
    for passage in found:
        assert (passage.start_line, passage.end_line) == (at, at + passage.text.count("Kısa") - 1)
        at = passage.end_line + 1
    assert at == 43


def test_the_pieces_of_one_item_of_a_list_do_not_stand_under_another():
    item = "- {} sunucusu gece boyunca çalışır ve kayıtlarını iki ayrı yere yazar.\n{}"
    details = "  - Diskler her ayın ilk günü denetlenir ve sonuç yazılır.\n" * 8
    found = cut_passages("# Plan\n\n" + item.format("Alfa", details) + item.format("Beta", ""), "a.md", 300)
    under = {passage.heading[-1].split()[0] for passage in found if "Diskler" in passage.text}
    assert "Alfa" in under
    (beta,) = [passage for passage in found if "Beta" in passage.text]
    assert beta.heading == ("Plan",) and "Diskler" not in beta.text


def test_a_long_item_without_spaces_heads_its_pieces_by_its_beginning():
    item = "Python " + "漏水を検出する箱の電池を交換し記録を保存します" * 6
    found = cut_passages(f"# 計画\n\n- {item}\n" + f"  - {item}\n" * 6, "a.md", 300)
    heads = {passage.heading[-1] for passage in found if len(passage.heading) > 1}
    assert heads == {item[:79] + "…"}


def test_a_paragraph_without_a_sentence_end_or_a_space_is_cut_all_the_same():
    assert max(map(len, texts_of("word " * 1000))) <= MAX_CHARS
    assert "".join(texts_of("x" * 5000)) == "x" * 5000
    assert max(map(len, texts_of("x" * 5000))) <= MAX_CHARS


def test_html_and_right_to_left_text_are_passages():
    assert "İçerik" in plain_text(texts_of("<div>\n<p>İçerik</p>\n</div>\n")[0])
    assert texts_of("# عنوان\n\nهذا نص من اليمين إلى اليسار.\n") == ["هذا نص من اليمين إلى اليسار."]
    assert texts_of("<!-- only a comment -->\n") == []
    assert texts_of("<!-- one -->\n<!-- two <!-- three -->\n") == []
    (text,) = texts_of("<!-- note --> The valve closes at ten. <!-- end -->\n")
    assert "The valve closes at ten." in text


# ---------------------------------------------------------------------------------- the whole sample project


@pytest.fixture(scope="module")
def sample():
    paths = find_documents(SAMPLE_PROJECT, ["**/*.md"])
    texts = {path.relative_to(SAMPLE_PROJECT).as_posix(): read_document(path, 20) for path in paths}
    return texts, {name: cut_passages(text, name, MAX_CHARS) for name, text in texts.items()}


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_every_passage_of_the_sample_project_stands_in_its_line_range(sample):
    texts, passages = sample
    for name, text in texts.items():
        lines = text.split("\n")
        for passage in passages[name]:
            there = squeezed("\n".join(lines[passage.start_line - 1 : passage.end_line]))
            table = re.match(r"[^\n]*\|[^\n]*\n[^\n]*---[^\n]*\n", passage.text)
            blocks = passage.text.removeprefix(table[0]) if table and table[0][:9] not in there else passage.text
            for line in blocks.split("\n"):
                if not re.match(r"\s*\|", line):
                    assert squeezed(line) in there, f"{name}:{passage.start_line}"
                else:
                    assert squeezed(line) in squeezed(text), f"{name}:{passage.start_line}"


def test_no_passage_of_the_sample_project_is_too_long_unless_it_is_a_table_row(sample):
    for name, found in sample[1].items():
        for passage in found:
            one_row = passage.text.count("\n") == 2 and passage.text.startswith("|")
            assert len(passage.text) <= MAX_CHARS or one_row, f"{name}:{passage.start_line}"


def test_nothing_of_the_sample_project_is_lost(sample):
    texts, passages = sample
    for name, text in texts.items():
        covered = {line for one in passages[name] for line in range(one.start_line, one.end_line + 1)}
        body = re.sub(r"\A---\n.*?\n---\n|<!--.*?-->", lambda found: "\n" * found[0].count("\n"), text, flags=re.S)
        lines = body.split("\n")
        for number, line in enumerate(lines, 1):
            following = lines[number] if number < len(lines) else ""
            is_heading = re.match(r"\s{0,3}#{1,6}(\s|$)", line) or re.match(r"\s{0,3}(=+|-+)\s*$", following)
            has_words = re.search(r"[^\W_]", line) and not re.match(r"\s*(```|~~~)", line)
            is_table_header = "|" in line and re.match(r"[\s|:-]+$", following)
            if has_words and not is_heading and not is_table_header:
                assert number in covered, f"{name}:{number}: {line}"


def test_a_document_with_every_kind_of_bad_input_still_gives_its_text(tmp_path, capsys):
    root = write_documents(tmp_path / "root", {"bad.md": "~~~\nnever closed\n", "good.md": "Kalan metin.\n"})
    (root / "dir.md").mkdir()
    os.mkfifo(root / "pipe.md")
    found = prepare.read_passages(root, find_documents(root, ["*.md"]), MAX_CHARS, 20)
    assert [passage.source_file for passage in found] == ["bad.md", "good.md"]
    with pytest.raises(UserError, match="no text"):
        document(root, b"", "empty.md")
        prepare.read_passages(root, find_documents(root, ["empty.md"]), MAX_CHARS, 20)
