"""People's labelled questions, suggested ones, and those asked of a language model's server."""

import json
import shlex
import socket
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import DOCUMENTS, error_line, exit_status, write_documents

import config
import prepare_finetuning_data
from prepare_finetuning_data import (
    Candidate,
    ask_about,
    language,
    read_corpus,
    read_pairs,
    read_queries,
    read_tsv,
    write_tsv,
)

QUESTIONS = [
    ("Kutuların pili ne kadar dayanır?", "Planlama/mimari.md:7"),
    ("how do I undo a broken release", "A failed release is rolled back by pointing the `current` link at the image."),
    (
        "Kim gözden geçirir?",
        "Biten iş en az bir kişi tarafından gözden geçirilir. Gözden geçiren kişi bulguları karta yazar.",
    ),
    ("Hangi yıl?", "Bu cümle hiçbir belgede yoktur ve hiçbir zaman da olmamıştır."),
]


@pytest.fixture
def prepare(tmp_path):
    documents = write_documents(tmp_path / "project")

    def run(*more) -> int:
        arguments = ["--documents-root", documents, "--documents", "**/*.md", "--data-dir", tmp_path / "data"]
        return exit_status(prepare_finetuning_data.main, [*arguments, *more])

    run.data = tmp_path / "data"
    run.data.mkdir()
    return run


def write_questions(data, questions) -> None:
    rows = ["question\tpassage", *("\t".join(row) for row in questions)]
    (data / "questions.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PAIR_STRATEGIES", ["headings"]),
        ("PAIR_STRATEGIES", "heading"),
        ("TEMPLATE_DOCUMENTS", "4"),
        ("EVALUATION_SHARE", "30%"),
        ("EVALUATION_SHARE", 30),
        ("MAX_PAIRS_PER_SECTION", -1),
        ("MAX_QUESTION_CANDIDATES", "5"),
        ("MAX_EVALUATION_QUERIES", None),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_line(prepare, capsys, monkeypatch, name, value):
    monkeypatch.setattr(config, name, value)
    assert prepare("--suggest-questions") == 2
    assert f"config.{name} is {value!r}" in error_line(capsys.readouterr().err)


# ------------------------------------------------------------------------------------------- questions.tsv


def test_questions_become_pairs_or_held_out_queries_by_their_document(prepare, capsys):
    write_questions(prepare.data, QUESTIONS)
    assert prepare() == 0
    trained = {pair.anchor: pair.positive for pair in read_pairs(prepare.data) if pair.strategy == "question"}
    asked = {query.query: query for query in read_queries(prepare.data) if query.strategy == "question"}
    assert trained.keys().isdisjoint(asked)
    answers = trained | {name: query.positive for name, query in asked.items()}
    assert answers.keys() == {question for question, _ in QUESTIONS[:3]}
    assert "pil ile çalışır" in answers[QUESTIONS[0][0]]
    assert "rolled back" in answers[QUESTIONS[1][0]]
    assert "gözden geçirilir" in answers[QUESTIONS[2][0]]
    corpus = {row.passage for row in read_corpus(prepare.data)}
    assert {query.positive for query in asked.values()} <= corpus
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warned) == 1 and "questions.tsv:5" in warned[0]


def test_every_document_can_be_the_one_that_decides(prepare):
    """With other seeds other documents are held out; a question follows its document."""
    write_questions(prepare.data, QUESTIONS[:1])
    sides = set()
    for seed in range(12):
        assert prepare("--seed", seed) == 0
        held_out = {query.query for query in read_queries(prepare.data)}
        trained = {pair.anchor for pair in read_pairs(prepare.data)}
        assert (QUESTIONS[0][0] in held_out) != (QUESTIONS[0][0] in trained)
        sides.add(QUESTIONS[0][0] in held_out)
    assert sides == {True, False}


def test_a_question_about_a_copy_is_asked_of_the_passage_that_stands_for_both(prepare):
    write_questions(prepare.data, [("kopyalamak için ne gerekir?", "Ofis/lisans_notu.md:3")])
    for seed in range(6):
        assert prepare("--seed", seed) == 0
        corpus = [row.passage for row in read_corpus(prepare.data)]
        for query in read_queries(prepare.data):
            assert corpus.count(query.positive) == 1


