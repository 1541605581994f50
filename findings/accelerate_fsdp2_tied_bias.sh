#!/usr/bin/env bash
# A masked language model that accelerate spreads by FSDP2, as `Accelerator.prepare` does on GPUs: one process of gloo,
# `fsdp2_prepare_model`, a training step.
#
# Expected: a step. accelerate puts the table of words and the decoder that is tied to it in one group since 1.15.
# Seen (accelerate 1.15.0, torch 2.13.0, transformers 5.23.0): in BERT, RoBERTa, XLM-RoBERTa, CamemBERT, MPNet, ALBERT,
# ERNIE, RoFormer, Megatron-BERT and DeBERTa-v2 the decoder's bias is tied as well, to `predictions.bias` or
# `lm_head.bias`, whose module stays in the root's group. The first step raises ValueError. ELECTRA, DistilBERT,
# ModernBERT and ESM, which have no second name of the bias, are trained.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 accelerate==1.15.0 transformers==5.23.0 numpy

cat > "$folder/steps.py" <<'PY'
import torch
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import fsdp2_prepare_model

FAILS = "Bert Roberta XLMRoberta Camembert MPNet Albert Ernie RoFormer MegatronBert DebertaV2".split()
STEPS = "Electra DistilBert ModernBert Esm".split()
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
OTHER = {"DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}, "Albert": {"embedding_size": 16}}

ids = torch.tensor([[5, 6, 7, 8]])
for name in FAILS + STEPS:
    sizes = {"vocab_size": 64, "pad_token_id": 0, **({} if name == "DistilBert" else SIZES), **OTHER.get(name, {})}
    model = getattr(transformers, f"{name}ForMaskedLM")(getattr(transformers, f"{name}Config")(**sizes))
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    spread, found = fsdp2_prepare_model(accelerator, model), "steps"
    try:
        spread(input_ids=ids, labels=ids).loss.backward()
    except ValueError as error:
        found = str(error).split(" is shared")[0]
    print(f"{name:12} {found}")
    assert found.endswith("bias'") == (name in FAILS), "no longer so"
PY
cd "$folder"
export HF_HOME="$folder/home"
"$folder/venv/bin/torchrun" --nproc_per_node 1 steps.py
