"""Training pairs, held-out queries, and the files they are written to."""

import json
import random
import subprocess

import pytest
from conftest import DOCUMENTS, SAMPLE_PROJECT, TEMPLATE_LINE, error_line, exit_status, run_script, write_documents

import config
import prepare_finetuning_data as prepare
from config import UserError
from prepare_finetuning_data import (
    CorpusPassage,
    Pair,
    Query,
    as_input_examples,
    cut_passages,
    find_documents,
    find_templates,
    fold,
    group_copies,
    make_pairs,
    make_queries,
    read_corpus,
    read_pairs,
    read_passages,
    read_queries,
    read_tsv,
    sentences,
    split_documents,
    write_tsv,
)

ONE = "The first paragraph tells how pumps are started."
TWO = "The second paragraph tells how pumps are stopped."
THREE = "The third paragraph is about the valves only."
DOCUMENT = f"# Pump manual\n\n## Running\n\n{ONE}\n\n{TWO}\n\n---\n\n## Valves in general use\n\n{THREE}\n"


def passages_of(documents: dict[str, str]) -> list:
    return [passage for name, text in documents.items() for passage in cut_passages(text, name, 600)]


def pairs_of(
    strategy: str, documents: dict[str, str] | None = None, max_pairs: int = 8, templates: int = 4, seed: int = 1
):
    passages = passages_of({"a.md": DOCUMENT} if documents is None else documents)
    found = find_templates(passages, group_copies(passages), templates)
    pairs, _ = make_pairs(passages, set(), found, [strategy], max_pairs, seed)
    return [(pair.anchor, pair.positive) for pair in pairs]


# ------------------------------------------------------------------------------------------- the strategies


def test_sentences_without_spaces_between_them_make_pairs():
    first, second = "系统每天凌晨三点自动备份数据库。", "管理员可以随时恢复数据！"
    documents = {"a.md": f"# 手册\n\n## 备份与恢复\n\n{first}{second}\n"}
    assert sentences(first + second) == [first, second]
    assert pairs_of("sentence", documents) == [
        (first, f"手册 > 备份与恢复: {second}"),
        (second, f"手册 > 备份与恢复: {first}"),
    ]
    assert pairs_of("heading", documents) == [("备份与恢复", first + second)]


def test_neighbours_are_a_paragraph_and_the_next_one():
    assert pairs_of("neighbours") == [(ONE, TWO), (TWO, THREE)]


def test_section_pairs_stay_under_one_heading():
    assert pairs_of("section") == [(ONE, TWO)]


def test_heading_pairs_lead_from_the_heading_to_each_paragraph_with_the_title_where_it_is_short():
    assert pairs_of("heading") == [
        ("Pump manual Running", ONE),
        ("Pump manual Running", TWO),
        ("Valves in general use", THREE),
    ]


def test_sentence_pairs_are_a_sentence_and_the_rest_of_its_passage():
    assert pairs_of("sentence") == [(ONE, f"Pump manual > Running: {TWO}"), (TWO, f"Pump manual > Running: {ONE}")]


def test_words_pairs_are_three_to_seven_words_of_a_passage_and_the_passage():
    made = [pair for seed in range(40) for pair in pairs_of("words", seed=seed)]
    assert {passage for _, passage in made} == {
        f"Pump manual > Running: {ONE} {TWO}",
        f"Pump manual > Valves in general use: {THREE}",
    }
    counts = set()
    for anchor, passage in made:
        words = anchor.split()
        counts.add(len(words))
        assert len(set(words)) == len(words) and set(words) <= set(prepare.WORD.findall(passage))
        assert min(map(len, words)) > 2
    assert counts == {3, 4, 5, 6, 7}


def test_a_passage_of_five_words_or_fewer_below_a_long_heading_gives_no_words_pair():
    document = "# The heading of a document has so many words\n\nOnly these five words here.\n"
    assert pairs_of("words", {"a.md": document}) == []


def test_words_of_a_script_without_spaces_are_runs_of_its_characters():
    text = "系统每天凌晨三点自动备份数据库，管理员可以随时恢复数据。"
    ((anchor, positive),) = pairs_of("words", {"a.md": f"# 手册\n\n{text}\n"})
    assert positive == f"手册: {text}"
    assert len(anchor.split()) >= 3 and all(len(word) > 1 and word in positive for word in anchor.split())


