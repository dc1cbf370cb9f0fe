"""Records sessions of a private model under a profile, and puts the truth and the attacker's knowledge beside them."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.families import read_decoder
from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.protected import Protected
from obfuscatune.enclave.remote.body import PassedBlock, RemoteBody
from obfuscatune.enclave.remote.linear import Placed, RemoteLinear
from obfuscatune.enclave.remote.whole import RemoteAttention, RemotePart
from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.errors import ObfuscatuneError
from obfuscatune.profiles import Profile
from obfuscatune.studies.audit.attack import Customer, Embeddings, Knowledge, Sample, TrainingTruth, Truth
from obfuscatune.studies.audit.fixtures import Fixtures
from obfuscatune.studies.audit.reader import read_view
from obfuscatune.studies.audit.recorder import RecordingWorker
from obfuscatune.studies.audit.reference import Reference
from obfuscatune.studies.audit.shares import read_shares
from obfuscatune.studies.audit.view import ROLES, STREAMS_OF, WorkerView
from obfuscatune.studies.audit.watched import Watched, pool

TARGET_ROWS = 8  # texts of the target pass
RANK = 4  # of LoRA
TRAINING_STEPS = 4
_IGNORED = -100  # labels that transformers' loss leaves out


@dataclass(frozen=True, repr=False)
class Recorded:
    """A sample with everything that it is judged by.

    Attributes:
        sample: what one worker recorded, or what those that `Watched` names have together. pooled: the view that one
            worker more than may collude have of the same passes together, where rows go to several as shares.
        blocks: of the model, that are in the sample; views and truth count them from 0.
    """

    sample: Sample
    pooled: WorkerView | None
    truth: Truth
    customer: Customer
    profile: Profile
    blocks: range
    budgets: dict[int, int]  # tokens -> passes of the view that have so many
    library: Tensor  # public text ``[n, T]``

    def cut(self, tokens: int) -> tuple[Sample, Truth]:
        """The same with a smaller budget of tokens."""
        sample = Sample(self.sample.view.only(slice(self.budgets[tokens])), self.sample.target, self.sample.training)
        streams = {place: rows[:tokens] for place, rows in self.truth.streams.items()}
        values = {name: getattr(self.truth, name) for name in Truth.__slots__}
        return sample, Truth(**{**values, "tokens": self.truth.tokens[:tokens], "streams": streams})


def record(fixtures: Fixtures, profile: str, seed: int, budgets: Sequence[int]) -> Recorded:
    """Run the private model of the fixtures under a profile: inference, a customer's session, and fine-tuning.

    Args:
        profile: ``NAME[+switch=value...][@KofN]``, see `Watched.parse`. seed: of the text, and which worker is curious
            where there are several. budgets: numbers of tokens, each a multiple of half the model's positions
            and of the one before it.
    """
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of switched-off dropout and unfolded norms; the figures tell
        watched = Watched.parse(profile)
        resolved = watched.profile
        texts = fixtures.text["private"][torch.randperm(len(fixtures.text["private"]), generator=generator)]
        target, rest = texts[:TARGET_ROWS], texts[TARGET_ROWS:]
        batches, passes = _schedule(rest, budgets, fixtures.settings.positions // 2)
        with (
            TemporaryDirectory(prefix="obfuscatune-audit-") as name,
            Recording(watched, Path(name), operator=seed) as recording,
        ):
            view, keys = _inference(fixtures.private, recording, [target, *batches])
            pooled = recording.pooled([_shape(batch) for batch in (target, *batches)])
            chosen = fixtures.text["corpus"][: TARGET_ROWS * 8].split(TARGET_ROWS)  # type: ignore[no-untyped-call]
            customer = Customer(_inference(fixtures.private, recording, chosen)[0], chosen)
            # Every other text is trained on: what is served has both kinds side by side, in the same calls (A20).
            training, trained = _training(fixtures.private, recording, rest[::2], seed)
    blocks = range(*(end + resolved.enclave_blocks for end in (recording.run.start, recording.run.stop)))
    private = Reference(fixtures.private, resolved).only(blocks)
    truth = Truth(
        private=private,
        base=Reference(fixtures.base, resolved).only(blocks),
        tokens=torch.cat([batch.flatten() for batch in batches]),
        target_tokens=target.flatten(),
        target_shape=(target.shape[0], target.shape[1]),
        streams=private.streams(batches),
        target_streams=private.streams([target]),
        keys=keys,
        training=trained,
    )
    sample = Sample(view.only(slice(1, None)), view.only(slice(0, 1)), training)
    return Recorded(sample, pooled, truth, customer, resolved, blocks, passes, fixtures.text["public"])


def knowledge(
    recorded: Recorded, needs: str, base: Any, corpus: Tensor, cache: dict[str, Any], truth: Truth
) -> Knowledge:
    """What an attack with these needs is told. base: the model that stands for the public one. cache: of that base."""
    private, profile = truth.private, recorded.profile
    words, positions = private.embeddings()
    return Knowledge(
        profile=profile,
        design=private.design(),
        vocabulary=len(words),
        corpus=corpus,
        library=recorded.library,
        base=Reference(base, profile).only(recorded.blocks) if "B" in needs else None,
        pairs=truth.streams if "P" in needs else None,
        pair_tokens=truth.tokens if "P" in needs else None,
        embeddings=Embeddings(words, positions, private.first_rows) if "E" in needs else None,
        customer=recorded.customer if "Q" in needs else None,
        cache=cache,
    )


class Recording:
    """Sessions of a profile, one after the other, over as many recording workers as it needs.

    Args:
        directory: for the recordings, of which one session's are there at a time. operator: a number that tells which
            of several workers is the curious one, or the first of those that pool.
    """

    def __init__(self, watched: Watched, directory: Path, operator: int) -> None:
        self._watched, self._profile, self._operator = watched, watched.profile, operator
        self._scheme: Scheme | None = None
        if self._profile.shares:
            self._scheme = Scheme.make(
                threshold=self._profile.threshold, weights=self._profile.weights, spares=self._profile.spares
            )
        count = watched.workers if self._scheme is None else len(self._scheme.points)
        self._paths = [directory / f"recording{i}" for i in range(count)]
        self._workers = [RecordingWorker() for _ in self._paths]
        self._started = ExitStack()
        self._counts: list[int] = []  # of the blocks that each worker has

    def __enter__(self) -> Self:
        """Start the workers."""
        with ExitStack() as stack:
            for worker in self._workers:
                stack.enter_context(worker)
            self._started = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        self._started.close()

    @property
    def run(self) -> range:
        """The blocks of which `view` is, of those that leave, once there was a session; of all sessions the same."""
        return range(self._counts[0]) if self._scheme is not None else self._watched.run(self._counts, self._operator)

    @contextmanager
    def protect(self, model: Any) -> Iterator[Protected]:
        """A session of a model, recorded to its end.

        Raises:
            ObfuscatuneError: a worker does not start, or the blocks are spread otherwise than in the session before.
        """
        with ExitStack() as stack:
            pairs = zip(self._workers, self._paths, strict=True)
            addresses = [stack.enter_context(worker.recording(path)) for worker, path in pairs]
            worker = addresses if len(addresses) > 1 else addresses[0]
            protected = stack.enter_context(protect(model, profile=self._profile, worker=worker))
            counts = [len(link.blocks) for link in protected.links]
            if self._counts not in ([], counts):
                raise ObfuscatuneError("the workers have other blocks than before", got=counts, expected=self._counts)
            self._counts = counts
            yield protected

    def view(self, texts: Sequence[tuple[int, int]]) -> WorkerView:
        """What the curious workers have of the session that ended last. texts: of each pass, number and length."""
        if self._scheme is not None:
            return read_shares([self._paths[self._operator % len(self._paths)]], texts)
        chosen = self._watched.chosen(self._operator)
        first = self.run.start
        starts = [sum(self._counts[:number]) - first for number in chosen]
        views = [read_view(self._paths[number], start) for number, start in zip(chosen, starts, strict=True)]
        return replace(pool(views), texts=tuple(texts))

    def keys(self, model: Any) -> dict[tuple[int, str], Tensor]:
        """The true keys of these blocks, dense, by block and stream."""
        run = self.run
        return {(block - run.start, name): key for (block, name), key in _keys(model).items() if block in run}

    def pooled(self, texts: Sequence[tuple[int, int]]) -> WorkerView | None:
        """What one more workers than may collude have together: passes of all texts but the target's."""
        if self._scheme is None:
            return None
        first = self._operator % len(self._paths)
        together = [*self._paths[first:], *self._paths][: self._scheme.threshold + 1]
        return read_shares(together, texts).only(slice(1, None))


