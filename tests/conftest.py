"""Tiny but real models, a small project of Markdown, and that project gone through all four scripts once."""

import contextlib
import io
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network, and none may wait for it
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

import config

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_PROJECT = REPOSITORY / "tests" / "sample_project"

# ----------------------------------------------------------------------------------------- a small project

LICENCE = """# Lisans Notu

Her belge bu notla birlikte dağıtılır ve yazılı izin olmadan kopyalanamaz, değiştirilemez.
"""
TEMPLATE_LINE = "Bu görev tamamlandığında raporu ofis yöneticisine teslim ediniz."

DOCUMENTS = {
    "Planlama/kilometre_taslari.md": """---
title: Kilometre Taşları
status: taslak
---
# Kilometre Taşları

Proje dört kilometre taşına ayrılmıştır; her taşın sonunda bir gösterim yapılır.

## Görev tablosu

| Görev ID | Açıklama | Durum |
|---|---|---|
| KM-1.1 | Sensör verisinin toplanması | Bitti |
| KM-2.1 | Sızıntı tahmin modelinin eğitilmesi | Sürüyor |
| KM-2.2 | Tahmin sonuçlarının haritada gösterilmesi | Bekliyor |
| KM-3.1 | Saha denemesinin planlanması | Bekliyor |

---

## Teslim kuralları

Her teslimden önce testler çalıştırılır. Sonuçlar ortak klasöre yüklenir. Eksik teslim kabul edilmez.

Bu görev tamamlandığında raporu ofis yöneticisine teslim ediniz.
""",
    "Planlama/mimari.md": """# Mimari

Sistem üç katmandan oluşur: sahadaki kutular, toplama sunucusu ve karar arayüzü.

## Sahadaki kutular

Kutular pil ile çalışır ve saatte bir ölçüm yollar. Pil ömrü en az iki yıl olmalıdır.

- Akustik algılayıcı boru duvarına mıknatısla tutturulur.
- Basınç algılayıcı vana odasına yerleştirilir.
- Haberleşme NB-IoT üzerinden yapılır; kapsama yoksa veri saklanır.

## Toplama sunucusu

Sunucu gelen ölçümleri zaman damgasıyla saklar. Eski ölçümler doksan gün sonra özetlenir.

```python
def summarise(measurements):
    return {day: mean(values) for day, values in by_day(measurements)}
```
""",
    "Planlama/isik_denetimi.md": """# Işık Denetimi

IŞIK şiddeti İSTANBUL deneme sahasında her gece ölçülür. Sokak lambaları ışık algılayıcısına göre kısılır.

## Kısma eğrisi

Gece yarısından sonra parlaklık yüzde kırka iner. Yaya geçidinde bu kural uygulanmaz ve tam parlaklık korunur.

Bu görev tamamlandığında raporu ofis yöneticisine teslim ediniz.
""",
    "Planlama/butce.md": """# Bütçe

Toplam bütçe dört yüz bin liradır. Donanım kalemi bunun yarısını tutar.

## Donanım

Sekiz yüz algılayıcı tek ihalede alınır. Yedek parça için yüzde on pay ayrılır.

## Personel

İki yazılımcı ve bir saha mühendisi tam zamanlı çalışır. Yaz aylarında bir stajyer katılır.

Bu görev tamamlandığında raporu ofis yöneticisine teslim ediniz.
""",
    "Docs/deployment.md": """# Deployment

The collector runs as one container behind a reverse proxy. Configuration is read from environment variables.

## Rolling back

A failed release is rolled back by pointing the `current` link at the previous image. Migrations are written so that
the previous release still works on the new schema.

1. Stop the ingest worker and wait until its queue is empty.
2. Switch the image tag back to the last good release.
3. Start the worker and watch the lag gauge for ten minutes.

## Backups

The database is dumped every night at two o'clock. Dumps older than thirty days are deleted from the bucket.
""",
    "Docs/api_reference.md": """# API Reference

Every request carries a bearer token. Tokens expire after one hour and are renewed with `refreshToken`.

## Measurements

`GET /v1/measurements` returns the latest hundred readings of one sensor. The parameter `since` limits them in time.

> Clients must treat unknown fields as harmless, because new ones are added without notice.

## Errors

Errors are JSON objects with the fields `code` and `detail`. A rate limit answers 429 and names the waiting time.
""",
    "Docs/glossary.md": """# Glossary

**Leak index**: a number from zero to one that tells how likely a pipe section leaks at this moment.

**Night flow**: the flow between two and four in the morning, when nearly nobody draws water.

**Correlation window**: the stretch of sound that two sensors compare to locate the noise of a leak.
""",
    "Ofis/kullanim_kilavuzu.md": """# Kullanım Kılavuzu

Görevler panoda takip edilir; her sabah dokuzda kısa bir toplantı yapılır.

## Görev takibi

Bir görev başlarken sorumlusu kartı kendi sütununa taşır. Üç gün hareket görmeyen kart toplantıda konuşulur.

### Gözden geçirme

Biten iş en az bir kişi tarafından gözden geçirilir. Gözden geçiren kişi bulguları karta yazar.

Bu görev tamamlandığında raporu ofis yöneticisine teslim ediniz.
""",
    "Ofis/lisans_notu.md": LICENCE,
    "Docs/lisans_notu_kopya.md": LICENCE,
    "Ofis/saha_gunlugu.md": """# Saha Günlüğü

## 3 Mayıs

Dere mahallesinde on iki kutu takıldı. Bir vana odası su altında olduğu için sonraya bırakıldı.

## 4 Mayıs

Gürültü ölçümü gece üçte yinelendi. Kamyon trafiği yüzünden iki ölçüm geçersiz sayıldı.
""",
}


