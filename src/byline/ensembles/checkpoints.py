"""Checkpoints as training loops leave them: files, folders and dicts, and which of their numbers are a model's.

Nothing is unpickled: a file is read with safetensors, or with torch's ``weights_only=True``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

log = logging.getLogger("byline")

StateDict = dict[str, Tensor]
Signature = tuple[tuple[str, int, int], ...]
"""Path, size and time of every file of a checkpoint."""

_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
_INDEX = ".index.json"
# in the order in which transformers looks for them
_USUAL = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin", f"pytorch_model.bin{_INDEX}")
# what a Trainer writes beside the weights
_ASIDE = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "random_states")
# what wrappers put into the middle of a name
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_DEPTH = 3


def locate(path: Path, name: str) -> Path:
    """The file to read: the one given, or that of a folder as transformers, accelerate or a loop of one's own saves it.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: a file of another kind, a folder without weights, with several, or with an adapter's.
    """
    if path.is_file():
        if path.suffix not in _FILES and not path.name.endswith(_INDEX):
            raise ValueError(f"{name} is {path.name}; expected a .safetensors or a .pt file")
        if path.name == "adapter_model.safetensors":
            raise ValueError(_adapter(path.parent, name))
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: no checkpoint file at {path}")
    if (path / "adapter_config.json").is_file():
        raise ValueError(_adapter(path, name))
    usual = next((path / file for file in _USUAL if (path / file).is_file()), None)
    if usual is not None:
        return usual
    indices = sorted(path.glob(f"*{_INDEX}"))
    found = indices or sorted(
        file for file in path.iterdir() if file.suffix in _FILES and not file.name.startswith(_ASIDE)
    )
    if len(found) == 1 and found[0].is_file():
        return found[0]
    if found:
        names = ", ".join(file.name for file in found[:5]) + (" and more" if len(found) > 5 else "")
        raise ValueError(
            f"{name}: the folder {path} has several files of weights ({names}) and no index that joins them; expected "
            "the path of one of them, or a list of them as one checkpoint each"
        )
    inside = sorted((folder for folder in path.iterdir() if _is_checkpoint(folder)), key=_number)
    if inside:
        raise ValueError(
            f"{name}: the folder {path} holds checkpoints ({', '.join(folder.name for folder in inside[:5])}) and no "
            "weights of its own; expected the path of one of them, or all of a run as "
            "byline.Trajectory([[path, path, …]])"
        )
    raise ValueError(
        f"{name}: the folder {path} has no weights; expected model.safetensors, pytorch_model.bin, one of the two in "
        f"parts with its {_INDEX}, or the path of a file"
    )


def _adapter(folder: Path, name: str) -> str:
    return (
        f"{name}: {folder} is a PEFT adapter, not a trained model; expected "
        "byline.LoRA(byline.Independent([base]), adapters=[[folder]])"
    )


def _is_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and any((folder / file).is_file() for file in (*_USUAL, "adapter_config.json"))


def _number(folder: Path) -> tuple[int, str]:
    digits = re.findall(r"\d+", folder.name)
    return int(digits[-1]) if digits else 0, folder.name


def read(path: Path, name: str) -> tuple[Any, list[Path]]:
    """What a located file holds, and all files that it was read from.

    Raises:
        ValueError: it cannot be read without unpickling, or at all.
    """
    if path.name.endswith(_INDEX):
        return _joined(path, name)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), [path]
        except SafetensorError as error:
            raise ValueError(
                f"{name}: {path} cannot be read as safetensors ({error}); expected an undamaged file"
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True), [path]
    except Exception as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        found = f" because it holds a {culprit[1]}, which would have to be unpickled" if culprit else ""
        raise ValueError(
            f"{name}: {path} cannot be read with weights_only=True{found}; expected a file of tensors alone, best a "
            ".safetensors (where you trust it, load it and pass model.state_dict())"
        ) from error


def _joined(index: Path, name: str) -> tuple[StateDict, list[Path]]:
    """The tensors of all parts that an index names."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        parts = sorted(set(places.values()))
        good = all(Path(part).name == part for part in parts) and bool(parts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name}: {index} is no index of weights; expected a weight_map from names to files"
        ) from error
    if not good:
        raise ValueError(f"{name}: the weight_map of {index} names no files beside it; expected names of files")
    state: StateDict = {}
    for part in parts:
        path = index.parent / part
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no file {path}, which {index.name} names")
        held = read(path, name)[0]
        wanted = {key for key, place in places.items() if place == part}
        if not isinstance(held, Mapping) or not wanted <= held.keys():
            raise ValueError(f"{name}: {path} lacks tensors that {index.name} says it has; expected an undamaged copy")
        state.update({key: held[key] for key in wanted})
    return state, [index, *(index.parent / part for part in parts)]


