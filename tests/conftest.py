"""What all tests share: no network, two threads, hypothesis without a clock, data beside the checkout."""

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is: enclave and worker share the cores
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(2)
# A shell without job control starts what it puts in the background with SIGINT ignored, which all children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A shared machine may stall any example, and the examples must be the same on every run.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at those million objects in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped where it is missing."""
    directory = Path(__file__).parents[2] / "shared"
    if not directory.is_dir():
        pytest.skip("there is no folder 'shared' beside the checkout")
    return directory


def _byte_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<start>"])
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 257)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<start>", pad_token="<end>"
    )


@pytest.fixture(scope="session")
def new_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Make a tokenizer of one token a byte, 256 the end of a text, 257 its start where ``bos`` is set."""
    return _byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer that nobody may change."""
    return _byte_tokenizer()