@pytest.mark.parametrize("strategy", ["sentence", "words", "term", "link"])
def test_what_stands_in_code_keeps_its_marks_in_a_pair(strategy):
    text = "Sınıf `__init__` ile kurulur, `<details>` ile katlanır. Bir sonraki cümle `*_m3` dosyalarını anlatır size."
    link = "# Yol\n\nBu iş [kurulum sayfası](a.md) içinde uzun uzun anlatılır.\n"
    made = pairs_of(strategy, {"a.md": f"# Araçlar\n\n{text}\n", "b.md": link})
    own = [pair for pair in made if "Araçlar" in pair[1]]
    assert own
    for anchor, positive in own:
        read = f"{anchor} {positive}" if strategy == "sentence" else positive
        assert all(name in read for name in ("__init__", "<details>", "*_m3"))


def test_an_unknown_strategy_is_wrong_usage(project, capsys):
    assert exit_status(prepare.main, ["--documents-root", project, "--strategy", "magic"]) == 2
    assert "--strategy" in capsys.readouterr().err


def test_no_pair_is_there_twice_in_one_direction_or_the_other():
    documents = {
        "a.md": f"# T\n\n{ONE}\n\n{TWO}\n",
        "b.md": f"# T\n\n{TWO}\n\n{ONE}\n",
        "c.md": f"# T\n\n{ONE}\n\n{TWO}",
    }
    assert pairs_of("neighbours", documents) == [(ONE, TWO)]


@pytest.mark.parametrize("strategy", list(prepare.STRATEGIES))
def test_template_lines_headings_and_rules_are_in_no_pair(strategy):
    linked = {
        "Ofis/baglantilar.md": "# Nereye bakmalı\n\nKurallar [bütçe notunda](../Planlama/butce.md#donanım) yazar.\n"
    }
    led = {
        "Ofis/liste.md": "# Çanta\n\nSahaya çıkarken alınacaklar şunlardır:\n\n- yedek pil ve anahtar\n- şerit metre\n"
    }
    pairs = pairs_of(strategy, DOCUMENTS | linked | led)
    assert pairs
    assert not [text for pair in pairs for text in pair if TEMPLATE_LINE in text or "---" in text]
    assert not {"Görev takibi", "Teslim kuralları", "Bütçe"} & {positive for _, positive in pairs}


def test_a_heading_that_many_documents_have_is_no_anchor():
    documents = {
        f"{name}.md": f"# About {name}\n\n## Results of the work\n\n"
        + " ".join(f"{name}{number} gives {name} word {number}." for number in range(20))
        for name in ("apple", "pear", "plum", "fig", "cherry")
    }
    assert not [anchor for anchor, _ in pairs_of("heading", documents) if "Results" in anchor]


def test_the_heading_that_many_documents_have_is_left_out_above_the_pieces_of_a_list_too():
    def items(name: str) -> str:
        below = "".join(f"  - {name}{number} gives {name} word {number} in turn.\n" for number in range(30))
        return f"- all the {name} that we have\n{below}"

    names = ("apple", "pear", "plum", "fig", "cherry")
    documents = {f"{name}.md": f"# About {name}\n\n## Results of the work\n\n{items(name)}" for name in names}
    made = pairs_of("words", documents)
    assert any("> all the" in positive for _, positive in made)
    assert not [positive for _, positive in made if "Results" in positive]


def test_a_long_section_is_capped():
    items = "\n\n".join(f"The item number {number} of a very long list of items." for number in range(40))
    for strategy in ("section", "heading", "sentence", "words"):
        assert 0 < len(pairs_of(strategy, {"a.md": f"# Long list of items\n\n{items}\n"}, max_pairs=5)) <= 5, strategy


# ------------------------------------------------------------------------- the split of the sample project


