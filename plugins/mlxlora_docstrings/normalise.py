"""Option ``preprocess``: text reduced to the words that carry it."""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W_]+(?:_[^\W_]+)*")
_VOWEL = re.compile(r"[aeiouy]")
_LOST_E = re.compile(r"[^aeiou](?:al|at|iv|iz|uc|ut)$")
_IRREGULAR = {"indices": "index", "matrices": "matrix", "vertices": "vertex"}

_STOP_TEXT = """
    a about above after again against all also am an and any are as at be because been before
    being below between both but by can cannot could did do does doing down during each few for
    from further had has have having he her here hers herself him himself his how i if in into
    is it its itself just may me might more most must my myself no nor not now of off on once
    only or other our ours ourselves out over own per same shall she should so some such than
    that the their theirs them themselves then there these they this those through thus to too
    under until up upon very via was we were what when where whether which while who whom whose
    why will with within would you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_STOP_TEXT.split())


def normalise(text: str) -> str:
    """``text`` in lower case without punctuation and stop words, every word by its crude lemma.

    >>> normalise("Applies the rectified linear units, element-wise.")
    'apply rectify linear unit element wise'
    """
    words = (word for word in _WORD.findall(text.lower()) if word not in STOP_WORDS)
    return " ".join(map(lemma, words))


def lemma(word: str) -> str:
    """A crude English lemma of a word in lower case: plurals, ``-ing`` and ``-ed`` undone.

    Names (with a digit or an underscore) and short words stay as they are.

    >>> [lemma(word) for word in ("matrices", "classes", "stopping", "scaled", "bias", "float32")]
    ['matrix', 'class', 'stop', 'scale', 'bias', 'float32']
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.isalpha():
        return word
    if word.endswith(("ied", "ies")):
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    for ending in ("ing", "ed"):
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= 3 and _VOWEL.search(stem):
            return _restored(stem)
    if word.endswith("s") and not word.endswith(("ss", "us", "is", "as")):
        return word[:-1]
    return word


def _restored(stem: str) -> str:
    """The verb that ``stem`` was before its ending: ``stopp`` -> ``stop``, ``scal`` -> ``scale``."""
    if stem[-1] == stem[-2] and stem[-1] not in "lsz":
        return stem[:-1]
    return stem + "e" if _LOST_E.search(stem) else stem
