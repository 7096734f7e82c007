"""Features and groups of rows have the names that are known of them."""

from __future__ import annotations

import pytest

from tdhook.pages.names import feature_names, group_name


def test_features() -> None:
    assert feature_names((2, 2), "abcd") == ["a", "b", "c", "d"]
    assert feature_names((3,), ["a"]) == ["x0", "x1", "x2"]
    assert feature_names((), []) == ["x0"]


@pytest.mark.parametrize(
    "by, group, name",
    [
        (None, 0, "all rows"),
        ("action", 1, "right"),
        ("action", 2, "action 2"),
        (("next", "done"), 1, "next.done 1"),
        (len, 3, "<built-in function len> 3"),
    ],
)
def test_groups(by: object, group: int, name: str) -> None:
    assert group_name(by, group, ["left", "right"]) == name