@pytest.fixture(scope="module")
def sample():
    passages = read_passages(SAMPLE_PROJECT, find_documents(SAMPLE_PROJECT, ["**/*.md"]), 600, 20)
    family = group_copies(passages)
    templates = find_templates(passages, family, config.TEMPLATE_DOCUMENTS)
    held_out = split_documents(passages, family, config.EVALUATION_SHARE, config.MAX_EVALUATION_QUERIES, config.SEED)
    queries, corpus = make_queries(passages, held_out, templates, [], config.MAX_EVALUATION_QUERIES, config.SEED)
    pairs, _ = make_pairs(passages, held_out, templates, list(prepare.STRATEGIES), 8, config.SEED)
    return passages, family, held_out, queries, corpus, pairs


def test_training_and_held_out_documents_are_disjoint(sample):
    passages, _, held_out, queries, _, pairs = sample
    assert pairs and queries
    assert {pair.source_file for pair in pairs}.isdisjoint(held_out)
    assert {query.source_file for query in queries} <= held_out
    share = sum(passage.source_file in held_out for passage in passages) / len(passages)
    assert 0.2 < share < 0.4


def test_copies_and_near_copies_stay_on_one_side(sample):
    _, family, held_out, _, _, _ = sample
    copies = {name for name in family if family[name] != name}
    assert copies, "the sample project has copies"
    assert all((name in held_out) == (family[name] in held_out) for name in family)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_exact_copy_is_held_out_with_its_original_or_not_at_all(project, seed):
    passages = read_passages(project, find_documents(project, ["**/*.md"]), 600, 20)
    held_out = split_documents(passages, group_copies(passages), 0.3, 400, seed)
    assert held_out
    assert len(held_out & {"Ofis/lisans_notu.md", "Docs/lisans_notu_kopya.md"}) in (0, 2)


def test_no_sentence_of_a_held_out_answer_is_trained_on(sample):
    _, _, _, queries, _, pairs = sample
    trained = "\n".join(fold(text) for pair in pairs for text in pair[:2])
    leaked = {
        sentence
        for query in queries
        for sentence in sentences(query.positive.partition(": ")[2])
        if len(sentence.split()) >= 6 and fold(sentence) in trained
    }
    assert not leaked, sorted(leaked)[:3]


def test_a_new_document_moves_none_of_the_others_to_the_other_side(sample):
    passages, _, held_out, _, _, _ = sample
    new = cut_passages("# Yeni not\n\nBu notta hiçbir belgede olmayan üç cümle var.\n", "aa_yeni.md", 600)
    limits = (config.EVALUATION_SHARE, config.MAX_EVALUATION_QUERIES, config.SEED)
    after = split_documents(new + passages, group_copies(new + passages), *limits)
    trained = {passage.source_file for passage in passages} - held_out
    assert after - {"aa_yeni.md"} and not after & trained


def held_out_of(documents: dict[str, str], held_out: set[str]) -> tuple[list[Query], list[str]]:
    """The queries made of these documents, and the corpus's passages."""
    passages = [passage for name, text in documents.items() for passage in cut_passages(text, name, 120)]
    queries, corpus = make_queries(passages, held_out, set(), [], 400, 1)
    return queries, [row.passage for row in corpus]


LINES = [f"The {word} is looked after on every {day} by a crew of its own, whatever the weather may be outside."
         for word, day in zip(("pump", "valve", "meter", "tank", "pipe", "gauge"), "abcdef", strict=True)]  # fmt: skip


def test_the_rest_of_a_section_does_not_compete_with_the_passage_that_its_heading_asks_for():
    two = f"# Manual\n\n## Weekly care of machines\n\n{LINES[0]}\n\n{LINES[1]}\n"
    queries, corpus = held_out_of({"a.md": two, "b.md": f"# Other\n\n{LINES[5]}\n"}, {"a.md"})
    assert [query.strategy for query in queries] == ["heading"]
    assert [text for text in corpus if "is looked after" in text and LINES[5] not in text] == [queries[0].positive]
    long = "# Manual\n\n## Weekly care of machines\n\n" + "\n\n".join(LINES[:5])
    queries, corpus = held_out_of({"a.md": long}, {"a.md"})
    assert "heading" not in {query.strategy for query in queries} and len(corpus) == 5


