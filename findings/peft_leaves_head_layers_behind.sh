#!/usr/bin/env bash
# LoRA for classification (task_type SEQ_CLS) on an encoder that had no head: trained, saved, and loaded onto the same
# encoder again.
#
# Expected: the logits that it had, since PEFT trains and saves the head for this task type beside the adapters.
# Seen (peft 0.21.2, transformers 5.23.0): it does so for layers called "classifier" and "score" alone. The heads of
# DeBERTa v2 (pooler.dense), ModernBERT (head.dense, head.norm) and EuroBERT (dense) have another layer, which
# transformers makes anew, at random, at each load: it is frozen, it is not saved, nothing is said, and the loaded model
# has other logits, by 0.3 to 3 here. Named in modules_to_save it is trained and saved, and the logits are the same.
# BERT's pooler comes with the encoder, and RoBERTa's head is one module called "classifier": both come back.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy

cat > "$folder/heads.py" <<'PY'
import sys

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

print("peft", peft.__version__, "transformers", transformers.__version__)
SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def gone(model_type: str, targets: list[str], saved: list[str] | None) -> float:
    """By how much logits move that are saved and loaded again."""
    torch.manual_seed(0)
    place, adapter = f"{sys.argv[1]}/{model_type}", f"{sys.argv[1]}/{model_type}-adapter"
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    AutoModel.from_config(AutoConfig.for_model(model_type, **SIZES, **special)).save_pretrained(place)
    ids = torch.randint(5, 100, (4, 12))

    def loaded(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(place, initializer_range=0.2)

    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets, modules_to_save=saved)
    model = peft.get_peft_model(loaded(1), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(adapter)
    again = peft.PeftModel.from_pretrained(loaded(2), adapter)
    with torch.no_grad():
        return float((model.eval()(input_ids=ids).logits - again.eval()(input_ids=ids).logits).abs().max())


for model_type, targets, lacking in (
    ("bert", ["query", "value"], None),
    ("roberta", ["query", "value"], None),
    ("deberta-v2", ["query_proj", "value_proj"], ["pooler.dense"]),
    ("modernbert", ["Wqkv"], ["head.dense", "head.norm"]),
    ("eurobert", ["q_proj", "v_proj"], ["dense"]),
):
    moved = gone(model_type, targets, None)
    print(f"{model_type}: logits move by {moved:.3f}")
    assert (moved > 1e-2) == (lacking is not None), "no longer so"
    if lacking is not None:
        moved = gone(model_type, targets, lacking)
        print(f"{model_type} with modules_to_save={lacking}: by {moved:.3f}")
        assert moved < 1e-5, "no longer so"
PY
"$folder/venv/bin/python" -W ignore "$folder/heads.py" "$folder"