def test_a_question_is_trained_on_or_asked_once_however_often_and_with_how_many_answers_it_is_given(prepare):
    answers = ["Planlama/mimari.md:7", "Docs/deployment.md:5", "Planlama/butce.md:5"]
    write_questions(prepare.data, [("Piller nerede?", answer) for answer in answers * 20])
    sides = set()
    for seed in range(8):
        assert prepare("--seed", seed) == 0
        trained = [pair for pair in read_pairs(prepare.data) if pair.strategy == "question"]
        asked = [query for query in read_queries(prepare.data) if query.strategy == "question"]
        assert (len(asked), len(trained)) in ((1, 0), (0, 3))
        corpus = " ".join(row.passage for row in read_corpus(prepare.data))
        if asked:
            assert sum(text in corpus for text in ("pil ile çalışır", "container registry", "sunucu")) <= 2
        sides.add(len(asked))
    assert sides == {0, 1}


def test_a_question_whose_answer_stands_in_a_held_out_document_as_well_is_not_trained_on(prepare):
    text = "# Teslim alma\n\nDepo anahtarı sabah vardiyasının sorumlusunda durur ve akşam ona geri verilir.\n"
    more = "".join(
        f"\n## Başka {word}\n\nBurada {word} ile ilgili {word} notları ayrıca yazılıdır.\n" for word in "abcdef"
    )
    for name in ("bir.md", "iki.md"):
        (prepare.data.parent / "project" / name).write_text(text + more.replace("ile", name), encoding="utf-8")
    write_questions(prepare.data, [("Anahtar kimde?", "bir.md:3"), ("anahtar KİMDE?", "iki.md:3")])
    for seed in range(8):
        assert prepare("--seed", seed) == 0
        trained = {pair.positive for pair in read_pairs(prepare.data) if pair.strategy == "question"}
        asked = {query.positive for query in read_queries(prepare.data) if query.strategy == "question"}
        assert len(trained | asked) == 1 and not trained & asked


def test_questions_with_an_answer_in_common_are_all_asked_and_what_can_not_be_is_told(prepare, capsys):
    section = "# Nöbet\n\n## {}\n\n{}\n\n"
    filler = " ".join(f"Kelime{number} başka bir cümlede geçer." for number in range(25))
    texts = [
        f"Gece nöbetinde {what}. {filler.replace('Kelime', what)}" for what in ("pompalar", "defterler", "anahtarlar")
    ]
    document = prepare.data.parent / "project" / "Docs" / "nobet.md"
    document.write_text("".join(section.format(f"Bölüm {n}", text) for n, text in enumerate(texts)), encoding="utf-8")
    lines = [
        number for number, line in enumerate(document.read_text(encoding="utf-8").split("\n"), 1) if line[:4] == "Gece"
    ]
    first, second, third = (f"Docs/nobet.md:{line}" for line in lines)
    both = [("Gece ne olur?", first), ("Gece ne olur?", second), ("Kim deftere yazar?", second)]
    write_questions(prepare.data, [*both, ("Anahtarlar nerede?", third), ("Öteki anahtarlar nerede?", third)])
    for seed in range(20):
        assert prepare("--seed", seed) == 0
        printed = capsys.readouterr().out
        asked = {query.query for query in read_queries(prepare.data) if query.strategy == "question"}
        if asked:
            break
    assert asked == {"Gece ne olur?", "Kim deftere yazar?", "Anahtarlar nerede?", "Öteki anahtarlar nerede?"}
    assert "0 labelled questions that others leave no passage for dropped" in printed
    write_questions(
        prepare.data, [("Ne olur?", first), ("Kim?", second), ("Her ikisi?", first), ("Her ikisi?", second)]
    )
    assert prepare("--seed", seed) == 0
    assert "1 labelled questions that others leave no passage for dropped" in capsys.readouterr().out


