"""Scores of generated texts against one or more references: BLEU (sacrebleu), ROUGE (rouge-score), METEOR (nltk).

All on the scale 0 to 100. With sacrebleu's 13a tokenisation and lowercase, BLEU equals the official E2E script.

METEOR takes synonyms from whatever WordNet this machine has, and nothing is downloaded: what $WNSEARCHDIR or
$WNHOME/dict name, else Debian's wordnet-base (/usr/share/wordnet), else nltk's own data.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.data.example import Example
from rankwise.errors import DataError, need
from rankwise.evaluate import bootstrap
from rankwise.evaluate.predictions import Prediction, Scores

ORDERS = (1, 2, 3, 4)
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}
References = Sequence[Sequence[str]]
NOT_INSTALLED = (
    "WordNet is not installed, so METEOR without synonyms is given as meteor_exact_stem; to have it: apt-get install "
    "wordnet-base, or WNSEARCHDIR=<the folder with data.noun>, or python -m nltk.downloader wordnet"
)
SYSTEM = "/usr/share/wordnet"
NEEDED = tuple(f"{kind}.{part}" for kind in ("data", "index") for part in ("adj", "adv", "noun", "verb"))
LEXICOGRAPHERS = 45  # files of WordNet 3; METEOR asks for none of their names
LEXNAMES = "".join(f"{number}\tlexicographer.{number}\t1\n" for number in range(LEXICOGRAPHERS))


def check_installed() -> None:
    """Raise UsageError naming the extra of a missing library, DataError for a WordNet variable that points to none."""
    for module in ("sacrebleu", "rouge_score.rouge_scorer", "nltk.translate.meteor_score", "scipy.stats"):
        need(module, extra="eval")
    wordnet_folder()


def score_texts(predictions: Sequence[Prediction], _: Sequence[Example], **how: bool) -> Scores:
    """`score_text` of predictions against all their references."""
    return score_text([one.prediction for one in predictions], [one.references for one in predictions], **how)


def score_text(
    predictions: Sequence[str], references: References, *, lowercase: bool = True, stem: bool = False, seed: int = 42
) -> Scores:
    """BLEU-1…4, n-gram precisions, ROUGE-1/2/L/Lsum and METEOR of texts, each with its bootstrap interval.

    references: one or more per prediction. `bleu` is BLEU-4. ROUGE is the F1 of each item's best reference, always
    caseless, and with `stem` of stems. lowercase: of BLEU.
    """
    if not predictions:
        raise DataError("nothing to score: there are no predictions")
    assert len(predictions) == len(references)
    assert all(references)
    parts = (
        _bleu(predictions, references, lowercase, seed),
        _rouge(predictions, references, stem, seed),
        _meteor(predictions, references, seed),
    )
    kinds: dict[str, dict[str, Any]] = {"metrics": {}, "intervals": {}, "unavailable": {}, "details": {}}
    for name, joint in kinds.items():
        for part in parts:
            joint |= getattr(part, name)
    kinds["details"]["scale"] = "0-100"
    return Scores(len(predictions), **kinds)


def _scores(
    names: Sequence[str], values: Sequence[float], spread: Sequence[tuple[float, float]] | None, n: int, **more: Any
) -> Scores:
    metrics = dict(zip(names, map(float, values), strict=True))
    return Scores(n, metrics, bootstrap.named(names, spread), **more)


# --- BLEU --------------------------------------------------------------------------------------------------------


def _bleu(predictions: Sequence[str], references: References, lowercase: bool, seed: int) -> Scores:
    """Corpus BLEU from per-item counts: the same counts, resampled and summed again, give the intervals."""
    module = need("sacrebleu.metrics", extra="eval")
    streams = [
        [group[number] if number < len(group) else None for group in references]
        for number in range(max(map(len, references)))
    ]
    corpus = module.BLEU(lowercase=lowercase)
    corpus.corpus_score(predictions, streams)  # for its signature
    by_item = module.BLEU(lowercase=lowercase, effective_order=True)
    counts = np.array([_counts(by_item, *item) for item in zip(predictions, references, strict=True)])

    def resampled(positions: NDArray[np.intp]) -> bootstrap.Array:
        return np.array([_from_counts(module.BLEU, row) for row in counts[positions].sum(axis=1)]).T

    names = ["bleu", *(f"bleu_{n}" for n in ORDERS), *(f"precision_{n}" for n in ORDERS)]
    values = _from_counts(module.BLEU, counts.sum(axis=0))
    spread = bootstrap.intervals(resampled, len(predictions), seed=seed)
    return _scores(names, values, spread, len(predictions), details={"bleu": str(corpus.get_signature())})


def _counts(bleu: Any, prediction: str, references: Sequence[str]) -> list[int]:
    score = bleu.sentence_score(prediction, list(references))
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def _from_counts(bleu: Any, row: NDArray[np.int64]) -> list[float]:
    """BLEU-4, cumulative BLEU-1…4 and the n-gram precisions, from summed counts."""
    lengths, matches, totals = row[:2], row[2:6], row[6:]
    scores = [
        bleu.compute_bleu(list(matches[:n]), list(totals[:n]), *map(int, lengths), "exp", max_ngram_order=n).score
        for n in ORDERS
    ]
    return [scores[-1], *scores, *(100 * matches / np.maximum(totals, 1))]


# --- ROUGE -------------------------------------------------------------------------------------------------------


def _rouge(predictions: Sequence[str], references: References, stem: bool, seed: int) -> Scores:
    scorer = need("rouge_score.rouge_scorer", extra="eval").RougeScorer(list(ROUGE.values()), use_stemmer=stem)
    best = [scorer.score_multi(group, text) for text, group in zip(predictions, references, strict=True)]
    values = 100 * np.array([[item[kind].fmeasure for item in best] for kind in ROUGE.values()])
    stemming = "Porter stems" if stem else "no stemming"
    how = f"rouge-score, F1 of the best reference per item, {stemming}, Lsum's sentences end at line breaks"
    return _scores(
        list(ROUGE), values.mean(axis=1), bootstrap.means(values, seed=seed), len(predictions), details={"rouge": how}
    )


# --- METEOR ------------------------------------------------------------------------------------------------------


class _NoSynonyms:
    """Stands in for WordNet where it is not installed: METEOR then matches exact words and stems."""

    def synsets(self, word: str) -> list[Any]:
        return []


class _CachedStemmer:
    def __init__(self, stem: Callable[[str], str]) -> None:
        self.stem = lru_cache(maxsize=None)(stem)


def _meteor(predictions: Sequence[str], references: References, seed: int) -> Scores:
    meteor = need("nltk.translate.meteor_score", extra="eval").meteor_score
    split = need("nltk.tokenize", extra="eval").NLTKWordTokenizer().tokenize
    stemmer = _CachedStemmer(need("nltk.stem", extra="eval").PorterStemmer().stem)
    wordnet = installed_wordnet() or _NoSynonyms()
    values = 100 * np.array(
        [
            meteor([split(reference) for reference in group], split(text), stemmer=stemmer, wordnet=wordnet)
            for text, group in zip(predictions, references, strict=True)
        ]
    )
    complete = not isinstance(wordnet, _NoSynonyms)
    return _scores(
        ["meteor" if complete else "meteor_exact_stem"],
        [values.mean()],
        bootstrap.means(values[None], seed=seed),
        len(predictions),
        unavailable={} if complete else {"meteor": NOT_INSTALLED},
        details={"meteor": "nltk (2007 parameters), best reference per item, mean of items, Treebank tokens"},
    )


def installed_wordnet() -> Any | None:
    """nltk's reader of the WordNet that is installed; None where none is. DataError as for `wordnet_folder`."""
    folder = wordnet_folder()
    if folder is not None:
        return reader(folder)
    wordnet = need("nltk.corpus", extra="eval").wordnet
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return wordnet


