"""Every error that the package raises on purpose. Each says what was expected, what came and what to do."""

from pathlib import Path


class GhostResNetError(Exception):
    """Base of all errors of this package."""


class UnsupportedArgumentError(GhostResNetError, TypeError):
    """A network or block was given an argument that it does not know or can't honour."""


class UnreadableImageError(GhostResNetError, ValueError):
    """A file, byte string or array can't be read as a photo."""


class OverflowedError(GhostResNetError, ArithmeticError):
    """The network's outputs for a photo are no finite numbers."""


class DataError(GhostResNetError, ValueError):
    """Labelled photos, or the list of them, are not what they should be."""


class MissingExtraError(GhostResNetError, ImportError):
    """A library that only an extra brings is not installed."""


class SurgeryError(GhostResNetError, ValueError):
    """A network is not one that surgery or distillation can work on, or its images are not images."""


class RecipeError(GhostResNetError, ValueError):
    """A training recipe has an unknown key or a value of the wrong type."""


class RunError(GhostResNetError):
    """A run folder can't be written to, resumed or read."""


class TrainingError(GhostResNetError):
    """Training can't go on."""


class BenchmarkError(GhostResNetError):
    """There is nothing to compare, or what was to be measured did not run."""


class OutputError(GhostResNetError, ValueError):
    """A file of answers can't be written, or not continued."""


class SourceError(GhostResNetError, ValueError):
    """A name means no weights: no tag, folder, file or hub repository."""


class ConfigError(GhostResNetError, ValueError):
    """A `config.json` can't be used."""


class LabelError(GhostResNetError, ValueError):
    """A class name that the model does not know."""


class WeightsError(GhostResNetError, ValueError):
    """A weights file is damaged, or does not fit its network."""


class BackendError(GhostResNetError, ValueError):
    """A back end is not installed, or can't do what is asked of it."""


class ExportError(GhostResNetError, ValueError):
    """A network can't be exported, or what came out does not answer as the original."""


class DownloadError(GhostResNetError, OSError):
    """The hub can't be reached, refuses, or lacks a file."""


class UploadError(GhostResNetError, OSError):
    """The hub can't be reached, or refuses what is sent."""


class IntegrityError(GhostResNetError, ValueError):
    """A file's hash is not the expected one.

    Attributes:
        file: The file.
        expected: Its expected hash.
        got: The hash of what is there.
        repair: The command that repairs it.
        aside: Where the bad file has been moved to; None if it could not be moved.
    """

    def __init__(self, file: Path, expected: str, got: str, repair: str, aside: Path | None) -> None:
        super().__init__(file, expected, got, repair, aside)
        self.file, self.expected, self.got, self.repair, self.aside = file, expected, got, repair, aside

    def __str__(self) -> str:
        moved = f"moved aside to {self.aside}" if self.aside else "it could not be moved aside, so remove it yourself"
        return (
            f"{self.file} is not what it should be: expected hash {self.expected}, got {self.got}; {moved}; "
            f"repair: {self.repair}"
        )