def signature(files: list[Path]) -> Signature | None:
    """What changes when one of the files is written anew; None where one is gone."""
    try:
        return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()])
    except OSError:
        return None


def candidates(content: Any) -> dict[str, StateDict]:
    """The state dicts in what was saved, by where they stand in it (``['model']``); ``""`` where it is one itself."""
    return dict(_candidates(content, "", _DEPTH))


def _candidates(content: Any, place: str, depth: int) -> Iterator[tuple[str, StateDict]]:
    if isinstance(content, nn.Module):
        yield place, dict(content.state_dict())
    elif isinstance(content, Mapping) and all(isinstance(key, str) for key in content):
        if all(_is_weight(key, value) for key, value in content.items()):
            if content or not place:
                yield place, {key: _tensor(value) for key, value in content.items()}
        elif depth:
            for key, value in content.items():
                yield from _candidates(value, f"{place}[{key!r}]", depth - 1)


def _is_weight(key: str, value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "fiubc"
    return isinstance(value, Tensor) or key.rpartition(".")[2] == "_extra_state"


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def chosen(found: Mapping[str, StateDict], model: nn.Module, name: str, origin: str) -> tuple[StateDict, str]:
    """The one state dict that fits a model, under the model's names, and how it came to be chosen.

    Args:
        found: of `candidates`.
        model: the task's.
        name: what the checkpoint is called in messages.
        origin: what it was read from.

    Raises:
        ValueError: none fits, or several that differ do.
    """
    fits = {}
    for place, state in found.items():
        for how, renamed in _renamings(state, model):
            if not problems(renamed, model):
                fits[place] = renamed, how
                break
    if len(fits) > 1:
        first, *others = fits.values()
        if any(not _alike(first[0], other[0]) for other in others):
            # an average of the weights beside the weights: either may be the one that is asked about
            raise ValueError(
                f"{name}: {origin} has several entries that fit the task's model, {' and '.join(fits)}; expected one "
                f"of them, say torch.load(path, weights_only=True){next(iter(fits))}"
            )
    if fits:
        place, (state, how) = next(iter(fits.items()))
        return state, ", ".join(part for part in (place and f"its entry {place}", how) if part)
    own = plain(model.state_dict())
    place = max(found, key=lambda one: len(own.keys() & plain(found[one]).keys()))
    where = f" (its entry {place})" if place else ""
    raise ValueError(
        f"{name}{where} does not fit the task's model; keys {problems(found[place], model)}{_hint(found[place], model)}"
    )


def _alike(one: StateDict, two: StateDict) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(one[key], two[key]) for key in one if isinstance(one[key], Tensor)
    )


def _same(state: StateDict, one: str, two: str) -> bool:
    values = state[one], state[two]
    if not all(isinstance(value, Tensor) for value in values) or any(value.is_meta for value in values):
        return True
    return torch.equal(*values)


def plain(state: Mapping[str, Any], beside: tuple[str, ...] = ()) -> dict[str, str]:
    """Names without what wrappers put into them (``_orig_mod.``), and the names as they are."""
    drop = {*_WRAPPERS, *beside}
    return {".".join(part for part in key.split(".") if part not in drop): key for key in state}


def _renamings(state: StateDict, model: nn.Module) -> Iterator[tuple[str, StateDict]]:
    """The state dict as it is, then under names without the prefixes that wrappers add; and what was done."""
    yield "", state
    own = model.state_dict()
    if "n_averaged" in state and "n_averaged" not in own:
        # of torch.optim.swa_utils.AveragedModel, which counts in it what it has averaged
        state = {key: value for key, value in state.items() if key != "n_averaged"}
    for beside in ((), ("module",)):
        given, wanted = plain(state, beside), plain(own, beside)
        if len(given) < len(state) or len(wanted) < len(own):
            continue
        for less, more in [("", ""), *((p, "") for p in _prefixes(given)), *(("", p) for p in _prefixes(wanted))]:
            names = {key: more + short.removeprefix(less) for short, key in given.items()}
            renamed = {wanted.get(short, key): state[key] for key, short in names.items()}
            if renamed.keys() & own.keys():
                yield _done(state, renamed), renamed