def test_a_term_is_asked_for_only_where_no_other_passage_holds_it_set_off_or_not():
    term = "# Note\n\nAn **oblique valve** is there, and a **gate motor**, and nothing else at all.\n"
    for other, asked in (
        ("The old Oblique Valve leaks.", {"gate motor"}),
        ("It leaks.", {"gate motor", "oblique valve"}),
    ):
        passages = [*cut_passages(term, "a.md", 600), *cut_passages(f"# Other\n\n{other}\n", "b.md", 600)]
        held = prepare.find_holders(passages, {"a.md"}).terms
        assert {" ".join(words) for words in held} == asked


def test_a_near_copy_in_a_training_document_does_not_compete_with_the_held_out_passage():
    text = " ".join(LINES[:2])[:118].rpartition(" ")[0]
    documents = {
        "a.md": f"# Manual\n\n## Weekly care of machines\n\n{text} now.\n",
        "b.md": f"# Plan\n\n{text} then.\n",
    }
    queries, corpus = held_out_of(documents, {"a.md"})
    assert len(queries) == 1 and corpus == [queries[0].positive]


def test_numbers_and_dates_are_no_queries_and_words_with_a_hyphen_or_stroke_no_names():
    parts = [
        f"## 1.{number}.0 - 2024-0{number}-01\n\nBu sürümde {word} düzeltildi ve belgesi yazıldı.\n"
        for number, word in enumerate(("vana", "pompa", "kutu", "sayaç"), 1)
    ]
    text = "# Günlük\n\n" + "\n".join(parts) + "\n## Yazım\n\nThe hand-written part and/or the KM-2.1 one, by_name.\n"
    found = passages_of({"a.md": text, "b.md": "# B\n\nBaşka bir belge, başka bir metin.\n"})
    queries, _ = prepare.make_queries(found, {"a.md"}, set(), [], 50, seed=1)
    assert {query.query for query in queries if query.strategy == "heading"} <= {"Günlük Yazım"}
    pairs, _ = prepare.make_pairs(found, set(), set(), ["heading"], 9, seed=1)
    assert {pair.anchor for pair in pairs} == {"Günlük Yazım"}
    assert prepare.find_terms("The hand-written part and/or the KM-2.1 one, by_name.") == ["KM-2.1", "by_name"]


def test_a_heading_that_a_training_document_has_too_is_not_asked_for():
    section = "## Nöbet değişimi nasıl olur\n\n{} anahtarı ve defteri bir sonrakine verir, imza alır.\n"
    texts = {name: f"# {name}\n\n{section.format(name)}" for name in ("Depo", "Santral")}
    found = passages_of({f"{name}.md": text for name, text in texts.items()})
    queries, _ = prepare.make_queries(found, {"Depo.md"}, set(), [], 50, seed=1)
    assert "heading" not in {query.strategy for query in queries}
    queries, _ = prepare.make_queries(found[:1], {"Depo.md"}, set(), [], 50, seed=1)
    assert "heading" in {query.strategy for query in queries}


def test_near_copies_stay_together_whatever_other_documents_share_their_text():
    lines = [f"Ortak cümle {number} burada durur ve her yerde aynıdır." for number in range(40)]
    texts = {name: " ".join(lines[start:end]) for name, start, end in (("a", 0, 20), ("b", 0, 40), ("c", 20, 40))}
    texts |= {"bb": " ".join(lines[:3]) + " Kalanı kendisinindir. " * 50, "d": "Bambaşka bir metin."}
    family = prepare.group_copies(passages_of({f"{name}.md": text for name, text in texts.items()}))
    assert family["a.md"] == family["b.md"] == family["c.md"] != family["d.md"]


def test_what_stands_between_two_spans_of_code_is_no_term():
    assert prepare.find_terms("Use `a`, nor `b` here; also `-x`) for the `y`, **c** and so **d** on.") == []
    assert prepare.find_terms("Use `refresh all`, then **the pump**.") == ["refresh all", "the pump"]


def test_no_held_out_query_is_trained_on_or_stands_in_its_own_answer(sample):
    _, _, _, queries, corpus, pairs = sample
    trained = {fold(text) for pair in pairs for text in pair[:2]}
    passages = [row.passage for row in corpus]
    for query in queries:
        assert fold(query.query) not in trained
        assert query.strategy == "term" or query.query not in query.positive
        assert passages.count(query.positive) == 1
    assert len({fold(query.query) for query in queries}) == len(queries)
    assert {query.strategy for query in queries} == {"heading", "sentence", "term"}