def test_an_answer_is_found_by_its_row_and_through_a_link(prepare, capsys):
    documents = prepare.data.parent / "project"
    (documents / "Docs" / "linked.md").symlink_to(documents / "Planlama" / "kilometre_taslari.md")
    row = next(line for line in DOCUMENTS["Planlama/kilometre_taslari.md"].split("\n") if "| KM-2.1 |" in line)
    write_questions(prepare.data, [("Model ne zaman?", row), ("Neresi?", f"{documents}/Docs/linked.md:7")])
    assert prepare() == 0
    assert "hold no passage" not in capsys.readouterr().err


def test_a_file_whose_name_is_stored_decomposed_is_found_as_it_is_typed(prepare):
    name = "çözüm_günlüğü.md"
    text = "# Çözüm\n\nYedek kutular dolabın en alt rafında durur ve sayılmadan alınmaz.\n"
    (prepare.data.parent / "project" / unicodedata.normalize("NFD", name)).write_text(text, encoding="utf-8")
    write_questions(prepare.data, [("Yedekler nerede?", f"{name}:3")])
    assert prepare() == 0
    found = {pair.anchor for pair in read_pairs(prepare.data)} | {query.query for query in read_queries(prepare.data)}
    assert "Yedekler nerede?" in found


def test_of_a_line_that_is_cut_into_passages_the_one_with_the_questions_words_answers(prepare):
    line = " ".join(
        f"Bu {number}. cümle {word} üzerine yazılmış uzunca bir cümledir."
        for number, word in enumerate([*("boru " * 15).split(), *("vana " * 15).split(), *("pompa " * 15).split()])
    )
    path = prepare.data.parent / "project" / "uzun.md"
    path.write_text(f"# Uzun\n\n{line}\n", encoding="utf-8")
    places = ["uzun.md:3", f"{path}:3", f"{path}:3:1", "uzun.md:3-4", "./uzun.md#L3"]
    asked = [
        (f"{word} nerede anlatılıyor {number}?", place)
        for number, place in enumerate(places)
        for word in ("boru", "vana", "pompa")
    ]
    write_questions(prepare.data, asked)
    assert prepare() == 0
    found = {pair.anchor: pair.positive for pair in read_pairs(prepare.data)}
    found |= {query.query: query.positive for query in read_queries(prepare.data)}
    assert all(question.split()[0] in found[question] for question, _ in asked)


def test_an_answer_of_few_words_is_found_in_the_passage_that_holds_them(prepare, capsys):
    write_questions(prepare.data, [("Piller nasıl?", "pil ile çalışır"), ("Ne yok?", "gökte iki ay")])
    assert prepare() == 0
    found = {pair.anchor for pair in read_pairs(prepare.data)} | {query.query for query in read_queries(prepare.data)}
    assert "Piller nasıl?" in found and "Ne yok?" not in found
    assert "questions.tsv:3" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_file_saved_by_a_spreadsheet_is_read(prepare, encoding):
    answer = "A failed release is rolled back by pointing the `current` link at the image."
    rows = ["question\tpassage", f'"who, and how?"\t{answer}\t\t', "\t\t", f'"the ""current"" link?"\t{answer}']
    (prepare.data / "questions.tsv").write_bytes("\r\n".join(rows).encode(encoding))
    assert prepare() == 0
    found = {pair.anchor for pair in read_pairs(prepare.data)} | {query.query for query in read_queries(prepare.data)}
    assert {"who, and how?", 'the "current" link?'} <= found


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("soru\tcevap\na\tb\n", "question"),
        ("question\tpassage\nonly one column\n", "questions.tsv:2"),
        ("question\tpassage\na\tb\tc\n", "questions.tsv:2"),
        (b"question\tpassage\n\xff\xfe\tb\n", "UTF-8"),
    ],
)
def test_a_broken_questions_file_is_one_line_that_names_the_place(prepare, capsys, content, named):
    path = prepare.data / "questions.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    assert prepare() == 2
    assert named in error_line(capsys.readouterr().err)
    assert path.read_bytes() == before


# -------------------------------------------------------------------------------------- suggested questions


def candidates(data) -> list[Candidate]:
    return read_tsv(data / "question_candidates.tsv", Candidate)


