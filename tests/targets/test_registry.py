"""The registry: names, aliases, closest names, and families that come in from outside the tree by one file."""

from importlib.metadata import EntryPoint

import pytest

import flagtree.targets as registry
from flagtree.errors import UnknownName
from flagtree.targets import FAMILIES, TargetError, all_targets, find_target, register

TOY = EntryPoint("toy", "tests.targets.toy_target", registry.GROUP)


def test_every_name_and_alias_finds_its_target_in_any_case() -> None:
    for target in all_targets():
        for name in (target.name, *target.aliases):
            assert find_target(name) is target
            assert find_target(f" {name.upper()} ") is target


def test_each_target_is_listed_once_and_belongs_to_a_family_in_the_table() -> None:
    names = [target.name for target in all_targets()]
    assert len(names) == len(set(names))
    assert {target.family for target in all_targets()} >= set(FAMILIES)


@pytest.mark.parametrize(("alias", "family"), [("nvidia", "cuda"), ("amd", "rocm"), ("maca", "metax"), ("c550", "metax")])
def test_the_names_that_users_type(alias: str, family: str) -> None:
    assert find_target(alias).family == family


def test_an_unknown_name_lists_the_closest() -> None:
    with pytest.raises(UnknownName, match=r"closest: .*metax"):
        find_target("metaxx")


def test_one_file_outside_the_tree_is_a_target() -> None:
    names = register({}, [TOY])
    assert set(names) == {"toy:one", "plaything"}
    assert names["plaything"] is names["toy:one"]


def test_a_clash_of_names_is_an_error_and_never_an_override() -> None:
    again = EntryPoint("zoo", "tests.targets.toy_target", registry.GROUP)
    with pytest.raises(TargetError, match="two targets are called 'toy:one'"):
        register({}, [TOY, again])
    with pytest.raises(TargetError, match="two targets"):
        register({"toy": "tests.targets.toy_target"}, [TOY])


@pytest.mark.parametrize(("value", "said"), [("no_such_module_at_all", "does not load"), ("json", "without a table")])
def test_a_family_that_cannot_be_used_is_named(value: str, said: str) -> None:
    with pytest.raises(TargetError, match=said) as caught:
        register({}, [EntryPoint("broken", value, registry.GROUP)])
    assert value in caught.value.where
