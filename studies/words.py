"""A small language model of whole words, as several studies train one."""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import upriver as up


def tokenizer_of(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word is a token."""
    words = ["<end>", *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def fresh(width: int, tokenizer: PreTrainedTokenizerFast) -> up.Model:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    return up.Model(LlamaForCausalLM(config), tokenizer)
