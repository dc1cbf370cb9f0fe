"""The parts of a block one by one, each by its side: whole on the worker, or its linear layers alone."""

from typing import Protocol

from obfuscatune.enclave.families import Block, Decoder
from obfuscatune.enclave.recipes.context import Keying
from obfuscatune.enclave.recipes.linears import key_group
from obfuscatune.enclave.recipes.stream import StreamRecipe
from obfuscatune.enclave.recipes.whole import key_attention_part, key_mlp_part


class Recipe(Protocol):
    """Keys and ships one block after the other, and notes what will stand in their places."""

    def key_block(self, block: Block) -> None:
        """Key and ship one block, before its plain weights are dropped."""

    def finish(self) -> None:
        """Do what is of more than one block, after the last one."""


class PartRecipe:
    """Attention and MLP each where the profile has it; of a decoder without a record the linear layers."""

    def __init__(self, keying: Keying) -> None:
        self._keying = keying

    def key_block(self, block: Block) -> None:
        """Key and ship what leaves of one block."""
        profile = self._keying.profile
        whole = (("attention", profile.attention, key_attention_part), ("mlp", profile.mlp, key_mlp_part))
        if not block.parts:
            for group in block.groups:
                key_group(self._keying, group)
            return
        for (_, side, key_part), groups in zip(whole, (block.groups[:2], block.groups[2:]), strict=True):
            if side == "worker":
                key_part(self._keying, block)
                continue
            for group in groups:
                key_group(self._keying, group)

    def finish(self) -> None:
        """Nothing is of more than one block."""


def recipe_of(keying: Keying, decoder: Decoder) -> Recipe:
    """Return the recipe of a keyed profile, one for each worker."""
    return StreamRecipe(keying, decoder) if keying.profile.rotate_stream else PartRecipe(keying)
