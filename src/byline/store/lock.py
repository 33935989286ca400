"""One writer at a time: a file that says who, and ends with the process that made it. Readers need none."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import Any

from byline.store.files import Files

NAME = "lock"
BEAT = 10.0
"""Seconds between two signs of life."""
STALE = 120.0
"""Seconds without one after which another machine's lock is taken over."""


class Lock:
    """The right to write to a store.

    Args:
        files: of the store.
    """

    def __init__(self, files: Files):
        self.files = files
        self.held = False
        self._ended = threading.Event()
        self._token = ""

    def acquire(self) -> None:
        """Take the lock, or the place of a writer that is dead.

        Raises:
            BlockingIOError: another writer has it; says who.
        """
        if self.held:
            return
        with self.files.exclusive():
            # a second round, where a stale lock has gone
            for _ in range(2):
                # one that is there already is of an attempt that was interrupted
                self._token = self._token or os.urandom(8).hex()
                if self.files.create(NAME, self._content()):
                    self.held = True
                    break
                owner = self._owner()
                if owner is not None and owner.get("token") == self._token and owner.get("pid") == os.getpid():
                    self.held = True
                    break
                if owner is None or self._dead(owner):
                    self.files.delete(NAME)
                    continue
                raise BlockingIOError(self._sentence(owner))
        if not self.held:
            raise BlockingIOError(
                f"store {self.files.where} is being written by another process; try again when it is done"
            )
        self._ended = threading.Event()
        threading.Thread(target=self._beat, args=(self._ended,), daemon=True, name="byline-lock").start()

    def release(self) -> None:
        """Give it back."""
        if not self._token:
            return
        self._ended.set()
        with self.files.exclusive():
            owner = self._owner()
            if owner is not None and owner.get("token") == self._token:
                self.files.delete(NAME)
        self.held, self._token = False, ""

    def _content(self) -> bytes:
        return json.dumps(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": _started(os.getpid()),
                "heartbeat": time.time(),
                "token": self._token,
            }
        ).encode()

    def _owner(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.files.read(NAME))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _dead(self, owner: dict[str, Any]) -> bool:
        if owner.get("host") == socket.gethostname():
            pid = owner.get("pid")
            # a number that another process has now is not the writer
            return not isinstance(pid, int) or _started(pid) is None or _started(pid) != owner.get("started")
        beat = owner.get("heartbeat")
        return not isinstance(beat, int | float) or time.time() - beat > STALE

    def _sentence(self, owner: dict[str, Any]) -> str:
        who = f"process {owner.get('pid')} on {owner.get('host')}"
        if owner.get("pid") == os.getpid() and owner.get("host") == socket.gethostname():
            who += " (this one)"
        return f"store {self.files.where} is being written by {who}; wait for it, or use another folder"

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT):
            try:
                with self.files.exclusive():
                    owner = self._owner()
                    if ended.is_set() or owner is None or owner.get("token") != self._token:
                        return
                    self.files.write(NAME, self._content())
            except OSError:
                # a full disk stops no writer that has the lock already
                continue


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's own count; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return _signalled(pid)
    # a zombie writes no more
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _signalled(pid: int) -> str | None:
    if os.path.isdir("/proc/self"):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "running"
