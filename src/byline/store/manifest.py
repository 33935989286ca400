"""``manifest.json``: what a store was made for, and what of it is complete."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

from byline.store.chunks import DamagedError, text_checksum
from byline.store.files import Files, Local

FORMAT = 2
NAME = "manifest.json"


@dataclass
class Manifest:
    """The contents of ``manifest.json``; docs/store.md has every key."""

    format: int = FORMAT
    byline: str = field(default_factory=lambda: version("byline"))
    """Version of the package that wrote it."""
    made_for: dict[str, Any] = field(default_factory=dict)
    """Fingerprints of the task and the dataset, and the features."""
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Members by key: weights, changes, chunk, arrays, and whether they are complete."""
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Learnt tensors by key: ``{name: {"path", "shape", "chunks", "dtype"}}``."""
    vectors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``"residual/<id>"`` and the like: where each is, and whose."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Free."""

    def copy(self) -> Manifest:
        """One that can be added to while this one stays as it is."""
        return replace(
            self,
            made_for=dict(self.made_for),
            features=dict(self.features),
            state=dict(self.state),
            vectors=dict(self.vectors),
            notes=dict(self.notes),
        )


def seal(content: dict[str, Any]) -> bytes:
    """JSON with a checksum of itself under ``crc32c``."""
    plain = {key: value for key, value in content.items() if key != "crc32c"}
    return json.dumps({**plain, "crc32c": _digest(plain)}, indent=1, sort_keys=True).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """What `seal` wrote.

    Raises:
        DamagedError: no JSON, no object, or another checksum.
    """
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DamagedError(f"is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise DamagedError("is no JSON object")
    given = content.pop("crc32c", None)
    if given != _digest(content):
        raise DamagedError("fails its checksum (crc32c)")
    return content


def _digest(content: dict[str, Any]) -> str:
    return text_checksum(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def load(files: Files) -> Manifest | None:
    """The manifest, if there is one.

    Raises:
        ValueError: it is damaged, of a newer format, or of format 1.
    """
    try:
        data = files.read(NAME)
    except FileNotFoundError:
        return None
    try:
        found = int(json.loads(data)["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(
            f"store {files.where} has an unreadable manifest.json ({error}); use another folder, or delete this one"
        ) from None
    if found > FORMAT:
        raise ValueError(f"store {files.where} has format {found}; this byline reads up to {FORMAT}: upgrade it")
    if found < FORMAT:
        raise ValueError(
            f"store {files.where} has format {found}, of an earlier byline; this one reads format {FORMAT}: "
            "use another folder, or delete this one and fit again"
        )
    try:
        return Manifest(**{k: v for k, v in unseal(data).items() if k in Manifest.__dataclass_fields__})
    except (DamagedError, TypeError) as error:
        raise DamagedError(
            f"store {files.where}: manifest.json {error}; use another folder, or delete this one"
        ) from None


def dump(files: Files, manifest: Manifest, sync: bool = True) -> None:
    """Replace the manifest in one atomic step."""
    data = seal(asdict(manifest))
    if isinstance(files, Local):
        files.write(NAME, data, sync=sync)
    else:
        files.write(NAME, data)
