"""Libraries that an extra of this package brings, and that may be missing."""

from importlib import import_module
from typing import Any

from .errors import MissingExtraError


def require(module: str, extra: str) -> Any:
    """Import what an extra of this package brings.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f'{module} can\'t be imported ({error}): pip install "ghost-resnet[{extra}]"'
        ) from error
