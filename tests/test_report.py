"""The pages for people: what they say, and how they look in a real browser."""

import argparse
import itertools
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import DOCUMENTS, error_line, exit_status, run_script, write_documents

import config
import generate_embeddings
import prepare_finetuning_data
import run_finetuning
import semantic_search
from prepare_finetuning_data import Query
from run_finetuning import HeldOut, judge, report_page

HOSTILE = (
    '<script>document.title = "run"</script> <img src="http://127.0.0.1:9/x.png" onerror="alert(1)"> & ' + "x" * 300
)


# ---------------------------------------------------------------------------------------------- the pages


def evaluation_of(shift: float, rejected_shift: float | None = None) -> dict:
    """An evaluation as run_finetuning makes it, of 120 queries whose answers a model likes by `shift` more."""
    texts = [f"{HOSTILE if n % 10 == 0 else ''} Ölçüm {n} gece yapılır ve {n % 7} kutu takılır." for n in range(120)]
    kinds = ["heading", "sentence", "term", "question"]
    queries = [Query(f"<b>{n}</b> ölçümü kim yapar?", text, kinds[n % 4], "a.md") for n, text in enumerate(texts)]
    judged = HeldOut(queries, texts)
    rng = np.random.default_rng(1)
    base = judged.base = rng.normal(size=(120, 120)) + 1.5 * np.eye(120)
    noise = rng.normal(scale=0.3, size=base.shape)
    options = argparse.Namespace(seed=1)
    judged_by = {
        by: judge(judged, base + noise + by * np.eye(120) if by else base, by == 0, options)
        for by in {shift, rejected_shift} - {None}
    }
    return judged_by[shift] | {
        "rejected": judged_by[rejected_shift]["comparison"] if rejected_shift else None,
        "created": "2026-03-01T10:15:00+00:00",
        "settings": {"loss": "mnrl", "batch_size": 32, "max_steps": 0, "seed": 42},
        "letters_read_plainly": ["ı"],
        "pairs": 1617,
        "steps": 12,
        "history": [{"step": 6, "loss": 2.4, "nDCG@10": 0.2}, {"step": 12, "loss": 2.2, "nDCG@10": 0.3}],
        "alpha": 0.75,
        "nDCG@10_by_alpha": {0.0: 0.19, 0.75: 0.3},
        "versions": {"torch": "2.13.0"},
        "machine": "Linux, 2 CPUs",
        "base": {"wanted": "some/base", "used": "packaged", "note": "another <model> was wanted"},
        "data": {"documents": 49, "passages": 541, "training_pairs": {"heading": 545}, "share_beyond_window": 0.13},
        "minutes": 12.4,
    }


@pytest.fixture(scope="module")
def pages(chain, tmp_path_factory) -> dict[str, Path]:
    """Each kind of page: reports of several verdicts, the tiny chain's own, and the data report."""
    folder = tmp_path_factory.mktemp("pages")
    for name, shifts in {"improved": (1.5,), "kept-base": (0.0, -1.0), "unchanged": (0.0001,)}.items():
        (folder / f"{name}.html").write_text(report_page(evaluation_of(*shifts), Path("a <model>")), encoding="utf-8")
    shutil.copy(chain.model / "report.html", folder / "chain.html")
    hostile = (
        f"\n\n## Ek\n\nBir kutu takıldı {HOSTILE} ve sonra söküldü. Kapak hemen kırıldı, başka bir kutu istendi.\n"
    )
    glossary = {"Docs/glossary.md": DOCUMENTS["Docs/glossary.md"] + hostile, "Ek/" + "u" * 90 + ".md": "# Ek\n\nNot.\n"}
    write_documents(folder / "project", DOCUMENTS | glossary)
    arguments = ["--documents-root", folder / "project", "--documents", "**/*.md", "--data-dir", folder / "data"]
    strategies = ["--strategy", "heading", "--strategy", "sentence", "--strategy", "term"]
    report = ["--report", folder / "data.html", *strategies, "--seed", 2]  # which trains on the glossary
    assert exit_status(prepare_finetuning_data.main, [*arguments, *report]) == 0
    return {path.stem: path for path in sorted(folder.glob("*.html"))}


PAGES = ["improved", "kept-base", "unchanged", "chain", "data"]


# --------------------------------------------------------------------------------------- what they say


@pytest.mark.parametrize(
    ("shifts", "verdict", "sentence"),
    [
        ((1.5,), "improved", r"finds more than the base model: .* for \d+ of 100 queries"),
        ((0.0001,), "unchanged", "can not be told apart"),
        ((0.0,), "kept-base", "Training brought nothing"),
        ((0.0, -1.0), "kept-base", "trained weights found less"),
    ],
)
def test_the_first_sentence_is_the_verdict_in_plain_words(shifts, verdict, sentence):
    evaluation = evaluation_of(*shifts)
    assert evaluation["comparison"]["verdict"] == verdict
    first = re.search(r'<p class="sentence"[^>]*>(.*?)</p>', report_page(evaluation, Path("name")), re.S)[1]
    assert re.search(sentence, first)
    assert re.search(sentence, prepare_finetuning_data.render("model_card.md", evaluation=evaluation, folder="name"))


