"""The budget of a notebook: how much work its cells do."""

import os

BUDGETS = ("ci", "quick", "full")


def budget_name() -> str:
    """Return the current budget: the environment variable CONVNEXT_MIN_BUDGET, or "quick" if it is not set.

    Raises ValueError for any value except "ci", "quick" or "full".
    """
    name = os.environ.get("CONVNEXT_MIN_BUDGET", "quick")
    if name not in BUDGETS:
        raise ValueError(f"CONVNEXT_MIN_BUDGET must be one of {', '.join(BUDGETS)}, got {name!r}")
    return name


def budget(*, ci, quick, full):
    """Return the value for the current budget: `budget(ci=2, quick=200, full=2000)`."""
    return {"ci": ci, "quick": quick, "full": full}[budget_name()]
