"""Curvature: how ``(H + λI)⁻¹`` is applied to the gradients of test examples, one solver a file."""

from byline.methods.curvature.arnoldi import Arnoldi
from byline.methods.curvature.base import CURVATURES, Problem, Solver
from byline.methods.curvature.cg import CG
from byline.methods.curvature.datainf import DataInf
from byline.methods.curvature.ekfac import EKFAC
from byline.methods.curvature.explicit import Explicit
from byline.methods.curvature.kfac import KFAC
from byline.methods.curvature.layout import Layout
from byline.methods.curvature.lissa import LiSSA

SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver for solver in (Arnoldi, CG, DataInf, EKFAC, Explicit, KFAC, LiSSA)
}

__all__ = [
    "CG",
    "CURVATURES",
    "EKFAC",
    "KFAC",
    "SOLVERS",
    "Arnoldi",
    "DataInf",
    "Explicit",
    "Layout",
    "LiSSA",
    "Problem",
    "Solver",
]