def test_the_figures_of_a_rejected_training_are_shown_and_not_those_of_the_base_with_itself():
    evaluation = evaluation_of(0.0, -1.0)
    assert f"{evaluation['rejected']['difference']:+.3f}" in report_page(evaluation, Path("name")).replace("−", "-")


def test_the_report_is_the_same_for_the_same_evaluation():
    assert report_page(evaluation_of(1.5), Path("name")) == report_page(evaluation_of(1.5), Path("name"))


def test_most_gained_and_most_lost_carry_the_first_passages_of_both_models(chain):
    told = json.loads((chain.model / "evaluation.json").read_text(encoding="utf-8"))["comparison"]
    for row in told["most_gained"] + told["most_lost"]:
        for model in ("base", "fine_tuned"):
            place = row[f"{model}_first"].index(row["positive"]) + 1 if row["positive"] in row[f"{model}_first"] else 0
            assert len(row[f"{model}_first"]) == 3
            assert place == (row[f"{model}_rank"] if row[f"{model}_rank"] <= 3 else 0)


def test_the_report_names_the_command_that_indexes_with_its_model():
    usual = config.FINE_TUNED_MODEL_DIR / config.MODEL_NAME
    assert "<code>python generate_embeddings.py</code>" in report_page(evaluation_of(1.5), usual)
    elsewhere = report_page(evaluation_of(1.5), Path("models/my own"))
    assert "generate_embeddings.py --model &#39;models/my own&#39;</code>" in elsewhere


def test_an_evaluation_without_queries_or_data_still_makes_a_report():
    evaluation = evaluation_of(1.5) | {"data": {}, "history": [], "nDCG@10_by_alpha": {}, "search": {}}
    evaluation["comparison"] = run_finetuning.compare([], np.zeros(0), np.zeros(0), False, 1) | {"nDCG@10_by_mode": {}}
    assert "are too few to tell" in report_page(evaluation, Path("name"))


def test_the_data_report_shows_copies_templates_and_doubtful_pairs(pages):
    page = pages["data"].read_text(encoding="utf-8")
    assert "Docs/lisans_notu_kopya.md, Ofis/lisans_notu.md" in page
    assert "Bu görev tamamlandığında raporu ofis yöneticisine teslim ediniz." in page
    assert page.count("Ten drawn at random") == page.count("The ten most doubtful") == 3


def test_the_most_doubtful_pairs_share_fewest_words():
    texts = [("pil ömrü", "Pil ömrü iki yıldır."), ("pil ömrü", "Kapak kırıldı."), ("pil ömrü", "Pil yeri.")]
    pairs = [prepare_finetuning_data.Pair(*text, "", "heading", "a.md") for text in texts]
    picked = prepare_finetuning_data.pick_examples(pairs, "heading", seed=1)
    doubtful = [pair.positive for pair in picked["doubtful"]]
    assert doubtful == ["Kapak kırıldı.", "Pil yeri.", "Pil ömrü iki yıldır."]
    assert sorted(picked["random"]) == sorted(pairs)


def test_the_model_cards_own_lines_load_the_model_and_give_its_embeddings(chain, monkeypatch):
    monkeypatch.chdir(chain.model.parent)
    card = (chain.model / "README.md").read_text(encoding="utf-8").split("### How to load it")[1]
    found: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], found)
    wanted = run_finetuning.Encoder(chain.model).encode(["a query", "a passage"])
    assert (found["embeddings"] * wanted).sum(axis=1).min() > 0.999


# ----------------------------------------------------------------------------------- in a real browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --no-proxy-server"
)


