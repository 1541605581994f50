#!/usr/bin/env bash
# transformers' ModernBERT in float64 with eager attention, on a batch whose texts differ in length.
#
# Expected: the answers of float32, only more exact: whoever needs a reference calls `model.double()`.
# Seen (transformers 5.23.0, torch 2.13.0): the shorter text's logits are NaN, without a warning. In float32 and bfloat16
# they are finite, and with sdpa they are in float64, too. The mask holds float64's lowest number, but the softmax is taken
# in float32 whatever the model's dtype is: there the number is -inf, and a row whose window holds padding alone has
# nothing else. Without padding no number is NaN, and float64 is only as exact as float32's softmax.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy

cat > "$folder/modernbert.py" <<'PY'
import torch
import transformers

torch.manual_seed(0)
config = transformers.ModernBertConfig(
    vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
    local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
)
model = transformers.ModernBertForSequenceClassification(config).eval()
ids = torch.randint(5, 200, (2, 40))
mask = torch.ones_like(ids)
mask[1, 10:] = 0


@torch.no_grad()
def logits(attention: str, dtype: torch.dtype, **inputs: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation(attention)
    return model.to(dtype)(input_ids=ids, **inputs).logits


print(transformers.__version__, torch.__version__)
for attention in ("sdpa", "eager"):
    for dtype in (torch.float32, torch.float64):
        found = logits(attention, dtype, attention_mask=mask)
        print(attention, dtype, found.tolist())
        wrong = attention == "eager" and dtype == torch.float64
        assert found[0].isfinite().all()
        assert bool(found[1].isnan().all()) == wrong, "no longer so"
apart = (logits("eager", torch.float64) - logits("sdpa", torch.float64)).abs().max().item()
print(f"without padding, in float64: eager and sdpa are {apart:.0e} apart")
assert apart > 1e-12, "no longer so"
PY
"$folder/venv/bin/python" "$folder/modernbert.py"
