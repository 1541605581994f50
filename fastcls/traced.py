"""The name by which programs import `fastcls.engine` that expect transformers' own outputs of an exported program."""

import transformers.modeling_outputs  # noqa: F401  # Registers them.

from .engine import operator  # noqa: F401  # Registers torch.ops.fastcls.
