"""What is explained of a model: one output a file, its equation on top."""

from __future__ import annotations

from typing import Any

from byline.outputs.base import Evaluation, ExampleError, Output, PerExample, column
from byline.outputs.binary import Binary
from byline.outputs.called import Called
from byline.outputs.classification import Classification
from byline.outputs.denoising import Denoising
from byline.outputs.language_modeling import LanguageModeling
from byline.outputs.logits import margin
from byline.outputs.masked_language_modeling import MaskedLanguageModeling
from byline.outputs.multi_label import MultiLabel
from byline.outputs.multi_regression import MultiRegression
from byline.outputs.regression import Regression
from byline.outputs.seq2seq import Seq2Seq
from byline.outputs.token_classification import TokenClassification

__all__ = [
    "NAMED",
    "Called",
    "Denoising",
    "Evaluation",
    "ExampleError",
    "Output",
    "PerExample",
    "column",
    "margin",
    "of",
]

NAMED: dict[str, type[Output]] = {
    kind.name: kind
    for kind in (
        Classification,
        Binary,
        MultiLabel,
        Regression,
        MultiRegression,
        LanguageModeling,
        MaskedLanguageModeling,
        TokenClassification,
        Seq2Seq,
        Denoising,
    )
}
"""The outputs that have a name."""


def of(output: Any) -> Output:
    """The output that ``Task(output=…)`` means.

    Raises:
        TypeError: it is neither a name nor an output nor a callable.
        ValueError: the name is unknown.
    """
    if isinstance(output, Output):
        return output
    if isinstance(output, type) and issubclass(output, Output):
        raise TypeError(f"output is the class {output.__name__}; expected an instance, {output.__name__}(...)")
    if isinstance(output, str):
        if output not in NAMED:
            raise ValueError(f"output is {output!r}; expected one of {sorted(NAMED)} or a callable f(model, batch)")
        return NAMED[output]()
    if not callable(output):
        raise TypeError(f"output is a {type(output).__name__}; expected a name or a callable f(model, batch)")
    return Called(output)
