"""Every path and setting of the four scripts; edit the values, then run the scripts in order.

    prepare_finetuning_data.py   documents        -> fine_tuning_data/
    run_finetuning.py            fine_tuning_data -> fine_tuned_model/<MODEL_NAME>/
    generate_embeddings.py       documents, model -> embeddings/
    semantic_search.py           embeddings       -> answers

Most settings can be overridden for one run by a command line option of the same name (see --help).
"""

import argparse
import contextlib
import errno
import glob
import io
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

# ---------------------------------------------------------------------------------------------- paths
BASE_DIR = Path(__file__).resolve().parent
DOCUMENTS_ROOT = BASE_DIR / "tests" / "sample_project"  # the folder that holds your Markdown
TARGET_DOCUMENTS = [  # globs relative to DOCUMENTS_ROOT; "**/*.md" takes everything
    "Planlama_Ofisi/ana_gorev_panosu.md",
    "Planlama_Ofisi/hierarchical_task_structure_definition.md",
    "Yonetici_Ofisi/Genel_Belgeler/YONETICI_OFISI_KULLANIM_KILAVUZU.md",
    "Yonetici_Ofisi/Genel_Belgeler/standart_gorev_atama_sablonu.md",
    "**/Calisma_Dosyalari/*_detailed_cuda_tasks.md",  # every persona's task file
    "Yonetici_Ofisi/Genel_Belgeler/license_*.md",  # the licence analyses
    "Planlama_Ofisi/*.md",  # the other planning documents
]
FINE_TUNING_DATA_DIR = BASE_DIR / "fine_tuning_data"
FINE_TUNED_MODEL_DIR = BASE_DIR / "fine_tuned_model"
MODEL_NAME = "alt-las-custom-MiniLM-L12-v2"  # the fine-tuned model's folder in FINE_TUNED_MODEL_DIR
INDEX_DIR = BASE_DIR / "embeddings"
INDEX_BACKUPS = 2  # how many earlier indexes are kept beside the current one
FAISS_INDEX = "auto"  # exact, above 50,000 passages approximate; or a faiss.index_factory string: "HNSW32,Flat"

# ------------------------------------------------------------------------------------------- passages
MAX_PASSAGE_CHARS = 600  # longer blocks are cut at sentence ends; about one window of the base model
MAX_DOCUMENT_MB = 20  # larger files are skipped with a warning

# ---------------------------------------------------------------------------------------------- pairs
PAIR_STRATEGIES = ["heading", "sentence", "words"]  # also: neighbours, section, row, term, list, link (README.md)
MAX_PAIRS_PER_SECTION = 24  # of one strategy, so that a long list does not swamp the rest
TEMPLATE_DOCUMENTS = 4  # a text found in this many unrelated documents is a template line: never trained on
EVALUATION_SHARE = 0.3  # share of the passages, by whole documents, that training never sees; of very many, less
MAX_EVALUATION_QUERIES = 400
QUESTION_WEIGHT = 3  # a labelled question (questions.tsv) is trained on as often as this many other pairs
MAX_QUESTION_CANDIDATES = 200  # how many questions --suggest-questions suggests at once

# ------------------------------------------------------------------------------------------- training
BASE_MODEL = "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"  # hub name, folder, or "packaged"
BASE_MODEL_REVISION = None  # a commit of the hub's repository, or None for its newest
LOSS = "mnrl"  # mnrl: in-batch negatives; triplet: hard negatives mined with the base model
EPOCHS = 3  # 1 to 5
MAX_UNLABELLED_STEPS = 120  # pairs that no person labelled are trained on no longer: search gets worse again
BATCH_SIZE = 32  # 16 to 32 on a CPU
LEARNING_RATE = 5e-5  # short runs profit from more than the usual 2e-5; 1e-4 spoils terms and IDs
TRAINING_TOKENS = 96  # texts are cut there while training: half again as many steps in the same time as 128
MAX_TRAINING_MINUTES = 20  # training and evaluation together; the schedule is shortened to fit
EVALUATION_PASSAGES = 4000  # how many passages base and fine-tuned model are compared on
WATCHED_PASSAGES = 500  # how many passages the held-out queries are searched in while training
SEED = 42  # the same documents and seed give the same pairs and the same order of training
DEVICE = None  # "cpu", "cuda", "mps", or None for the best one found

