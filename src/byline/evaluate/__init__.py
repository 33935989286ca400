"""Evaluation: retrained models as ground truth, the linear datamodeling score, savings at equal efficacy."""
