"""Every method by its name: what it is, what it needs, and how it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from byline.ensembles import Ensemble
from byline.features import Factorized
from byline.methods.base import Attributor
from byline.methods.dvemb import DVEmb
from byline.methods.influence import Influence
from byline.methods.knn_shapley import KNNShapley
from byline.methods.random_baseline import Random
from byline.methods.representation import RepresentationSimilarity
from byline.methods.representer import RepresenterPoints
from byline.methods.similarity import GradCos, GradDot
from byline.methods.tracin import TracIn
from byline.methods.trackstar import TrackStar
from byline.methods.trak import TRAK
from byline.task import Task

ALL = ("independent", "dropout", "forward-only", "lora", "weight noise", "trajectory")
_BUT_FORWARD = tuple(kind for kind in ALL if kind != "forward-only")


@dataclass(frozen=True)
class MethodInfo:
    """A method.

    Attributes:
        name: On the command line.
        title: In tables.
        description: In a sentence.
        citation: Where it comes from.
        needs: "gradients", "embeddings" or "nothing"; and "labels" where it reads them beside the task's own output
            and loss.
        ensembles: The kinds that have a meaning for it.
        cls: Its class.
        options: What the name stands for beyond the class.
        dear: Why it is left out of comparisons of "all" methods unless it is named; empty where it is not.
    """

    name: str
    title: str
    description: str
    citation: str
    cls: type[Attributor]
    needs: tuple[str, ...] = ("gradients",)
    ensembles: tuple[str, ...] = _BUT_FORWARD
    options: Mapping[str, Any] = field(default_factory=dict)
    dear: str = ""

    @property
    def forward_only(self) -> bool:
        """Whether ``Dropout(..., forward_only=True)`` has a meaning for it."""
        return "forward-only" in self.ensembles

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = {k: v for k, v in asdict(self).items() if k not in ("cls", "options")}
        return {
            **plain,
            "forward_only": self.forward_only,
            "class": f"byline.{self.cls.__name__}",
            "options": {k: repr(v) for k, v in self.options.items()},
        }


def _influence(solver: str, title: str, description: str, citation: str, dear: str = "") -> MethodInfo:
    name = f"influence-{solver}"
    return MethodInfo(name, title, description, citation, Influence, options={"solver": solver}, dear=dear)


_PASSES = "hundreds of passes over the training set for every batch of test examples"


_METHODS = (
    MethodInfo(
        "trak",
        "TRAK",
        "ridge regression of the output on gradients, times the residual",
        "Park et al. 2023, arXiv 2303.14186",
        TRAK,
        ensembles=ALL,
    ),
    MethodInfo(
        "logra",
        "LoGra",
        "influence with the empirical Fisher of gradients projected layer by layer",
        "Choe et al. 2024, arXiv 2405.13954",
        Influence,
        options={"solver": "explicit", "curvature": "fisher", "features": Factorized(1024)},
    ),
    MethodInfo(
        "trackstar",
        "TrackStar",
        "cosine of gradients with their second moment divided out",
        "Chang et al. 2024, arXiv 2410.17413",
        TrackStar,
        options={"features": Factorized(1024)},
    ),
    _influence(
        "ekfac",
        "Influence, EK-FAC",
        "influence functions, curvature in the Kronecker eigenbasis of each layer",
        "Grosse et al. 2023, arXiv 2308.03296",
    ),
    _influence(
        "kfac",
        "Influence, K-FAC",
        "influence functions, a Kronecker product per layer",
        "Martens & Grosse 2015, arXiv 1503.05671",
    ),
    _influence(
        "cg",
        "Influence, CG",
        "influence functions, conjugate gradients on the whole curvature",
        "Koh & Liang 2017, arXiv 1703.04730",
        _PASSES,
    ),
    _influence(
        "lissa",
        "Influence, LiSSA",
        "influence functions, a Neumann series for the inverse",
        "Agarwal et al. 2017, arXiv 1602.03943",
        _PASSES,
    ),
    _influence(
        "arnoldi",
        "Influence, Arnoldi",
        "influence functions in the leading eigenvectors of the curvature",
        "Schioppa et al. 2022, arXiv 2112.03052",
        "a hundred passes over the training set for every member",
    ),
    _influence(
        "datainf",
        "Influence, DataInf",
        "influence functions, the inverse of a mean replaced by the mean of inverses",
        "Kwon et al. 2024, arXiv 2310.00902",
    ),
    _influence(
        "explicit",
        "Influence, dense",
        "influence functions, the dense inverse, for models of up to 5000 parameters",
        "Koh & Liang 2017, arXiv 1703.04730",
        "a dense matrix over all parameters",
    ),
    MethodInfo("grad-dot", "Grad-Dot", "inner product of gradients", "Charpiat et al. 2019, arXiv 2102.05262", GradDot),
    MethodInfo("grad-cos", "Grad-Cos", "cosine of gradients", "Charpiat et al. 2019, arXiv 2102.05262", GradCos),
    MethodInfo(
        "tracin",
        "TracIn",
        "inner products of gradients along training, weighted by step sizes",
        "Pruthi et al. 2020, arXiv 2002.08484",
        TracIn,
    ),
    MethodInfo(
        "dvemb",
        "DVEmb",
        "what a training step still means after all later ones",
        "Wang et al. 2024, arXiv 2412.09538",
        DVEmb,
        ensembles=("trajectory",),
    ),
    MethodInfo(
        "representer",
        "Representer points",
        "what each example adds to a refitted last layer",
        "Yeh et al. 2018, arXiv 1811.09720",
        RepresenterPoints,
        needs=("embeddings", "labels"),
    ),
    MethodInfo(
        "knn-shapley",
        "KNN-Shapley",
        "Shapley values of a nearest-neighbour classifier on embeddings",
        "Jia et al. 2019, arXiv 1908.08619",
        KNNShapley,
        needs=("embeddings", "labels"),
    ),
    MethodInfo(
        "representation",
        "Representation similarity",
        "cosine of embeddings; a baseline",
        "Hanawa et al. 2021, arXiv 2006.04528",
        RepresentationSimilarity,
        needs=("embeddings",),
    ),
    MethodInfo(
        "random",
        "Random",
        "seeded noise; the baseline of every comparison",
        "none",
        Random,
        needs=("nothing",),
        ensembles=ALL,
    ),
)


def methods() -> list[MethodInfo]:
    """Every method."""
    return list(_METHODS)


def make(name: str, task: Task, ensemble: Ensemble, **options: Any) -> Attributor:
    """An attributor by its method's name.

    Args:
        name: As `methods` lists it.
        task: What is explained.
        ensemble: Who votes.
        **options: Of the method's class; they win over what the name stands for.

    Raises:
        ValueError: There is no such method, or it refuses the task or the ensemble.
    """
    found = next((info for info in _METHODS if info.name == name), None)
    if found is None:
        raise ValueError(f"no method {name!r}; there are {', '.join(info.name for info in _METHODS)}")
    return found.cls(task, ensemble, **{**found.options, **options})