def _done(state: StateDict, renamed: StateDict) -> str:
    before, after = next(iter(state), ""), next(iter(renamed), "")
    return f"{before!r} read as {after!r}" if before != after else ""


def _prefixes(names: Mapping[str, Any]) -> list[str]:
    """What all names begin with, up to each dot."""
    first = next(iter(names), "").split(".")[:-1]
    every = [".".join(first[:n]) + "." for n in range(1, len(first) + 1)]
    return [prefix for prefix in every if all(name.startswith(prefix) for name in names)]


def problems(state: StateDict, model: nn.Module) -> str:
    """What keeps a state dict from being a model's; "" if nothing does. Frozen parameters may be left out."""
    own = model.state_dict(keep_vars=True)
    given = {id(own[key]) for key in own if key in state}
    frozen = {key for key, value in own.items() if isinstance(value, nn.Parameter) and not value.requires_grad}
    missing = sorted(key for key in own if key not in state and id(own[key]) not in given and key not in frozen)
    unexpected = sorted(set(state) - set(own))
    both = [key for key in own if key in state and isinstance(own[key], Tensor)]
    values = [key for key in both if not isinstance(state[key], Tensor)]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in both
        if key not in values and state[key].shape != own[key].shape
    ]
    kinds = [
        f"{key} {state[key].dtype} instead of {own[key].dtype}"
        for key in both
        if key not in values and state[key].shape == own[key].shape and not _converts(state[key], own[key])
    ]
    first: dict[int, str] = {}
    apart = [
        f"{first[id(own[key])]} and {key}"
        for key in both
        # the one that is loaded last would stand for both
        if first.setdefault(id(own[key]), key) != key and not _same(state, first[id(own[key])], key)
    ]
    found = []
    for label, keys in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("without a tensor", values),
        ("of another shape", shapes),
        ("of another kind of number", kinds),
        ("one weight in the model and two in the checkpoint", apart),
        ("without numbers (on the meta device)", [k for k in both if k not in values and state[k].is_meta]),
    ):
        if keys:
            found.append(f"{label}: {', '.join(keys[:5])}" + (f" and {len(keys) - 5} more" if len(keys) > 5 else ""))
    return "; ".join(found)


def _converts(given: Tensor, own: Tensor) -> bool:
    """Whether a value may be copied into another dtype: a quantised weight's integers are not its numbers."""
    kind = (given.is_floating_point(), given.is_complex())
    if kind == (own.is_floating_point(), own.is_complex()) or given.is_meta:
        return True
    if isinstance(own, nn.Parameter) or given.is_complex() or given.is_quantized:
        return False
    return bool((given.to(own.dtype).to(given.dtype) == given).all())


def _hint(state: StateDict, model: nn.Module) -> str:
    """What to do with a state dict of which a part would fit, as of a module that holds the model beside others."""
    if any("lora_" in key for key in state) and not any("lora_" in key for key, _ in model.named_parameters()):
        return "; they look like those of a PEFT adapter, for which there is byline.LoRA"
    own = model.state_dict()
    if own.keys() & state.keys():
        return ""
    for prefix in dict.fromkeys(key.split(".")[0] + "." for key in state if "." in key):
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not problems(part, model):
            return (
                f"; those under {prefix!r} fit: pass {{k.removeprefix({prefix!r}): v for k, v in state.items() if "
                f"k.startswith({prefix!r})}}"
            )
    return ""


def rounded(state: StateDict, model: nn.Module) -> str:
    """The dtypes of weights that lose digits in a model, as ``float32 in bfloat16``; "" where none does."""
    own = model.state_dict()
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and isinstance(own.get(key), Tensor):
            given, kept = value.dtype, own[key].dtype
            if not kept.is_floating_point:
                continue
            fine, coarse = torch.finfo(given), torch.finfo(kept)
            if coarse.eps > fine.eps or coarse.max < fine.max:
                return f"{str(given).removeprefix('torch.')} in {str(kept).removeprefix('torch.')}"
    return ""
