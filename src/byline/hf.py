"""Hugging Face: causal language models, their texts and generations, and checkpoints along a ``Trainer``'s run.

Needs the extra ``hf`` (transformers). Nothing here touches the network: models and tokenizers come from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byline import sequences
from byline.ensembles import Trajectory, record
from byline.ensembles.base import check_count, check_seed, save_trained
from byline.guards import kept_random
from byline.outputs import Output
from byline.task import ParamFilter, Task

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("byline.hf needs transformers; install byline[hf]") from error

_IGNORED = sequences.IGNORED


def task(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    output: str | Output | Callable[[nn.Module, Any], Tensor] = "language-modeling",
    params: ParamFilter | None = None,
) -> Task:
    """A task for a model of transformers; left to itself for a causal language model: the mean margin of its targets.

    A batch is a dict or ``BatchEncoding`` with ``input_ids`` (B, T), and ``attention_mask`` and ``labels`` where there
    are any; without labels, the tokens that are kept are the targets of a causal language model.

    Args:
        model: a transformers model with a language-modelling head, or a PEFT model of one, whose adapter's weights are
            then the attributed ones. It is put in eval mode. Where PEFT has loaded an adapter for inference, its
            weights are made trainable (``requires_grad``), because nothing would be left to attribute.
        tokenizer: checked against the model's vocabulary.
        output: as of `byline.Task`: ``"masked-language-modeling"`` for BERT's kind, ``"seq2seq"`` for T5's,
            ``"classification"`` or ``"token-classification"`` for models with such a head.
        params: which parameters count; all trainable ones by default.

    Raises:
        TypeError: the model is none of transformers.
        ValueError: it was trained on something else than the output says, or the tokenizer has tokens that it does not
            know.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings") or config is None:
        raise TypeError(
            f"model is a {type(model).__name__}; expected a causal language model of transformers, or PEFT's of one"
        )
    made = Task(model, output=output, params=params)
    headed = output in ("language-modeling", "masked-language-modeling", "seq2seq")
    if headed and model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(f"model is a {type(model).__name__} without a language-modelling head")
    if tokenizer is not None:
        check_tokenizer(tokenizer, model)
    if hasattr(model, "peft_config") and not any(p.requires_grad for p in model.parameters()):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    model.eval()
    return made


def check_tokenizer(tokenizer: Any, model: nn.Module) -> None:
    """Refuse a tokenizer that gives tokens which the model has no embedding of.

    Raises:
        ValueError: says how many tokens either has.
    """
    known = sequences.vocabulary(model)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if known is not None and highest >= known:
        raise ValueError(
            f"tokenizer has tokens up to {highest}, and the model's vocabulary ends at {known - 1}; expected the "
            "tokenizer that the model was trained with"
        )


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Tokenised sequences; `byline` finds the ``collate_fn`` that pads them by itself.

    Items are dicts of ``input_ids`` and ``labels``, each (T,), T the sequence's own length.

    Args:
        ids: the tokens of each sequence.
        labels: the targets of each, -100 where a token is none.
        texts: what they were made of.
        pad: the token that fills up a batch; the attention mask leaves it out.
    """

    def __init__(self, ids: Sequence[Tensor], labels: Sequence[Tensor], texts: Sequence[str], pad: int = 0):
        self.ids, self.labels, self.texts, self.pad = list(ids), list(labels), list(texts), pad

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}

    def collate_fn(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Items as a batch, filled up on the right to the longest: ``input_ids``, ``attention_mask``, ``labels``."""
        return sequences.padded(items, self.pad)


