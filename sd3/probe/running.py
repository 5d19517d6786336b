"""Running prompts with a hook that sees the text tokens of every block."""

from __future__ import annotations

GROUP = 64  # prompts whose encoded text is in memory at once