def _schedule(texts: Tensor, budgets: Sequence[int], length: int) -> tuple[list[Tensor], dict[int, int]]:
    """Batches of texts of so many tokens each, such that every budget is a whole number of them."""
    rows = texts.reshape(-1, length)
    batches, passes, done, most = [], {}, 0, 32
    for budget in budgets:
        while done < budget // length:
            count = min(most, budget // length - done)
            batches.append(rows[torch.arange(done, done + count) % len(rows)])
            done += count
        passes[budget] = len(batches)
    return batches, passes


def _inference(
    model: Any, recording: Recording, batches: Sequence[Tensor]
) -> tuple[WorkerView, dict[tuple[int, str], Tensor]]:
    with recording.protect(copy.deepcopy(model)) as protected, torch.no_grad():
        for batch in batches:
            protected.model(input_ids=batch, use_cache=False)
        keys = recording.keys(protected.model)
    return recording.view([_shape(batch) for batch in batches]), keys


def _shape(batch: Tensor) -> tuple[int, int]:
    return batch.shape[0], batch.shape[1]


def _training(model: Any, recording: Recording, texts: Tensor, seed: int) -> tuple[WorkerView, TrainingTruth]:
    """Fine-tune LoRA on texts of different lengths, prompts left out of the loss; the last step is seen in full."""
    generator = torch.Generator().manual_seed(seed)
    batches, scored = [], []
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of the adapter's start
        adapted = get_peft_model(copy.deepcopy(model), _lora(model))
    with recording.protect(adapted) as protected:
        optimizer = protected.create_optimizer("adamw", lr=3e-3)
        for step in range(TRAINING_STEPS):
            ids = texts[step * TARGET_ROWS : (step + 1) * TARGET_ROWS]
            start = torch.randint(0, ids.shape[1] // 2, (len(ids), 1), generator=generator)
            end = torch.randint(ids.shape[1] // 2 + 2, ids.shape[1] + 1, (len(ids), 1), generator=generator)
            place = torch.arange(ids.shape[1])
            labels = ids.masked_fill((place < start) | (place >= end), _IGNORED)
            optimizer.zero_grad()
            loss = protected.model(input_ids=ids, labels=labels, attention_mask=(place < end).long()).loss
            loss.backward()
            optimizer.step()
            batches.append(ids)
            shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], _IGNORED)], dim=1)
            scored.append(shifted != _IGNORED)
        keys = recording.keys(protected.model)
    shapes = [_shape(ids) for ids in batches for _ in range(2)]
    return recording.view(shapes), TrainingTruth(batches, scored, RANK, keys)


