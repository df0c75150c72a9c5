"""Every error that the package raises on purpose. Each says what was expected, what came and what to do."""


class GhostResNetError(Exception):
    """Base of all errors of this package."""


class UnsupportedArgumentError(GhostResNetError, TypeError):
    """A network or block was given an argument that it does not know or can't honour."""
