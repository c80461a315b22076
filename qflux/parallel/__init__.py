"""Sequences over several devices: exact answers from the parts that ranks have."""

from .context import context_parallel, current_split
from .split import SequenceSplit, shard, unshard

__all__ = ["SequenceSplit", "context_parallel", "current_split", "shard", "unshard"]
