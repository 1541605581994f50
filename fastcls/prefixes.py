"""The beginning of a long text, whose tokens are the first tokens of the whole text."""

from __future__ import annotations

import json
from typing import Any

# A token of English has 4 to 5 characters, so that one prefix is enough for most texts.
_CHARACTERS_A_TOKEN = 6

# Normalizers that look at a word and its white space, and no further. Their names are those of the library tokenizers.
_NORMALIZERS = frozenset(
    (
        "BertNormalizer",
        "Lowercase",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Precompiled",
        "Prepend",
        "Strip",
        "StripAccents",
    )
)
# What they replace stands within a word, or within white space.
_SPACES = ({"Regex": " {2,}"}, {"Regex": " +"}, {"Regex": "\\s+"})
# Pre-tokenizers after which no token reaches from one word to the next, and those that only split further.
_SPLIT_AT_SPACES = frozenset(("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit"))
_SPLIT_WORDS = frozenset(("Digits", "Punctuation", "UnicodeScripts"))


def prefix(text: str, tokens: int) -> str:
    """The words of a text's beginning, probably of more than ``tokens`` tokens; a text that is not long, whole."""
    size = tokens * _CHARACTERS_A_TOKEN
    if len(text) <= 2 * size:
        return text
    # Before a space that follows a word: every word of the prefix is whole, and white space belongs to what follows.
    end = text.find(" ", size)
    while end > 0 and text[end - 1].isspace():
        end = text.find(" ", end + 1)
    return text if end < 0 else text[:end]


def ends_at_words(tokenizer: Any) -> bool:
    """Whether the tokens of a text's first words do not depend on the words behind them.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
    """
    return (
        all(map(_normalizes_words, _parts(tokenizer.normalizer, "normalizers")))
        and _splits_at_spaces(_parts(tokenizer.pre_tokenizer, "pretokenizers"))
        # Dropout draws other tokens at each call.
        and not getattr(tokenizer.model, "dropout", None)
        and not any(any(map(str.isspace, token.content)) for token in tokenizer.get_added_tokens_decoder().values())
    )


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """A component's description, or those of a sequence's members."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    members: list[dict[str, Any]] = state[name] if state["type"] == "Sequence" else [state]
    return members


def _normalizes_words(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":
        pattern = part["pattern"]
        return pattern in _SPACES or ("String" in pattern and len(pattern["String"]) == 1)
    return part["type"] in _NORMALIZERS


def _splits_at_spaces(parts: list[dict[str, Any]]) -> bool:
    def splits(part: dict[str, Any]) -> bool:
        return part["type"] in _SPLIT_AT_SPACES and part.get("use_regex", True) and part.get("split", True)

    return any(map(splits, parts)) and all(splits(part) or part["type"] in _SPLIT_WORDS for part in parts)
