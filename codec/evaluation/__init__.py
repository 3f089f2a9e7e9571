"""How good codecs are: metrics of a recording (`measure`), and of codecs over many recordings (`evaluate`).

>>> from codec.evaluation import evaluate
>>> result = evaluate(["speech_16k"], data="recordings", opus_kbps=[6])  # doctest: +SKIP
>>> result.systems[0].summaries["stoi"].mean  # doctest: +SKIP
"""

from codec.evaluation.coders import UsageError
from codec.evaluation.comparison import evaluate
from codec.evaluation.metrics import METRICS, Metric, available_metrics, measure
from codec.evaluation.results import (
    CodebookUse,
    Comparison,
    Evaluation,
    FileResult,
    Semantics,
    Summary,
    SystemResult,
)
from codec.evaluation.scorers import Recogniser, Scorer, load_scorer

__all__ = [
    "METRICS",
    "CodebookUse",
    "Comparison",
    "Evaluation",
    "FileResult",
    "Metric",
    "Recogniser",
    "Scorer",
    "Semantics",
    "Summary",
    "SystemResult",
    "UsageError",
    "available_metrics",
    "evaluate",
    "load_scorer",
    "measure",
]
