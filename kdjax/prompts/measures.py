"""How good a text is beside the one that was wanted, from 0 to 1; and how varied several texts are."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq


def rouge_l(said: str, wanted: str) -> float:
    """Return ROUGE-L F1 = 2PR/(P + R): P and R are the words of the longest common subsequence over those of each text.

    Paper: Lin 2004, ROUGE, Text Summarization Branches Out, W04-1013, section 3; words as the rouge-score package cuts
    them (letters and digits without regard to case), not stemmed.
    """
    said_words, wanted_words = words(said), words(wanted)
    return _f1(LCSseq.similarity(said_words, wanted_words), len(said_words), len(wanted_words))


def token_f1(said: str, wanted: str) -> float:
    """Return F1 of the words that both texts have, each as often as in both; 1 where neither has any.

    Paper: Rajpurkar et al. 2016, SQuAD, arXiv:1606.05250, section 6.1, with its script's normalisation.
    """
    said_words, wanted_words = normalised(said).split(), normalised(wanted).split()
    if not said_words or not wanted_words:
        return float(said_words == wanted_words)
    common = sum((Counter(said_words) & Counter(wanted_words)).values())
    return _f1(common, len(said_words), len(wanted_words))


def exact_match(said: str, wanted: str) -> float:
    """Return 1 where both texts are the same once normalised, otherwise 0.

    Paper: Rajpurkar et al. 2016, SQuAD, arXiv:1606.05250, section 6.1.
    """
    return float(normalised(said) == normalised(wanted))


def distinct(texts: Sequence[str], n: int) -> float:
    """Return the share of runs of n words, over all texts together, that are different ones; 0 without any.

    Paper: Li et al. 2016, A Diversity-Promoting Objective Function, arXiv:1510.03055, section 5.
    """
    runs = [run for text in texts for run in zip(*(words(text)[i:] for i in range(n)), strict=False)]
    return len(set(runs)) / len(runs) if runs else 0.0


def words(text: str) -> list[str]:
    """Return the runs of letters and digits of a text, without regard to case."""
    return re.findall(r"[^\W_]+", text.casefold())


def normalised(text: str) -> str:
    """Return a text in lower case without punctuation, articles and needless space, as SQuAD's script has it."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _f1(common: int, said: int, wanted: int) -> float:
    """Return 2PR/(P + R) of P = common/said and R = common/wanted, 0 where nothing is common."""
    return 2 * common / (said + wanted) if common else 0.0