class Browser:
    """Chromium at a width and in a colour scheme of choice."""

    def __init__(self, profile: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.run = self.driver.execute_script
        self.command = self.driver.execute_cdp_cmd

    def open(self, path: Path, width: int = 1200, scheme: str = "light", media: str = "screen") -> None:
        self.driver.get("about:blank")
        self.logged(), self.requested()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.command("Emulation.setDeviceMetricsOverride", size)
        scheme_wanted = {"name": "prefers-color-scheme", "value": scheme}
        self.command("Emulation.setEmulatedMedia", {"media": media, "features": [scheme_wanted]})
        self.driver.get(path.as_uri())

    def logged(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requested(self) -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium with its driver here; on Debian: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [360, 1200])
def test_a_page_asks_nothing_of_anybody_and_fits_into_the_window(browser, pages, name, width):
    browser.open(pages[name], width)
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    assert browser.run("return document.scrollingElement.scrollWidth") <= width
    outside = "return [...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll, svg, .skip')"
    assert browser.run(outside + f" && one.getBoundingClientRect().right > {width}).map(one => one.outerHTML)") == []
    assert browser.logged() == []
    assert browser.requested() == [pages[name].as_uri()]


@pytest.mark.parametrize(("name", "charts"), [("improved", 4), ("kept-base", 4), ("unchanged", 4), ("data", 1)])
def test_charts_are_visible_and_have_a_name(browser, pages, name, charts):
    browser.open(pages[name], 360)
    boxes = browser.run(
        "return [...document.querySelectorAll('svg')].map(one => {const box = one.getBoundingClientRect();"
        " const text = one.querySelector('text').getBoundingClientRect();"
        " return [box.width, box.height, text.height,"
        " document.getElementById(one.getAttribute('aria-labelledby')).textContent.length]})"
    )
    assert len(boxes) == charts
    for width, height, text_height, name_length in boxes:
        assert 250 < width <= 360 and height > 100 and text_height >= 8 and name_length > 20


@pytest.mark.parametrize("name", ["improved", "data"])
def test_markup_in_a_document_shows_as_text(browser, pages, name):
    browser.open(pages[name])
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    assert '<script>document.title = "run"</script>' in browser.run("return document.body.innerText")
    assert browser.run("return document.title") != "run"
    assert browser.run("return document.querySelectorAll('script, img').length") == 0


LUMINANCE = """
const probe = document.body.appendChild(document.createElement('span'));
const of = name => {
  probe.style.color = `var(--${name})`;
  const linear = getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map(Number).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
return Object.fromEntries(arguments[0].map(name => [name, of(name)]));
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_contrast_as_wcag_aa_asks(browser, pages, scheme):
    browser.open(pages["improved"], scheme=scheme)
    texts, graphics = ["ink", "muted", "tuned", "good", "bad"], ["base", "warn"]
    of = browser.run(LUMINANCE, ["paper", "card", *texts, *graphics])
    assert (of["paper"] > 0.5) == (scheme == "light")
    for name in texts + graphics:
        for paper in ("paper", "card"):
            low, high = sorted((of[name], of[paper]))
            assert (high + 0.05) / (low + 0.05) >= (4.5 if name in texts else 3), (name, paper)


def test_dark_mode_reaches_the_charts(browser, pages):
    fills = []
    for scheme in ("light", "dark"):
        browser.open(pages["improved"], scheme=scheme)
        fills.append(browser.run("return getComputedStyle(document.querySelector('svg text')).fill"))
    assert fills[0] != fills[1]


@pytest.mark.parametrize("name", PAGES)
def test_a_screen_reader_finds_headings_tables_and_languages(browser, pages, name):
    browser.open(pages[name])
    levels = browser.run("return [...document.querySelectorAll('h1, h2, h3, h4')].map(one => Number(one.tagName[1]))")
    assert levels.count(1) == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert browser.run("return [...document.querySelectorAll('table')].every(one => one.caption && one.tHead)")
    assert browser.run("return [...document.querySelectorAll('th')].every(one => one.scope)")
    assert browser.run("return document.documentElement.lang") == "en"
    ids = browser.run("return [...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))
    if name == "data":
        assert browser.run("return document.querySelectorAll('[lang=tr]').length") > 0


def test_print_shows_what_is_folded_away_on_screen(browser, pages):
    browser.open(pages["improved"], media="print")
    assert browser.run(
        "return [...document.querySelectorAll('details li')].every(one => one.getBoundingClientRect().height > 0)"
    )
    assert browser.run("return document.querySelectorAll('details:not([open])').length") > 0


# ------------------------------------------------------------------------------------ marking of results

QUERIES = ["görev takibi nasıl yapılır?", "", HOSTILE + " yedek parça payı", "rolling back a release"]


@pytest.fixture(scope="module")
def comparison(chain, tmp_path_factory) -> Path:
    """The page of three queries, the fine-tuned model's index beside the base model's."""
    folder = tmp_path_factory.mktemp("comparison")
    documents = ["--documents-root", chain.documents, "--documents", "**/*.md"]
    assert (
        exit_status(generate_embeddings.main, [*documents, "--model", chain.base, "--index-dir", folder / "base"]) == 0
    )
    arguments = ["--index-dir", chain.index, "--compare", folder / "base", "--html", folder / "comparison.html"]
    done = run_script("semantic_search.py", *arguments, stdin="\n".join(QUERIES))
    assert done.returncode == 0 and "with 3 queries" in done.stdout, done.stderr
    return folder / "comparison.html"


def test_marks_are_kept_and_become_lines_that_step_1_reads(browser, comparison, chain, tmp_path):
    browser.open(comparison)
    assert browser.run("return document.getElementById('lines').value") == "question\tpassage\n"
    sections = browser.driver.find_elements("css selector", "main section")
    for section, value in zip(sections, ("yes", "no", "yes"), strict=True):
        section.find_element("css selector", f"button[value={value}]").click()
    (second := sections[2].find_elements("css selector", "button[value=yes]")[1]).click()
    second.click()  # a second click takes the mark back
    pressed = "return [...document.querySelectorAll('[aria-pressed=true]')].map(one => one.value)"
    assert set(browser.run(pressed)) == {"yes", "no"}
    for _ in range(10):  # the browser hands a mark to its store a moment after the click
        time.sleep(0.5)
        browser.driver.refresh()
        if browser.run(pressed):
            break
    assert set(browser.run(pressed)) == {"yes", "no"}
    marked = "return [...document.querySelectorAll('li.yes')].map(one => [one.dataset.question, one.dataset.passage])"
    wanted = {tuple(row) for row in browser.run(marked)}
    assert len(wanted) == 2
    (tmp_path / "questions.tsv").write_text(
        browser.run("return document.getElementById('lines').value"), encoding="utf-8"
    )
    paths = prepare_finetuning_data.find_documents(chain.documents, ["**/*.md"])
    passages = prepare_finetuning_data.read_passages(chain.documents, paths, config.MAX_PASSAGE_CHARS, 20)
    questions = prepare_finetuning_data.read_questions(tmp_path)
    found = prepare_finetuning_data.find_answers(questions, passages, chain.documents)
    assert {(question, prepare_finetuning_data.plain_text(passage.text)) for question, passage in found} == wanted
    assert "Marked relevant: left 2 of 3" in browser.run("return document.getElementById('tally').textContent")


def test_the_lines_can_be_downloaded(browser, comparison, tmp_path):
    browser.command("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.open(comparison)
    browser.driver.find_element("id", "download").click()
    file = tmp_path / "questions.tsv"
    for _ in range(100):
        if file.exists():
            break
        time.sleep(0.1)
    assert file.read_text(encoding="utf-8") == browser.run("return document.getElementById('lines').value")


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_to_mark_on_runs_nothing_but_its_own_script(browser, comparison, width):
    browser.open(comparison, width)
    assert browser.run("return document.scrollingElement.scrollWidth") <= width
    assert browser.run("return document.title") != "run"
    assert '<script>document.title = "run"</script>' in browser.run("return document.body.innerText")
    assert browser.run("return document.querySelectorAll('script').length") == 1
    assert browser.logged() == []
    assert browser.requested() == [comparison.as_uri()]


def test_a_page_without_queries_or_a_second_index_is_one_line(chain, tmp_path, capsys):
    for arguments, words in (
        (["x"], "--html needs --compare"),
        (["--compare", chain.index, " "], "--html needs queries"),
        (["--compare", chain.index, "--json", "x"], "give one of them"),
    ):
        page = ["--index-dir", chain.index, "--html", tmp_path / "page.html"]
        assert exit_status(semantic_search.main, [*page, *arguments]) == 2
        assert words in error_line(capsys.readouterr().err)
    assert not (tmp_path / "page.html").exists()


# ------------------------------------------------------------------------------------- quiet and verbose


def test_quiet_leaves_the_final_result_alone_and_errors(chain, tmp_path, capsys):
    data = ["--data-dir", tmp_path / "data", "--documents-root", chain.documents, "--documents"]
    assert exit_status(prepare_finetuning_data.main, [*data, "**/*.md", "--documents", "none.md", "-q"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and printed.out.startswith("wrote ") and not printed.err
    assert exit_status(prepare_finetuning_data.main, [*data, "none.md", "-q"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    model = ["--data-dir", chain.data, "--model-dir", chain.model, "--evaluate-only", "-q"]
    assert exit_status(run_finetuning.main, model) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and printed.out.startswith("VERDICT ") and not printed.err


def test_times_are_told_in_units_that_people_read():
    told = [config.duration(seconds) for seconds in (0.4, 12.3, 99.0, 610, 7260)]
    assert told == ["0.4 s", "12 s", "99 s", "10 min", "2 h 1 min"]


def test_the_libraries_are_silent_unless_verbose(chain):
    arguments = ["--data-dir", chain.data, "--model-dir", chain.model, "--evaluate-only"]
    silent, verbose = (
        run_script("run_finetuning.py", *arguments, *more, TRANSFORMERS_VERBOSITY="warning") for more in ([], ["-v"])
    )
    assert silent.returncode == verbose.returncode == 0 and silent.stdout == verbose.stdout
    assert silent.stderr == "" and "Loading weights" in verbose.stderr
