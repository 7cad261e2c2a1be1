"""A chip family outside the tree, in one file: what an entry point of the group `flagtree.targets` names."""

from flagtree.targets.base import Reach, Target

TARGETS = (
    Target(name="toy:one", family="toy", description="a chip that exists only in the tests", language="cpp", toolchain="cxx",
           tiers=("source", "binary"), aliases=("plaything",), max_threads=1, dtypes=frozenset({"f32"}),
           probe=lambda: Reach("source", missing="the toy's compiler", how="nobody sells it")),
)
