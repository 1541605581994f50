"""Registers `fastcls.engine` and transformers' outputs, for exported programs whose callers expect those."""

import transformers.modeling_outputs  # noqa: F401  # Registers them.

from .engine import operator  # noqa: F401  # Registers torch.ops.fastcls.
