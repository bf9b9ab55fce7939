"""The scores, on cases worked out by hand."""

import pytest

from common.metrics import anls, anls_recipe, exact_match, mean


@pytest.mark.parametrize(
    ("prediction", "accepted", "official", "recipe"),
    [
        ("4821", ["4821"], 1.0, 1.0),
        ("4821.", ["4821"], 0.8, 1.0),  # one of five characters to delete; the recipe strips full stops
        (" 4821 .", ["4821"], 4 / 6, 1.0),
        ("Abc", ["abc"], 1.0, 2 / 3),  # case counts in the recipe's variant only
        ("ABC", ["abc"], 1.0, 0.0),
        ("a  b\nc", ["a b c"], 1.0, 4 / 6),  # the official variant folds white space: one blank more, one changed
        ("48", ["4821"], 0.5, 0.0),  # exactly half: the official threshold keeps it, the recipe's drops it
        ("4", ["4821"], 0.0, 0.0),
        ("wrong", ["right", "wrong"], 1.0, 1.0),  # the best of the accepted answers
        ("", ["4821"], 0.0, 0.0),
        ("", [""], 1.0, 0.0),  # an empty prediction scores 0 in the recipe's variant
        ("...", ["..."], 1.0, 0.0),
        ("4821", [], 0.0, 0.0),
    ],
)
def test_anls(prediction, accepted, official, recipe):
    assert anls(prediction, accepted) == pytest.approx(official)
    assert anls_recipe(prediction, accepted) == pytest.approx(recipe)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [("Yes.", "yes", 1.0), (" yes ", "Yes.", 1.0), ("Yes .", "yes", 1.0), ("no", "yes", 0.0), ("", "yes", 0.0)],
)
def test_exact_match(prediction, answer, expected):
    assert exact_match(prediction, answer) == expected


def test_mean():
    assert mean([]) == 0.0
    assert mean([1.0, 0.0, 0.5]) == 0.5
