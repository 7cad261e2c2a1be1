"""Trust: native code of a bundle runs only when somebody vouched for its digest.

A digest is trusted when this machine's store recorded it at build time or when the user named it.  Hashes inside a
bundle show integrity, never who made it.  `runtime/load.py` asks before it maps any code.
"""

from __future__ import annotations

import re

from flagtree.artifact.store import Store
from flagtree.errors import BundleError, UntrustedBundle

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


def record_built(digest: str, store: Store | None = None) -> None:
    """Remember that this machine built the bundle with this digest.  StoreError when the store cannot be written: the
    bundle is whole all the same, and runs with its digest named."""
    (store or Store()).put("built", digest, {})


def is_built_here(digest: str, store: Store | None = None) -> bool:
    """Did this machine's store record the digest?"""
    return bool((store or Store()).get("built", digest))


def check_trust(digest: str, trust: str | None, *, where: str = "", store: Store | None = None) -> None:
    """Return when the bundle may be executed.  `trust` is a digest that the user named, all 64 digits of it;
    UntrustedBundle when neither the user nor the store vouches, BundleError when the user named another one."""
    if trust is not None:
        wanted = trust.lower().removeprefix("sha256:")
        if not _DIGEST.match(wanted):
            why = "a digest is 64 hexadecimal digits"
            raise BundleError("not a bundle digest", where=trust[:80], why=why, hint=f"this bundle's is {digest}")
        if wanted != digest:
            why = f"its digest is {digest}, you named {wanted}"
            raise UntrustedBundle("the bundle is not the one that you trust", where=where, why=why, hint="compare it with its source")
        return
    if not is_built_here(digest, store):
        raise UntrustedBundle(
            "the bundle is not trusted, and running it runs its machine code",
            where=where,
            why=f"digest {digest} was not built by this machine's store",
            hint=f"if you trust where it comes from: flagtree.load(path, trust='{digest}')",
        )