# ------------------------------------------------------------------------------------------------ TSV files


def test_text_comes_back_from_a_tsv_with_tabs_and_line_breaks_as_spaces(tmp_path):
    from datasets import load_dataset

    breaks = "a\tb\nc\rd\r\ne\x0bf\x0cg\x1ch\x1di\x1ej\x85k\u2028l\u2029m"
    rows = [
        Pair(breaks, 'a lone " quote', "", "heading", "a.md"),
        Pair("'single'", '"quoted"', "it's", "sentence", 'b "c".md'),
        Pair("ığüşöç İ 😀 עברית", "back\\slash \\t", "# not a comment", "section", "ç.md"),
    ]
    write_tsv(tmp_path / "training_data.tsv", rows, Pair._fields)
    read = read_pairs(tmp_path)
    assert read[0].anchor == "a b c d e f g h i j k l m"
    assert read[1:] == rows[1:] and read[0][1:] == rows[0][1:]
    counted = subprocess.run(["wc", "-l", tmp_path / "training_data.tsv"], capture_output=True, text=True, check=True)
    assert int(counted.stdout.split()[0]) == len(rows) + 1
    loaded = load_dataset(
        "csv",
        data_files=str(tmp_path / "training_data.tsv"),
        delimiter="\t",
        quoting=3,
        keep_default_na=False,
        cache_dir=str(tmp_path / "cache"),
    )["train"]
    assert [Pair(**row) for row in loaded] == read


def test_text_with_random_characters_comes_back_with_its_spaces_folded(tmp_path):
    rng = random.Random(3)
    alphabet = "\t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\u2028\u2029\u00a0\ufeff\"'\\ abcığ,;|\x01"
    rows = [CorpusPassage("x" + "".join(rng.choices(alphabet, k=30)), "a.md") for _ in range(200)]
    write_tsv(tmp_path / "corpus.tsv", rows, CorpusPassage._fields)
    assert [row.passage for row in read_corpus(tmp_path)] == [" ".join(row.passage.split()) for row in rows]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing"),
        (b"anchor\tpositive\tstrategy\tsource_file\na\tb\tc\td\n", "no column 'negative'"),
        (b"anchor\tpositive\tnegative\tstrategy\tsource_file\n", "no rows"),
        (b"", "no column 'anchor'"),
        (b"anchor\tpositive\tnegative\tstrategy\tsource_file\na\tb\t\tc\td\na\tb\n", ":3: 2 columns instead of 5"),
        ("anchor\tpositive\nışık\tb\n".encode("windows-1254"), "not UTF-8 at byte 16"),
    ],
)
def test_a_tsv_that_can_not_be_read_is_one_clear_error(tmp_path, content, words):
    if content is not None:
        (tmp_path / "training_data.tsv").write_bytes(content)
    with pytest.raises(UserError, match=r"training_data\.tsv") as raised:
        read_pairs(tmp_path)
    assert words in str(raised.value) and "prepare_finetuning_data.py" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_columns_are_found_by_name_and_more_of_them_do_no_harm(tmp_path):
    content = "\ufeffsource_file\tmine\tstrategy\tquery\tpositive\na.md\tx\tterm\tq\tp\n"
    (tmp_path / "evaluation_data.tsv").write_text(content, encoding="utf-8")
    assert read_queries(tmp_path) == [Query("q", "p", "term", "a.md")]


def test_a_tsv_saved_on_windows_is_read_the_same(tmp_path):
    (tmp_path / "corpus.tsv").write_bytes(b"passage\tsource_file\r\none text\ta.md\r\n")
    assert read_tsv(tmp_path / "corpus.tsv", CorpusPassage) == [CorpusPassage("one text", "a.md")]