def dataset(
    texts: Sequence[str],
    tokenizer: Any,
    max_length: int | None = None,
    *,
    prompts: Sequence[str] | None = None,
    model: nn.Module | None = None,
) -> Texts:
    """Texts as a map-style dataset for a causal language model.

    Args:
        texts: one string per example.
        tokenizer: of transformers; its special tokens are added as it adds them by itself.
        max_length: tokens that are kept of each, from the front; all by default, and `byline` refuses what is longer
            than the model's context.
        prompts: what stands before each text and is no target. What the tokenizer puts around a text stands once around
            both: nothing of it comes between them.
        model: checked against the tokenizer's vocabulary.

    Returns:
        the dataset; its ``collate_fn`` pads, and methods and `byline.train_lora` take it from there.

    Raises:
        TypeError: ``texts`` is one string, or holds something else than strings.
        ValueError: the tokenizer does not fit the model, or a text leaves no token to predict.
    """
    _check_strings(texts, "texts")
    if prompts is not None:
        _check_strings(prompts, "prompts")
        if len(prompts) != len(texts):
            raise ValueError(f"prompts has {len(prompts)} strings; expected one per text, {len(texts)}")
    if max_length is not None:
        check_count(max_length, "max_length")
    if model is not None:
        check_tokenizer(tokenizer, model)
    ids, labels = [], []
    head, tail = ([], []) if prompts is None else _around(tokenizer, [*texts, *prompts])
    for place, text in enumerate(texts):
        before = [] if prompts is None else head + _encoded(tokenizer, prompts[place], special=False)
        own = _encoded(tokenizer, text, special=prompts is None)
        row = torch.tensor((before + own + tail)[:max_length], dtype=torch.long)
        target = row.clone()
        # nothing predicts the first token; a Trainer would count it in the mean over a batch's tokens all the same
        target[: max(1, len(before))] = _IGNORED
        if bool((target == _IGNORED).all()):
            raise ValueError(
                f"texts[{place}] leaves no token to predict: {len(row)} tokens with its prompt, cut to "
                f"max_length={max_length}; expected at least one after the first"
            )
        ids.append(row)
        labels.append(target)
    return Texts(ids, labels, list(texts), _pad(tokenizer))


def generated(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    seed: int = 0,
    *,
    max_new_tokens: int = 32,
    **options: Any,
) -> Texts:
    """Let a model continue prompts: test examples whose targets are the generated tokens alone.

    Args:
        model: a transformers or PEFT model, in eval mode.
        tokenizer: of the model.
        prompts: one string per sample.
        seed: of the samples; each prompt's depends on it and on the prompt's place, so that batches do not matter.
        max_new_tokens: at most so many.
        **options: of ``model.generate``, such as ``temperature`` or ``top_k``. It samples unless ``do_sample=False``.

    Returns:
        prompts with their continuations; ``texts`` are the continuations as text.

    Raises:
        ValueError: the tokenizer does not fit the model, a prompt is empty, or prompt and continuation are longer than
            the model's context.
    """
    _check_strings(prompts, "prompts")
    check_tokenizer(tokenizer, model)
    check_seed(seed)
    check_count(max_new_tokens, "max_new_tokens")
    room = sequences.context(model)
    device = next(model.parameters()).device
    ids, labels, texts = [], [], []
    options = {"do_sample": True, "pad_token_id": _pad(tokenizer), **options}
    # what ends a text must not stand before its continuation
    head, _ = _around(tokenizer, prompts)
    for place, prompt in enumerate(prompts):
        before = head + _encoded(tokenizer, prompt, special=False)
        if not before:
            raise ValueError(f"prompts[{place}] is empty; expected at least one token")
        if room is not None and len(before) + max_new_tokens > room:
            raise ValueError(
                f"prompts[{place}] has {len(before)} tokens, which with max_new_tokens={max_new_tokens} is more than "
                f"the model's context of {room}"
            )
        start = torch.tensor([before], device=device)
        with kept_random(), torch.no_grad():
            torch.manual_seed(seed * 1_000_003 + place)
            row = model.generate(  # type: ignore[operator]
                input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=max_new_tokens, **options
            )[0].cpu()
        target = row.clone()
        target[: len(before)] = _IGNORED
        ids.append(row)
        labels.append(target)
        texts.append(tokenizer.decode(row[len(before) :]))
    return Texts(ids, labels, texts, _pad(tokenizer))


def _encoded(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _around(tokenizer: Any, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before a text, and after it."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    # a text whose tokens are none of those, so that they can be told apart; a vocabulary may lack the letters
    for text in (*texts[:8], "a", "the", "0"):
        inner, whole = _encoded(tokenizer, text, special=False), _encoded(tokenizer, text)
        if inner and special.isdisjoint(inner):
            for start in range(len(whole) - len(inner) + 1):
                if whole[start : start + len(inner)] == inner:
                    return whole[:start], whole[start + len(inner) :]
    whole = _encoded(tokenizer, "")
    ends = {getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "sep_token_id", None)}
    ends -= {getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "cls_token_id", None)}
    cut = next((i for i, token in enumerate(whole) if token in ends), len(whole))
    return whole[:cut], whole[cut:]


