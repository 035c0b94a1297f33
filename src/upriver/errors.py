"""Every error that Upriver raises on purpose.

    UpriverError                 exit status 1: the run failed
    ├── InputError               exit status 2: what was given is wrong
    │   ├── CorpusError          a record, file or folder of the corpus
    │   ├── QueryError           a query
    │   ├── ModelError           the model, its weights, its tokenizer, the layers asked for
    │   ├── ConfigError          an option or a key of the run file
    │   └── MismatchError        an artifact made from other inputs than those given now
    ├── NumericalError           NaN or infinity where a number should be
    └── StorageError             the disk is full, or a file cannot be written or read back

A message says what is wrong, the value found, and what to do: ``<what is wrong>: got <value>; <what to do>``.
"""


class UpriverError(Exception):
    """Base of all errors raised on purpose."""

    exit_status = 1


class InputError(UpriverError):
    """What was given is wrong; nothing was computed from it."""

    exit_status = 2


class CorpusError(InputError):
    """A record, file or folder of the corpus cannot be used."""


class QueryError(InputError):
    """A query cannot be used."""


class ModelError(InputError):
    """The model, its weights, its tokenizer, or the layers asked for cannot be used."""


class ConfigError(InputError):
    """An option or a key of the run file is not valid."""


class MismatchError(InputError):
    """An artifact on disk was made from other inputs than those given now."""


class NumericalError(UpriverError):
    """A NaN or an infinity where a number should be."""


class StorageError(UpriverError):
    """The disk is full, or a file cannot be written or read back."""