def test_suggestions_are_in_the_documents_language_and_no_template_junk(prepare, capsys):
    assert prepare("--suggest-questions") == 0
    told = capsys.readouterr().out.splitlines()[-1].partition("run: ")[2]
    root = str((prepare.data.parent / "project").resolve())
    wanted = ["--documents-root", root, "--documents", "**/*.md", "--data-dir", str(prepare.data)]
    assert shlex.split(told) == ["python", "prepare_finetuning_data.py", *wanted]
    rows = candidates(prepare.data)
    assert not (prepare.data / "training_data.tsv").exists()
    questions = {row.question: row.source_file for row in rows}
    assert "KM-1.1: ne yapılacak?" in questions
    assert "What is the leak index?" in questions
    assert all(not row.accept for row in rows)
    for question, file in questions.items():
        assert question.startswith(("What ", "How ")) == file.startswith("Docs/") or file == "Docs/lisans_notu_kopya.md"
    assert len({row.passage for row in rows}) == len(rows)


def test_a_heading_that_is_a_question_is_asked_as_it_is_and_only_numbered_terms_are_tasks(prepare):
    text = (
        "# Guide\n\n## How to roll back a release\n\nPoint the current link at the image before, then restart the one"
        " service that reads it, and tell the others.\n\n## How it works\n\nEvery night at three a job of the server"
        " looks for images that nothing names any more, and removes them.\n\n### How the cache works\n\nA page is kept"
        " for an hour in the memory of the first server that has been asked for it.\n\n### Why this is not Redis\n\n"
        "One more server is one more thing that falls over at night, and the pages fit into memory.\n\n"
        "### How retries should work\n\nA page that could not be had is asked for again after a second, then not for"
        " a minute.\n\n## Options\n\n- **`allow_h2`**: whether the second version of the protocol may be spoken with a"
        " server that offers it at all.\n"
    )
    (prepare.data.parent / "project" / "guide.md").write_text(text, encoding="utf-8")
    assert prepare("--suggest-questions") == 0
    questions = {row.question for row in candidates(prepare.data) if row.source_file == "guide.md"}
    works = {"How does the cache work?", "How retries should work?"}
    assert questions == {"How do I roll back a release?", *works, "What is allow_h2?"}


@pytest.mark.parametrize(
    ("name", "turkish", "english"),
    [
        ("Görev 9.B", "Görev 9.B: ne yapılacak?", "What has to be done in Görev 9.B?"),
        ("AG-KUME-021", "AG-KUME-021: ne yapılacak?", "What has to be done in AG-KUME-021?"),
        ("Modelin eğitilmesi", "Modelin eğitilmesi nasıl yapılır?", None),
        ("Gece uygulaması", "Gece uygulaması nedir?", None),
        ("Teslim kuralları", "Teslim kuralları nelerdir?", None),
        ("bypass-2fa", "bypass-2fa nedir?", "What is bypass-2fa?"),
        ("Passing arguments", None, "How does passing arguments work?"),
        ("String values", None, "What are the string values?"),
        ("Configure the server", None, "How do I configure the server?"),
        ("Mount a filesystem", None, "How do I mount a filesystem?"),
        ("Parallelize test runs", None, "How do I parallelize test runs?"),
        ("Fastify options", None, "What are the fastify options?"),
        ("Running the tests", None, "How does running the tests work?"),
        ("Behind a proxy", None, "Behind a proxy?"),
        ("KeePassXC database", None, "What is the KeePassXC database?"),
        ("Round Robin", "Round Robin nedir?", "What is Round Robin?"),
    ],
)
def test_a_question_asks_for_a_task_an_action_or_a_thing(name, turkish, english):
    for spoken, question in (("tr", turkish), ("en", english)):
        assert question in (None, ask_about(name, spoken))
    assert ask_about(name, "other") == f"{name}?"