# --------------------------------------------------------------------------------------------- search
TOP_K = 5  # results shown
SEARCH_MODE = "hybrid"  # semantic, keyword, hybrid or task
SEMANTIC_WEIGHT = None  # hybrid: 0 to 1 for the meaning, the rest for the words that are found; None: as fitted, or 0.3
MIN_RELEVANCE = 0.5  # below it "nothing relevant found"; 0 shows whatever is nearest

# ------------------------------------------------------------------------------ nothing to edit below

DOCUMENTS_ROOT, INDEX_DIR = Path(DOCUMENTS_ROOT).expanduser(), Path(INDEX_DIR).expanduser()
FINE_TUNING_DATA_DIR = Path(FINE_TUNING_DATA_DIR).expanduser()
FINE_TUNED_MODEL_DIR = Path(FINE_TUNED_MODEL_DIR).expanduser()


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: one line that names it and the way out."""


def check_number(name: str, least: int, kind: type = int) -> None:
    """Raise UserError unless a setting of this file is a number of at least `least`, whole unless kind is float."""
    value = globals()[name]
    if not isinstance(value, int | kind) or value < least:
        raise UserError(f"config.{name} is {value!r}; set it to a {'whole ' * (kind is int)}number, {least} or more")


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add --quiet and --verbose, which all four scripts have."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help="only errors and the final result")
    group.add_argument("-v", "--verbose", action="store_true", help="also what the libraries have to say")


def set_verbosity(options: argparse.Namespace) -> None:
    """Silence the libraries unless --verbose, and with --quiet all of stderr but errors (see run); call it early."""
    if options.quiet:
        sys.stderr = io.StringIO()
    if not options.verbose:
        warnings.filterwarnings("ignore")
        for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):
            os.environ[f"{library}_VERBOSITY"] = "error"
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def command_for(command: str, option: str, path: Path, usual: Path) -> str:
    """Return a script's command, with the option that tells it a path other than the usual one."""
    return command + f" {option} {shlex.quote(printable(str(path)))}" * (path != usual)


def printable(text: str) -> str:
    """Return a text, or a file's name, that neither steers the terminal nor turns the direction of writing."""
    shown = text.encode(errors="backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", " ", shown)


def duration(seconds: float) -> str:
    """Return a time in the unit that people would use."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of path (a file or a folder, made by the block) that takes its place on success.

    A file is replaced in one step. A folder's predecessor is kept beside it as "<name>.previous"; a reader that finds
    only that one (a crash between the two renames) puts it back with restore_previous. If the block fails, what was
    there stays untouched and the temporary is removed.
    """
    if not path.name:
        raise UserError(f"{str(path)!r} is no name of a file; give one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    remove(temporary)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.new"):  # of runs that were killed
        if (process := leftover.name.split(".")[-2]).isdigit() and not is_running(int(process)):
            remove(leftover)
    try:
        yield temporary
        for part in [*sorted(temporary.rglob("*")), temporary]:
            sync(part)
        if temporary.is_dir() and path.exists():
            remove(previous(path))
            path.rename(previous(path))
        temporary.replace(path)
        sync(path.parent)
    finally:
        remove(temporary)


def is_running(process: int) -> bool:
    try:
        return os.name == "nt" or os.kill(process, 0) is None  # on Windows os.kill would end it
    except OSError as error:
        return error.errno == errno.EPERM


def previous(folder: Path) -> Path:
    return folder.with_name(folder.name + ".previous")


def restore_previous(folder: Path) -> None:
    """Undo a swap that a crash cut in half: the folder is missing and its predecessor stands beside it."""
    if not folder.exists() and previous(folder).is_dir():
        previous(folder).rename(folder)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names a folder holds (POSIX)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit: 0 done, main's own status, 2 a mistake (one line), 130 Ctrl-C."""
    for name in ("stdin", "stdout", "stderr"):  # one that the shell closed: its number must not become a file's
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        with contextlib.suppress(AttributeError, OSError):  # one that stands in for it, or was made over to a pipe
            # On a Turkish Windows a pipe has an encoding that lacks most characters.
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=errors)
    try:
        with contextlib.redirect_stderr(sys.stderr):  # errors are shown with --quiet too
            status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted; what was there before is unchanged", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + getattr(signal, "SIGPIPE", 13)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            where = printable(f"{error.filename}: ") if error.filename else ""
            print(f"error: {where}{error.strerror}; make room, allow access or name another place", file=sys.stderr)
        else:  # a fault of ours; Python's own status for it, 1, would say that nothing was found
            traceback.print_exc()
        status = 2
    sys.exit(status)
