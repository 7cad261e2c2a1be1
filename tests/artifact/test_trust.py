"""Trust: built by this machine's store, or named by the user in full; else refused with the digest in the message."""

from __future__ import annotations

from pathlib import Path

import pytest

from flagtree.artifact.store import Store
from flagtree.artifact.trust import check_trust, is_built_here, record_built
from flagtree.errors import BundleError, StoreError, UntrustedBundle

DIGEST = "ab" * 32


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", ())


def test_nobody_vouched(store: Store) -> None:
    with pytest.raises(UntrustedBundle, match=f"trust='{DIGEST}'") as caught:
        check_trust(DIGEST, None, where="b", store=store)
    assert caught.value.exit_code == 2


def test_built_here(store: Store, tmp_path: Path) -> None:
    record_built(DIGEST, store)
    record_built(DIGEST, store)
    check_trust(DIGEST, None, store=store)
    assert is_built_here(DIGEST, store)
    assert not is_built_here(DIGEST, Store(tmp_path / "another machine", ()))


def test_a_forged_record_does_not_count(store: Store) -> None:
    place = store.root / "built" / "ab" / DIGEST
    place.mkdir(parents=True)
    (place / "entry.json").write_text("{}")
    assert not is_built_here(DIGEST, store)


def test_named_by_the_user(store: Store) -> None:
    check_trust(DIGEST, DIGEST, store=store)
    check_trust(DIGEST, "sha256:" + DIGEST.upper(), store=store)
    with pytest.raises(UntrustedBundle, match="not the one that you trust"):
        check_trust(DIGEST, "cd" * 32, store=store)
    for short in ("", "ab", DIGEST[:16], "yes"):
        with pytest.raises(BundleError, match="not a bundle digest"):
            check_trust(DIGEST, short, store=store)


def test_another_digest_named_beats_the_store(store: Store) -> None:
    record_built(DIGEST, store)
    with pytest.raises(UntrustedBundle):
        check_trust(DIGEST, "cd" * 32, store=store)


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = Store(tmp_path / "file", ())
    with pytest.raises(StoreError):
        record_built(DIGEST, store)
    check_trust(DIGEST, DIGEST, store=store)