def test_headings_are_asked_about_without_their_numbers_and_sentences_not_at_all(prepare):
    headings = ("Madde 2 – Yan dal açılması", "2026-07-08", "When the night is over we go on", "If the valve leaks")
    term = "- **Vana (eski):** Suyu kesen parçadır; her yapıda en az bir tane bulunur ve elle çevrilir.\n"
    text = "# Yönerge\n\n" + "\n".join(f"## {one}\n\n{one} {'için uzun bir metin ' * 6}.\n" for one in headings)
    (prepare.data.parent / "project" / "maddeler.md").write_text(f"{text}\n## Ek\n\n{term}", encoding="utf-8")
    assert prepare("--suggest-questions") == 0
    questions = {row.question for row in candidates(prepare.data) if row.source_file == "maddeler.md"}
    assert questions == {"Yan dal açılması nasıl yapılır?", "Vana nedir?"}


def test_the_fields_of_a_documents_head_are_no_definitions(prepare):
    fields = "**Hazırlayan:** Ayşe Kaya, proje ofisinden\n**Son gözden geçirme:** geçen ayın son haftasında yapıldı"
    term = "**Sönümleyici:** Borudaki basınç dalgasını yutan, havayla dolu küçük kap; her istasyonda bir tane bulunur."
    text = f"# Kaplar\n\n{fields}\n\nBu belge kapları anlatır, her biri denenmiştir.\n\n## Sözlük\n\n{term}\n"
    (prepare.data.parent / "project" / "kaplar.md").write_text(text, encoding="utf-8")
    assert prepare("--suggest-questions") == 0
    questions = {row.question for row in candidates(prepare.data) if row.source_file == "kaplar.md"}
    assert "Sönümleyici nedir?" in questions
    assert not any("gözden geçirme" in question or "Hazırlayan" in question for question in questions)


def test_accepted_suggestions_are_used_and_marks_survive_another_suggestion(prepare):
    assert prepare("--suggest-questions") == 0
    rows = candidates(prepare.data)
    marked = [row._replace(accept="x", question=f"{row.question} Edited {i}") for i, row in enumerate(rows[:2])]
    refused = rows[2]._replace(accept="no")
    write_tsv(prepare.data / "question_candidates.tsv", [*marked, refused, *rows[3:]], Candidate._fields)
    assert prepare() == 0
    used = {pair.anchor for pair in read_pairs(prepare.data) if pair.strategy == "question"}
    used |= {query.query for query in read_queries(prepare.data) if query.strategy == "question"}
    assert used == {row.question for row in marked}
    assert prepare("--suggest-questions") == 0
    again = candidates(prepare.data)
    assert again[:3] == [*marked, refused]
    assert len({row.passage for row in again}) == len(again)


def test_a_suggestion_accepted_as_it_was_worded_counts_as_no_question_of_a_persons(prepare):
    assert prepare("--suggest-questions") == 0
    rows = [row._replace(accept="x") for row in candidates(prepare.data)]
    rows[0] = rows[0]._replace(question="kim bakar ki buna")
    rows[2] = rows[2]._replace(accept="no", suggested="")
    mine = rows[1] = rows[1]._replace(accept="")  # not accepted, but asked by a person in the same words
    write_questions(prepare.data, [(mine.question, mine.passage)])
    write_tsv(prepare.data / "question_candidates.tsv", rows, Candidate._fields)
    path = prepare.data / "question_candidates.tsv"  # as an editor saves it that trims the ends of lines
    path.write_text(
        "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()), encoding="utf-8"
    )
    assert prepare() == 0
    found = [(pair.strategy, pair.anchor) for pair in read_pairs(prepare.data)]
    found += [(query.strategy, query.query) for query in read_queries(prepare.data)]
    asked = {kind: {text for own, text in found if own == kind} for kind in ("question", "suggested")}
    assert asked["question"] == {"kim bakar ki buna", mine.question}
    assert asked["suggested"] and asked["suggested"] <= {row.question for row in rows}
    # The documents that come or change later do not make it one: another definition of each term, say.
    copy = "\n\n".join(f"**{row.question}**: ne demek olduğu burada bir kez daha uzunca yazılıdır." for row in rows)
    (prepare.data.parent / "project" / "sonra.md").write_text(f"# Sonra\n\n{copy}\n", encoding="utf-8")
    text = (prepare.data.parent / "project" / "Docs" / "glossary.md").read_text(encoding="utf-8")
    (prepare.data.parent / "project" / "Docs" / "terms.md").write_text(text.replace("Glossary", "Terms"))
    assert prepare() == 0
    found = [(pair.strategy, pair.anchor) for pair in read_pairs(prepare.data)]
    found += [(query.strategy, query.query) for query in read_queries(prepare.data)]
    assert {text for own, text in found if own == "question"} == {"kim bakar ki buna", mine.question}


