"""The certificate: the evidence that a bundle's kernels compute what PyTorch computes, and what was executed to get it.

It names the bundle digest and holds the hash of its own content, so it can be written anew without changing the
bundle, and an edited one is refused.  `check` and the compiler write it; `inspect` and `card` read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flagtree.artifact.files import canonical_json, parse_json, sha256
from flagtree.errors import BundleError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Certificate:
    """`bundle`: the digest it speaks of.  `evidence`: JSON object, kernel digest and check to what was measured."""

    bundle: str
    evidence: Mapping[str, object]

    def encode(self) -> bytes:
        """The file's bytes, with the hash of everything else in `sha256`."""
        body = {"format": FORMAT, "bundle": self.bundle, "evidence": dict(self.evidence)}
        return canonical_json({**body, "sha256": sha256(canonical_json(body))})


def decode(data: bytes, digest: str) -> Certificate:
    """The certificate of the bundle `digest`.  BundleError when edited, truncated, of another format or bundle."""
    record = parse_json(data, "certificate.json")
    if not isinstance(record, dict) or record.keys() != {"format", "bundle", "evidence", "sha256"}:
        raise _refused("certificate.json is not a certificate", "its fields are others")
    if record["format"] != FORMAT:
        raise _refused("certificate.json has another format", f"format {record['format']!r}, this flagtree reads {FORMAT}")
    claimed = record.pop("sha256")
    if sha256(canonical_json(record)) != claimed or not isinstance(record["evidence"], dict):
        raise _refused("the certificate was edited", "its content does not have the hash that it states")
    if record["bundle"] != digest:
        raise _refused("the certificate speaks of another bundle", f"it names {record['bundle']}, this bundle is {digest}")
    return Certificate(digest, record["evidence"])


def _refused(what: str, why: str) -> BundleError:
    return BundleError(what, where="certificate.json", why=why, hint="copy the bundle again, or build it again")
