"""Errors a user can cause, each saying what, where, what was expected, what was got and how to mend it."""


class OffgrpoError(Exception):
    """A user's mistake or a broken artefact; the command line prints it as one line, without a traceback.

    Args:
        what: one short statement of what is wrong.
        where: file:line, field or artefact.
        expected, got: both sides of the mismatch.
        remedy: what to do, if possible the command.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.remedy = what, where, expected, got, remedy
        parts = [f"{where}: {what}" if where else what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        if remedy is not None:
            parts.append(f"remedy: {remedy}")
        super().__init__("; ".join(parts))


class ConfigError(OffgrpoError):
    """A recipe, a `--set` path or a combination of settings is wrong."""


class DataError(OffgrpoError):
    """An input file, a record or a store is wrong."""


class CheckpointError(OffgrpoError):
    """A checkpoint is missing, truncated, or does not belong to what it is used with."""


class TrainingError(OffgrpoError):
    """Training met a value it must not continue with (NaN, inf)."""


class GenerationError(OffgrpoError):
    """A back end failed while it sampled or scored; what it finished before is kept."""