def test_when_all_suggestions_are_marked_others_come(prepare, monkeypatch):
    monkeypatch.setattr(config, "MAX_QUESTION_CANDIDATES", 3)
    seen: set[str] = set()
    for times in (1, 2, 3):
        assert prepare("--suggest-questions") == 0
        rows = candidates(prepare.data)
        assert len(rows) == 3 * times and len({row.passage for row in rows}) == len(rows)
        assert not seen.intersection(row.question for row in rows[3 * (times - 1) :])
        seen |= {row.question for row in rows}
        write_tsv(
            prepare.data / "question_candidates.tsv", [row._replace(accept="no") for row in rows], Candidate._fields
        )


def test_marks_that_a_spreadsheet_has_saved_with_quotation_marks_are_known_again(prepare):
    says = 'The "night" valve closes at ten, and the day valve opens again at six; both are checked once a week.'
    text = f"# Guide\n\n## Pressure valve\n\n{says}\n"
    (prepare.data.parent / "project" / "guide.md").write_text(text, encoding="utf-8")
    assert prepare("--suggest-questions") == 0
    rows = candidates(prepare.data)
    (own,) = [row for row in rows if row.source_file == "guide.md"]
    quoted = '"' + own.passage.replace('"', '""') + '"'
    rows = [row._replace(accept="no", passage=quoted) if row is own else row for row in rows]
    write_tsv(prepare.data / "question_candidates.tsv", rows, Candidate._fields)
    assert prepare("--suggest-questions") == 0
    assert [row.accept for row in candidates(prepare.data) if row.source_file == "guide.md"] == ["no"]


def test_a_question_is_named_by_its_line_whatever_lines_are_empty(prepare, capsys):
    lines = ["question\tpassage", "", "Biri ne?\tyok böyle bir şey", "", "\t", "Öbürü ne?\tbu da yok böyle"]
    (prepare.data / "questions.tsv").write_text("\n".join(lines), encoding="utf-8")
    assert prepare() == 0
    err = capsys.readouterr().err
    assert "questions.tsv:3: " in err and "questions.tsv:6: " in err and "questions.tsv:2: " not in err


def test_the_language_of_a_text():
    texts = [*DOCUMENTS.values()]
    assert {language(text) for text in texts} == {"tr", "en"}
    assert language("KM-2.1") == "other"
    assert language("Das Überdruckventil und die Prüfung der Behälter für Öl") == "other"
    assert language("Les vannes et les pompes pour une ville") == "other"
    assert language("La configuración de la base de datos y el servidor de producción") == "other"
    assert language("Sauvegarde quotidienne de la base de données") == "other"
    assert language("gorevler her sabah panoda takip edilir ve sonra konusulur") == "tr"


# ------------------------------------------------------------------------------------- a server that answers