def _pad(tokenizer: Any) -> int:
    # the mask leaves padding out, so any token that the model knows will do
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def _check_strings(value: Any, name: str) -> None:
    if isinstance(value, str):
        raise TypeError(f"{name} is one string; expected a sequence of them")
    odd = next((i for i, item in enumerate(value) if not isinstance(item, str)), None)
    if odd is not None:
        raise TypeError(f"{name}[{odd}] is a {type(value[odd]).__name__}; expected a string")


class Checkpoints(TrainerCallback):
    """Records checkpoints and step sizes while a ``transformers.Trainer`` trains: ``Trainer(..., callbacks=[this])``.

    Each checkpoint is a ``.safetensors`` file of what is trained (of a PEFT model the adapter's weights alone), written
    at the end of its segment, the optimizer steps since the one before.

    Args:
        folder: where to; earlier checkpoints there are deleted when a training begins anew.
        every: optimizer steps between checkpoints; None for one at the end of each epoch. The last step always has one.
        first: also keep the weights before the first step, with step size 0.

    Attributes:
        paths: the files, in order.
        steps: at which optimizer step each was written.
        weights: per checkpoint, the sum of the learning rates of its segment's steps over the number of training
            examples: how far one example's loss moves the weights, per unit of its gradient, while plain gradient
            descent on the mean loss of batches goes through the segment. It is what `byline.DVEmb` expects, and what
            `byline.TracIn` sums with. Of several parameter groups, the first one's rate counts; adaptive optimizers
            scale each parameter further, which no checkpoint keeps.
    """

    def __init__(self, folder: str | Path, every: int | None = None, first: bool = False):
        self.folder = Path(folder)
        self.every = None if every is None else check_count(every, "every")
        self.first = first
        self._keep([], [], [])

    def _keep(self, paths: list[Path], steps: list[int], weights: list[float]) -> None:
        self.paths, self.steps, self.weights = paths, steps, weights
        self._rate = 0.0
        self._examples = 0

    @classmethod
    def load(cls, folder: str | Path) -> Checkpoints:
        """The record of an earlier training.

        Raises:
            FileNotFoundError: the folder has none.
            ValueError: it is damaged.
        """
        found = cls(folder)
        found._keep(*record.read(found._record, "weights", "byline.hf.Checkpoints"))
        return found

    def trajectory(self) -> Trajectory:
        """The run as an ensemble with its step sizes.

        Raises:
            ValueError: nothing was recorded.
        """
        if not self.paths:
            raise ValueError("no checkpoint was recorded; expected to be a callback of a Trainer that has trained")
        return Trajectory([list(self.paths)], weights=[list(self.weights)])

    @property
    def _record(self) -> Path:
        return self.folder / "checkpoints.json"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin anew, or go on where a resumed training does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep([], [], [])
        if state.global_step and self._record.is_file():
            before = self.load(self.folder)
            kept = sum(step <= state.global_step for step in before.steps)
            self._keep(before.paths[:kept], before.steps[:kept], before.weights[:kept])
        for path in set(self.folder.glob("step-*.safetensors")) - set(self.paths):
            path.unlink()
        try:
            self._examples = len(kwargs["train_dataloader"].dataset)
        except (KeyError, AttributeError, TypeError):
            raise ValueError("the Trainer's train_dataset has no length; step sizes per example need one") from None
        if self.first and not self.paths:
            self._write(kwargs["model"], state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the learning rate of the step, before the schedule moves on."""
        self._rate += float(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write a checkpoint where one is due."""
        if self.every is not None and state.global_step % self.every == 0:
            self._write(kwargs["model"], state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write a checkpoint where epochs are what counts."""
        if self.every is None:
            self._write(kwargs["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what the last steps came to."""
        self._write(kwargs["model"], state.global_step)

    def _write(self, model: nn.Module, step: int) -> None:
        if self.steps and self.steps[-1] == step:
            return
        path = self.folder / f"step-{step:08d}.safetensors"
        save_trained(model, path)
        self.paths.append(path)
        self.steps.append(step)
        self.weights.append(self._rate / self._examples)
        self._rate = 0.0
        record.write(self._record, self.paths, self.steps, self.weights, "weights")
