import pytest

from convnext_min.book.budget import budget, budget_name


@pytest.mark.parametrize("name", ["ci", "quick", "full"])
def test_the_environment_decides(monkeypatch, name):
    monkeypatch.setenv("CONVNEXT_MIN_BUDGET", name)
    assert budget(ci="ci", quick="quick", full="full") == budget_name() == name


def test_quick_unless_said_otherwise(monkeypatch):
    monkeypatch.delenv("CONVNEXT_MIN_BUDGET", raising=False)
    assert budget(ci=1, quick=2, full=3) == 2


def test_an_unknown_budget_is_refused(monkeypatch):
    monkeypatch.setenv("CONVNEXT_MIN_BUDGET", "fast")
    with pytest.raises(ValueError, match="one of ci, quick, full, got 'fast'"):
        budget(ci=1, quick=2, full=3)
