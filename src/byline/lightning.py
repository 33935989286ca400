"""Lightning: checkpoints along a ``Trainer``'s run. Hugging Face's trainer has `byline.hf.Checkpoints`, loops of your
own `byline.Recorder`.
"""

from __future__ import annotations

import os
from typing import Any

from byline.ensembles.recorder import Recorder
from byline.ensembles.trajectory import Trajectory

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError("byline.lightning needs lightning or pytorch_lightning; install one of them") from error


class Checkpoints(Callback):
    """Records checkpoints and step sizes: ``Trainer(callbacks=[checkpoints])``, then ``checkpoints.trajectory()``.

    Args:
        every: optimizer steps between checkpoints; the last step has one too.
        folder: as of `byline.Recorder`.
        module: attribute of the ``LightningModule`` that is the attributed model, as in ``"model"``; the whole module
            by default.

    Attributes:
        recorder: what was recorded.
    """

    def __init__(self, every: int, *, folder: str | os.PathLike[str] | None = None, module: str | None = None):
        super().__init__()
        self.recorder, self.module = Recorder(every, folder=folder), module
        self._last, self._rate = 0, 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from where the run begins."""
        self._last = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Note the learning rate of the step, before a schedule moves on."""
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """A batch is an optimizer step, but where gradients are accumulated."""
        if trainer.global_step > self._last:
            self._last = trainer.global_step
            self.recorder.step(self._model(pl_module), self._rate)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """What the last steps came to."""
        self.recorder.finish(self._model(pl_module))

    def trajectory(self, examples: int | None = None) -> Trajectory:
        """The run as an ensemble, as of `byline.Recorder.trajectory`."""
        return self.recorder.trajectory(examples)

    def _model(self, pl_module: Any) -> Any:
        return pl_module if self.module is None else getattr(pl_module, self.module)
