"""What ``run.json`` holds, described: the facts of a run, what each stage finds, and what it has come to.

A stage writes these and the report reads them, perhaps another day, from a
file that anybody may have changed since.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlxlora_core.files.forms import (
    Else,
    Flag,
    Form,
    Items,
    Map,
    Maybe,
    Number,
    Option,
    Plain,
    Strict,
    Table,
    Text,
    Whole,
    form_of,
)
from mlxlora_core.training.events import TrainResult

_BINS = 1000  # of a histogram; there are never that many

_LOSS = Table({"loss": Number(), "perplexity": Maybe(Number()), "tokens": Whole()})
_ANSWER = Table(
    {
        "prompt": Text(),
        "text": Text(),
        "ended": Flag(),
        "split": Maybe(Text(("train", "valid", "test"))),
        "expected": Maybe(Text()),
        "exact": Maybe(Flag()),
        "first_sentence": Maybe(Flag()),
    }
)
_SCORE = Table({"score": Number(), "rows": Whole(least=1)})
_MEASURED = Table({"losses": Map(_LOSS), "answers": Items(_ANSWER), "scores": Option(Map(_SCORE))})
_LENGTHS = Table(
    {
        "bin_tokens": Whole(least=1),
        "rows": Items(Whole(), most=_BINS),
        "median": Number(),
        "longest": Whole(),
    }
)

# What the report needs of a training; the rest may be that of another version.
_NEEDED = (
    "parameters",
    "trainable_parameters",
    "adapted",
    "rows_cut",
    "tokens_cut",
    "rows_empty",
    "max_seq_length",
)
_TRAINED = Table(
    {name: form if name in _NEEDED else Option(form) for name, form in form_of(TrainResult).keys.items()}
    | {"lengths": _LENGTHS}
)

#: stage -> what it finds
RESULT_FORMS: Mapping[str, Form] = {
    "model": Map(Plain()),
    "data": Table(
        {
            "rows": Table({"train": Whole(), "valid": Whole(), "test": Whole()}, others=None),
            "groups": Whole(),
            "repeated_rows": Whole(),
            "rows_in_two_splits": Whole(),
            "versions": Map(Text()),
            "skipped": Items(Table({"source": Text(), "reason": Text()})),
        }
    ),
    "before": _MEASURED,
    "train": _TRAINED,
    "after": _MEASURED,
    "export": Map(Plain()),
}

_COUNTS = Table({"before": Whole(), "after": Whole()})
_ASKED = Table({"questions": Whole(), "first_sentence": _COUNTS, "exact": _COUNTS})

#: what a run has come to, as :func:`~mlxlora_core.runs.grading.summarize` makes it
SUMMARY_FORM = Table(
    {
        "losses": Map(Table({"before": Number(), "after": Number(), "change": Maybe(Number())})),
        "scores": Option(Map(Table({"rows": Whole(least=1), "before": Number(), "after": Number()}))),
        "questions": Table({"memory": _ASKED, "held_out": _ASKED, "no_row": Table({"questions": Whole()})}),
    }
)

# Size and time of change, as :func:`~mlxlora_core.runs.folder.file_stat` gives them.
_FILES = Strict(Map(Maybe(Items(Whole(least=-(2**63)), least=2, most=2))))


def _stage(result: Form) -> Form:
    """What run.json keeps of a stage that was done."""
    return Option(Table({"inputs": Text(), "files": _FILES, "result": result}))


_STAGES = Table({stage: _stage(form) for stage, form in RESULT_FORMS.items()}, others=_stage(Map(Plain())))

#: run.json; what is not sound in it counts as not done
RECORD_FORM = Table(
    {
        "mlxlora": Text(),
        "recipe": Else(Text(), lambda: "run"),
        "seed": Else(Whole(), lambda: 0),
        "plugins": Else(Map(Text()), dict),
        "runtime": Else(Items(Text()), list),
        "machine": Else(Map(Plain()), dict),
        "origins": Else(Map(Text()), dict),
        "inputs": Else(Map(Text()), dict),
        "started": Else(Map(Text()), dict),
        "stages": Else(_STAGES, dict),
        "summary": Option(SUMMARY_FORM),
        "ended": Option(Text()),
    }
)