def wordnet_folder() -> Path | None:
    """The folder that WordNet's own variables name, else Debian's; None where there is none.

    DataError for one that a variable names and that holds no whole WordNet.
    """
    for variable, inside in (("WNSEARCHDIR", ""), ("WNHOME", "dict")):
        if os.environ.get(variable):
            place = Path(os.environ[variable]).expanduser() / inside
            if absent := missing_files(place):
                raise DataError(f"{variable}: {place} holds no WordNet ({absent[0]} is missing)")
            return place
    return None if missing_files(Path(SYSTEM)) else Path(SYSTEM)


def missing_files(folder: Path) -> list[str]:
    return [name for name in NEEDED if not (folder / name).is_file()]


@cache
def reader(folder: Path) -> Any:
    """nltk's reader of WordNet's own files: they lack `lexnames`, a list of its sources that nltk wants to have."""
    module, known = need("nltk.corpus.reader.wordnet", extra="eval"), need("nltk.data", extra="eval").path
    if str(folder) not in known:
        known.append(str(folder))  # nltk opens no file elsewhere

    class Plain(module.WordNetCorpusReader):  # type: ignore[name-defined]
        def open(self, file: str) -> Any:
            return io.StringIO(LEXNAMES) if file == "lexnames" else super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """From another version's numbers: of no use here, and it needs nltk's data."""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has no other languages
        return Plain(str(folder), None)
