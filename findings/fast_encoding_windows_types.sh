#!/usr/bin/env bash
# A pair whose second text is long, tokenized in overlapping windows (truncation "only_second" with a stride), as for
# question answering: by encode_batch, and by encode_batch_fast, which is to be the same but for offsets.
#
# Expected: the same ids and type ids in each window.
# Seen (tokenizers 0.22.2 and 0.23.3): the same ids and sequence_ids, but in the windows behind the first the fast call
# gives the second text type 0, as if it belonged to the first; only the [SEP] at its end keeps type 1. So a model reads
# another input there, and nothing is said. The windows of "only_first" are right, and so is each first one; templates
# and BertProcessing do so alike. (The fast call leaves the tokens' texts out, too: they are "".)
# fastcls asks encode_batch for windows.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/windows.py" <<'PY'
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

print("tokenizers", tokenizers.__version__)
WORDS = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "a": 3, "b": 4}
PROCESSORS = {
    "template": processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    ),
    "BertProcessing": processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0)),
}

for name, processor in PROCESSORS.items():
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processor
    for strategy, pair in (("only_second", ("a", "b " * 10)), ("only_first", ("a " * 10, "b"))):
        tokenizer.enable_truncation(8, stride=1, strategy=strategy)
        found = {}
        for encode in (tokenizer.encode_batch, tokenizer.encode_batch_fast):
            (first,) = encode([pair])
            windows = [first, *first.overflowing]
            found[encode.__name__] = [(window.ids, window.type_ids, window.sequence_ids) for window in windows]
        usual, fast = found["encode_batch"], found["encode_batch_fast"]
        assert len(usual) == len(fast) > 1
        for index, ((ids, types, texts), (fast_ids, fast_types, fast_texts)) in enumerate(zip(usual, fast)):
            print(f"{name}, {strategy}, window {index}:", *map(tokenizer.id_to_token, ids))
            print("    encode_batch:     ", types)
            print("    encode_batch_fast:", fast_types)
            assert (ids, texts) == (fast_ids, fast_texts)
            assert types == [int(place > ids.index(1)) for place in range(len(ids))]
            assert (types != fast_types) == (strategy == "only_second" and index > 0), "no longer so"
PY
for package in tokenizers==0.22.2 tokenizers==0.23.3; do
    python3 -m venv "$folder/$package"
    "$folder/$package/bin/pip" install --quiet --disable-pip-version-check "$package"
    "$folder/$package/bin/python" "$folder/windows.py"
done
