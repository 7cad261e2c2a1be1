"""Every error that flagtree raises on purpose, and how one reads.

An error says what failed, where, why and what to try.  The command line prints exactly that and
exits with `exit_code`; nothing here imports anything of ours, so every layer may raise them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlagtreeError(Exception):
    """Base of all our errors.

    `what` is one sentence; `where` names kernel, op, layer or file; `why` gives the cause and
    `hint` what to try.  Empty parts are left out when printed.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        super().__init__(self.render())

    def render(self) -> str:
        parts = [self.what]
        for label, text in (("where", self.where), ("why", self.why), ("try", self.hint)):
            if text:
                parts.append(f"  {label}: {text}")
        return "\n".join(parts)


class UnknownName(FlagtreeError):
    """A model, target, pass or topic that does not exist; lists the closest names."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.known = sorted(known)
        self.closest = difflib.get_close_matches(name, self.known, n=3, cutoff=0.4)
        near = f"closest: {', '.join(self.closest)}" if self.closest else f"known: {', '.join(self.known)}"
        super().__init__(f"unknown {kind} '{name}'", why=near, hint=hint)


class IRError(FlagtreeError):
    """A program that breaks a verifier rule or does not parse."""


class LoweringError(FlagtreeError):
    """A bug in a lowering; the caller turns it into an extern unless FLAGTREE_ON_ERROR=raise."""


class CodegenError(FlagtreeError):
    """A kernel that a code generator cannot express."""


class ToolchainError(FlagtreeError):
    """A compiler that is missing, fails, hangs or prints nonsense."""


class KernelFault(ToolchainError):
    """An executed kernel that did what none may: an access outside, threads that wait for each other, a race, no end."""


class CaptureError(FlagtreeError):
    """A model that cannot be captured: a wrong configuration, a specialised dimension."""


class StoreError(FlagtreeError):
    """A store folder that cannot be used: read-only, full, not a folder."""


class BundleError(FlagtreeError):
    """A bundle that is damaged, edited, for another target, another version or not trusted."""


class UntrustedBundle(BundleError):
    """Executing a bundle that nobody vouched for."""


class DeviceError(FlagtreeError):
    """A device or driver that is not here, or a driver that refuses a call: its code and name stand in `why`."""


class BindError(FlagtreeError):
    """Inputs that do not fit a bundle's promises: missing names, dtype, shape, range, device."""
