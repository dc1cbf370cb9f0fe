"""Linear layers as secret shares on several workers; everything between them stays in the enclave (`shared`)."""

from functools import partial

import torch

from obfuscatune.enclave.families import Block, Group
from obfuscatune.enclave.keys.base import IdentityKey
from obfuscatune.enclave.recipes.context import Keying
from obfuscatune.enclave.remote.layers import replace_linear
from obfuscatune.enclave.remote.linear import Placed, RemoteLinear
from obfuscatune.enclave.remote.shared import SharedGroup
from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.enclave.sharing.uniform import Uniform
from obfuscatune.enclave.sharing.workers import Workers
from obfuscatune.profiles import Profile


def scheme_of(profile: Profile) -> Scheme:
    """The scheme of a profile that shares. Raises: `UsageError` where there is none."""
    return Scheme.make(
        primes=profile.primes, threshold=profile.threshold, weights=profile.weights, spares=profile.spares
    )


class SharedRecipe:
    """Shares one block after the other, and notes what will stand in their places.

    Masks and the check's vectors are never of the master secret: a session that is resumed shares anew.
    """

    def __init__(self, keying: Keying) -> None:
        self._keying = keying
        uniform = Uniform(keying.secret.stream("masks") if keying.secret.is_test else None)
        sessions = [link.session for link in keying.links]
        self.workers = Workers(sessions, scheme_of(keying.profile), uniform, verify=keying.profile.verify)

    def key_block(self, block: Block) -> None:
        """Share the block's linear layers, those with one input as one weight."""
        for group in block.groups:
            self._share(group)

    def finish(self) -> None:
        """Nothing is of more than one block."""

    def _share(self, group: Group) -> None:
        keying, layers = self._keying, group.layers
        keying.open(*layers)
        path = ", ".join(layer.path for layer in layers)
        weights = [layer.weight for layer in layers]
        weight = torch.cat(weights, dim=1) if len(weights) > 1 else weights[0]
        there = self.workers.define(path, weight)
        for link in keying.links:
            link.parameters += weight.numel()
        into, out = (IdentityKey(size) for size in weight.shape)
        placed = Placed(keying.links[0].session, there.segment, path, into, out, None, weight.dtype)
        together = SharedGroup(placed, [layer.shape[1] for layer in layers], workers=self.workers, weight=there)
        for i, layer in enumerate(layers):
            bias = None if layer.bias is None else layer.bias.to(weight.dtype)
            remote = RemoteLinear(layer.path, together, i, bias)
            keying.replacements.append(partial(replace_linear, layer, remote, with_lora=False))
