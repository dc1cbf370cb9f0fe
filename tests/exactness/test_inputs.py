"""What would end in torch's own error is refused by name, under every profile, and the session goes on."""

from typing import Any

import pytest
import torch

from obfuscatune.errors import UnsupportedModelError

from .families import twins_of
from .models import VOCABULARY, gradients, scalar, tokens
from .test_autocast import AGAINST_PLAIN, off


@pytest.mark.parametrize("profile", ["enclave", "paper", "balanced", "stream"])
def test_a_token_beyond_the_embedding_and_a_mixture_of_half_widths(protect: Any, profile: str) -> None:
    reference, model = twins_of("gpt2", dtype=torch.bfloat16)
    ids = tokens(2, 8)
    with protect(model, profile=profile) as protected, torch.no_grad():
        for wrong in (VOCABULARY, -1):
            beyond = ids.index_fill(1, torch.tensor([3]), wrong)
            with pytest.raises(UnsupportedModelError, match=f"no embedding of: got {wrong}, expected 0 to"):
                protected.model(input_ids=beyond)
            with pytest.raises(UnsupportedModelError, match="no embedding of"):
                protected.model(beyond)
        with (
            torch.autocast("cpu", dtype=torch.float16),
            pytest.raises(UnsupportedModelError, match="another half-width dtype than the weights have: got torch"),
        ):
            protected.model(input_ids=ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert protected.model(input_ids=ids).logits.isfinite().all()
        assert torch.allclose(protected.model(ids).logits, reference(ids).logits, atol=0.2)


@pytest.mark.parametrize("profile", ["paper", "balanced"])
@pytest.mark.parametrize("backward", [None, torch.float16])
def test_float32_under_float16(protect: Any, profile: str, backward: torch.dtype | None) -> None:
    """No worse than the plain model, which runs its backward under the same autocast or under none, but no other."""

    def run(model: Any, forward: torch.dtype | None) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=forward, enabled=forward is not None):
            logits = model(input_ids=tokens(2, 8)).logits
        with torch.autocast("cpu", dtype=backward, enabled=forward is backward is not None):
            scalar(logits.float()).backward()
        return {"logits": logits.detach().float(), **gradients(model)}

    reference, model = twins_of("gpt2", dtype=torch.float32)
    exact = run(reference, None)
    with protect(model, profile=profile) as protected:
        plain, got = run(reference, torch.float16), run(protected.model, torch.float16)
    assert off(got, exact) < AGAINST_PLAIN * off({name: plain[name] for name in got}, exact)
