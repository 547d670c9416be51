"""What every section of the settings is made of: its base class, and numbers with a range."""

from __future__ import annotations

from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from pydantic import AllowInfNan

Positive = Annotated[float, Gt(0), AllowInfNan(False)]
NotNegative = Annotated[float, Ge(0), AllowInfNan(False)]
Share = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]


class Settings:
    """Base of every section: a key that is not a field is an error."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    """How pydantic reads a section."""