@pytest.fixture
def server():
    """An OpenAI-compatible server on this machine; server.fail_after answers it breaks down."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            own.asked.append(body)
            broken = len(own.asked) > own.fail_after
            content = own.replies.get(len(own.asked), f" <think>hm</think> Soru\t{len(own.asked)}? \n")
            reply = {"choices": [{"message": {"content": content}}]}
            self.send_response(500 if broken else content if isinstance(content, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            pass

    own = HTTPServer(("127.0.0.1", 0), Handler)
    own.asked, own.fail_after, own.replies = [], 10_000, {}
    own.url = f"http://127.0.0.1:{own.server_port}/v1"
    threading.Thread(target=own.serve_forever, daemon=True).start()
    yield own
    own.shutdown()
    own.server_close()


def test_a_server_is_asked_once_for_each_passage_and_what_it_answered_survives_its_failure(
    prepare, server, capsys, monkeypatch
):
    monkeypatch.setattr(config, "MAX_QUESTION_CANDIDATES", 6)
    ask = ["--question-endpoint", server.url, "--question-model", "small"]
    server.fail_after = 4
    assert prepare(*ask) == 2
    assert server.url in error_line(capsys.readouterr().err)
    assert len(server.asked) == 5
    with (prepare.data / "question_answers.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"passage": "torn')  # as a kill would leave it
    server.fail_after = 10_000
    assert prepare(*ask) == 0
    assert len(server.asked) == 7, "four answers were kept"
    assert prepare(*ask) == 0
    assert len(server.asked) == 7, "nothing is asked twice"
    rows = candidates(prepare.data)
    assert len(rows) == 6
    assert {row.question for row in rows} == {f"Soru {number}?" for number in (1, 2, 3, 4, 6, 7)}
    assert server.asked[0]["model"] == "small"
    assert rows[0].passage in server.asked[0]["messages"][0]["content"]


def test_a_passage_that_the_server_has_no_question_for_is_passed_over_and_asked_about_again(
    prepare, server, capsys, monkeypatch
):
    monkeypatch.setattr(config, "MAX_QUESTION_CANDIDATES", 5)
    fenced = 'Sure! Here it is:\n```\n"Kaç vana var?"\n```'
    server.replies = {1: 400, 2: None, 3: "<think>ends nowhere", 4: fenced, 5: "yarım \ud83d harf?"}
    ask = ["--question-endpoint", server.url, "--question-model"]
    assert prepare(*ask, "small") == 0
    assert "no question for 3 of 5" in capsys.readouterr().err
    assert {row.question for row in candidates(prepare.data)} == {"Kaç vana var?", "yarım ? harf?"}
    assert prepare(*ask, "small") == 0
    assert len(server.asked) == 8 and len(candidates(prepare.data)) == 5
    assert prepare(*ask, "another") == 0
    assert len(server.asked) == 13


@pytest.mark.parametrize(
    "arguments",
    [
        ["--question-endpoint", "file:///etc/passwd", "--question-model", "x"],
        ["--question-endpoint", "http://127.0.0.1:9/v1", "--question-model", "x"],
        ["--question-endpoint", "http://127.0.0.1:9/v1"],
        ["--question-model", "x"],
    ],
)
def test_a_server_that_is_not_there_is_one_line(prepare, capsys, arguments):
    assert prepare(*arguments) == 2
    assert "--question" in error_line(capsys.readouterr().err) or "127.0.0.1:9" in str(arguments)


def test_a_server_that_refuses_every_passage_is_told_with_its_reason_and_the_suggestions_stay(
    prepare, server, capsys, monkeypatch
):
    monkeypatch.setattr(config, "MAX_QUESTION_CANDIDATES", 3)
    assert prepare("--suggest-questions") == 0
    before = candidates(prepare.data)
    capsys.readouterr()
    server.replies = dict.fromkeys(range(1, 4), 400)
    assert prepare("--question-endpoint", server.url, "--question-model", "small") == 2
    line = error_line(capsys.readouterr().err)
    assert "Bad Request" in line and '"content": 400' in line
    assert candidates(prepare.data) == before


def test_a_key_with_a_line_break_is_not_shown(prepare, server, capsys, monkeypatch):
    monkeypatch.setattr(config, "MAX_QUESTION_CANDIDATES", 1)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-first\nsk-second")
    assert prepare("--question-endpoint", server.url, "--question-model", "small") == 0
    assert "sk-" not in str(capsys.readouterr())


def test_a_server_that_does_not_speak_http_is_one_line(prepare, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet():
            connection, _ = listener.accept()
            connection.sendall(b"220 mail.example.org ready\r\n")
            connection.close()

        threading.Thread(target=greet, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        assert prepare("--question-endpoint", url, "--question-model", "x") == 2
    assert url in error_line(capsys.readouterr().err)


def test_empty_lines_in_questions_are_passed_over(prepare):
    prepare.data.mkdir(exist_ok=True)
    lines = ["question\tpassage", "", "what is a gateway called?\tDocs/glossary.md:3", "", ""]
    (prepare.data / "questions.tsv").write_text("\n".join(lines), encoding="utf-8")
    assert prepare() == 0
