#!/usr/bin/env bash
# A pair whose second text is empty, as a table with gaps gives after fillna(""): tokenized alone, and in a batch of one.
#
# Expected: the same ids, since a batch of one is one pair; and so the same answer from a pipeline, which tokenizes one at
# a time, as from a batch as models are trained with.
# Seen (transformers 5.23.0 with tokenizers 0.23.3; 5.8.0 and 5.24.0 do the same): tokenizer("good film", "") takes "" for
# no second text and gives [CLS] good film [SEP], tokenizer(["good film"], [""]) ends with a second [SEP], of type 1. So
# pipeline("text-classification") answers otherwise than the model does for the batch, whatever its batch_size, while a
# blank, " ", is a second text in both.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy

cat > "$folder/pairs.py" <<'PY'
import sys

import tokenizers
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, pipeline

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film", "bad"]
with open(sys.argv[1], "w", encoding="utf-8") as file:
    file.write("\n".join(words))
tokenizer = BertTokenizer(sys.argv[1])
print(transformers.__version__, tokenizers.__version__, type(tokenizer).__name__, tokenizer.is_fast)

alone = tokenizer("good film", "")
batch = tokenizer(["good film"], [""])
print("alone:", tokenizer.convert_ids_to_tokens(alone["input_ids"]), alone["token_type_ids"])
print("in a batch of one:", tokenizer.convert_ids_to_tokens(batch["input_ids"][0]), batch["token_type_ids"][0])
assert tokenizer("good film", " ")["input_ids"] == tokenizer(["good film"], [" "])["input_ids"][0]

torch.manual_seed(0)
config = BertConfig(vocab_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
config.initializer_range = 0.5
model = BertForSequenceClassification(config).eval()
classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
pair = {"text": "good film", "text_pair": ""}
found = classify([pair, pair], batch_size=2, top_k=None, function_to_apply="none")[0]
by_pipeline = {each["label"]: each["score"] for each in found}
with torch.no_grad():
    by_batch = model(**tokenizer(["good film"], [""], return_tensors="pt")).logits[0].tolist()
print("logits by the pipeline:", [round(by_pipeline[f"LABEL_{index}"], 3) for index in (0, 1)])
print("logits of the batch:   ", [round(logit, 3) for logit in by_batch])
assert len(batch["input_ids"][0]) == len(alone["input_ids"]) + 1, "no longer so"
assert abs(by_pipeline["LABEL_0"] - by_batch[0]) > 0.01, "no longer so"
PY
"$folder/venv/bin/python" -W ignore "$folder/pairs.py" "$folder/vocab.txt"
