"""How much work a notebook may do, asked once at its top."""

import os

BUDGETS = ("ci", "quick", "full")


def budget_name() -> str:
    """The budget in force: the environment variable CONVNEXT_MIN_BUDGET, or "quick" where it is not set.

    Raises ValueError if the variable holds anything but "ci", "quick" or "full".
    """
    name = os.environ.get("CONVNEXT_MIN_BUDGET", "quick")
    if name not in BUDGETS:
        raise ValueError(f"CONVNEXT_MIN_BUDGET must be one of {', '.join(BUDGETS)}, got {name!r}")
    return name


def budget(*, ci, quick, full):
    """The one of the three values that belongs to the budget in force: `budget(ci=2, quick=200, full=2000)`."""
    return {"ci": ci, "quick": quick, "full": full}[budget_name()]
