"""How a corpus is read: what, besides its files and the tokenizer, decides its sequences."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from upriver.errors import ConfigError

TOKEN_DTYPES = ("uint16", "uint32")


class Reading(NamedTuple):
    """Stored with everything that is made of a corpus, so that the corpus is read in the same way again."""

    seq_len: int = 512
    pack: bool = False
    on_bad_record: str = "error"
    text_field: str | None = None  # that holds the text, or the messages
    prompt_field: str | None = None
    completion_field: str | None = None
    split: str | None = None  # of a data set that has several
    token_dtype: str | None = None  # of shards of tokens that do not say it themselves

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Reading":
        """The settings that a manifest or the ``info`` of a corpus tells."""
        return cls(**{name: told[name] for name in cls._fields})

    def checked(self) -> "Reading":
        """Return these settings.

        Raises:
            ConfigError: one of them makes no sense, alone or with another.
        """
        if self.seq_len < 2:
            raise ConfigError(
                f"a sequence needs at least 2 tokens, one to predict from the other: got seq-len {self.seq_len}"
            )
        if self.on_bad_record not in ("error", "skip"):
            raise ConfigError(f"on_bad_record is 'error' or 'skip': got {self.on_bad_record!r}")
        if self.text_field and (self.prompt_field or self.completion_field):
            raise ConfigError(
                f"a record is one text, or prompt and completion: got --text-field {self.text_field!r} with "
                "--prompt-field or --completion-field; give one or the other"
            )
        if self.token_dtype not in (None, *TOKEN_DTYPES):
            raise ConfigError(f"bad value for --token-dtype: got {self.token_dtype!r}; {' or '.join(TOKEN_DTYPES)}")
        return self
