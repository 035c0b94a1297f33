"""Every error that Upriver raises on purpose is one of these.

A message says what is wrong, the value found, and what to do: ``<what is wrong>: got <value>; <what to do>``.
Each class knows the exit status of a command that ends with it: 2 where what was given is wrong, 1 where the run failed.
"""


class UpriverError(Exception):
    """This is the base of all errors raised on purpose."""

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


class LayerError(ModelError):
    """One layer cannot be tracked; where it is left out instead, ``why`` is what is said of it."""

    def __init__(self, sentence: str, layer: str, why: str):
        super().__init__(sentence)
        self.layer, self.why = layer, why


class ConfigError(InputError):
    """An option or a key of the run file is not valid."""


class MismatchError(InputError):
    """An artifact on disk was made from other inputs than those given now."""


class NumericalError(UpriverError):
    """A NaN or an infinity stands where a number should be."""


class ResourceError(UpriverError):
    """The memory of the device ran out."""


class StorageError(UpriverError):
    """The disk is full, or a file cannot be written or read back."""