# ------------------------------------------------------------------------------------------- the whole script


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_files_in_every_process_and_another_seed_another_split(project, tmp_path):
    for name, seed, hash_seed in (("a", 5, "1"), ("b", 5, "2"), ("c", 6, "1")):
        done = run_script(
            "prepare_finetuning_data.py",
            *("--documents-root", project, "--documents", "**/*.md", "--data-dir", tmp_path / name, "--seed", seed),
            PYTHONHASHSEED=hash_seed,
        )
        assert done.returncode == 0, done.stderr
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert first["evaluation_data.tsv"] != other["evaluation_data.tsv"]


def test_what_is_printed_and_data_report_json_agree_with_the_files(project, tmp_path, capsys):
    arguments = ["--documents-root", project, "--documents", "**/*.md", "--data-dir", tmp_path]
    assert exit_status(prepare.main, [*arguments, "--strategy", "heading", "--strategy", "neighbours"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "data_report.json").read_text(encoding="utf-8"))
    pairs, queries = read_pairs(tmp_path), read_queries(tmp_path)
    assert sum(report["training_pairs"].values()) == len(pairs)
    assert set(report["training_pairs"]) == {"heading", "neighbours"} == {pair.strategy for pair in pairs}
    assert sum(report["held_out_queries"].values()) == len(queries)
    assert report["documents"] == 11 and report["copies"] == 1
    assert f"{len(pairs)} training pairs: " in printed
    assert f"{len(queries)} held-out queries from {report['held_out_documents']} documents" in printed
    assert "11 documents, 1 of them copies or near-copies" in printed
    for strategy, count in (report["training_pairs"] | report["held_out_queries"]).items():
        assert f"{strategy} {count}" in printed
    for reason, count in report["dropped"].items():
        assert f"{count} {reason} dropped" in printed
    assert f"{report['share_beyond_window']:.1%} of the passages are longer than the window" in printed


def test_documents_too_few_for_pairs_are_an_error_and_leave_the_old_data(tmp_path, capsys):
    root = write_documents(tmp_path / "root", {"a.md": "one word\n"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "training_data.tsv").write_text("old", encoding="utf-8")
    arguments = ["--documents-root", root, "--documents", "*.md", "--data-dir", tmp_path / "data"]
    assert exit_status(prepare.main, arguments) == 2
    assert "no training pairs" in error_line(capsys.readouterr().err)
    assert contents(tmp_path / "data") == {"training_data.tsv": b"old"}


def test_every_answer_of_the_held_out_queries_is_a_passage_of_the_corpus(project, tmp_path):
    arguments = ["--documents-root", project, "--documents", "**/*.md", "--data-dir", tmp_path, "--seed", "1"]
    assert exit_status(prepare.main, arguments) == 0
    corpus = {row.passage for row in read_corpus(tmp_path)}
    queries = read_queries(tmp_path)
    assert queries and all(query.positive in corpus for query in queries)


# ----------------------------------------------------------------------------------------- InputExample


def test_pairs_train_a_step_as_input_examples(chain):
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from torch.utils.data import DataLoader

    pairs = read_pairs(chain.data)
    examples = as_input_examples(pairs)
    assert [example.texts for example in examples] == [[pair.anchor, pair.positive] for pair in pairs]
    assert as_input_examples([Pair("a", "b", "c", "section", "x.md")])[0].texts == ["a", "b", "c"]

    model = SentenceTransformer(str(chain.base), device="cpu")
    loader = DataLoader(examples, batch_size=8, shuffle=False, collate_fn=model.smart_batching_collate)
    features, labels = next(iter(loader))
    loss = MultipleNegativesRankingLoss(model)
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = loss(features, labels)
    before.backward()
    optimizer.step()
    assert loss(features, labels).item() < before.item()


def test_pairs_train_with_fit(chain, tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from torch.utils.data import DataLoader

    monkeypatch.chdir(tmp_path)  # fit writes checkpoints below the current folder
    model = SentenceTransformer(str(chain.base), device="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = DataLoader(as_input_examples(read_pairs(chain.data)[:16]), batch_size=8, shuffle=True)
    model.fit(
        train_objectives=[(loader, MultipleNegativesRankingLoss(model))],
        epochs=1,
        warmup_steps=0,
        optimizer_params={"lr": 1e-3},
        show_progress_bar=False,
    )
    assert any(not value.equal(before[name]) for name, value in model.state_dict().items())