def _lora(model: Any) -> LoraConfig:
    """An adapter of the layers that compute q, k and v."""
    layers = next(part for block in read_decoder(model).blocks for part in block.parts).first
    return LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=[layer.name for layer in layers],
        fan_in_fan_out=isinstance(layers[0].base, Conv1D),
    )


def _keys(model: Any) -> dict[tuple[int, str], Tensor]:
    """Dense keys by block and stream, in the order in which blocks' layers stand in the model."""
    found: dict[tuple[int, str], Tensor] = {}
    block, roles = -1, iter(ROLES)
    groups: set[int] = set()  # layers that share an input share a segment, and its keys
    for module in model.modules():
        if isinstance(module, RemoteBody | PassedBlock):
            block += 1
            rotation = (
                module.placed.key_in.dense().double() if isinstance(module, RemoteBody) else found[block - 1, "mlp out"]
            )
            found |= {(block, name): rotation for name in ("attention in", "attention out", "mlp in", "mlp out")}
        elif isinstance(module, RemotePart):
            whole = isinstance(module, RemoteAttention)
            block += whole
            names = ("attention in", "attention out") if whole else ("mlp in", "mlp out")
            found |= _dense(block, names, module.placed)
            roles = iter(ROLES[2:] if whole else ROLES)  # what is alone after it
        elif isinstance(module, RemoteLinear) and id(module.group) not in groups:
            groups.add(id(module.group))
            role = next(roles)
            block += role == "qkv"
            roles = iter(ROLES) if role == "down" else roles
            found |= _dense(block, STREAMS_OF[role], module.group.placed)
    return found


def _dense(block: int, names: tuple[str, str], placed: Placed) -> dict[tuple[int, str], Tensor]:
    keys = (placed.key_in, placed.key_out)
    return {(block, name): key.dense().double() for name, key in zip(names, keys, strict=True)}