def write_documents(folder: Path, documents: dict[str, str] | None = None) -> Path:
    for name, text in (DOCUMENTS if documents is None else documents).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def project(tmp_path) -> Path:
    return write_documents(tmp_path / "project")


# --------------------------------------------------------------------------------------------- tiny models


def sample_texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(SAMPLE_PROJECT.rglob("*.md"))] + [*DOCUMENTS.values()]


def vocabulary(tokenizer) -> tuple[dict[str, int], list[str]]:
    """Return the commonest words of the sample texts with their counts, and all letters.

    tokenizers' own trainers come to another vocabulary, or another order of it, in each process.
    """
    plain = (tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text for text in sample_texts())
    counts = Counter(word for text in plain for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    letters = sorted(set("".join(counts)))
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))[:1200]
    return {word: counts[word] for word in words}, letters


def save_sentence_model(folder: Path, fast_tokenizer, pad_token_id: int, window: int, normalize: bool) -> Path:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel

    torch.manual_seed(7)
    body = BertModel(
        BertConfig(
            vocab_size=len(fast_tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
            pad_token_id=pad_token_id,
        )
    )
    body.embeddings.word_embeddings.weight.data.normal_()  # texts that share no words are far apart, as in a real model
    body.save_pretrained(str(folder / "body"), safe_serialization=True)
    fast_tokenizer.save_pretrained(str(folder / "body"))
    modules = [Transformer(str(folder / "body"), max_seq_length=window), Pooling(32, "mean")]
    model = SentenceTransformer(modules=modules + ([Normalize()] if normalize else []), device="cpu")
    model.save_pretrained(str(folder / "model"), safe_serialization=True)
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A model shaped like all-MiniLM-L6-v2: BERT, WordPiece, mean pooling, Normalize."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words, letters = vocabulary(tokenizer)
    pieces = [*special.values(), *letters, *(f"##{letter}" for letter in letters), *words]
    tokenizer.model = models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer.add_special_tokens([*special.values()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": token for name, token in special.items()}
    fast = BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)
    folder = tmp_path_factory.mktemp("tiny")
    return save_sentence_model(folder, fast, pad_token_id=0, window=128, normalize=True)


@pytest.fixture(scope="session")
def tiny_multilingual_model(tmp_path_factory) -> Path:
    """Shaped like paraphrase-multilingual-MiniLM-L12-v2: BERT, Unigram tokenizer, mean pooling, no Normalize."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    words, letters = vocabulary(tokenizer)
    total = sum(words.values())
    pieces = [*((token, 0.0) for token in [*special, "<mask>"]), *((letter, -math.log(total)) for letter in letters)]
    pieces += [(word, math.log(count / total)) for word, count in words.items()]
    tokenizer.model = models.Unigram(pieces, special.index("<unk>"))
    tokenizer.add_special_tokens([*special, "<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=128,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    folder = tmp_path_factory.mktemp("tiny_multilingual")
    return save_sentence_model(folder, fast, pad_token_id=1, window=128, normalize=False)


# -------------------------------------------------------------------------------- the four scripts, run once


def exit_status(main, arguments) -> int:
    """Run a script's main as its guard does, and return the exit status."""
    with pytest.raises(SystemExit) as stopped:
        config.run(lambda: main([str(argument) for argument in arguments]))
    return stopped.value.code


def run_script(name: str, *arguments, stdin: str | None = None, **environment) -> subprocess.CompletedProcess:
    """Run a script as a process of its own."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / name), *map(str, arguments)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
        timeout=240,
    )


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run lines of Python as a process of its own, which finds the scripts as modules."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        cwd=REPOSITORY,
        env=os.environ | environment,
    )


def start_script(name: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / name), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def lock_held(lock: Path) -> Iterator[int]:
    """Have another process hold a lock, and die of kill -9 at the end; yield its number."""
    code = (
        "import sys, time, pathlib, run_finetuning as r\n"
        "with r.locked(pathlib.Path(sys.argv[1]), 'at work'):\n    print('held', flush=True)\n    time.sleep(120)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        assert holder.stdout.readline() == "held\n"
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> bool:
    """Wait until the condition holds; False if the process ended or the time ran out first."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if condition():
            return True
        time.sleep(0.01)
    return False


def error_line(captured: str) -> str:
    """The one error line on stderr; fails where there is none, more than one, or a traceback."""
    assert "Traceback" not in captured
    errors = [line for line in captured.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, captured
    return errors[0]


@pytest.fixture(scope="session")
def chain(tmp_path_factory, tiny_model) -> SimpleNamespace:
    """The small project prepared, fine-tuned for a few steps and indexed; tests only read these folders."""
    import generate_embeddings
    import prepare_finetuning_data
    import run_finetuning

    folder = tmp_path_factory.mktemp("chain")
    made = SimpleNamespace(
        documents=write_documents(folder / "project"),
        data=folder / "data",
        model=folder / "models" / "tuned",
        index=folder / "index",
        base=tiny_model,
    )
    documents = ["--documents-root", made.documents, "--documents", "**/*.md"]
    assert exit_status(prepare_finetuning_data.main, [*documents, "--data-dir", made.data]) == 0
    training = ["--data-dir", made.data, "--model-dir", made.model, "--base-model", tiny_model]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert exit_status(run_finetuning.main, [*training, "--max-steps", 5, "--batch-size", 8]) == 0
    made.printed = printed.getvalue()
    assert exit_status(generate_embeddings.main, [*documents, "--model", made.model, "--index-dir", made.index]) == 0
    return made


@pytest.fixture(scope="session")
def meant(tmp_path_factory, chain) -> SimpleNamespace:
    """The small project indexed with the packaged model, whose nearness means something."""
    import generate_embeddings

    made = SimpleNamespace(documents=chain.documents, index=tmp_path_factory.mktemp("meant") / "index")
    arguments = ["--documents-root", made.documents, "--documents", "**/*.md", "--index-dir", made.index]
    assert exit_status(generate_embeddings.main, [*arguments, "--model", "packaged"]) == 0
    return made
