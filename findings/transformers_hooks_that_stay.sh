#!/usr/bin/env bash
# Forward hooks on the modules of a transformers model, after it was asked for hidden states once, and after gradient
# checkpointing was switched on, input gradients asked for, and all of it switched off again.
#
# Expected: none. A call's options are that call's, and what enable does disable undoes.
# Seen (transformers 5.23.0; 5.8.0 and 5.24.0 do the same): output_hidden_states=True leaves a hook on every layer of BERT
# for good; and as gradient checkpointing registers the hook that enable_input_require_grads registers, one of the two
# stays behind. So "has forward hooks" does not say that somebody changed a model, and a hook's code has to be asked.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy

cat > "$folder/hooks.py" <<'PY'
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification


def hooked(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_hooks]


def bert() -> BertForSequenceClassification:
    config = BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    return BertForSequenceClassification(config).eval()


print(transformers.__version__)
asked = bert()
with torch.no_grad():
    asked(torch.tensor([[5, 6, 7]]))
    assert hooked(asked) == []
    asked(torch.tensor([[5, 6, 7]]), output_hidden_states=True)
print("asked for hidden states once:", hooked(asked))
trained = bert()
trained.gradient_checkpointing_enable()
trained.enable_input_require_grads()
trained.gradient_checkpointing_disable()
trained.disable_input_require_grads()
print("everything switched off again:", hooked(trained))
assert sum(name.startswith("bert.encoder.layer.") for name in hooked(asked)) >= 3, "no longer so"
assert hooked(trained) == ["bert.embeddings.word_embeddings"], "no longer so"
PY
"$folder/venv/bin/python" -W ignore "$folder/hooks.py"
